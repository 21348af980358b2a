"""Reading every record of a folder into one table, or into pages: resumable, one line for each bad file."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ecgot.data.formats import FORMATS
from ecgot.errors import EcgotError
from ecgot.files import write_text
from ecgot.inference.reader import Asked, EcgReader
from ecgot.inference.reading import Reading, ReadingError

if TYPE_CHECKING:
    from ecgot.page.index import Entry

SIGNAL_SUFFIXES = {".dat", ".mat"}  # of WFDB records, which their headers name
MEASURED = ("heart_rate_bpm", "pr_ms", "qrs_ms", "qt_ms", "qtc_ms", "axis_deg")
COLUMNS = (
    *("record", "error", "verdict", "remarks", "start_s", "stop_s", "duration_s", "found", "undecided"),
    *("report", *MEASURED, "notes", "notice"),
)


def records_in(folder: Path) -> list[Path]:
    """The records below a folder, sorted: WFDB headers, and files of the formats that can be read.

    Raises:
        EcgotError: there are none.
    """
    suffixes = {suffix for each in FORMATS for suffix in each.suffixes} - SIGNAL_SUFFIXES
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    if not found:
        raise EcgotError(f"folder: expected ECG files below {folder}, got none; ecgot formats lists formats")
    return found


def read_folder(
    reader: EcgReader,
    folder: Path,
    out: Path,
    asked: Asked,
    *,
    resume: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_error: Callable[[str], None] | None = None,
) -> tuple[int, int]:
    """Read every record below ``folder`` into ``out``.

    Args:
        out: a file ``.csv`` or ``.jsonl``, or a folder for pages and their index.
        resume: go on where an earlier call ended; without it ``out`` must not exist.
        progress: called with (records done, records).
        on_error: called with one line for each record that cannot be read.

    Returns:
        How many records were read, and how many could not be.

    Raises:
        EcgotError: there is no record, or ``out`` cannot be used.
    """
    paths = records_in(folder)
    with _output(out, reader, resume) as output:
        left = [path for path in paths if path.resolve() not in output.done]
        failed = 0
        for number, found in enumerate(reader.stream(left, asked), start=len(paths) - len(left) + 1):
            output.add(found)
            if isinstance(found, ReadingError):
                failed += 1
                if on_error is not None:
                    on_error(found.reason)
            if progress is not None:
                progress(number, len(paths))
    return len(left), failed


def _output(out: Path, reader: EcgReader, resume: bool) -> "_Lines":
    if out.exists() and not resume:
        raise EcgotError(
            f"out: expected a new file or folder, got {out}, which exists; --resume continues it"
        )
    if out.suffix == ".jsonl":
        return _Lines(out)
    if out.suffix == ".csv":
        classes = [f"{group}:{name}" for group, rows in reader.scorer.classes.items() for name in rows]
        return _Csv(out, (*COLUMNS, *classes))
    if out.suffix and not out.is_dir():
        raise EcgotError(f"out: expected a file .csv or .jsonl, or a folder for pages, got {out}")
    return _Pages(out)


class _Lines:
    """JSON lines, one for each record. What a kill left of a line is cut off when the file is opened again.

    Attributes:
        done: the records that it held when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.read_bytes() if path.exists() else b""
        whole = held.rfind(b"\n") + 1
        self.earlier = self._parsed(held[:whole].decode("utf-8", errors="replace"))
        self.done = {Path(each["record"]).resolve() for each in self.earlier}
        self._file = path.open("r+" if path.exists() else "w", encoding="utf-8", newline="")
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._write(self._header())

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        try:
            found = [json.loads(line) for line in text.splitlines()]
            return [each | {"record": each["record"]} for each in found]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise EcgotError(
                f"out: expected JSON lines of readings in {self.path}, got another file"
            ) from error

    def _header(self) -> str:
        return ""

    def add(self, found: Reading | ReadingError) -> None:
        """Write a reading, so that it is there whatever comes next."""
        self._write(json.dumps(_values(found)) + "\n")

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Csv(_Lines):
    """A row for each record, with a column for the probability of each class."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._columns = columns
        super().__init__(path)

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        rows = list(csv.DictReader(io.StringIO(text)))
        if text and not text.startswith(self._header()):
            raise EcgotError(
                f"out: expected a CSV of readings by this model in {self.path}, got another file"
            )
        return rows

    def _header(self) -> str:
        return ",".join(self._columns) + "\n"

    def add(self, found: Reading | ReadingError) -> None:
        line = io.StringIO()
        row = {name: " ".join(str(value).split()) for name, value in _row(found).items()}  # one line each
        csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow(row)
        self._write(line.getvalue())


class _Pages(_Lines):
    """A page for each record, and an index made from the lines beside them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        super().__init__(folder / "readings.jsonl")
        self._entries = list(self.earlier)

    def add(self, found: Reading | ReadingError) -> None:
        values = _values(found)
        if isinstance(found, Reading):
            values["page"] = f"{len(self._entries) + 1:06d}.html"
            write_text(self._folder / values["page"], found.to_html())
        self._write(json.dumps(values) + "\n")
        self._entries.append(values)

    def __exit__(self, *_: object) -> None:
        from ecgot.page.index import index

        super().__exit__()
        write_text(self._folder / "index.html", index(map(_entry, self._entries)))


def _values(found: Reading | ReadingError) -> dict[str, Any]:
    if isinstance(found, ReadingError):
        return {"record": found.record, "error": found.reason}
    return found.to_dict()


def _row(found: Reading | ReadingError) -> dict[str, Any]:
    """A CSV's columns, the probability of each class as GROUP:CLASS."""
    if isinstance(found, ReadingError):
        return {"record": found.record, "error": found.reason}
    values = found.to_dict()
    measured = values["measurements"] or {}
    return {
        **{name: values[name] for name in COLUMNS if name in values and values[name] is not None},
        "remarks": "; ".join(remark.text for remark in found.quality.remarks),
        "found": "; ".join(f"{each.name} ({each.probability:.0%})" for each in found.window.stated),
        "undecided": "; ".join(each.name for each in found.window.undecided),
        **{name: f"{measured[name]:.0f}" for name in MEASURED if measured.get(name) is not None},
        "notes": "; ".join(found.notes),
        **{f"{each.group}:{each.code}": f"{each.probability:.4f}" for each in found.findings},
    }


def _entry(values: dict[str, Any]) -> "Entry":
    from ecgot.page.index import Entry

    if "error" in values:
        return Entry(values["record"], problem=values["error"])
    return Entry.from_dict(values, values["page"])
