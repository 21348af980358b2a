"""Given costs, eps of each problem, annealing and warm starts."""

import math

import pytest
import torch

from ecgot.kernels import dispatch, sinkhorn, sinkhorn_from_cost
from tests.kernels.ot.problems import DEVICE, problem

BOTH_DTYPES = (torch.float32, torch.float64)  # the backend under test, and what it is compared with


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


def test_a_far_problem_does_not_change_its_batch_mates():
    near = problem((3, 9, 7, 4), weighted=True)
    far = near | {"x": near["x"].clone(), "y": near["y"].clone()}
    far["x"][1] += 1000
    values = [sinkhorn(**tensors, eps=0.2).value for tensors in (near, far)]
    assert (values[0] == values[1]).tolist() == [True, False, True]


@pytest.mark.parametrize("max_iter", [1, 2, 3])
@pytest.mark.parametrize("rho", [None, 1.0])
def test_iterations_that_leave_the_safe_range_count_too(max_iter, rho):
    """Small eps and far clouds: on chip such updates are taken again in the log domain."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 8, 2, generator=generator) for _ in "xy")
    cost = torch.rand(1, 8, 8, generator=generator).to(DEVICE)
    settings = {"eps": 1e-3, "max_iter": max_iter, "tol": 0.0, "rho": rho}
    far = [sinkhorn((x + 10).to(DEVICE, dtype), y.to(DEVICE, dtype), **settings) for dtype in BOTH_DTYPES]
    given = [sinkhorn_from_cost(cost.to(dtype), **settings) for dtype in BOTH_DTYPES]
    for actual, expected in (far, given):
        assert actual.iterations.tolist() == [max_iter]
        assert actual.value.item() == pytest.approx(expected.value.item(), rel=1e-3)


def test_a_tiny_rho_keeps_the_potentials_of_far_clouds():
    """Column sums underflow while their damped update stays near 1."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 4, 2, generator=generator) for _ in "xy")
    found, expected = (
        sinkhorn(x.to(DEVICE, dtype), (y + 100).to(DEVICE, dtype), eps=0.1, rho_y=1e-3, max_iter=300).g
        for dtype in BOTH_DTYPES
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_weightless_point_may_match_nothing_where_one_marginal_is_free():
    cost = torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    cost[0, 2] = math.inf
    a = torch.tensor([[0.25, 0.25, 0.0, 0.25, 0.25]], device=DEVICE)
    found = sinkhorn_from_cost(cost, eps=0.1, a=a, rho_y=1.0)
    without = sinkhorn_from_cost(cost[:, [0, 1, 3, 4]], eps=0.1, rho_y=1.0)
    torch.testing.assert_close(found.value, without.value)
    assert found.converged.all()
