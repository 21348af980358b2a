"""Small problems on a CPU, where the overhead of a call counts: compiled calls around matrix products.

They do what ``centring``, ``numba_solver`` and ``problem`` do by some hundred operations of torch, for the
usual problem: points that all exist and weigh, and no annealing. Where a batch is not that, the functions
here return None, and the others serve. The compiled part is ``numba_small_loops``.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecgot.kernels.ot import numba_small_loops as loops
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import PlanWeights, Problem, Solution, SolverSettings

MAX_CELLS = 2**17  # costs of a batch, which one thread solves in a few milliseconds
COSTS = {
    "dot": loops.DOT,
    "cosine": loops.COSINE,
    "sqeuclidean": loops.SQEUCLIDEAN,
    "euclidean": loops.EUCLIDEAN,
    "given": loops.GIVEN,
}


def fits(problem: Problem) -> bool:
    """Whether a batch is small and, as far as its values need not be looked at, usual."""
    (n, m), x, y = problem.size, problem.x, problem.y
    return (
        len(x) * n * m <= MAX_CELLS
        and not problem.pairs
        and not problem.empty
        and x.dtype == problem.dtype
        and (y is None or y.dtype == problem.dtype)
    )


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings, cache: Tensor) -> Solution | None:
    """The whole solution of a batch that :func:`fits`; ``cache`` [B, N, M] gets what its gradient needs."""
    if settings.scaling:
        return None
    code, given = COSTS[problem.cost], _arrays(problem)
    x, _, a, b, eps = given
    x_centre, y_centre = (np.zeros((len(x), x.shape[2]), eps.dtype) for _ in range(2))
    formed = _exponents(code, given, (x_centre, y_centre, not problem.balanced, False), cache)
    if formed is None:
        return None
    each = [np.empty_like(like) for like in (a, b, a, b, eps, eps)]
    outputs = (*each, np.empty(len(x), np.int32), np.empty(len(x), np.bool_))
    free_x, free_y = problem.rho_x is not None, problem.rho_y is not None
    rho_x, rho_y = (eps if rho is None else _array(rho) for rho in (problem.rho_x, problem.rho_y))
    penalties = (rho_x, free_x, rho_y, free_y)
    stopping = (code, settings.tol, settings.max_iter)
    start = np.zeros_like(b) if init is None else _array(init)
    arguments = (*formed, a, b, eps, *penalties, x_centre, y_centre, start, *stopping, *outputs)
    if not loops.solve(*arguments):
        return None
    f, g, whole_f, whole_g, value, error, iterations, converged = map(torch.from_numpy, outputs)
    centres = (x_centre, y_centre) if problem.cost in CENTRED_COSTS else ()
    return Solution(
        f, g, error, iterations, value, whole_f, whole_g, converged, *map(torch.from_numpy, centres)
    )  # fmt: skip


def cost_vjp(problem: Problem, plan: PlanWeights, cache: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """As :func:`ecgot.kernels.ot.backends.cost_vjp`, of a batch that :func:`fits` and the plan alone."""
    if plan.left is not None:
        return None
    code, given = COSTS[problem.cost], _arrays(problem)
    x, y, a, b, eps = given
    if problem.x_centre is None or problem.y_centre is None:
        centres = (np.zeros((len(x), x.shape[2]), eps.dtype),) * 2
    else:
        centres = (_array(problem.x_centre), _array(problem.y_centre))
    formed = _exponents(code, given, (*centres, False, True), cache)
    if formed is None:
        return None
    s, moved_x, moved_y, p, q = formed
    scale, weights, sums = _array(plan.scale), np.empty_like(s), (np.empty_like(a), np.empty_like(b))
    potentials = (_array(plan.f), _array(plan.g))
    loops.weigh(s, a, b, eps, p, q, *potentials, scale, code, weights, *sums)
    found = torch.from_numpy(weights)
    if code == loops.GIVEN:
        return found, None
    grad_x = torch.bmm(found, torch.from_numpy(moved_y))
    grad_y = torch.bmm(found.mT, torch.from_numpy(moved_x))
    known = (x, y, moved_x, moved_y, a, b, eps, scale, *centres, *sums)
    loops.through_cost(code, *known, grad_x.numpy(), grad_y.numpy())
    return grad_x, grad_y


def _array(tensor: Tensor) -> np.ndarray:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()


def _arrays(problem: Problem) -> tuple[np.ndarray, ...]:
    """x, y (x again with cost "given"), a, b and eps."""
    x = _array(problem.x)
    y = x if problem.y is None else _array(problem.y)
    return x, y, _array(problem.a), _array(problem.b), _array(problem.eps)


def _exponents(
    code: int, given: tuple[np.ndarray, ...], centring: tuple[Any, ...], cache: Tensor
) -> tuple[np.ndarray, ...] | None:
    """S, the moved points x and y, and S's terms of rows and columns; None if not all problems are usual.

    centring: both centres, whether one has to serve both clouds, and whether they, and S, are known already.
    """
    x, _, a, b, eps = given
    if code == loops.GIVEN:
        s, p, q = np.empty_like(x), np.empty_like(a), np.empty_like(b)
        return (s, s, s, p, q) if loops.form(x, a, b, eps, s, p, q) else None
    if not cache.numel():
        return None
    sides = tuple(map(np.empty_like, given[:4]))
    arguments = (*given, *sides, *centring, code)
    if not loops.prepare(*arguments):
        return None
    s = _array(cache)
    if not centring[-1]:
        torch.bmm(torch.from_numpy(sides[0]), torch.from_numpy(sides[1]).mT, out=cache)
        if code == loops.EUCLIDEAN:
            loops.to_distances(s, sides[2], sides[3], eps)
    return s, *sides
