"""Time the on-chip solver with each number of warps, beside the number that its rule chooses.

    python -m benchmarks.sinkhorn_warps OUT.csv

Needs a GPU. The rule is ``solver_warps`` of ``ecgot/kernels/ot/triton_onchip.py``; change it where another
number is faster by more than runs differ from each other. Calls are queued on the GPU, so that the time to
launch them is not measured.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks.output import write_rows
from ecgot.bench.cases import unit_vectors
from ecgot.bench.origin import origin
from ecgot.bench.stopwatch import median_us, queued_seconds
from ecgot.kernels import sinkhorn
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED

if HAS_TRITON:
    from ecgot.kernels.ot import triton_onchip

SIDES = [(16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64), (250, 64), (128, 128)]  # N, M
WARPS = (1, 2, 4, 8, 16)


def measure(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, object]]:
    """A row for each size and number of warps: microseconds, or why it does not run."""
    for n, m in SIDES:
        x, y = (unit_vectors(options.batch, count, options.d, device, count) for count in (n, m))
        chosen = triton_onchip.tile_configuration(n, m)

        def solve(x: Tensor = x, y: Tensor = y) -> object:
            return sinkhorn(x, y, eps=0.1, max_iter=options.iterations, tol=0.0)

        for warps in WARPS:
            with mock.patch.object(triton_onchip, "solver_warps", return_value=warps):
                try:
                    took = f"{median_us(solve, device, options.rounds, queued_seconds):.1f}"
                except Exception as failure:  # such as more registers or shared memory than there are
                    took = str(failure).partition("\n")[0]
            row = {"n": n, "m": m, "warps": warps, "rule": warps == chosen["num_warps"], "us": took}
            row |= {"batch": options.batch, "d": options.d, "iterations": options.iterations, **origin()}
            print(" ".join(map(str, row.values())), file=sys.stderr)
            yield row


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not HAS_TRITON or (device.type == "cpu" and not INTERPRETED):
        print("sinkhorn_warps: there is no GPU to measure", file=sys.stderr)
        return 2
    write_rows(options.out, measure(options, device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
