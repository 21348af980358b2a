"""The normalisations in torch: any n and dtype, for CPUs and where Triton does not serve.

The batch is the last dimension here: sums over a few rows or columns are then sums of long vectors.

The first iteration is done in the logarithm, as sums of exp(logits) may overflow or vanish. After it every
sum is between 1 / n and n: dividing a matrix whose columns sum to 1 by its row sums, which are at most n,
leaves columns of at least 1 / n, and the other way round. So the others divide, without exponentials.
"""

import torch
from torch import Tensor


def forward(logits: Tensor, iterations: int) -> Tensor:
    """The normalised matrices [N, n, n] of logits [N, n, n], columns first, in the logits' dtype."""
    _, plan = _first(logits)
    for _ in range(iterations - 1):
        plan /= plan.sum(0, keepdim=True)
        plan /= plan.sum(1, keepdim=True)
    return plan.permute(2, 0, 1).contiguous().to(logits.dtype)


def backward(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """The gradient in the logits [N, n, n], given that in the result, ``grad`` [N, n, n].

    With P the matrix after a normalisation and H the gradient in log P, the gradient in the logarithm before
    it is H - P sum(H). The sums divided by are kept, n a normalisation, and bring each P back from the next.
    """
    columns, plan = _first(logits)
    divided: list[tuple[int, Tensor]] = []
    for _ in range(iterations - 1):
        for dim in (0, 1):
            divided.append((dim, plan.sum(dim, keepdim=True)))
            plan /= divided[-1][1]
    slope = grad.permute(1, 2, 0) * plan
    for dim, divisor in reversed(divided):
        slope -= plan * slope.sum(dim, keepdim=True)
        plan *= divisor
    slope -= plan * slope.sum(1, keepdim=True)
    slope -= columns * slope.sum(0, keepdim=True)
    return slope.permute(2, 0, 1).contiguous().to(logits.dtype)


def _first(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[n, n, N] each: exp(logits) after its columns, and then also its rows, were divided by their sums."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    columns = logits.permute(1, 2, 0).to(dtype).contiguous().log_softmax(0)
    return columns.exp(), columns.softmax(1)
