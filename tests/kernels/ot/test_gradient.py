"""The Triton kernels of the gradient in the points, against a reference in fp64 that shares no code."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ecgot.kernels.dispatch import INTERPRETED, recording
from ecgot.kernels.ot.problem import PlanWeights, Problem
from tests.kernels.ot.problems import BACKEND, COSTS, DEVICE

if BACKEND != "triton":
    pytest.skip("of the Triton kernels: set TRITON_INTERPRET=1 or use a GPU", allow_module_level=True)

from ecgot.kernels.ot import triton_gradient

HALVES = (torch.float16, torch.bfloat16)
# Largest error beyond the output's rounding, relative to the largest gradient.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-4, torch.bfloat16: 1e-4}


# --- reference ----------------------------------------------------------------------------------------------


def costs(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """[..., N, M] of x [..., N, D] and y [..., M, D]."""
    x, y = x[..., :, None, :], y[..., None, :, :]
    if cost == "dot":
        return -(x * y).sum(-1)
    if cost == "cosine":
        return 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    square = (x - y).square().sum(-1)
    return square if cost == "sqeuclidean" else square.sqrt()


def potentials(cost: Tensor, a: Tensor, b: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Of a plan after ten iterations, in fp64."""
    g = torch.zeros_like(b)
    scaled = cost / eps[:, None, None]
    for _ in range(10):
        f = -eps[:, None] * ((g / eps[:, None] + b.log())[:, None, :] - scaled).logsumexp(2)
        g = -eps[:, None] * ((f / eps[:, None] + a.log())[:, :, None] - scaled).logsumexp(1)
    return f, g


def expected(problem: Problem, given: PlanWeights, step: bool) -> tuple[Tensor, Tensor]:
    """By autograd through sum Q C with Q held fixed, in fp64; pairs one by one."""
    x, y = (t.double().requires_grad_() for t in (problem.x, problem.y))
    x_shift, y_shift = torch.zeros_like(x), torch.zeros_like(y)
    a, b = problem.a.double(), problem.b.double()
    total = x.new_zeros(())
    count = len(problem.b)
    single = [(i, i) for i in range(len(a))]
    for i, k in itertools.product(range(len(a)), range(count)) if problem.pairs else single:
        where = (i, k) if problem.pairs else i
        rows, columns = (a[i] >= 0).nonzero().squeeze(1), (b[k] >= 0).nonzero().squeeze(1)
        scale = given.scale[where].double()
        weight_a, weight_b = a[i, rows], b[k, columns]
        if not rows.numel() or not columns.numel() or not weight_a.sum() or not weight_b.sum():
            continue
        if scale == 0 and given.left is None:
            continue
        centred = [x[i, rows], y[k, columns]]
        if problem.x_centre is not None:
            centres = problem.x_centre[i].double(), problem.y_centre[k].double()
            centred = [points - centre for points, centre in zip(centred, centres, strict=True)]
            if step:
                x_shift[i, rows] += 2 * scale * weight_a[:, None] * (centres[0] - centres[1])
                y_shift[k, columns] -= 2 * scale * weight_b[:, None] * (centres[0] - centres[1])
        cost = costs(*centred, problem.cost)
        f, g = given.f[where].double()[rows], given.g[where].double()[columns]
        index = where if not problem.pairs else i * count + k
        kernel = ((f[:, None] + g[None, :] - cost.detach()) / problem.eps[index].double()).exp()
        weights = scale * weight_a[:, None] * weight_b[None, :]
        if given.left is not None:
            left, right = given.left[i].double()[rows], given.right[i].double()[columns]
            weights = weights + left[:, None] * weight_b[None, :] + weight_a[:, None] * right[None, :]
        total = total + (kernel * weights * cost).sum()
    grads = torch.autograd.grad(total, (x, y), allow_unused=True) if total.requires_grad else (None, None)
    return tuple(
        shift.detach() + (0 if grad is None else grad)
        for grad, shift in zip(grads, (x_shift, y_shift), strict=True)
    )


# --- problems -----------------------------------------------------------------------------------------------


def spread(generator: torch.Generator, *size: int) -> Tensor:
    return torch.rand(*size, generator=generator, dtype=torch.float64) - 0.4


def clustered(generator: torch.Generator, *size: int) -> Tensor:
    """Far from the origin, and close together."""
    return 1.5 + 0.05 * torch.randn(*size, generator=generator, dtype=torch.float64)


def problem(
    shape: tuple[int, int, int, int],
    cost: str,
    dtype: torch.dtype,
    *,
    masked: bool = True,
    implicit: bool = False,
    points: Callable[..., Tensor] = spread,
    count_y: int | None = None,
) -> tuple[Problem, PlanWeights]:
    """Random clouds, some points without weight, masked ones NaN, and what ten iterations make of them.

    count_y: K of all pairs; None for single problems.
    """
    batch, n, m, d = shape
    pairs = count_y is not None
    generator = torch.Generator().manual_seed(sum(shape))
    sides = []
    for count, size in ((batch, n), (count_y or batch, m)):
        cloud = points(generator, count, size, d).to(dtype)
        weight = torch.rand(count, size, generator=generator) + 0.1
        weight[:, : size // 5] = 0
        weight /= weight.sum(1, keepdim=True)
        centre = (weight[:, :, None] * cloud.float()).sum(1)
        if masked and size > 3:
            weight[:, size // 2] = -1
            cloud[:, size // 2] = math.nan
        sides.append((cloud, weight, centre))
    (x, a, x_centre), (y, b, y_centre) = sides
    if cost == "euclidean":
        middle = (x_centre.mean(0) + y_centre.mean(0)) / 2
        x_centre, y_centre = (middle.expand_as(t).contiguous() for t in (x_centre, y_centre))
    centred = cost in ("sqeuclidean", "euclidean")
    eps = 0.3 + 0.1 * torch.rand(batch * (count_y or 1), generator=generator)
    of_x, of_y = (t.nan_to_num(1.0).double() for t in (x, y))
    if centred:
        of_x, of_y = of_x - x_centre[:, None, :], of_y - y_centre[:, None, :]
    each = lambda t: t.repeat_interleave(count_y, 0) if pairs else t  # noqa: E731
    every = lambda t: t.repeat(batch, *(1,) * (t.dim() - 1)) if pairs else t  # noqa: E731
    f, g = potentials(
        costs(each(of_x), every(of_y), cost),
        each(a).clamp_min(0).double(),
        every(b).clamp_min(0).double(),
        eps,
    )
    outer = (batch, count_y) if pairs else (batch,)
    f, g = f.float().view(*outer, n), g.float().view(*outer, m)
    scale = torch.randn(outer, generator=generator)
    given = PlanWeights(f, g, scale)
    if implicit:
        given.left = torch.randn(f.shape, generator=generator) * (a >= 0) / n
        given.right = torch.randn(g.shape, generator=generator) * (b >= 0) / m
    tensors = (x, y, a, b, x_centre if centred else None, y_centre if centred else None, eps)
    tensors = [t if t is None else t.to(DEVICE) for t in tensors]
    for name, value in vars(given).items():
        setattr(given, name, value if value is None else value.to(DEVICE))
    return Problem(*tensors, cost, pairs=pairs), given


def check(problem: Problem, given: PlanWeights, step: bool, tolerance: float | None = None) -> None:
    found = triton_gradient.cost_vjp(problem, given, step=step)
    step = step and problem.cost == "sqeuclidean"
    for grad, wanted in zip(found, expected(problem, given, step), strict=True):
        assert grad.dtype == problem.x.dtype
        # Half a unit in the last place; the interpreter cuts bf16 off instead of rounding it.
        units = 1.0 if INTERPRETED and grad.dtype == torch.bfloat16 else 0.5
        rounding = units * torch.finfo(grad.dtype).eps * wanted.abs()
        excess = ((grad.double() - wanted).abs() - rounding).max() / wanted.abs().max()
        assert excess <= (tolerance or TOLERANCE[grad.dtype]), float(excess)


def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems, too, go to the kernel of tiles, whatever the rule that chooses."""
    monkeypatch.setattr(triton_gradient, "_whole", triton_gradient._tiled)


# --- one program per problem --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("step", [False, True])
def test_whole_problems(dtype, cost, implicit, step, poisoned_empty):
    check(*problem((2, 20, 33, 19), cost, dtype, implicit=implicit), step)


@pytest.mark.parametrize("d", [1, 3, 15, 16, 17])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_dimensions_around_a_block(d, dtype, cost, poisoned_empty):
    if cost == "cosine" and d == 1:
        pytest.skip("the cosine of two numbers is 1 or -1")
    close = cost == "euclidean" and d == 1  # points so near that their distance is mostly rounding
    check(*problem((2, 9, 5, d), cost, dtype, masked=False), True, 1e-3 if close else None)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 1, 9, 40), (1, 130, 3, 5), (1, 100, 120, 33)])
def test_sizes(shape, poisoned_empty):
    check(*problem(shape, "sqeuclidean", torch.float32), True)
    check(*problem(shape, "cosine", torch.bfloat16), False)


def test_strided_points_and_no_dimension():
    single, given = problem((2, 9, 7, 6), "sqeuclidean", torch.float16)
    wanted = triton_gradient.cost_vjp(single, given, step=True)
    turned = replace(single, x=single.x.mT.contiguous().mT, y=single.y.mT.contiguous().mT)
    for found, grad in zip(triton_gradient.cost_vjp(turned, given, step=True), wanted, strict=True):
        assert torch.equal(found, grad)
    flat = replace(single, x=single.x[:, :, :0], y=single.y[:, :, :0])
    assert [grad.shape for grad in triton_gradient.cost_vjp(flat, given, step=True)] == [(2, 9, 0), (2, 7, 0)]


def test_the_step_between_the_centres_belongs_to_kept_marginals():
    single, given = problem((2, 9, 7, 6), "sqeuclidean", torch.float32)
    for other in (
        replace(single, rho_x=single.eps, rho_y=single.eps),
        replace(single, rho_y=single.eps),
        replace(single, cost="euclidean"),
        replace(single, x_centre=None, y_centre=None),
    ):
        with_step, without = (triton_gradient.cost_vjp(other, given, step=step) for step in (True, False))
        assert all(map(torch.equal, with_step, without))
    with_step, without = (triton_gradient.cost_vjp(single, given, step=step) for step in (True, False))
    assert not any(map(torch.equal, with_step, without))


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tiled", [False, True])
def test_nan_stays_in_its_problem(cost, dtype, tiled, monkeypatch):
    if tiled:
        in_tiles(monkeypatch)
    single, given = problem((4, 9, 7, 6), cost, dtype)
    wanted = triton_gradient.cost_vjp(single, given, step=True)
    single.x[1, 3] = math.nan
    given.f[1], given.g[1] = math.nan, math.nan
    single.x[2], given.f[2], given.scale[2] = math.nan, math.nan, 0.0
    single.a[3] = -1.0  # a cloud without points, which holds NaN
    single.x[3] = math.nan
    if single.x_centre is not None:
        single.x_centre[1:] = math.nan
    found = triton_gradient.cost_vjp(single, given, step=True)
    for grad, old in zip(found, wanted, strict=True):
        assert torch.equal(grad[0], old[0])
        assert grad[1].isnan().any()
        assert (grad[2:] == 0).all()
    for grad, weight in zip(found, (single.a, single.b), strict=True):
        assert (grad[weight < 0] == 0).all()


# --- tiles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("implicit", [False, True])
def test_tiles(dtype, cost, implicit, monkeypatch, poisoned_empty):
    in_tiles(monkeypatch)
    check(*problem((2, 70, 100, 19), cost, dtype, implicit=implicit), True)
    check(*problem((1, 9, 7, 3), cost, dtype, implicit=implicit), False)


def test_more_coordinates_than_one_program_makes(monkeypatch, poisoned_empty):
    in_tiles(monkeypatch)
    check(*problem((1, 9, 7, 131), "sqeuclidean", torch.float32), True)


# --- pairs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("step", [False, True])
def test_pairs(dtype, cost, step, poisoned_empty):
    check(*problem((3, 20, 9, 7), cost, dtype, count_y=4), step)


@pytest.mark.parametrize("cells", [1, 600, 1500])
def test_pairs_in_chunks(cells, monkeypatch, poisoned_empty):
    several, given = problem((4, 20, 9, 7), "sqeuclidean", torch.float16, count_y=5)
    wanted = triton_gradient.cost_vjp(several, given, step=True)
    monkeypatch.setattr(triton_gradient, "MAX_CELLS", cells)
    shapes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **how: shapes.append(size) or empty(*size, **how))
    found = triton_gradient.cost_vjp(several, given, step=True)
    assert max(size[1] * size[2] for size in shapes if len(size) == 3 and size[0] == 2) <= max(cells, 180)
    for grad, old in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, old, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_nan_stays_in_its_pairs(cost, dtype):
    several, given = problem((3, 9, 7, 6), cost, dtype, count_y=4)
    given.scale[1] = 0.0
    given.scale[:, 2] = 0.0
    given.scale[2, 3] = 0.0
    wanted = triton_gradient.cost_vjp(several, given, step=True)
    x, y = several.x, several.y
    for points, weights, centre, cloud in (
        (x, several.a, several.x_centre, 1),
        (x, several.a, several.x_centre, 2),
        (y, several.b, several.y_centre, 2),
        (y, several.b, several.y_centre, 3),
    ):
        points[cloud, 0] = math.nan
        assert weights[cloud, 0] >= 0
        if centre is not None:
            centre[cloud] = math.nan
    for i, k in itertools.product(range(3), range(4)):
        if i > 0 or k > 1:
            given.f[i, k], given.g[i, k] = math.nan, math.nan
    grad_x, grad_y = triton_gradient.cost_vjp(several, given, step=True)
    # Pairs with a gradient and NaN: (0, 3), (2, 0) and (2, 1); so every cloud of these.
    assert grad_x[0].isnan().any()
    assert (grad_x[1] == 0).all()
    assert grad_x[2].isnan().any()
    assert all(grad_y[cloud].isnan().any() for cloud in (0, 1, 3))
    assert (grad_y[2] == 0).all()
    # Without their gradients nothing is left of them.
    given.scale[2], given.scale[0, 3] = 0.0, 0.0
    grad_x, grad_y = triton_gradient.cost_vjp(several, given, step=True)
    assert grad_x.isfinite().all()
    assert grad_y.isfinite().all()
    assert (grad_x[1:] == 0).all()
    assert (grad_y[2:] == 0).all()
    assert (grad_x[0] != 0).any()
    assert (grad_x[several.a < 0] == 0).all()
    assert wanted[0].isfinite().all()


def test_the_same_input_gives_the_same_bits():
    for count_y in (None, 3):
        case = problem((2, 20, 9, 7), "sqeuclidean", torch.bfloat16, count_y=count_y)
        once, again = (triton_gradient.cost_vjp(*case, step=True) for _ in range(2))
        assert all(map(torch.equal, once, again))


# --- precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cost", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("kind", ["whole", "tiles", "pairs"])
def test_clustered_clouds(dtype, cost, kind, monkeypatch):
    if kind == "tiles":
        in_tiles(monkeypatch)
    count_y = 2 if kind == "pairs" else None
    # The interpreter cuts off bf16 parts, which loses a bit of each.
    check(*problem((2, 40, 30, 24), cost, dtype, points=clustered, count_y=count_y), False, 3e-4)


def cut(values: Tensor, bits: int) -> Tensor:
    """fp32 values with their last ``bits`` cut off, as TF32 does with 13."""
    return (values.view(torch.int32) >> bits << bits).view(torch.float32)


def test_a_single_tf32_product_would_be_too_coarse():
    """What the bf16 parts are for: sum_j Q_ij (x_i - y_j) of clusters, with a plan cut to TF32's bits."""
    generator = torch.Generator().manual_seed(0)
    x, y = (clustered(generator, n, 24).bfloat16().float() for n in (40, 30))
    plan = torch.rand(40, 30, generator=generator)
    wanted = plan.double().sum(1, keepdim=True) * x - plan.double() @ y.double()

    def error(sums: Tensor, pulled: Tensor) -> float:
        grad = sums.double()[:, None] * x - pulled.double()
        return float((grad - wanted).abs().max() / wanted.abs().max())

    assert error(plan.sum(1), cut(plan, 13) @ y) > 2e-3
    parts = triton_gradient.split(plan, 2)
    pulled = sum(triton_gradient.bf16_product(part, y.bfloat16()) for part in parts)
    assert error(sum(part.float() for part in parts).sum(1), pulled) < 1e-4
    three = triton_gradient.split(plan, 3)
    assert torch.equal(sum(part.double() for part in three), plan.double())


def launches(case: tuple[Problem, PlanWeights], step: bool = True) -> list[tuple[object, dict]]:
    """Kernels and arguments."""
    seen = []
    with recording(lambda kernel, grid, **arguments: seen.append((kernel, arguments))):
        triton_gradient.cost_vjp(*case, step=step)
    return seen


def cases() -> Iterator[tuple[tuple[Problem, PlanWeights], bool]]:
    """Problems of every kind, and whether TF32 may appear."""
    for dtype, cost in itertools.product(TOLERANCE, COSTS):
        for shape, implicit in itertools.product([(2, 9, 40, 24), (1, 129, 129, 5)], (False, True)):
            case, given = problem(shape, cost, dtype, implicit=implicit)
            for precision in ("fp32", "tf32"):
                yield (
                    (replace(case, precision=precision), given),
                    precision == "tf32" and dtype == torch.float32,
                )
        yield problem((2, 9, 40, 24), cost, dtype, count_y=2), False


def test_launches_are_few_precise_and_among_those_that_compile():
    compiled = {}
    for each in triton_gradient.compile_cases(False):
        compiled.setdefault(each.kernel, []).append(each)
    for (single, given), rounded in cases():
        seen = launches((single, given))
        assert len(seen) == (2 if single.size == (129, 129) else 1)
        for kernel, arguments in seen:
            assert (arguments["PRECISION"] == "tf32") == rounded
            assert any(
                all(arguments.get(name, 1) == value for name, value in each.constants.items())
                and each.options["num_warps"] == arguments["num_warps"]
                for each in compiled[kernel]
            ), arguments
