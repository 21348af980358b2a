"""Sinkhorn's algorithm in fp64, as the textbook writes it, for any batch of costs and in chunks of rows.

It shares no code with the solvers that are measured.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 1000  # rows of a plan that are there at a time: 80 MB at 10,000 columns


def cost_matrix(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """x [..., N, D] and y [..., M, D] to [..., N, M]; by products, which fp64 can afford."""
    if cost == "cosine":
        return 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    if cost == "sqeuclidean":
        return x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :] - 2 * x @ y.mT
    if cost == "dot":
        return -x @ y.mT
    raise ValueError(f"cost: expected 'sqeuclidean', 'cosine' or 'dot', got {cost!r}")


def solve(cost: Tensor, eps: float, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dual values [...] and potentials f [..., N], g [..., M] of uniform weights, starting with g = 0."""
    log_n, log_m = (math.log(count) for count in cost.shape[-2:])
    g = torch.zeros_like(cost[..., 0, :])
    for _ in range(iterations):
        f = eps * (log_m - torch.logsumexp((g[..., None, :] - cost) / eps, -1))
        g = eps * (log_n - torch.logsumexp((f[..., :, None] - cost) / eps, -2))
    return f.mean(-1) + g.mean(-1), f, g


def value_and_gradients(
    x: Tensor, y: Tensor, eps: float, iterations: int, cost: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [...], and the gradients of their sum in x and y with the plan held fixed."""
    x, y = (each.detach().double().requires_grad_() for each in (x, y))
    costs = cost_matrix(x, y, cost)
    with torch.no_grad():
        value, f, g = solve(costs, eps, iterations)
        plan = torch.exp((f[..., :, None] + g[..., None, :] - costs) / eps) / math.prod(costs.shape[-2:])
    grad_x, grad_y = torch.autograd.grad((plan * costs).sum(), (x, y))
    return value, grad_x, grad_y


@dataclass(frozen=True)
class Streamed:
    """One large problem's solution: value [], potentials [N], [M], gradients [N, D], [M, D].

    iterations: the fewest that bring the marginal error to the tolerance.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    grad_x: Tensor
    grad_y: Tensor
    iterations: int


def streamed(x: Tensor, y: Tensor, eps: float, tol: float, most: int = 1000) -> Streamed:
    """Squared distances of x [N, D] and y [M, D], solved to a thousandth of the tolerance."""
    x, y = x.detach().double(), y.detach().double()
    log_n, log_m = math.log(len(x)), math.log(len(y))
    g, needed = torch.zeros_like(y[:, 0]), 0
    f = eps * (log_m - _log_sums(x, y, g, eps))
    for iteration in range(1, most + 1):
        g = eps * (log_n - _log_sums(y, x, f, eps))
        before, f = f, eps * (log_m - _log_sums(x, y, g, eps))
        # The rows' sums before f was moved are off by what moves it.
        error = (torch.expm1((before - f) / eps) / len(x)).abs().sum().item()
        if error <= tol and not needed:
            needed = iteration
        if error <= 1e-3 * tol:
            break
    if not needed:
        raise RuntimeError(f"marginal error: expected at most {tol:g} in {most} iterations, got {error:.1e}")
    rows, to_y, columns, to_x = _plan_products(x, y, f, g, eps)
    return Streamed(
        f.mean() + g.mean(),
        f,
        g,
        2 * (rows[:, None] * x - to_y),
        2 * (columns[:, None] * y - to_x),
        needed,
    )


def marginal_error(x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float) -> float:
    """L1 distance of the marginals of the potentials' plan from uniform ones, of the worse side."""
    rows, _, columns, _ = _plan_products(
        x.detach().double(), y.detach().double(), f.double(), g.double(), eps
    )
    return max((each - 1 / len(each)).abs().sum().item() for each in (rows, columns))


def _log_sums(x: Tensor, y: Tensor, g: Tensor, eps: float) -> Tensor:
    """[N]: logsumexp over y of (g - cost) / eps."""
    parts = [torch.logsumexp((g - cost_matrix(part, y, "sqeuclidean")) / eps, 1) for part in x.split(CHUNK)]
    return torch.cat(parts)


def _plan_products(
    x: Tensor, y: Tensor, f: Tensor, g: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P 1 [N], P y [N, D], P^T 1 [M] and P^T x [M, D]."""
    rows, to_y = [], []
    columns, to_x = torch.zeros_like(y[:, 0]), torch.zeros_like(y)
    for part, f_part in zip(x.split(CHUNK), f.split(CHUNK), strict=True):
        cost = cost_matrix(part, y, "sqeuclidean")
        plan = torch.exp((f_part[:, None] + g - cost) / eps) / (len(x) * len(y))
        rows.append(plan.sum(1))
        to_y.append(plan @ y)
        columns += plan.sum(0)
        to_x += plan.mT @ part
    return torch.cat(rows), torch.cat(to_y), columns, to_x
