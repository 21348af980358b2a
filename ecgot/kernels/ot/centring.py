"""Where clouds are moved before distances are formed, so that fp32 loses little to rounding.

Where both marginals are kept, moving a cloud changes |x - y|^2 by terms of x_i and of y_j alone, which move
the potentials and not the plan: each cloud goes to its own mean. Otherwise both go to one common middle.
"""

import torch
from torch import Tensor

from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import Problem, all_present, can_read_values


def centres(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, *, balanced: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What to subtract from x [B, N, D] and y [B, M, D]: [B, D] each, or None where nothing is."""
    if cost not in CENTRED_COSTS:
        return None, None
    with torch.no_grad():
        x_mean, y_mean = weighted_mean(x, a), weighted_mean(y, b)
        if can_read_values(x):
            near = _near_origin(x, a, x_mean) & _near_origin(y, b, y_mean)
            if bool(near.all()):
                return None, None
            x_mean, y_mean = (torch.where(near[:, None], 0.0, mean) for mean in (x_mean, y_mean))
        if cost == "sqeuclidean" and balanced:
            return x_mean, y_mean
        middle = (x_mean + y_mean) / 2
        return middle, middle.clone()  # an operator's arguments may not share memory


def common_middle(x_mean: Tensor, y_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The centres [B, D] and [K, D] of all pairs, given the clouds' means: one point, repeated."""
    middle = (_finite_mean(x_mean) + _finite_mean(y_mean)) / 2
    return middle.expand(len(x_mean), -1).contiguous(), middle.expand(len(y_mean), -1).contiguous()


def weighted_mean(points: Tensor, weights: Tensor) -> Tensor:
    """The mean [B, D] of points [B, N, D]; points without weight do not count."""
    given, weights = weights, weights.clamp_min(0)
    weights = weights / weights.detach().sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(weights.dtype)
        if not all_present(given):
            points = torch.where((given >= 0)[:, :, None], points, 0.0)
        return (weights[:, None, :] @ points).squeeze(1)


def separable_terms(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Terms of x_i [B, N] and y_j [B, M] by which the squared distance exceeds that of the centred clouds.

    With d = x_centre - y_centre, |x - y|^2 = |x' - y'|^2 + 2 d x' - 2 d y' + |d|^2. None if nothing was moved
    that the potentials must make up for.
    """
    if problem.cost != "sqeuclidean" or not problem.balanced or problem.x_centre is None:
        return None
    assert problem.y_centre is not None
    step = torch.where(problem.solvable()[:, None], problem.x_centre - problem.y_centre, 0.0)
    square = step.square().sum(1, keepdim=True) / 2
    with torch.autocast(step.device.type, enabled=False):
        x, y = problem.points()
        return (2 * x @ step[:, :, None]).squeeze(2) + square, square - (2 * y @ step[:, :, None]).squeeze(2)


def mean_distances(x_mean: Tensor, y_mean: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|x_mean - y_mean|^2 [B, K]: by how much centring each cloud of a pair lowered the value."""
    usable = (a.clamp_min(0).sum(1) > 0)[:, None] & (b.clamp_min(0).sum(1) > 0)
    middle = _finite_mean(torch.cat([x_mean.detach(), y_mean.detach()]))
    # A cloud with NaN has NaN values already; here it would reach the gradients of all others as 0 * NaN.
    x_mean, y_mean = (torch.where(mean.isfinite(), mean - middle, 0.0) for mean in (x_mean, y_mean))
    with torch.autocast(x_mean.device.type, enabled=False):
        square = x_mean.square().sum(1)[:, None] + y_mean.square().sum(1) - 2 * x_mean @ y_mean.T
    return torch.where(usable, square, 0.0)


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
