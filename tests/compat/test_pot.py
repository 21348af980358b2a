"""POT's functions beside POT itself: plans, values, potentials and gradients, of arrays and of tensors."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

import ecgot.compat.pot as compat
from ecgot.kernels import SinkhornWarning

N, M, REG = 7, 10, 0.1
EXACT = {"numItermax": 20_000, "stopThr": 1e-13}
LONG = {"max_iter": 20_000, "tol": 1e-13}


def problem(mass: float = 1.0, b_mass: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a [N], b [M] and costs [N, M]."""
    draw = np.random.default_rng(0)
    a, b = 0.2 + draw.random(N), 0.2 + draw.random(M)
    return mass * a / a.sum(), (b_mass or mass) * b / b.sum(), draw.random((N, M))


def tensors(*arrays: np.ndarray, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.tensor(array, dtype=dtype, requires_grad=True) for array in arrays]


def close(found: Any, wanted: Any, atol: float = 1e-9) -> None:
    assert type(found) is type(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    np.testing.assert_allclose(_array(found), _array(wanted), rtol=0, atol=atol)


def _array(value: Any) -> np.ndarray:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def gauge(u: Any, v: Any) -> np.ndarray:
    """What does not depend on the constant that potentials may exchange."""
    return _array(u)[:, None] + _array(v)[None]


# --- signatures ---------------------------------------------------------------------------------------------

PAIRS = [
    *(
        (getattr(compat, name), getattr(ot, name))
        for name in compat.__all__
        if callable(getattr(compat, name))
    ),
    *(
        (getattr(compat.batch, name), getattr(ot.batch, name))
        for name in ("solve_batch", "solve_sample_batch", "dist_batch", "loss_linear_batch")
    ),
    (compat.batch.loss_linear_samples_batch, ot.batch.loss_linear_samples_batch),
]


@pytest.mark.parametrize(("ours", "peer"), PAIRS, ids=lambda function: function.__name__)
def test_signatures_are_the_same(ours: Callable[..., Any], peer: Callable[..., Any]) -> None:
    found, wanted = (
        [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]
        for function in (ours, peer)
    )
    assert found == wanted


def test_what_is_missing_says_so() -> None:
    with pytest.raises(AttributeError, match=r"ecgot\.compat\.pot: expected one of .*sinkhorn2.*, got emd2"):
        compat.emd2  # noqa: B018
    modules = (compat.batch, compat.bregman, compat.solvers, compat.unbalanced, compat.utils)
    for module in modules:
        says = rf"{module.__name__}: expected one of .*{module.__all__[-1]} .*POT itself.*, got missing$"
        with pytest.raises(AttributeError, match=says):
            module.missing  # noqa: B018
        assert not hasattr(module, "missing")


# --- sinkhorn and sinkhorn2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"])
@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_sinkhorn_of_arrays(mass: float, method: str) -> None:
    a, b, cost = problem(mass)
    plan, log = compat.sinkhorn(a, b, cost, REG, method=method, log=True, **EXACT)
    wanted = ot.sinkhorn(a, b, cost, REG, method=method, **EXACT)
    close(plan, wanted)
    np.testing.assert_allclose(log["u"][:, None] * np.exp(-cost / REG) * log["v"], wanted, atol=1e-9)
    np.testing.assert_allclose(np.exp(gauge(log["log_u"], log["log_v"]) - cost / REG), wanted, atol=1e-9)
    close(compat.sinkhorn2(a, b, cost, REG, **EXACT), ot.sinkhorn2(a, b, cost, REG, **EXACT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sinkhorn_of_tensors(dtype: torch.dtype) -> None:
    atol = 2e-5 if dtype == torch.float32 else 1e-9
    found, wanted = [], []
    for module, into in ((compat, found), (ot, wanted)):
        a, b, cost = tensors(*problem(), dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = module.sinkhorn2(a, b, cost, REG, method="sinkhorn_log", **EXACT)
        into += [loss, *torch.autograd.grad(loss, (a, b, cost))]
        into[1], into[2] = into[1] - into[1].mean(), into[2] - into[2].mean()
    for each, other in zip(found, wanted, strict=True):
        close(each, other, atol=20 * atol if each.dim() else atol)


def test_gradient_of_the_plan() -> None:
    """By implicit differentiation in place of POT's through all iterations."""
    weights = torch.randn(N, M, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    slopes = []
    for module in (compat, ot):
        a, b, cost = tensors(*problem())
        plan = module.sinkhorn(a, b, cost, REG, method="sinkhorn_log", **EXACT)
        slopes.append(torch.autograd.grad((plan * weights).sum(), cost)[0])
    close(*slopes, atol=1e-8)


def test_several_histograms() -> None:
    a, b, cost = problem()
    many = np.stack([b, b[::-1], np.full(M, 1 / M)], 1)
    for of_many in (compat.sinkhorn, compat.sinkhorn2):
        close(of_many(a, many, cost, REG, **EXACT), ot.sinkhorn2(a, many, cost, REG, **EXACT))
    _, log = compat.sinkhorn2(a, many, cost, REG, log=True, **EXACT)
    plan = log["u"][:, 1, None] * np.exp(-cost / REG) * log["v"][:, 1]
    np.testing.assert_allclose(plan.sum(0), many[:, 1], atol=1e-9)


def test_empty_weights_are_uniform_and_lists_are_arrays() -> None:
    _, _, cost = problem()
    close(compat.sinkhorn([], [], cost, REG, **EXACT), ot.sinkhorn([], [], cost, REG, **EXACT))
    lists = [0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]]
    close(compat.sinkhorn(*lists, 1), ot.sinkhorn(*lists, 1))


def test_warm_start() -> None:
    a, b, cost = problem()
    _, log = compat.sinkhorn(a, b, cost, 0.02, log=True, **EXACT)
    again, short = compat.sinkhorn(
        a, b, cost, 0.02, log=True, warmstart=(log["log_u"], log["log_v"]), **EXACT
    )
    assert short["niter"] < 5 < log["niter"]
    close(again, ot.sinkhorn(a, b, cost, 0.02, **EXACT), atol=1e-8)


def test_points_without_weight() -> None:
    a, b, cost = problem()
    a[2], b[5] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    plan = compat.sinkhorn(a, b, cost, REG, **EXACT)
    close(plan, ot.sinkhorn(a, b, cost, REG, method="sinkhorn_log", **EXACT))
    assert not plan[2].any()
    assert not plan[:, 5].any()


def test_it_says_when_it_did_not_converge() -> None:
    a, b, cost = problem()
    with pytest.warns(SinkhornWarning, match="sinkhorn: expected a marginal error of at most tol"):
        compat.sinkhorn(a, b, cost, 0.01, numItermax=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.sinkhorn2(a, b, cost, 0.01, numItermax=2)  # POT's default does not warn here


# --- solve and solve_sample ---------------------------------------------------------------------------------


def check_result(found: Any, wanted: Any, atol: float = 1e-9) -> None:
    """All of POT's fields."""
    for name in ("value", "value_linear", "plan", "marginal_a", "marginal_b"):
        close(getattr(found, name), getattr(wanted, name), atol)
    np.testing.assert_allclose(gauge(*found.potentials), gauge(*wanted.potentials), rtol=0, atol=100 * atol)
    assert found.potential_a is found.potentials[0]
    assert found.potential_b is found.potentials[1]
    assert len(found.marginals) == 2
    assert found.value_quad is wanted.value_quad is None
    assert found.status is wanted.status is None
    assert found.log is wanted.log is None
    assert found.lazy_plan is wanted.lazy_plan is None
    assert found.citation is None
    assert type(found.sparse_plan) is type(wanted.sparse_plan)
    assert bool(found.converged)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_solve(mass: float, reg_type: str, as_tensors: bool) -> None:
    given = tensors(*problem(mass)) if as_tensors else problem(mass)
    a, b, cost = given
    found = compat.solve(cost, a, b, reg=REG, reg_type=reg_type, **LONG)
    check_result(found, ot.solve(cost, a, b, reg=REG, reg_type=reg_type, **LONG))


@pytest.mark.parametrize("unbalanced", [0.5, (0.5, 2.0), (math.inf, 0.5)])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_solve_unbalanced(as_tensors: bool, unbalanced: Any) -> None:
    given = tensors(*problem(1.0, 2.0)) if as_tensors else problem(1.0, 2.0)
    a, b, cost = given
    if as_tensors:
        a, b, cost = (each.detach() for each in given)  # type: ignore[union-attr]
    found = compat.solve(cost, a, b, reg=REG, unbalanced=unbalanced, **LONG)
    wanted = ot.solve(cost, a, b, reg=REG, unbalanced=unbalanced, **LONG)
    check_result(found, wanted, atol=1e-8)
    # POT's objective leaves out the masses of its KLs, and is 0 where both marginals may be missed.
    assert (abs(wanted.value) < 1e-8) == (unbalanced != (math.inf, 0.5))
    np.testing.assert_allclose(_array(found.potential_a), _array(wanted.potential_a), atol=1e-7)
    again = compat.solve(
        cost, a, b, reg=REG, unbalanced=unbalanced, potentials_init=found.potentials, tol=1e-9
    )
    close(again.value, wanted.value, atol=1e-8)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("field", ["value", "value_linear", "plan"])
def test_gradients_of_every_field(field: str, reg_type: str) -> None:
    slopes = []
    for module in (compat, ot):
        a, b, cost = tensors(*problem())
        found = getattr(module.solve(cost, a, b, reg=REG, reg_type=reg_type, **LONG), field)
        found = (found * torch.arange(found.numel()).view(found.shape)).sum() if found.dim() else found
        slopes.append(torch.autograd.grad(found, (cost, a, b)))
    for at, (each, other) in enumerate(zip(*slopes, strict=True)):
        # The gradient in a and b is determined up to a constant.
        close(*((each, other) if at == 0 else (each - each.mean(), other - other.mean())), atol=1e-6)


@pytest.mark.parametrize(("unbalanced", "field"), [(0.5, "value_linear"), ((math.inf, 0.5), "value")])
def test_gradients_of_unbalanced_problems(unbalanced: Any, field: str) -> None:
    """POT differentiates its iterations; its objective moves with the mass, which no envelope knows."""
    slopes = []
    for module in (compat, ot):
        a, b, cost = tensors(*problem(1.0, 2.0))
        value = getattr(module.solve(cost, a, b, reg=REG, unbalanced=unbalanced, **LONG), field)
        slopes.append(torch.autograd.grad(value, (cost, a, b)))
    assert slopes[1][0].abs().max() > 1e-3
    for each, other in zip(*slopes, strict=True):
        close(each, other, atol=1e-6)


@pytest.mark.parametrize(
    ("grad", "live"), [("autodiff", 3), ("last_step", 3), ("envelope", 1), ("detach", 0)]
)
def test_what_each_kind_of_gradient_leaves(grad: str, live: int) -> None:
    a, b, cost = tensors(*problem())
    found = compat.solve(cost, a, b, reg=REG, grad=grad)
    assert [getattr(found, name).requires_grad for name in ("value", "value_linear", "plan")].count(
        True
    ) == live
    assert found.potential_a.requires_grad == (live == 3)
    if live:
        slope = torch.autograd.grad(found.value, cost)[0]
        close(slope, found.plan.detach(), atol=1e-7)


@pytest.mark.parametrize(
    "metric", ["sqeuclidean", "euclidean", "cosine", "cityblock", "minkowski", "chebyshev"]
)
def test_solve_sample(metric: str) -> None:
    draw = np.random.default_rng(2)
    x, y = draw.random((N, 5)), draw.random((M, 5))
    a, b, _ = problem()
    found = compat.solve_sample(x, y, a, b, metric, REG, **LONG)
    check_result(found, ot.solve_sample(x, y, a, b, metric, REG, **LONG), atol=1e-8)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock"])
def test_lazy_plans(metric: str, as_tensors: bool) -> None:
    draw = np.random.default_rng(2)
    given = draw.random((N, 5)), draw.random((M, 5)), *problem()[:2]
    given = tuple(map(torch.tensor, given)) if as_tensors else given  # type: ignore[assignment]
    options = {"metric": metric, "reg": REG, "lazy": True, "batch_size": 4, **LONG}
    found, wanted = (module.solve_sample(*given, **options) for module in (compat, ot))
    dense = compat.solve_sample(*given, metric=metric, reg=REG, **LONG)
    keys = (slice(None), slice(3), slice(1, 9, 2), 2, (1, 2), (slice(2, 5), 3), (slice(-2, None), slice(4)))
    for key in keys:
        close(found.lazy_plan[key], wanted.lazy_plan[key], atol=1e-8)
    close(found.lazy_plan[-1], dense.plan[-1:])
    assert found.lazy_plan.shape == wanted.lazy_plan.shape == (N, M)
    assert found.lazy_plan.ndim == wanted.lazy_plan.ndim
    for name in ("value_linear", "marginal_a", "marginal_b"):
        close(getattr(found, name), getattr(wanted, name), atol=1e-8)
    for name in ("plan", "sparse_plan", "marginals", "value_quad", "status"):
        assert getattr(found, name) is getattr(wanted, name) is None
    close(found.value, dense.value)
    assert found.log.keys() == wanted.log.keys()
    assert repr(found).endswith(",lazy_plan=LazyPlan(shape=(7, 10)))")


def test_what_lazy_plans_refuse() -> None:
    draw = np.random.default_rng(2)
    plan = compat.solve_sample(draw.random((N, 5)), draw.random((M, 5)), reg=REG, lazy=True).lazy_plan
    with pytest.raises(IndexError, match="lazy_plan: expected an index below 7, got 7"):
        plan[7]
    with pytest.raises(TypeError, match="lazy_plan: expected integers and slices as indices, got list"):
        plan[[1, 2]]
    with pytest.raises(IndexError, match="lazy_plan: expected at most 2 indices, got 3"):
        plan[0, 0, 0]


def test_gradients_of_lazy_plans_and_points_without_weight() -> None:
    draw = np.random.default_rng(2)
    points, (a, b, _) = (draw.random((N, 5)), draw.random((M, 5))), problem()
    a[2] = 0
    slopes = []
    for lazy in (True, False):
        x, y = tensors(*points)
        found = compat.solve_sample(x, y, a / a.sum(), b, reg=REG, lazy=lazy, unbalanced=1.0, **LONG)
        rows = found.lazy_plan[1:4] if lazy else found.plan[1:4]
        assert not rows[1].any()
        slopes.append((rows, *torch.autograd.grad((rows * torch.arange(M)).sum(), (x, y))))
    for each, other in zip(*slopes, strict=True):
        close(each, other, atol=1e-8)
    fixed = compat.solve_sample(*tensors(*points), reg=REG, lazy=True, grad="envelope")
    assert not fixed.lazy_plan[:].requires_grad
    assert fixed.value.requires_grad


def test_solve_sample_unbalanced_and_its_gradient() -> None:
    draw = np.random.default_rng(2)
    points = draw.random((N, 5)), draw.random((M, 5))
    values = []
    for module in (compat, ot):
        x, y = tensors(*points)
        value = module.solve_sample(x, y, reg=REG, unbalanced=1.0, **LONG).value_linear
        values.append((value, *torch.autograd.grad(value, (x, y))))
    for each, other in zip(*values, strict=True):
        close(each, other, atol=1e-6)


# --- ot.batch -----------------------------------------------------------------------------------------------


def problems() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(4)
    a, b = 0.2 + draw.random((3, N)), 0.2 + draw.random((3, M))
    return a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True), draw.random((3, N, M))


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("method", ["auto", "log_sinkhorn", "sinkhorn"])
@pytest.mark.parametrize("reg_type", ["entropy", "kl"])
def test_solve_batch(reg_type: str, method: str, as_tensors: bool) -> None:
    a, b, cost = tensors(*problems()) if as_tensors else problems()
    options = {"reg_type": reg_type, "method": method, "max_iter": 20_000, "tol": 1e-13}
    if method == "sinkhorn" and as_tensors:
        return  # POT starts from ones in fp32 there
    found, wanted = (module.batch.solve_batch(cost, REG, a, b, **options) for module in (compat, ot))
    for name in ("value", "value_linear", "plan"):
        close(getattr(found, name), getattr(wanted, name), atol=1e-8)
    assert found.log is not None
    assert found.log.keys() == wanted.log.keys()
    (u, v), (u_wanted, v_wanted) = (
        [_array(each) for each in result.potentials] for result in (found, wanted)
    )
    if method == "sinkhorn":
        np.testing.assert_allclose(
            u[:, :, None] * v[:, None], u_wanted[:, :, None] * v_wanted[:, None], rtol=1e-6
        )
    else:
        np.testing.assert_allclose(
            u[:, :, None] + v[:, None], u_wanted[:, :, None] + v_wanted[:, None], atol=1e-6
        )


def test_batches_are_differentiable_as_pots_are() -> None:
    for field in ("value", "value_linear"):
        slopes = []
        for module in (compat, ot):
            cost = tensors(problems()[2])[0]
            found = module.batch.solve_batch(cost, REG, max_iter=20_000, tol=1e-13)
            assert not found.plan.requires_grad
            slopes.append(torch.autograd.grad(getattr(found, field).sum(), cost)[0])
        close(*slopes, atol=1e-7)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "minkowski", "kl"])
def test_solve_sample_batch(metric: str) -> None:
    draw = np.random.default_rng(5)
    x, y = draw.random((3, N, 4)), draw.random((3, M, 4))
    if metric == "kl":
        x, y = x / x.sum(2, keepdims=True), y / y.sum(2, keepdims=True)
    options = {"reg": REG, "metric": metric, "p": 3, "max_iter": 20_000, "tol": 1e-12}
    found, wanted = (module.batch.solve_sample_batch(x, y, **options) for module in (compat, ot))
    close(found.value, wanted.value, atol=1e-8)
    costs = [module.batch.dist_batch(x, y, metric=metric, p=3) for module in (compat, ot)]
    close(*costs, atol=1e-10)
    losses = [module.batch.loss_linear_batch(costs[0], wanted.plan) for module in (compat, ot)]
    close(*losses)
    if metric != "minkowski":  # POT takes no order there
        close(
            *(
                module.batch.loss_linear_samples_batch(x, y, wanted.plan, metric=metric)
                for module in (compat, ot)
            ),
            atol=1e-10,
        )


# --- dist and unif ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric", ["sqeuclidean", "euclidean", "cosine", "cityblock", "minkowski", "chebyshev"]
)
@pytest.mark.parametrize("dims", [2, 6])
def test_dist(dims: int, metric: str) -> None:
    draw = np.random.default_rng(6)
    x, y = draw.random((N, dims)), draw.random((M, dims))
    close(compat.dist(x, y, metric, p=3), ot.dist(x, y, metric, p=3), atol=1e-12)
    close(compat.dist(x), ot.dist(x), atol=1e-12)
    if metric == "minkowski":
        w = draw.random(dims)
        close(compat.dist(x, y, metric, p=3, w=w), ot.dist(x, y, metric, p=3, w=w), atol=1e-12)


def test_unif() -> None:
    close(compat.unif(5), ot.unif(5))
    close(compat.unif(5, torch.ones(1)), ot.unif(5, torch.ones(1)))


# --- unbalanced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant"])
@pytest.mark.parametrize("reg_m", [0.5, (0.5, 2.0)])
def test_sinkhorn_unbalanced(reg_m: Any, method: str) -> None:
    a, b, cost = problem(1.0, 2.0)
    if method == "sinkhorn_translation_invariant" and reg_m != 0.5:
        return  # POT has it for one price only
    plan, log = compat.sinkhorn_unbalanced(a, b, cost, REG, reg_m, method=method, log=True, **EXACT)
    wanted, wanted_log = ot.sinkhorn_unbalanced(a, b, cost, REG, reg_m, method=method, log=True, **EXACT)
    close(plan, wanted, atol=1e-8)
    np.testing.assert_allclose(log["logu"], wanted_log["logu"], atol=1e-6)
    for kind in ("linear", "total"):
        values = [
            module.sinkhorn_unbalanced2(a, b, cost, REG, reg_m, method=method, returnCost=kind, **EXACT)
            for module in (compat, ot)
        ]
        close(*values, atol=1e-8)
    start = (log["logu"], log["logv"])
    again, short = compat.sinkhorn_unbalanced(a, b, cost, REG, reg_m, warmstart=start, log=True)
    close(again, wanted, atol=1e-6)
    assert short["err"][0] <= 1e-6


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reg": None}, r"reg: expected a number > 0 \(for exact transport use POT itself\), got None"),
        ({"reg_type": "L2"}, r"reg_type: expected 'KL' or 'entropy' \(for others use POT itself\), got 'L2'"),
        ({"reg_type": "entropy", "unbalanced": 1}, "reg_type: expected 'KL'"),
        ({"unbalanced": 1, "unbalanced_type": "TV"}, "unbalanced_type: expected 'KL'"),
        ({"c": np.ones((N, M))}, "c: expected None"),
        ({"method": "mm"}, "method: expected one of"),
        ({"grad": "forward"}, "grad: expected one of"),
        ({"a": np.full(N, 2 / N)}, "a and b: expected equal sums, got 2 and 1"),
    ],
)
def test_solve_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        compat.solve(problem()[2], **({"reg": REG} | options))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b, M: compat.sinkhorn(a[1:], b, M, REG), r"a: expected shape \(7,\), got \(6,\)"),
        (lambda a, b, M: compat.sinkhorn(a, b[1:], M, REG), r"b: expected shape \(10,\), got \(9,\)"),
        (
            lambda a, b, M: compat.sinkhorn(a, np.ones((9, 3)), M, REG),
            r"b: expected shape \(10, 3\), got \(9, 3\)",
        ),
        (lambda a, b, M: compat.sinkhorn(a, b, M[0], REG), r"M: expected costs \[N, M\], got shape \(10,\)"),
        (
            lambda a, b, M: compat.sinkhorn(a, b, M, REG, warmstart=(b, a)),
            r"warmstart: expected shape \(10,\), got \(7,\)",
        ),
        (lambda a, b, M: compat.solve(M, a[1:], b, reg=REG), r"a: expected shape \(7,\), got \(6,\)"),
        (lambda a, b, M: compat.solve(M[0], reg=REG), r"M: expected costs \[N, M\]"),
        (
            lambda a, b, M: compat.solve(M, reg=REG, unbalanced=1, potentials_init=(b, a)),
            r"potentials_init: expected shape \(10,\), got \(7,\)",
        ),
        (lambda a, b, M: compat.solve_sample(M, M, a, b, reg=REG), r"b: expected shape \(7,\), got \(10,\)"),
        (
            lambda a, b, M: compat.solve_sample(a, b, reg=REG),
            r"X_a: expected points \[N, D\], got shape \(7,\)",
        ),
        (
            lambda a, b, M: compat.sinkhorn_unbalanced(a, a, M, REG, 1.0),
            r"b: expected shape \(10,\), got \(7,\)",
        ),
        (lambda a, b, M: compat.dist(a, b), r"x1: expected points \[N, D\], got shape \(7,\)"),
        (lambda a, b, M: compat.dist(M, M[:, :1]), r"x1 and x2: .* got shapes \(7, 10\) and \(7, 1\)"),
        (lambda a, b, M: compat.dist_batch(M, M), r"X1: expected points \[B, N, D\], got shape \(7, 10\)"),
        (lambda a, b, M: compat.solve_batch(M, REG), r"M: expected costs \[B, N, M\], got shape \(7, 10\)"),
        (lambda a, b, M: compat.solve_batch(M[None], REG, a), r"a: expected shape \(1, 7\), got \(7,\)"),
    ],
)
def test_shapes_are_said_as_they_were_given(call: Callable[..., Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call(*problem())


def test_others_refuse() -> None:
    a, b, cost = problem()
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: compat.solve_sample(cost, cost, reg=REG, debias=True), "debias: expected False"),
        (lambda: compat.solve_sample(cost, cost, reg=REG, scaler="standard"), "scaler: expected None"),
        (lambda: compat.sinkhorn(a, b, cost, REG, method="screenkhorn"), "method: expected one of"),
        (
            lambda: compat.sinkhorn_unbalanced(a, b, cost, REG, 1, reg_type="entropy"),
            "reg_type and c: expected",
        ),
        (lambda: compat.sinkhorn_unbalanced(a, b, cost, REG, 1, method="x"), "method: expected one of"),
        (lambda: compat.sinkhorn_unbalanced2(a, b, cost, REG, 1, returnCost="x"), "returnCost: expected"),
        (lambda: compat.sinkhorn_unbalanced(a, b[:, None], cost, REG, 1), "b: expected weights"),
        (lambda: compat.batch.solve_batch(cost[None]), "reg: expected a number > 0"),
        (lambda: compat.batch.solve_batch(cost[None], REG, method="proximal"), "method: expected one of"),
        (lambda: compat.batch.solve_batch(cost[None], REG, reg_type="L2"), "reg_type: expected"),
        (lambda: compat.batch.solve_batch(cost[None], REG, grad="x"), "grad: expected one of"),
        (lambda: compat.batch.dist_batch(cost[None], metric="cosine"), "metric: expected one of"),
        (lambda: compat.dist(cost, metric="hamming"), "metric: expected one of"),
    ]
    for call, says in calls:
        with pytest.raises(ValueError, match=says):
            call()
