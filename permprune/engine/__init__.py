"""One run, from the dense model to the pruned one."""
