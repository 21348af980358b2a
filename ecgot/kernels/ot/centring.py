"""Where clouds are moved before distances are formed, so that fp32 loses little to rounding.

Where both marginals are kept, moving a cloud changes |x - y|^2 by terms of x_i and of y_j alone, which move
the potentials and not the plan: each cloud goes to its own mean. Otherwise both go to one common middle.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import Problem, Solution, all_present, can_read_values, without_autocast

MAX_NUMBERS = 2**25  # of differences between centres that are held at once


def centred(problem: Problem) -> Problem:
    """The problem with its centres, where distances are to be formed of moved points."""
    if problem.cost not in CENTRED_COSTS:
        return problem
    assert problem.y is not None
    x_mean, y_mean = weighted_mean(problem.x, problem.a), weighted_mean(problem.y, problem.b)
    if problem.pairs:
        if problem.cost != "sqeuclidean" or not problem.balanced:
            x_mean, y_mean = _common_middle(x_mean, y_mean)
        return replace(problem, x_centre=x_mean, y_centre=y_mean)
    if can_read_values(problem.x):
        near = _near_origin(problem.x, problem.a, x_mean) & _near_origin(problem.y, problem.b, y_mean)
        if bool(near.all()):
            return problem
        x_mean, y_mean = (torch.where(near[:, None], 0.0, mean) for mean in (x_mean, y_mean))
    if problem.cost != "sqeuclidean" or not problem.balanced:
        x_mean = (x_mean + y_mean) / 2
        y_mean = x_mean.clone()  # an operator's results may not share memory
    return replace(problem, x_centre=x_mean, y_centre=y_mean)


def without_zero_centres(problem: Problem) -> Problem:
    """Centres that are 0 stand for none, as an operator's results must be: moving points costs time."""
    x_centre, y_centre = problem.x_centre, problem.y_centre
    if x_centre is None or y_centre is None or not can_read_values(x_centre):
        return problem
    return problem if x_centre.any() or y_centre.any() else replace(problem, x_centre=None, y_centre=None)


def _common_middle(x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The centres [B, D] and [K, D] of all pairs, given the clouds' means: one point, repeated."""
    middle = (_finite_mean(x_mean) + _finite_mean(y_mean)) / 2
    return middle.repeat(len(x_mean), 1), middle.repeat(len(y_mean), 1)


def weighted_mean(points: Tensor, weights: Tensor) -> Tensor:
    """The mean [B, D] of points [B, N, D]; points without weight do not count."""
    given, weights = weights, weights.clamp_min(0)
    weights = weights / weights.detach().sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    with without_autocast(points.device):
        points = points.to(weights.dtype)
        if not all_present(given):
            points = torch.where((given >= 0)[:, :, None], points, 0.0)
        return (weights[:, None, :] @ points).squeeze(1)


def has_terms(problem: Problem) -> bool:
    """Whether the clouds moved apart, so that the costs of the points exceed those of the moved clouds."""
    return problem.cost == "sqeuclidean" and problem.balanced and problem.x_centre is not None


def separable_terms(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Terms of x_i [B, N] and y_j [B, M] by which the squared distance exceeds that of the moved clouds.

    With d = x_centre - y_centre, |x - y|^2 = |x' - y'|^2 + 2 d x' - 2 d y' + |d|^2. None if nothing was moved
    that the potentials must make up for.
    """
    if not has_terms(problem):
        return None
    step = _step(problem)
    square = step.square().sum(1, keepdim=True) / 2
    with without_autocast(step.device):
        x, y = problem.points()
        return (2 * x @ step[:, :, None]).squeeze(2) + square, square - (2 * y @ step[:, :, None]).squeeze(2)


def _step(problem: Problem) -> Tensor:
    """x_centre - y_centre [B, D]; 0 where a side has no mass."""
    assert problem.x_centre is not None
    assert problem.y_centre is not None
    return torch.where(problem.solvable()[:, None], problem.x_centre - problem.y_centre, 0.0)


def step_gradients(problem: Problem, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the terms add to the gradient of the value in x [B, N, D] and y [B, M, D], differentiable.

    scale: [B] ([B, K] for pairs), the gradient of the value. None where there are no terms.
    """
    if not has_terms(problem):
        return None
    a, b = problem.weights()
    scale = torch.where(problem.solvable(), scale, 0.0)
    if problem.pairs:
        x_step, y_step = _summed_steps(problem, scale)
    else:
        x_step = scale[:, None] * _step(problem)
        y_step = -x_step
    return 2 * a[:, :, None] * x_step[:, None, :], 2 * b[:, :, None] * y_step[:, None, :]


def _summed_steps(problem: Problem, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of scale_bk (x_centre_b - y_centre_k) over k [B, D], and of its negative over b [K, D]."""
    x_centre, y_centre = problem.x_centre, problem.y_centre
    assert x_centre is not None
    assert y_centre is not None
    middle = _finite_mean(torch.cat([x_centre, y_centre]))
    x_centre, y_centre = x_centre - middle, y_centre - middle
    # A cloud with NaN meets others only where its values get a gradient; elsewhere it would be 0 * NaN.
    x_poison = torch.where(x_centre.isfinite().all(1), 0.0, math.nan)
    y_poison = torch.where(y_centre.isfinite().all(1), 0.0, math.nan)
    touched = scale != 0
    x_spoilt = torch.where(touched, y_poison[None, :], 0.0).sum(1)
    y_spoilt = torch.where(touched, x_poison[:, None], 0.0).sum(0)
    x_finite, y_finite = x_centre.nan_to_num(0.0, 0.0, 0.0), y_centre.nan_to_num(0.0, 0.0, 0.0)
    of_x, of_y = scale.sum(1), scale.sum(0)
    x_step = torch.where(of_x[:, None] != 0, of_x[:, None] * x_centre, 0.0) - scale @ y_finite
    y_step = torch.where(of_y[:, None] != 0, of_y[:, None] * y_centre, 0.0) - scale.T @ x_finite
    return x_step + x_spoilt[:, None], y_step + y_spoilt[:, None]


def weight_terms(problem: Problem, scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the terms add to the gradient of the value in a [B, N] and b [B, M], differentiable."""
    if not has_terms(problem):
        return None
    scale = torch.where(problem.solvable(), scale, 0.0)
    if not problem.pairs:
        terms = separable_terms(problem)
        assert terms is not None
        return terms[0] * scale[:, None], terms[1] * scale[:, None]
    x_step, y_step = _summed_steps(problem, scale)
    x, y = problem.points()
    # Up to a constant for each cloud, as the potentials are.
    return (2 * x @ x_step[:, :, None]).squeeze(2), (2 * y @ y_step[:, :, None]).squeeze(2)


def whole_potentials(problem: Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Potentials of the points' own costs, [B, N] and [B, M], differentiable; 0 where no point exists.

    Where both marginals are kept they are determined up to a constant, chosen so that <a, f> = <b, g>.
    """
    a, b = problem.weights()
    terms = separable_terms(problem)
    if terms is not None:
        f, g = f + terms[0], g + terms[1]
    # A point that may match nothing has an infinite potential, which takes no part.
    sides = ((w * torch.where(p == math.inf, 0.0, p)).sum(1) for w, p in ((a, f), (b, g)))
    shift = (next(sides) - next(sides))[:, None] / 2
    if not problem.balanced:
        shift = torch.where(problem.kept()[:, None], shift, 0.0)
    f, g = f - shift, g + shift
    solvable = problem.solvable()[:, None]
    return torch.where(solvable & (problem.a >= 0), f, 0.0), torch.where(solvable & (problem.b >= 0), g, 0.0)


def moved_start(problem: Problem, init: Tensor | None) -> Tensor | None:
    """A potential g [B, M] of the points' own costs as one of the moved clouds'."""
    terms = None if init is None else separable_terms(problem)
    return init if init is None or terms is None else init - terms[1]


def complete(problem: Problem, found: Solution, tol: float) -> Solution:
    """The solution of a centred problem with all that its solver left out."""
    value = problem.value(found.f, found.g) if found.value is None else found.value
    whole_f, whole_g = found.whole_f, found.whole_g
    if has_terms(problem) and problem.pairs:
        value = value + _mean_distances(problem)
    elif whole_f is None:
        terms = separable_terms(problem)
        if terms is not None:
            a, b = problem.weights()
            value = value + (a * terms[0]).sum(1) + (b * terms[1]).sum(1)
        if not problem.pairs:
            whole_f, whole_g = whole_potentials(problem, found.f, found.g)
    error, converged = found.error, found.converged
    if problem.cost == "given":
        value = torch.where(_infeasible(problem, value), math.inf, value)
        error, converged = torch.where(value == math.inf, math.inf, error), None
    if converged is None or found.whole_f is None:  # then the value is another
        converged = (error <= tol) & value.isfinite()
    return replace(
        found,
        error=error,
        value=value,
        whole_f=whole_f,
        whole_g=whole_g,
        converged=converged,
        x_centre=problem.x_centre,
        y_centre=problem.y_centre,
    )


def _infeasible(problem: Problem, value: Tensor) -> Tensor:
    """[B], whether no plan avoids the forbidden pairs, which the dual objective proves.

    A plan costs at most the largest finite cost, and its entropy is at most that of a or of b: a dual value
    above the sum has no primal one to meet.
    """
    if not problem.balanced or problem.empty:
        return torch.zeros_like(value, dtype=torch.bool)
    cost = problem.cost_matrix().detach()
    largest = torch.where(cost.isfinite(), cost, -math.inf).amax((1, 2))
    entropy = torch.minimum(*(-torch.special.xlogy(w, w).sum(1) for w in problem.weights()))
    bound = largest + problem.eps * entropy
    return value > bound + 1e-3 * (problem.eps + bound.abs())  # more than what rounding makes of it


def _mean_distances(problem: Problem) -> Tensor:
    """|x_centre - y_centre|^2 [B, K]: by how much centring each cloud of a pair lowered the value."""
    x_centre, y_centre = problem.x_centre, problem.y_centre
    assert x_centre is not None
    assert y_centre is not None
    step = max(1, MAX_NUMBERS // max(1, y_centre.numel()))  # a part at a time, as products would lose digits
    square = torch.cat([(part[:, None] - y_centre).square().sum(2) for part in x_centre.split(step)])
    return torch.where(problem.solvable(), square, 0.0)


def _near_origin(points: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """[B], whether centring would hardly shorten the longest point: the cloud then stays where it is."""
    if not points.numel():
        return torch.ones(len(points), dtype=torch.bool)
    length = torch.linalg.vector_norm(points, dim=2, dtype=mean.dtype)
    longest = torch.where(weights > 0, length, 0.0).amax(1)
    return 4 * torch.linalg.vector_norm(mean, dim=1) <= longest


def _finite_mean(means: Tensor) -> Tensor:
    """The mean [1, D] of finite rows of [B, D]."""
    usable = means.isfinite().all(1, keepdim=True)
    return torch.where(usable, means, 0.0).sum(0, keepdim=True) / usable.sum().clamp_min(1)
