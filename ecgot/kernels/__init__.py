"""Triton kernels with torch paths: batched Sinkhorn optimal transport and fused ECG convolutions."""

from ecgot.kernels.conv1d import conv1d
from ecgot.kernels.sinkhorn import SinkhornLoss, SinkhornOutput, sinkhorn

__all__ = ["SinkhornLoss", "SinkhornOutput", "conv1d", "sinkhorn"]
