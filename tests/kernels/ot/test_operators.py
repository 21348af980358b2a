"""First, implicit and second derivatives of the OT solver by finite differences in fp64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ecgot.kernels import dispatch, sinkhorn, sinkhorn_divergence, sinkhorn_from_cost, sinkhorn_pairwise
from ecgot.kernels.ot import operators, torch_solver
from ecgot.kernels.ot.checks import check_rho
from ecgot.kernels.ot.problem import Problem, SolverSettings
from tests.kernels.ot.problems import BACKEND, DEVICE, problem

# fp64 takes other paths than Triton's, which are tested without the interpreter.
fp64 = pytest.mark.skipif(dispatch.INTERPRETED, reason="fp64 does not run in Triton")
EXACT = {"tol": 1e-13, "max_iter": 50_000}
COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
MARGINALS = ({}, {"rho": 0.5}, {"rho_x": 0.4}, {"rho_y": 0.4})


def points(*, masked: bool, shape=(2, 5, 4, 3)) -> dict[str, Tensor]:
    tensors = problem(shape, masked=masked, dtype=torch.float64)
    return {k: t.nan_to_num(0.3) if k in "xy" else t for k, t in tensors.items()}


def weights(logits: Tensor, mask: Tensor | None, rho: dict[str, float]) -> Tensor:
    """Where marginals are kept only changes that keep the mass matter; softmax makes no others."""
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.exp() * 0.3 if rho else logits.softmax(1)


def arguments(masked: bool, rho: dict[str, float]):
    """Leaves x, y, logits of a, logits of b; and how to make the solver's arguments of them."""
    tensors = points(masked=masked)
    masks = {k: t for k, t in tensors.items() if "mask" in k}
    generator = torch.Generator().manual_seed(1)
    logits = [torch.randn(2, n, generator=generator, dtype=torch.float64).to(DEVICE) for n in (5, 4)]
    leaves = [t.requires_grad_() for t in (tensors["x"], tensors["y"], *logits)]

    def given(x, y, la, lb):
        a, b = weights(la, masks.get("x_mask"), rho), weights(lb, masks.get("y_mask"), rho)
        return {"x": x, "y": y, "a": a, "b": b} | masks | rho | EXACT

    return leaves, given


@fp64
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize(("masked", "rho"), list(itertools.product((False, True), MARGINALS)), ids=str)
def test_value_once_and_twice(cost, masked, rho):
    leaves, given = arguments(masked, rho)
    value = lambda *leaves: sinkhorn(**given(*leaves), eps=0.3, cost=cost).value  # noqa: E731
    assert torch.autograd.gradcheck(value, leaves, eps=1e-5, atol=1e-6)
    # Random directions in place of every entry: a whole second Jacobian takes ten times as long.
    assert torch.autograd.gradgradcheck(value, leaves, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


@fp64
@pytest.mark.parametrize(("masked", "rho"), list(itertools.product((False, True), MARGINALS)), ids=str)
@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_plan_potentials_and_transport_cost(masked, rho, shift):
    leaves, given = arguments(masked, rho)

    def outputs(x, y, la, lb):
        out = sinkhorn(**given(x, y + shift, la, lb), eps=0.3 + shift)
        return out.plan(), out.f, out.g, out.transport_cost()

    assert torch.autograd.gradcheck(outputs, leaves, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=shift > 0)


@fp64
@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_given_cost(rho):
    cost = torch.rand(2, 5, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    value = lambda c: sinkhorn_from_cost(c, eps=0.3, **rho, **EXACT).value  # noqa: E731
    assert torch.autograd.gradcheck(value, cost, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(value, cost, eps=1e-5, atol=1e-5, rtol=1e-4)
    plan = lambda c: sinkhorn_from_cost(c, eps=0.3, **rho, **EXACT).plan()  # noqa: E731
    assert torch.autograd.gradcheck(plan, cost, eps=1e-5, atol=1e-5)


@fp64
@pytest.mark.parametrize(
    ("masked", "rho"), list(itertools.product((False, True), ({}, {"rho": 0.5}))), ids=str
)
def test_divergence_once_and_twice(masked, rho):
    tensors = points(masked=masked)
    rest = {k: t for k, t in tensors.items() if "mask" in k} | rho | EXACT
    value = lambda x, y: sinkhorn_divergence(x, y, eps=0.3, **rest).value  # noqa: E731
    leaves = (tensors["x"].requires_grad_(), tensors["y"].requires_grad_())
    assert torch.autograd.gradcheck(value, leaves, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(value, leaves, eps=1e-5, atol=1e-5, rtol=1e-4, fast_mode=True)


@fp64
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_pairs(cost, rho):
    x, y = points(masked=True, shape=(3, 4, 2, 3)), points(masked=True, shape=(2, 2, 5, 3))
    masks = {"x_mask": x["x_mask"], "y_mask": y["y_mask"]}
    value = lambda x, y: sinkhorn_pairwise(x, y, eps=0.3, cost=cost, **masks, **rho, **EXACT)  # noqa: E731
    leaves = (x["x"].requires_grad_(), y["y"].requires_grad_())
    assert torch.autograd.gradcheck(value, leaves, eps=1e-5, atol=1e-6)


@fp64
def test_a_hessian_vector_product():
    tensors = points(masked=False)
    x, y = tensors["x"].requires_grad_(), tensors["y"]
    value = lambda x: sinkhorn(x, y, eps=0.3, **EXACT).value.sum()  # noqa: E731
    v = torch.randn_like(x)
    (grad,) = torch.autograd.grad(value(x), x, create_graph=True)
    (product,) = torch.autograd.grad(grad, x, v)
    step = 1e-5
    up, down = ((torch.autograd.grad(value(z), z)[0]) for z in ((x + step * v), (x - step * v)))
    torch.testing.assert_close(product, (up - down) / (2 * step), atol=1e-6, rtol=1e-5)


@fp64
def test_third_derivatives_are_refused_not_wrong():
    x = points(masked=False)["x"].requires_grad_()
    y = points(masked=False)["y"]
    (grad,) = torch.autograd.grad(sinkhorn(x, y, eps=0.3).value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first or second derivatives, got a third"):
        torch.autograd.grad(grad.sum(), x, create_graph=True)


@fp64
def test_potentials_at_points_without_weight_have_gradients():
    tensors = points(masked=False)
    x = tensors["x"].requires_grad_()
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 2, dtype=torch.float64, device=DEVICE)
    b = torch.tensor([[0.5, 0.0, 0.0, 0.5]] * 2, dtype=torch.float64, device=DEVICE)

    def outputs(x, y):
        out = sinkhorn(x, y, a=a, b=b, eps=0.3, **EXACT)
        return out.f, out.g

    assert torch.autograd.gradcheck(outputs, (x, tensors["y"].requires_grad_()), eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("rho", [math.inf, 0.5])
@pytest.mark.parametrize("cost", COSTS)
def test_the_implicit_kernel_solves_the_same_system(rho, cost):
    if BACKEND != "triton":
        pytest.skip("of the Triton kernels: set TRITON_INTERPRET=1 or use a GPU")
    from ecgot.kernels.ot import triton_implicit, triton_onchip

    tensors = {
        k: t.nan_to_num(0.0) if k in "xy" else t for k, t in problem((2, 7, 5, 4), weighted=True).items()
    }
    a, b = tensors["a"].float(), tensors["b"].float()
    eps = torch.tensor([0.3, 0.5], device=DEVICE)
    given = Problem(tensors["x"], tensors["y"], a, b, None, None, eps, cost, *check_rho(rho, None, None, eps))
    found = triton_onchip.solve(given, None, SolverSettings(5000, 1e-6))
    given = replace(given, x_centre=found.x_centre, y_centre=found.y_centre)
    f, g = found.f, found.g
    grad_f, grad_g = torch.randn_like(f), torch.randn_like(g)
    grad_g += ((grad_f.sum(1) - grad_g.sum(1)) / g.shape[1])[:, None]  # the gauge
    found = triton_implicit.implicit(given, f, g, grad_f, grad_g, 1000, 1e-6)
    as_double = [t.double() if isinstance(t, Tensor) else t for t in (tensors["x"], tensors["y"], a, b, eps)]
    centres = [None if centre is None else centre.double() for centre in (given.x_centre, given.y_centre)]
    exact = Problem(*as_double[:4], *centres, as_double[4], cost, *check_rho(rho, None, None, as_double[4]))
    wanted = torch_solver.implicit(
        exact, f.double(), g.double(), grad_f.double(), grad_g.double(), 1000, 1e-12
    )
    # Where balanced, left and right are determined up to k a and -k b, which cancel in what they are for.
    pairs = lambda left, right: left[:, :, None] * b[:, None, :] + a[:, :, None] * right[:, None, :]  # noqa: E731
    torch.testing.assert_close(pairs(*found[:2]).double(), pairs(*wanted[:2]).double(), atol=2e-3, rtol=2e-3)
    for actual, expected in zip(found[2:], wanted[2:], strict=True):
        shift = (actual.double() - expected)[:, -1:] if math.isinf(rho) else 0
        torch.testing.assert_close(actual.double() - shift, expected, atol=2e-3, rtol=2e-3)


def test_implicit_gradients_in_fp32_are_those_of_fp64():
    tensors = problem((2, 9, 7, 4), masked=True, weighted=True)
    x = tensors["x"].requires_grad_()
    weight = torch.randn(2, 9, 7, device=DEVICE)

    def gradient(dtype, tol):
        cast = {k: t.to(dtype) if k in "xyab" else t for k, t in tensors.items()}
        plan = sinkhorn(**cast, eps=0.3, tol=tol, max_iter=10_000).plan()
        return torch.autograd.grad((plan * weight).sum(), x)[0]

    torch.testing.assert_close(
        gradient(torch.float32, 1e-6), gradient(torch.float64, 1e-12), atol=2e-4, rtol=1e-3
    )


def test_gradients_of_a_forward_pass_under_autocast():
    tensors = problem((2, 5, 4, 3))
    x = tensors["x"].requires_grad_()
    (expected,) = torch.autograd.grad(sinkhorn(**tensors, eps=0.2).value.sum(), x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = sinkhorn(**tensors, eps=0.2).value.sum()
    (grad,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(grad, expected)


# --- eps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "given"])
@pytest.mark.parametrize("rhos", [(None, None), (0.5, 0.8), (None, 0.7)], ids=str)
@pytest.mark.parametrize("cells", [2**24, 6])
def test_the_gradient_in_eps(cost, rhos, cells, monkeypatch):
    """Of the value, KL(P | a b); and of the potentials and the plan, by implicit differentiation."""
    monkeypatch.setattr(torch_solver, "MAX_CELLS", cells)
    tensors = problem((2, 5, 4, 3), weighted=True, dtype=torch.float64)
    x, y, a, b = tensors["x"], tensors["y"] + 1, tensors["a"].double(), tensors["b"].double()
    if cost == "given":
        x, y = (x[:, :, None] - y[:, None]).square().sum(3), None
        x[0, 1] = math.inf if rhos[0] else 1.0
    each = [None if rho is None else torch.full_like(x[:, 0, 0], rho) for rho in rhos]

    def outputs(eps):
        given = Problem(x, y, a, b, None, None, eps, cost, *each)
        solved, found = operators.solve(given, None, SolverSettings(10_000, 1e-13))
        finite = [torch.where(t.abs() < math.inf, t, 0.0) for t in (found.whole_f, found.whole_g)]
        return found.value, solved.plan(found.f, found.g), *finite

    eps = torch.tensor([0.2, 0.5], dtype=torch.float64, device=DEVICE, requires_grad=True)
    value, plan, *_ = outputs(eps)
    (grad,) = torch.autograd.grad(value.sum(), eps)
    joint, plan = a[:, :, None] * b[:, None, :], plan.detach()
    divergence = torch.special.xlogy(plan, torch.where(plan > 0, plan / joint, 1.0)) - plan + joint
    torch.testing.assert_close(grad, divergence.sum((1, 2)), atol=1e-9, rtol=1e-9)
    assert torch.autograd.gradcheck(outputs, (eps,), eps=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="expected first derivatives in eps"):
        torch.autograd.grad(outputs(eps)[0].sum(), eps, create_graph=True)


def test_the_gradient_in_eps_of_pairs():
    x, y = torch.rand(2, 5, 3, device=DEVICE).double(), torch.rand(3, 4, 3, device=DEVICE).double()
    a, b = torch.full_like(x[:, :, 0], 1 / 5), torch.full_like(y[:, :, 0], 1 / 4)

    def value(eps):
        given = Problem(x, y, a, b, None, None, eps.expand(6), "sqeuclidean", pairs=True)
        return operators.solve(given, None, SolverSettings(10_000, 1e-13))[1].value

    eps = torch.tensor(0.3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(value, (eps,), eps=1e-5, atol=1e-6)
