"""Triton kernels with torch paths: batched Sinkhorn optimal transport and fused ECG convolutions."""

from ecgot.kernels.conv.backends import conv1d_backends
from ecgot.kernels.conv.conv1d import conv1d
from ecgot.kernels.conv.conv1d_bottleneck import conv1d_bottleneck
from ecgot.kernels.conv.conv1d_norm import conv1d_norm
from ecgot.kernels.conv.join import join, materialize
from ecgot.kernels.conv.operands import BatchNorm, FusedLayer, LazyActivation
from ecgot.kernels.conv.pooling import max_pool1d, mean_pool1d
from ecgot.kernels.ot.convergence import SinkhornWarning
from ecgot.kernels.ot.divergence import sinkhorn_divergence
from ecgot.kernels.ot.loss import SinkhornLoss
from ecgot.kernels.ot.outputs import SinkhornDivergenceOutput, SinkhornOutput, SinkhornPairwiseOutput
from ecgot.kernels.ot.pairwise import sinkhorn_pairwise
from ecgot.kernels.ot.sinkhorn import sinkhorn, sinkhorn_from_cost
from ecgot.kernels.ot.varlen import sinkhorn_varlen
from ecgot.kernels.scaling.doubly_stochastic import doubly_stochastic

__all__ = [
    "BatchNorm",
    "FusedLayer",
    "LazyActivation",
    "SinkhornDivergenceOutput",
    "SinkhornLoss",
    "SinkhornOutput",
    "SinkhornPairwiseOutput",
    "SinkhornWarning",
    "conv1d",
    "conv1d_backends",
    "conv1d_bottleneck",
    "conv1d_norm",
    "doubly_stochastic",
    "join",
    "materialize",
    "max_pool1d",
    "mean_pool1d",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_pairwise",
    "sinkhorn_varlen",
]
