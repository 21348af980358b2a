"""The transport kernels as a folder that can be published on Hugging Face's Kernel Hub."""
