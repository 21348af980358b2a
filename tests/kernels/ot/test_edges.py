"""Forbidden pairs, points without a partner, masses and penalties of any size, and costs beyond the dtype.

Each against an oracle in NumPy that shares nothing with the solvers: Newton's method on the dual objective.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ecgot.kernels import dispatch, sinkhorn, sinkhorn_from_cost, sinkhorn_pairwise
from ecgot.kernels.ot import backends
from ecgot.kernels.ot.divergence import solve_symmetric
from tests.kernels.ot.problems import BACKEND, DEVICE, FP64, problem

# Solvers that this process can run, on given costs and on points.
ON_COSTS = [BACKEND] + ["torch"] * (BACKEND == "numba")
ON_POINTS = [*ON_COSTS, "triton-streaming" if BACKEND == "triton" else "torch-streaming"]
# Triton's interpreter takes its time, and fp64 is not Triton's.
SLOW = dispatch.INTERPRETED
DTYPES = (torch.float32,) if SLOW else (torch.float32, torch.float64)
MASKS = (math.inf, 1e6) if SLOW else (math.inf, 1e3, 1e6, 1e9, 1e30)


@pytest.fixture
def path(request, monkeypatch):
    """Has the named solver serve what it can: fp64 is not Triton's."""
    choose = backends.backend

    def chosen(problem):
        name = choose(problem)
        if "triton" in request.param and problem.dtype == torch.float64:
            return name
        return name if problem.empty else request.param

    monkeypatch.setattr(backends, "backend", chosen)
    return request.param


on_costs = pytest.mark.parametrize("path", ON_COSTS, indirect=True)
on_points = pytest.mark.parametrize("path", ON_POINTS, indirect=True)


# --- oracle -------------------------------------------------------------------------------------------------


def exact(cost, a, b, eps, rho_x=math.inf, rho_y=math.inf) -> tuple[float, np.ndarray]:
    """Value and plan [n, m] by Newton's method on the dual, from a textbook annealing."""
    cost, a, b = (np.asarray(t, dtype=np.float64) for t in (cost, a, b))
    rows = (a > 0) & np.isfinite(cost[:, b > 0]).any(1)
    columns = (b > 0) & np.isfinite(cost[rows]).any(0)
    lost = (rho_x * a[~rows & (a > 0)].sum() if (a[~rows] > 0).any() else 0.0) + (
        rho_y * b[~columns & (b > 0)].sum() if (b[~columns] > 0).any() else 0.0
    )
    c, p, q = cost[rows][:, columns], a[rows], b[columns]
    f, g = np.zeros(len(p)), np.zeros(len(q))
    with np.errstate(over="ignore", divide="ignore"):
        for heat in np.geomspace(max(eps, np.where(np.isfinite(c), c, 0.0).max()), eps, 300):
            f = _softmin(c.T, g, q, heat) / (1 + heat / rho_x)
            g = _softmin(c, f, p, heat) / (1 + heat / rho_y)
        f, g = _newton(c, p, q, eps, (rho_x, rho_y), f, g)
    whole = np.zeros(cost.shape)
    whole[np.ix_(rows, columns)] = plan = _plan(c, p, q, eps, f, g)
    joint = np.outer(p, q)
    used = plan > 0
    value = (plan[used] * c[used]).sum() + eps * (_kl(plan, joint) + a.sum() * b.sum() - joint.sum())
    for rho, marginal, weight in ((rho_x, plan.sum(1), p), (rho_y, plan.sum(0), q)):
        value += rho * _kl(marginal, weight) if math.isfinite(rho) else 0.0
    return value + lost, whole


def _softmin(cost, potential, weight, eps):
    exponent = (potential[:, None] - cost) / eps + np.log(weight)[:, None]
    top = exponent.max(0)
    return -eps * (top + np.log(np.exp(exponent - top).sum(0)))


def _plan(cost, a, b, eps, f, g):
    return np.outer(a, b) * np.exp((f[:, None] + g[None, :] - cost) / eps)


def _kl(p, q):
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0) / q), 0.0).sum() - p.sum() + q.sum()


def _dual(cost, a, b, eps, rhos, f, g):
    side = lambda w, u, r: (w * u).sum() if math.isinf(r) else -r * (w * np.expm1(-u / r)).sum()  # noqa: E731
    return side(a, f, rhos[0]) + side(b, g, rhos[1]) - eps * _plan(cost, a, b, eps, f, g).sum()


def _newton(cost, a, b, eps, rhos, f, g):
    n = len(a)
    for _ in range(200):
        plan = _plan(cost, a, b, eps, f, g)
        targets = [w * np.exp(-u / r) for w, u, r in ((a, f, rhos[0]), (b, g, rhos[1]))]
        slope = np.concatenate([targets[0] - plan.sum(1), targets[1] - plan.sum(0)])
        if np.abs(slope).sum() < 1e-14 * plan.sum():
            break
        curvature = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]]) / eps
        curvature += np.diag(np.concatenate([targets[0] / rhos[0], targets[1] / rhos[1]]))
        step = np.linalg.lstsq(curvature, slope, rcond=1e-15)[0]
        rate, now = 1.0, _dual(cost, a, b, eps, rhos, f, g)
        while rate > 1e-8:
            trial = f + rate * step[:n], g + rate * step[n:]
            if _dual(cost, a, b, eps, rhos, *trial) >= now - 1e-15 * abs(now):
                break
            rate /= 2
        f, g = trial
    return f, g


def uniform(*shape: int) -> np.ndarray:
    return np.full(shape, 1 / shape[-1])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def marginals_are_what_it_says(out, a, b, tolerance=2e-4) -> None:
    """Of problems whose marginals are kept: what converged has the right sums, within what was claimed."""
    plan = out.plan().double().cpu()
    claimed = out.marginal_error.double().cpu()
    assert ((plan.sum(2) - torch.as_tensor(a)).abs().sum(1) <= claimed + tolerance).all()
    assert ((plan.sum(1) - torch.as_tensor(b)).abs().sum(1) <= tolerance).all()


# --- forbidden pairs under annealing ------------------------------------------------------------------------


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_windowed_alignment(path, mask, dtype):
    i, j = torch.arange(30.0)[:, None], torch.arange(40.0)[None]
    allowed = (i * 40 / 30 - j).abs() <= 6
    cost = torch.rand(30, 40, generator=torch.Generator().manual_seed(0)).double()
    eps = 0.3 if SLOW else 0.05
    value, _ = exact(torch.where(allowed, cost, math.inf), uniform(30), uniform(40), eps)
    if not SLOW:
        assert value == pytest.approx(0.27861, abs=1e-5)
    given = torch.where(allowed, cost, mask)[None].to(DEVICE, dtype)
    out = sinkhorn_from_cost(given, eps=eps, scaling=0.8)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, abs=1e-6)
    marginals_are_what_it_says(out, uniform(1, 30), uniform(1, 40))


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_a_causal_mask_admits_the_identity_alone(path, mask, dtype):
    """Sinkhorn comes near it like 1 / iterations: tol is out of reach, and the solution has to say so."""
    allowed = torch.ones(8, 8, dtype=torch.bool).tril()
    cost = torch.where(allowed, 0.0, torch.full((8, 8), mask, dtype=torch.float64))[None]
    out = sinkhorn_from_cost(cost.to(DEVICE, dtype), eps=0.1, scaling=0.8, max_iter=60 if SLOW else 300)
    assert out.value.item() == pytest.approx(0.1 * math.log(8), abs=1e-2 if SLOW else 3e-3)
    assert (out.converged == (out.marginal_error <= 1e-4)).all()
    marginals_are_what_it_says(out, uniform(1, 8), uniform(1, 8))


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_way_between_far_clusters_is_no_mask(path, dtype):
    """A tenth has to go there: annealing from the costs within the clusters would take forever."""
    near = torch.zeros(12, 12, dtype=torch.bool)
    near[:6, :6] = near[6:, 6:] = True
    cost = torch.where(near, rand(12, 12), 3e3 + rand(12, 12, seed=1))
    a, b = np.repeat([0.6, 0.4], 6) / 6, np.repeat([0.5, 0.5], 6) / 6
    value, _ = exact(cost, a, b, 1.0)
    weights = {name: torch.tensor(w)[None].to(DEVICE, dtype) for name, w in (("a", a), ("b", b))}
    out = sinkhorn_from_cost(cost[None].to(DEVICE, dtype), eps=1.0, scaling=0.95, max_iter=300, **weights)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, rel=1e-6)


@on_costs
def test_masks_of_one_problem_do_not_change_another(path):
    cost = rand(3, 8, 9).to(DEVICE, torch.float32)
    masked = cost.clone()
    masked[1, :, :4] += 1e6 * (rand(8, 4) < 0.5).to(DEVICE)
    options = {"eps": 0.05, "scaling": 0.7}
    both = [sinkhorn_from_cost(c, **options).value for c in (cost, masked)]
    assert (both[0] == both[1]).tolist() == [True, False, True]


# --- points that may match nothing --------------------------------------------------------------------------

LONELY = [[0.0, 1.0], [math.inf, math.inf]]


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_a_point_without_partner_pays_its_penalty(path, dtype, turned, scaling):
    cost = torch.tensor([LONELY], dtype=dtype, device=DEVICE)
    value, plan = exact(LONELY, uniform(2), uniform(2), 0.01, 1.0, 1.0)
    assert value == pytest.approx(0.83615, abs=1e-5)
    out = sinkhorn_from_cost(cost.mT if turned else cost, eps=0.01, rho=1.0, scaling=scaling, tol=1e-5)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, abs=2e-6)
    found = out.plan()[0].cpu().double()
    torch.testing.assert_close(found.mT if turned else found, torch.tensor(plan), atol=2e-5, rtol=0)
    assert out.transport_cost().isfinite().all()
    again = sinkhorn_from_cost(cost.mT if turned else cost, eps=0.01, rho=1.0, tol=1e-5, init=out.g)
    torch.testing.assert_close(again.value, out.value, atol=1e-6, rtol=0)


@on_costs
@pytest.mark.parametrize("rhos", [{"rho": 0.7}, {"rho_x": 0.7}, {"rho": 30.0}, {"rho": 0.02}], ids=str)
def test_gradients_beside_points_without_partner(path, rhos):
    """Against differences of the oracle, in each finite cost and each weight."""
    cost, a, b = rand(5, 6), 0.5 + rand(5, seed=1), 0.5 + rand(6, seed=2)
    cost[1] = math.inf
    if "rho" in rhos:
        cost[:, 4] = math.inf
    rho_x, rho_y = (rhos.get(name, rhos.get("rho", math.inf)) for name in ("rho_x", "rho_y"))
    if math.isinf(rho_y):
        a = a / a.sum() * b.sum()
    leaves = [t[None].to(DEVICE).requires_grad_() for t in (cost, a, b)]
    out = sinkhorn_from_cost(leaves[0], a=leaves[1], b=leaves[2], eps=0.1, tol=1e-12, max_iter=5000, **rhos)
    assert out.converged.all()
    value = lambda *given: exact(*given, 0.1, rho_x, rho_y)[0]  # noqa: E731
    assert out.value.item() == pytest.approx(value(cost, a, b), rel=1e-9)
    grads = torch.autograd.grad(out.value.sum(), leaves, create_graph=True)
    for which, (leaf, grad) in enumerate(zip((cost, a, b), grads, strict=True)):
        for index in leaf.isfinite().nonzero().tolist()[::3] + [[1]] * (leaf is a):
            moved = [[t.clone() for t in (cost, a, b)] for _ in range(2)]
            for sign, tensors in zip((1, -1), moved, strict=True):
                tensors[which][tuple(index)] += sign * 1e-5
            wanted = (value(*moved[0]) - value(*moved[1])) / 2e-5
            assert grad[0].cpu()[tuple(index)].item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    finite = [torch.where(grad.isfinite(), grad, 0.0).square().sum() for grad in grads]
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(sum(finite), leaves))


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_a_partner_without_weight_is_none(path, dtype, scaling):
    cost, b = rand(4, 5), torch.tensor([0.3, 0.0, 0.2, 0.4, 0.1], dtype=torch.float64)
    cost[2], cost[2, 1] = math.inf, 0.2
    value, _ = exact(cost, uniform(4), b, 0.1, 0.5, 0.8)
    b = b[None].to(DEVICE, dtype).requires_grad_()
    given = cost[None].to(DEVICE, dtype)
    out = sinkhorn_from_cost(given, b=b, eps=0.1, rho_x=0.5, rho_y=0.8, scaling=scaling, tol=1e-6)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, abs=2e-6)
    assert torch.autograd.grad(out.value.sum(), b)[0].isfinite().all()


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weightless_point_without_partner(path, dtype):
    cost = rand(5, 6, seed=1)
    cost[2] = math.inf
    a = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25], dtype=torch.float64)
    for rhos in ({}, {"rho_y": 1.0}, {"rho_x": 1.0}, {"rho": 1.0}):
        both = (rhos.get(name, rhos.get("rho", math.inf)) for name in ("rho_x", "rho_y"))
        value, _ = exact(cost, a, uniform(6), 0.1, *both)
        given = cost[None].to(DEVICE, dtype)
        out = sinkhorn_from_cost(given, a=a[None].to(DEVICE, dtype), eps=0.1, tol=1e-6, **rhos)
        assert out.converged.all()
        assert out.value.item() == pytest.approx(value, abs=2e-6)
        assert out.plan().isfinite().all()
        assert out.g.isfinite().all()


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("kept", [{}, {"rho_y": 1.0}], ids=str)
def test_a_kept_marginal_without_partner_has_no_plan(path, dtype, scaling, kept):
    cost = torch.tensor([LONELY, [[0.0, 1.0], [1.0, 0.0]]], dtype=dtype, device=DEVICE)
    out = sinkhorn_from_cost(cost, eps=0.01, scaling=scaling, **kept)
    assert out.converged.tolist() == [False, True]
    assert out.value[0] == math.inf
    alone = sinkhorn_from_cost(cost[1:], eps=0.01, scaling=scaling, **kept)
    torch.testing.assert_close(out.value[1:], alone.value, atol=1e-6, rtol=0)
    if not kept:
        turned = sinkhorn_from_cost(cost.mT, eps=0.01, scaling=scaling)
        assert turned.converged.tolist() == [False, True]
        assert turned.value[0] == math.inf


@on_costs
@pytest.mark.parametrize("dtype", DTYPES)
def test_too_few_partners_for_all_have_no_plan(path, dtype):
    """Hall's condition: three rows have one column between two of them."""
    cost = torch.full((1, 3, 3), math.inf)
    cost[0, :, 0], cost[0, 0, :] = 0.0, 1.0
    out = sinkhorn_from_cost(cost.to(DEVICE, dtype), eps=0.1, max_iter=100)
    assert not out.converged.any()
    assert out.value.item() == math.inf
    few = sinkhorn_from_cost(cost.to(DEVICE, dtype), eps=0.1, max_iter=2)  # not proved yet
    assert not few.converged.any()


# --- masses and penalties of any size -----------------------------------------------------------------------


def clouds(n: int, m: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    return rand(1, n, 2), rand(1, m, 2, seed=1) + torch.tensor([shift, 0.0], dtype=torch.float64)


def squared(x: Tensor, y: Tensor) -> np.ndarray:
    return (x[0][:, None] - y[0][None]).square().sum(2).numpy()


@on_points
@pytest.mark.parametrize("mass", [1e-12, 1e-4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_relative_to_the_mass(path, mass, dtype):
    x, y = clouds(30, 40)
    a, b = mass * uniform(30), mass * uniform(40)
    value, plan = exact(squared(x, y), a, b, 0.05, 1.0, 1.0)
    weights = {name: torch.tensor(w)[None].to(DEVICE, dtype) for name, w in (("a", a), ("b", b))}
    moved = x.clone().to(DEVICE, dtype).requires_grad_()
    out = sinkhorn(moved, y.to(DEVICE, dtype), eps=0.05, rho=1.0, tol=1e-5, **weights)
    assert out.converged.all()
    # Where next to nothing can be moved the penalties of all of it are the value.
    assert out.value.item() == pytest.approx(value, rel=1e-5)
    (grad,) = torch.autograd.grad(out.value.sum(), moved)
    source, target = x[0].detach().numpy(), y[0].numpy()
    wanted = 2 * (plan.sum(1)[:, None] * source - plan @ target)
    torch.testing.assert_close(
        grad[0].cpu().double() / np.abs(wanted).max(), torch.tensor(wanted) / np.abs(wanted).max(),
        atol=1e-4, rtol=0,
    )  # fmt: skip


@on_points
@pytest.mark.parametrize(
    "rhos", [(1000.0, 1000.0), (1e5, 1e5), (1000.0, math.inf), (math.inf, 300.0)], ids=str
)
@pytest.mark.parametrize("scaling", [None, 0.8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_penalty_far_above_eps_takes_no_longer(path, rhos, scaling, dtype):
    """Updates alone would take rho / eps iterations: 138,000 for the first."""
    x, y = clouds(30, 40, 6.0)
    a, b = uniform(30), (1 - 20 / min(rhos)) * uniform(40)
    value, _ = exact(squared(x, y), a, b, 0.05, *rhos)
    weights = {name: torch.tensor(w)[None].to(DEVICE, dtype) for name, w in (("a", a), ("b", b))}
    both = {name: rho for name, rho in zip(("rho_x", "rho_y"), rhos, strict=True) if rho < math.inf}
    given = (x.to(DEVICE, dtype), y.to(DEVICE, dtype))
    out = sinkhorn(*given, eps=0.05, scaling=scaling, max_iter=150, **weights, **both)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, rel=2e-6)


@on_points
@pytest.mark.parametrize("rho", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_penalty_far_below_eps(path, rho, dtype):
    x, y = clouds(12, 9, 0.5)
    value, _ = exact(squared(x, y), uniform(12), uniform(9), 0.3, rho, rho)
    out = sinkhorn(x.to(DEVICE, dtype), y.to(DEVICE, dtype), eps=0.3, rho=rho, tol=1e-5)
    assert out.converged.all()
    assert out.value.item() == pytest.approx(value, rel=1e-5)


@on_points
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_each_problem_its_own_penalty(path, dtype, scaling):
    """Also infinite ones, beside others."""
    from ecgot.kernels.ot import operators
    from ecgot.kernels.ot.problem import Problem, SolverSettings

    x, y = rand(4, 7, 2).to(DEVICE, dtype), rand(4, 5, 2, seed=1).to(DEVICE, dtype)
    a, b = (torch.full((4, n), 1 / n, dtype=dtype, device=DEVICE) for n in (7, 5))
    eps = torch.tensor([0.1, 0.2, 0.1, 0.3], dtype=dtype, device=DEVICE)
    rho_x = torch.tensor([0.5, math.inf, math.inf, 2.0], dtype=dtype, device=DEVICE)
    rho_y = torch.tensor([0.3, math.inf, 0.7, math.inf], dtype=dtype, device=DEVICE)
    problem = Problem(x, y, a, b, None, None, eps, "sqeuclidean", rho_x, rho_y)
    _, found = operators.solve(problem, None, SolverSettings(1000, 1e-6, scaling or 0.0))
    assert found.converged is not None
    assert found.converged.all()
    for index in range(4):
        cost = squared(x[index : index + 1].cpu().double(), y[index : index + 1].cpu().double())
        own = (t[index].item() for t in (eps, rho_x, rho_y))
        value, _ = exact(cost, uniform(7), uniform(5), *own)
        assert found.value is not None
        assert found.value[index].item() == pytest.approx(value, abs=3e-6)


@on_costs
def test_pairs_with_a_large_penalty(path):
    x, y = rand(2, 9, 2).to(DEVICE), rand(3, 7, 2, seed=1).to(DEVICE)
    dtype = torch.float32 if BACKEND == "triton" else torch.float64
    found = sinkhorn_pairwise(
        x.to(dtype), y.to(dtype), eps=0.05, rho=500.0, max_iter=200, tol=1e-5, full_output=True
    )
    assert found.converged.all()
    for i in range(2):
        for k in range(3):
            cost = squared(x[i : i + 1].cpu(), y[k : k + 1].cpu())
            value, _ = exact(cost, uniform(9), uniform(7), 0.05, 500.0, 500.0)
            assert found.value[i, k].item() == pytest.approx(value, abs=3e-6)


# --- rounding -----------------------------------------------------------------------------------------------


@on_costs
@pytest.mark.parametrize("ratio", [1e1, 1e2] if SLOW else [1e1, 1e2, 1e3])
def test_ordinary_tolerances_stay_in_reach(path, ratio):
    """Up to costs of 1e3 eps in fp32."""
    cost = rand(2, 12, 15).to(DEVICE, torch.float32)
    out = sinkhorn_from_cost(cost, eps=1 / ratio, tol=1e-4, scaling=0.9, max_iter=20_000)
    assert out.converged.all()


@on_costs
@pytest.mark.parametrize("scaling", [None, 0.9])
def test_beyond_the_dtype_no_solution_is_called_converged(path, scaling):
    """One point each: the plan is right in exact arithmetic after one iteration, and off by the rounding."""
    cost = torch.tensor([[[1234.5678, 3.0]]], device=DEVICE)
    for eps, reach in ((10.0, True), (1e-3, False), (1e-5, False)):
        out = sinkhorn_from_cost(cost, eps=eps, scaling=scaling)
        assert out.converged.item() is reach
        off = (out.plan().double().sum((1, 2)) - 1).abs()
        assert (off <= 4 * out.marginal_error + 1e-4).all()
    assert sinkhorn_from_cost(cost.double(), eps=1e-3, scaling=scaling).converged.all()
    assert sinkhorn_from_cost(cost.double(), eps=1e-3).backend == FP64


def far_dots(*counts: int) -> list[Tensor]:
    """Points whose costs are their products, of about 6,000 eps, and differ little."""
    points = [rand(count, k, 3, seed=count) for count, k in zip(counts, (20, 24), strict=True)]
    for each, far in zip(points, (25.0, -24.0), strict=True):
        each[:, :, 2] = far
    return [each.float() for each in points]


@pytest.mark.skipif(SLOW or DEVICE == "cuda", reason="looks at values, which on a GPU is to wait")
@on_points
def test_iterations_leave_room_for_rounding(path):
    """Stopped at the tolerance, most would be above it by what rounding adds to the error."""
    x, y = far_dots(32, 32)
    out = sinkhorn(x, y, eps=0.1, cost="dot", tol=1e-4)
    largest = (out.f.abs().amax(1) + out.g.abs().amax(1)) / 0.1
    assert (largest > 5000).all()
    assert out.converged.all()
    off = (out.plan().double().sum(2) - 1 / 20).abs().sum(1)
    assert (off <= 1e-3).all()  # a plan formed anew is off by a unit in the last place
    assert (out.iterations < 100).all()
    assert not sinkhorn(x, y, eps=0.1, cost="dot", tol=2e-5).converged.any()  # less than the rounding


@pytest.mark.skipif(SLOW or DEVICE == "cuda", reason="looks at values, which on a GPU is to wait")
@on_costs
def test_iterations_of_pairs_leave_room_for_rounding(path):
    x, y = far_dots(5, 7)
    out = sinkhorn_pairwise(x, y, eps=0.1, cost="dot", tol=1e-4, full_output=True)
    assert out.converged.all()


@on_points
def test_a_problem_that_keeps_its_marginals_has_their_gauge_beside_others(path):
    tensors = problem((2, 6, 5, 3), weighted=True)
    x = tensors["x"].requires_grad_()
    settings = {"eps": 0.3, "tol": 1e-6, "max_iter": 5000}
    mixed = sinkhorn(**tensors, rho=torch.tensor([math.inf, 0.5], device=DEVICE), **settings)
    kept = sinkhorn(**tensors, **settings)
    torch.testing.assert_close(mixed.f[0], kept.f[0], rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(out.f[0, 0], x)[0] for out in (mixed, kept)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@on_costs
def test_where_no_pair_is_allowed_only_penalties_are_paid(path):
    cost = torch.full((1, 2, 3), math.inf, device=DEVICE)
    out = sinkhorn_from_cost(cost, eps=0.1, rho=1.0)
    torch.testing.assert_close(
        out.value, torch.full_like(out.value, 2.1)
    )  # rho of both masses, eps of their product
    assert out.converged.all()
    assert (out.plan() == 0).all()


@on_costs
def test_points_that_are_left_out_round_nothing(path):
    cost = torch.tensor([[[0.1, 0.3, 1e6]]], device=DEVICE)
    out = sinkhorn_from_cost(cost, eps=0.1, rho=1.0)
    infinite = sinkhorn_from_cost(torch.where(cost > 1, math.inf, cost), eps=0.1, rho=1.0)
    torch.testing.assert_close(out.value, infinite.value)
    assert out.converged.all()


# --- a cloud's transport to itself --------------------------------------------------------------------------


@on_points
@pytest.mark.parametrize("rho", [None, 1.0])
def test_a_cloud_meets_itself_in_few_iterations(path, rho):
    points = 7 if SLOW else 48
    x = torch.linspace(0, 1, points, dtype=torch.float64)[:, None] ** 2
    eps = 0.3 / points**2  # a neighbour is hardly told from the point itself: thousands of plain iterations
    cost = (x - x.T).square()
    value, plan = exact(cost, uniform(points), uniform(points), eps, *(2 * [rho or math.inf]))
    x = x[None].float().to(DEVICE)
    out = solve_symmetric(partial(sinkhorn, x, x, eps=eps, rho=rho, tol=1e-5), 100)
    assert out.converged.all()
    assert out.iterations.max() < 25
    assert out.value.item() == pytest.approx(value, abs=1e-5 * eps + 1e-6)
    torch.testing.assert_close(out.plan()[0].double().cpu(), torch.tensor(plan), atol=5e-5, rtol=0)
