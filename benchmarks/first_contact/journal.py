"""The files of OUT. Each row is there the moment it is known, and all of them survive whoever wrote them.

Rows are appended by one call each, so that processes may share a file, and a process that is killed leaves
at most the part of a line, which readers leave out.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SUMMARY, LOG, EVENTS = "summary.md", "log.txt", "events.jsonl"
MEASURED, TESTS, PROFILE, TABLE = "measured.csv", "tests.csv", "profile.csv", "conv1d_backends.csv"
STAMP = ("device", "torch", "triton", "flash_sinkhorn", "ecgot commit")
COLUMNS = {
    MEASURED: (
        "step",
        "item",
        "case",
        "provider",
        "clock",
        "rounds",
        "median_ms",
        "q20_ms",
        "q80_ms",
        "errors",
        "marginal_error",
        "iterations",
        "peak_mb",
        "rate",
        "refused",
        "note",
        *STAMP,
    ),
    TESTS: ("test", "outcome", "seconds", "message", *STAMP),
    PROFILE: ("item", "kernel", "metric", "unit", "value", *STAMP),
}
Row = Mapping[str, Any]


def create(out: Path) -> None:
    """Make OUT and the headers of its tables, before several processes append to them."""
    out.mkdir(parents=True, exist_ok=True)
    for name, columns in COLUMNS.items():
        path, header = out / name, ",".join(columns)
        if not path.exists() or not path.stat().st_size:
            path.write_text(header + "\n", encoding="utf-8")
        elif (found := path.read_text(encoding="utf-8").partition("\n")[0]) != header:
            raise SystemExit(f"{path}: expected the columns {header}, got {found}; take an empty folder")


def append(out: Path, name: str, row: Row) -> None:
    """Add a row to a table; what it lacks stays empty, and what the table does not hold is left out."""
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS[name], extrasaction="ignore", lineterminator="\n").writerow(
        {key: _shown(value) for key, value in row.items()}
    )
    _append_line(out / name, text.getvalue())


def rows(out: Path, name: str, commit: str) -> list[dict[str, str]]:
    """The whole rows of a table that were measured at this commit."""
    path = out / name
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        found = list(csv.DictReader(file))
    return [row for row in found if row.get("ecgot commit") == commit and None not in row.values()]


def tell(out: Path, commit: str, event: str, step: str, item: str = "", **details: object) -> None:
    """Note what happened to a step or an item; see :func:`events`."""
    told = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "commit": commit}
    told |= {"event": event, "step": step, "item": item} | {key: str(each) for key, each in details.items()}
    _append_line(out / EVENTS, json.dumps(told) + "\n")


def events(out: Path, commit: str) -> list[dict[str, str]]:
    """What happened at this commit, in order.

    "started" and one of "done", "failed" (it says why), "crashed" (its process ended), "given up" (it was
    started twice and never came to an end), "cut off" (the time was over) or "left out".
    """
    path = out / EVENTS
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            told = json.loads(line)
        except json.JSONDecodeError:
            continue
        if told.get("commit") == commit:
            found.append(told)
    return found


ENDS = ("done", "failed", "crashed", "given up", "left out")


def ended(told: Iterable[Mapping[str, str]], step: str) -> dict[str, Mapping[str, str]]:
    """The end of each item of a step that came to one."""
    return {each["item"]: each for each in told if each["step"] == step and each["event"] in ENDS}


def open_items(told: Sequence[Mapping[str, str]], step: str) -> dict[str, int]:
    """The items that were started and came to no end, and how often they were started."""
    ends, counts = ended(told, step), dict[str, int]()
    for each in told:
        if each["step"] == step and each["event"] == "started" and each["item"] and each["item"] not in ends:
            counts[each["item"]] = counts.get(each["item"], 0) + 1
    return counts


def _append_line(path: Path, line: str) -> None:
    with path.open("ab") as file:
        if file.tell() and not _ends_whole(path):
            line = "\n" + line
        file.write(line.encode())


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def _shown(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
