"""Sinkhorn's iteration in torch, on any device and in any dtype.

``Softmins`` hides how a log-sum-exp over the other side is formed (from a stored cost matrix, in chunks of
rows, or by a streaming kernel); ``iterate`` is the algorithm, and the stopping rule, for all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecgot.kernels.ot.problem import MAX_ANNEALING, Problem, Result, SolverSettings, start_temperature

CHECK_EVERY = 16  # iterations between checks for convergence on a GPU, where each check waits for it


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
    eps = problem.eps[:, None]
    a, _ = problem.weights()
    tau_x, tau_y = (tau[:, None] for tau in problem.damping())
    g = torch.zeros_like(problem.b) if init is None else init / eps
    g, annealing = _annealed(problem, softmins, g, settings.scaling)

    solvable, tiny = problem.solvable(), torch.finfo(a.dtype).tiny
    f = torch.zeros_like(problem.a)
    error = torch.where(solvable, math.inf, 0.0).to(a.dtype)
    iterations = torch.where(solvable, annealing, 0)
    going = solvable
    f_next = -tau_x * softmins.rows(g, None)
    for iteration in range(1, settings.max_iter + 1):
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
        going = going & (residual > settings.tol)  # False for NaN, which would never converge
        if is_check_due(going, iteration) and not bool(going.any()):
            break
    f = torch.where(solvable[:, None] & (problem.a >= 0), f * eps, 0.0)
    g = torch.where(solvable[:, None] & (problem.b >= 0), g * eps, 0.0)
    return f, g, error, iterations.to(torch.int32)


def is_check_due(tensor: Tensor, iteration: int) -> bool:
    """Whether to check for convergence now: always on a CPU, seldom on a GPU, never in a CUDA graph."""
    if tensor.device.type == "cpu":
        return True
    capturing = tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return iteration % CHECK_EVERY == 0 and not capturing


def _annealed(problem: Problem, softmins: Softmins, g: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """g after one update at each temperature from the largest cost down to eps; and how many, [B]."""
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
