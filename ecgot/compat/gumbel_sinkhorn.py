"""Gumbel-Sinkhorn: nearly permutations, sampled, and differentiable in what made them likely.

Source: Mena et al. 2018, "Learning Latent Permutations with Gumbel-Sinkhorn Networks".
"""

import torch
from torch import Tensor

from ecgot.kernels import doubly_stochastic


def sinkhorn(log_alpha: Tensor, n_iters: int = 20) -> Tensor:
    """exp(log_alpha) [..., n, n], its rows and then its columns divided by their sums, ``n_iters`` times."""
    return doubly_stochastic(log_alpha, iterations=n_iters, rows_first=True)


def gumbel_sinkhorn(
    log_alpha: Tensor,
    temp: float = 1.0,
    n_samples: int = 1,
    noise_factor: float = 1.0,
    n_iters: int = 20,
    squeeze: bool = True,
) -> tuple[Tensor, Tensor]:
    """Samples of the Gumbel-Sinkhorn distribution, with the arguments of its authors' ``gumbel_sinkhorn``.

    Args:
        log_alpha: logits [n, n] or [B, n, n].
        temp: the smaller, the nearer to permutations; tau in the paper.
        n_samples: of each matrix.
        noise_factor: multiplies the Gumbel noise, drawn from torch's generator; 0 draws none.
        n_iters: normalisations of rows and columns.
        squeeze: whether one sample comes without a dimension of its own.

    Returns:
        The matrices [B, n_samples, n, n] ([B, n, n] squeezed), and the logits that they were made from,
        noise and temperature included.

    >>> logits = torch.tensor([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    >>> matrices, _ = gumbel_sinkhorn(logits, temp=0.5, noise_factor=0.0)
    >>> matrices[0].round().int().tolist()
    [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    """
    n = log_alpha.shape[-1]
    logits = log_alpha.reshape(-1, 1, n, n).expand(-1, n_samples, -1, -1)
    if noise_factor:
        logits = logits + noise_factor * sample_gumbel(logits.shape, log_alpha)
    logits = logits / temp
    if n_samples == 1 and squeeze:
        logits = logits[:, 0]
    return sinkhorn(logits, n_iters), logits


def sample_gumbel(shape: torch.Size, like: Tensor, eps: float = 1e-20) -> Tensor:
    """Standard Gumbel noise of a shape, in the dtype of ``like`` and on its device."""
    uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
    return -torch.log(eps - torch.log(uniform + eps))
