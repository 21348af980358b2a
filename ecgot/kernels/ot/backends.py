"""Which solver serves a problem: decided by :func:`backend` and nowhere else.

Solvers are imported when they are first needed: Triton and numba may both be missing.
"""

import importlib
import math
import warnings
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ecgot.kernels.dispatch import use_triton
from ecgot.kernels.ot import torch_small, torch_solver
from ecgot.kernels.ot.centring import (
    centred,
    complete,
    moved_start,
    step_gradients,
    without_zero_centres,
)
from ecgot.kernels.ot.problem import (
    ABSENT,
    CostRange,
    PlanWeights,
    Problem,
    Result,
    Solution,
    SolverSettings,
    can_read_values,
    rounding,
)

# Of the linear system of implicit gradients; fp32 cannot do better than its rounding.
IMPLICIT_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
MAX_ROUNDING = 0.9  # of tol: with more there is little left to iterate for
MAX_STEPS = 1000  # of conjugate gradients
MAX_CACHED_CELLS = 2**22  # products x y^T of a batch, 16 MB in fp32


@lru_cache(maxsize=1)
def _import_numba() -> bool:
    try:
        importlib.import_module("ecgot.kernels.ot.numba_solver")
    except Exception as reason:  # not installed or broken, or there is no place for the cache of its code
        warnings.warn(
            "numba: expected to import it and to cache compiled code, "
            f"got {str(reason).partition(chr(10))[0]!r}: torch solves on the CPU, slower",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def numba_serves() -> bool:
    """Whether the compiled loops can be imported; says once why not. Torch is slower then, and serves."""
    return _import_numba()


# As torch.compiler.assume_constant_result does, without the two seconds that its import takes.
numba_serves._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend(problem: Problem) -> str:
    """ "triton" (one problem on chip), "numba", "torch", or one of these with "-streaming"."""
    n, m = problem.size
    if use_triton(problem.x, problem.y) and problem.dtype == torch.float32:
        from ecgot.kernels.ot import triton_onchip

        if triton_onchip.fits(n, m):
            return "triton"
        if not problem.pairs and problem.cost != "given" and n and m:
            return "triton-streaming"
        return "torch"
    name = "numba" if problem.x.device.type == "cpu" and numba_serves() else "torch"
    stored = n * m <= torch_solver.MAX_CELLS or problem.pairs or problem.cost == "given"
    return name if stored else f"{name}-streaming"


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> tuple[Solution, Tensor]:
    """The whole solution; and the cost cache that :func:`cost_vjp` takes.

    Args:
        problem: without centres.
        init: the potential g [B, M] of the points' own costs to start from; zeros if None.
    """
    name = backend(problem)
    cache = cost_cache(problem, name)
    if init is not None:  # a point that could match nothing there may match something here
        init = torch.where(init == math.inf, 0.0, init)
    found = _solve(name, problem, init, settings, cache)
    if settings.scaling and problem.cost == "given" and not problem.empty:
        found = _from_masks(problem, init, settings, found)
    return found, cache


def _solve(
    name: str, problem: Problem, init: Tensor | None, settings: SolverSettings, cache: Tensor
) -> Solution:
    if name == "numba":
        from ecgot.kernels.ot import numba_small

        small = numba_small.solve(problem, init, settings, cache) if numba_small.fits(problem) else None
        if small is not None:
            return small
    if name == "torch" and init is None and torch_small.fits(problem):
        small = torch_small.solve(problem, settings)
        if small is not None:
            return small
    if name == "triton" and not problem.empty:
        from ecgot.kernels.ot import triton_onchip

        # Pairs share their clouds' centres, and a start must be moved with the clouds.
        centres_itself = init is None and not settings.scaling and not problem.pairs
        problem = problem if centres_itself else centred(problem)
        found = triton_onchip.solve(problem, moved_start(problem, init), settings)
        problem = replace(problem, x_centre=found.x_centre, y_centre=found.y_centre)
        return complete(problem, found, settings.tol)
    problem = centred(problem)
    init = moved_start(problem, init)
    result = _potentials(name, problem, init, settings, cache)
    if not problem.empty:
        result = _with_rounding(name, problem, init, settings, result)
    return complete(problem, Solution(*result), settings.tol)


def _with_rounding(
    name: str, problem: Problem, init: Tensor | None, settings: SolverSettings, found: Result
) -> Result:
    """Adds to the error what rounding costs, of which the loops know nothing.

    What stopped at ``tol`` and is above it by that alone is solved again, to as much less, if that leaves a
    goal to reach. Elsewhere, and where values cannot be read, it is not converged.
    """
    f, g, error, iterations = found
    off = rounding(problem, f, g)
    total = error + off
    short = (error <= settings.tol) & (total > settings.tol) & (off <= MAX_ROUNDING * settings.tol)
    if not can_read_values(short) or not bool(short.any()):
        return f, g, total, iterations
    goal = settings.tol - 1.05 * off[short].max().item()  # the second potentials may be a little larger
    part = problem
    if not problem.pairs:  # the others are not solved
        part = replace(problem, a=torch.where(short[:, None], problem.a, ABSENT))
    second = _potentials(name, part, init, replace(settings, tol=goal), problem.eps.new_empty(0))
    second_total = second[2] + rounding(problem, *second[:2])
    better = short & (second_total < total)
    each = better.unsqueeze(-1)
    return (
        torch.where(each, second[0], f),
        torch.where(each, second[1], g),
        torch.where(better, second_total, total),
        torch.where(short, iterations + second[3], iterations),
    )


def _from_masks(problem: Problem, init: Tensor | None, settings: SolverSettings, found: Solution) -> Solution:
    """Solve again what did not converge, annealing from all finite costs: there were no masks after all."""
    assert found.converged is not None
    wrong = CostRange.of(problem).masked & ~found.converged
    if can_read_values(wrong) and not wrong.any():
        return found
    part = replace(problem, a=torch.where(wrong[:, None], problem.a, ABSENT))  # the others are not solved
    cache = problem.eps.new_empty(0)
    second = _solve(backend(part), part, init, replace(settings, from_masks=True), cache)
    better = wrong & ((second.error < found.error) | found.error.isnan())

    for name in ("f", "g", "error", "value", "whole_f", "whole_g", "converged"):
        old, new = getattr(found, name), getattr(second, name)
        chosen = better if old.dim() == 1 else better[:, None]
        setattr(second, name, torch.where(chosen, new, old))
    return replace(second, iterations=found.iterations + second.iterations)


def _potentials(
    name: str, problem: Problem, init: Tensor | None, settings: SolverSettings, cache: Tensor
) -> Result:
    """Potentials of the moved clouds' costs, marginal error and iterations."""
    if problem.empty:
        shape, (n, m), zeros = problem.shape, problem.size, problem.eps.new_zeros
        return zeros(*shape, n), zeros(*shape, m), zeros(shape), zeros(shape, dtype=torch.int32)
    if name == "numba":
        from ecgot.kernels.ot import numba_solver

        return numba_solver.solve(problem, init, settings, cache)
    if name == "numba-streaming":
        from ecgot.kernels.ot import numba_streaming

        return numba_streaming.solve(problem, init, settings)
    if name == "triton-streaming":
        from ecgot.kernels.ot import triton_streaming

        return triton_streaming.solve(problem, init, settings)
    return torch_solver.solve(problem, init, settings)


def cost_cache(problem: Problem, name: str) -> Tensor:
    """[B, N, M] for the products x y^T, which "numba" keeps for the gradient if small; else empty."""
    shape = (len(problem.a), *problem.size)
    small = math.prod(shape) <= MAX_CACHED_CELLS and not problem.pairs and problem.cost != "given"
    return problem.eps.new_empty(shape if small and name == "numba" else (0,))


def cost_vjp(problem: Problem, given: PlanWeights, cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient of the value, and of what ``left`` and ``right`` of :class:`PlanWeights` add, in x and y.

    That of sum Q_ij C_ij, Q held fixed, and of the terms by which the clouds moved apart; in C and None with
    cost "given".
    """
    if problem.empty:
        return torch.zeros_like(problem.x), None if problem.y is None else torch.zeros_like(problem.y)
    name = backend(problem)
    if name == "numba" and given.left is None:
        from ecgot.kernels.ot import numba_small

        small = numba_small.cost_vjp(problem, given, cache) if numba_small.fits(problem) else None
        if small is not None:
            return small
    problem = without_zero_centres(problem)
    if name in ("triton", "triton-streaming") and problem.cost != "given":
        from ecgot.kernels.ot import triton_gradient

        return triton_gradient.cost_vjp(problem, given, step=True)
    if name == "numba" and given.left is None:
        from ecgot.kernels.ot import numba_solver

        grad_x, grad_y = numba_solver.cost_vjp(problem, given, cache)
    elif name == "numba-streaming" and given.left is None:
        from ecgot.kernels.ot import numba_streaming

        grad_x, grad_y = numba_streaming.cost_vjp(problem, given)
    else:
        if name == "torch" and given.left is None and torch_small.fits(problem):
            small = torch_small.cost_vjp(problem, given)
            if small is not None:
                return small
        grad_x, grad_y = torch_solver.cost_vjp(problem, given)
    steps = step_gradients(problem, given.scale)
    if steps is not None and grad_y is not None:
        grad_x, grad_y = grad_x + steps[0], grad_y + steps[1]
    return grad_x.to(problem.x.dtype), None if grad_y is None else grad_y.to(problem.x.dtype)


def implicit(
    problem: Problem, f: Tensor, g: Tensor, grad_f: Tensor, grad_g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`ecgot.kernels.ot.torch_solver.implicit`."""
    tolerance = IMPLICIT_TOLERANCE[problem.dtype]
    if backend(problem) == "triton":
        from ecgot.kernels.ot import triton_implicit

        if triton_implicit.fits(*problem.size):
            return triton_implicit.implicit(problem, f, g, grad_f, grad_g, MAX_STEPS, tolerance)
    return torch_solver.implicit(problem, f, g, grad_f, grad_g, MAX_STEPS, tolerance)
