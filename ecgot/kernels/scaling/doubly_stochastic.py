"""Square matrices made doubly stochastic, differentiable through every normalisation."""

import torch
from torch import Tensor

from ecgot.kernels.scaling.operators import doubly_stochastic_op

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def doubly_stochastic(logits: Tensor, *, iterations: int = 20, rows_first: bool = False) -> Tensor:
    """exp(logits), its columns and then its rows divided by their sums, ``iterations`` times.

    Args:
        logits: [..., n, n], floating point, any strides. Infinity or NaN spoils its own matrix alone; minus
            infinity forbids an entry.
        iterations: how often, >= 1. Exactly as often: nothing looks whether it has converged.
        rows_first: divide the rows first, and the columns last.

    Returns:
        [..., n, n] in the dtype of the logits, computed in fp32 (fp64 for fp64). The sums divided by last are
        1, the others the nearer to 1 the more iterations. Differentiable once, exactly, through all
        iterations; what is kept for it is the logits alone. On a GPU matrices of up to 16 x 16 take one
        launch forward and one backward, however many they are.

    Raises:
        ValueError, TypeError: one line, "NAME: expected X, got Y".

    Source: Sinkhorn and Knopp 1967, "Concerning nonnegative matrices and doubly stochastic matrices".

    >>> plan = doubly_stochastic(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    >>> plan.sum(0).tolist(), plan.sum(1).tolist()
    ([1.0, 1.0], [1.0, 1.0])
    >>> plan.logit().round(decimals=3).tolist()  # exp(2) is shared by rows and columns
    [[1.0, -1.0], [-1.0, 1.0]]
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in DTYPES or logits.layout != torch.strided:
        raise TypeError(f"logits: expected a dense floating point tensor, got {logits.dtype} {logits.layout}")
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits: expected [..., n, n], got shape {tuple(logits.shape)}")
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations!r}")
    if not logits.numel():
        return logits.clone()
    flat = (logits.mT if rows_first else logits).reshape(-1, *logits.shape[-2:])
    plan = doubly_stochastic_op(flat, iterations).view(logits.shape)
    return plan.mT if rows_first else plan
