"""The registered operators under the public functions, and their derivatives.

``ecgot::sinkhorn`` solves; its gradient is ``ecgot::sinkhorn_pull``, by the envelope theorem, with what
``ecgot::sinkhorn_implicit`` adds where gradients reach the potentials. ``sinkhorn_pull`` has a derivative of
its own and passes gradients on to the potentials, which makes second derivatives of the value exact as well.

An operator takes flat arguments: the tensors of a :class:`Problem`, the operator's own tensors, the problem's
other values, and the solver's settings. Problems are flattened and unflattened here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.ot import backends
from ecgot.kernels.ot.problem import PlanWeights, Problem, SolverSettings

TENSORS, VALUES = 7, 5  # how many arguments a problem is
TENSOR_SCHEMA = "Tensor x, Tensor? y, Tensor a, Tensor b, Tensor? x_centre, Tensor? y_centre, Tensor eps"
VALUE_SCHEMA = "str cost, float rho_x, float rho_y, bool pairs, str precision"


def solve(
    problem: Problem, init: Tensor | None, settings: SolverSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value, f, g, marginal error and iterations, differentiable; ``init`` is a g [B, M] to start from."""
    tensors, values = problem.flatten()
    value, f, g, error, iterations, _ = sinkhorn_op(
        *tensors, init, *values, settings.max_iter, settings.tol, settings.scaling
    )
    return value, f, g, error, iterations


def _split(
    flat: Sequence[Any], own: int
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], Sequence[Any]]:
    """An operator's arguments: the problem's tensors, ``own`` further tensors, its other values, the rest."""
    middle = TENSORS + own
    return flat[:TENSORS], flat[TENSORS:middle], flat[middle : middle + VALUES], flat[middle + VALUES :]


def _unpacked(flat: Sequence[Any], own: int) -> tuple[Problem, Sequence[Any], Sequence[Any]]:
    """An operator's arguments: the problem, ``own`` further tensors, the rest."""
    tensors, others, values, rest = _split(flat, own)
    return Problem.unflatten(tensors, values), others, rest


# --- solve --------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "ecgot::sinkhorn",
    mutates_args=(),
    schema=f"({TENSOR_SCHEMA}, Tensor? init, {VALUE_SCHEMA}, SymInt max_iter, float tol, float scaling)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def sinkhorn_op(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Value, f, g, marginal error, iterations, and the cost cache that the gradient uses again."""
    problem, (init,), settings = _unpacked(flat, 1)
    with torch.autocast(problem.x.device.type, enabled=False):  # products stay in the solver's precision
        (f, g, error, iterations), cache = backends.solve(problem, init, SolverSettings(*settings))
        return problem.value(f, g), f, g, error, iterations, cache


@sinkhorn_op.register_fake
def _(*flat):  # type: ignore[no-untyped-def]
    problem, _, _ = _unpacked(flat, 1)
    shape, (n, m), empty = problem.shape, problem.size, problem.eps.new_empty
    cache = backends.cost_cache(problem, backends.backend(problem))
    iterations = empty(shape, dtype=torch.int32)
    return empty(shape), empty(*shape, n), empty(*shape, m), empty(shape), iterations, cache


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, _, ctx.values, _ = _split(inputs, 1)
    _, f, g, _, _, cache = output
    ctx.save_for_backward(*tensors, f, g, cache)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, grad_f, grad_g, *_):  # type: ignore[no-untyped-def]
    *tensors, f, g, cache = ctx.saved_tensors
    problem = Problem.unflatten(tensors, ctx.values)
    needs_x, needs_y, needs_a, needs_b = ctx.needs_input_grad[:4]
    left = right = more_a = more_b = grad_x = grad_y = grad_a = grad_b = None
    if grad_f is not None or grad_g is not None:
        if problem.pairs:
            raise _second_derivative_of_pairs()
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        left, right, more_a, more_b = implicit_op(*tensors, f, g, grad_f, grad_g, *ctx.values)
    if grad_value is None:
        grad_value = problem.eps.new_zeros(f.shape[:-1])
    if needs_x or needs_y:
        grad_x, grad_y = cost_vjp_op(*tensors, f, g, grad_value, left, right, cache.detach(), *ctx.values)
    if needs_a or needs_b:
        grad_a, grad_b = _weight_gradients(problem, f, g, grad_value)
        if more_a is not None and more_b is not None:
            grad_a, grad_b = grad_a + more_a, grad_b + more_b
    return (
        grad_x,
        grad_y if problem.y is not None else None,
        grad_a if needs_a else None,
        grad_b if needs_b else None,
        *(None,) * 12,
    )


def _second_derivative_of_pairs() -> RuntimeError:
    return RuntimeError("sinkhorn_pairwise: expected first derivatives only, got a second derivative")


def _weight_gradients(problem: Problem, f: Tensor, g: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
    """Of a and b, differentiable in every argument, as second derivatives need it."""
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


@torch.library.custom_op(
    "ecgot::sinkhorn_pull",
    mutates_args=(),
    schema=f"({TENSOR_SCHEMA}, Tensor f, Tensor g, Tensor scale, Tensor? left, Tensor? right, "
    f"Tensor cost_cache, {VALUE_SCHEMA}) -> (Tensor, Tensor)",
)
def cost_vjp_op(*flat: Any) -> tuple[Tensor, Tensor]:
    """Gradients in x and y (empty with cost "given") of the costs weighted by :class:`PlanWeights`."""
    problem, (f, g, scale, left, right, cache), _ = _unpacked(flat, 6)
    given = PlanWeights(f, g, scale.to(problem.dtype), left, right)
    with torch.autocast(f.device.type, enabled=False):
        grad_x, grad_y = backends.cost_vjp(problem, given, cache)
    return grad_x, problem.x.new_empty(0) if grad_y is None else grad_y


@cost_vjp_op.register_fake
def _(*flat):  # type: ignore[no-untyped-def]
    x, y = flat[:2]
    return x.new_empty(x.shape), x.new_empty(0) if y is None else y.new_empty(y.shape)


def _setup_cost_vjp_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, (f, g, scale, left, _, _), ctx.values, _ = _split(inputs, 6)
    ctx.second = left is not None
    ctx.save_for_backward(*tensors, f, g, scale)
    ctx.set_materialize_grads(False)


def _cost_vjp_backward(ctx, grad_x, grad_y):  # type: ignore[no-untyped-def]
    if ctx.second or torch.is_grad_enabled():
        raise RuntimeError("sinkhorn: expected first or second derivatives, got a third derivative")
    *tensors, f, g, scale = ctx.saved_tensors
    problem = Problem.unflatten(tensors, ctx.values)
    if problem.pairs:
        raise _second_derivative_of_pairs()
    leaves: list[Any] = [
        None if t is None else t.detach().requires_grad_()
        for t in (problem.x, problem.y, problem.a, problem.b, f, g, scale)
    ]
    known = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad(), torch.autocast(f.device.type, enabled=False):
        x, y, a, b, f, g, scale = leaves
        problem = replace(problem, x=x, y=y, a=a, b=b)
        weights = PlanWeights(f, g, scale.to(problem.dtype)).weights(problem)
        if y is None:
            gradients, incoming = [weights], [grad_x]
        else:
            cost = problem.cost_matrix()
            gradients = list(torch.autograd.grad(cost, (x, y), weights, create_graph=True))
            incoming = [grad_x, grad_y]
        pairs_of = [(g, i.to(g.dtype)) for g, i in zip(gradients, incoming, strict=True) if i is not None]
        found = iter(
            torch.autograd.grad([g for g, _ in pairs_of], known, [i for _, i in pairs_of], allow_unused=True)
        )
    *of_problem, grad_f, grad_g, grad_scale = (None if leaf is None else next(found) for leaf in leaves)
    return *of_problem, None, None, None, grad_f, grad_g, grad_scale, *(None,) * 8


cost_vjp_op.register_autograd(_cost_vjp_backward, setup_context=_setup_cost_vjp_context)


# --- implicit gradient --------------------------------------------------------------------------------------


@torch.library.custom_op(
    "ecgot::sinkhorn_implicit",
    mutates_args=(),
    schema=f"({TENSOR_SCHEMA}, Tensor f, Tensor g, Tensor grad_f, Tensor grad_g, {VALUE_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def implicit_op(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the gradients of f and g add to :class:`PlanWeights` (left, right) and to those of a and b."""
    problem, potentials, _ = _unpacked(flat, 4)
    with torch.autocast(problem.x.device.type, enabled=False):
        return backends.implicit(problem, *potentials)


@implicit_op.register_fake
def _(*flat):  # type: ignore[no-untyped-def]
    _, (f, g, _, _), _ = _unpacked(flat, 4)
    return f.new_empty(f.shape), g.new_empty(g.shape), f.new_empty(f.shape), g.new_empty(g.shape)
