"""Matrices made doubly stochastic: equal to the oracle, forward and backward, on every path.

With TRITON_INTERPRET=1 (or on a GPU) fp32 runs the Triton kernels.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from ecgot.kernels.dispatch import INTERPRETED
from ecgot.kernels.scaling import torch_iteration
from ecgot.kernels.scaling.doubly_stochastic import doubly_stochastic
from ecgot.kernels.scaling.operators import doubly_stochastic_bwd_op, doubly_stochastic_op
from ecgot.kernels.scaling.reference import doubly_stochastic as oracle

# Of numbers of at most 1: rounding of `iterations` divisions, and of as many in reverse.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 5e-4, torch.bfloat16: 4e-3}


def logits_of(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (spread * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)


def gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the gradient of a random combination of its entries."""
    logits = logits.detach().requires_grad_()
    out = function(logits)
    weights = logits_of(*out.shape, dtype=torch.float64, spread=1.0)
    (out.double() * weights).sum().backward()
    assert logits.grad is not None
    return out.detach(), logits.grad


def check_equal(logits: Tensor, iterations: int, rows_first: bool = False) -> None:
    found, slope = gradient(
        lambda x: doubly_stochastic(x, iterations=iterations, rows_first=rows_first), logits
    )
    wanted, wanted_slope = gradient(lambda x: oracle(x, iterations, rows_first), logits.double())
    tolerance = TOLERANCE[logits.dtype]
    assert found.dtype == slope.dtype == logits.dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)
    scale = max(1.0, wanted_slope.abs().max().item())
    torch.testing.assert_close(slope.double(), wanted_slope, rtol=0, atol=4 * tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 19])
def test_equals_the_oracle(n: int, rows_first: bool, dtype: torch.dtype) -> None:
    check_equal(logits_of(37, n, n, dtype=dtype), 20, rows_first)


@pytest.mark.parametrize("iterations", [1, 2, 5, 60])
def test_every_number_of_iterations(iterations: int) -> None:
    check_equal(logits_of(300, 4, 4), iterations)


def test_logits_far_apart() -> None:
    """exp(300) is no number in fp32, and a row may be exp(-300) of every column."""
    logits = logits_of(200, 4, 4, spread=100.0)
    logits[0] = torch.tensor([[0.0, 0, 0, 0], [-300, -300, -300, -300], [300, 0, 0, 0], [0, 0, 0, 300]])
    check_equal(logits, 20)


def test_limit_of_two_by_two() -> None:
    """P / (1 - P) is the root of the cross ratio, exp((x11 + x22 - x12 - x21) / 2)."""
    logits = logits_of(50, 2, 2, dtype=torch.float64, spread=1.0)
    wanted = torch.sigmoid((logits[:, 0, 0] + logits[:, 1, 1] - logits[:, 0, 1] - logits[:, 1, 0]) / 2)
    torch.testing.assert_close(doubly_stochastic(logits, iterations=100)[:, 0, 0], wanted)


def test_sums() -> None:
    columns_last = doubly_stochastic(logits_of(9, 4, 4), iterations=3, rows_first=True)
    torch.testing.assert_close(columns_last.sum(1), torch.ones(9, 4))
    assert (columns_last.sum(2) - 1).abs().max() > 1e-4  # after three iterations the rows are only near
    rows_last = doubly_stochastic(logits_of(9, 4, 4), iterations=3)
    torch.testing.assert_close(rows_last.sum(2), torch.ones(9, 4))


def test_a_forbidden_entry_is_zero() -> None:
    logits = logits_of(5, 4, 4)
    logits[:, 1, 2] = -math.inf
    found = doubly_stochastic(logits)
    assert (found[:, 1, 2] == 0).all()
    torch.testing.assert_close(found.double(), oracle(logits.double(), 20), rtol=0, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_matrix(value: float) -> None:
    clean = logits_of(6, 4, 4)
    spoilt = clean.clone()
    spoilt[3, 1, 1] = value
    (found, slope), (wanted, wanted_slope) = (gradient(doubly_stochastic, x) for x in (spoilt, clean))
    others = torch.arange(6) != 3
    assert found[3].isnan().any()
    assert torch.equal(found[others], wanted[others])
    assert torch.equal(slope[others], wanted_slope[others])


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (2, 3, 5, 5), (3, 0, 0)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    logits = logits_of(*shape)
    found = doubly_stochastic(logits)
    assert found.shape == shape
    if logits.numel():
        torch.testing.assert_close(found.double(), oracle(logits.double(), 20), rtol=0, atol=2e-6)


def test_strides() -> None:
    """A view of every second matrix, transposed, and a gradient that is expanded."""
    logits = logits_of(12, 5, 8)[::2, :, ::2][:, :4].mT.requires_grad_()
    logits.retain_grad()
    doubly_stochastic(logits, iterations=3)[:, 0].sum().backward()
    copied = logits.detach().clone().requires_grad_()
    oracle(copied.double(), 3)[:, 0].sum().backward()
    torch.testing.assert_close(logits.grad, copied.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_gradcheck(n: int) -> None:
    logits = logits_of(3, n, n, dtype=torch.float64).requires_grad_()
    for rows_first in (False, True):
        function = partial(doubly_stochastic, iterations=6, rows_first=rows_first)
        assert torch.autograd.gradcheck(function, logits)


def test_operators_are_well_registered() -> None:
    for dtype in (torch.float32, torch.float64):
        logits = logits_of(3, 4, 4, dtype=dtype)
        torch.library.opcheck(doubly_stochastic_op, (logits.requires_grad_(), 5))
        torch.library.opcheck(doubly_stochastic_bwd_op, (logits.detach(), torch.ones_like(logits), 5))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(doubly_stochastic, fullgraph=True, backend="aot_eager")
    logits = logits_of(3, 4, 4)
    (found, slope), (wanted, wanted_slope) = (gradient(f, logits) for f in (compiled, doubly_stochastic))
    assert torch.equal(found, wanted)
    assert torch.equal(slope, wanted_slope)


@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="Triton runs nowhere here")
def test_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton serves, torch is not asked."""
    monkeypatch.delattr(torch_iteration, "forward")
    doubly_stochastic(logits_of(3, 4, 4))
    with pytest.raises(AttributeError):
        doubly_stochastic(logits_of(3, 17, 17))


@pytest.mark.parametrize(
    ("logits", "iterations", "says"),
    [
        (torch.zeros(3, 4), 20, r"logits: expected \[\.\.\., n, n\], got shape \(3, 4\)"),
        (torch.zeros(3), 20, r"logits: expected \[\.\.\., n, n\], got shape \(3,\)"),
        (torch.zeros(3, 3), 0, "iterations: expected an integer >= 1, got 0"),
    ],
)
def test_errors(logits: Tensor, iterations: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        doubly_stochastic(logits, iterations=iterations)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"logits: expected a torch\.Tensor, got list"):
        doubly_stochastic([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"logits: expected a dense floating point tensor, got torch\.int64"):
        doubly_stochastic(torch.zeros(3, 3, dtype=torch.int64))
