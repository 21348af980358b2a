"""The few operations that serve usual batches where numba does not: against the reference, and the others."""

import math
from dataclasses import replace

import pytest
import torch

from ecgot.kernels import sinkhorn
from ecgot.kernels.ot import torch_small
from ecgot.kernels.ot.problem import PlanWeights, Problem, Solution, SolverSettings
from tests.kernels.ot.problems import TOLERANCE, close, oracle, problem, solved

SHAPES = [(1, 8, 8, 5), (3, 12, 7, 4), (2, 1, 5, 3)]


def usual(shape=(3, 12, 7, 4), *, cost="sqeuclidean", eps=0.2, dtype=torch.float64, far=0.0) -> Problem:
    tensors = problem(shape, dtype=dtype)
    batch, n, m, _ = shape
    x, y = (tensors[name].cpu() for name in "xy")
    a, b = (torch.rand(batch, k, generator=torch.Generator().manual_seed(k)) + 0.1 for k in (n, m))
    a, b = ((w / w.sum(1, keepdim=True)).to(dtype) for w in (a.double(), b.double()))
    return Problem(x + far, y - far, a, b, None, None, torch.full((batch,), eps, dtype=dtype), cost)


def solution(given: Problem, tol=1e-10, max_iter=5000) -> Solution:
    found = torch_small.solve(given, SolverSettings(max_iter, tol))
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setattr("ecgot.kernels.ot.backends.backend", lambda problem: "torch")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("cost", torch_small.COSTS)
@pytest.mark.parametrize("far", [0.0, 30.0])
def test_solution(shape, cost, far, monkeypatch):
    given = usual(shape, cost=cost, far=far if cost == "sqeuclidean" else 0.0)
    found = solution(given)
    tensors = {"x": given.x, "y": given.y, "a": given.a, "b": given.b}
    value, solutions = solved(tensors, eps=0.2, cost=cost)
    close(found.value, value, 1e-9)
    assert found.converged.all()
    for index, each in enumerate(solutions):
        gauge = ((given.a[index] * each.f).sum() - (given.b[index] * each.g).sum()) / 2
        close(found.whole_f[index], each.f - gauge, 1e-7)
        close(found.whole_g[index], each.g + gauge, 1e-7)


@pytest.mark.parametrize("cost", torch_small.COSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(cost, dtype, monkeypatch):
    given = usual(cost=cost, dtype=dtype, far=2.0)
    tensors = {"x": given.x, "y": given.y, "a": given.a, "b": given.b}
    value, grads, _ = oracle(tensors, eps=0.2, cost=cost)
    x, y = (t.clone().requires_grad_() for t in (given.x, given.y))
    called = []
    for name in ("solve", "cost_vjp"):
        function = getattr(torch_small, name)
        monkeypatch.setattr(
            torch_small, name, lambda *args, f=function: called.append(f(*args)) or called[-1]
        )
    tol = 1e-10 if dtype == torch.float64 else 2e-6
    out = sinkhorn(x, y, a=given.a, b=given.b, eps=0.2, cost=cost, tol=tol, max_iter=5000)
    found = torch.autograd.grad(out.value.sum(), (x, y))
    assert len(called) == 2
    assert None not in called
    scale = max(1.0, float(value.abs().max()))
    close(out.value, value, TOLERANCE[dtype][0] * scale)
    for grad, expected in zip(found, grads, strict=True):
        close(grad, expected, TOLERANCE[dtype][1] * scale)


def test_each_problem_stops_by_itself():
    """With what it would have alone; the last one only where iterations end."""
    given = usual((4, 12, 7, 4))
    eps = torch.tensor([0.3, 0.2, 0.1, 0.03], dtype=torch.float64)
    given = replace(given, eps=eps)
    found = solution(given, 1e-4, 40)
    assert len(set(found.iterations.tolist())) > 2
    assert found.iterations.max() == 40
    assert not found.converged.all()
    for index in range(4):
        alone = solution(given.rows(index, index + 1), 1e-4, 40)
        for name in ("f", "g", "whole_f", "whole_g", "value", "error", "iterations", "converged"):
            got, wanted = getattr(found, name)[index], getattr(alone, name)[0]
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


def spoilt(kind: str) -> Problem:
    given = usual(dtype=torch.float32)
    if kind == "weightless":
        given.a[1, 2] = 0.0
    elif kind == "absent":
        given.b[0, 3] = -1.0
    elif kind == "nan":
        given.x[1, 0, 0] = math.nan
    elif kind == "infinite":
        given.y[2, 0, 0] = math.inf
    elif kind == "tiny eps":
        given.eps[0] = 1e-5
    else:
        given.x[1, 4] = 1e30
        return replace(given, cost="cosine")
    return given


@pytest.mark.parametrize("kind", ["weightless", "absent", "nan", "infinite", "tiny eps", "too long"])
def test_others_serve_what_is_not_usual(kind):
    given = spoilt(kind)
    assert torch_small.fits(given)
    assert torch_small.solve(given, SolverSettings(10, 1e-4)) is None
    zeros = PlanWeights(torch.zeros_like(given.a), torch.zeros_like(given.b), torch.ones_like(given.eps))
    assert torch_small.cost_vjp(given, zeros) is None


def test_others_serve_scalings_out_of_range():
    """A column that the rows' first potential all but misses."""
    x = torch.tensor([[[0.0], [0.1], [0.2]]])
    y = torch.tensor([[[0.0], [0.1], [4.0]]])
    third = torch.full((1, 3), 1 / 3)
    given = Problem(x, y, third, third, None, None, torch.tensor([0.05]), "sqeuclidean")
    assert torch_small.solve(given, SolverSettings(1000, 1e-4)) is None
    out = sinkhorn(x, y, eps=0.05, max_iter=5000)
    value, _ = solved({"x": x, "y": y}, eps=0.05)
    close(out.value, value, 1e-5)
