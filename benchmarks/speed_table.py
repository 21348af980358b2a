"""Print a Markdown table of providers side by side from what ``pytest benchmarks/ --csv PATH`` wrote.

    python -m benchmarks.speed_table PATH [BENCHMARK ...]    (default: transport)

The last columns are the fastest peer's median time over ecgot's, above 1 where ecgot is faster, and the time
of ecgot without numba over plain torch's. Below stand the first's least and median, and where we lose.
"""

import csv
import statistics
import sys
from pathlib import Path

from ecgot.bench.providers import OURS, WITHOUT_NUMBA

DEFAULT = ("sinkhorn", "sinkhorn_small", "sinkhorn_large", "all_pairs")


def table(rows: list[dict[str, str]], named: bool) -> str:
    """A line a case, in the order of the rows; ``named`` puts the benchmark's name before it."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        case = f"{row['benchmark']} {row['case']}" if named else row["case"]
        of_case = times.setdefault(case, {})
        if row["median_ms"]:
            of_case[row["provider"]] = float(row["median_ms"])
    lines = ["| median ms | " + " | ".join(providers) + " | fastest peer / ecgot | without numba / torch |"]
    lines.append("| --- |" + " --- |" * (len(providers) + 2))
    for case, known in times.items():
        cells = [_milliseconds(known[name]) if name in known else "-" for name in providers]
        cells += [_shown(fastest_peer(known)), _shown(without_numba(known))]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + _summary(times)


def fastest_peer(known: dict[str, float]) -> float | None:
    """The fastest peer's time over ours; None where one is missing."""
    peers = [time for name, time in known.items() if not name.startswith(OURS)]
    ours = [time for name, time in known.items() if name.startswith(OURS) and name != WITHOUT_NUMBA]
    return min(peers) / min(ours) if ours and peers else None


def without_numba(known: dict[str, float]) -> float | None:
    """Our time without numba over that of plain torch; None where one is missing."""
    return known[WITHOUT_NUMBA] / known["torch"] if {WITHOUT_NUMBA, "torch"} <= known.keys() else None


def _summary(times: dict[str, dict[str, float]]) -> str:
    ratios = {case: ratio for case, known in times.items() if (ratio := fastest_peer(known)) is not None}
    if not ratios:
        return ""
    lost = [
        f"- slower than the fastest peer: {case} ({ratio:.2f})" for case, ratio in ratios.items() if ratio < 1
    ]
    middle = statistics.median(ratios.values())
    least, count = min(ratios.values()), len(ratios)
    head = f"Fastest peer / ecgot: {least:.2f} at least, {middle:.1f} in the median of {count}."
    return "\n".join([head, *lost])


def _milliseconds(time: float) -> str:
    return f"{time:.1f}" if time >= 10 else f"{time:.2f}"


def _shown(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


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
