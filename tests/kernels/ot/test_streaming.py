"""The streaming kernels against the fp64 reference, and the iteration that they share with torch.

The kernels are called directly, so that small problems, which no user's call would stream, test them too.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ecgot.kernels import sinkhorn
from ecgot.kernels.ot import iteration, reference, torch_solver
from ecgot.kernels.ot.iteration import annealing, is_check_due, iterate
from ecgot.kernels.ot.problem import ABSENT, Problem, SolverSettings
from tests.kernels.ot.problems import BACKEND, COSTS, DEVICE, MARGINALS, problem

streaming = pytest.importorskip("ecgot.kernels.ot.triton_streaming")
kernels_run = pytest.mark.skipif(BACKEND != "triton", reason="needs TRITON_INTERPRET=1 or a GPU")

ONCE = SolverSettings(max_iter=1, tol=0.0)


def as_problem(tensors: dict[str, Tensor], cost: str, eps: float, **rest: Any) -> Problem:
    """The problem that ``sinkhorn`` would solve, centred on each cloud's mean where that costs nothing."""
    x, y = tensors["x"], tensors["y"]
    weights, centres = {}, {}
    for points, mask, weight in (("x", "x_mask", "a"), ("y", "y_mask", "b")):
        keep = tensors.get(mask, torch.ones_like(tensors[points][:, :, 0], dtype=torch.bool))
        given = tensors.get(weight, keep / keep.sum(1, keepdim=True)).float()
        weights[weight] = torch.where(keep, given, ABSENT)
        centres[weight] = torch.where(keep[:, :, None], tensors[points].float(), 0.0).mean(1)
    centred = cost == "sqeuclidean"
    return Problem(
        x,
        y,
        weights["a"],
        weights["b"],
        centres["a"] if centred else None,
        centres["b"] if centred else None,
        torch.full((len(x),), eps, device=x.device),
        cost,
        **{
            k: v if isinstance(v, str) else torch.full((len(x),), v, device=x.device) for k, v in rest.items()
        },
    )


def in_fp64(given: Problem) -> Problem:
    """The same problem for the solver in torch."""
    wide = [None if t is None else t.double() for t in given.flatten()[0]]
    return Problem.unflatten(wide, given.flatten()[1])


def potentials_of_the_reference(
    given: Problem, **settings: Any
) -> list[tuple[reference.ReferenceSolution, Tensor, Tensor]]:
    """Each problem solved alone by the reference, with where its points are."""
    found = []
    for index in range(len(given.a)):
        keep_x, keep_y = (given.a[index] >= 0).cpu(), (given.b[index] >= 0).cpu()
        x, y = given.x[index].cpu().double()[keep_x], given.y[index].cpu().double()[keep_y]
        if given.x_centre is not None:
            x, y = x - given.x_centre[index].cpu().double(), y - given.y_centre[index].cpu().double()
        a, b = given.a[index].cpu().double()[keep_x], given.b[index].cpu().double()[keep_y]
        cost = reference.cost_matrix(x, y, given.cost)
        found.append((reference.solve(cost, a, b, given.eps[index].item(), **settings), keep_x, keep_y))
    return found


def assert_one_iteration_is_the_reference(given: Problem, tolerance: float) -> None:
    """f, g and marginal error after one iteration, as a convergence would hide what an update gets wrong."""
    f, g, error, iterations = (t.cpu() for t in streaming.solve(given, None, ONCE))
    expected = potentials_of_the_reference(given, max_iter=1, tol=0.0)
    for index, (solution, keep_x, keep_y) in enumerate(expected):
        close = {"atol": tolerance, "rtol": tolerance}
        torch.testing.assert_close(f[index].double()[keep_x], solution.f, **close)
        torch.testing.assert_close(g[index].double()[keep_y], solution.g, **close)
        assert error[index].item() == pytest.approx(solution.marginal_error, abs=10 * tolerance)
        assert f[index][~keep_x].abs().sum() == 0
        assert g[index][~keep_y].abs().sum() == 0
    assert iterations.tolist() == [1] * len(given.a)


# --- the kernels --------------------------------------------------------------------------------------------


@kernels_run
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("d", [1, 3, 15, 16, 17])
def test_few_coordinates(d, cost, poisoned_empty):
    """Padded to 16: a product needs that many."""
    given = as_problem(problem((2, 70, 65, d), masked=True, weighted=True), cost, 0.2)
    assert_one_iteration_is_the_reference(given, 3e-6)


@kernels_run
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("shape", [(1, 1, 300, 4), (3, 300, 20, 33), (1, 90, 40, 130)], ids=str)
def test_sizes_and_parts_of_the_columns(shape, cost, poisoned_empty):
    """More than one part of a side, other parts than blocks, and coordinates in chunks."""
    given = as_problem(problem(shape, masked=True, weighted=True), cost, 0.2)
    assert_one_iteration_is_the_reference(given, 1e-5)


@kernels_run
@pytest.mark.parametrize("d", [5, 128, 130])
def test_large_blocks(d, poisoned_empty):
    assert streaming.configuration(513, 520, d, "dot")["BLOCK_N"] == 128
    given = as_problem(problem((1, 513, 520, d), weighted=True), "sqeuclidean", 0.5)
    assert_one_iteration_is_the_reference(given, 2e-5)


@kernels_run
def test_many_parts_and_blocks_are_merged_in_chunks(monkeypatch, poisoned_empty):
    """Chunks of two stand for those of 16 parts and 128 blocks, which only large clouds fill."""
    monkeypatch.setitem(streaming.MERGE, "BLOCK_S", 2)
    monkeypatch.setitem(streaming.SETTLE, "BLOCK_N", 2)
    given = as_problem(problem((1, 300, 310, 2), masked=True, weighted=True), "euclidean", 0.2)
    assert_one_iteration_is_the_reference(given, 1e-5)


@kernels_run
@pytest.mark.parametrize("rho", [{}, *MARGINALS], ids=str)
@pytest.mark.parametrize("scaling", [0.0, 0.5])
def test_a_solution_is_that_of_torch_in_fp64(rho, scaling, poisoned_empty):
    """Also the iterations of each problem, the annealing and the start from a potential."""
    tensors = problem((3, 70, 66, 5), masked=True, weighted=True)
    given = as_problem(tensors, "sqeuclidean", 0.3, **rho)
    given = replace(given, eps=torch.tensor([0.3, 0.3, 0.1], device=DEVICE))  # the last takes longest
    given.a[1] = given.a[1].clamp_max(0)  # without mass: nothing to solve
    init = torch.linspace(-0.2, 0.2, 66, device=DEVICE).expand(3, 66)
    settings = SolverSettings(max_iter=60, tol=1e-4, scaling=scaling)
    wide = in_fp64(given)
    expected = iterate(wide, torch_solver.stored(wide), init.double(), settings)
    found = streaming.solve(given, init, settings)
    assert found[3].tolist() == expected[3].tolist()
    assert len({*found[3].tolist()}) == 3
    for actual, wanted in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=2e-5, rtol=1e-5)


@kernels_run
def test_nan_stays_in_its_problem():
    tensors = problem((3, 70, 66, 5), weighted=True)
    settings = SolverSettings(max_iter=5, tol=1e-4)
    clean = streaming.solve(as_problem(tensors, "dot", 0.3), None, settings)
    for name, value in (("x", math.nan), ("y", math.inf)):
        spoilt = tensors | {name: tensors[name].clone()}
        spoilt[name][1, -1, 2] = value  # the last points have weight
        found = streaming.solve(as_problem(spoilt, "dot", 0.3), None, settings)
        assert found[2].isfinite().tolist() == [True, False, True]
        assert found[3][1] == 1  # not going on
        for actual, wanted in zip(found, clean, strict=True):
            assert (actual[[0, 2]] == wanted[[0, 2]]).all()


@kernels_run
@pytest.mark.parametrize("far", [1e9, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("cost", ["sqeuclidean", "dot"])
def test_a_point_without_weight_may_be_anywhere(far, cost):
    """It shares a tile, and with it a scale, with others."""
    tensors = problem((1, 70, 66, 5), weighted=True)
    settings = SolverSettings(max_iter=4, tol=0.0)
    given = as_problem(tensors, cost, 0.3)
    near = streaming.solve(given, None, settings)
    for points, weights in ((given.x, given.a), (given.y, given.b)):
        assert weights[0, 0] == 0
        points[:, 0] = far
    found = streaming.solve(given, None, settings)
    for actual, wanted in zip(found[:2], near[:2], strict=True):
        torch.testing.assert_close(actual[:, 1:], wanted[:, 1:], atol=0, rtol=0)
    torch.testing.assert_close(found[2], near[2])


@kernels_run
@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_the_unit_of_the_coordinates_does_not_matter(scale):
    """Halves have five bits of exponent: powers of two bring any coordinate into their range."""
    given = as_problem(problem((1, 70, 66, 5), weighted=True), "sqeuclidean", 0.3)
    expected = streaming.solve(given, None, ONCE)
    tensors, values = given.flatten()
    x, y, a, b, x_centre, y_centre, eps, *rhos = tensors
    x, y, x_centre, y_centre = (t * scale for t in (x, y, x_centre, y_centre))
    scaled = Problem.unflatten((x, y, a, b, x_centre, y_centre, eps * scale * scale, *rhos), values)
    found = streaming.solve(scaled, None, ONCE)
    torch.testing.assert_close(found[0] / scale / scale, expected[0], atol=3e-6, rtol=1e-6)
    torch.testing.assert_close(found[2], expected[2], atol=1e-6, rtol=0)


@kernels_run
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_products_are_as_precise_as_is_asked(dtype):
    """Errors of a potential by the bits of a product: 24 for fp32 and for halves, which are exact; or 11."""
    tensors = problem((1, 70, 66, 64), dtype=dtype)
    errors = {}
    for precision in ("fp32", "tf32"):
        given = as_problem(tensors, "dot", 0.05, precision=precision)
        wide = in_fp64(given)
        expected = iterate(wide, torch_solver.stored(wide), None, ONCE)
        f = streaming.solve(given, None, ONCE)[0]
        errors[precision] = (f - expected[0]).abs().max().item()
        assert streaming.parts(given) == (2 if precision == "fp32" and dtype == torch.float32 else 1)
    assert errors["fp32"] < 2e-6
    if dtype == torch.float32:
        assert 2e-5 < errors["tf32"] < 2e-3
    else:
        assert errors["tf32"] == errors["fp32"]


@kernels_run
def test_bf16_points_are_exact():
    """Their exponents range further than those of the halves that enter products."""
    tensors = problem((1, 70, 66, 20), weighted=True)
    wide_range = torch.logspace(-12, 0, 20, base=2, device=DEVICE)
    tensors |= {name: (tensors[name] * wide_range).to(torch.bfloat16) for name in "xy"}
    assert_one_iteration_is_the_reference(as_problem(tensors, "dot", 0.1), 2e-6)


@kernels_run
def test_results_depend_on_the_problem_alone():
    tensors = problem((3, 300, 140, 5), weighted=True)
    settings = SolverSettings(max_iter=3, tol=1e-9)
    together = streaming.solve(as_problem(tensors, "euclidean", 0.3), None, settings)
    again = streaming.solve(as_problem(tensors, "euclidean", 0.3), None, settings)
    second = {name: t[1:2] for name, t in tensors.items()}
    alone = streaming.solve(as_problem(second, "euclidean", 0.3), None, settings)
    for whole, same, one in zip(together, again, alone, strict=True):
        assert (whole == same).all()
        assert (whole[1] == one[0]).all()


@kernels_run
def test_a_finished_problem_is_left_alone():
    """Programs of it return at once; f has two buffers, and the one that counts stays."""
    given = as_problem(problem((3, 70, 66, 5), weighted=True), "sqeuclidean", 0.5)
    once = torch.ones_like(given.eps)
    updates = streaming.StreamingUpdates(given, None, once, 1e-3)
    updates.start()
    while updates.going.any():
        updates.advance()
    before = [t.clone() for t in updates.result()]
    for _ in range(3):
        updates.advance()
        for now, then in zip(updates.result(), before, strict=True):
            assert (now == then).all()
    assert before[3].min() > 1


@kernels_run
def test_strided_points_and_weights():
    tensors = problem((2, 70, 66, 6), weighted=True)
    plain = as_problem(tensors, "sqeuclidean", 0.3)
    x, y, a, b, *rest = plain.flatten()[0]
    x, a = x.transpose(0, 2).contiguous().transpose(0, 2), a.T.contiguous().T
    y, b = y.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([b, b], 2)[:, :, 0]
    strided = Problem.unflatten((x, y, a, b, *rest), plain.flatten()[1])
    found, expected = (streaming.solve(given, None, ONCE) for given in (strided, plain))
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual == wanted).all()


@kernels_run
def test_gradients_of_a_problem_that_streams():
    tensors = problem((2, 140, 70, 3), masked=True, weighted=True)
    leaves = {
        k: t.detach().cpu().double().requires_grad_() if k in "xy" else t.cpu() for k, t in tensors.items()
    }
    solutions = reference.sinkhorn(**leaves, eps=0.3, cost="cosine", rho_x=0.4, rho_y=0.4)
    value = torch.stack([s.value for s in solutions])
    expected = torch.autograd.grad(value.sum(), (leaves["x"], leaves["y"]))
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.3, cost="cosine", rho=0.4, tol=1e-6, scaling=0.5)
    assert out.backend == "triton-streaming"
    assert out.converged.all()
    torch.testing.assert_close(out.value.cpu().double(), value, atol=3e-5, rtol=0)
    for found, wanted in zip(torch.autograd.grad(out.value.sum(), (x, y)), expected, strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted, atol=2e-4, rtol=2e-4)


# --- launches -----------------------------------------------------------------------------------------------


def launches(monkeypatch: pytest.MonkeyPatch, n: int, run: Callable[[Any], None]) -> list[tuple[str, int]]:
    """The kernels that ``run`` starts on a problem of n and n points in 64 dimensions, and their programs."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(
        streaming, "launch", lambda kernel, grid, **_: found.append((kernel.fn.__name__, math.prod(grid)))
    )
    x, weight = torch.zeros(1, n, 64), torch.full((1, n), 1 / n)
    given = Problem(x, x, weight, weight, None, None, torch.ones(1), "dot")
    updates = streaming.StreamingUpdates(given, None, torch.ones(1), 1e-3)
    found.clear()
    run(updates)
    return found


def test_ten_thousand_points_fill_a_gpu(monkeypatch):
    """264: two programs for each of the 132 multiprocessors of an H100."""
    found = launches(monkeypatch, 10_000, lambda updates: updates.start())
    assert dict(found)["_softmin_kernel"] >= 264


def test_an_iteration_is_five_launches(monkeypatch):
    found = launches(monkeypatch, 700, lambda updates: updates.advance())
    half = ["_softmin_kernel", "_softmin_merge_kernel"]
    assert [name for name, _ in found] == [*half, *half, "_softmin_settle_kernel"]


# --- the iteration, in torch --------------------------------------------------------------------------------


def counted(given: Problem, settings: SolverSettings) -> tuple[Any, list[str]]:
    """The solution in torch, and the updates that it took."""
    softmins, calls = torch_solver.stored(given), []

    def noting(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(potential: Tensor, temperature: Tensor | None) -> Tensor:
            calls.append(name if temperature is None else f"hot {name}")
            return function(potential, temperature)

        return call

    noted = iteration.Softmins(noting("rows", softmins.rows), noting("columns", softmins.columns))
    return iterate(given, noted, None, settings), calls


def test_a_cuda_graph_records_a_bounded_number_of_iterations(monkeypatch):
    given = in_fp64(as_problem(problem((2, 9, 7, 3)), "sqeuclidean", 0.01))
    monkeypatch.setattr(iteration, "is_capturing", lambda tensor: True)
    monkeypatch.setattr(iteration, "MAX_CAPTURED", 6)
    (f, g, error, iterations), calls = counted(given, SolverSettings(1000, 1e-12, 0.999))
    assert calls.count("columns") == 6
    assert calls.count("hot columns") == 6
    assert (iterations >= 7).all()
    marginal = given.plan(f, g).sum(2)
    torch.testing.assert_close(error, (marginal - given.a).abs().sum(1))  # what is not converged says so
    assert (error > 1e-12).all()


def test_a_cuda_graph_runs_on_after_convergence_and_changes_nothing(monkeypatch):
    given = in_fp64(as_problem(problem((2, 9, 7, 3)), "sqeuclidean", 0.5))
    settings = SolverSettings(1000, 1e-5)
    expected, few = counted(given, settings)
    monkeypatch.setattr(iteration, "is_capturing", lambda tensor: True)
    found, calls = counted(given, settings)
    assert calls.count("columns") == iteration.MAX_CAPTURED > few.count("columns")
    for actual, wanted in zip(found, expected, strict=True):
        assert (actual == wanted).all()


def test_conjugate_gradients_in_a_cuda_graph_are_bounded(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    matrix, rhs = root @ root.T, torch.randn(1, 40, generator=generator, dtype=torch.float64)
    calls = []

    def matvec(v: Tensor) -> Tensor:
        calls.append(1)
        return v @ matrix

    arguments = (matvec, rhs, torch.zeros_like(rhs), matrix.diagonal()[None], 500, 1e-10)
    solution = torch_solver.conjugate_gradients(*arguments)
    torch.testing.assert_close(solution @ matrix, rhs)
    assert len(calls) > 30
    calls.clear()
    monkeypatch.setattr(iteration, "is_capturing", lambda tensor: True)
    monkeypatch.setattr(iteration, "MAX_CAPTURED", 30)
    torch_solver.conjugate_gradients(*arguments)
    assert len(calls) == 30


@pytest.mark.parametrize("capturing", [False, True])
def test_when_to_look_for_convergence(capturing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    looks = [number for number in range(1, 65) if is_check_due(on_gpu, number)]
    assert looks == ([] if capturing else [16, 32, 48, 64])
    assert is_check_due(torch.zeros(1), 1)  # looking is free


def test_annealing_goes_down_to_one(monkeypatch):
    tensors = problem((3, 6, 5, 2), dtype=torch.float64)
    given = in_fp64(as_problem(tensors, "sqeuclidean", 0.01))
    temperatures = annealing(given, SolverSettings(1, 0.0, 0.5))
    expected, rows = iteration.start_temperature(given), []
    for _ in range(len(temperatures)):
        rows.append(expected)
        expected = (expected * 0.5).clamp_min(1.0)
    torch.testing.assert_close(temperatures, torch.stack(rows), atol=0, rtol=1e-12)
    assert (temperatures[-2] > 1).any()
    assert (temperatures[-1] == 1).all()
    assert (annealing(given, ONCE) == 1).all()
    monkeypatch.setattr(iteration, "is_capturing", lambda tensor: True)
    recorded = annealing(given, SolverSettings(1, 0.0, 0.999))
    assert 50 < len(recorded) <= iteration.MAX_CAPTURED + 1
    assert (recorded[-1] == 1).all()
