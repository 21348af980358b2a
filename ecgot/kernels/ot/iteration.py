"""Sinkhorn's iteration in torch: any device and dtype, whatever forms the log-sum-exps.

``Softmins`` hides how a log-sum-exp over the other side is formed (a stored cost matrix, chunks of rows, or a
streaming kernel); ``iterate`` is the algorithm, the same for all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecgot.kernels.ot.problem import MAX_ANNEALING, Problem, Result, start_temperature

CHECK_EVERY = 16  # iterations between two looks whether all have converged, where a look waits for a GPU


@dataclass
class Softmins:
    """Log-sum-exp over the other side, in units of eps, at a temperature T [B] (None is 1).

    rows(g, T): [B, N], T log sum_j b_j exp((g_j - C_ij / eps) / T), of g [B, M]; columns(f, T): [B, M].
    """

    rows: Callable[[Tensor, Tensor | None], Tensor]
    columns: Callable[[Tensor, Tensor | None], Tensor]


def iterate(
    problem: Problem, softmins: Softmins, init: Tensor | None, max_iter: int, tol: float, scaling: float
) -> Result:
    """Potentials f [B, N] and g [B, M] in units of the cost, marginal error [B], iterations [B]."""
    eps = problem.eps[:, None]
    a, _ = problem.weights()
    tau_x, tau_y = (tau[:, None] for tau in problem.damping())
    g = torch.zeros_like(problem.b) if init is None else init / eps
    g, annealing = _annealed(problem, softmins, g, scaling)

    solvable, tiny = problem.solvable(), torch.finfo(a.dtype).tiny
    f = torch.zeros_like(problem.a)
    error = torch.where(solvable, math.inf, 0.0).to(a.dtype)
    iterations = torch.where(solvable, annealing, 0)
    going = solvable
    f_next = -tau_x * softmins.rows(g, None)
    for iteration in range(1, max_iter + 1):
        f_now = f_next
        g_now = -tau_y * softmins.columns(f_now, None)
        f_next = -tau_x * softmins.rows(g_now, None)
        # With f at its fixed point row i sums to a_i exp(-f_i / rho); it is off by the step to the next f.
        # Far clouds: the target underflows while the step to it overflows, and 0 * inf would be NaN.
        target = torch.exp(-(1 / tau_x - 1) * f_now).clamp_min(tiny)
        step = torch.expm1((f_now - f_next) / tau_x).abs()
        residual = torch.where(a > 0, a * (target * step), 0.0).sum(1)  # points without weight may overflow
        f, g = torch.where(going[:, None], f_now, f), torch.where(going[:, None], g_now, g)
        error = torch.where(going, residual, error)
        iterations = torch.where(going, annealing + iteration, iterations)
        going = going & (residual > tol)  # so that NaN stops as well: it would never converge
        if _may_look(going, iteration) and not bool(going.any()):
            break
    f = torch.where(solvable[:, None] & (problem.a >= 0), f * eps, 0.0)
    g = torch.where(solvable[:, None] & (problem.b >= 0), g * eps, 0.0)
    return f, g, error, iterations.to(torch.int32)


def _may_look(tensor: Tensor, iteration: int) -> bool:
    if tensor.device.type == "cpu":
        return True
    capturing = tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return iteration % CHECK_EVERY == 0 and not capturing


def _annealed(problem: Problem, softmins: Softmins, g: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """g after one update at each temperature from the largest cost down to eps; and how many there were."""
    if not scaling:
        return g, torch.zeros_like(problem.eps, dtype=torch.int32)
    start = start_temperature(problem)
    if start.device.type == "cpu":
        steps = math.ceil(math.log(max(1.0, start.max().item())) / -math.log(scaling))
    else:
        steps = math.ceil(math.log(MAX_ANNEALING) / -math.log(scaling))
    taken = torch.zeros_like(problem.eps, dtype=torch.int32)
    temperature = start
    for _ in range(steps):
        tau_x, tau_y = (_at(tau, temperature)[:, None] for tau in problem.damping())
        f = -tau_x * softmins.rows(g, temperature)
        hot = temperature > 1
        g = torch.where(hot[:, None], -tau_y * softmins.columns(f, temperature), g)
        taken = taken + hot.int()
        temperature = torch.where(hot, temperature * scaling, temperature).clamp_min(1.0)
    return g, taken


def _at(tau: Tensor, temperature: Tensor) -> Tensor:
    return 1 / (1 + temperature * (1 / tau - 1))
