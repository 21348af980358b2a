"""Triton kernels with torch paths: batched Sinkhorn optimal transport and fused ECG convolutions."""

from ecgot.kernels.conv1d import conv1d
from ecgot.kernels.sinkhorn import (
    SinkhornDivergenceOutput,
    SinkhornLoss,
    SinkhornOutput,
    SinkhornPairwiseOutput,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
    sinkhorn_pairwise,
    sinkhorn_varlen,
)

__all__ = [
    "SinkhornDivergenceOutput",
    "SinkhornLoss",
    "SinkhornOutput",
    "SinkhornPairwiseOutput",
    "conv1d",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_pairwise",
    "sinkhorn_varlen",
]
