"""Batched log-domain Sinkhorn optimal transport: in Triton, in compiled loops on a CPU, and in torch."""
