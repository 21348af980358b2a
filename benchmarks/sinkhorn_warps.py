"""Time the solver of problems on chip with each number of warps, beside the rule's choice.

    python -m benchmarks.sinkhorn_warps OUT.csv

Needs a GPU. The rule is ``_warps`` in ``ecgot/kernels/ot/triton_onchip.py``; where another number is faster
by more than the spread of a few runs, it is the rule that is to change.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks.conv1d_backends import write_rows
from ecgot.bench import origin, unit_vectors
from ecgot.kernels import sinkhorn
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED

SIDES = [(16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64), (250, 64), (128, 128)]
WARPS = (1, 2, 4, 8, 16)
CALLS = 20  # in a measurement
QUEUE_CYCLES = (
    50_000_000  # that a GPU waits, in which the calls are queued: their own overhead is not measured
)


def median_us(function: Callable[[], object], device: str, rounds: int) -> float:
    """Of a call, on a GPU without the time that Python takes to make it."""
    function()
    times = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(QUEUE_CYCLES)
            begin.record()
            for _ in range(CALLS):
                function()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end) / CALLS)
        else:
            start = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(batch: int, d: int, iterations: int, device: str, rounds: int) -> list[dict[str, str]]:
    from ecgot.kernels.ot import triton_onchip as kernels

    rows = []
    options = {"eps": 0.1, "max_iter": iterations, "tol": 0.0}
    for n, m in SIDES:
        x, y = (unit_vectors(batch, count, d, torch.device(device), count) for count in (n, m))
        chosen = kernels._tile_configuration(n, m)
        for warps in WARPS:
            configuration = chosen | {"num_warps": warps}
            with mock.patch.object(kernels, "_tile_configuration", return_value=configuration):
                try:
                    took = f"{median_us(lambda x=x, y=y: sinkhorn(x, y, **options), device, rounds):.1f}"
                except Exception as failure:  # such as more registers or shared memory than there are
                    took = str(failure).partition("\n")[0]
            row = {"n": n, "m": m, "warps": warps, "rule": warps == chosen["num_warps"], "us": took}
            row |= {"batch": batch, "d": d, "iterations": iterations, **origin()}
            rows.append({column: str(value) for column, value in row.items()})
            print(" ".join(rows[-1].values()), file=sys.stderr)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not HAS_TRITON or (device == "cpu" and not INTERPRETED):
        print("sinkhorn_warps: there is no GPU to measure", file=sys.stderr)
        return 2
    rows = measure(options.batch, options.d, options.iterations, device, options.rounds)
    write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
