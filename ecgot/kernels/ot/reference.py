"""Entropic optimal transport as the textbook writes it: fp64, one problem at a time, log domain.

The oracle of the tests. It shares no code with the fast paths, imports no Triton, and is slow on purpose:
every problem is cropped to its valid points and solved alone, so that masks, padding and batching in the
fast paths are checked against something that has none of them.
"""

import math
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
    if cost == "euclidean":
        return torch.linalg.vector_norm(x[:, None, :] - y[None, :, :], dim=-1)
    if cost == "dot":
        return -(x[:, None, :] * y[None, :, :]).sum(-1)
    if cost == "cosine":
        return 1 - torch.nn.functional.cosine_similarity(x[:, None, :], y[None, :, :], dim=-1)
    raise ValueError(f"cost: expected 'sqeuclidean', 'euclidean', 'cosine' or 'dot', got {cost!r}")


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    eps: float,
    *,
    rho_x: float = math.inf,
    rho_y: float = math.inf,
    max_iter: int,
    tol: float,
) -> ReferenceSolution:
    """Sinkhorn's algorithm on cost [n, m] with weights a [n], b [m]; differentiable throughout.

    The value is the primal objective, <P, C> + eps KL(P | a b) + rho_x KL(P 1 | a) + rho_y KL(P^T 1 | b).
    """
    log_a, log_b = a.log(), b.log()
    tau_x, tau_y = 1 / (1 + eps / rho_x), 1 / (1 + eps / rho_y)
    g = torch.zeros_like(b)
    f = -tau_x * eps * torch.logsumexp(log_b[None, :] + (g[None, :] - cost) / eps, dim=1)
    error, iterations = float("inf"), 0
    while True:
        g = -tau_y * eps * torch.logsumexp(log_a[:, None] + (f[:, None] - cost) / eps, dim=0)
        plan = torch.exp(log_a[:, None] + log_b[None, :] + (f[:, None] + g[None, :] - cost) / eps)
        target = a * torch.exp(-f / rho_x)
        error = ((plan.sum(1) - target).abs().sum() / target.sum()).item()
        iterations += 1
        if error <= tol or iterations >= max_iter:
            break
        f = -tau_x * eps * torch.logsumexp(log_b[None, :] + (g[None, :] - cost) / eps, dim=1)
    joint = a[:, None] * b[None, :]
    value = torch.where(plan > 0, plan * cost, 0.0).sum() + eps * _kl(plan, joint)
    for rho, marginal, weight in ((rho_x, plan.sum(1), a), (rho_y, plan.sum(0), b)):
        if math.isfinite(rho):
            value = value + rho * _kl(marginal, weight)
    return ReferenceSolution(value, f, g, plan, error, iterations)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) - p + q."""
    positive = (p > 0) & (q > 0)
    ratio = torch.where(positive, p, 1.0) / torch.where(positive, q, 1.0)
    return (torch.where(positive, p * ratio.log(), 0.0) - p + q).sum()


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
    rho_x: float = math.inf,
    rho_y: float = math.inf,
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
        c = cost_matrix(xi, yi, cost)
        solutions.append(solve(c, ai, bi, eps, rho_x=rho_x, rho_y=rho_y, max_iter=max_iter, tol=tol))
    return solutions
