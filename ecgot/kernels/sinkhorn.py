"""Batched entropic optimal transport: the public functions.

    OT_eps(a, b) = min_P <P, C> + eps KL(P | a (x) b)     over plans P with marginals a and b
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),          value = <a, f> + <b, g> at the optimum

With ``rho`` a marginal may be missed, at the price rho KL(marginal | weights); KL(p | q) = sum p log(p / q) -
p + q.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ecgot.kernels import _arguments as arguments
from ecgot.kernels._arguments import on_cpu
from ecgot.kernels._operators import backend, sinkhorn_op
from ecgot.kernels._problem import Problem, all_present, padded
from ecgot.kernels._torch_sinkhorn import CELLS


@dataclass
class SinkhornOutput:
    """The solution of B problems.

    Attributes:
        value: [B], the regularised cost in units of the cost; differentiable twice (envelope theorem).
        f, g: [B, N] and [B, M], potentials in units of the cost, 0 at masked points; differentiable once, by
            implicit differentiation. Where both marginals are kept they are determined up to a constant, and
            chosen so that <a, f> = <b, g>.
        marginal_error: [B], L1 distance of the plan's row marginals from a (where rho is finite, from those
            that f asks for, a exp(-f / rho)); its column marginals are exact in the same sense.
        iterations: [B], int32, how many updates of (f, g) the problem took, annealing included.
        converged: [B], bool, ``marginal_error <= tol`` and a finite value.
        backend: which solver served: ``"triton"`` (a problem on chip), ``"triton-streaming"``, ``"numba"``,
            ``"torch"`` or ``"torch-streaming"`` (costs formed anew, no N x M matrix).
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str
    _problem: Problem = field(repr=False)
    _raw: tuple[Tensor, Tensor] = field(repr=False)
    _terms: tuple[Tensor, Tensor] | None = field(repr=False)
    _versions: tuple[int, ...] | None = field(repr=False)

    def plan(self) -> Tensor:
        """The transport plan P [B, N, M], differentiable once; 0 at masked points.

        Raises:
            RuntimeError: x, y, a weight or a mask was changed in place since it was solved.
        """
        self._check_unchanged()
        with torch.autocast(self.f.device.type, enabled=False):
            return self._problem.plan(*self._raw)

    def apply(self, v: Tensor, *, transpose: bool = False) -> Tensor:
        """P v [B, N, E] of v [B, M, E], or P^T v [B, M, E] of v [B, N, E]; differentiable once.

        Rows of P are formed some at a time (2^24 numbers), and again for the gradient: beyond that, memory is
        O((N + M) E).
        """
        n, m = self._problem.size
        wanted = (len(self.f), n if transpose else m)
        arguments.check_floating("v", v, 3, f"[{wanted[0]}, {wanted[1]}, E]")
        if v.device != self.f.device:
            raise ValueError(f"v: got device {v.device}, accepted is that of x, {self.f.device}")
        if tuple(v.shape[:2]) != wanted:
            raise ValueError(f"v: got shape {tuple(v.shape)}, accepted is [{wanted[0]}, {wanted[1]}, E]")
        if transpose:
            parts = self._by_rows(lambda part, f, g, some: part.plan(f, g).mT @ v[:, some].to(f.dtype))
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return torch.cat(self._by_rows(lambda part, f, g, _: part.plan(f, g) @ v.to(f.dtype)), 1)

    def barycentric_projection(self) -> Tensor:
        """Where P sends each x: sum_j P_ij y_j / sum_j P_ij [B, N, D]; 0 for points without mass."""
        y = self._problem.y
        if y is None:
            raise ValueError("barycentric_projection: got a solution of a given cost, which has no points")
        y = torch.where((self._problem.b >= 0)[:, :, None], y.to(self.f.dtype), 0.0)
        moved = self.apply(torch.cat([y, torch.ones_like(y[:, :, :1])], 2))
        mass = moved[:, :, -1:]
        return torch.where(mass > 0, moved[:, :, :-1] / torch.where(mass > 0, mass, 1.0), 0.0)

    def transport_cost(self) -> Tensor:
        """<P, C> [B], without the entropy; differentiable once, by implicit differentiation."""
        terms = self._terms

        def part_cost(part: Problem, f: Tensor, g: Tensor, some: slice) -> Tensor:
            plan, cost = part.plan(f, g), part.cost_matrix()
            if terms is not None:
                cost = cost + terms[0][:, some, None] + terms[1][:, None, :]
            # A forbidden pair costs infinity and carries nothing; NaN in the plan is not 0 and stays.
            moved = plan != 0
            return torch.where(moved, plan * torch.where(moved, cost, 0.0), 0.0).sum((1, 2))

        return torch.stack(self._by_rows(part_cost)).sum(0)

    def _by_rows(self, function: Callable[[Problem, Tensor, Tensor, slice], Tensor]) -> list[Tensor]:
        """function(problem, f, g, rows) of some rows of x at a time; a gradient forms them again."""
        self._check_unchanged()
        problem, (f, g) = self._problem, self._raw
        n, m = problem.size
        step = max(1, CELLS // max(1, m * len(f)))

        def of_rows(start: int) -> Tensor:
            some = slice(start, start + step)
            part = problem.with_rows(some)
            with torch.autocast(f.device.type, enabled=False):
                return function(part, f[:, some], g, some)

        starts = range(0, max(n, 1), step)
        if not torch.is_grad_enabled():
            return [of_rows(start) for start in starts]
        return [checkpoint(of_rows, start, use_reentrant=False) for start in starts]

    def _check_unchanged(self) -> None:
        if self._versions is not None and self._versions != _versions(self._problem):
            raise RuntimeError("plan: x, y, a weight or a mask was changed in place since it was solved")


def _versions(problem: Problem) -> tuple[int, ...] | None:
    given = [t for t in (problem.x, problem.y, problem.a, problem.b) if t is not None]
    if torch.compiler.is_compiling() or any(t.is_inference() for t in given):
        return None  # these do not count their changes
    return tuple(t._version for t in given)


def sinkhorn(
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
    rho_x: float | None = None,
    rho_y: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    init: Tensor | None = None,
    precision: str = "fp32",
) -> SinkhornOutput:
    """Entropic optimal transport between B pairs of weighted point clouds.

    Args:
        x: [B, N, D], floating point, any strides. fp16 and bf16 are solved in fp32, fp64 in fp64.
        y: [B, M, D], on the same device.
        eps: regularisation, 1e-30 to 1e30, in units of the cost, a number or a tensor [B] without gradient.
            (geomloss: eps = blur**2 on half the squared distance.)
        cost: ``"sqeuclidean"``, ||x - y||^2; ``"euclidean"``, ||x - y|| (no gradient where points coincide);
            ``"cosine"``, 1 - cos(x, y); or ``"dot"``, -<x, y>. A zero vector (in fp32 also one shorter than
            1e-18) is at cosine distance 1 from everything and gets no gradient.
        a, b: weights [B, N] and [B, M], non-negative; uniform with sum 1 where omitted. Where both marginals
            are kept they sum to 1 over the unmasked points of each problem (checked on the CPU only, as a
            check on a GPU would wait for it, then divided by their sum to mend its rounding); else to any
            mass. A weight below the smallest normal number of its dtype counts as 0.
        x_mask, y_mask: boolean [B, N] and [B, M], True at the points that exist. What stands at the others
            is never read, NaN included.
        rho: unbalanced transport: the weight, in units of the cost, of KL(marginal | weights) of both sides;
            ``rho_x`` and ``rho_y`` are of one side each (semi-unbalanced). None keeps the marginal.
            (geomloss's ``reach`` is rho = reach**p, for its cost, which is half of the squared distance at
            p = 2: rho = 2 * reach**2 on the cost here.)
        max_iter: most iterations at ``eps``, >= 1; one is an update of f and of g.
        tol: a problem stops when its marginal error is at most this, >= 0.
        scaling: anneal: begin with eps as large as the costs and multiply it by this, > 0 and at most 0.999,
            after each iteration until it is ``eps``. It pays where eps is small.
        init: the potential g [B, M] of an earlier solution to start from.
        precision: of the products on a GPU, ``"fp32"`` (three TF32 products, or IEEE) or ``"tf32"`` (one).
            fp16 and bf16 points are exact in TF32, and always take one product where nothing is subtracted
            from them first (cosine, dot).

    Returns:
        SinkhornOutput. ``value`` is differentiable twice in x, y, a and b (envelope theorem: exact at
        convergence, memory independent of the iterations); the gradient in a and b is the potential, which is
        determined up to a constant. A problem without points (or mass) on one side has value 0 (where
        unbalanced, rho times the mass of the other) and no gradient. NaN or infinity in a problem makes its
        value NaN, never that of another; it then is not converged.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    In fp32, values are exact to about 1e-6 of the greater of eps and the largest cost between points after
    each cloud is moved to its own mean (both to the mean of the two where unbalanced or Euclidean): clouds
    may lie anywhere, but where one cloud's own clusters lie d apart, differences of 1e-7 d^2 in the squared
    distance are lost. Choose eps above that, or fp64. Where unbalanced, a mass moves by exp(error / rho):
    use fp64 where 1e-7 of the largest cost is not far below rho; no marginal error shows what rounding did.
    Derivatives are reverse-mode: ``torch.func.jvp`` and ``torch.func.grad`` over it are refused.

    On CUDA, problems of up to 128 x 128 points (or 256 x 64, ...) with any D are solved by one Triton program
    each, in one launch; larger ones by a streaming kernel in O((N + M) D) memory; fp64 takes the torch path.
    On a CPU compiled loops serve (``pip install numba``; the torch path without it), and beyond 2^24 costs a
    problem, torch in chunks of rows. With TRITON_INTERPRET=1 the Triton kernels run there too.

    Source: Cuturi 2013, "Sinkhorn Distances"; Chizat et al. 2018, "Scaling algorithms for unbalanced optimal
    transport problems"; Feydy et al. 2019, "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (the gradient).
    """
    x, y = arguments.check_points(x, y)
    arguments.check_cost(cost)
    arguments.check_precision(precision)
    rhos = arguments.check_rho(rho, rho_x, rho_y)
    settings = arguments.check_iterations(max_iter, tol, scaling)
    eps = arguments.check_eps(eps, x, len(x))
    free = not all(map(math.isinf, rhos))
    a = arguments.check_weights("a", a, x, x_mask, any_mass=free)
    b = arguments.check_weights("b", b, y, y_mask, any_mass=free)
    centres = _centres(x, y, a, b, cost, balanced=not free)
    problem = Problem(x, y, a, b, *centres, eps, cost, *rhos, False, precision)
    if init is not None:
        init = arguments.check_potential(init, b.shape, x)
    return _solved(problem, init, *settings)


def sinkhorn_from_cost(
    cost: Tensor,
    *,
    eps: float | Tensor,
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
    init: Tensor | None = None,
) -> SinkhornOutput:
    """:func:`sinkhorn` with a given cost matrix [B, N, M], in which ``value`` then is differentiable.

    Plus infinity forbids a pair; NaN and minus infinity make their problem's value NaN. The other arguments
    are those of :func:`sinkhorn`.
    """
    arguments.check_floating("cost", cost, 3, "[B, N, M]")
    rhos = arguments.check_rho(rho, rho_x, rho_y)
    settings = arguments.check_iterations(max_iter, tol, scaling)
    eps = arguments.check_eps(eps, cost, len(cost))
    free = not all(map(math.isinf, rhos))
    a = arguments.check_weights("a", a, cost, x_mask, any_mass=free)
    b = arguments.check_weights("b", b, cost.mT, y_mask, any_mass=free)
    if init is not None:
        init = arguments.check_potential(init, b.shape, cost)
    return _solved(Problem(cost, None, a, b, None, None, eps, "given", *rhos), init, *settings)


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


@dataclass
class SinkhornDivergenceOutput:
    """value [B], differentiable; of its three problems the largest marginal error and iterations."""

    value: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str


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


@dataclass
class SinkhornPairwiseOutput:
    """[B, K] each: value (differentiable once), marginal error, iterations and converged of all pairs."""

    value: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str


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


def _centres(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: str, *, balanced: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What to subtract from the points, [B, D] each, so that little of their coordinates is lost to rounding.

    Where the marginals are kept, moving a cloud changes |x - y|^2 by terms of x_i and of y_j alone, which
    move the potentials and not the plan: each cloud goes to its own mean. Else both go to one middle.
    """
    if cost not in ("sqeuclidean", "euclidean"):
        return None, None
    with torch.no_grad():
        x_mean, y_mean = _mean(x, a), _mean(y, b)
        if on_cpu(x):
            near = _near_origin(x, a, x_mean) & _near_origin(y, b, y_mean)
            if bool(near.all()):
                return None, None
            x_mean, y_mean = (torch.where(near[:, None], 0.0, mean) for mean in (x_mean, y_mean))
        if cost == "sqeuclidean" and balanced:
            return x_mean, y_mean
        middle = (x_mean + y_mean) / 2
        return middle, middle.clone()  # an operator's arguments may not share memory


def _near_origin(points: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """[B], whether moving a cloud to its mean would shorten its longest point by little: then it stays."""
    if not points.numel():
        return torch.ones(len(points), dtype=torch.bool)
    length = torch.linalg.vector_norm(points, dim=2, dtype=mean.dtype)
    longest = torch.where(weights > 0, length, 0.0).amax(1)
    return 4 * torch.linalg.vector_norm(mean, dim=1) <= longest


def _mean(points: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean [B, D]; points without weight do not move it."""
    given, weights = weights, weights.clamp_min(0)
    weights = weights / weights.detach().sum(1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    with torch.autocast(points.device.type, enabled=False):
        points = points.to(weights.dtype)
        if not all_present(given):
            points = torch.where((given >= 0)[:, :, None], points, 0.0)
        return (weights[:, None, :] @ points).squeeze(1)


def _call(
    problem: Problem, init: Tensor | None, max_iter: int, tol: float, scaling: float
) -> tuple[Tensor, ...]:
    p = problem
    *outputs, _ = sinkhorn_op(
        p.x, p.y, p.a, p.b, p.x_centre, p.y_centre, p.eps, init, p.cost, p.rho_x, p.rho_y, p.pairs,
        p.precision, max_iter, tol, scaling,
    )  # fmt: skip
    return tuple(outputs)


def _solved(
    problem: Problem, init: Tensor | None, max_iter: int, tol: float, scaling: float
) -> SinkhornOutput:
    terms = _terms(problem)
    if init is not None and terms is not None:
        init = init - terms[1].detach()
    value, f, g, error, iterations = _call(problem, init, max_iter, tol, scaling)
    error = error.detach()
    a, b = problem.weights()
    raw = (f, g)
    if terms is not None:
        value = value + (a * terms[0]).sum(1) + (b * terms[1]).sum(1)
        f, g = f + terms[0], g + terms[1]
    if problem.balanced:
        shift = ((a * f).sum(1) - (b * g).sum(1))[:, None] / 2
        f, g = f - shift, g + shift
    solvable = problem.solvable()[:, None]
    return SinkhornOutput(
        value=value,
        f=torch.where(solvable & (problem.a >= 0), f, 0.0),
        g=torch.where(solvable & (problem.b >= 0), g, 0.0),
        marginal_error=error,
        iterations=iterations,
        converged=(error <= tol) & value.detach().isfinite(),
        backend=backend(problem),
        _problem=problem,
        _raw=raw,
        _terms=terms,
        _versions=_versions(problem),
    )


def _terms(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """Of x_i [B, N] and y_j [B, M]: what the squared distance is more than that about the centres.

    With d the step from the centre of y to that of x, |x - y|^2 = |x' - y'|^2 + 2 d x' - 2 d y' + |d|^2.
    """
    if problem.cost != "sqeuclidean" or not problem.balanced or problem.x_centre is None:
        return None
    assert problem.y_centre is not None
    step = torch.where(problem.solvable()[:, None], problem.x_centre - problem.y_centre, 0.0)
    square = step.square().sum(1, keepdim=True) / 2
    with torch.autocast(step.device.type, enabled=False):
        x, y = problem.points()
        return (2 * x @ step[:, :, None]).squeeze(2) + square, square - (2 * y @ step[:, :, None]).squeeze(2)


class SinkhornLoss(torch.nn.Module):
    """``sinkhorn`` as a loss module: ``loss(x, y) -> Tensor``.

    Args:
        eps, cost, rho, max_iter, tol, scaling: as in :func:`sinkhorn`.
        debias: the loss is :func:`sinkhorn_divergence`.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for the values [B].
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        cost: str = "sqeuclidean",
        rho: float | None = None,
        debias: bool = False,
        max_iter: int = 1000,
        tol: float = 1e-4,
        scaling: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        arguments.check_cost(cost)
        arguments.check_rho(rho, None, None)
        arguments.check_eps(eps, torch.empty(0), 1)
        arguments.check_iterations(max_iter, tol, scaling)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, accepted are 'mean', 'sum' and 'none'")
        self.eps, self.cost, self.rho, self.debias = eps, cost, rho, debias
        self.max_iter, self.tol, self.scaling, self.reduction = max_iter, tol, scaling, reduction

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, D], y [B, M, D], weights and masks as in :func:`sinkhorn`; a scalar, or [B] unreduced."""
        solve: Callable[..., Any] = sinkhorn_divergence if self.debias else sinkhorn
        value = solve(
            x,
            y,
            eps=self.eps,
            cost=self.cost,
            a=a,
            b=b,
            x_mask=x_mask,
            y_mask=y_mask,
            rho=self.rho,
            max_iter=self.max_iter,
            tol=self.tol,
            scaling=self.scaling,
        ).value
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, cost={self.cost!r}, rho={self.rho}, debias={self.debias}, "
            f"max_iter={self.max_iter}, tol={self.tol}, scaling={self.scaling}, reduction={self.reduction!r}"
        )
