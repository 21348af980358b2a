"""Batches that fit a CPU's cache, where numba does not serve: few operations of torch for each iteration.

They do what ``centring``, ``iteration`` and ``torch_solver`` do, for the usual problem: points that all exist
and weigh, both marginals kept, a cost that is a product but for terms of its rows and columns, and so few
units of eps that one kernel serves all iterations. Where a batch is not that, the functions here return None,
and the others serve.
"""

import math

import torch
from torch import Tensor

from ecgot.kernels.ot.problem import (
    EXACT,
    PlanWeights,
    Problem,
    Solution,
    SolverSettings,
    can_read_values,
    inverse_norm,
)
from ecgot.kernels.ot.torch_solver import CHUNK_CELLS, chain

COSTS = ("dot", "cosine", "sqeuclidean")
MAX_UNITS = EXACT / 4  # of eps in a cost: beyond, rounding of the potentials is to be judged
# What underflows in the kernel stays negligible while no scaling is beyond the first, nor a weight below.
MAX_SCALING, MIN_WEIGHT = 1e9, 1e-9
CHECK_EVERY = 64  # iterations between looks at the scalings' range


def fits(problem: Problem) -> bool:
    """Whether a batch has that size and, as far as its values need not be looked at, is usual."""
    (n, m), x, y = problem.size, problem.x, problem.y
    return (
        problem.cost in COSTS
        and problem.balanced
        and not problem.pairs
        and not problem.empty
        and len(x) * n * m <= CHUNK_CELLS
        and y is not None
        and x.dtype == y.dtype == problem.dtype
        and can_read_values(x)
    )


def solve(problem: Problem, settings: SolverSettings) -> Solution | None:
    """The whole solution of a batch that :func:`fits`, from the potential g = 0."""
    assert problem.y is not None
    a, b, eps = problem.a, problem.b, problem.eps[:, None]
    if settings.scaling or not _all_weigh(a, b):
        return None
    x_centre = y_centre = None
    if problem.cost == "sqeuclidean":
        x_centre, y_centre = (
            torch.bmm(w[:, None], p).squeeze(1) for w, p in ((a, problem.x), (b, problem.y))
        )
    x, _ = _prepared(problem.x, x_centre, problem.cost)
    y, _ = _prepared(problem.y, y_centre, problem.cost)
    plan = _exponent(x, y, problem)
    if plan is None:
        return None
    top = plan.amax(2, keepdim=True)
    plan.sub_(top).exp_().mul_(b[:, None, :])
    sums = plan.sum(2, keepdim=True)
    plan.mul_(a[:, :, None] / sums)
    found = _scalings(plan, a[:, :, None], b[:, :, None], settings)
    if found is None:
        return None
    u, v, error, iterations = found
    f = (u / sums).log_().sub_(top).squeeze(2).mul_(eps)
    g = v.log().squeeze(2).mul_(eps)
    whole_f, whole_g = f, g
    if x_centre is not None and y_centre is not None:
        # As centring.separable_terms.
        step = (x_centre - y_centre)[:, :, None]
        half = step.square().sum(1) / 2
        whole_f = torch.baddbmm(f[:, :, None], x, step, alpha=2).squeeze(2).add_(half)
        whole_g = torch.baddbmm(g[:, :, None], y, step, alpha=-2).squeeze(2).add_(half)
    of_x, of_y = (a * whole_f).sum(1), (b * whole_g).sum(1)
    value, shift = of_x + of_y, ((of_x - of_y) / 2)[:, None]
    converged = (error <= settings.tol).logical_and_(value.isfinite())
    whole = (whole_f - shift, whole_g + shift)
    return Solution(f, g, error, iterations, value, *whole, converged, x_centre, y_centre)


def cost_vjp(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor] | None:
    """As :func:`ecgot.kernels.ot.backends.cost_vjp`, of a batch that :func:`fits` and the plan alone."""
    assert problem.y is not None
    a, b, eps = problem.a, problem.b, problem.eps[:, None]
    if not _all_weigh(a, b):
        return None
    x, x_inverse = _prepared(problem.x, problem.x_centre, problem.cost)
    y, y_inverse = _prepared(problem.y, problem.y_centre, problem.cost)
    plan = _exponent(x, y, problem)
    if plan is None:
        return None
    plan.add_((given.f / eps)[:, :, None]).add_((given.g / eps)[:, None, :]).exp_()
    plan.mul_((a * given.scale[:, None])[:, :, None]).mul_(b[:, None, :])
    to_y, to_x = torch.bmm(plan, y), torch.bmm(plan.mT, x)
    grad_x = chain(problem.cost, x, to_y, plan.sum(2), x_inverse)
    grad_y = chain(problem.cost, y, to_x, plan.sum(1), y_inverse)
    if problem.x_centre is not None and problem.y_centre is not None:
        # As centring.step_gradients.
        step = ((problem.x_centre - problem.y_centre) * given.scale[:, None])[:, None, :]
        grad_x.addcmul_(a[:, :, None], step, value=2)
        grad_y.addcmul_(b[:, :, None], step, value=-2)
    return grad_x, grad_y


def _all_weigh(*weights: Tensor) -> bool:
    return all(weight.min().item() >= MIN_WEIGHT for weight in weights)


def _prepared(points: Tensor, centre: Tensor | None, cost: str) -> tuple[Tensor, Tensor | None]:
    """Points that are centred, or of unit length for the cosine, and then 1 / |point| [B, n, 1] too."""
    if cost == "cosine":
        inverse = inverse_norm(points)
        return points * inverse, inverse
    return points if centre is None else points - centre[:, None, :], None


def _exponent(x: Tensor, y: Tensor, problem: Problem) -> Tensor | None:
    """-C / eps [B, N, M] of prepared points; None where it is not finite or has too many units."""
    exponent = torch.bmm(x, y.mT)
    if problem.cost == "sqeuclidean":
        exponent.mul_(2).sub_(x.square().sum(2, keepdim=True)).sub_(y.square().sum(2)[:, None, :])
        exponent.clamp_max_(0)
    elif problem.cost == "cosine":
        exponent.sub_(1)
    exponent.div_(problem.eps[:, None, None])
    lowest, highest = exponent.aminmax()
    return exponent if lowest.item() > -MAX_UNITS and highest.item() < MAX_UNITS else None


def _scalings(
    plan: Tensor, a: Tensor, b: Tensor, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """u [B, N, 1] and v [B, M, 1] with which u plan v has the marginals a and b; error; iterations.

    The rows of ``plan`` [B, N, M] sum to a. Each problem keeps what it has when it stops. None where a
    scaling leaves its range.
    """
    transposed, u = plan.mT, torch.ones_like(a)
    going = list(range(len(plan)))
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for iteration in range(1, settings.max_iter + 1):
        v = b / torch.bmm(transposed, u)
        sums = torch.bmm(plan, v)
        error = torch.linalg.vector_norm(u * sums - a, 1, (1, 2))
        if iteration % CHECK_EVERY == 1 and not _in_range(u, v):
            return None
        tol = settings.tol if iteration < settings.max_iter else math.inf
        errors = error.tolist()
        stopped = [k for k in going if not errors[k] > tol]
        if stopped:
            now = (u, v, error, torch.full_like(error, iteration, dtype=torch.int32))
            if len(stopped) == len(plan):
                found = now
            else:
                found = found or (u.clone(), v.clone(), error.clone(), now[3].clone())
                for old, new in zip(found, now, strict=True):
                    old[stopped] = new[stopped]
            going = [k for k in going if errors[k] > tol]
            if not going:
                break
        u = a / sums
    assert found is not None
    return found if _in_range(*found[:2]) else None


def _in_range(*scalings: Tensor) -> bool:
    """False for NaN too."""
    for each in scalings:
        lowest, highest = each.aminmax()
        if not (lowest.item() >= 1 / MAX_SCALING and highest.item() <= MAX_SCALING):
            return False
    return True
