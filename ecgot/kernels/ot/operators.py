"""The registered operators under the public functions, their derivatives, and the choice of the solver.

``ecgot::sinkhorn`` solves; its gradient is ``ecgot::sinkhorn_pull``, by the envelope theorem, with what
``ecgot::sinkhorn_implicit`` adds where gradients reach the potentials. The pull has a derivative of its own,
and passes gradients on to the potentials, which makes second derivatives of the value exact as well.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.dispatch import use_triton
from ecgot.kernels.ot import torch_solver
from ecgot.kernels.ot.iteration import iterate
from ecgot.kernels.ot.problem import PlanWeights, Problem, Result

HAS_NUMBA = importlib.util.find_spec("numba") is not None
# Of the linear system of implicit gradients; fp32 cannot do better than its rounding.
IMPLICIT_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
MAX_STEPS = 1000  # of conjugate gradients
MAX_CACHED_CELLS = 2**22  # products x y^T of a batch, 16 MB in fp32


def backend(problem: Problem) -> str:
    """Which solver serves: "triton" (on chip), "triton-streaming", "numba", "torch" or "torch-streaming"."""
    n, m = problem.size
    if use_triton(problem.x, problem.y) and problem.dtype == torch.float32:
        from ecgot.kernels.ot import triton_onchip

        if triton_onchip.fits(n, m):
            return "triton"
        if not problem.pairs and problem.cost != "given" and n and m:
            return "triton-streaming"
        return "torch"
    if n * m <= torch_solver.MAX_CELLS or problem.pairs or problem.cost == "given":
        return "numba" if HAS_NUMBA and problem.x.device.type == "cpu" else "torch"
    return "torch-streaming"


# --- solve --------------------------------------------------------------------------------------------------


@torch.library.custom_op("ecgot::sinkhorn", mutates_args=())
def sinkhorn_op(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    eps: Tensor,
    init: Tensor | None,
    cost: str,
    rho_x: float,
    rho_y: float,
    pairs: bool,
    precision: str,
    max_iter: int,
    tol: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value, f, g, marginal error and iterations of a :class:`Problem`, and what its gradient uses again."""
    problem = Problem(x, y, a, b, x_centre, y_centre, eps, cost, rho_x, rho_y, pairs, precision)
    with torch.autocast(x.device.type, enabled=False):  # the products must stay in the solver's precision
        f, g, error, iterations = _solve(
            problem, init, max_iter, tol, scaling, cost_cache := _cost_cache(problem)
        )
        return problem.value(f, g), f, g, error, iterations, cost_cache


def _cost_cache(problem: Problem) -> Tensor:
    """[B, N, M] for the costs' products on a CPU, where they are small; else empty."""
    shape = (len(problem.a), *problem.size)
    small = math.prod(shape) <= MAX_CACHED_CELLS and not problem.pairs and problem.cost != "given"
    return problem.eps.new_empty(shape if small and backend(problem) == "numba" else (0,))


def _solve(
    problem: Problem, init: Tensor | None, max_iter: int, tol: float, scaling: float, cost_cache: Tensor
) -> Result:
    if problem.nothing:
        shape, (n, m), zeros = problem.shape, problem.size, problem.eps.new_zeros
        return zeros(*shape, n), zeros(*shape, m), zeros(shape), zeros(shape, dtype=torch.int32)
    name = backend(problem)
    if name == "numba":
        from ecgot.kernels.ot import numba_solver

        return numba_solver.solve(problem, init, max_iter, tol, scaling, cost_cache)
    if name == "triton":
        from ecgot.kernels.ot import triton_onchip

        return triton_onchip.solve(problem, init, max_iter, tol, scaling)
    if name == "triton-streaming":
        from ecgot.kernels.ot import triton_streaming

        softmins = triton_streaming.softmins(problem)
        return iterate(problem, softmins, init, max_iter, tol, scaling)
    return torch_solver.solve(problem, init, max_iter, tol, scaling)


@sinkhorn_op.register_fake
def _(x, y, a, b, x_centre, y_centre, eps, init, cost, rho_x, rho_y, pairs, *_settings):  # type: ignore[no-untyped-def]
    problem = Problem(x, y, a, b, x_centre, y_centre, eps, cost, rho_x, rho_y, pairs)
    shape, (n, m), empty = problem.shape, problem.size, eps.new_empty
    iterations = empty(shape, dtype=torch.int32)
    return empty(shape), empty(*shape, n), empty(*shape, m), empty(shape), iterations, _cost_cache(problem)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, a, b, x_centre, y_centre, eps, _, *kind, _, _, _ = inputs
    _, f, g, _, _, cost_cache = output
    ctx.kind = tuple(kind)
    ctx.save_for_backward(x, y, a, b, x_centre, y_centre, eps, f, g, cost_cache)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, grad_f, grad_g, *_):  # type: ignore[no-untyped-def]
    *given, f, g, cost_cache = ctx.saved_tensors
    needs_x, needs_y, needs_a, needs_b = ctx.needs_input_grad[:4]
    *_kind, pairs, _precision = ctx.kind
    left = right = more_a = more_b = grad_x = grad_y = grad_a = grad_b = None
    if grad_f is not None or grad_g is not None:
        if pairs:
            raise RuntimeError("sinkhorn_pairwise: got a second derivative, accepted are first derivatives")
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        left, right, more_a, more_b = implicit_op(*given, f, g, grad_f, grad_g, *ctx.kind)
    if grad_value is None:
        grad_value = given[-1].new_zeros(f.shape[:-1])
    if needs_x or needs_y:
        grad_x, grad_y = pull_op(*given, f, g, grad_value, left, right, cost_cache.detach(), *ctx.kind)
    if needs_a or needs_b:
        grad_a, grad_b = _weight_gradients(Problem(*given, *ctx.kind), f, g, grad_value)
        if more_a is not None and more_b is not None:
            grad_a, grad_b = grad_a + more_a, grad_b + more_b
    return (
        grad_x,
        grad_y if given[1] is not None else None,
        grad_a if needs_a else None,
        grad_b if needs_b else None,
        *(None,) * 12,
    )


def _weight_gradients(problem: Problem, f: Tensor, g: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiable in all of its arguments, as a second derivative needs it."""
    if not problem.pairs:
        slope_a, slope_b = problem.weight_gradients(f, g)
        scale = torch.where(problem.solvable(), grad_value, 0.0)[:, None]
        return slope_a * scale, slope_b * scale
    count_x, count_y = len(problem.a), len(problem.b)
    scale = torch.where(problem.solvable(), grad_value, 0.0)[:, :, None]
    whole = problem.rows(0, count_x)
    slope_a, slope_b = whole.weight_gradients(f.flatten(0, 1), g.flatten(0, 1))
    slope_a, slope_b = slope_a.view(count_x, count_y, -1), slope_b.view(count_x, count_y, -1)
    return (slope_a * scale).sum(1), (slope_b * scale).sum(0)


sinkhorn_op.register_autograd(_backward, setup_context=_setup_context)


# --- envelope gradient --------------------------------------------------------------------------------------


@torch.library.custom_op("ecgot::sinkhorn_pull", mutates_args=())
def pull_op(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    eps: Tensor,
    f: Tensor,
    g: Tensor,
    scale: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    cost_cache: Tensor,
    cost: str,
    rho_x: float,
    rho_y: float,
    pairs: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients in x and y (empty with cost "given") of the weighted costs of :class:`PlanWeights`."""
    problem = Problem(x, y, a, b, x_centre, y_centre, eps, cost, rho_x, rho_y, pairs, precision)
    given = PlanWeights(f, g, scale.to(eps.dtype), left, right)
    with torch.autocast(x.device.type, enabled=False):
        grad_x, grad_y = _cost_vjp(problem, given, cost_cache)
    return grad_x, x.new_empty(0) if grad_y is None else grad_y


def _cost_vjp(problem: Problem, given: PlanWeights, cost_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    if problem.nothing:
        return torch.zeros_like(problem.x), None if problem.y is None else torch.zeros_like(problem.y)
    name = backend(problem)
    if name == "numba" and given.left is None:
        from ecgot.kernels.ot import numba_solver

        return numba_solver.cost_vjp(problem, given, cost_cache)
    if name in ("triton", "triton-streaming") and problem.cost != "given":
        from ecgot.kernels.ot import triton_gradient

        return triton_gradient.cost_vjp(problem, given)
    return torch_solver.cost_vjp(problem, given)


@pull_op.register_fake
def _(x, y, *_others):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _setup_cost_vjp_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, left, _, _, cost, rho_x, rho_y, pairs, precision = inputs
    ctx.kind, ctx.second = (cost, rho_x, rho_y, pairs, precision), left is not None
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _cost_vjp_backward(ctx, grad_x, grad_y):  # type: ignore[no-untyped-def]
    if ctx.second or torch.is_grad_enabled():
        raise RuntimeError("sinkhorn: got a third derivative, accepted are first and second ones")
    *_kind, pairs, _precision = ctx.kind
    if pairs:
        raise RuntimeError("sinkhorn_pairwise: got a second derivative, accepted are first derivatives")
    x, y, a, b, x_centre, y_centre, eps, f, g, scale = ctx.saved_tensors
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_() for t in (x, y, a, b, f, g, scale)
    ]
    known = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        x, y, a, b, f, g, scale = leaves
        problem = Problem(x, y, a, b, x_centre, y_centre, eps, *ctx.kind)
        weights = PlanWeights(f, g, scale.to(eps.dtype)).weights(problem)
        if y is None:
            gradients, incoming = [weights], [grad_x]
        else:
            cost = problem.cost_matrix()
            gradients = list(torch.autograd.grad(cost, (x, y), weights, create_graph=True))
            incoming = [grad_x, grad_y]
        pairs_of = [(g, i.to(g.dtype)) for g, i in zip(gradients, incoming, strict=True) if i is not None]
        found = torch.autograd.grad(
            [g for g, _ in pairs_of], known, [i for _, i in pairs_of], allow_unused=True
        )
    numbers = iter(found)
    grad_x, grad_y, grad_a, grad_b, grad_f, grad_g, grad_scale = (
        None if leaf is None else next(numbers) for leaf in leaves
    )
    return grad_x, grad_y, grad_a, grad_b, None, None, None, grad_f, grad_g, grad_scale, *(None,) * 8


pull_op.register_autograd(_cost_vjp_backward, setup_context=_setup_cost_vjp_context)


# --- implicit gradient --------------------------------------------------------------------------------------


@torch.library.custom_op("ecgot::sinkhorn_implicit", mutates_args=())
def implicit_op(
    x: Tensor,
    y: Tensor | None,
    a: Tensor,
    b: Tensor,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    eps: Tensor,
    f: Tensor,
    g: Tensor,
    grad_f: Tensor,
    grad_g: Tensor,
    cost: str,
    rho_x: float,
    rho_y: float,
    pairs: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What gradients of the potentials add to :class:`PlanWeights` (left, right) and to those of a and b."""
    problem = Problem(x, y, a, b, x_centre, y_centre, eps, cost, rho_x, rho_y, pairs, precision)
    tolerance = IMPLICIT_TOLERANCE[problem.dtype]
    with torch.autocast(x.device.type, enabled=False):
        if backend(problem) == "triton":
            from ecgot.kernels.ot import triton_onchip

            if triton_onchip.fits_implicit(*problem.size):
                return triton_onchip.implicit(problem, f, g, grad_f, grad_g, MAX_STEPS, tolerance)
        return torch_solver.implicit(problem, f, g, grad_f, grad_g, MAX_STEPS, tolerance)


@implicit_op.register_fake
def _(x, y, a, b, x_centre, y_centre, eps, f, g, grad_f, grad_g, *_kind):  # type: ignore[no-untyped-def]
    return f.new_empty(f.shape), g.new_empty(g.shape), f.new_empty(f.shape), g.new_empty(g.shape)
