"""Models and text from the package registry, for machines without a model hub."""
