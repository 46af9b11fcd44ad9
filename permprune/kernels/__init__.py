"""Products with packed N:M weights: native CPU kernels, and a reference implementation in PyTorch."""
