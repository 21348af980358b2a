"""Print a Markdown table of providers side by side from what ``pytest benchmarks/ --csv PATH`` wrote.

    python -m benchmarks.speed_table PATH [BENCHMARK ...]    (default: sinkhorn and all_pairs)

The last column is the fastest peer's median time over ecgot's: above 1, ecgot is faster.
"""

import csv
import sys
from pathlib import Path

from ecgot.bench.providers import OURS

DEFAULT = ("sinkhorn", "all_pairs")


def table(rows: list[dict[str, str]], named: bool) -> str:
    """A line a case, in the order of the rows; ``named`` puts the benchmark's name before it."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        case = f"{row['benchmark']} {row['case']}" if named else row["case"]
        of_case = times.setdefault(case, {})
        if row["median_ms"]:
            of_case[row["provider"]] = float(row["median_ms"])
    lines = ["| median ms | " + " | ".join(providers) + " | fastest peer / ecgot |"]
    lines.append("| --- |" + " --- |" * (len(providers) + 1))
    for case, known in times.items():
        cells = [f"{known[name]:.1f}" if name in known else "-" for name in providers]
        lines.append(f"| {case} | " + " | ".join(cells) + f" | {_ratio(known)} |")
    return "\n".join(lines)


def _ratio(known: dict[str, float]) -> str:
    ours = [time for name, time in known.items() if name.startswith(OURS)]
    peers = [time for name, time in known.items() if not name.startswith(OURS)]
    if not (ours and peers):
        return "-"
    exact = min(peers) / min(ours)
    return f"{exact:.1f}" if exact >= 2 else f"{exact:.2f}"


def main(arguments: list[str]) -> None:
    """Print the table of the named benchmarks."""
    if not arguments:
        raise SystemExit(__doc__)
    path, *benchmarks = arguments
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] in (benchmarks or DEFAULT)]
    print(table(rows, named=bool(benchmarks)))


if __name__ == "__main__":
    main(sys.argv[1:])
