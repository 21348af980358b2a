"""Entropic transport, value and gradients: ecgot and its peers at equal marginal error (see ecgot.bench).

pytest-benchmark's table shows ecgot's calls alone. The comparison, in which the providers take turns, is
printed and goes into the CSV.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Record
from ecgot.bench.cases import CPU_CASES, CPU_PAIRS, GPU_CASES, GPU_PAIRS, Case, Measurement, PairsCase, points
from ecgot.bench.measure import compare, compare_pairs
from ecgot.bench.providers import pairs_ecgot, solve_ecgot
from ecgot.bench.stopwatch import synchronize

Show = Callable[[str, Sequence[Measurement], Callable[[], object], int], None]


@pytest.fixture
def show(benchmark: BenchmarkFixture, device: torch.device, record: Record) -> Show:
    """show(name, measurements, call, rounds): print and record them, and time ecgot's call for the table."""

    def run(name: str, measurements: Sequence[Measurement], call: Callable[[], object], rounds: int) -> None:
        print()
        for row in measurements:
            times = f"{row.median_ms:9.2f} ms [{row.q20_ms:.2f}, {row.q80_ms:.2f}] {row.peak_mb:8.1f} MB"
            print(f"{row.case}  {row.provider:12} {row.refused or times}")
        record(name, list(measurements))

        def synchronized() -> None:
            call()
            synchronize(device)

        benchmark.group = f"{name} {measurements[0].case}"
        benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=2)

    return run


@pytest.mark.parametrize("case", GPU_CASES if torch.cuda.is_available() else CPU_CASES, ids=str)
def test_sinkhorn(case: Case, device: torch.device, show: Show) -> None:
    x, y = points(case, device)

    def call() -> None:
        value, _ = solve_ecgot(x, y, case, 0)
        torch.autograd.grad(value.sum(), (x, y))

    show("sinkhorn", compare(case, device), call, 10)


def test_all_pairs(device: torch.device, show: Show) -> None:
    _compare_pairs(CPU_PAIRS, device, torch.float32, show)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a size for a GPU")
def test_all_pairs_on_a_gpu(device: torch.device, show: Show) -> None:
    _compare_pairs(GPU_PAIRS, device, torch.bfloat16, show)


def _compare_pairs(case: PairsCase, device: torch.device, dtype: torch.dtype, show: Show) -> None:
    x, y = (each.detach().to(dtype).requires_grad_() for each in points(case, device))

    def call() -> None:
        torch.autograd.grad(pairs_ecgot(x, y, case).sum(), (x, y))

    show("all_pairs", compare_pairs(case, device, dtype), call, 5)
