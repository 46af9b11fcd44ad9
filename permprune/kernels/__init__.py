"""Products with packed N:M weights: native kernels for the processor at hand, and the same in PyTorch."""
