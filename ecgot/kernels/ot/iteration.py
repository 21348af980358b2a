"""Sinkhorn's algorithm for problems whose costs do not stay on a chip, on any device and in any dtype.

``run`` is the algorithm: annealing, the order of updates, the stopping rule, and when to look at it.
``Updates`` is what it moves: ``TorchUpdates`` here, from log-sum-exps that ``Softmins`` forms (from a stored
cost matrix, or in chunks of rows), and the kernels of ``triton_streaming``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ecgot.kernels.ot.problem import (
    MAX_ANNEALING,
    Problem,
    Result,
    SolverSettings,
    partnered,
    start_temperature,
)

CHECK_EVERY = 16  # iterations between looks for convergence on a GPU, where each look waits for it
MAX_CAPTURED = 100  # iterations that a CUDA graph records, and as many steps of annealing


class Updates(Protocol):
    """The potentials of a batch in units of eps, and how far each problem is.

    Attributes:
        going: [B], not 0 where a problem goes on; the others keep their potentials.
    """

    going: Tensor

    def anneal(self, temperature: Tensor, following: Tensor, hot: Tensor) -> None:
        """f from g, then g from f, at a temperature [B], where ``hot`` [B]; ``following`` is the next one."""

    def start(self) -> None:
        """f from g at eps."""

    def advance(self) -> None:
        """One iteration: g from f, the next f from g, the marginal error, and which problems go on."""

    def result(self) -> Result:
        """f [B, N] and g [B, M] of each problem's last iteration, its error [B], and its iterations [B]."""


@dataclass
class Softmins:
    """Log-sum-exps over the other side, in units of eps, at a temperature T [B] (None is 1).

    Attributes:
        rows: (g [B, M], T) -> [B, N], T log sum_j b_j exp((g_j - C_ij / eps) / T).
        columns: (f [B, N], T) -> [B, M], the same over i.
    """

    rows: Callable[[Tensor, Tensor | None], Tensor]
    columns: Callable[[Tensor, Tensor | None], Tensor]


def iterate(problem: Problem, softmins: Softmins, init: Tensor | None, settings: SolverSettings) -> Result:
    """Potentials f [B, N] and g [B, M] in units of the cost, marginal error [B], iterations [B]."""
    temperatures = annealing(problem, settings)
    return run(TorchUpdates(problem, softmins, init, settings.tol), temperatures, problem, settings)


def run(updates: Updates, temperatures: Tensor, problem: Problem, settings: SolverSettings) -> Result:
    """What :func:`iterate` returns, by any updates; ``temperatures`` as :func:`annealing` makes them."""
    hot = temperatures > 1
    for step in range(len(temperatures) - 1):
        updates.anneal(temperatures[step], temperatures[step + 1], hot[step])
    updates.start()
    for iteration in range(1, most_iterations(problem.eps, settings.max_iter) + 1):
        updates.advance()
        if is_check_due(updates.going, iteration) and not bool(updates.going.any()):
            break
    f, g, error, iterations = updates.result()
    solvable, eps = problem.solvable(), problem.eps[:, None]
    f = torch.where(solvable[:, None] & (problem.a >= 0), f * eps, 0.0)
    g = torch.where(solvable[:, None] & (problem.b >= 0), g * eps, 0.0)
    iterations = torch.where(solvable, iterations + hot.sum(0), 0)
    return f, g, error, iterations.to(torch.int32)


def annealing(problem: Problem, settings: SolverSettings) -> Tensor:
    """Temperatures [steps + 1, B] from the largest cost down to 1, the last; one g follows from each other.

    On a GPU this waits for the largest cost, except in a CUDA graph: there the steps serve for any cost, and
    ``scaling`` is lowered so far that there are at most ``MAX_CAPTURED`` of them.
    """
    once, scaling = torch.ones_like(problem.eps)[None], settings.scaling
    if not scaling:
        return once
    start = start_temperature(problem, with_masks=settings.from_masks)
    hottest = MAX_ANNEALING
    if is_capturing(start):
        scaling = min(scaling, MAX_ANNEALING ** (-1 / MAX_CAPTURED))
    else:
        hottest = max(1.0, start.max().item())
    steps = most_iterations(start, math.ceil(math.log(hottest) / -math.log(scaling)))
    factors = start.new_full((steps, len(start)), scaling)
    factors[:1] = start
    return torch.cat([factors.cumprod(0).clamp_min(1.0), once])


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor is recorded into a CUDA graph, so that no value can be read."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def most_iterations(tensor: Tensor, wanted: int) -> int:
    """At most ``MAX_CAPTURED`` in a CUDA graph, which records as many as it may ever need."""
    return min(wanted, MAX_CAPTURED) if is_capturing(tensor) else wanted


def is_check_due(tensor: Tensor, iteration: int) -> bool:
    """Whether to check for convergence now: always on a CPU, seldom on a GPU, never in a CUDA graph."""
    if is_capturing(tensor):
        return False
    return tensor.device.type == "cpu" or iteration % CHECK_EVERY == 0


class TorchUpdates:
    """The updates by operations of torch."""

    def __init__(self, problem: Problem, softmins: Softmins, init: Tensor | None, tol: float) -> None:
        self.going = problem.solvable()
        self._softmins, self._tol = softmins, tol
        self._shift = None if problem.balanced else Shift(problem)
        self._a, _ = problem.weights()
        self._slack_x, self._slack_y = (slack[:, None] for slack in problem.slack())
        self._f = self._f_next = torch.zeros_like(problem.a)
        self._g = torch.zeros_like(problem.b) if init is None else init / problem.eps[:, None]
        self._error = torch.where(self.going, math.inf, 0.0).to(problem.dtype)
        self._iterations = torch.zeros_like(self.going, dtype=torch.int32)

    def anneal(self, temperature: Tensor, following: Tensor, hot: Tensor) -> None:
        """See :class:`Updates`."""
        heat = temperature[:, None]
        f = self._softmins.rows(partnered(self._g), temperature) / -(1 + heat * self._slack_x)
        if self._shift is not None:
            f = f + self._shift(f, self._g)
        g = self._softmins.columns(partnered(f), temperature) / -(1 + heat * self._slack_y)
        self._g = torch.where(hot[:, None], g, self._g)

    def start(self) -> None:
        """See :class:`Updates`."""
        self._f_next = self._softmins.rows(partnered(self._g), None) / -(1 + self._slack_x)

    def advance(self) -> None:
        """See :class:`Updates`."""
        f = self._f_next
        if self._shift is not None:
            f = f + self._shift(f, self._g)
        g = self._softmins.columns(partnered(f), None) / -(1 + self._slack_y)
        self._f_next = self._softmins.rows(partnered(g), None) / -(1 + self._slack_x)
        error = self._marginal_error(f)
        going = self.going
        self._f, self._g = torch.where(going[:, None], f, self._f), torch.where(going[:, None], g, self._g)
        self._error = torch.where(going, error, self._error)
        self._iterations = self._iterations + going.int()
        self.going = going & (error > self._tol)  # False for NaN, which would never converge

    def _marginal_error(self, f: Tensor) -> Tensor:
        """[B]; at f's fixed point row i sums to a_i exp(-f_i / rho), and is off by the step to the next f."""
        step = (f - self._f_next) * (1 + self._slack_x)
        # Points without weight may overflow.
        if self._shift is None:
            return torch.where(self._a > 0, self._a * torch.expm1(step).abs(), 0.0).sum(1)
        # Far clouds: the target may underflow while the step to it overflows.
        share = self._shift.log_targets(f, 0)
        mass = torch.logsumexp(share, 1, keepdim=True)
        share = share - torch.where(mass == -math.inf, 0.0, mass)
        error = torch.exp(share + step.clamp_min(0)) * -torch.expm1(-step.abs())
        return torch.where(share == -math.inf, 0.0, error).sum(1)

    def result(self) -> Result:
        """See :class:`Updates`."""
        return self._f, self._g, self._error, self._iterations


class Shift:
    """How far f should move up and g down, in units of eps, before g is updated from f.

    Where marginals are free, updates alone move the plan's mass by a part rho / (rho + eps) of what is left,
    again and again. Along (f + t, g - t) the plan stays the same, and the dual is largest where both targets
    have the same mass: t (1 / rho_x + 1 / rho_y) = log <a, exp(-f / rho_x)> - log <b, exp(-g / rho_y)>.
    """

    def __init__(self, problem: Problem) -> None:
        self._slack = [slack[:, None] for slack in problem.slack()]
        self._log_weight = [weight.log() for weight in problem.weights()]
        total = self._slack[0] + self._slack[1]
        self._rate = torch.where(total > 0, 1 / total, 0.0)

    def log_targets(self, potential: Tensor, side: int) -> Tensor:
        """log(a exp(-f / rho_x)) [B, N] for side 0, of y for side 1; -infinity at points without weight."""
        slack, log_weight = self._slack[side], self._log_weight[side]
        moved = torch.where(slack > 0, slack * potential, 0.0)  # also where a potential is infinite
        return torch.where(log_weight > -math.inf, log_weight - moved, -math.inf)

    def __call__(self, f: Tensor, g: Tensor) -> Tensor:
        """t [B, 1]; 0 where it is no more than rounding, which would never come to rest."""
        x, y = (torch.logsumexp(self.log_targets(p, i), 1, keepdim=True) for i, p in enumerate((f, g)))
        sizes = [
            torch.where((log_weight > -math.inf) & (p != math.inf), p.abs(), 0.0).amax(1, keepdim=True)
            for log_weight, p in zip(self._log_weight, (f, g), strict=True)
        ]
        step = torch.where(self._rate > 0, self._rate * (x - y), 0.0)
        # A side of which no point may match anything has no mass to shift.
        small = step.abs() <= torch.finfo(x.dtype).eps * (sizes[0] + sizes[1])
        return torch.where(small | ~step.isfinite(), 0.0, step)
