"""Native code and Triton kernels: products with packed weights, the search for orders, Adam, and packed attention."""
