"""Models in memory: their layers, what they read, and how they run."""
