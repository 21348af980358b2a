"""Packed clouds, debiased costs and all pairs of clouds, on the solver of :func:`ecgot.sinkhorn`."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ecgot.kernels.ot import checks as arguments
from ecgot.kernels.ot.operators import backend
from ecgot.kernels.ot.outputs import SinkhornDivergenceOutput, SinkhornOutput, SinkhornPairwiseOutput
from ecgot.kernels.ot.problem import Problem, padded
from ecgot.kernels.ot.sinkhorn import _call, _mean, sinkhorn


def sinkhorn_varlen(
    x: Tensor,
    y: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    *,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    **settings: Any,
) -> SinkhornOutput:
    """:func:`sinkhorn` of packed clouds of any lengths, in the manner of flash-attention.

    Args:
        x, y: [total_x, D] and [total_y, D], all clouds behind each other.
        cu_seqlens_x, cu_seqlens_y: int32 [B + 1], where each cloud begins, and the end of the last.
        max_seqlen_x, max_seqlen_y: the longest cloud; where omitted it is read from the device, which waits.
        a, b: weights [total_x] and [total_y].
        settings: as :func:`sinkhorn` takes them, but for masks and ``init``.

    Returns:
        SinkhornOutput, whose ``f`` and ``g`` are packed as x and y are; ``plan()`` is [B, max_seqlen_x,
        max_seqlen_y], and ``apply`` takes such padded clouds.
    """
    for name in ("x_mask", "y_mask", "init"):
        if name in settings:
            raise TypeError(f"{name}: got it for packed clouds, accepted are cu_seqlens_x and cu_seqlens_y")
    x, y = arguments.check_points(x, y, dims=2)
    x_offsets, n = arguments.check_cu_seqlens("cu_seqlens_x", cu_seqlens_x, x, max_seqlen_x)
    y_offsets, m = arguments.check_cu_seqlens("cu_seqlens_y", cu_seqlens_y, y, max_seqlen_y)
    if len(x_offsets) != len(y_offsets):
        raise ValueError(
            f"cu_seqlens_y: got {len(y_offsets) - 1} clouds, accepted are those of x, {len(x_offsets) - 1}"
        )
    x_at, x_mask = _places(x_offsets, n)
    y_at, y_mask = _places(y_offsets, m)
    out = sinkhorn(
        _unpacked(x, x_at),
        _unpacked(y, y_at),
        a=None if a is None else _unpacked_weights("a", a, x, x_at),
        b=None if b is None else _unpacked_weights("b", b, y, y_at),
        x_mask=x_mask,
        y_mask=y_mask,
        **settings,
    )
    out.f, out.g = _packed(out.f, x_offsets, len(x)), _packed(out.g, y_offsets, len(y))
    return out


def _places(offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Index [B, longest] into the packed points, and the mask of what is there."""
    step = torch.arange(longest, device=offsets.device)
    mask = step < offsets.diff()[:, None]
    return torch.where(mask, offsets[:-1, None] + step, 0), mask


def _unpacked(points: Tensor, index: Tensor) -> Tensor:
    if not len(points):
        return points.new_zeros(*index.shape, points.shape[1])
    return points.index_select(0, index.flatten()).view(*index.shape, points.shape[1])


def _unpacked_weights(name: str, weights: Tensor, points: Tensor, index: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape != points.shape[:1]:
        came = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name}: got {came}, accepted is floating point [{len(points)}]")
    return _unpacked(weights[:, None], index).squeeze(2)


def _packed(potential: Tensor, offsets: Tensor, total: int) -> Tensor:
    place = torch.arange(total, device=offsets.device)
    cloud = torch.searchsorted(offsets, place, right=True) - 1
    return potential[cloud, place - offsets[cloud]]


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    precision: str = "fp32",
) -> SinkhornDivergenceOutput:
    """The debiased cost OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2: 0 for equal clouds, and positive else.

    Args: those of :func:`sinkhorn`. With ``rho`` the masses' term eps (mass_a - mass_b)^2 / 2 is added
    (Séjourné et al. 2019, "Sinkhorn Divergences for Unbalanced Optimal Transport"). The three problems of
    each pair are solved in one launch.
    """
    x, y = arguments.check_points(x, y)
    problems = len(x)
    eps = arguments.check_eps(eps, x, problems)
    free = arguments.check_rho(rho, None, None)[0] < math.inf
    a = arguments.check_weights("a", a, x, x_mask, any_mass=free)
    b = arguments.check_weights("b", b, y, y_mask, any_mass=free)
    length = max(x.shape[1], y.shape[1])
    x_mass, y_mass = a.clamp_min(0).sum(1), b.clamp_min(0).sum(1)
    x, y = padded(x, length), padded(y, length)
    a, b = padded(a, length, arguments.ABSENT), padded(b, length, arguments.ABSENT)
    left, right = torch.cat([x, x, y]), torch.cat([y, x, y])
    a, b = torch.cat([a, a, b]), torch.cat([b, a, b])
    out = sinkhorn(
        left,
        right,
        eps=eps.repeat(3),
        cost=cost,
        a=a.clamp_min(0),
        b=b.clamp_min(0),
        x_mask=a >= 0,
        y_mask=b >= 0,
        rho=rho,
        max_iter=max_iter,
        tol=tol,
        scaling=scaling,
        precision=precision,
    )
    between, of_x, of_y = out.value.view(3, problems)
    value = between - of_x / 2 - of_y / 2
    if free:
        value = value + eps * (x_mass - y_mass).square() / 2
    return SinkhornDivergenceOutput(
        value=value,
        marginal_error=out.marginal_error.view(3, problems).amax(0),
        iterations=out.iterations.view(3, problems).amax(0),
        converged=out.converged.view(3, problems).all(0),
        backend=out.backend,
    )


@overload
def sinkhorn_pairwise(
    x: Tensor, y: Tensor, *, full_output: Literal[True], **settings: Any
) -> SinkhornPairwiseOutput: ...


@overload
def sinkhorn_pairwise(
    x: Tensor, y: Tensor, *, full_output: Literal[False] = ..., **settings: Any
) -> Tensor: ...


def sinkhorn_pairwise(  # type: ignore[misc]  # the overloads leave its settings unnamed
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | None = None,
    rho_x: float | None = None,
    rho_y: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    precision: str = "fp32",
    full_output: bool = False,
) -> Tensor | SinkhornPairwiseOutput:
    """Entropic optimal transport between each of B clouds and each of K others: late interaction.

    Args:
        x: [B, N, D], weights ``a`` [B, N], mask ``x_mask`` [B, N].
        y: [K, M, D], weights ``b`` [K, M], mask ``y_mask`` [K, M].
        eps: a number.
        full_output: return a :class:`SinkhornPairwiseOutput`: the values, and how each pair was solved.
        The others are those of :func:`sinkhorn`.

    Returns:
        The values [B, K] in units of the cost, differentiable once in x, y, a and b. Forward and backward
        hold no [B, K, N, M] tensor: costs are formed for a few pairs at a time, in the backward pass again;
        what is kept are the potentials, B K (N + M) numbers. Pairs with an empty cloud have value 0. NaN in a
        cloud makes the values of its pairs NaN, and where these enter a loss, its gradients.
    """
    x, y = arguments.check_points(x, y, same_batch=False)
    arguments.check_cost(cost)
    arguments.check_precision(precision)
    if isinstance(eps, Tensor) and eps.dim():
        raise ValueError(f"eps: got a tensor {tuple(eps.shape)}, accepted is a number")
    rhos = arguments.check_rho(rho, rho_x, rho_y)
    max_iter, tol, factor = arguments.check_iterations(max_iter, tol, scaling)
    free = not all(map(math.isinf, rhos))
    a = arguments.check_weights("a", a, x, x_mask, any_mass=free)
    b = arguments.check_weights("b", b, y, y_mask, any_mass=free)
    eps_each = arguments.check_eps(eps, x, len(x) * len(y))
    means = x_centre = y_centre = None
    if cost == "sqeuclidean" and not free:
        means = _mean(x, a), _mean(y, b)
        x_centre, y_centre = (mean.detach() for mean in means)
    elif cost in ("sqeuclidean", "euclidean"):
        middle = (_middle(_mean(x, a).detach()) + _middle(_mean(y, b).detach())) / 2
        x_centre, y_centre = middle.expand(len(x), -1).contiguous(), middle.expand(len(y), -1).contiguous()
    problem = Problem(x, y, a, b, x_centre, y_centre, eps_each, cost, *rhos, True, precision)
    value, _, _, error, iterations = _call(problem, None, max_iter, tol, factor)
    if means is not None:
        value = value + _between(*means, a, b)
    if not full_output:
        return value
    return SinkhornPairwiseOutput(
        value=value,
        marginal_error=error,
        iterations=iterations,
        converged=(error <= tol) & value.detach().isfinite(),
        backend=backend(problem),
    )


def _middle(centres: Tensor) -> Tensor:
    """[1, D]; clouds without a number for a centre do not count."""
    usable = centres.isfinite().all(1, keepdim=True)
    return torch.where(usable, centres, 0.0).sum(0, keepdim=True) / usable.sum().clamp_min(1)


def _between(x_mean: Tensor, y_mean: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """|x_mean - y_mean|^2 [B, K], by which moving each cloud to its mean lowered the value."""
    usable = (a.clamp_min(0).sum(1) > 0)[:, None] & (b.clamp_min(0).sum(1) > 0)
    middle = _middle(torch.cat([x_mean.detach(), y_mean.detach()]))
    # A cloud with NaN has NaN values already; here it would reach the gradients of all others as 0 * NaN.
    x_mean, y_mean = (torch.where(mean.isfinite(), mean - middle, 0.0) for mean in (x_mean, y_mean))
    with torch.autocast(x_mean.device.type, enabled=False):
        square = x_mean.square().sum(1)[:, None] + y_mean.square().sum(1) - 2 * x_mean @ y_mean.T
    return torch.where(usable, square, 0.0)
