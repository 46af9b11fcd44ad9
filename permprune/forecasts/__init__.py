"""The memory, the disk space and the time of a run, known from the model's config alone."""
