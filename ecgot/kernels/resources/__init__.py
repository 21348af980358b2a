"""What the Triton kernels need on which GPU, found by compiling them; no GPU is needed."""
