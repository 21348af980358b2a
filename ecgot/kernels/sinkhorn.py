"""Batched entropic optimal transport: the public function, its registered operators and the torch path.

    OT_eps(a, b) = min_P <P, C> + eps KL(P | a (x) b)     over plans P with marginals a and b
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),          value = <a, f> + <b, g> at the optimum

The solver runs in Triton (``_triton_sinkhorn``) or in torch; both follow the same iteration and the same
stopping rule per problem, so a result never depends on the other problems of its batch.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ecgot.kernels.dispatch import use_triton

COSTS = ("sqeuclidean", "cosine")


@dataclass
class SinkhornOutput:
    """The solution of B problems; only ``value`` carries gradients.

    Attributes:
        value: [B], the entropic cost <P, C> + eps KL(P | a (x) b), in units of the cost.
        f, g: [B, N] and [B, M], potentials in units of the cost, 0 at masked points; detached.
        marginal_error: [B], L1 distance of the plan's row marginals from a (its column marginals are exact).
        iterations: [B], int32, how many updates of (f, g) the problem took.
        converged: [B], bool, ``marginal_error <= tol``.
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

    def plan(self) -> Tensor:
        """The transport plan P [B, N, M], detached; rows and columns of masked points are 0."""
        with torch.no_grad(), torch.autocast(self.f.device.type, enabled=False):
            return self._problem.plan(self.f, self.g)


@dataclass
class _Problem:
    """What defines the batch of problems; the torch path and ``plan()`` read it."""

    x: Tensor
    y: Tensor
    a: Tensor | None
    b: Tensor | None
    x_mask: Tensor | None
    y_mask: Tensor | None
    eps: float
    cost: str

    def weights(self) -> tuple[Tensor, Tensor]:
        return _weights(self.x, self.a, self.x_mask), _weights(self.y, self.b, self.y_mask)

    def cost_matrix(self) -> Tensor:
        """[B, N, M]; finite at masked points."""
        if self.cost == "cosine":
            x, y = _clean(self.x, self.x_mask), _clean(self.y, self.y_mask)
            return (x @ y.mT).mul_(_inverse_norm(x)).mul_(-_inverse_norm(y).mT).add_(1.0)
        x, y = _centred(self.x, self.y, self.x_mask, self.y_mask)
        squares = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :]
        return torch.baddbmm(squares, x, y.mT, alpha=-2).clamp_min_(0)

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
        eps: regularisation, > 0, in units of the cost. (geomloss: eps = blur**2 on half the cost.)
        cost: ``"sqeuclidean"``, ||x - y||^2, or ``"cosine"``, 1 - cos(x, y); a zero vector is at cosine
            distance 1 from everything and gets no gradient.
        a, b: weights [B, N] and [B, M], non-negative, summing to 1 over the unmasked points of each problem
            (checked on the CPU only, as a check on a GPU would wait for it); uniform where omitted. A weight
            below the smallest normal number of its dtype counts as 0.
        x_mask, y_mask: boolean [B, N] and [B, M], True at the points that exist. What stands at the others
            is never read, NaN included.
        max_iter: most iterations, >= 1; one is an update of f and of g.
        tol: a problem stops when the L1 error of its row marginals is at most this, >= 0.

    Returns:
        SinkhornOutput. ``value`` is differentiable once in x, y, a and b (envelope theorem: exact at
        convergence, memory independent of the iterations); the gradient in a and b is the potential, which is
        determined up to a constant. A problem without points on one side has value 0 and no gradient.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    On CUDA, problems of up to 128 x 128 points (or 256 x 64, ...) with any D are solved by one Triton
    program each, in one launch; larger ones and fp64 take the torch path. On a CPU the torch path serves,
    unless TRITON_INTERPRET=1 is set.

    Source: Cuturi 2013, "Sinkhorn Distances"; Feydy et al. 2019, "Interpolating between Optimal Transport and
    MMD using Sinkhorn Divergences" (the gradient).
    """
    x, y = _check_points(x, y)
    _check_settings(eps, cost, max_iter, tol)
    _check_mask("x_mask", x_mask, x)
    _check_mask("y_mask", y_mask, y)
    a = _check_weights("a", a, x, x_mask)
    b = _check_weights("b", b, y, y_mask)
    value, f, g, error, iterations = _sinkhorn_fwd_op(
        x, y, a, b, x_mask, y_mask, float(eps), cost, max_iter, float(tol)
    )
    return SinkhornOutput(
        value=value,
        f=f.detach(),
        g=g.detach(),
        marginal_error=error.detach(),
        iterations=iterations,
        converged=error.detach() <= tol,
        backend="triton" if _takes_triton(x, y) else "torch",
        _problem=_Problem(x, y, a, b, x_mask, y_mask, float(eps), cost),
    )


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
        _check_settings(eps, cost, max_iter, tol)
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
        if not points.is_floating_point():
            raise TypeError(f"{name}: got dtype {points.dtype}, accepted is floating point")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(
            f"x and y: got shapes {tuple(x.shape)} and {tuple(y.shape)}, accepted are [B, N, D] and [B, M, D]"
        )
    if x.device != y.device:
        raise ValueError(f"y: got device {y.device}, accepted is that of x, {x.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def _check_settings(eps: float, cost: str, max_iter: int, tol: float) -> None:
    if not (isinstance(eps, (int, float)) and 0 < eps < math.inf):
        raise ValueError(f"eps: got {eps!r}, accepted is a finite number > 0")
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}, accepted are {' and '.join(map(repr, COSTS))}")
    if not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter: got {max_iter!r}, accepted is an integer >= 1")
    if not (isinstance(tol, (int, float)) and 0 <= tol < math.inf):
        raise ValueError(f"tol: got {tol!r}, accepted is a number >= 0")


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
    """Weights in the solver's dtype, zero at masked points; half-precision ones brought to a sum of 1."""
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
    if half:  # the rounding of the weights would keep the marginal error above tol for ever
        mass = weights.sum(1, keepdim=True)
        weights = weights / torch.where(mass > 0, mass, 1.0)
    return weights


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
    eps: float,
    cost: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _takes_triton(x, y):
        from ecgot.kernels import _triton_sinkhorn

        return _triton_sinkhorn._sinkhorn_fwd(x, y, a, b, x_mask, y_mask, eps, cost, max_iter, tol)
    with torch.autocast(x.device.type, enabled=False):  # the products must stay in the solver's precision
        return _solve_torch(_Problem(x, y, a, b, x_mask, y_mask, eps, cost), max_iter, tol)


@_sinkhorn_fwd_op.register_fake
def _(x, y, a, b, x_mask, y_mask, eps, cost, max_iter, tol):  # type: ignore[no-untyped-def]
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
    f: Tensor,
    g: Tensor,
    eps: float,
    cost: str,
) -> tuple[Tensor, Tensor]:
    problem = _Problem(x, y, a, b, x_mask, y_mask, eps, cost)
    with torch.autocast(x.device.type, enabled=False):
        if not _takes_triton(x, y):
            return _envelope_torch(grad_value, problem, f, g)
        from ecgot.kernels import _triton_sinkhorn

        a, b = problem.weights()
        return _triton_sinkhorn._sinkhorn_bwd(
            grad_value, x, y, f / eps + a.log(), g / eps + b.log(), eps, cost
        )


@_sinkhorn_bwd_op.register_fake
def _(grad_value, x, y, a, b, x_mask, y_mask, f, g, eps, cost):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), y.new_empty(y.shape)


@torch.library.custom_op("ecgot::sinkhorn_weight_bwd", mutates_args=())
def _sinkhorn_weight_bwd_op(grad_value: Tensor, potential: Tensor) -> Tensor:
    """An operator, if a small one: without a formula of its own, a second derivative raises and is not 0."""
    return grad_value[:, None] * potential


@_sinkhorn_weight_bwd_op.register_fake
def _(grad_value, potential):  # type: ignore[no-untyped-def]
    return potential.new_empty(potential.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, a, b, x_mask, y_mask, ctx.eps, ctx.cost, _, _ = inputs
    _, f, g, _, _ = output
    ctx.save_for_backward(x, y, a, b, x_mask, y_mask, f, g)


def _backward(ctx, grad_value, *_potential_grads):  # type: ignore[no-untyped-def]
    # The public function detaches every output but the value, so no other gradient can arrive here.
    x, y, a, b, x_mask, y_mask, f, g = ctx.saved_tensors
    grad_x, grad_y = None, None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_x, grad_y = _sinkhorn_bwd_op(grad_value, x, y, a, b, x_mask, y_mask, f, g, ctx.eps, ctx.cost)
    grad_a = _sinkhorn_weight_bwd_op(grad_value, f) if ctx.needs_input_grad[2] else None
    grad_b = _sinkhorn_weight_bwd_op(grad_value, g) if ctx.needs_input_grad[3] else None
    return grad_x, grad_y, grad_a, grad_b, None, None, None, None, None, None


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


def _centred(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Clean points, moved together so that the mean of x is at the origin: squared distances stay.

    For clouds far from the origin |x|^2 + |y|^2 - 2 xy would cancel catastrophically.
    """
    x, y = _clean(x, x_mask), _clean(y, y_mask)
    center = _weights(x, None, x_mask)[:, None, :] @ x
    return _clean(x - center, x_mask), _clean(y - center, y_mask)


def _inverse_norm(points: Tensor) -> Tensor:
    """[B, N, 1]; that of a zero vector is 0, so that its cosine to everything is 0."""
    norm = torch.linalg.vector_norm(points, dim=2, keepdim=True)
    return torch.where(norm > 0, 1 / norm, 0.0)


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
        along = pull * (1 - cost)
        x_own, y_own = along.sum(2)[:, :, None] * x_scale**2, along.sum(1)[:, :, None] * y_scale**2
        pull.mul_(x_scale).mul_(-y_scale.mT)
    else:
        x, y = _centred(problem.x, problem.y, problem.x_mask, problem.y_mask)
        pull.mul_(-2)
        x_own, y_own = -pull.sum(2)[:, :, None], -pull.sum(1)[:, :, None]
    grad_x = torch.bmm(pull, y).addcmul_(x, x_own)
    grad_y = torch.bmm(pull.mT, x).addcmul_(y, y_own)
    return grad_x.to(problem.x.dtype), grad_y.to(problem.y.dtype)
