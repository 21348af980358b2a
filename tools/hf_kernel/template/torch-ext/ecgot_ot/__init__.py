"""Batched entropic optimal transport in Triton, with torch on a CPU."""

from . import layers
from .ot.divergence import sinkhorn_divergence
from .ot.loss import SinkhornLoss
from .ot.outputs import SinkhornDivergenceOutput, SinkhornOutput, SinkhornPairwiseOutput
from .ot.pairwise import sinkhorn_pairwise
from .ot.sinkhorn import sinkhorn, sinkhorn_from_cost
from .ot.varlen import sinkhorn_varlen
from .scaling.doubly_stochastic import doubly_stochastic

__all__ = [
    "SinkhornDivergenceOutput",
    "SinkhornLoss",
    "SinkhornOutput",
    "SinkhornPairwiseOutput",
    "doubly_stochastic",
    "layers",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_pairwise",
    "sinkhorn_varlen",
]
