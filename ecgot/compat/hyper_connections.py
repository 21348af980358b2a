"""The doubly stochastic matrices of manifold-constrained hyper-connections.

Source: Xie et al. 2025, "mHC: Manifold-Constrained Hyper-Connections", which divides the columns and then the
rows of exp(logits) by their sums, 20 times.
"""

from torch import Tensor

from ecgot.kernels import doubly_stochastic


def sinkhorn_knopp(logits: Tensor, iterations: int = 20) -> Tensor:
    """How n residual streams mix: matrices [..., n, n] whose rows sum to 1, and whose columns nearly do.

    Args:
        logits: [..., n, n], one matrix a token or layer. On a GPU one launch takes them all, and one more
            the gradient.
        iterations: exactly as many.

    >>> import torch
    >>> mixing = sinkhorn_knopp(torch.randn(1000, 4, 4))
    >>> (mixing.sum(2) - 1).abs().max().item() < 1e-5
    True
    """
    return doubly_stochastic(logits, iterations=iterations)
