"""Batched entropic optimal transport: the public functions.

    OT_eps(a, b) = min_P <P, C> + eps KL(P | a (x) b)     over plans P with marginals a and b
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),          value = <a, f> + <b, g> at the optimum

With ``rho`` a marginal may be missed, at the price rho KL(marginal | weights); KL(p | q) = sum p log(p / q) -
p + q.
"""

import math

import torch
from torch import Tensor

from ecgot.kernels.ot import checks as arguments
from ecgot.kernels.ot.checks import can_read_values
from ecgot.kernels.ot.operators import backend, sinkhorn_op
from ecgot.kernels.ot.outputs import SinkhornOutput, _versions
from ecgot.kernels.ot.problem import Problem, all_present


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
        if can_read_values(x):
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
