"""Tables of benchmarks/results/README.md from the folders of runs.

    python -m benchmarks.results collect RUNS benchmarks/results/runs    # each run's evaluation.json alone
    python -m benchmarks.results write benchmarks/results/runs benchmarks/results/README.md
    python -m benchmarks.results check benchmarks/results/runs benchmarks/results/README.md

``check`` exits with 1 where the tables are not those of the evaluations.

A table stands between ``<!-- table KIND GLOB ... -->`` and ``<!-- end -->``; the globs name folders below
the first argument, in order. A row is named by its folder without the seed at its end ("ot-seed0");
rows that differ in the seed alone are averaged. Brackets are 95 % bootstrap intervals over patients.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ecgot.choices import GROUPS

EVALUATION = "evaluation.json"
TOKEN_SCORES = (
    "ot",
    "best_match",
    "mean_match",
)  # retrieval goes by these too, otherwise by pooled embeddings
_TABLE = re.compile(r"^(<!-- table (\S+) (.*?) -->\n).*?^(<!-- end -->)", re.DOTALL | re.MULTILINE)
_SEED = re.compile(r"-?seed(\d+)(?=/|$)")
Evaluated = tuple[str, dict[str, Any]]  # a run's folder below the first argument, and its evaluation
Cell = tuple[str, float | None]  # text and value
Row = tuple[str, str, list[Cell]]  # name, seed, cells


def collect(runs: Path, out: Path) -> None:
    """Copy every evaluation below ``runs`` to the same place below ``out``; paths in it lose folders."""
    for path in sorted(runs.rglob(EVALUATION)):
        target = out / path.relative_to(runs)
        target.parent.mkdir(parents=True, exist_ok=True)
        values = _without_folders(json.loads(path.read_text(encoding="utf-8")))
        target.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def rebuilt(text: str, runs: Path) -> str:
    """The text with every table rebuilt from the evaluations below ``runs``."""

    def table(match: re.Match[str]) -> str:
        head, kind, globs, end = match.groups()
        return f"{head}{TABLES[kind](list(_evaluations(runs, globs.split())))}{end}"

    return _TABLE.sub(table, text)


def _evaluations(runs: Path, globs: Iterable[str]) -> Iterable[Evaluated]:
    """The folder below ``runs`` and the evaluation of each match.

    Raises:
        SystemExit: a glob matches nothing.
    """
    for glob in globs:
        found = sorted(runs.glob(f"{glob}/{EVALUATION}"))
        if not found:
            raise SystemExit(f"results: expected {glob}/{EVALUATION} in {runs}, got no match")
        for path in found:
            folder = path.parent.relative_to(runs).as_posix()
            yield folder, json.loads(path.read_text(encoding="utf-8"))


def _auroc(runs: list[Evaluated]) -> str:
    """Zero-shot, linear probe and supervised macro AUROC by group of classes."""
    rows = [row for kind in (_zero_shot, _probe, _supervised) for row in kind(runs)]
    return _table(("macro AUROC", "seed", *GROUPS), rows)


def _zero_shot_alone(runs: list[Evaluated]) -> str:
    return _table(("macro AUROC", "seed", *GROUPS), list(_zero_shot(runs)))


def _zero_shot(runs: list[Evaluated]) -> Iterable[Row]:
    for folder, run in runs:
        if "zero_shot" in run:
            name, seed = _named(folder)
            yield f"zero-shot, {run['score']} score, {name}", seed, _rankings(run["zero_shot"])


def _probe(runs: list[Evaluated]) -> Iterable[Row]:
    for folder, run in runs:
        if run.get("probe"):
            name, seed = _named(folder)
            yield f"linear probe, {name}", seed, _rankings(run["probe"])


def _supervised(runs: list[Evaluated]) -> Iterable[Row]:
    for folder, run in runs:
        if run.get("kind") == "supervised":
            how = "fine-tuned" if run["from"] else f"supervised, {run['epochs']} epochs"
            name, seed = _named(folder)
            yield f"{how}, {name}", seed, _rankings(run["ranking"])


def _rankings(rankings: Mapping[str, Any]) -> list[Cell]:
    return [_interval(rankings.get(group), "macro") for group in GROUPS]


def _retrieval(runs: list[Evaluated]) -> str:
    """Recall of reports by ECGs and back."""
    names = list(runs[0][1]["retrieval"])
    rows = [
        (
            f"{run['score'] if run['score'] in TOKEN_SCORES else 'cosine'} score, {_named(folder)[0]}",
            _named(folder)[1],
            [_plain(run["retrieval"][n]) for n in names],
        )
        for folder, run in runs
    ]
    return _table(("recall", "seed", *(name.replace("_", " ") for name in names)), rows)


def _reports(runs: list[Evaluated]) -> str:
    """Report metrics by system."""
    names = list(next(iter(runs[0][1]["reports"].values())))
    rows = [
        (
            f"{system.replace('_', ' ')}, {_named(folder)[0]}",
            _named(folder)[1],
            [_interval(v[n], "value") for n in names],
        )
        for system in dict.fromkeys(system for _, run in runs for system in run["reports"])
        for folder, run in runs
        if system in run["reports"]
        for v in [run["reports"][system]]
    ]
    return _table(("reports", "seed", *(name.replace("_", "-") for name in names)), rows)


def _generated(runs: list[Evaluated]) -> str:
    """Report metrics of generated reports only."""
    return _reports(
        [(folder, run | {"reports": {"generated": run["reports"]["generated"]}}) for folder, run in runs]
    )


def _sentences(runs: list[Evaluated]) -> str:
    """How well the probability of a sentence tells whether the reference says it."""
    names = list(runs[0][1]["sentences"])
    rows = [(_named(f)[0], _named(f)[1], [_plain(run["sentences"][n]) for n in names]) for f, run in runs]
    return _table(("sentences", "seed", *(name.replace("_", " ") for name in names)), rows)


TABLES: dict[str, Callable[[list[Evaluated]], str]] = {
    "auroc": _auroc,
    "zero-shot": _zero_shot_alone,
    "retrieval": _retrieval,
    "reports": _reports,
    "generated": _generated,
    "sentences": _sentences,
}


def _named(folder: str) -> tuple[str, str]:
    """ "ablation/ot-seed0" as ("ot", "0")."""
    seed = _SEED.search(folder)
    return _SEED.sub("", folder).split("/", 1)[-1], seed.group(1) if seed else ""


def _interval(cell: Mapping[str, float | None] | None, value: str) -> Cell:
    if cell is None or cell[value] is None:
        return "-", None
    if cell["low"] is None:
        return f"{cell[value]:.3f}", cell[value]
    return f"{cell[value]:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]", cell[value]


def _plain(value: float | None) -> Cell:
    return ("-", None) if value is None else (f"{value:.3f}", value)


def _table(header: tuple[str, ...], rows: list[Row]) -> str:
    """Markdown; rows of one name stand together, followed by their mean if there are several."""
    lines = [header, ("---",) * len(header)]
    for name in dict.fromkeys(row[0] for row in rows):
        same = [row for row in rows if row[0] == name]
        lines += [(name, seed, *(shown for shown, _ in cells)) for _, seed, cells in same]
        if len(same) > 1 and any(value is not None for _, _, cells in same for _, value in cells):
            columns = zip(*(cells for _, _, cells in same), strict=True)
            lines.append((name, "mean", *(_mean([value for _, value in column]) for column in columns)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"**{sum(known) / len(known):.3f}**" if known else "-"


def main(arguments: list[str]) -> None:
    """Run ``collect``, ``write`` or ``check`` with its two paths."""
    if len(arguments) != 3 or arguments[0] not in ("collect", "write", "check"):
        raise SystemExit(__doc__)
    first, second = Path(arguments[1]), Path(arguments[2])
    if arguments[0] == "collect":
        collect(first, second)
        return
    text = second.read_text(encoding="utf-8")
    new = rebuilt(text, first)
    if arguments[0] == "write":
        second.write_text(new, encoding="utf-8")
    elif new != text:
        raise SystemExit(f"results: the tables of {second} are not those of {first}")


if __name__ == "__main__":
    main(sys.argv[1:])
