"""What the Triton kernels need on several GPUs, found by compiling them; no GPU is needed."""
