"""OUT/summary.md: a verdict first, then what it rests on. It is made anew from OUT's other files."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.first_contact import journal
from benchmarks.first_contact.goals import GOALS, outcome
from benchmarks.first_contact.steps import Step
from ecgot.bench.providers import OURS
from ecgot.files import write_text

LONGEST_LIST, SHORT_LIST = 40, 8
LOST = ("failed", "crashed", "given up")
Row = Mapping[str, str]


def write(out: Path, commit: str, steps: Mapping[str, Step]) -> None:
    """Rewrite the summary; a fault in it must not end what it tells of."""
    try:
        write_text(out / journal.SUMMARY, text(out, commit, steps))
    except Exception as failure:  # whatever it is, the files it would have been made of are there
        print(f"summary: {type(failure).__name__}: {failure}", flush=True)


def text(out: Path, commit: str, steps: Mapping[str, Step]) -> str:
    """The summary of what was found at this commit."""
    measured = journal.rows(out, journal.MEASURED, commit)
    tests = journal.rows(out, journal.TESTS, commit)
    told = journal.events(out, commit)
    device = next((row["device"] for row in (*measured, *tests)), "nothing measured yet")
    lines = [f"# First contact: {device}, {commit}", ""]
    lines += [
        f"- {each}" for each in (*_kernels(measured), *_lost(told), *_tests(tests, told), *_goals(measured))
    ]
    lines += ["", *_failures(measured, tests, told), *_table(measured), *_machine(measured)]
    lines += _steps(told, steps)
    return "\n".join(lines) + "\n"


# --- verdict ------------------------------------------------------------------------------------------------


def _wrong(rows: Iterable[Row]) -> list[Row]:
    """What of ecgot was refused for a wrong result; tools that are missing say nothing of a kernel."""
    return [row for row in rows if row["provider"].startswith(OURS) and " error " in row["refused"]]


def _kernels(measured: Sequence[Row]) -> Iterator[str]:
    checks = [row for row in measured if row["provider"].startswith(OURS) and row["errors"]]
    if not checks:
        yield "Kernels: none compared with fp64 yet."
        return
    wrong = Counter(row["item"] for row in _wrong(checks))
    if not wrong:
        yield f"Kernels: RIGHT in {len(checks)} comparisons with fp64."
        return
    named = ", ".join(f"{item} ({count})" for item, count in wrong.items())
    yield f"Kernels: WRONG in {sum(wrong.values())} of {len(checks)} comparisons with fp64: {named}."


def _lost(told: Sequence[Row]) -> Iterator[str]:
    """The items that came to no result, of ecgot and its peers; why stands further down."""
    lost = [each["item"] for each in told if each["item"] and each["event"] in LOST]
    if lost:
        more = f" and {len(lost) - SHORT_LIST} more" if len(lost) > SHORT_LIST else ""
        yield f"Failed or crashed: {', '.join(lost[:SHORT_LIST])}{more}."


def _tests(tests: Sequence[Row], told: Sequence[Row]) -> Iterator[str]:
    if not tests:
        yield "Tests: none ran yet."
        return
    worst = _outcomes(tests)
    counts = Counter(worst.values())
    said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    whole = "tests" in {each["step"] for each in told if each["event"] == "done"}
    yield f"Tests: {said}{'' if whole else '; not all of them ran'}."
    failed = [name for name, each in worst.items() if each == "failed"]
    if failed:
        files = Counter(name.partition("::")[0] for name in failed)
        yield "Failed tests: " + ", ".join(f"{file} ({count})" for file, count in files.most_common())


def _outcomes(tests: Iterable[Row]) -> dict[str, str]:
    """A test's outcome: failed if it ever did."""
    worst: dict[str, str] = {}
    for row in tests:
        if worst.get(row["test"]) != "failed":
            worst[row["test"]] = row["outcome"]
    return worst


def _goals(measured: Sequence[Row]) -> Iterator[str]:
    outcomes = [outcome(goal, measured) for goal in GOALS]
    counts = Counter(each.met for each in outcomes)
    yield f"Goals: {counts[True]} met, {counts[False]} missed, {counts[None]} not measured."
    for each in outcomes:
        met = {True: "MET", False: "MISSED", None: "?"}[each.met]
        yield f"{met}: {each.goal.name}: {each.measured}"


# --- what it rests on ---------------------------------------------------------------------------------------


def _failures(measured: Sequence[Row], tests: Sequence[Row], told: Sequence[Row]) -> list[str]:
    lines = [f"- {row['case']}: {row['refused']}" for row in _wrong(measured)]
    seen = set()
    for row in tests:
        if row["outcome"] == "failed" and row["test"] not in seen:
            seen.add(row["test"])
            lines.append(f"- {row['test']}: {row['message']}")
    ends = (*LOST, "note")
    lines += [
        f"- {each['step']} {each['item']}: {each['event']}, {each['why']}"
        for each in told
        if each["event"] in ends
    ]
    if not lines:
        return []
    more = [f"- and {len(lines) - LONGEST_LIST} more"] if len(lines) > LONGEST_LIST else []
    return ["## Failures and notes", "", *lines[:LONGEST_LIST], *more, ""]


def _table(measured: Sequence[Row]) -> list[str]:
    """What was timed, and what was not and why; not the comparisons alone, of which there are hundreds."""
    rows = [
        row
        for row in measured
        if row["median_ms"] or row["rate"] or (row["refused"] and row not in _wrong(measured))
    ]
    if not rows:
        return []
    lines = ["## Measured", "", "| item | provider | median ms | peak MB | rate | errors | remark |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        remark = "; ".join(each for each in (row["refused"], row["note"]) if each)
        cells = (
            row["item"],
            row["provider"],
            row["median_ms"],
            row["peak_mb"],
            row["rate"],
            row["errors"],
            remark,
        )
        lines.append("| " + " | ".join(cell.replace("|", "/") or "-" for cell in cells) + " |")
    return [*lines, ""]


def _machine(measured: Sequence[Row]) -> list[str]:
    rows = [row for row in measured if row["provider"] == "machine"]
    if not rows:
        return []
    versions = {name: rows[0][name] for name in ("device", "torch", "triton", "flash_sinkhorn")}
    lines = [f"- {name}: {value}" for name, value in versions.items()]
    return ["## Machine", "", *lines, *(f"- {row['case']}: {row['note']}" for row in rows), ""]


def _steps(told: Sequence[Row], steps: Mapping[str, Step]) -> list[str]:
    lines = ["## Steps", ""]
    for name in steps:
        mine = [
            each for each in told if each["step"] == name and not each["item"] and each["event"] != "note"
        ]
        items = Counter(each["event"] for each in journal.ended(told, name).values() if each["item"])
        said = ", ".join(f"{count} {event}" for event, count in sorted(items.items()))
        state = f"{mine[-1]['event']} {mine[-1].get('seconds', '')}".strip() if mine else "not reached"
        lines.append(f"- {name}: {state}{f' ({said})' if said else ''}")
    return lines
