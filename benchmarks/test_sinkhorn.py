"""Entropic transport, value and gradients: ecgot and its peers at equal marginal error (see ecgot.bench).

Each provider runs in a process of its own, which pytest-benchmark cannot time: its fixture calls a function
in this one. The comparison is printed and goes into the CSV.
"""

from collections.abc import Sequence

import pytest
import torch

from benchmarks.conftest import Record
from ecgot.bench import cases
from ecgot.bench.apart import compare

GPU = torch.cuda.is_available()
GROUPS: dict[str, Sequence[cases.Case | cases.PairsCase]] = {
    "sinkhorn": cases.GPU_CASES if GPU else cases.CPU_CASES,
    "sinkhorn_small": [] if GPU else cases.SMALL_CASES,
    "sinkhorn_large": [] if GPU else cases.LARGE_CASES,
    "all_pairs": [cases.GPU_PAIRS] if GPU else [cases.CPU_PAIRS],
}


@pytest.mark.parametrize(
    ("group", "case"), [(name, case) for name, group in GROUPS.items() for case in group], ids=str
)
def test_sinkhorn(
    group: str, case: cases.Case | cases.PairsCase, device: torch.device, record: Record
) -> None:
    rows = compare(case, device)
    print()
    for row in rows:
        times = f"{row.median_ms:9.3f} ms [{row.q20_ms:.3f}, {row.q80_ms:.3f}] {row.peak_mb:8.1f} MB"
        print(f"{row.case}  {row.provider:12} {row.refused or times}", flush=True)
    record(group, rows)
