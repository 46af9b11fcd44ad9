"""Files, devices, memory, processes and progress: everything that is not specific to pruning."""
