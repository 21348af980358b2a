"""POT's ``ot.batch``: many problems at once, in one call of the solver."""

from typing import Any

import torch

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.missing import refuse_others
from ecgot.compat.pot.result import GRADIENTS, OTResult
from ecgot.compat.pot.transport import Stopping, check_reg, solve_cost
from ecgot.compat.pot.utils import costs, points

__all__ = [
    "dist_batch",
    "loss_linear_batch",
    "loss_linear_samples_batch",
    "solve_batch",
    "solve_sample_batch",
]
__getattr__ = refuse_others(__name__, __all__)

METHODS = ("auto", "log_sinkhorn", "sinkhorn")
METRICS = ("sqeuclidean", "euclidean", "minkowski", "kl")
REG_TYPES = ("kl", "entropy")


def solve_batch(
    M: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """``ot.batch.solve_batch`` with ``reg > 0``.

    Args:
        M: costs [B, N, M]; infinity forbids a pair.
        a, b: weights [B, N] and [B, M], uniform if None.
        reg, reg_type: strength of the regulariser, "entropy" or "kl".
        max_iter, tol: most iterations, and the marginal error to stop at; each problem stops by itself.
        method: "auto", "log_sinkhorn" or "sinkhorn", which makes ``potentials`` the scalings themselves.
        grad: as in :func:`ecgot.compat.pot.solvers.solve`.
        inner_iter, inner_reg: of POT's proximal method, without effect.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS} (for others use POT itself), got {method!r}")
    if reg_type not in REG_TYPES:
        raise ValueError(f"reg_type: expected 'kl' or 'entropy', got {reg_type!r}")
    if grad not in GRADIENTS:
        raise ValueError(f"grad: expected one of {', '.join(map(repr, GRADIENTS))}, got {grad!r}")
    arrays = Arrays(M, a, b)
    cost = arrays.shaped("M", M, "costs [B, N, M]")
    count, n, m = cost.shape
    a, b = (
        cost.new_full((count, length), 1 / max(length, 1))
        if each is None
        else arrays.of_shape(name, each, (count, length), cost)
        for name, each, length in (("a", a, n), ("b", b, m))
    )
    found = solve_cost(cost, a, b, check_reg(reg), Stopping(max_iter, tol, warn=False))
    potentials = found.log_scalings()
    if method == "sinkhorn":
        potentials = potentials[0].exp(), potentials[1].exp()
    return OTResult(
        found, arrays, reg_type=reg_type, grad=grad, batched=True, potentials=potentials, cost=cost
    )


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    reg: float | None = None,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    """``ot.batch.solve_sample_batch``: :func:`solve_batch` between points [B, N, D] and [B, M, D]."""
    points(Arrays(X_a, X_b), ("X_a", "X_b"), X_a, X_b, "[B, N, D]")
    M = dist_batch(X_a, X_b, metric=metric, p=p)
    return solve_batch(M, reg, a, b, max_iter=max_iter, tol=tol, method=method, reg_type=reg_type, grad=grad)


def dist_batch(X1: Any, X2: Any = None, metric: str = "sqeuclidean", p: float = 2, nx: Any = None) -> Any:
    """``ot.batch.dist_batch``: costs [B, N, M] between points, with POT's four metrics; ``nx`` has no effect.

    "kl" is KL(y | x) of points that are distributions.
    """
    arrays = Arrays(X1, X2)
    x, y = points(arrays, ("X1", "X2"), X1, X2, "[B, N, D]")
    if metric.lower() not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if metric.lower() == "kl":
        own = (y * torch.log(y + 1e-10)).sum(2)
        return arrays.back(own[:, None, :] - torch.log(x + 1e-10) @ y.mT)
    return arrays.back(costs(x, y, metric.lower(), p))


def loss_linear_batch(M: Any, T: Any, nx: Any = None) -> Any:
    """``ot.batch.loss_linear_batch``: <T, M> [B] of costs and plans [B, N, M]; ``nx`` has no effect."""
    arrays = Arrays(M, T)
    cost = arrays.shaped("M", M, "costs [B, N, M]")
    return arrays.back((cost * arrays.shaped("T", T, "plans [B, N, M]")).sum((1, 2)))


def loss_linear_samples_batch(X: Any, Y: Any, T: Any, metric: str = "sqeuclidean") -> Any:
    """``ot.batch.loss_linear_samples_batch``: <T, M> [B] with the costs of :func:`dist_batch`."""
    return loss_linear_batch(dist_batch(X, Y, metric=metric), T)
