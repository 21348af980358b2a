"""What holds for every transport problem: properties over random problems, closed forms, invariances.

Run with TRITON_INTERPRET=1 (or on a GPU) it tests the Triton kernels, on fewer examples.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ecgot.kernels import dispatch, sinkhorn, sinkhorn_divergence, sinkhorn_from_cost, sinkhorn_pairwise
from ecgot.kernels.ot import reference
from tests.kernels.ot.problems import DEVICE

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
# The interpreter takes time for each problem and iteration, whatever their size: few of both, all sizes.
EXAMPLES = settings(
    max_examples=6 if dispatch.INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
clouds = st.integers(1, 3 if dispatch.INTERPRETED else 5)


@st.composite
def problems(draw):
    """Points of any scale, masks and weights on none, one or both sides, eps from 1 down to 1e-3."""
    batch = draw(st.integers(1, 2 if dispatch.INTERPRETED else 3))
    n, m = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    d = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))  # squared distances up to about 1e4
    tensors = {"x": scale * (rand(batch, n, d) - 0.5), "y": scale * (rand(batch, m, d) - 0.3)}
    for points, mask, weight, count in (("x", "x_mask", "a", n), ("y", "y_mask", "b", m)):
        keep = torch.ones(batch, count, dtype=torch.bool)
        if draw(st.booleans()):
            keep = rand(batch, count) < 0.7
            keep[:, count // 2] = True
            tensors[mask] = keep
            tensors[points] = tensors[points].masked_fill(~keep[..., None], math.nan)
        if draw(st.booleans()):
            w = (rand(batch, count) ** 2 + 1e-3) * keep
            tensors[weight] = (w / w.sum(1, keepdim=True)).double()
    tensors = {name: t.to(DEVICE) for name, t in tensors.items()}
    return tensors, draw(st.sampled_from(COSTS)), 10 ** draw(st.floats(-3, 0))


def weights(tensors, name: str, mask: str, count: int, batch: int) -> Tensor:
    keep = tensors.get(mask, torch.ones(batch, count, dtype=torch.bool, device=DEVICE)).double()
    return tensors.get(name, keep / keep.sum(1, keepdim=True)).double()


@EXAMPLES
@given(problems())
def test_the_plan_keeps_what_the_solver_promises(drawn):
    tensors, cost, eps = drawn
    batch, n, _ = tensors["x"].shape
    m = tensors["y"].shape[1]
    out = sinkhorn(**tensors, eps=eps, cost=cost, max_iter=40 if dispatch.INTERPRETED else 200, tol=1e-4)
    for tensor in (out.value, out.f, out.g, out.marginal_error):
        assert tensor.isfinite().all()
    exact = {k: t.double() if k in "xy" else t for k, t in tensors.items()}
    costs = torch.stack(
        [
            reference.cost_matrix(x.nan_to_num(0.5), y.nan_to_num(0.5), cost)
            for x, y in zip(exact["x"], exact["y"], strict=True)
        ]
    )
    a, b = weights(tensors, "a", "x_mask", n, batch), weights(tensors, "b", "y_mask", m, batch)
    # Potentials carry the rounding of the costs: exponents are good to 1e-6 of the largest cost / eps.
    rounding = 2e-6 * (1 + costs.abs().amax((1, 2)) / eps)
    plan = out.plan().double()
    assert ((plan.sum(1) - b).abs().sum(1) <= 3 * rounding + 1e-5).all()
    assert ((plan.sum(2) - a).abs().sum(1) <= out.marginal_error + 3 * rounding + 1e-5).all()
    if (rounding < 1e-3).all():  # weak duality, and no gap at convergence
        joint = a[:, :, None] * b[:, None, :]
        ratio = torch.where(plan > 0, plan / joint.clamp_min(1e-300), 1.0)
        primal = (plan * costs).sum((1, 2)) + eps * (torch.special.xlogy(plan, ratio) - plan + joint).sum(
            (1, 2)
        )
        slack = (rounding + out.marginal_error) * (eps + costs.abs().amax((1, 2)))
        assert ((primal - out.value.double()).abs() <= 4 * slack + 1e-6).all()


@EXAMPLES
@given(problems())
def test_order_and_sides_do_not_matter(drawn):
    tensors, cost, eps = drawn
    eps = max(eps, 0.05)
    # Sides must converge to agree; orders agree after any number of iterations, and the interpreter is slow.
    options = {"eps": eps, "cost": cost, "max_iter": 40 if dispatch.INTERPRETED else 3000, "tol": 1e-6}
    plain = sinkhorn(**tensors, **options)
    order = torch.randperm(tensors["x"].shape[1], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    moved = {k: t[:, order] if k in ("x", "a", "x_mask") else t for k, t in tensors.items()}
    names = {"x": "y", "y": "x", "a": "b", "b": "a", "x_mask": "y_mask", "y_mask": "x_mask"}
    swapped = {names[k]: t for k, t in tensors.items()}
    tolerance = 1e-4 * (1 + plain.value.abs().max().item())
    torch.testing.assert_close(sinkhorn(**moved, **options).value, plain.value, atol=tolerance, rtol=0)
    other = sinkhorn(**swapped, **options)
    both = plain.converged & other.converged  # the other side's marginals are exact while it runs
    torch.testing.assert_close(other.value[both], plain.value[both], atol=tolerance, rtol=0)


@EXAMPLES
@given(problems(), st.floats(-50, 50))
def test_a_shift_of_the_cost_shifts_the_value(drawn, shift):
    tensors, _, _ = drawn
    n, m = tensors["x"].shape[1], tensors["y"].shape[1]
    cost = torch.rand(2, n, m, device=DEVICE, dtype=torch.float64)
    rows, columns = torch.rand(2, n, 1, device=DEVICE).double(), torch.rand(2, 1, m, device=DEVICE).double()
    options = {"eps": 0.1, "tol": 1e-10, "max_iter": 5000}
    plain = sinkhorn_from_cost(cost, **options)
    moved = sinkhorn_from_cost(cost + shift + rows + columns, **options)
    expected = plain.value + shift + rows.mean((1, 2)) + columns.mean((1, 2))
    torch.testing.assert_close(moved.value, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(moved.plan(), plain.plan(), atol=1e-7, rtol=0)


@EXAMPLES
@given(problems(), st.sampled_from([math.nan, math.inf]))
def test_what_is_not_a_number_stays_in_its_problem(drawn, poison):
    tensors, cost, eps = drawn
    double = {k: torch.cat([t, t]) for k, t in tensors.items()}
    batch = len(tensors["x"])
    keep = double.get("x_mask", torch.ones(double["x"].shape[:2], dtype=torch.bool, device=DEVICE))
    first = int(keep[0].int().argmax())
    double["x"] = double["x"].clone()
    double["x"][0, first, 0] = poison
    x = double["x"].requires_grad_()
    out = sinkhorn(**double, eps=eps, cost=cost, max_iter=10)
    alone = sinkhorn(**tensors, eps=eps, cost=cost, max_iter=10)
    assert not out.converged[0]
    torch.testing.assert_close(out.value[batch:], alone.value, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert grad[batch:].isfinite().all()


@EXAMPLES
@given(problems())
def test_the_divergence_is_positive_and_zero_between_equals(drawn):
    tensors, cost, eps = drawn
    if cost in ("cosine", "dot"):  # no metric of negative type on these points
        cost = "sqeuclidean"
    eps = max(eps, 0.1)
    scale = max(1.0, tensors["x"].nan_to_num(0.0).abs().max().item() ** 2)
    options = {"eps": eps, "cost": cost, "max_iter": 30 if dispatch.INTERPRETED else 2000, "tol": 1e-5}
    value = sinkhorn_divergence(**tensors, **options).value
    assert (value > -2e-4 * scale).all()
    same = {"y": tensors["x"].clone()}
    same |= {k: tensors[j] for k, j in (("b", "a"), ("y_mask", "x_mask")) if j in tensors}
    same |= {k: t for k, t in tensors.items() if k in ("x", "a", "x_mask")}
    assert sinkhorn_divergence(**same, **options).value.abs().max() < 2e-4 * scale


@EXAMPLES
@given(clouds, clouds, st.integers(1, 12), st.integers(1, 12), st.sampled_from(COSTS))
def test_pairs_are_problems_of_their_own(count_x, count_y, n, m, cost):
    x, y = (torch.randn(count, size, 3, device=DEVICE) / 2 for count, size in ((count_x, n), (count_y, m)))
    options = {"eps": 0.5, "cost": cost, "tol": 1e-5, "max_iter": 2000}
    found = sinkhorn_pairwise(x, y, **options)
    each = sinkhorn(x.repeat_interleave(count_y, 0), y.repeat(count_x, 1, 1), **options).value
    torch.testing.assert_close(found, each.view(count_x, count_y), atol=2e-4, rtol=1e-4)


# --- edges --------------------------------------------------------------------------------------------------


@st.composite
def edges(draw):
    """Forbidden pairs, by infinity or by a mask, points without a partner, masses and rho of any size.

    Returns what ``sinkhorn_from_cost`` takes, in fp64.
    """
    batch, n, m = draw(st.integers(1, 2)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    cost, share = rand(batch, n, m), draw(st.sampled_from([0.0, 0.3, 0.7]))
    forbidden = rand(batch, n, m) < share
    cost = torch.where(forbidden, draw(st.sampled_from([math.inf, 1e4, 1e6, 1e30])), cost)
    if draw(st.booleans()):
        cost[0, 0] = math.inf
    eps, mass = draw(st.sampled_from([0.05, 0.3])), draw(st.sampled_from([1e-6, 1.0, 1e4]))
    given = {"cost": cost, "eps": eps, "a": mass * (rand(batch, n) + 0.1), "b": mass * (rand(batch, m) + 0.1)}
    given["b"][:, : m // 3] = 0
    given["rho"] = draw(st.sampled_from([1e-3, 1.0, 1e3])) * eps
    given["scaling"] = draw(st.sampled_from([None, 0.7]))
    return {k: t.to(DEVICE) if isinstance(t, Tensor) else t for k, t in given.items()}


def penalised(plan: Tensor, given) -> Tensor:
    """The primal objective [B] of any plan: no solver is asked."""
    kl = lambda p, q: torch.special.xlogy(p, p / q.clamp_min(1e-300)) - p + q  # noqa: E731
    a, b, cost = given["a"], given["b"], torch.where(plan > 0, given["cost"], 0.0)
    moved = (plan * cost + given["eps"] * kl(plan, a[:, :, None] * b[:, None, :])).sum((1, 2))
    return moved + given["rho"] * (kl(plan.sum(2), a).sum(1) + kl(plan.sum(1), b).sum(1))


@EXAMPLES
@given(edges(), st.sampled_from([torch.float32, torch.float64]))
def test_at_every_edge_the_primal_meets_the_dual(drawn, dtype):
    """Penalties make every problem feasible: it converges, and its plan is worth its value."""
    cast = {k: t.to(dtype) if isinstance(t, Tensor) else t for k, t in drawn.items()}
    leaves = [cast[name].requires_grad_() for name in ("cost", "a", "b")]
    out = sinkhorn_from_cost(**cast, max_iter=20 if dispatch.INTERPRETED else 5000, tol=1e-4)
    # A mask that a plan cannot avoid is a cost beyond the dtype's digits, and out says so.
    costs = torch.where(drawn["cost"] < math.inf, drawn["cost"], 0.0).amax()
    if not dispatch.INTERPRETED and costs <= (1e4 if dtype == torch.float64 else 1):
        assert out.converged.all()
    plan = out.plan().detach().double()
    assert (plan[drawn["cost"] == math.inf] == 0).all()
    primal, dual = penalised(plan, drawn), out.value.double()
    known = out.marginal_error.isfinite()
    assert known.all() or costs > 1e4
    kept = (out.marginal_error.double() + 1e-5) * 4
    scale = drawn["rho"] * (drawn["a"].sum(1) + drawn["b"].sum(1)) + plan.sum((1, 2)) + dual.abs()
    assert ((primal - dual).abs() <= kept * scale + 1e-9)[known].all()
    grads = torch.autograd.grad(out.value.sum(), leaves)
    # What a little weight would save where rho is tiny may overflow, as it should; NaN it may not be.
    assert not any(grad.isnan().any() for grad in grads)
    units = (
        sum(torch.where(t.abs() < math.inf, t, 0.0).abs().max().item() for t in (out.f, out.g)) / drawn["eps"]
    )
    rtol = 1e-5 + 4e-7 * units  # exponents are good to a few units in the last place of the potentials
    torch.testing.assert_close(grads[0].double(), plan, atol=1e-25, rtol=rtol)


@EXAMPLES
@given(edges(), st.sampled_from([torch.float32, torch.float64]))
def test_kept_marginals_are_right_or_not_called_converged(drawn, dtype):
    drawn = {k: t for k, t in drawn.items() if k != "rho"}
    for name in ("a", "b"):
        drawn[name] = drawn[name] / drawn[name].sum(1, keepdim=True)
    cast = {k: t.to(dtype) if isinstance(t, Tensor) else t for k, t in drawn.items()}
    out = sinkhorn_from_cost(**cast, max_iter=15 if dispatch.INTERPRETED else 2000, tol=1e-4)
    plan = out.plan().double()
    off = (plan.sum(2) - drawn["a"]).abs().sum(1) + (plan.sum(1) - drawn["b"]).abs().sum(1)
    assert (off[out.converged] <= 5e-4).all()
    assert (out.value[out.converged].abs() < math.inf).all()
    lonely = ((drawn["cost"] == math.inf) | (drawn["b"] == 0)[:, None, :]).all(2).any(1)
    assert not (out.converged & lonely).any()
    assert (out.value[lonely] == math.inf).all()


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_diracs_cost_their_cost(cost):
    x, y = torch.randn(5, 1, 4, device=DEVICE), torch.randn(5, 1, 4, device=DEVICE)
    exact = torch.stack(
        [reference.cost_matrix(p, q, cost)[0, 0] for p, q in zip(x.cpu(), y.cpu(), strict=True)]
    )
    out = sinkhorn(x, y, eps=0.01, cost=cost)
    torch.testing.assert_close(out.value.cpu(), exact, atol=1e-5, rtol=1e-5)
    assert (out.iterations == 1).all()


def test_a_dirac_spreads_over_everything():
    x, y = torch.randn(2, 1, 3, device=DEVICE), torch.randn(2, 20, 3, device=DEVICE)
    out = sinkhorn(x, y, eps=0.1)
    torch.testing.assert_close(out.value, (x - y).square().sum(2).mean(1), rtol=1e-5, atol=1e-5)


def test_gaussians_in_one_dimension_as_eps_goes_to_zero():
    """W2^2 of N(m1, s1^2) and N(m2, s2^2) is (m1 - m2)^2 + (s1 - s2)^2; quantiles stand for the measures."""
    from scipy.stats import norm

    count = 100
    quantiles = torch.tensor(norm.ppf((np.arange(count) + 0.5) / count), device=DEVICE)
    x, y = quantiles[None, :, None], (0.5 + 1.5 * quantiles)[None, :, None]
    exact = (0.5 * quantiles + 0.5).square().mean()  # of the quantiles themselves: monotone matching
    errors = []
    for eps in (0.3, 0.1, 0.03):
        out = sinkhorn(x, y, eps=eps, tol=1e-6, max_iter=20_000, scaling=0.8)
        assert out.converged.all()
        errors.append((out.transport_cost()[0] - exact).item())
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 0.02


def test_unbalanced_diracs_in_closed_form():
    """Of masses a and b at cost c: the plan is one number, found by setting the derivative to 0."""
    a, b, c, eps, rho = 1.7, 0.6, 0.8, 0.2, 0.5
    x, y = torch.zeros(1, 1, 1, device=DEVICE), torch.full((1, 1, 1), math.sqrt(c), device=DEVICE)
    masses = {"a": torch.tensor([[a]], device=DEVICE), "b": torch.tensor([[b]], device=DEVICE)}
    out = sinkhorn(x, y, eps=eps, rho=rho, **masses, tol=1e-7)
    # d/dp: c + eps log(p / ab) + rho log(p / a) + rho log(p / b) = 0.
    p = math.exp((eps * math.log(a * b) + rho * math.log(a * b) - c) / (eps + 2 * rho))
    assert out.plan().item() == pytest.approx(p, rel=1e-4)
    kl = lambda p, q: p * math.log(p / q) - p + q  # noqa: E731
    value = c * p + eps * kl(p, a * b) + rho * (kl(p, a) + kl(p, b))
    assert out.value.item() == pytest.approx(value, rel=1e-4)


def test_permuted_clouds_are_matched_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 30, 3, generator=generator).to(DEVICE)
    order = torch.randperm(30, generator=generator).to(DEVICE)
    out = sinkhorn(x, x[:, order], eps=2e-3, tol=1e-3, max_iter=20_000, scaling=0.8)
    assert (out.plan().argmax(1) == order).float().mean() > 0.95


# --- tests of POT and geomloss, re-expressed ----------------------------------------------------------------


@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-3])
def test_marginals_as_in_pot(eps):
    """POT's test_sinkhorn and test_sinkhorn_stabilization: a cloud against itself keeps its constraints."""
    x = torch.randn(1, 50, 2, generator=torch.Generator().manual_seed(0)).double().to(DEVICE)
    out = sinkhorn(x, x, eps=eps, tol=1e-8, max_iter=50_000, scaling=0.9)
    uniform = torch.full((1, 50), 1 / 50, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(out.plan().sum(1), uniform, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.plan().sum(2), uniform, atol=1e-5, rtol=0)


def test_single_points_and_batches_as_in_their_trackers():
    """Single points crash and ragged batches are asked for in both trackers."""
    x = torch.randn(3, 4, 2, device=DEVICE)
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool, device=DEVICE)
    out = sinkhorn(x, x[:, :1], eps=0.1, x_mask=mask)
    assert out.converged.all()
    inner = (x - x[:, :1]).square().sum(2)
    torch.testing.assert_close(out.value, (inner * mask).sum(1) / mask.sum(1), atol=1e-5, rtol=1e-5)


def test_gradient_flow_as_in_geomloss():
    """geomloss's examples descend the divergence: the mean of a moved cloud gets the whole shift, twice."""
    x = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shift = torch.tensor([2.0, -1.0], device=DEVICE)
    moved = (x + shift).requires_grad_()
    (grad,) = torch.autograd.grad(sinkhorn_divergence(moved, x, eps=0.05, tol=1e-6).value.sum(), moved)
    torch.testing.assert_close(grad.sum(1)[0], 2 * shift, atol=1e-3, rtol=0)
