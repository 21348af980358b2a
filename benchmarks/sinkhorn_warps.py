"""Time the solver of problems on chip with each number of warps, beside the rule's choice.

    python -m benchmarks.sinkhorn_warps OUT.csv

Needs a GPU. The rule is ``_warps`` in ``ecgot/kernels/_triton_sinkhorn.py``; where another number is faster
by more than the spread of a few runs, it is the rule that is to change.
"""

import argparse
import csv
import io
import sys
from pathlib import Path
from unittest import mock

import torch

from benchmarks.conv1d_table import median_us
from ecgot.bench import origin, unit_vectors
from ecgot.files import write_text
from ecgot.kernels import sinkhorn
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED

SIDES = [(16, 16), (32, 32), (64, 32), (64, 64), (128, 32), (128, 64), (250, 64), (128, 128)]
WARPS = (1, 2, 4, 8, 16)


def measure(batch: int, d: int, iterations: int, device: str, rounds: int) -> list[dict[str, str]]:
    from ecgot.kernels import _triton_sinkhorn as kernels

    rows = []
    options = {"eps": 0.1, "cost": "cosine", "max_iter": iterations, "tol": 0.0}
    for n, m in SIDES:
        x, y = (unit_vectors(batch, count, d, torch.device(device), count) for count in (n, m))
        chosen = kernels._tile_configuration(n, m)
        for warps in WARPS:
            configuration = chosen | {"num_warps": warps}
            with mock.patch.object(kernels, "_tile_configuration", return_value=configuration):
                time = median_us(lambda x=x, y=y: sinkhorn(x, y, **options), device, rounds)
            row = {"n": n, "m": m, "warps": warps, "rule": warps == chosen["num_warps"], "us": f"{time:.1f}"}
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
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(options.out, table.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
