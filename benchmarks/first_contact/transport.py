"""The ceilings of this GPU, and the headlines of the solver on chip and of all pairs.

Providers: "ecgot", as a user calls it; "ecgot_graph", the same in a CUDA graph, with the launcher's choice
of warps or another; "torch_graph", what one writes by hand, in a CUDA graph: a compiled loop in the log
domain with gradients by the envelope theorem. All run the same number of iterations. For all pairs the peer
is a similarity tensor with scaling by matrix products, as it is ("torch") and compiled in a graph.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.first_contact import truth
from benchmarks.first_contact.items import (
    Errors,
    Item,
    Row,
    checked,
    compared,
    peak_mb,
    recorded,
    timed,
)
from benchmarks.first_contact.sizes import Sizes
from ecgot.bench.cases import PairsCase, points
from ecgot.bench.providers import OURS, half_step, pairs_ecgot, pairs_torch, solve_by_envelope
from ecgot.kernels import sinkhorn
from ecgot.kernels.dispatch import HAS_TRITON

WARPS = (2, 4, 8, 16)
WARPS_OF_PAIRS = (1, 2, 4)
# Relative to the norm: of values, of gradients (which are rounded to 2^-9 in bf16).
OURS_TOLERANCE = 1e-3, 1e-2
# The peer's products over all pairs are in bf16, whose rounding is 2^-9 of a similarity over eps.
PEER_TOLERANCE = 5e-2, 5e-2
Results = tuple[Tensor, ...]  # values, and gradients in x and y where they are asked for
Solve = Callable[[], Results]


def items(sizes: Sizes, _out: Path) -> list[Item]:
    """Ceilings first, then ours and the peer, then other warps; forward before backward."""
    found = [Item("peaks", functools.partial(peaks, sizes), 30)]
    for name, headline in (("solver", _solver), ("pairs", _pairs)):
        for what in ("forward", "gradient"):
            for provider in ("ecgot_graph", "torch_graph", OURS):
                run = functools.partial(headline, provider, what == "gradient", sizes)
                found.append(Item(f"{name} {what} {provider}", run, 75))
    for name, headline, choices in (("solver", _solver, WARPS), ("pairs", _pairs, WARPS_OF_PAIRS)):
        for warps in choices:
            run = functools.partial(headline, "ecgot_graph", False, sizes, warps=warps)
            found.append(Item(f"{name} forward {warps} warps", run, 30))
    found.append(Item("pairs gradient torch", functools.partial(_pairs, "torch", True, sizes), 30))
    return found


def peaks(sizes: Sizes) -> Iterator[Row]:
    """The rates that rooflines are drawn with: a copy, reads and writes counted, and a matrix product."""
    source = torch.randn(sizes.peak_bytes // 4, device=sizes.device)
    target = torch.empty_like(source)
    row = timed(lambda: target.copy_(source), sizes, graph=True)
    gbyte_s = 2 * sizes.peak_bytes / row["median_ms"] / 1e6
    yield row | {"case": "copy", "provider": "torch", "rate": f"{gbyte_s:.0f} GB/s"}
    a = torch.randn(sizes.peak_side, sizes.peak_side, device=sizes.device).to(sizes.dtype)
    row = timed(lambda: a @ a, sizes, graph=True)
    tflop_s = 2 * sizes.peak_side**3 / row["median_ms"] / 1e9
    yield row | {
        "case": f"product {_name(sizes.dtype)}",
        "provider": "torch",
        "rate": f"{tflop_s:.3g} Tflop/s",
    }


# --- the solver on chip -------------------------------------------------------------------------------------


def _solver(provider: str, gradients: bool, sizes: Sizes, warps: int | None = None) -> Iterator[Row]:
    case = sizes.solver
    x, y = (each.detach().to(sizes.dtype).requires_grad_(gradients) for each in points(case, sizes.device))
    solve = _peer_loop(x, y, sizes) if provider == "torch_graph" else _ours(x, y, sizes)
    some = slice(0, sizes.checked)
    expected = truth.value_and_gradients(x[some], y[some], case.eps, sizes.iterations, "sqeuclidean")
    name = f"{case.batch} x {case.n} x {case.m} x {case.d} T={sizes.iterations} {_name(sizes.dtype)}"

    def errors(found: Results) -> Errors:
        return compared([each[some] for each in found], expected, OURS_TOLERANCE)

    with _with_warps(warps):
        yield _headline(solve, errors, provider, sizes) | {"case": name} | _warps_note(warps)


def _ours(x: Tensor, y: Tensor, sizes: Sizes) -> Solve:
    ones = torch.ones(len(x), device=x.device)

    def solve() -> Results:
        value = sinkhorn(x, y, eps=sizes.solver.eps, max_iter=sizes.iterations, tol=0.0).value
        return (
            (value, *torch.autograd.grad(value, (x, y), ones.to(value.dtype)))
            if x.requires_grad
            else (value,)
        )

    return solve


def _peer_loop(x: Tensor, y: Tensor, sizes: Sizes) -> Solve:
    step = torch.compile(half_step, dynamic=False, backend=sizes.inductor)
    gradients = x.requires_grad

    def solve() -> Results:
        found = solve_by_envelope(
            x.float(), y.float(), sizes.solver, sizes.iterations, step, gradients=gradients
        )
        return (found[0], found[2].to(x.dtype), found[3].to(y.dtype)) if gradients else found

    return solve


# --- all pairs ----------------------------------------------------------------------------------------------


def _pairs(provider: str, gradients: bool, sizes: Sizes, warps: int | None = None) -> Iterator[Row]:
    case = sizes.pairs
    x, y = (each.detach().to(sizes.dtype).requires_grad_(gradients) for each in points(case, sizes.device))
    ones = torch.ones(len(x), len(y), device=x.device)
    ours = provider.startswith(OURS)
    pairs: Callable[..., Tensor] = pairs_ecgot if ours else _pairs_by_hand
    if provider == "torch_graph":
        pairs = torch.compile(_pairs_by_hand, dynamic=False, backend=sizes.inductor)

    def solve() -> Results:
        value = pairs(x, y, case)
        return (value, *torch.autograd.grad(value, (x, y), ones.to(value.dtype))) if gradients else (value,)

    some = slice(0, sizes.checked)
    # A cloud's gradient is a sum over all others.
    left = truth.value_and_gradients(x[some, None], y[None], case.eps, case.iterations, "cosine")
    right = truth.value_and_gradients(x[:, None], y[None, some], case.eps, case.iterations, "cosine")
    expected = left[0], left[1][:, 0], right[2][0]
    tolerance = OURS_TOLERANCE if ours else PEER_TOLERANCE

    def errors(found: Results) -> Errors:
        return compared([each[some] for each in found], expected, tolerance)

    name = f"{case.batch} x {case.others}, {case.n} x {case.m} x {case.d}"
    name += f" T={case.iterations} {_name(sizes.dtype)}"
    with _with_warps(warps):
        yield _headline(solve, errors, provider, sizes) | {"case": name} | _warps_note(warps)


def _pairs_by_hand(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    """The peer takes unit vectors; with this its gradient, too, is that of the cosine."""
    return pairs_torch(F.normalize(x, dim=2), F.normalize(y, dim=2), case)


# --- of both ------------------------------------------------------------------------------------------------


def _headline(solve: Solve, errors: Callable[[Results], Errors], provider: str, sizes: Sizes) -> Row:
    """Check what is timed, then time it."""
    graph = provider.endswith("_graph")
    call, found = recorded(solve, sizes.device) if graph else (solve, solve())
    peak = None if graph else peak_mb(solve, sizes.device)  # not of the first call, in which libraries settle
    row: Row = {"provider": provider, "peak_mb": peak} | checked(errors(found))
    return row if "refused" in row else row | timed(call, sizes, graph=graph)


def _with_warps(warps: int | None) -> Any:
    """Solve with so many warps in place of the launcher's choice."""
    if warps is None:
        return mock.patch.dict({})
    if not HAS_TRITON:
        raise RuntimeError("triton is not installed")
    from ecgot.kernels.ot import triton_onchip

    return mock.patch.object(triton_onchip, "solver_warps", return_value=warps)


def _warps_note(warps: int | None) -> Row:
    return {} if warps is None else {"provider": f"ecgot_graph, {warps} warps"}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
