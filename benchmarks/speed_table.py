"""Markdown table of transport solvers, for RESULTS.md, from what ``pytest benchmarks/ --csv`` wrote.

python benchmarks/speed_table.py benchmarks/results/cpu.csv
"""

import csv
import sys
from pathlib import Path


def main(path: str) -> None:
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["benchmark"] in ("sinkhorn", "all_pairs")]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    print("| median ms | " + " | ".join(providers) + " | fastest peer / ecgot |")
    print("| --- |" + " --- |" * (len(providers) + 1))
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {row["provider"]: row["median_ms"] for row in rows if row["case"] == case}
        known = {name: float(time) for name, time in times.items() if time}
        peers = [time for name, time in known.items() if name != "ecgot"]
        ratio = f"{min(peers) / known['ecgot']:.1f}" if peers and "ecgot" in known else "-"
        cells = [f"{known[name]:.1f}" if name in known else "-" for name in providers]
        print(f"| {case} | " + " | ".join(cells) + f" | {ratio} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
