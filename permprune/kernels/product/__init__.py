"""Products with packed weights: their form, the native and Triton kernels, and the layers that run on them."""
