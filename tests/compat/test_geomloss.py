"""SamplesLoss beside geomloss's own, annealed so slowly that it has converged."""

import warnings
from typing import Any

import geomloss
import pytest
import torch
from torch import Tensor

from ecgot.compat.geomloss import SamplesLoss
from ecgot.kernels import SinkhornWarning

B, N, M = 3, 9, 12
# geomloss stops at the end of its schedule, off by about the last step of eps; ours stops at `tol`.
SCHEDULE = 0.997
EXACT = {"tol": 1e-9, "max_iter": 20_000}


def problem(
    reach: float | None, dtype: torch.dtype = torch.float64, batched: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, x, b, y: weights of one mass that is not 1, or of two where ``reach`` is given."""
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(B, n, 2, dtype=torch.float64, generator=generator) for n in (N, M))
    a, b = (0.2 + torch.rand(B, n, dtype=torch.float64, generator=generator) for n in (N, M))
    a = 1.3 * a / a.sum(1, keepdim=True)
    b = (1.3 if reach is None else 0.8) * b / b.sum(1, keepdim=True)
    tensors = (a, x, b, y) if batched else (a[0], x[0], b[0], y[0])
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)  # type: ignore[return-value]


def both(**settings: Any) -> tuple[torch.nn.Module, SamplesLoss]:
    ours = SamplesLoss(**settings)
    ours.tol, ours.max_iter = EXACT["tol"], EXACT["max_iter"]  # type: ignore[assignment]
    return geomloss.SamplesLoss(**settings, backend="tensorized"), ours


def centred(weights: Tensor) -> Tensor:
    """Where the marginals are kept, a potential is determined up to a constant."""
    return weights - weights.mean(-1, keepdim=True)


def test_attributes_bound_the_time() -> None:
    """A coarser tol ends without a warning and nearer than geomloss's schedule; max_iter ends it anyhow."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(200, 2, generator=generator), torch.rand(200, 2, generator=generator)
    settings: dict[str, Any] = {"p": 2, "blur": 0.02}
    wanted = both(**settings)[1](x, y)
    rough, short = SamplesLoss(**settings), SamplesLoss(**settings)
    rough.tol, short.max_iter = 1e-2, 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = rough(x, y)
    theirs = geomloss.SamplesLoss(**settings)(x, y)
    assert (found - wanted).abs() < 0.01 * wanted < 0.1 * wanted < (theirs - wanted).abs()
    with pytest.warns(SinkhornWarning):
        short(x, y)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
@pytest.mark.parametrize("p", [1, 2])
def test_values_and_gradients(p: int, reach: float | None, debias: bool) -> None:
    peer, ours = both(p=p, blur=0.3, reach=reach, scaling=SCHEDULE, debias=debias)
    tensors = problem(reach)
    wanted, found = peer(*tensors), ours(*tensors)
    assert found.shape == wanted.shape == (B,)
    # geomloss's distances are at least 1e-4, those of a point from itself too.
    torch.testing.assert_close(found, wanted, rtol=2e-4, atol=1e-4 if p == 1 else 2e-5)
    slopes = [torch.autograd.grad(value.sum(), tensors) for value in (found, wanted)]
    # geomloss's gradient is too small by this factor: it differentiates (rho + eps / 2) (1 - exp(-f / rho))
    # with f's last step, which is rho / (rho + eps) of the plan's mean.
    eps, rho = 0.3**p, None if reach is None else reach**p
    factor = 1.0 if rho is None else (rho + eps / 2) / (rho + eps)
    for at in (1, 3):
        torch.testing.assert_close(factor * slopes[0][at], slopes[1][at], rtol=0, atol=2e-4)
    if rho is None:
        for at in (0, 2):
            torch.testing.assert_close(centred(slopes[0][at]), centred(slopes[1][at]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
def test_the_gradient_is_that_of_the_value(reach: float | None, debias: bool) -> None:
    """Also unbalanced, where geomloss's is not, and in the weights."""
    _, ours = both(blur=0.3, reach=reach, debias=debias, scaling=0.9)
    ours.tol = 1e-12
    a, x, b, y = problem(reach)
    assert torch.autograd.gradcheck(lambda x, y: ours(a.detach(), x, b.detach(), y), (x, y), atol=1e-5)
    if reach is not None:
        assert torch.autograd.gradcheck(lambda a, b: ours(a, x.detach(), b, y.detach()), (a, b), atol=1e-5)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("reach", [None, 0.7])
def test_potentials(reach: float | None, debias: bool) -> None:
    peer, ours = both(blur=0.3, reach=reach, scaling=SCHEDULE, debias=debias, potentials=True)
    for wanted, found in zip(peer(*problem(reach)), ours(*problem(reach)), strict=True):
        assert found.shape == wanted.shape
        same = (centred(found), centred(wanted)) if reach is None else (found, wanted)
        torch.testing.assert_close(*same, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("potentials", [True, False])
def test_forms_of_the_arguments(batched: bool, potentials: bool, dtype: torch.dtype) -> None:
    peer, ours = both(blur=0.3, scaling=SCHEDULE, potentials=potentials)
    ours.tol = 1e-5
    a, x, b, y = problem(None, dtype, batched)
    forms: list[tuple[Any, ...]] = [(x, y), (a, x, b, y), (a[..., None], x, b[..., None], y)]
    for form in forms:
        wanted, found = peer(*form), ours(*form)
        for each, other in zip(found, wanted, strict=True) if potentials else [(found, wanted)]:
            assert each.dtype == other.dtype == dtype
            assert each.shape == other.shape
        if not potentials:
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    if not batched:  # labels of clusters, for a faster descent in geomloss's multiscale backend
        labels = torch.arange(N) % 3, torch.arange(M) % 3
        six = ours(labels[0], a, x, labels[1], b, y)
        four = ours(a, x, b, y)
        for each, other in zip(six, four, strict=True) if potentials else [(six, four)]:
            assert torch.equal(each, other)


def test_a_cost_of_ones_own() -> None:
    def city(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :, None] - y[:, None]).abs().sum(-1)

    for reach in (None, 0.7):
        peer, ours = both(p=1, blur=0.3, reach=reach, scaling=SCHEDULE, cost=city)
        torch.testing.assert_close(ours(*problem(reach)), peer(*problem(reach)), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("formula", "p"), [("Norm2(X-Y)", 1), ("(SqDist(X,Y) / IntCst(2))", 2)])
def test_keops_own_formulas(formula: str, p: int) -> None:
    tensors = problem(None)
    assert torch.equal(SamplesLoss(p=p, cost=formula)(*tensors), SamplesLoss(p=p)(*tensors))


@pytest.mark.parametrize("reach", [None, 0.7])
def test_points_without_weight_change_nothing(reach: float | None) -> None:
    peer, ours = both(blur=0.3, reach=reach, scaling=SCHEDULE)
    a, x, b, y = (tensor.detach().clone() for tensor in problem(reach))
    a[:, 4:] = 0
    if reach is None:
        a *= (b.sum(1) / a.sum(1))[:, None]
    found = ours(a, x, b, y)
    torch.testing.assert_close(found, ours(a[:, :4], x[:, :4], b, y))
    torch.testing.assert_close(found, peer(a, x, b, y), rtol=2e-4, atol=2e-5)


def test_at_the_defaults_ours_is_solved() -> None:
    """Two samples of one distribution: geomloss's default schedule is 10 % off and more, ours is not."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 128, 2, generator=generator) for _ in range(2))
    _, solved = both(scaling=0.9)
    exact = solved(x.double(), y.double())
    theirs, ours = (loss(x, y).double() for loss in (geomloss.SamplesLoss(), SamplesLoss()))
    assert ((theirs - exact) / exact).abs().max() > 0.1
    assert ((ours - exact) / exact).abs().max() < 1e-3


def test_what_chooses_only_how_geomloss_computes_is_taken() -> None:
    settings = {"diameter": 3.0, "truncate": None, "kernel": None, "cluster_scale": 0.1, "verbose": True}
    tensors = problem(None)
    assert torch.equal(SamplesLoss(**settings, backend="online")(*tensors), SamplesLoss()(*tensors))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "energy"}, r"loss: expected 'sinkhorn' \(for others use geomloss itself\), got 'energy'"),
        ({"p": 3}, "p: expected 1 or 2, got 3"),
        ({"cost": "Norm2(X)"}, "cost: expected a function of x and y"),
        ({"backend": "keops"}, "backend: expected one of"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplesLoss(**settings)


def test_arguments_that_are_refused() -> None:
    a, x, b, y = problem(None)
    loss = SamplesLoss()
    with pytest.raises(ValueError, match="arguments: expected"):
        loss(a, x, y)
    with pytest.raises(ValueError, match="x and y: expected"):
        loss(x, y[0])
    with pytest.raises(ValueError, match=r"a: expected \(3, 9\), got \(3, 12\)"):
        loss(b, x, b, y)
    with pytest.raises(ValueError, match="weights: expected equal sums where reach is None"):
        loss(a, x, 2 * b, y)
    with pytest.raises(NotImplementedError, match="labels: expected None in batches"):
        loss(torch.zeros(N), a, x, torch.zeros(M), b, y)
