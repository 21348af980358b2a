"""Fused channels-last 1-D convolutions: in Triton and in torch."""
