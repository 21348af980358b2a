"""Triton kernels with torch paths: batched Sinkhorn optimal transport and fused ECG convolutions."""

from ecgot.kernels._convolution import FoldedLayer, Signal
from ecgot.kernels.conv1d import conv1d
from ecgot.kernels.conv1d_bottleneck import conv1d_bottleneck
from ecgot.kernels.conv1d_norm import computed, conv1d_norm, join, max_pool1d, mean_pool1d
from ecgot.kernels.conv1d_table import conv1d_backends
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
    "FoldedLayer",
    "Signal",
    "SinkhornDivergenceOutput",
    "SinkhornLoss",
    "SinkhornOutput",
    "SinkhornPairwiseOutput",
    "computed",
    "conv1d",
    "conv1d_backends",
    "conv1d_bottleneck",
    "conv1d_norm",
    "join",
    "max_pool1d",
    "mean_pool1d",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_pairwise",
    "sinkhorn_varlen",
]
