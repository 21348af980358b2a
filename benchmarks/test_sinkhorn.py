"""Entropic transport, value and gradients: ecgot and its peers at equal marginal error (see ecgot.bench).

pytest-benchmark's table shows ecgot's calls; the comparison, in which the providers take turns, is printed
and goes into the CSV.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ecgot import bench
from ecgot.bench import Case, Measurement

CASES = bench.GPU_CASES if torch.cuda.is_available() else bench.CPU_CASES
PAIRS = [bench.PairsCase()]
Record = Callable[[str, list[Measurement]], None]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sinkhorn(case: Case, device: torch.device, benchmark: BenchmarkFixture, record: Record) -> None:
    measurements = bench.compare(case, device)
    _show(measurements)
    record("sinkhorn", measurements)
    x = bench.unit_vectors(case.batch, case.n, case.d, device, 0).requires_grad_()
    y = bench.unit_vectors(case.batch, case.m, case.d, device, 1).requires_grad_()

    def call() -> None:
        value, _ = bench.SOLVERS[bench.OURS][1](x, y, case, 0)
        torch.autograd.grad(value.sum(), (x, y))
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"sinkhorn {case}"
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_all_pairs(
    case: bench.PairsCase, device: torch.device, benchmark: BenchmarkFixture, record: Record
) -> None:
    _compare_pairs(case, device, torch.float32, benchmark, record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a size for a GPU")
def test_all_pairs_on_a_gpu(device: torch.device, benchmark: BenchmarkFixture, record: Record) -> None:
    _compare_pairs(bench.GPU_PAIRS, device, torch.bfloat16, benchmark, record)


def _compare_pairs(
    case: bench.PairsCase,
    device: torch.device,
    dtype: torch.dtype,
    benchmark: BenchmarkFixture,
    record: Record,
) -> None:
    measurements = bench.compare_pairs(case, device, dtype)
    _show(measurements)
    record("all_pairs", measurements)
    x = bench.unit_vectors(case.batch, case.n, case.d, device, 0).to(dtype).requires_grad_()
    y = bench.unit_vectors(case.others, case.m, case.d, device, 1).to(dtype).requires_grad_()

    def call() -> None:
        torch.autograd.grad(bench.pairs_ecgot(x, y, case).sum(), (x, y))
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"all_pairs {case}"
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


def _show(measurements: list[Measurement]) -> None:
    print()
    for row in measurements:
        what = (
            row.refused
            or f"{row.median_ms:9.2f} ms [{row.q20_ms:.2f}, {row.q80_ms:.2f}] {row.peak_mb:8.1f} MB"
        )
        print(f"{row.case}  {row.provider:12} {what}")
