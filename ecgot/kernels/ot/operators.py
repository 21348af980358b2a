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
from ecgot.kernels.ot.centring import (
    step_gradients,
    weight_terms,
    whole_potentials,
    without_zero_centres,
)
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import PlanWeights, Problem, Solution, SolverSettings, without_autocast
from ecgot.kernels.ot.torch_solver import eps_vjp
from ecgot.kernels.registration import LIBRARY, Caller, pulled_back, register

TENSORS, VALUES = 9, 3  # how many arguments a problem is
CENTRES = slice(4, 6)  # which of its tensors they are
TENSOR_SCHEMA = (
    "Tensor x, Tensor? y, Tensor a, Tensor b, Tensor? x_centre, Tensor? y_centre, Tensor eps, "
    "Tensor? rho_x, Tensor? rho_y"
)
VALUE_SCHEMA = "str cost, bool pairs, str precision"


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> tuple[Problem, Solution]:
    """The problem with its centres, and its solution, differentiable.

    Args:
        problem: without centres.
        init: a potential g [B, M] to start from; None for zeros.
    """
    (x, y, a, b, _, _, *scales), values = problem.flatten()
    stopping = (settings.max_iter, settings.tol, settings.scaling)
    # The size of what is kept depends on a bound, which an exported program with free sizes cannot have.
    keep_costs = not torch.compiler.is_exporting()
    outputs = _solve(x, y, a, b, *scales, init, *values, *stopping, keep_costs)
    value, f, g, whole_f, whole_g, error, iterations, converged, x_centre, y_centre, _ = outputs
    if x_centre.numel():
        problem = replace(problem, x_centre=x_centre, y_centre=y_centre)
    if problem.pairs:
        whole_f = whole_g = None
    return problem, Solution(f, g, error, iterations, value, whole_f, whole_g, converged)


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


@register(
    "sinkhorn",
    "(Tensor x, Tensor? y, Tensor a, Tensor b, Tensor eps, Tensor? rho_x, Tensor? rho_y, "
    f"Tensor? init, {VALUE_SCHEMA}, SymInt max_iter, float tol, float scaling, bool keep_costs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def sinkhorn_op(*flat: Any) -> tuple[Tensor, ...]:
    """Value, f, g, whole f and g, marginal error, iterations, whether it converged, and both centres.

    Last comes the cost cache that the gradient uses again. Whole potentials of pairs, and centres that there
    are not, are empty.
    """
    problem, init, (*settings, keep_costs) = _uncentred(flat)
    with without_autocast(problem.x.device):  # products stay in the solver's precision
        found, cache = backends.solve(problem, init, SolverSettings(*settings))
    cache = cache if keep_costs else cache.new_empty(0)
    centres = _centres_or_zeros(problem, found)
    whole = (_or_empty(problem, found.whole_f), _or_empty(problem, found.whole_g))
    assert found.value is not None
    assert found.converged is not None
    return (
        *(found.value, found.f, found.g, *whole),
        *(found.error, found.iterations, found.converged, *centres, cache),
    )


def _uncentred(flat: Sequence[Any]) -> tuple[Problem, Tensor | None, Sequence[Any]]:
    """The solver's arguments: the problem, where to start, and the settings."""
    x, y, a, b, eps, rho_x, rho_y, init, *rest = flat
    values, settings = rest[:VALUES], rest[VALUES:]
    return Problem.unflatten((x, y, a, b, None, None, eps, rho_x, rho_y), values), init, settings


def _or_empty(problem: Problem, tensor: Tensor | None) -> Tensor:
    return problem.eps.new_empty(0) if tensor is None else tensor


def _centres_or_zeros(problem: Problem, found: Solution) -> tuple[Tensor, Tensor]:
    """Both centres: an operator's results have shapes that do not depend on values."""
    shapes = _centre_shapes(problem)
    if found.x_centre is not None and found.y_centre is not None:
        return found.x_centre, found.y_centre
    return problem.eps.new_zeros(shapes[0]), problem.eps.new_zeros(shapes[1])


def _centre_shapes(problem: Problem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if problem.y is None or problem.cost not in CENTRED_COSTS:
        return (0,), (0,)
    d = problem.x.shape[2]
    return (problem.a.shape[0], d), (problem.b.shape[0], d)


@torch.library.register_fake("ecgot::sinkhorn", lib=LIBRARY)
def _(*flat):  # type: ignore[no-untyped-def]
    problem, _, (*_, keep_costs) = _uncentred(flat)
    shape, (n, m), empty = problem.shape, problem.size, problem.eps.new_empty
    cache = backends.cost_cache(problem, backends.backend(problem)) if keep_costs else empty(0)
    iterations, converged = empty(shape, dtype=torch.int32), empty(shape, dtype=torch.bool)
    whole = (empty(0), empty(0)) if problem.pairs else (empty(*shape, n), empty(*shape, m))
    x_centre, y_centre = (empty(size) for size in _centre_shapes(problem))
    return (
        *(empty(shape), empty(*shape, n), empty(*shape, m), *whole),
        *(empty(shape), iterations, converged, x_centre, y_centre, cache),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, y, a, b, *scales = inputs[:7]
    ctx.values = inputs[8 : 8 + VALUES]
    _, f, g, _, _, *others = output
    x_centre, y_centre, cache = others[-3:]
    ctx.save_for_backward(x, y, a, b, x_centre, y_centre, *scales, f, g, cache)
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_value, grad_f, grad_g, grad_whole_f, grad_whole_g, *_):  # type: ignore[no-untyped-def]
    *tensors, f, g, cache = ctx.saved_tensors
    if not any(each.numel() for each in tensors[CENTRES]):
        tensors[CENTRES] = None, None
    problem = Problem.unflatten(tensors, ctx.values)
    grads: list[Any] = [None] * 4
    if grad_whole_f is not None or grad_whole_g is not None:
        grad_f, grad_g, *grads = _whole_gradients(
            problem, (f, g), (grad_whole_f, grad_whole_g), (grad_f, grad_g)
        )
    left = right = more_a = more_b = None
    if grad_f is not None or grad_g is not None:
        if problem.pairs:
            raise _second_derivative_of_pairs()
        grad_f = torch.zeros_like(f) if grad_f is None else grad_f
        grad_g = torch.zeros_like(g) if grad_g is None else grad_g
        left, right, more_a, more_b = _implicit(*tensors, f, g, grad_f, grad_g, *ctx.values)
    if grad_value is None:
        grad_value = problem.eps.new_zeros(f.shape[:-1])
    needs_x, needs_y, needs_a, needs_b, needs_eps = ctx.needs_input_grad[:5]
    found: list[Any] = [None] * 4
    if needs_x or needs_y:
        found[:2] = _cost_vjp(*tensors, f, g, grad_value, left, right, cache.detach(), *ctx.values)
    if needs_a or needs_b:
        found[2:] = _weight_gradients(problem, f, g, grad_value)
        if more_a is not None and more_b is not None:
            found[2:] = found[2] + more_a, found[3] + more_b
    if problem.y is None:
        found[1] = None
    total = [
        _sum(*both) if need else None for *both, need in zip(found, grads, ctx.needs_input_grad, strict=False)
    ]
    grad_eps = None
    if needs_eps:
        if torch.is_grad_enabled():
            raise RuntimeError("sinkhorn: expected first derivatives in eps, got a second derivative")
        with without_autocast(f.device):
            grad_eps = eps_vjp(problem, PlanWeights(f, g, grad_value, left, right))
    return *total, grad_eps, *(None,) * 10


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right.to(left.dtype)


def _whole_gradients(problem, potentials, incoming, raw_incoming):  # type: ignore[no-untyped-def]
    """Gradients through the whole potentials: in f and g, with those that came for them, x, y, a and b."""
    given = (problem.x, problem.y, problem.a, problem.b, *potentials)
    wanted = [grad is not None for grad in incoming]

    def whole(*known: Tensor) -> tuple[Tensor, ...]:
        rest = iter(known)
        x, y, a, b, f, g = (None if each is None else next(rest) for each in given)
        assert f is not None
        assert g is not None
        moved = whole_potentials(replace(problem, x=x, y=y, a=a, b=b), f, g)
        return tuple(each for each, is_wanted in zip(moved, wanted, strict=True) if is_wanted)

    known = [each for each in given if each is not None]
    with without_autocast(potentials[0].device):
        found = iter(pulled_back(whole, known, [grad for grad in incoming if grad is not None]))
    grads = [None if each is None else next(found) for each in given]
    grad_f, grad_g = (_sum(*both) for both in zip(grads[4:], raw_incoming, strict=True))
    return grad_f, grad_g, *grads[:4]


def _second_derivative_of_pairs() -> RuntimeError:
    return RuntimeError("sinkhorn_pairwise: expected first derivatives only, got a second derivative")


def _weight_gradients(problem: Problem, f: Tensor, g: Tensor, grad_value: Tensor) -> list[Tensor]:
    """Of a and b, differentiable in every argument, as second derivatives need it."""
    slopes = problem.weight_gradients(f, g)
    scale = torch.where(problem.solvable(), grad_value, 0.0)[..., None]
    if problem.pairs:  # batched products: no copy of a pair's potentials
        found = [torch.einsum("bkn,bk->bn", slopes[0], scale[..., 0])]
        found.append(torch.einsum("bkm,bk->km", slopes[1], scale[..., 0]))
    else:
        found = [slope * scale for slope in slopes]
    terms = weight_terms(problem, grad_value)
    return found if terms is None else [grad + term for grad, term in zip(found, terms, strict=True)]


torch.library.register_autograd("ecgot::sinkhorn", _backward, setup_context=_setup_context, lib=LIBRARY)


# --- envelope gradient --------------------------------------------------------------------------------------


@register(
    "sinkhorn_pull",
    f"({TENSOR_SCHEMA}, Tensor f, Tensor g, Tensor scale, Tensor? left, Tensor? right, "
    f"Tensor cost_cache, {VALUE_SCHEMA}) -> (Tensor, Tensor)",
)
def cost_vjp_op(*flat: Any) -> tuple[Tensor, Tensor]:
    """Gradients in x and y (empty with cost "given"), see :func:`ecgot.kernels.ot.backends.cost_vjp`."""
    problem, (f, g, scale, left, right, cache), _ = _unpacked(flat, 6)
    given = PlanWeights(f, g, scale.to(problem.dtype), left, right)
    with without_autocast(f.device):
        grad_x, grad_y = backends.cost_vjp(problem, given, cache)
    return grad_x, problem.x.new_empty(0) if grad_y is None else grad_y


@torch.library.register_fake("ecgot::sinkhorn_pull", lib=LIBRARY)
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
    with torch.enable_grad(), without_autocast(f.device):
        x, y, a, b, f, g, scale = leaves
        problem = replace(problem, x=x, y=y, a=a, b=b)
        weights = PlanWeights(f, g, scale.to(problem.dtype)).weights(problem)
        if y is None:
            gradients, incoming = [weights], [grad_x]
        else:
            cost = problem.cost_matrix()
            gradients = list(torch.autograd.grad(cost, (x, y), weights, create_graph=True))
            steps = step_gradients(problem, scale)
            if steps is not None:
                gradients = [grad + step.to(grad.dtype) for grad, step in zip(gradients, steps, strict=True)]
            incoming = [grad_x, grad_y]
        pairs_of = [(g, i.to(g.dtype)) for g, i in zip(gradients, incoming, strict=True) if i is not None]
        found = iter(
            torch.autograd.grad([g for g, _ in pairs_of], known, [i for _, i in pairs_of], allow_unused=True)
        )
    *of_problem, grad_f, grad_g, grad_scale = (None if leaf is None else next(found) for leaf in leaves)
    return *of_problem, *(None,) * 5, grad_f, grad_g, grad_scale, *(None,) * 6


torch.library.register_autograd(
    "ecgot::sinkhorn_pull", _cost_vjp_backward, setup_context=_setup_cost_vjp_context, lib=LIBRARY
)


# --- implicit gradient --------------------------------------------------------------------------------------


@register(
    "sinkhorn_implicit",
    f"({TENSOR_SCHEMA}, Tensor f, Tensor g, Tensor grad_f, Tensor grad_g, {VALUE_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def implicit_op(*flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the gradients of f and g add to :class:`PlanWeights` (left, right) and to those of a and b."""
    problem, potentials, _ = _unpacked(flat, 4)
    problem = without_zero_centres(problem)
    with without_autocast(problem.x.device):
        return backends.implicit(problem, *potentials)


@torch.library.register_fake("ecgot::sinkhorn_implicit", lib=LIBRARY)
def _(*flat):  # type: ignore[no-untyped-def]
    _, (f, g, _, _), _ = _unpacked(flat, 4)
    return f.new_empty(f.shape), g.new_empty(g.shape), f.new_empty(f.shape), g.new_empty(g.shape)


def _implicit_backward(ctx, *_):  # type: ignore[no-untyped-def]
    raise RuntimeError(
        "sinkhorn: expected first derivatives of potentials and plans, got a second derivative"
    )


torch.library.register_autograd("ecgot::sinkhorn_implicit", _implicit_backward, lib=LIBRARY)


# --- how they are called ------------------------------------------------------------------------------------


def _is_folded(flat: Sequence[Any]) -> bool:
    return not next(each for each in flat if isinstance(each, bool))  # the first is ``pairs``


_solve = Caller(sinkhorn_op, _setup_context, _backward, is_folded=_is_folded)
_cost_vjp = Caller(cost_vjp_op, is_folded=_is_folded)
_implicit = Caller(implicit_op, is_folded=_is_folded)
