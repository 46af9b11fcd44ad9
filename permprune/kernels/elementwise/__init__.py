"""Layers between products: activation functions and RMS norms, for CPU inference."""
