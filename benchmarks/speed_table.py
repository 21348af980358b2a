"""Markdown table of providers side by side, from what ``pytest benchmarks/ --csv`` wrote.

python benchmarks/speed_table.py benchmarks/results/cpu.csv [BENCHMARK ...]    (sinkhorn and all_pairs)
"""

import csv
import sys
from pathlib import Path


def main(path: str, *benchmarks: str) -> None:
    chosen = benchmarks or ("sinkhorn", "all_pairs")
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] in chosen]
    for row in rows:
        row["label"] = f"{row['benchmark']} {row['case']}" if benchmarks else row["case"]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    print("| median ms | " + " | ".join(providers) + " | fastest peer / ecgot |")
    print("| --- |" + " --- |" * (len(providers) + 1))
    for label in dict.fromkeys(row["label"] for row in rows):
        times = {row["provider"]: row["median_ms"] for row in rows if row["label"] == label}
        known = {name: float(time) for name, time in times.items() if time}
        ours = [time for name, time in known.items() if name.startswith("ecgot")]
        peers = [time for name, time in known.items() if not name.startswith("ecgot")]
        ratio = "-"
        if peers and ours:
            exact = min(peers) / min(ours)
            ratio = f"{exact:.1f}" if exact >= 2 else f"{exact:.2f}"
        cells = [f"{known[name]:.1f}" if name in known else "-" for name in providers]
        print(f"| {label} | " + " | ".join(cells) + f" | {ratio} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
