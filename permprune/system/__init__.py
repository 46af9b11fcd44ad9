"""Files, devices, memory, processes and progress: what is not about models."""
