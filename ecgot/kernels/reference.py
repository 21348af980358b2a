"""Entropic optimal transport as the textbook writes it: fp64, one problem at a time, log domain.

The oracle of the tests. It shares no code with the fast paths, imports no Triton, and is slow on purpose:
every problem is cropped to its valid points and solved alone, so that masks, padding and batching in the
fast paths are checked against something that has none of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class ReferenceSolution:
    """One problem's solution: value [], f [n], g [m], plan [n, m], all fp64."""

    value: Tensor
    f: Tensor
    g: Tensor
    plan: Tensor
    marginal_error: float
    iterations: int


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """Pairwise cost of x [n, D] and y [m, D] as [n, m], by explicit differences and products."""
    if cost == "sqeuclidean":
        return (x[:, None, :] - y[None, :, :]).square().sum(-1)
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[:, None, :], y[None, :, :], dim=-1)
    raise ValueError(f"cost: got {cost!r}, accepted are 'sqeuclidean' and 'cosine'")


def solve(cost: Tensor, a: Tensor, b: Tensor, eps: float, *, max_iter: int, tol: float) -> ReferenceSolution:
    """Sinkhorn's algorithm on cost [n, m] with weights a [n], b [m]; differentiable throughout."""
    log_a, log_b = a.log(), b.log()
    g = torch.zeros_like(b)
    f = -eps * torch.logsumexp(log_b[None, :] + (g[None, :] - cost) / eps, dim=1)
    error, iterations = float("inf"), 0
    while True:
        g = -eps * torch.logsumexp(log_a[:, None] + (f[:, None] - cost) / eps, dim=0)
        plan = torch.exp(log_a[:, None] + log_b[None, :] + (f[:, None] + g[None, :] - cost) / eps)
        error = (plan.sum(1) - a).abs().sum().item()
        iterations += 1
        if error <= tol or iterations >= max_iter:
            break
        f = -eps * torch.logsumexp(log_b[None, :] + (g[None, :] - cost) / eps, dim=1)
    value = (a * f).sum() + (b * g).sum()
    return ReferenceSolution(value, f, g, plan, error, iterations)


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    max_iter: int = 10_000,
    tol: float = 1e-12,
) -> list[ReferenceSolution]:
    """Solve each problem of x [B, N, D], y [B, M, D] alone, cropped to its valid points."""
    solutions = []
    for index in range(x.shape[0]):
        keep_x = slice(None) if x_mask is None else x_mask[index]
        keep_y = slice(None) if y_mask is None else y_mask[index]
        xi, yi = x[index][keep_x].double(), y[index][keep_y].double()
        ai = torch.full_like(xi[:, 0], 1 / len(xi)) if a is None else a[index][keep_x].double()
        bi = torch.full_like(yi[:, 0], 1 / len(yi)) if b is None else b[index][keep_y].double()
        solutions.append(solve(cost_matrix(xi, yi, cost), ai, bi, eps, max_iter=max_iter, tol=tol))
    return solutions
