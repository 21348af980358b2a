"""Markdown tables of evaluations, for RESULTS.md.

    python benchmarks/results_table.py RUN/evaluation.json ...

Each file is what ``ecgot evaluate`` leaves (or prints with --json) and lies in its run's folder. Runs that
differ in the seed alone are averaged.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GROUPS = ("superclass", "subclass", "form", "rhythm")
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l")


def main(paths: Iterable[str]) -> None:
    runs = sorted((_load(Path(path)) for path in paths), key=lambda run: (run["name"], run["seed"]))
    ranked = [(f"zero-shot, {run['name']}", run, run["zero_shot"]) for run in runs]
    ranked += [(f"linear probe, OT weight {run['ot_weight']:g}", run, run["probe"]) for run in runs]
    print(_table(("macro AUROC", "seed", *GROUPS), _auroc_rows(ranked)))
    print(_table(("reports", "seed", *map(_title, METRICS)), _report_rows(runs)))


def _load(path: Path) -> dict[str, Any]:
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    weight = config["align"]["ot_weight"]
    name = f"OT weight {weight:g}, {evaluation['score']} score"
    return evaluation | {"name": name, "ot_weight": weight, "seed": config["seed"]}


def _auroc_rows(ranked: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> dict[tuple[str, str], list[str]]:
    """By name and seed, each group's "macro [low, high]"; then each name's mean over its seeds."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys(name for name, _, _ in ranked):
        of_name = {run["seed"]: ranking for other, run, ranking in ranked if other == name}
        for seed, ranking in of_name.items():
            cells = (ranking[group] for group in GROUPS)
            rows[name, str(seed)] = [f"{c['macro']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells]
        means = [_mean([ranking[group]["macro"] for ranking in of_name.values()]) for group in GROUPS]
        rows[name, "mean"] = [f"**{mean:.3f}**" for mean in means]
    return rows


def _report_rows(runs: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    rows: dict[tuple[str, str], list[str]] = {}
    written = {(run["ot_weight"], run["seed"]): run["reports"] for run in runs if run["reports"]}
    for weight in sorted({weight for weight, _ in written}):
        seeds = [seed for other, seed in written if other == weight]
        for system in written[weight, seeds[0]]:
            name = f"{system.replace('_', ' ')}, OT weight {weight:g}"
            per_seed = {seed: written[weight, seed][system] for seed in seeds}
            for seed, metrics in per_seed.items():
                rows[name, str(seed)] = [f"{metrics[metric]:.3f}" for metric in METRICS]
            means = [_mean([metrics[metric] for metrics in per_seed.values()]) for metric in METRICS]
            rows[name, "mean"] = [f"**{mean:.3f}**" for mean in means]
    return rows


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _title(metric: str) -> str:
    return metric.upper().replace("_", "-")


def _table(header: tuple[str, ...], rows: dict[tuple[str, str], list[str]]) -> str:
    lines = [header, ("---",) * len(header), *((*key, *cells) for key, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
