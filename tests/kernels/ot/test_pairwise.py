"""Each cloud with each other, against single problems and the oracle."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ecgot.kernels import sinkhorn, sinkhorn_pairwise
from ecgot.kernels.ot import numba_solver
from tests.kernels.ot.problems import BACKEND, COSTS, DEVICE, close, problem, solved


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


def test_a_far_cloud_leaves_the_values_of_other_pairs_alone():
    tensors = problem((3, 20, 17, 3))
    x, y = tensors["x"], tensors["y"]
    near = sinkhorn_pairwise(x, y, eps=0.3)
    x[1] += 1e5
    far = sinkhorn_pairwise(x, y, eps=0.3)
    torch.testing.assert_close(far[[0, 2]], near[[0, 2]], atol=1e-5, rtol=1e-5)


def test_pairs_compile_whole():
    tensors = problem((3, 6, 5, 4))

    def step(x, y):
        return sinkhorn_pairwise(x * 2, y, eps=0.5, cost="cosine").sum()

    x = tensors["x"].requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x, tensors["y"]), x)
    (expected,) = torch.autograd.grad(step(x, tensors["y"]), x)
    torch.testing.assert_close(found, expected)


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
