"""Models, text and images from packages of the Python registry, for machines without access to a model hub."""
