"""What commands print for a person to read: tables that fit the terminal, text, and the notice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ecgot.choices import OWN_LABELS
from ecgot.inference.display import NOTICE, SURE, auroc_text, metric_text

BEST_CLASSES = 5  # of each group, that a reading lists


@dataclass(frozen=True)
class Column:
    """A column of a table: its header, which may have several lines, and its cells."""

    header: str
    cells: Sequence[str]
    right: bool = True


def fitting_tables(console: Console, labels: Column | None, columns: Sequence[Column]) -> Iterator[Table]:
    """The columns as one table or, if the terminal is too narrow, as several with the same row labels.

    Nothing is folded, unless the labels and a single column are already too wide.
    """
    unlimited = console.options.update(width=10_000)
    held: list[Column] = []
    for column in columns:
        together = _table(labels, [*held, column])
        if held and Measurement.get(console, unlimited, together).maximum > console.width:
            yield _table(labels, held)
            held = []
        held.append(column)
    yield _table(labels, held)


def _table(labels: Column | None, columns: Sequence[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown = [*([] if labels is None else [labels]), *columns]
    for column in shown:
        table.add_column(Text(column.header), justify="right" if column.right else "left", overflow="fold")
    for row in range(max((len(column.cells) for column in shown), default=0)):
        table.add_row(*(Text(column.cells[row]) if row < len(column.cells) else "" for column in shown))
    return table


def print_benchmark(console: Console, rows: Sequence[Any], origin: Mapping[str, str]) -> None:
    """Timings of each case, as ratios to ecgot's, and what was refused.

    Args:
        rows: :class:`ecgot.bench.cases.Measurement` values.
        origin: what was measured where, by name.
    """
    for case in dict.fromkeys(row.case for row in rows):
        timed = [row for row in rows if row.case == case and not row.refused]
        ours = next(row for row in timed if row.provider == "ecgot")
        columns = [
            Column("ms", [f"{row.median_ms:.2f}" for row in timed]),
            Column("20 %", [f"{row.q20_ms:.2f}" for row in timed]),
            Column("80 %", [f"{row.q80_ms:.2f}" for row in timed]),
            Column("against ecgot", [f"{row.median_ms / ours.median_ms:.1f} x" for row in timed]),
            Column("value error", [f"{row.value_error:.0e}" for row in timed]),
            Column("MB", [f"{row.peak_mb:.1f}" for row in timed]),
        ]
        labels = Column("provider", [row.provider for row in timed], right=False)
        _print_tables(console, case, labels, columns)
        for row in rows:
            if row.case == case and row.refused:
                _print(console, f"{row.provider}: {row.refused}")
        console.print()
    _print(console, ", ".join(f"{name} {value}" for name, value in origin.items()))


def print_evaluation(console: Console, result: Mapping[str, Any], *, intervals: bool) -> None:
    """An evaluation as a dict, see :meth:`ecgot.eval.evaluate.Evaluation.to_dict`."""
    zero_shot = result["zero_shot"]
    scored = {f"zero-shot ({result['score']})": zero_shot}
    if result["probe"]:
        scored["linear probe"] = result["probe"]
    _print_aurocs(console, result, scored, intervals=intervals)
    if result["retrieval"]:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result["retrieval"].items())
        _print(console, f"\nrecall: {shown}")
    if result["reports"]:
        _print_reports(console, result, intervals=intervals)
    for example in result["examples"]:
        lines = (f"record {example['ecg_id']}", f"reference: {example['reference']}")
        _print(console, "\n" + "\n  ".join((*lines, f"generated: {example['generated']}")))
    console.print(f"\n{NOTICE}")


def print_supervised(console: Console, result: Mapping[str, Any], *, intervals: bool) -> None:
    """A supervised evaluation as a dict, see :meth:`ecgot.eval.supervise.SupervisedEvaluation.to_dict`."""
    scored = {f"supervised ({result['encoder']})": result["ranking"]}
    _print_aurocs(console, result, scored, intervals=intervals)
    if result["ranking"].get(OWN_LABELS, {}).get("auroc"):
        _print_labels(console, result["ranking"][OWN_LABELS], intervals=intervals)
    console.print(f"\n{NOTICE}")


def _print_labels(console: Console, found: Mapping[str, Any], *, intervals: bool) -> None:
    """AUROC of each of one's own labels."""
    shown = [
        {
            "macro": found["auroc"][name],
            "low": found["intervals"][name][0],
            "high": found["intervals"][name][1],
        }
        for name in found["auroc"]
    ]
    columns = [
        Column("yes", [str(found["positives"][name]) for name in found["auroc"]]),
        Column("no", [str(found["negatives"][name]) for name in found["auroc"]]),
        Column("AUROC", [auroc_text(each, interval=intervals) for each in shown]),
    ]
    console.print()
    _print_tables(
        console,
        "AUROC of each label that has both",
        Column("label", list(found["auroc"]), right=False),
        columns,
    )


def _print_aurocs(
    console: Console,
    result: Mapping[str, Any],
    scored: Mapping[str, Mapping[str, Mapping[str, Any]]],
    *,
    intervals: bool,
) -> None:
    """Macro AUROC: label groups as rows, systems as columns."""
    groups = next(iter(scored.values()))
    columns = [
        Column("classes", [str(len(found["auroc"])) for found in groups.values()]),
        Column("records", [str(found["records"]) for found in groups.values()]),
    ]
    columns += [
        Column(system, [auroc_text(by_group.get(group), interval=intervals) for group in groups])
        for system, by_group in scored.items()
    ]
    folds = ("fold " if len(result["folds"]) == 1 else "folds ") + ", ".join(map(str, result["folds"]))
    title = f"Macro AUROC{_brackets(intervals)}, {folds}, {result['records']} records"
    _print_tables(console, title, Column("group", list(groups), right=False), columns)


def _print_reports(console: Console, result: Mapping[str, Any], *, intervals: bool) -> None:
    """Report metrics: systems as rows, metrics as columns."""
    systems = result["reports"]
    metrics = next(iter(systems.values()))
    columns = [
        Column(
            _metric_header(metric),
            [metric_text(values[metric], interval=intervals) for values in systems.values()],
        )
        for metric in metrics
    ]
    labels = Column("system", [name.replace("_", " ") for name in systems], right=False)
    console.print()
    title = f"Reports against {result['references']} references{_brackets(intervals)}"
    _print_tables(console, title, labels, columns)
    console.print()
    for name, dialect in result["dialect"].items():
        _print(console, f"{name}: {dialect}")


def _metric_header(metric: str) -> str:
    """ "BLEU-4" of "bleu_4"; "label F1" above the group of "label_f1_rhythm"."""
    if metric.startswith("label_f1_"):
        return "label F1\n" + metric.removeprefix("label_f1_")
    return metric.replace("_", "-").upper()


def _brackets(intervals: bool) -> str:
    return " [95 % interval]" if intervals else ""


def print_reading(console: Console, record: Path, reading: Mapping[str, Any]) -> None:
    """A record's best classes and report; ``reading`` as :meth:`ecgot.inference.reader.Reading.to_dict`."""
    columns = [
        Column(group, [f"{name} {score:.2f}" for name, score in _ranked(scores)[:BEST_CLASSES]], right=False)
        for group, scores in reading["scores"].items()
    ]
    _print_tables(console, f"{record}: score of each class, highest first", None, columns)
    console.print()
    _print_notes(console, reading["notes"])
    console.print("Scores compare records by one class; classes differ in how often they are named.")
    text = "(none: stage 2 has not been trained)" if reading["report"] is None else reading["report"]
    wording = f" in the wording of {reading['recorder']}" if reading["recorder"] else ""
    _print(console, f"report{wording}: {text or '(empty)'}")
    if reading["sentences"]:
        console.print("Probability that the model gives to each of its sentences:")
    for sentence, probability in reading["sentences"]:
        unsure = "" if probability >= SURE else "  (unsure)"
        _print(console, f"  {probability:.2f}  {sentence}{unsure}")
    console.print(NOTICE)


def print_scores(console: Console, scores: Mapping[str, float], notes: Sequence[str]) -> None:
    """A record's score of each text, the highest first."""
    for text, score in _ranked(scores):
        _print(console, f"{text} {score:.2f}")
    _print_notes(console, notes)
    console.print(NOTICE)


def _ranked(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda item: -item[1])


def _print_notes(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        _print(console, f"note: {note}")


def _print_tables(console: Console, title: str, labels: Column | None, columns: Sequence[Column]) -> None:
    _print(console, title)
    for table in fitting_tables(console, labels, columns):
        console.print()
        console.print(table)


def _print(console: Console, text: str) -> None:
    """Print text as it is, wrapped at spaces."""
    console.print(text, markup=False, highlight=False)
