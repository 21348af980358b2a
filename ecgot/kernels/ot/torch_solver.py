"""The solver in torch, on any device and in any dtype: costs are stored for some problems, or not at all."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ecgot.kernels.ot.iteration import Softmins, is_check_due, iterate, most_iterations
from ecgot.kernels.ot.problem import (
    MAX_EXPONENT,
    PlanWeights,
    Problem,
    Result,
    SolverSettings,
    can_read_values,
    cost_of,
    inverse_norm,
)
from ecgot.kernels.ot.torch_absorbed import Absorbed

MAX_CELLS = 2**24  # of the cost matrix that is held at once
CHUNK_CELLS = 2**20  # of all costs that are held at once on a CPU, 4 MB in fp32


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> Result:
    """Solve in chunks of problems with stored costs, or of rows where one problem is too large."""
    n, m = problem.size
    per_x = n * m * (len(problem.b) if problem.pairs else 1)
    if per_x > MAX_CELLS and not problem.pairs and problem.cost != "given":
        return iterate(problem, by_chunks(problem), init, settings)
    step = max(1, _chunk_cells(problem) // per_x)
    parts = []
    for start in range(0, len(problem.a), step):
        cut = _costs_of_pairs if problem.pairs and not settings.scaling else Problem.rows
        part = cut(problem, start, min(start + step, len(problem.a)))
        first = None if init is None else init[start : start + step]
        parts.append(iterate(part, stored(part), first, settings))
    f, g, error, iterations = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    shape = problem.shape
    return f.view(*shape, n), g.view(*shape, m), error.view(shape), iterations.view(shape)


def _chunk_cells(problem: Problem) -> int:
    """How many costs to hold at once: on a CPU as many as stay in its cache."""
    return min(MAX_CELLS, CHUNK_CELLS) if problem.x.device.type == "cpu" else MAX_CELLS


def _costs_of_pairs(problem: Problem, start: int, stop: int) -> Problem:
    """As :meth:`Problem.rows`, with the costs in place of the points, of which no pair needs a copy."""
    (n, m), k, count = problem.size, len(problem.b), stop - start
    own = slice(start * k, stop * k)
    cost = pair_costs(problem, *problem.points(), slice(start, stop)).transpose(1, 2)
    return Problem(
        x=cost.reshape(count * k, n, m),
        y=None,
        a=problem.a[start:stop].repeat_interleave(k, 0),
        b=problem.b.repeat(count, 1),
        x_centre=None,
        y_centre=None,
        eps=problem.eps[own],
        cost="given",
        rho_x=None if problem.rho_x is None else problem.rho_x[own],
        rho_y=None if problem.rho_y is None else problem.rho_y[own],
    )


def pair_costs(problem: Problem, x: Tensor, y: Tensor, some: slice) -> Tensor:
    """[count, N, K, M] of prepared points x [B, N, D] and y [K, M, D]."""
    part = x[some]
    shape = (*part.shape[:2], *y.shape[:2])
    return cost_of(part.flatten(0, 1)[None], y.flatten(0, 1)[None], problem.cost).view(shape)


def stored(problem: Problem) -> Softmins:
    """Log-sum-exps from a cost matrix [B, N, M] held in memory."""
    kernel = problem.cost_matrix() / -problem.eps[:, None, None]
    weights = problem.weights()
    log_a, log_b = (weight.log() for weight in weights)
    absorbed = None
    if can_read_values(kernel) and not bool(kernel.isinf().any()):
        absorbed = Absorbed(kernel, *weights)

    def rows(g: Tensor, t: Tensor | None) -> Tensor:
        if absorbed is not None and t is None:
            return absorbed.rows(g)
        return _logsumexp(kernel + g[:, None, :], log_b[:, None, :], t, 2)

    def columns(f: Tensor, t: Tensor | None) -> Tensor:
        if absorbed is not None and t is None:
            return absorbed.columns(f)
        return _logsumexp(kernel + f[:, :, None], log_a[:, :, None], t, 1)

    return Softmins(rows, columns)


def _logsumexp(exponent: Tensor, log_weight: Tensor, temperature: Tensor | None, dim: int) -> Tensor:
    if temperature is None:
        return torch.logsumexp(exponent + log_weight, dim)
    heat = temperature[:, None, None]
    return temperature[:, None] * torch.logsumexp(exponent / heat + log_weight, dim)


def by_chunks(problem: Problem) -> Softmins:
    """Log-sum-exps with the costs of some rows in memory at a time, formed again for each update."""
    n, m = problem.size
    step = max(1, MAX_CELLS // (m * len(problem.a)))
    log_a, log_b = (weight.log() for weight in problem.weights())
    points = problem.points()

    def kernel(start: int) -> Tensor:
        x, y = points
        return cost_of(x[:, start : start + step], y, problem.cost) / -problem.eps[:, None, None]

    def rows(g: Tensor, t: Tensor | None) -> Tensor:
        parts = [
            _logsumexp(kernel(start) + g[:, None, :], log_b[:, None, :], t, 2) for start in range(0, n, step)
        ]
        return torch.cat(parts, 1)

    def columns(f: Tensor, t: Tensor | None) -> Tensor:
        total = torch.full_like(log_b, -math.inf)
        heat = 1 if t is None else t[:, None]
        for start in range(0, n, step):
            some = slice(start, start + step)
            part = _logsumexp(kernel(start) + f[:, some, None], log_a[:, some, None], t, 1)
            total = torch.logaddexp(total, part / heat)
        return total * heat

    return Softmins(rows, columns)


def cost_vjp(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor | None]:
    """The gradient of sum Q_ij C_ij, Q held fixed, in x [B, N, D] and y [B, M, D]; in C with cost "given".

    In the solver's dtype: more is to be added before it is rounded to the points'.
    """
    if problem.pairs:
        return _cost_vjp_of_pairs(problem, given)
    n, m = problem.size
    step = max(1, _chunk_cells(problem) // (n * m))
    grads_x, grads_y = [], []
    for start in range(0, len(problem.a), step):
        stop = min(start + step, len(problem.a))
        grad_x, grad_y = _cost_vjp_by_rows(problem.rows(start, stop), given.rows(problem, start, stop))
        grads_x.append(grad_x)
        grads_y.append(grad_y)
    if problem.y is None:
        return torch.cat(grads_x), None
    return torch.cat(grads_x), torch.cat([grad for grad in grads_y if grad is not None])


def _cost_vjp_of_pairs(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor]:
    """All pairs of some clouds x in one product for each side; no pair has a copy of its points."""
    assert problem.y is not None
    (n, m), k = problem.size, len(problem.b)
    x, y = problem.points()
    a, b = problem.weights()
    eps, scale = problem.eps.view(problem.shape), torch.where(problem.solvable(), given.scale, 0.0)
    to_y, row_sums = torch.empty_like(x), torch.empty_like(a)
    to_x, column_sums = torch.zeros_like(y), torch.zeros_like(b)
    step = max(1, _chunk_cells(problem) // (n * m * k))
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        cost = pair_costs(problem, x, y, some)
        f, g = given.f[some].transpose(1, 2)[:, :, :, None], given.g[some][:, None]
        weights = cost.neg().add_(f).add_(g).div_(eps[some][:, None, :, None])
        weights.clamp_max_(MAX_EXPONENT).exp_()
        weights.mul_((a[some][:, :, None] * scale[some][:, None, :])[:, :, :, None]).mul_(b)
        if problem.cost == "euclidean":
            weights = torch.where(cost > 0, weights / torch.where(cost > 0, cost, 1.0), 0.0)
        # Where nothing asks for a pair, what is NaN in it stays there.
        weights = torch.where((scale[some] != 0)[:, None, :, None], weights, 0.0)
        flat = weights.view(-1, k * m)
        to_y[some] = (flat @ y.flatten(0, 1)).view(x[some].shape)
        to_x += (flat.T @ x[some].flatten(0, 1)).view(y.shape)
        row_sums[some] = weights.sum((2, 3))
        column_sums += weights.sum((0, 1))
    return (
        chain(problem.cost, x, to_y, row_sums, _inverse_norm(problem, problem.x, problem.a)),
        chain(problem.cost, y, to_x, column_sums, _inverse_norm(problem, problem.y, problem.b)),
    )


def _cost_vjp_by_rows(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor | None]:
    n, m = problem.size
    if problem.cost == "given":
        return given.weights(problem), None
    step = max(1, MAX_CELLS // (m * len(problem.a)))
    grads_x, grad_y = [], None
    for start in range(0, n, step):
        some = slice(start, start + step)
        part = problem.with_rows(some)
        left = None if given.left is None else given.left[:, some]
        weights = replace(given, f=given.f[:, some], left=left).weights(part)
        grad_x, more = _through_cost(part, weights)
        grads_x.append(grad_x)
        grad_y = more if grad_y is None else grad_y + more
    return torch.cat(grads_x, 1), grad_y


def _through_cost(problem: Problem, weights: Tensor) -> tuple[Tensor, Tensor]:
    x, y = problem.points()
    if problem.cost == "euclidean":
        distance = problem.cost_matrix()
        weights = torch.where(distance > 0, weights / torch.where(distance > 0, distance, 1.0), 0.0)
    assert problem.y is not None
    return (
        chain(problem.cost, x, weights @ y, weights.sum(2), _inverse_norm(problem, problem.x, problem.a)),
        chain(problem.cost, y, weights.mT @ x, weights.sum(1), _inverse_norm(problem, problem.y, problem.b)),
    )


def eps_vjp(problem: Problem, given: PlanWeights) -> Tensor:
    """The gradient of the value, and of what ``left`` and ``right`` add, in eps [B] ([B * K] for pairs).

    The value's derivative is KL(P | a b), that of the potentials' equations sum_ij W_ij (f + g - C)_ij / eps,
    and W alike for the columns: together sum Q_ij (f + g - C)_ij / eps, with Q of :class:`PlanWeights`, and
    what KL says of the masses.
    """
    if problem.empty:
        return torch.zeros_like(problem.eps)
    n, m = problem.size
    step = max(1, MAX_CELLS // (n * m * (len(problem.b) if problem.pairs else 1)))
    found = []
    for start in range(0, len(problem.a), step):
        stop = min(start + step, len(problem.a))
        part, weights = problem.rows(start, stop), given.rows(problem, start, stop)
        of_rows = max(1, MAX_CELLS // (m * len(part.a)))
        for first in range(0, n, of_rows):
            some = slice(first, first + of_rows)
            left = None if weights.left is None else weights.left[:, some]
            cut = replace(weights, f=weights.f[:, some], left=left)
            more = _eps_vjp_of_rows(part.with_rows(some), part, cut)
            found.append(more) if not first else found[-1].add_(more)
    return torch.cat(found)


def _eps_vjp_of_rows(problem: Problem, whole: Problem, given: PlanWeights) -> Tensor:
    """What some rows of the ``whole`` problem add."""
    exponent = given.f[:, :, None] + given.g[:, None, :] - problem.cost_matrix()
    weights = given.weights(problem)
    # What carries nothing may be at an infinite distance. NaN is not 0 and stays.
    moved = torch.where(weights == 0, 0.0, weights * exponent).sum((1, 2)) / problem.eps
    scale = torch.where(whole.solvable(), given.scale, 0.0)
    a, b = problem.weights()
    missed = a.sum(1) * b.sum(1) - problem.plan(given.f, given.g).sum((1, 2))
    return moved + torch.where(scale == 0, 0.0, scale * missed)


def _inverse_norm(problem: Problem, points: Tensor, weights: Tensor) -> Tensor | None:
    if problem.cost != "cosine":
        return None
    return inverse_norm(torch.where((weights >= 0)[:, :, None], points.to(problem.dtype), 0.0))


def chain(cost: str, x: Tensor, to_y: Tensor, total: Tensor, inverse_norm: Tensor | None) -> Tensor:
    """The gradient in x of sum Q_ij C_ij.

    Args:
        x: prepared points [B, N, D].
        to_y: Q y [B, N, D]; overwritten.
        total: Q 1 [B, N]. For the Euclidean distance Q is already divided by it.
        inverse_norm: of the raw points [B, N, 1]; for the cosine only.
    """
    if cost == "dot":
        return to_y.neg_()
    if cost == "cosine":  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
        assert inverse_norm is not None
        return (x * (x * to_y).sum(2, keepdim=True) - to_y) * inverse_norm
    half = to_y.neg_().addcmul_(x, total[:, :, None])
    return half.mul_(2) if cost == "sqeuclidean" else half


# --- implicit differentiation -------------------------------------------------------------------------------


def implicit(
    problem: Problem, f: Tensor, g: Tensor, grad_f: Tensor, grad_g: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """left [B, N] and right [B, M] of :class:`PlanWeights`, grad_a and grad_b, from the gradients of f and g.

    At the fixed point f_i = -tau_x eps log sum_j b_j exp((g_j - C_ij) / eps), and g alike, so that, with
    W_ij = b_j E_ij / r_i and V_ij = a_i E_ij / c_j the row- and column-stochastic forms of the plan,

        df + tau_x W dg = tau_x W . (dC - eps db / b),    dg + tau_y V^T df = tau_y V^T . (dC - eps da / a).

    The adjoint of this system, reduced to its columns, is symmetric and positive semi-definite; conjugate
    gradients solve it by products with E alone. They never enter its null space, a constant where both
    marginals are kept: the caller fixes the gauge, so that grad_f and grad_g have the same sum.
    """
    kernel = problem.kernel(f, g)
    a, b = problem.weights()
    tau_x, tau_y = (tau[:, None] for tau in problem.damping())
    solvable = problem.solvable()[:, None]
    grad_f = torch.where(solvable & (problem.a >= 0), grad_f, 0.0)
    grad_g = torch.where(solvable & (problem.b >= 0), grad_g, 0.0)

    def to_rows(v: Tensor) -> Tensor:
        return (kernel @ v[:, :, None]).squeeze(2)

    def to_columns(u: Tensor) -> Tensor:
        return (kernel.mT @ u[:, :, None]).squeeze(2)

    r, c = to_rows(b), to_columns(a)
    per_r, per_c = (torch.where(t > 0, 1 / torch.where(t > 0, t, 1.0), 0.0) for t in (r, c))
    bare = torch.where(b > 0, 0.0, grad_g)  # a column without weight passes its gradient on, and gets none
    rows = grad_f - tau_y * a * to_rows(bare * per_c)
    rhs = torch.where(b > 0, grad_g, 0.0) - tau_x * b * to_columns(rows * per_r)
    # Cancellation leaves rounding in the right-hand side, which is no equation to solve.
    terms = torch.where(b > 0, grad_g, 0.0).abs() + tau_x * b * to_columns((rows * per_r).abs())
    rounding = 8 * torch.finfo(rhs.dtype).eps * terms
    diagonal = b * c
    # Singular where both marginals are kept: what is left of the gauge would be chased for ever.
    total = diagonal.sum(1, keepdim=True)
    gauge = rhs.sum(1, keepdim=True) / torch.where(total > 0, total, 1.0)
    rhs = rhs - diagonal * torch.where(problem.kept()[:, None], gauge, 0.0)

    def matvec(q: Tensor) -> Tensor:
        inner = a * per_r * to_rows(b * q)
        return diagonal * q - tau_x * tau_y * b * to_columns(inner)

    q = conjugate_gradients(matvec, rhs, rounding, diagonal, max_iter, tol)
    mu = diagonal * q + bare
    lam = grad_f - tau_y * a * to_rows(mu * per_c)
    left, right, eps = tau_x * lam * per_r, tau_y * mu * per_c, problem.eps[:, None]
    return left, right, -eps * to_rows(right), -eps * to_columns(left)


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    rhs: Tensor,
    rounding: Tensor,
    diagonal: Tensor,
    max_iter: int,
    tol: float,
) -> Tensor:
    """Solve B symmetric systems [B, M] with a diagonal preconditioner; each stops at its own residual.

    A CUDA graph records at most ``MAX_CAPTURED`` steps: a system that needs more keeps its residual.

    Args:
        rounding: [B, M], error of the right-hand side: a residual of that size counts as solved.
        tol: of the preconditioned residual, relative to that of the right-hand side.
    """
    inverse = torch.where(diagonal > 0, 1 / torch.where(diagonal > 0, diagonal, 1.0), 0.0)
    q, residual = torch.zeros_like(rhs), rhs
    z = inverse * residual
    direction, rho = z, (residual * z).sum(1, keepdim=True)
    goal = torch.maximum(tol * tol * rho, (rounding.square() * inverse).sum(1, keepdim=True))
    for iteration in range(1, most_iterations(rhs, max_iter) + 1):
        going = rho > goal
        if is_check_due(going, iteration) and not bool(going.any()):
            break
        image = matvec(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(going & (curvature > 0), rho / torch.where(curvature > 0, curvature, 1.0), 0.0)
        q = q + step * direction
        residual = residual - step * image
        z = inverse * residual
        new = (residual * z).sum(1, keepdim=True)
        direction = z + torch.where(rho > 0, new / torch.where(rho > 0, rho, 1.0), 0.0) * direction
        rho = torch.where(going, new, rho)
    return q
