"""One batch of solved problems, and what POT calls its value, plan and potentials.

POT's plan of ``reg`` is ours of eps = reg: the constants by which its objectives differ do not move it.

    entropy, <P, M> + reg sum P log P:           our value + reg (sum a log a + sum b log b)
    KL,      <P, M> + reg sum P log(P / (a b)):  our value
    unbalanced, whose KLs leave masses out:      our value + reg (m - |a| |b|)
                                                           + rho_a (m - |a|) + rho_b (m - |b|)

with m the mass of P and |a| that of a. Where the marginals are kept but their mass is not 1, the problem of
mass 1 is solved: P = m P'.
"""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels import SinkhornOutput, SinkhornWarning, sinkhorn, sinkhorn_from_cost


@dataclass(frozen=True)
class Stopping:
    """When POT would stop: after ``max_iter`` iterations, or at a marginal error of ``tol``."""

    max_iter: int
    tol: float
    warn: bool = True


@dataclass(frozen=True)
class Transport:
    """B solved problems.

    Attributes:
        out: the solution of the problems of mass 1; where unbalanced of the problems themselves.
        a, b: [B, N] and [B, M], the weights as they were given.
        mass: [B]; 1 where unbalanced.
        reg: POT's, and our eps.
        rhos: penalties of the two marginals, infinite where they are kept.
    """

    out: SinkhornOutput
    a: Tensor
    b: Tensor
    mass: Tensor
    reg: float
    rhos: tuple[float, float] = (math.inf, math.inf)

    def plan(self) -> Tensor:
        """[B, N, M]."""
        return self.mass[:, None, None] * self.out.plan()

    def value_linear(self) -> Tensor:
        """<P, M> [B]."""
        return self.mass * self.out.transport_cost()

    def value(self, reg_type: str) -> Tensor:
        """POT's objective [B] with regulariser "kl" or "entropy"."""
        if all(map(math.isinf, self.rhos)):
            value = self.mass * self.out.value
            shift = self.mass * self.mass.log()
            if reg_type == "entropy":
                return value + self.reg * (_self_entropy(self.a) + _self_entropy(self.b) - shift)
            return value - self.reg * shift
        moved = self.plan().sum((1, 2))
        masses = self.a.sum(1), self.b.sum(1)
        value = self.out.value + self.reg * (moved - masses[0] * masses[1])
        for rho, mass in zip(self.rhos, masses, strict=True):
            if math.isfinite(rho):
                value = value + rho * (moved - mass)
        return value

    def log_scalings(self) -> tuple[Tensor, Tensor]:
        """log u [B, N] and log v [B, M] with P = u exp(-M / reg) v, determined up to a constant."""
        f, g = self.relative_scalings()
        return f + self.a.log(), g + self.b.log() - self.mass.log()[:, None]

    def relative_scalings(self) -> tuple[Tensor, Tensor]:
        """log u [B, N] and log v [B, M] with P = a u exp(-M / reg) v b, of mass 1 if balanced."""
        return self.out.f / self.reg, self.out.g / self.reg


def solve_cost(
    cost: Tensor, a: Tensor, b: Tensor, reg: float, stopping: Stopping, **options: Any
) -> Transport:
    """Transport of costs [B, N, M].

    Args:
        a, b: [B, N] and [B, M], any positive mass, the same on both sides where both marginals are kept.
        options: ``rhos``; ``start``, log v [B, M] from which to start, relative to the weights b.
    """
    rhos = options.get("rhos", (math.inf, math.inf))
    (one_a, one_b), mass = _of_mass_one(a, b, rhos)
    with _quiet(stopping):
        out = sinkhorn_from_cost(cost, a=one_a, b=one_b, **_settings(cost, reg, stopping, options))
    return Transport(out, a, b, mass, reg, rhos)


def solve_points(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, reg: float, stopping: Stopping, **options: Any
) -> Transport:
    """Transport between points [B, N, D] and [B, M, D], without storing costs.

    options: ``metric``, one of ours; and those of :func:`solve_cost`.
    """
    rhos = options.get("rhos", (math.inf, math.inf))
    (one_a, one_b), mass = _of_mass_one(a, b, rhos)
    settings = _settings(x, reg, stopping, options)
    with _quiet(stopping):
        out = sinkhorn(x, y, a=one_a, b=one_b, cost=options["metric"], **settings)
    return Transport(out, a, b, mass, reg, rhos)


def check_reg(reg: Any) -> float:
    """POT's ``reg``, which must be there: without it the problem is not entropic."""
    if reg is None or not float(reg) > 0:
        raise ValueError(f"reg: expected a number > 0 (for exact transport use POT itself), got {reg!r}")
    return float(reg)


def _settings(like: Tensor, reg: float, stopping: Stopping, options: dict[str, Any]) -> dict[str, Any]:
    rho_x, rho_y = (None if math.isinf(rho) else rho for rho in options.get("rhos", (math.inf, math.inf)))
    start = options.get("start")
    # Below its rounding no marginal error gets, and every solve would run to the last iteration.
    floor = 100 * torch.finfo(like.dtype).eps if like.dtype in (torch.float32, torch.float64) else 1e-5
    return {
        "eps": reg,
        "rho_x": rho_x,
        "rho_y": rho_y,
        "max_iter": max(1, stopping.max_iter),
        "tol": max(stopping.tol, floor),
        "init": None if start is None else reg * start,
    }


def _of_mass_one(a: Tensor, b: Tensor, rhos: tuple[float, float]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Weights that sum to 1, and the mass [B] of both; as they are, and 1, where unbalanced."""
    a_mass, b_mass = a.detach().sum(1), b.detach().sum(1)
    if not all(map(math.isinf, rhos)):
        return (a, b), torch.ones_like(a_mass)
    wrong = (a_mass - b_mass).abs() > 1e-3 * torch.maximum(a_mass, b_mass)
    if a.device.type == "cpu" and bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"a and b: expected equal sums, got {a_mass[at].item():.6g} and {b_mass[at].item():.6g}"
        )
    a_mass, b_mass = (torch.where(mass > 0, mass, 1.0) for mass in (a_mass, b_mass))
    return (a / a_mass[:, None], b / b_mass[:, None]), a_mass


def _self_entropy(weights: Tensor) -> Tensor:
    return torch.xlogy(weights, weights).sum(1)


def _quiet(stopping: Stopping) -> contextlib.AbstractContextManager[Any]:
    """Keeps the solver from warning, where POT does not."""
    if stopping.warn or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _without_warnings()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SinkhornWarning)
        yield
