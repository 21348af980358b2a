"""Compiled loops: what they leave behind in a process, what serves where they cannot, and streamed costs."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_from_cost
from ecgot.kernels.ot import reference, torch_solver
from tests.kernels.ot.problems import BACKEND, COSTS, MARGINALS, TOLERANCE, close, oracle, problem

pytest.importorskip("numba")
ROOT = Path(__file__).parents[3]
SOLVE = """
import torch, warnings
warnings.simplefilter("always")
from ecgot.kernels import sinkhorn
x = torch.randn(64, 64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
def solve():
    out = sinkhorn(x, x.detach().flip(1) + 1, eps=100.0)
    out.value.sum().backward()
    return out.backend
"""
# The lower decile: what another process takes from the cores does not count.
NEIGHBOUR = """
import os, time
torch.set_num_threads(2)
grid = torch.randn(64, 64, 32)
def us(call):
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * sorted(times)[30]
def measure():
    return us(grid.exp), us(lambda: grid.logsumexp(2))
def threads():
    return len(os.listdir("/proc/self/task"))
measure()
import scipy.linalg.cython_blas  # numba imports it, with a thread of its own
before, had = measure(), threads()
assert solve() == "numba"
print(*(after / first for first, after in zip(before, measure())), threads() - had)
"""


def run(source: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "0"} | environment,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_solve_leaves_torch_as_fast_as_it_was():
    ratios = []
    for _ in range(5):
        *ratios, more = run(SOLVE + NEIGHBOUR, OMP_NUM_THREADS="2").stdout.split()
        assert int(more) <= 2  # the pool's own; a team of OpenMP for each would be more
        if max(map(float, ratios)) <= 1.1:
            return
    raise AssertionError(f"expected at most 1.1 times as long after a solve, got {ratios}")


def test_without_numba_torch_serves_and_says_so_once():
    hidden = "import sys; sys.modules['numba'] = None\n"
    done = run(hidden + SOLVE + "print(solve(), solve())")
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("RuntimeWarning: numba: expected") == 1


def test_without_a_place_for_the_cache_torch_serves_and_says_so_once(tmp_path):
    for path in (ROOT / "ecgot").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "ecgot/kernels/ot/__pycache__").touch()  # a file, so that no folder of that name can be made
    nowhere = "/dev/null/nowhere"
    done = run(
        SOLVE + "print(solve(), solve())",
        tmp_path,
        HOME=nowhere,
        XDG_CACHE_HOME=nowhere,
        NUMBA_CACHE_DIR=nowhere,
    )
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("RuntimeWarning: numba: expected") == 1
    assert "no locator available" in done.stderr


needs_numba = pytest.mark.skipif(BACKEND != "numba", reason="Triton takes problems on its devices")


@pytest.fixture
def streamed(monkeypatch):
    """Problems of more than 200 costs stream, in tiles of 4 rows."""
    from ecgot.kernels.ot import numba_streaming

    monkeypatch.setattr(torch_solver, "MAX_CELLS", 200)
    monkeypatch.setattr(numba_streaming, "tile_rows", lambda m: 4)
    return numba_streaming


@needs_numba
@pytest.mark.parametrize("marginals", [{}, *MARGINALS], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_streamed_costs_give_the_value_and_gradient_of_the_oracle(cost, marginals, streamed):
    for dtype in (torch.float64, torch.float32):
        tensors = problem((2, 23, 17, 3), masked=True, weighted=True, dtype=dtype)
        stopping = {"max_iter": 3000, "tol": 1e-10 if dtype == torch.float64 else 1e-6}
        value, grads, solutions = oracle(tensors, eps=0.2, cost=cost, **marginals)
        leaves = [tensors[name].requires_grad_() for name in "xy"]
        out = sinkhorn(**tensors, eps=0.2, cost=cost, **marginals, **stopping)
        assert out.backend == "numba-streaming"
        close(out.value, value, TOLERANCE[dtype][0])
        for found, expected in zip(torch.autograd.grad(out.value.sum(), leaves), grads, strict=True):
            close(found, expected, TOLERANCE[dtype][1])
        plan = out.plan()
        for index, solution in enumerate(solutions):
            rows, columns = tensors["x_mask"][index], tensors["y_mask"][index]
            close(plan[index][rows][:, columns], solution.plan, TOLERANCE[dtype][1])


@needs_numba
def test_an_iteration_over_streamed_costs_is_one_pass(streamed, monkeypatch):
    passes = []
    whole = streamed._Sides._pass
    monkeypatch.setattr(streamed._Sides, "_pass", lambda *given: (passes.append(1), whole(*given))[1])
    x = problem((1, 30, 25, 3))
    for rho in (None, 0.5):
        passes.clear()
        out = sinkhorn(**x, eps=0.3, rho=rho, tol=1e-5)
        assert out.iterations.item() > 3
        assert len(passes) == out.iterations.item() + 1  # and one to begin with


@needs_numba
def test_columns_that_leave_the_range_of_sums_are_found_in_the_log_domain(streamed):
    x = torch.linspace(0, 1, 20)[None, :, None]
    y = torch.linspace(0, 3, 18)[None, :, None] + 0.013
    value, _, _ = oracle({"x": x, "y": y}, eps=2e-3, cost="sqeuclidean", tol=1e-6, max_iter=20_000)
    out = sinkhorn(x, y, eps=2e-3, tol=1e-4, max_iter=20_000)
    close(out.value, value, 1e-4)


@needs_numba
def test_streamed_problems_keep_their_faults_to_themselves(streamed):
    tensors = problem((3, 21, 15, 3))
    x, y = tensors["x"].clone().requires_grad_(), tensors["y"].clone().requires_grad_()
    with torch.no_grad():
        x[1, 4, 0] = float("nan")
    value = sinkhorn(x, y, eps=0.3).value
    assert value.isfinite().tolist() == [True, False, True]
    for grad in torch.autograd.grad(value[[0, 2]].sum(), (x, y)):
        assert grad[[0, 2]].isfinite().all()


@pytest.fixture
def small(monkeypatch):
    """Whether each call was served as a small problem, forward and backward."""
    from ecgot.kernels.ot import numba_small

    served: list[bool] = []
    for name in ("solve", "cost_vjp"):
        whole = getattr(numba_small, name)

        def spied(*given, whole=whole):
            found = whole(*given)
            served.append(found is not None)
            return found

        monkeypatch.setattr(numba_small, name, spied)
    return served


@needs_numba
@pytest.mark.parametrize("apart", [0.0, 4.0])
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "dot"])
def test_small_problems_give_the_value_and_gradient_of_the_oracle(cost, apart, small):
    for dtype in (torch.float64, torch.float32):
        tensors = problem((3, 9, 7, 5), dtype=dtype)
        tensors["x"] = tensors["x"] + apart
        tensors["y"][1] += apart  # the clouds of this problem stay where they are
        tensors["b"] = (torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) + 0.1).to(dtype)
        tensors["b"] /= tensors["b"].sum(1, keepdim=True)
        value, grads, solutions = oracle(tensors, eps=0.4, cost=cost)
        leaves = [tensors[name].requires_grad_() for name in "xy"]
        tol = 1e-10 if dtype == torch.float64 else 1e-6
        out = sinkhorn(**tensors, eps=0.4, cost=cost, tol=tol, max_iter=3000)
        scale = max(1.0, value.abs().max().item())
        close(out.value, value, TOLERANCE[dtype][0] * scale)
        for found, expected in zip(torch.autograd.grad(out.value.sum(), leaves), grads, strict=True):
            close(found, expected, TOLERANCE[dtype][1])
        for index, solution in enumerate(solutions):
            close(out.plan()[index], solution.plan, TOLERANCE[dtype][1])
        a, b = torch.full((3, 9), 1 / 9, dtype=dtype), tensors["b"]
        torch.testing.assert_close((a * out.f).sum(1), (b * out.g).sum(1), atol=1e-4, rtol=1e-4)
    assert small == [True] * 4


@pytest.fixture
def small_only(small, monkeypatch):
    """The other solver fails."""
    from ecgot.kernels.ot import numba_solver

    def fail(*_):
        raise AssertionError("expected the small path to serve")

    for name in ("solve", "cost_vjp"):
        monkeypatch.setattr(numba_solver, name, fail)
    return small


def weighted_problem(dtype, mass=1.0):
    """Three problems of points that all weigh, the second far from the origin."""
    tensors = problem((3, 9, 7, 5), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, count, total in (("a", 9, mass), ("b", 7, 1 / mass)):
        weights = (torch.rand(3, count, generator=generator) + 0.1).to(dtype)
        tensors[name] = weights * total / weights.sum(1, keepdim=True)
    for name in "xy":
        tensors[name][1] += 4
    return tensors


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [{}, *MARGINALS], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_small_problems_of_every_cost_and_penalty_agree_with_the_oracle(cost, rho, dtype, small_only):
    if cost == "dot" and rho:
        rho = dict.fromkeys(rho, 5.0)  # costs are as negative as -16, which makes mass of nothing
    tensors = weighted_problem(dtype, mass=1.5 if rho else 1.0)
    if cost == "dot":
        tensors["x"][1] -= 4
    value, grads, solutions = oracle(tensors, eps=0.4, cost=cost, **rho)
    leaves = [tensors[name].requires_grad_() for name in "xy"]
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    out = sinkhorn(**tensors, eps=0.4, cost=cost, tol=tol, max_iter=3000, **rho)
    assert out.converged.all()
    close(out.value, value, TOLERANCE[dtype][0])
    for found, expected in zip(torch.autograd.grad(out.value.sum(), leaves), grads, strict=True):
        close(found, expected, TOLERANCE[dtype][1])
    for index, solution in enumerate(solutions):
        close(out.plan()[index], solution.plan.detach(), TOLERANCE[dtype][1])
        if rho:  # then the potentials are determined
            close(out.f[index], solution.f.detach(), 3 * TOLERANCE[dtype][1])
            close(out.g[index], solution.g.detach(), 3 * TOLERANCE[dtype][1])
    if not rho:
        sides = [(tensors[w] * p).sum(1) for w, p in (("a", out.f), ("b", out.g))]
        close(sides[0], sides[1].detach().double(), TOLERANCE[dtype][1])
    assert small_only == [True] * 2


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rho", [{}, *MARGINALS], ids=str)
def test_small_problems_of_a_given_cost_with_forbidden_pairs(rho, dtype, small_only):
    tensors = weighted_problem(dtype, mass=1.5 if rho else 1.0)
    a, b = tensors["a"], tensors["b"]
    cost = 3 * torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    far = (torch.arange(9)[:, None] * 7 / 9 - torch.arange(7)).abs() > 5
    cost = cost.masked_fill(far, math.inf).requires_grad_()
    expected = [
        reference.solve(*(t.detach().double() for t in one), 0.4, **rho, max_iter=5000, tol=1e-12)
        for one in zip(cost, a, b, strict=True)
    ]
    out = sinkhorn_from_cost(cost, eps=0.4, a=a, b=b, tol=1e-6, max_iter=3000, **rho)
    assert out.converged.all()
    close(out.value, torch.stack([each.value for each in expected]), 2e-5)
    (grad,) = torch.autograd.grad(out.value.sum(), cost)
    close(grad, torch.stack([each.plan for each in expected]), 1e-5)
    assert (grad[:, far] <= 1e-30).all()
    assert small_only == [True] * 2


@needs_numba
def test_a_small_batch_may_keep_the_marginals_of_some_problems(small_only):
    tensors = weighted_problem(torch.float64)
    rho = torch.tensor([0.5, math.inf, 2.0])
    out = sinkhorn(**tensors, eps=0.4, rho_x=rho, tol=1e-10, max_iter=3000)
    for index, each in enumerate(rho.tolist()):
        alone = {name: t[index : index + 1] for name, t in tensors.items()}
        value, _, (solution,) = oracle(alone, eps=0.4, cost="sqeuclidean", rho_x=each)
        close(out.value[index : index + 1], value, 1e-9)
        close(out.plan()[index], solution.plan.detach(), 1e-8)
    weighed = [(tensors[w][1] * p[1]).sum() for w, p in (("a", out.f), ("b", out.g))]
    close(weighed[0], weighed[1], 1e-9)
    assert small_only == [True]


@needs_numba
def test_points_that_coincide_have_no_gradient_of_their_distance(small_only):
    x = problem((1, 6, 6, 3), dtype=torch.float64)["x"].requires_grad_()
    sinkhorn(x, x.detach().clone(), eps=0.05, cost="euclidean", tol=1e-9).value.sum().backward()
    assert x.grad.isfinite().all()
    assert small_only == [True] * 2


@needs_numba
def test_given_costs_that_are_not_usual_take_the_other_way(small):
    for at, bad in (((0, 1, 2), math.nan), ((0, 1, 2), -math.inf), ((0, 1), math.inf)):
        cost = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3))
        cost[at] = bad
        cost.requires_grad_()
        value = sinkhorn_from_cost(cost, eps=0.3, max_iter=50, tol=0).value
        assert value.isfinite().tolist() == [False, True]
        (grad,) = torch.autograd.grad(value[1], cost)
        assert grad.isfinite().all()
    assert not any(small[::2])


@needs_numba
def test_what_is_not_usual_takes_the_other_way(small):
    tensors = problem((2, 6, 5, 3), weighted=True)
    assert sinkhorn(**tensors, eps=0.3).value.isfinite().all()  # points without weight
    assert small == [False]
    far = problem((1, 6, 5, 3))
    assert sinkhorn(far["x"], far["y"], eps=1e-5, max_iter=2).value.isfinite().all()  # potentials of many eps
    far["x"][0, 2, 1] = float("inf")
    assert sinkhorn(far["x"], far["y"], eps=0.3).value.isnan().all()
    assert small == [False] * 3


@needs_numba
def test_second_derivatives_of_small_problems(small):
    x = problem((1, 4, 3, 2), dtype=torch.float64)
    leaves = [x[name].requires_grad_() for name in "xy"]
    assert torch.autograd.gradgradcheck(
        lambda *xy: sinkhorn(*xy, eps=0.5, tol=1e-13, max_iter=5000).value, leaves, fast_mode=True
    )
    assert small[0]


@needs_numba
@pytest.mark.parametrize("rho", [{}, {"rho": 1.0}], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_a_small_problem_goes_on_from_given_potentials(cost, rho, small_only):
    """Also where clouds are moved apart: the potentials are those of the points' own costs."""
    tensors = problem((2, 9, 7, 4), dtype=torch.float64)
    tensors["x"] = tensors["x"] + (0 if cost == "dot" else 3)
    settings = {"eps": 0.05, "cost": cost, "tol": 0.0, **rho}
    half = sinkhorn(**tensors, **settings, max_iter=3)
    rest = sinkhorn(**tensors, **settings, max_iter=3, init=half.g)
    whole = sinkhorn(**tensors, **settings, max_iter=6)
    close(rest.value, whole.value, 1e-10)
    close(rest.f, whole.f, 1e-10)
    assert (half.f - whole.f).abs().max() > 1e-6  # three iterations are not six
