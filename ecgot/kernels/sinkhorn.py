"""Batched entropic optimal transport: the public function, its registered operators and the torch path.

    OT_eps(a, b) = min_P <P, C> + eps KL(P | a (x) b)     over plans P with marginals a and b
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),          value = <a, f> + <b, g> at the optimum

The solver runs in Triton (``_triton_sinkhorn``) or in torch; both follow the same iteration and the same
stopping rule per problem, so a result never depends on the other problems of its batch.
"""

import math
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ecgot.kernels.dispatch import use_triton

COSTS = ("sqeuclidean", "cosine")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class SinkhornOutput:
    """The solution of B problems; only ``value`` carries gradients.

    Attributes:
        value: [B], the entropic cost <P, C> + eps KL(P | a (x) b), in units of the cost.
        f, g: [B, N] and [B, M], potentials in units of the cost, 0 at masked points; detached.
        marginal_error: [B], L1 distance of the plan's row marginals from a (its column marginals are exact).
        iterations: [B], int32, how many updates of (f, g) the problem took.
        converged: [B], bool, ``marginal_error <= tol`` and a finite value.
        backend: ``"triton"`` or ``"torch"``, whichever solved it.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str
    _problem: "_Problem" = field(repr=False)
    _centred_potentials: tuple[Tensor, Tensor] = field(repr=False)

    def plan(self) -> Tensor:
        """The transport plan P [B, N, M], detached; rows and columns of masked points are 0.

        Raises:
            RuntimeError: x, y, a weight or a mask was changed in place since it was solved.
        """
        self._problem.check_unchanged()
        with torch.no_grad(), torch.autocast(self.f.device.type, enabled=False):
            return self._problem.plan(*self._centred_potentials)


@dataclass
class _Problem:
    """What defines the batch of problems; the torch path and ``plan()`` read it.

    With the squared distance each cloud is moved to its own centre ([B, D]; None for the cosine). What that
    takes from the cost is a sum of a term of x_i and one of y_j, which moves the potentials and not the plan.
    """

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    x_mask: Tensor | None
    y_mask: Tensor | None
    x_centre: Tensor | None
    y_centre: Tensor | None
    eps: float
    cost: str
    versions: tuple[int, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        self.versions = self._versions()

    def _versions(self) -> tuple[int, ...] | None:
        given = [t for t in (self.x, self.y, self.a, self.b, self.x_mask, self.y_mask) if t is not None]
        if torch.compiler.is_compiling() or any(t.is_inference() for t in given):
            return None  # these do not count their changes
        return tuple(t._version for t in given)

    def check_unchanged(self) -> None:
        if self.versions is not None and self.versions != self._versions():
            raise RuntimeError("plan: x, y, a weight or a mask was changed in place since it was solved")

    def weights(self) -> tuple[Tensor, Tensor]:
        return _weights(self.x, self.a, self.x_mask), _weights(self.y, self.b, self.y_mask)

    def cost_matrix(self) -> Tensor:
        """[B, N, M]; finite at masked points."""
        if self.cost == "cosine":
            x, y = _clean(self.x, self.x_mask), _clean(self.y, self.y_mask)
            return (x @ y.mT).mul_(_inverse_norm(x)).mul_(-_inverse_norm(y).mT).add_(1.0)
        x, y = self.centred()
        squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
        return torch.baddbmm(squares, x, y.mT, alpha=-2).clamp_min_(0)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Clean points, each cloud about its own centre."""
        assert self.x_centre is not None
        assert self.y_centre is not None
        x, y = _clean(self.x, self.x_mask), _clean(self.y, self.y_mask)
        return (
            _clean(x - self.x_centre[:, None, :], self.x_mask),
            _clean(y - self.y_centre[:, None, :], self.y_mask),
        )

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        return self.plan_of_cost(self.cost_matrix(), f, g)

    def plan_of_cost(self, cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
        a, b = self.weights()
        exponent = (f[:, :, None] + g[:, None, :] - cost) / self.eps
        # exp(-inf) is 0, while 0 * exp(large) would be NaN: the weights enter through their logarithms.
        return torch.exp(exponent + a.log()[:, :, None] + b.log()[:, None, :])


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
) -> SinkhornOutput:
    """Entropic optimal transport between B pairs of weighted point clouds.

    Args:
        x: [B, N, D], floating point, any strides. fp16 and bf16 are solved in fp32, fp64 in fp64.
        y: [B, M, D], on the same device.
        eps: regularisation, 1e-30 to 1e30, in units of the cost. (geomloss: eps = blur**2 on half the cost.)
        cost: ``"sqeuclidean"``, ||x - y||^2, or ``"cosine"``, 1 - cos(x, y); a zero vector (in fp32 also one
            shorter than 1e-18) is at cosine distance 1 from everything and gets no gradient.
        a, b: weights [B, N] and [B, M], non-negative, summing to 1 over the unmasked points of each problem
            (checked on the CPU only, as a check on a GPU would wait for it, then divided by their sum to
            mend its rounding); uniform where omitted. A weight below the smallest normal number of its dtype
            counts as 0.
        x_mask, y_mask: boolean [B, N] and [B, M], True at the points that exist. What stands at the others
            is never read, NaN included.
        max_iter: most iterations, >= 1; one is an update of f and of g.
        tol: a problem stops when the L1 error of its row marginals is at most this, >= 0.

    Returns:
        SinkhornOutput. ``value`` is differentiable once in x, y, a and b (envelope theorem: exact at
        convergence, memory independent of the iterations); the gradient in a and b is the potential, which is
        determined up to a constant. A problem without points on one side has value 0 and no gradient. NaN or
        infinity in a problem makes its value NaN, never that of another; it then is not converged.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    In fp32, values are exact to about 1e-6 of the greater of eps and the largest cost between points after
    each cloud is moved to its own mean: clouds may lie anywhere, but where one cloud's own clusters lie d
    apart, differences of 1e-7 d^2 in the squared distance are lost. Choose eps above that, or fp64.
    Derivatives are reverse-mode: ``torch.func.jvp`` and ``torch.func.grad`` over it are refused.

    On CUDA, problems of up to 128 x 128 points (or 256 x 64, ...) with any D are solved by one Triton
    program each, in one launch; larger ones and fp64 take the torch path. On a CPU the torch path serves,
    unless TRITON_INTERPRET=1 is set.

    Source: Cuturi 2013, "Sinkhorn Distances"; Feydy et al. 2019, "Interpolating between Optimal Transport and
    MMD using Sinkhorn Divergences" (the gradient).
    """
    x, y = _check_points(x, y)
    eps, max_iter, tol = _check_settings(eps, cost, max_iter, tol)
    _check_mask("x_mask", x_mask, x)
    _check_mask("y_mask", y_mask, y)
    a = _check_weights("a", a, x, x_mask)
    b = _check_weights("b", b, y, y_mask)
    x_mean, y_mean = (None, None) if cost == "cosine" else (_mean(x, a, x_mask), _mean(y, b, y_mask))
    x_centre, y_centre = (None if mean is None else mean.detach() for mean in (x_mean, y_mean))
    value, f, g, error, iterations = _sinkhorn_fwd_op(
        x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost, max_iter, tol
    )
    problem = _Problem(x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost)
    potentials = (f.detach(), g.detach())
    moved = potentials
    if x_mean is not None and y_mean is not None:
        value, moved = _moved_back(value, potentials, problem, x_mean, y_mean)
    error = error.detach()
    return SinkhornOutput(
        value=value,
        f=moved[0],
        g=moved[1],
        marginal_error=error,
        iterations=iterations,
        converged=(error <= tol) & value.detach().isfinite(),
        backend="triton" if _takes_triton(x, y) else "torch",
        _problem=problem,
        _centred_potentials=potentials,
    )


def _mean(points: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The weighted mean [B, D], differentiable; points without weight do not move it."""
    weights = _weights(points, weights, mask)
    with torch.autocast(points.device.type, enabled=False):
        return (weights[:, None, :] @ _clean(points, mask)).squeeze(1)


def _moved_back(
    value: Tensor, potentials: tuple[Tensor, Tensor], problem: _Problem, x_mean: Tensor, y_mean: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Value and potentials of the clouds where they lie, from those of the clouds about their centres.

    With d the step from the centre of y to that of x, |x - y|^2 = |x' - y'|^2 + 2 d x' - 2 d y' + |d|^2. The
    mean of x' and of y' is 0, so that the value moves by |d|^2 alone; its gradient by a_i 2 d and b_j (-2 d),
    which the means, 0 as they are, carry.
    """
    a, b = problem.weights()
    x_mass, y_mass = a.sum(1), b.sum(1)
    x_centre, y_centre = x_mean.detach(), y_mean.detach()
    solvable = ((x_mass > 0) & (y_mass > 0)).detach()
    step = torch.where(solvable[:, None], x_centre - y_centre, 0.0)
    square = step.square().sum(1)
    x_rest = x_mean - x_centre * x_mass[:, None]  # 0, but for its derivative and rounding
    y_rest = y_mean - y_centre * y_mass[:, None]
    rest = (2 * step * (x_rest - y_rest)).sum(1)
    value = value + torch.where(solvable, rest - rest.detach() + square * (x_mass + y_mass) / 2, 0.0)
    with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
        x, y = problem.centred()
        f = potentials[0] + (2 * x @ step[:, :, None]).squeeze(2) + square[:, None] / 2
        g = potentials[1] - (2 * y @ step[:, :, None]).squeeze(2) + square[:, None] / 2
        if problem.x_mask is not None:
            f = f.masked_fill(~problem.x_mask, 0.0)
        if problem.y_mask is not None:
            g = g.masked_fill(~problem.y_mask, 0.0)
    return value, (f, g)


class SinkhornLoss(torch.nn.Module):
    """``sinkhorn`` as a loss module: ``loss(x, y) -> Tensor``.

    Args:
        eps, cost, max_iter, tol: as in :func:`sinkhorn`.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for the values [B].
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        cost: str = "sqeuclidean",
        max_iter: int = 1000,
        tol: float = 1e-4,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        eps, max_iter, tol = _check_settings(eps, cost, max_iter, tol)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, accepted are 'mean', 'sum' and 'none'")
        self.eps, self.cost, self.max_iter, self.tol, self.reduction = eps, cost, max_iter, tol, reduction

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
        value = sinkhorn(
            x,
            y,
            eps=self.eps,
            cost=self.cost,
            a=a,
            b=b,
            x_mask=x_mask,
            y_mask=y_mask,
            max_iter=self.max_iter,
            tol=self.tol,
        ).value
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, cost={self.cost!r}, max_iter={self.max_iter}, tol={self.tol}, "
            f"reduction={self.reduction!r}"
        )


# --- checks -------------------------------------------------------------------------------------------------


def _check_points(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    for name, points in (("x", x), ("y", y)):
        if not isinstance(points, Tensor):
            raise TypeError(f"{name}: got {type(points).__name__}, accepted is a torch.Tensor")
        if points.dim() != 3:
            raise ValueError(f"{name}: got shape {tuple(points.shape)}, accepted is [B, points, D]")
        if points.dtype not in DTYPES or points.layout != torch.strided:
            kind = points.dtype if points.layout == torch.strided else points.layout
            raise TypeError(f"{name}: got {kind}, accepted are dense fp16, bf16, fp32 and fp64 tensors")
        if _has_tangent(points):
            raise RuntimeError(f"{name}: got a dual tensor, but sinkhorn has no forward-mode derivative")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x and y: got shapes {tuple(x.shape)} and {tuple(y.shape)}, accepted are [B, N, D] and [B, M, D]"
        )
    if x.device != y.device:
        raise ValueError(f"y: got device {y.device}, accepted is that of x, {x.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _has_tangent(points: Tensor) -> bool:
    # The first look into a dual tensor is slow, so there is none outside forward mode.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(points).tangent is not None


def _check_settings(eps: Any, cost: str, max_iter: Any, tol: Any) -> tuple[float, int, float]:
    """The settings as plain numbers: numpy's are welcome."""
    if not (_is_real(eps) and 1e-30 <= eps <= 1e30):
        raise ValueError(f"eps: got {eps!r}, accepted is a number > 0, from 1e-30 to 1e30")
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}, accepted are {' and '.join(map(repr, COSTS))}")
    if not isinstance(max_iter, (int, numbers.Integral)) or max_iter < 1:
        raise ValueError(f"max_iter: got {max_iter!r}, accepted is an integer >= 1")
    if not (_is_real(tol) and 0 <= tol < math.inf):
        raise ValueError(f"tol: got {tol!r}, accepted is a number >= 0")
    return float(eps), int(max_iter), float(tol)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float, numbers.Real))


def _check_mask(name: str, mask: Tensor | None, points: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, accepted is a torch.Tensor")
    if mask.dtype != torch.bool or mask.shape != points.shape[:2] or mask.device != points.device:
        raise ValueError(
            f"{name}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}, accepted is "
            f"torch.bool {tuple(points.shape[:2])} on {points.device}"
        )


def _check_weights(name: str, weights: Tensor | None, points: Tensor, mask: Tensor | None) -> Tensor | None:
    """Weights in the solver's dtype, zero at masked points, brought to a sum of 1."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: got {type(weights).__name__}, accepted is a torch.Tensor")
    if (
        weights.shape != points.shape[:2]
        or not weights.is_floating_point()
        or weights.device != points.device
    ):
        raise ValueError(
            f"{name}: got {weights.dtype} {tuple(weights.shape)} on {weights.device}, accepted is floating "
            f"point {tuple(points.shape[:2])} on {points.device}"
        )
    half = weights.dtype in (torch.float16, torch.bfloat16)
    weights = weights.to(_solver_dtype(points))
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    if weights.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_mass(name, weights.detach(), mask, tolerance=2e-2 if half else 1e-3)
    # The reciprocal of a subnormal weight is infinite; the point counts as one without weight.
    # Subtracted and not masked: the gradient at a point without weight is its potential, not 0.
    fixed = weights.detach()
    weights = weights - torch.where(fixed.abs() < torch.finfo(fixed.dtype).tiny, fixed, 0.0)
    # Their rounding would keep the marginal error above tol for ever. The gradient stays the potential.
    mass = weights.detach().sum(1, keepdim=True)
    return weights / torch.where(mass > 0, mass, 1.0)


def _check_mass(name: str, weights: Tensor, mask: Tensor | None, tolerance: float) -> None:
    if not bool(torch.all(weights >= 0)):  # also False for NaN
        raise ValueError(f"{name}: got a negative or NaN weight, accepted are weights >= 0")
    mass = weights.sum(1)
    # A problem that is masked out whole has mass 0 by right; it is answered with value 0.
    empty = torch.full_like(mass, weights.shape[1] == 0, dtype=torch.bool) if mask is None else ~mask.any(1)
    wrong = ((mass - 1).abs() > tolerance) & ~empty
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: got weights of problem {index} that sum to {mass[index].item():.6g}, "
            "accepted is a sum of 1"
        )


def _solver_dtype(points: Tensor) -> torch.dtype:
    return torch.float64 if points.dtype == torch.float64 else torch.float32


def _takes_triton(x: Tensor, y: Tensor) -> bool:
    if not use_triton(x, y) or x.dtype == torch.float64:
        return False
    from ecgot.kernels import _triton_sinkhorn

    return _triton_sinkhorn.fits(x.shape[1], y.shape[1])


# --- registered operators -----------------------------------------------------------------------------------


@torch.library.custom_op("ecgot::sinkhorn_fwd", mutates_args=())
def _sinkhorn_fwd_op(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    eps: float,
    cost: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _takes_triton(x, y):
        from ecgot.kernels import _triton_sinkhorn

        return _triton_sinkhorn._sinkhorn_fwd(
            x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost, max_iter, tol
        )
    with torch.autocast(x.device.type, enabled=False):  # the products must stay in the solver's precision
        problem = _Problem(x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost)
        return _solve_torch(problem, max_iter, tol)


@_sinkhorn_fwd_op.register_fake
def _(x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost, max_iter, tol):  # type: ignore[no-untyped-def]
    (batch, n, _), m, dtype = x.shape, y.shape[1], _solver_dtype(x)
    return (
        x.new_empty(batch, dtype=dtype),
        x.new_empty(batch, n, dtype=dtype),
        x.new_empty(batch, m, dtype=dtype),
        x.new_empty(batch, dtype=dtype),
        x.new_empty(batch, dtype=torch.int32),
    )


@torch.library.custom_op("ecgot::sinkhorn_bwd", mutates_args=())
def _sinkhorn_bwd_op(
    grad_value: Tensor,
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps: float,
    cost: str,
) -> tuple[Tensor, Tensor]:
    problem = _Problem(x, y, a, b, x_mask, y_mask, x_centre, y_centre, eps, cost)
    with torch.autocast(x.device.type, enabled=False):
        if not _takes_triton(x, y):
            return _envelope_torch(grad_value, problem, f, g)
        from ecgot.kernels import _triton_sinkhorn

        a, b = problem.weights()
        return _triton_sinkhorn._sinkhorn_bwd(
            grad_value, x, y, x_centre, y_centre, f / eps + a.log(), g / eps + b.log(), eps, cost
        )


@_sinkhorn_bwd_op.register_fake
def _(grad_value, x, y, a, b, x_mask, y_mask, x_centre, y_centre, f, g, eps, cost):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), y.new_empty(y.shape)


@torch.library.custom_op("ecgot::sinkhorn_weight_bwd", mutates_args=())
def _sinkhorn_weight_bwd_op(grad_value: Tensor, potential: Tensor) -> Tensor:
    """An operator, if a small one: without a formula of its own, a second derivative raises and is not 0."""
    return grad_value[:, None] * potential


@_sinkhorn_weight_bwd_op.register_fake
def _(grad_value, potential):  # type: ignore[no-untyped-def]
    return potential.new_empty(potential.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *points, ctx.eps, ctx.cost, _, _ = inputs
    _, f, g, _, _ = output
    ctx.save_for_backward(*points, f, g)


def _backward(ctx, grad_value, *_potential_grads):  # type: ignore[no-untyped-def]
    # The public function detaches every output but the value, so no other gradient can arrive here.
    *points, f, g = ctx.saved_tensors
    grad_x, grad_y = None, None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_x, grad_y = _sinkhorn_bwd_op(grad_value, *points, f, g, ctx.eps, ctx.cost)
    grad_a = _sinkhorn_weight_bwd_op(grad_value, f) if ctx.needs_input_grad[2] else None
    grad_b = _sinkhorn_weight_bwd_op(grad_value, g) if ctx.needs_input_grad[3] else None
    return grad_x, grad_y, grad_a, grad_b, *(None,) * 8


_sinkhorn_fwd_op.register_autograd(_backward, setup_context=_setup_context)


# --- torch path ---------------------------------------------------------------------------------------------


def _weights(points: Tensor, weights: Tensor | None, mask: Tensor | None) -> Tensor:
    """The weights [B, points]: as given (already zero at masked points), else uniform over the unmasked."""
    if weights is not None:
        return weights
    dtype = _solver_dtype(points)
    if mask is None:
        batch, count = points.shape[:2]
        return torch.full((batch, count), 1 / max(count, 1), dtype=dtype, device=points.device)
    valid = mask.to(dtype)
    return valid / valid.sum(1, keepdim=True).clamp_min(1)


def _clean(points: Tensor, mask: Tensor | None) -> Tensor:
    """Points in the solver's dtype, 0 where masked: what stands there may be NaN."""
    points = points.to(_solver_dtype(points))
    return points if mask is None else points.masked_fill(~mask[:, :, None], 0.0)


def _inverse_norm(points: Tensor) -> Tensor:
    """[B, N, 1]: 0 for a zero vector, so that its cosine to everything is 0, and NaN where it overflows."""
    square = points.square().sum(2, keepdim=True)
    inverse = torch.where(square < torch.finfo(points.dtype).tiny, 0.0, square.rsqrt())
    return torch.where(square == math.inf, math.nan, inverse)


def _solve_torch(
    problem: _Problem, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same iteration as the Triton kernel. Problems that have converged keep their potentials."""
    a, b = problem.weights()
    kernel = problem.cost_matrix().div_(-problem.eps)  # -C / eps; potentials in units of eps
    log_a, log_b = a.log(), b.log()
    solvable = (a.sum(1) > 0) & (b.sum(1) > 0)

    f, g = torch.zeros_like(a), torch.zeros_like(b)
    error = torch.where(solvable, math.inf, 0.0).to(a.dtype)
    iterations = torch.zeros(len(a), dtype=torch.int32, device=a.device)
    active = solvable.nonzero().squeeze(1)
    kernel, log_a, log_b, weight = (t[active] for t in (kernel, log_a, log_b, a))
    f_next = -torch.logsumexp(kernel + log_b[:, None, :], dim=2)
    for iteration in range(1, max_iter + 1):
        if not len(active):
            break
        f_now = f_next
        g_now = -torch.logsumexp(kernel + (f_now + log_a)[:, :, None], dim=1)
        f_next = -torch.logsumexp(kernel + (g_now + log_b)[:, None, :], dim=2)
        # Row i of the plan sums to a_i exp(f_i - f_next_i).
        # Points without weight may overflow here; they carry no mass, so they carry no error.
        residual = torch.where(weight > 0, torch.expm1(f_now - f_next), 0.0)
        residual = (weight * residual.abs()).sum(1)
        # Written so that NaN stops as well: it would never converge.
        going = residual > tol
        if iteration == max_iter:
            going = torch.zeros_like(going)
        if not bool(going.all()):
            done = ~going
            finished = active[done]
            f[finished], g[finished] = f_now[done], g_now[done]
            error[finished] = residual[done]
            iterations[finished] = iteration
            active, kernel, log_a, log_b, weight, f_next = (
                t[going] for t in (active, kernel, log_a, log_b, weight, f_next)
            )
    f, g = f * problem.eps, g * problem.eps
    if problem.x_mask is not None:
        f = f.masked_fill(~problem.x_mask, 0.0)
    if problem.y_mask is not None:
        g = g.masked_fill(~problem.y_mask, 0.0)
    return (a * f).sum(1) + (b * g).sum(1), f, g, error, iterations


def _envelope_torch(grad_value: Tensor, problem: _Problem, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """d value / d C is the plan; the chain rule through the cost gives grad_x [B, N, D], grad_y [B, M, D]."""
    cost = problem.cost_matrix()
    pull = problem.plan_of_cost(cost, f, g) * grad_value[:, None, None]
    if problem.cost == "cosine":  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
        x, y = _clean(problem.x, problem.x_mask), _clean(problem.y, problem.y_mask)
        x_scale, y_scale = _inverse_norm(x), _inverse_norm(y)
        x, y = x * x_scale, y * y_scale
        along = pull * (1 - cost)
    else:
        x, y = problem.centred()
        x_scale = y_scale = pull.new_full((), 2.0)
        along = pull
    grad_x = torch.bmm(pull, y).neg_().addcmul_(x, along.sum(2)[:, :, None]).mul_(x_scale)
    grad_y = torch.bmm(pull.mT, x).neg_().addcmul_(y, along.sum(1)[:, :, None]).mul_(y_scale)
    return grad_x.to(problem.x.dtype), grad_y.to(problem.y.dtype)
