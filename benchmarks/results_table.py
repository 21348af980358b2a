"""Markdown tables of evaluations, for RESULTS.md.

    python benchmarks/results_table.py EVALUATION.json ...

Each file is what ``ecgot evaluate`` leaves (or prints with --json). A row is named by the settings in which
the runs differ; runs that differ in the seed alone follow each other and are averaged.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str], list[str]]


def main(paths: Iterable[str]) -> None:
    runs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    names = _names(runs)
    runs_by_name = sorted(zip(names, runs, strict=True), key=lambda pair: (pair[0], _seed(pair[1])))
    ranked = [(f"zero-shot, {run['score']} score{name}", run, run["zero_shot"]) for name, run in runs_by_name]
    ranked += [(f"linear probe{name}", run, run["probe"]) for name, run in runs_by_name if run["probe"]]
    groups = list(dict.fromkeys(group for _, _, ranking in ranked for group in ranking))
    print(_table(("macro AUROC", "seed", *groups), _auroc_rows(ranked, groups)))
    written = [
        (f"{system.replace('_', ' ')}{name}", run, metrics)
        for name, run in runs_by_name
        for system, metrics in run["reports"].items()
    ]
    if written:
        metrics = list(written[0][2])
        titles = [metric.upper().replace("_", "-") for metric in metrics]
        print(_table(("reports", "seed", *titles), _report_rows(written, metrics)))


def _names(runs: list[dict[str, Any]]) -> list[str]:
    """Per run ", setting value, ..." of the settings in which the runs differ, seed and paths aside."""
    flat = [_flat(run["settings"]["config"]) for run in runs]
    keys = [key for key in flat[0] if key not in ("seed", "device") and len({str(f[key]) for f in flat}) > 1]
    return ["".join(f", {key} {each[key]}" for key in keys) for each in flat]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _seed(run: dict[str, Any]) -> int:
    return run["settings"]["config"]["seed"]


def _auroc_rows(ranked: list[tuple[str, dict[str, Any], dict[str, Any]]], groups: list[str]) -> Rows:
    """By name and seed, each group's "macro [low, high]"; then each name's mean over its seeds."""
    return _rows(
        ranked,
        groups,
        lambda cell: f"{_number(cell['macro'])} [{_number(cell['low'])}, {_number(cell['high'])}]",
        lambda cell: cell["macro"],
    )


def _report_rows(written: list[tuple[str, dict[str, Any], dict[str, Any]]], metrics: list[str]) -> Rows:
    return _rows(written, metrics, _number, lambda value: value)


def _rows(measured: Iterable[tuple[str, dict[str, Any], dict[str, Any]]], columns, show, value) -> Rows:
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for name, run, cells in measured:
        by_name.setdefault(name, {})[_seed(run)] = cells
    rows: Rows = {}
    for name, by_seed in by_name.items():
        for seed, cells in by_seed.items():
            rows[name, str(seed)] = [show(cells[c]) if c in cells else "-" for c in columns]
        means = [[value(cells[c]) for cells in by_seed.values() if c in cells] for c in columns]
        rows[name, "mean"] = [f"**{_number(_mean(values))}**" for values in means]
    return rows


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _table(header: tuple[str, ...], rows: Rows) -> str:
    lines = [header, ("---",) * len(header), *((*key, *cells) for key, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
