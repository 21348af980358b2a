"""What the command line prints: tables of results, at most 80 columns wide."""

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from ecgot.inference.display import auroc_text, metric_text


def _bench_tables(rows: list[Any]) -> Iterator[Table]:
    for case in dict.fromkeys(row.case for row in rows):
        table = Table("provider", "ms", "20 %", "80 %", "against ecgot", "value error", "MB", title=case)
        of_case = [row for row in rows if row.case == case]
        ours = next(row for row in of_case if row.provider == "ecgot")
        for row in of_case:
            if row.refused:
                table.add_row(row.provider, "-", "-", "-", "-", row.refused, "-")
                continue
            times = [f"{value:.2f}" for value in (row.median_ms, row.q20_ms, row.q80_ms)]
            ratio = f"{row.median_ms / ours.median_ms:.1f} x"
            table.add_row(row.provider, *times, ratio, f"{row.value_error:.0e}", f"{row.peak_mb:.1f}")
        yield table


def _auroc_table(result: dict[str, Any]) -> Table:
    folds = ", ".join(map(str, result["folds"]))
    table = Table(title=f"Macro AUROC [95 % interval], fold {folds}, {result['records']} records")
    for name in ("group", "classes", "records", f"zero-shot ({result['score']})", "linear probe"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group, ranking in result["zero_shot"].items():
        probe = result["probe"].get(group)
        table.add_row(
            group,
            str(len(ranking["auroc"])),
            str(ranking["records"]),
            auroc_text(ranking),
            auroc_text(probe),
        )
    return table


def _supervised_table(result: dict[str, Any]) -> Table:
    folds = ", ".join(map(str, result["folds"]))
    table = Table(title=f"Macro AUROC [95 % interval], fold {folds}, {result['records']} records")
    for name in ("group", "classes", "records", f"supervised ({result['encoder']})"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for group, ranking in result["ranking"].items():
        table.add_row(group, str(len(ranking["auroc"])), str(ranking["records"]), auroc_text(ranking))
    return table


def _report_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"Reports, {result['references']} references")
    table.add_column("metric", no_wrap=True)
    for system in result["reports"]:
        table.add_column(system.replace("_", " "), justify="right", overflow="fold")
    for metric in next(iter(result["reports"].values())):
        values = (metric_text(metrics[metric]) for metrics in result["reports"].values())
        table.add_row(metric.replace("_", "-").upper(), *values)
    return table


def _ranked(scores: dict[str, float], count: int) -> list[str]:
    best = sorted(scores.items(), key=lambda item: -item[1])[:count]
    return [f"{name} {value:.2f}" for name, value in best]
