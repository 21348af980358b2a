"""What commands print for a person to read: tables that fit the terminal, text, and the notice."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ecgot.choices import OWN_LABELS
from ecgot.inference.display import NOTICE, SURE, auroc_text, metric_text

if TYPE_CHECKING:
    from ecgot.inference.reading import Reading, Window

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
    if "evidence" in result:
        _print_grounding(console, result["evidence"])
    for example in result["examples"]:
        lines = (f"record {example['ecg_id']}", f"reference: {example['reference']}")
        _print(console, "\n" + "\n  ".join((*lines, f"generated: {example['generated']}")))
    console.print(f"\n{NOTICE}")


def _print_grounding(console: Console, evidence: Mapping[str, Any]) -> None:
    """How often evidence for a premature beat points at one, see :mod:`ecgot.eval.grounding`."""
    _print(console, "\nEvidence within 0.4 s of a premature beat (by chance):")
    for name, found in evidence.items():
        shares = "-" if not found["records"] else f"{found['hits']:.3f} ({found['chance']:.3f})"
        _print(console, f"  {name}: {shares} in {found['records']} records")


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


def print_reading(console: Console, reading: "Reading") -> None:
    """What is said of a record, for a person to read."""
    window = reading.window
    _print(console, reading.record)
    _print(console, _VERDICTS[window.quality.verdict])
    for remark in window.quality.remarks:
        _print(console, f"  {remark.text}")
    for note in reading.notes:
        _print(console, f"note: {note}")
    if len(reading.windows) > 1:
        _print_windows(console, reading)
    if reading.refused:
        _print(console, "Nothing is said of it; --force says what the model makes of it all the same.")
        console.print(NOTICE)
        return
    console.print()
    _print_findings(console, reading)
    _print_measurements(console, reading)
    _print_report(console, reading)
    console.print(NOTICE)


_VERDICTS = {"good": "an ECG", "doubtful": "an ECG, with reservations", "refused": "not a usable ECG"}


def _print_windows(console: Console, reading: "Reading") -> None:
    _print(
        console,
        f"{len(reading.windows)} windows in {reading.duration_s:g} s; shown is the strongest, from "
        f"{reading.window.start_s:g} to {reading.window.stop_s:g} s. What was found where:",
    )
    for found, alike in groupby(reading.windows, _found_in):  # a line for each change, not for each window
        together = list(alike)
        _print(console, f"  {together[0].start_s:8.1f} to {together[-1].stop_s:8.1f} s  {found}")


def _found_in(window: "Window") -> str:
    if window.quality.verdict == "refused":
        return "not a usable ECG"
    return ", ".join(each.name for each in window.stated[:BEST_CLASSES]) or "nothing"


def _print_findings(console: Console, reading: "Reading") -> None:
    """What is found, and the most probable of what is undecided."""
    window = reading.window
    for title, findings in (("Found", window.stated), ("Undecided", window.undecided[:BEST_CLASSES])):
        _print(console, title if findings else f"{title}: nothing")
        for each in findings:
            interval = f"  {each.low:4.0%} to {each.high:4.0%}" if reading.calibrated else ""
            _print(console, f"  {each.probability:4.0%}{interval}  {each.name} ({each.code})")
    console.print()


def _print_measurements(console: Console, reading: "Reading") -> None:
    measured = reading.measurements
    if measured is None:
        return
    shown = [
        f"{name} {value:.0f} {unit}"
        for name, value, unit in (
            ("heart rate", measured.heart_rate_bpm, "/min"),
            ("PR", measured.pr_ms, "ms"),
            ("QRS", measured.qrs_ms, "ms"),
            ("QT", measured.qt_ms, "ms"),
            ("QTc", measured.qtc_ms, "ms"),
            ("axis", measured.axis_deg, "degrees"),
        )
        if value is not None
    ]
    _print(console, f"measured: {', '.join(shown) or 'nothing could be measured'}")


def _print_report(console: Console, reading: "Reading") -> None:
    if reading.report is None:
        return
    wording = f" in the wording of {reading.recorder}" if reading.recorder else ""
    _print(console, f"report{wording}: {reading.report or '(nothing that agrees with the findings)'}")
    for sentence in reading.sentences:
        sure = "     " if sentence.probability is None else f"{sentence.probability:5.0%}"
        unsure = "  (unsure)" if sentence.probability is not None and sentence.probability < SURE else ""
        named = sentence.finding_probability
        finding = "" if named is None else f"  [finding {named:.0%}]"
        remark = f"  ({sentence.remark})" if sentence.remark else ""
        _print(console, f"  {sure}  {sentence.text}{finding}{unsure}{remark}")


def print_scores(console: Console, scores: Mapping[str, float]) -> None:
    """A record's score of each text, the highest first."""
    for text, score in sorted(scores.items(), key=lambda item: -item[1]):
        _print(console, f"{text} {score:.2f}")
    console.print(NOTICE)


def print_formats(console: Console, formats: Sequence[Any]) -> None:
    """The formats that can be read, see :data:`ecgot.data.formats.FORMATS`."""
    columns = [
        Column("files", [", ".join(each.suffixes) for each in formats], right=False),
        Column("read by", [each.library for each in formats], right=False),
        Column("", ["installed" if each.installed else "not installed" for each in formats], right=False),
    ]
    labels = Column("format", [each.name for each in formats], right=False)
    _print_tables(console, "Formats; pip install 'ecgot[formats]' installs what is missing", labels, columns)


def _print_tables(console: Console, title: str, labels: Column | None, columns: Sequence[Column]) -> None:
    _print(console, title)
    for table in fitting_tables(console, labels, columns):
        console.print()
        console.print(table)


def _print(console: Console, text: str) -> None:
    """Print text as it is, wrapped at spaces."""
    console.print(text, markup=False, highlight=False)
