"""How the time of a solve grows with the batch, the points, the dimension and 1 / eps.

    python -m benchmarks.growth OUT.csv OUT.png [--threads N]

measures ecgot and its peers around one case, one dimension at a time, and draws the curves.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import stamp, write_rows
from ecgot.bench.apart import compare
from ecgot.bench.cases import Case
from ecgot.bench.providers import GPU_PROVIDERS, PROVIDERS

CENTRE = Case(32, 64, 64, 64, 0.1, 1e-4)
CURVES: dict[str, list[Any]] = {
    "batch": [1, 4, 16, 64, 256],
    "n": [16, 32, 64, 128, 256, 512],  # M grows with N
    "d": [16, 64, 256, 1024],
    "eps": [0.4, 0.2, 0.1, 0.05, 0.025],
}
TITLES = {"batch": "B", "n": "N = M", "d": "D", "eps": "1 / eps"}


def main() -> None:
    """Parse the command line, measure, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_rows(options.csv, rows)
    draw(rows, options.png)


def measure(device: torch.device) -> list[dict[str, Any]]:
    """A row for each provider at each point of each curve."""
    rows, measured_on = [], stamp()
    for curve, values in CURVES.items():
        for value in values:
            case = dataclasses.replace(CENTRE, **{curve: value} | ({"m": value} if curve == "n" else {}))
            for found in compare(case, device):
                print(
                    f"{found.case}  {found.provider:12} {found.refused or f'{found.median_ms:.2f} ms'}",
                    flush=True,
                )
                rows.append({"curve": curve, "at": value} | found.as_row() | measured_on)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against each dimension in logarithmic axes, a curve a provider."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(16, 4), sharey=True)
    for axis, curve in zip(axes, CURVES, strict=True):
        for provider in PROVIDERS | GPU_PROVIDERS:
            points = [
                (1 / row["at"] if curve == "eps" else row["at"], row["median_ms"])
                for row in rows
                if row["curve"] == curve and row["provider"] == provider and row["median_ms"] is not None
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=provider) if points else None
        axis.set(xscale="log", yscale="log", xlabel=TITLES[curve])
        at = [1 / value if curve == "eps" else value for value in CURVES[curve]]
        axis.set_xticks(at, [f"{value:g}" for value in at])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("forward + backward, ms")
    axes[-1].legend()
    figure.suptitle(f"{CENTRE}; {rows[0]['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
