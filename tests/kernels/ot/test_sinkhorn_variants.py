"""Costs, marginals, annealing, starts, ragged batches, pairs and outputs of the OT solver against oracles.

Run with TRITON_INTERPRET=1 (or on a GPU) it tests the Triton kernels.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from ecgot.kernels import (
    dispatch,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
    sinkhorn_pairwise,
    sinkhorn_varlen,
)
from ecgot.kernels.ot import numba_solver, outputs, reference, torch_solver
from tests.kernels.ot.test_sinkhorn import BACKEND, DEVICE, close, oracle, problem

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
MARGINALS = ({"rho_x": 0.5, "rho_y": 0.5}, {"rho_x": 0.3}, {"rho_y": 0.3})


def solved(tensors, **settings):
    """value, f and g of the fp64 reference, padded problems cropped."""
    solutions = reference.sinkhorn(**{k: t.cpu() for k, t in tensors.items()}, **settings)
    return torch.stack([s.value for s in solutions]), solutions


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rho", [{}, *MARGINALS], ids=str)
def test_costs_and_marginals_equal_the_reference(cost, masked, rho, poisoned_empty):
    tensors = problem((2, 17, 9, 5), masked=masked, weighted=True)
    leaves = {k: t.cpu().double().requires_grad_() if k in "xy" else t.cpu() for k, t in tensors.items()}
    solutions = reference.sinkhorn(**leaves, eps=0.2, cost=cost, **rho)
    value = torch.stack([s.value for s in solutions])
    grads = torch.autograd.grad(value.sum(), (leaves["x"], leaves["y"]))
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.2, cost=cost, tol=1e-6, max_iter=5000, **rho)
    assert out.backend == BACKEND
    assert out.converged.all()
    close(out.value, value.detach(), 3e-5)
    found = torch.autograd.grad(out.value.sum(), (x, y))
    for actual, expected in zip(found, grads, strict=True):
        close(actual, expected, 2e-4)
    if rho:  # then the potentials are determined
        for index, solution in enumerate(solutions):
            keep = tensors["x_mask"][index].cpu() if masked else slice(None)
            close(out.f[index].cpu()[keep], solution.f.detach(), 1e-4)


@pytest.mark.parametrize("rho", MARGINALS, ids=str)
def test_masses_are_free_where_unbalanced(rho):
    tensors = problem((2, 7, 5, 3), weighted=True)
    tensors["a"], tensors["b"] = tensors["a"] * 2.5, tensors["b"] * 0.4
    value, _ = solved(tensors, eps=0.2, **rho)
    a = tensors["a"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000, **rho)
    close(out.value, value, 5e-5)
    (grad,) = torch.autograd.grad(out.value.sum(), a)
    step = torch.zeros_like(a)
    step[:, 3] = 1e-4
    up, _ = solved(tensors | {"a": (a + step).detach()}, eps=0.2, **rho)
    down, _ = solved(tensors | {"a": (a - step).detach()}, eps=0.2, **rho)
    close(grad[:, 3], (up - down) / 2e-4, 1e-3)


@pytest.mark.parametrize("shift", [10, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", MARGINALS, ids=str)
def test_far_clouds_where_a_marginal_may_be_missed(rho, dtype, shift):
    """Targets of marginals underflow there while steps to them overflow."""
    tensors = problem((2, 7, 5, 3), weighted=True)
    tensors = {k: t.to(dtype) for k, t in tensors.items()}
    tensors["y"] = tensors["y"] + shift
    value, _ = solved(tensors, eps=0.1, max_iter=200, tol=-1.0, **rho)
    x = tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.1, max_iter=200, tol=1e-6, **rho)
    assert out.converged.all()
    assert (out.iterations > 1).all()
    torch.testing.assert_close(out.value.cpu().double(), value, rtol=2e-6, atol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert grad.isfinite().all()


def test_unbalanced_equals_geomloss_reach():
    geomloss = pytest.importorskip("geomloss")
    tensors = problem((3, 13, 8, 5))
    eps, reach = 0.2, 0.7
    # geomloss: half the squared distance, eps = blur**2, rho = reach**2 on that half.
    peer = geomloss.SamplesLoss(
        "sinkhorn", p=2, blur=math.sqrt(eps / 2), reach=reach, scaling=0.99, debias=False
    )
    expected = 2 * peer(tensors["x"].double(), tensors["y"].double())
    out = sinkhorn(**tensors, eps=eps, rho=2 * reach**2, tol=1e-6)
    close(out.value, expected.cpu(), 1e-4)


def test_unbalanced_equals_pot():
    ot = pytest.importorskip("ot")
    tensors = problem((2, 9, 7, 3))
    for name, count in (("a", 9), ("b", 7)):  # POT is wrong where a weight is 0
        tensors[name] = torch.rand(2, count, device=DEVICE) + 0.1
    out = sinkhorn(**tensors, eps=0.2, rho=0.5, tol=1e-6, max_iter=5000)
    for index in range(2):
        x, y = tensors["x"][index].cpu().double().numpy(), tensors["y"][index].cpu().double().numpy()
        a, b = tensors["a"][index].cpu().numpy(), tensors["b"][index].cpu().numpy()
        plan = ot.unbalanced.sinkhorn_unbalanced(
            a, b, ot.dist(x, y), 0.2, 0.5, reg_type="kl", stopThr=1e-12, numItermax=20_000
        )
        np.testing.assert_allclose(out.plan()[index].detach().cpu().numpy(), plan, atol=1e-5)


def test_a_large_rho_is_balanced():
    tensors = problem((2, 9, 7, 3), weighted=True)
    balanced = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000).value
    nearly = sinkhorn(**tensors, eps=0.2, rho=1e3, tol=1e-6, max_iter=100).value
    torch.testing.assert_close(nearly, balanced, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_given_cost_is_the_same_problem(rho, masked):
    tensors = problem((3, 9, 7, 4), masked=masked, weighted=True)
    by_points = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000, **rho)
    cost = (tensors["x"][:, :, None] - tensors["y"][:, None]).square().sum(-1).requires_grad_()
    rest = {k: t for k, t in tensors.items() if k not in "xy"}
    out = sinkhorn_from_cost(cost, eps=0.2, tol=1e-6, max_iter=5000, **rest, **rho)
    torch.testing.assert_close(out.value, by_points.value, atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), cost)
    torch.testing.assert_close(grad, by_points.plan(), atol=1e-5, rtol=0)


def test_an_infinite_cost_forbids_a_pair():
    cost = problem((2, 6, 5, 4))["x"][:, :, :1] + torch.rand(2, 6, 5, device=DEVICE)
    cost[:, 0, :3] = math.inf
    out = sinkhorn_from_cost(cost, eps=0.2, tol=1e-6)
    assert out.converged.all()
    assert (out.plan()[:, 0, :3] < 1e-12).all()
    finite = sinkhorn_from_cost(cost.clamp_max(50.0), eps=0.2, tol=1e-6)
    torch.testing.assert_close(out.value, finite.value, atol=1e-5, rtol=0)
    torch.testing.assert_close(out.transport_cost(), finite.transport_cost(), atol=1e-5, rtol=0)
    leaf, bounded = cost.clone().requires_grad_(), cost.clamp_max(50.0).requires_grad_()
    for outcome in (
        lambda out: out.value.sum(),
        lambda out: out.plan().square().sum(),
        lambda out: out.transport_cost().sum(),
    ):
        found, expected = (
            torch.autograd.grad(outcome(sinkhorn_from_cost(c, eps=0.2, tol=1e-6)), c)[0]
            for c in (leaf, bounded)
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    cost[1, 2, 2] = math.nan
    out = sinkhorn_from_cost(cost, eps=0.2, tol=1e-6)
    assert out.converged.tolist() == [True, False]
    assert out.value[1].isnan()
    assert out.transport_cost()[1].isnan()


def test_eps_of_each_problem():
    tensors = problem((3, 8, 6, 4), masked=True)
    eps = torch.tensor([0.5, 0.05, 0.2], device=DEVICE)
    out = sinkhorn(**tensors, eps=eps, tol=1e-6, max_iter=5000)
    for index in range(3):
        alone = sinkhorn(
            **{k: t[index : index + 1] for k, t in tensors.items()},
            eps=eps[index].item(),
            tol=1e-6,
            max_iter=5000,
        )
        torch.testing.assert_close(out.value[index], alone.value[0], atol=1e-6, rtol=1e-5)
        assert out.iterations[index] == alone.iterations[0]


@pytest.mark.parametrize("rho", [{}, {"rho": 0.4}], ids=str)
def test_annealing_reaches_the_same_value(rho):
    tensors = problem((2, 12, 12, 2), seed=3)
    settings = {"eps": 0.1, "tol": 1e-5, "max_iter": 4000} | rho
    cold, warm = sinkhorn(**tensors, **settings), sinkhorn(**tensors, **settings, scaling=0.7)
    assert warm.converged.all()
    torch.testing.assert_close(cold.value, warm.value, atol=1e-4, rtol=0)
    assert (warm.iterations != cold.iterations).all()


@pytest.mark.skipif(dispatch.INTERPRETED, reason="a property of the algorithm, and of 1,400 iterations")
def test_annealing_pays_where_eps_is_small():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 60, 1, generator=generator).to(DEVICE)
    settings = {"eps": 1e-3, "tol": 1e-3, "max_iter": 20_000}
    cold, warm = sinkhorn(x, y, **settings), sinkhorn(x, y, **settings, scaling=0.8)
    assert warm.converged.all()
    assert warm.iterations.item() < cold.iterations.item()


def test_a_warm_start_is_one_iteration():
    for shift in (0.0, 20.0):
        tensors = problem((2, 9, 7, 4), masked=True, dtype=torch.float64 if shift else torch.float32)
        tensors["y"] = tensors["y"] + shift
        first = sinkhorn(**tensors, eps=0.1, tol=1e-5)
        again = sinkhorn(**tensors, eps=0.1, tol=2e-5, init=first.g)
        assert (first.iterations > 3).all()
        assert (again.iterations <= 2).all()
        torch.testing.assert_close(first.value, again.value, rtol=1e-5, atol=1e-5)


def test_packed_clouds_are_the_padded_ones():
    tensors = problem((3, 8, 6, 4), weighted=True)
    x_lengths, y_lengths = torch.tensor([8, 0, 3], device=DEVICE), torch.tensor([2, 6, 6], device=DEVICE)
    x_mask = torch.arange(8, device=DEVICE) < x_lengths[:, None]
    y_mask = torch.arange(6, device=DEVICE) < y_lengths[:, None]
    x, y = tensors["x"][x_mask].requires_grad_(), tensors["y"][y_mask].requires_grad_()
    offsets = [torch.cat([n.new_zeros(1), n.cumsum(0)]).to(torch.int32) for n in (x_lengths, y_lengths)]
    packed = sinkhorn_varlen(x, y, *offsets, eps=0.2, tol=1e-6)
    padded = sinkhorn(tensors["x"], tensors["y"], x_mask=x_mask, y_mask=y_mask, eps=0.2, tol=1e-6)
    torch.testing.assert_close(packed.value, padded.value)
    torch.testing.assert_close(packed.f, padded.f[x_mask])
    torch.testing.assert_close(packed.g, padded.g[y_mask])
    (grad,) = torch.autograd.grad(packed.value.sum(), x)
    assert grad.shape == x.shape
    with pytest.raises(ValueError, match="cu_seqlens_x: expected offsets that rise from 0 to 11, got"):
        sinkhorn_varlen(x, y, offsets[0][:-1], offsets[1][:-1], eps=0.2)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_divergence_is_the_debiased_cost(rho):
    tensors = problem((2, 9, 6, 4), masked=True, weighted=True)
    of = lambda p, q: sinkhorn(  # noqa: E731
        tensors[p], tensors[q], eps=0.5, rho=rho, tol=1e-6, max_iter=5000,
        a=tensors["a" if p == "x" else "b"], b=tensors["a" if q == "x" else "b"],
        x_mask=tensors[f"{p}_mask"], y_mask=tensors[f"{q}_mask"],
    ).value  # fmt: skip
    out = sinkhorn_divergence(**tensors, eps=0.5, rho=rho, tol=1e-6, max_iter=5000)
    expected = of("x", "y") - of("x", "x") / 2 - of("y", "y") / 2
    torch.testing.assert_close(out.value, expected, atol=1e-5, rtol=0)
    assert out.converged.all()
    assert (out.value > 0).all()


def test_divergence_of_equal_clouds_is_zero_and_flat():
    x = problem((2, 9, 9, 4))["x"]
    moved = x.clone().requires_grad_()
    out = sinkhorn_divergence(moved, x, eps=0.5, tol=1e-6, max_iter=5000)
    assert out.value.abs().max() < 1e-5
    (grad,) = torch.autograd.grad(out.value.sum(), moved)
    assert grad.abs().max() < 1e-4


def test_divergence_equals_geomloss():
    geomloss = pytest.importorskip("geomloss")
    tensors = problem((3, 13, 8, 5))
    peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=math.sqrt(0.1), scaling=0.99, debias=True)
    expected = 2 * peer(tensors["x"].double(), tensors["y"].double())
    close(sinkhorn_divergence(**tensors, eps=0.2, tol=1e-6).value, expected.cpu(), 2e-4)


# --- outputs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_apply_and_the_rest_are_what_the_plan_says(whole, monkeypatch):
    if not whole:
        # A few rows at a time. (The name ecgot.kernels.sinkhorn is the function.)
        monkeypatch.setattr(outputs, "MAX_CELLS", 40)
    tensors = problem((2, 9, 7, 4), masked=True, weighted=True, dtype=torch.float64)
    x = tensors["x"].nan_to_num(0.0).requires_grad_()
    out = sinkhorn(**tensors | {"x": x}, eps=0.2, tol=1e-10, max_iter=20_000)
    plan = out.plan()
    v, u = (
        torch.randn(2, 7, 3, dtype=torch.float64, device=DEVICE),
        torch.randn(2, 9, 3, device=DEVICE).double(),
    )
    torch.testing.assert_close(out.apply(v), plan @ v)
    torch.testing.assert_close(out.apply(u, transpose=True), plan.mT @ u)
    y = tensors["y"].nan_to_num(0.0)
    mass = plan.sum(2, keepdim=True)
    projection = torch.where(mass > 0, plan @ y / mass, 0.0)
    torch.testing.assert_close(out.barycentric_projection(), projection)
    cost = (x[:, :, None] - y[:, None]).square().sum(-1)
    torch.testing.assert_close(out.transport_cost(), (plan * cost).sum((1, 2)))
    weight = torch.randn(2, 9, 3, dtype=torch.float64, device=DEVICE)
    for by_rows, by_plan in (
        ((out.apply(v) * weight).sum(), (plan @ v * weight).sum()),
        (out.transport_cost().sum(), (plan * cost).sum()),
    ):
        found, expected = (torch.autograd.grad(s, x, retain_graph=True)[0] for s in (by_rows, by_plan))
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"v: expected \[2, 7, E\], got shape \(2, 9, 3\)"):
        out.apply(u)
    with pytest.raises(TypeError, match=r"v: expected a torch\.Tensor, got list"):
        out.apply([1.0])


def test_the_value_is_the_transport_cost_and_the_entropy():
    tensors = problem((2, 9, 7, 4), weighted=True)
    tensors["y"] = tensors["y"] + 3
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000)
    plan = out.plan().double()
    joint = (tensors["a"][:, :, None] * tensors["b"][:, None, :]).double()
    kl = torch.special.xlogy(plan, plan / joint.clamp_min(1e-300)).sum((1, 2))
    torch.testing.assert_close((out.transport_cost() + 0.2 * kl).float(), out.value, rtol=1e-5, atol=1e-4)


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_pairs_are_problems_of_their_own(cost, rho, poisoned_empty):
    x_side, y_side = (
        problem((3, 7, 3, 5), masked=True, weighted=True),
        problem((2, 3, 6, 5), seed=1, masked=True),
    )
    x, y = x_side["x"].requires_grad_(), y_side["y"].requires_grad_()
    a = x_side["a"].float().requires_grad_()
    sides = {"x_mask": x_side["x_mask"], "y_mask": y_side["y_mask"]}
    settings = {"eps": 0.5, "cost": cost, "tol": 1e-6, "max_iter": 5000} | rho
    out = sinkhorn_pairwise(x, y, a=a, **sides, **settings, full_output=True)
    assert out.value.shape == (3, 2)
    assert out.converged.all()
    assert out.backend == BACKEND
    weight = torch.randn(3, 2, device=DEVICE)
    found = torch.autograd.grad((out.value * weight).sum(), (x, y, a))
    each = lambda t: t.repeat_interleave(2, 0)  # noqa: E731
    alone = sinkhorn(
        each(x), y.repeat(3, 1, 1), a=each(a), x_mask=each(sides["x_mask"]),
        y_mask=sides["y_mask"].repeat(3, 1), **settings,
    )  # fmt: skip
    torch.testing.assert_close(out.value, alone.value.view(3, 2), atol=2e-6, rtol=1e-5)
    expected = torch.autograd.grad((alone.value.view(3, 2) * weight).sum(), (x, y, a))
    for name, actual, wanted in zip("xya", found, expected, strict=True):
        if name == "a" and not rho:  # determined up to a constant of each problem, which the weights add up
            actual, wanted = (t - t[:, 3:4] for t in (actual, wanted))
            actual, wanted = actual[sides["x_mask"]], wanted[sides["x_mask"]]
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("rho", [{}, {"rho_x": 0.5, "rho_y": 0.5}], ids=str)
def test_pairs_against_the_reference(cost, rho):
    x_side, y_side = problem((2, 7, 3, 5), masked=True), problem((3, 3, 6, 5), seed=1, masked=True)
    rhos = {"rho": rho["rho_x"]} if rho else {}
    masks = {"x_mask": x_side["x_mask"], "y_mask": y_side["y_mask"]}
    found = sinkhorn_pairwise(
        x_side["x"], y_side["y"], **masks, eps=0.4, cost=cost, tol=1e-6, max_iter=5000, **rhos
    )
    for i, j in itertools.product(range(2), range(3)):
        pair = {"x": x_side["x"][i : i + 1], "y": y_side["y"][j : j + 1]}
        pair |= {"x_mask": masks["x_mask"][i : i + 1], "y_mask": masks["y_mask"][j : j + 1]}
        value, _ = solved(pair, eps=0.4, cost=cost, **rho)
        close(found[i, j], value[0], 3e-5)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 5, 0, 4), (0, 5, 0, 4), (2, 0, 3, 4), (2, 5, 3, 0)])
@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_no_pairs_and_no_points(shape, rho):
    count_x, n, count_y, m = shape
    x = torch.randn(count_x, n, 3, device=DEVICE, requires_grad=True)
    y = torch.randn(count_y, m, 3, device=DEVICE, requires_grad=True)
    value = sinkhorn_pairwise(x, y, eps=0.3, scaling=0.5, **rho)
    assert value.shape == (count_x, count_y)
    value.sum().backward()
    assert (x.grad == 0).all()
    assert (y.grad == 0).all()


def test_pairs_far_from_the_origin_and_from_each_other():
    tensors = problem((3, 7, 5, 4))
    x, y = tensors["x"] + 100, tensors["y"] - 50
    out = sinkhorn_pairwise(x.requires_grad_(), y, eps=0.2, tol=1e-5, full_output=True)
    exact = sinkhorn_pairwise(x.detach().double(), y.double(), eps=0.2, tol=1e-10, max_iter=10_000)
    torch.testing.assert_close(out.value.double(), exact, rtol=1e-6, atol=0)
    assert out.converged.all()


def test_pairs_keep_their_memory(monkeypatch):
    """No [B, K, N, M] tensor: the costs that are held at once stay below the bound."""
    if BACKEND != "numba":
        pytest.skip("of the CPU path")
    monkeypatch.setattr(numba_solver, "CHUNK_CELLS", 2000)
    x, y = torch.randn(20, 10, 4), torch.randn(15, 8, 4)
    seen = []
    run = numba_solver.run_loop
    monkeypatch.setattr(
        numba_solver,
        "run_loop",
        lambda loop, count, s, rest: seen.append(s.numel()) or run(loop, count, s, rest),
    )
    sinkhorn_pairwise(x.requires_grad_(), y, eps=0.5).sum().backward()
    assert len(seen) >= 20
    assert max(seen) <= 2000


def test_empty_clouds_of_pairs_are_zero_and_nan_stays_where_it_is():
    tensors = problem((3, 7, 5, 4), masked=True)
    tensors["x_mask"][1] = False
    y = tensors["y"].nan_to_num(0.0)
    y[2, 0, 0] = math.nan
    tensors["y_mask"][2, 0] = True
    x = tensors["x"].requires_grad_()
    out = sinkhorn_pairwise(
        x, y, x_mask=tensors["x_mask"], y_mask=tensors["y_mask"], eps=0.2, full_output=True
    )
    assert (out.value[1] == 0).all()
    assert out.value[[0, 2], 2].isnan().all()
    assert out.value[:, :2].isfinite().all()
    assert not out.converged[[0, 2], 2].any()
    (grad,) = torch.autograd.grad(out.value[:, :2].sum(), x)
    assert grad.isfinite().all()
    assert (grad[1] == 0).all()
    assert grad[0].abs().sum() > 0


def test_second_derivatives_of_pairs_are_refused():
    tensors = problem((2, 4, 3, 2))
    x = tensors["x"].requires_grad_()
    value = sinkhorn_pairwise(x, tensors["y"], eps=0.2)
    (grad,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="expected first derivatives only, got a second derivative"):
        grad.sum().backward()


def test_pairs_compile_whole():
    tensors = problem((3, 6, 5, 4))

    def step(x, y):
        return sinkhorn_pairwise(x * 2, y, eps=0.5, cost="cosine").sum()

    x = tensors["x"].requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, tensors["y"]), x)
    (expected,) = torch.autograd.grad(step(x, tensors["y"]), x)
    torch.testing.assert_close(found, expected)


# --- any size, any path -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", COSTS)
def test_large_problems_in_chunks_of_rows_are_the_same(cost, monkeypatch):
    tensors = problem((2, 40, 30, 5), masked=True, weighted=True, dtype=torch.float64)
    tensors = {k: t.cpu() for k, t in tensors.items()}
    x = tensors["x"].nan_to_num(0.0).requires_grad_()
    tensors["x"] = x
    settings = {"eps": 0.1, "cost": cost, "tol": 1e-9, "scaling": 0.5, "max_iter": 5000}
    whole = sinkhorn(**tensors, **settings)
    (expected,) = torch.autograd.grad(whole.value.sum(), x)
    monkeypatch.setattr(torch_solver, "MAX_CELLS", 300)
    out = sinkhorn(**tensors, **settings)
    assert out.backend == "torch-streaming"
    torch.testing.assert_close(out.value, whole.value, atol=1e-7, rtol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)


def test_streaming_kernel():
    if BACKEND != "triton":
        pytest.skip("of the Triton kernels: set TRITON_INTERPRET=1 or use a GPU")
    tensors = problem((1, 260, 70, 5), masked=True, weighted=True)
    value, grads, _ = oracle(tensors, eps=0.3, cost="sqeuclidean")
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.3, tol=1e-5, scaling=0.5)
    assert out.backend == "triton-streaming"
    close(out.value, value, 3e-5)
    for found, expected in zip(torch.autograd.grad(out.value.sum(), (x, y)), grads, strict=True):
        close(found, expected, 1e-4)


@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_torch_path_alone(rho, monkeypatch):
    """What serves without numba, and on devices without Triton."""
    monkeypatch.setattr("ecgot.kernels.ot.backends.backend", lambda problem: "torch")
    tensors = problem((3, 9, 7, 4), masked=True, weighted=True)
    value, _ = solved(tensors, eps=0.2, **{"rho_x": 0.5, "rho_y": 0.5} if rho else {})
    x = tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000, scaling=0.5, **rho)
    close(out.value, value, 3e-5)
    pairs = sinkhorn_pairwise(
        x, tensors["y"], x_mask=tensors["x_mask"], y_mask=tensors["y_mask"], a=tensors["a"], b=tensors["b"],
        eps=0.2, tol=1e-6, max_iter=5000, **rho,
    )  # fmt: skip
    close(pairs.diagonal(), value, 3e-5)
    (grad,) = torch.autograd.grad(pairs.trace(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(out.value.sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_a_far_problem_does_not_change_its_batch_mates():
    near = problem((3, 9, 7, 4), weighted=True)
    far = near | {"x": near["x"].clone(), "y": near["y"].clone()}
    far["x"][1] += 1000
    values = [sinkhorn(**tensors, eps=0.2).value for tensors in (near, far)]
    assert (values[0] == values[1]).tolist() == [True, False, True]


def test_many_threads_at_once_and_the_number_of_torchs_threads():
    before = torch.get_num_threads()
    batches = [problem((4, 9, 7, 4), seed=seed, masked=True) for seed in range(6)]
    expected = [sinkhorn(**tensors, eps=0.5).value for tensors in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensors: sinkhorn(**tensors, eps=0.5).value, batches))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.get_num_threads() == before


def test_fifty_thousand_points_need_no_matrix():
    """One iteration at the advertised size would take long on a CPU: the chunk rule is what bounds memory."""
    from ecgot.kernels.ot.backends import backend
    from ecgot.kernels.ot.problem import Problem

    x = torch.empty(1, 50_000, 64, device="meta")
    weights = torch.empty(1, 50_000, device="meta")
    eps = torch.empty(1, device="meta")
    assert backend(Problem(x, x, weights, weights, None, None, eps, "dot")) == "torch-streaming"


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho: expected None or a number > 0, got 0.0"),
        ({"rho": 1.0, "rho_x": 1.0}, "rho: expected it alone, or rho_x and rho_y in its place, got both"),
        ({"scaling": 1.0}, "scaling: expected None or a number > 0 and <= 0.999, got 1.0"),
        ({"scaling": 0.99999999}, "scaling: expected None or a number > 0 and <= 0.999, got 0.99999999"),
        (
            {"init": torch.zeros(2, 5)},
            r"init: expected the potential g .* \(2, 4\) on cpu, got torch.float32 \(2, 5\)",
        ),
        ({"init": [0.0]}, "init: expected a torch.Tensor, got list"),
        ({"precision": "bf16"}, "precision: expected 'fp32' or 'tf32', got 'bf16'"),
        (
            {"eps": torch.tensor([0.1])},
            r"eps: expected a number or floating point \[2\] on cpu, got torch.float32 \(1,\)",
        ),
        (
            {"eps": torch.tensor([0.1, -1.0])},
            r"eps: expected 1e-30 to 1e\+30, got a tensor with an entry outside",
        ),
        (
            {"eps": torch.tensor([0.1, 0.1], requires_grad=True)},
            "eps: expected a tensor without gradient, got one that requires it",
        ),
        (
            {"rho": 1.0, "a": torch.full((2, 5), -1.0)},
            "a: expected weights >= 0, got a negative or NaN weight",
        ),
        (
            {"rho": 1.0, "a": torch.full((2, 5), math.inf)},
            "a: expected finite weights, got an infinite weight",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "y": torch.zeros(2, 4, 3), "eps": 0.1} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        sinkhorn(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_pairs_are_named():
    x: Tensor = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match=r"\[B, N, D\] and \[K, M, D\]"):
        sinkhorn_pairwise(x, torch.zeros(4, 5, 2), eps=0.1)
    with pytest.raises(
        ValueError, match=r"y_mask: expected torch.bool \(4, 5\) on cpu, got torch.bool \(2, 5\)"
    ):
        sinkhorn_pairwise(x, torch.zeros(4, 5, 3), eps=0.1, y_mask=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="eps: expected a number, got a tensor"):
        sinkhorn_pairwise(x, x, eps=torch.ones(2))
