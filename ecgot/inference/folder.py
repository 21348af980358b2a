"""Reading every record of a folder into one table, or into pages: resumable, one line for each bad file."""

import csv
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from ecgot.data.formats import FORMATS
from ecgot.errors import EcgotError
from ecgot.files import write_text
from ecgot.inference.reader import EcgReader, ReadOptions
from ecgot.inference.reading import Reading, ReadingError
from ecgot.runs.run import Run

if TYPE_CHECKING:
    from ecgot.page.index import Entry

SIGNAL_SUFFIXES = {".dat", ".mat"}  # of WFDB records, which their headers name
FEWEST_RECORDS = 200  # for each further process, which takes seconds to start
CHUNK = 32  # records that a process reads at once
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
    options: ReadOptions,
    *,
    resume: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_error: Callable[[str], None] | None = None,
) -> tuple[int, int]:
    """Read every record below ``folder`` into ``out``.

    Args:
        out: a file ``.csv`` or ``.jsonl``, or a folder for pages and their index.
        resume: go on where an earlier call ended; without it ``out`` must not exist.
        workers: processes that read, each with the model; by default one for each core, but not for few
            records. More than one needs a script that can be imported, as ``multiprocessing`` does.
        progress: called with (records done, records).
        on_error: called with one line for each record that cannot be read.

    Returns:
        How many records were read, and how many could not be.

    Raises:
        EcgotError: there is no record, or ``out`` cannot be used.
    """
    results = out.resolve()  # may lie in the folder, and a CSV would pass for a record
    paths = [path for path in records_in(folder) if path.resolve() != results]
    with _output(out, reader, resume) as output:
        left = [path for path in paths if output.key(path) not in output.done]
        failed = 0
        several = min(os.cpu_count() or 1, len(left) // FEWEST_RECORDS) if workers is None else workers
        pages = isinstance(output, _Pages)
        readings = _stream(reader, left, options, pages=pages, workers=several)
        for number, (found, page) in enumerate(readings, start=len(paths) - len(left) + 1):
            output.add(found, page)
            if isinstance(found, ReadingError):
                failed += 1
                if on_error is not None:
                    on_error(found.reason)
            if progress is not None:
                progress(number, len(paths))
    return len(left), failed


def _stream(
    reader: EcgReader, paths: Sequence[Path], options: ReadOptions, *, pages: bool, workers: int
) -> Iterator[tuple[Reading | ReadingError, str | None]]:
    """The readings in order, each with its page if pages are wanted.

    Most of a reading is Python between small arrays, which threads do not share out; processes do.
    """
    if workers <= 1:
        yield from ((found, _page(found, pages)) for found in reader.stream(paths, options))
        return
    model = (reader.run.folder, reader.settings, options, pages)
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, model)
    try:
        for chunk in executor.map(_read_chunk, chunks):
            yield from chunk
    finally:
        executor.shutdown(cancel_futures=True)


_WORKER: dict[str, Any] = {}  # what a worker reads with


def _start(folder: Path, settings: dict[str, Any], options: ReadOptions, pages: bool) -> None:
    torch.set_num_threads(1)
    reader = EcgReader(Run.open(folder), **settings)
    reader.threads = 1
    _WORKER.update(reader=reader, options=options, pages=pages)


def _read_chunk(paths: Sequence[Path]) -> list[tuple[Reading | ReadingError, str | None]]:
    """Readings without what stays in this process: their signal and model."""
    found = []
    for each in _WORKER["reader"].stream(paths, _WORKER["options"]):
        page = _page(each, _WORKER["pages"])
        found.append((replace(each, signal=None, explain=None) if isinstance(each, Reading) else each, page))
    return found


def _page(found: Reading | ReadingError, wanted: bool) -> str | None:
    return found.to_html() if wanted and isinstance(found, Reading) else None


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

    _KIND = "JSON lines of readings"

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.read_bytes() if path.exists() else b""
        whole = held.rfind(b"\n") + 1
        if not whole and not _begin(held, self._start()):
            raise self._foreign()
        self.earlier = self._parsed(held[:whole].decode("utf-8", errors="replace"))
        self.done = {self.key(each["record"]) for each in self.earlier}
        self._file = path.open("r+" if path.exists() else "w", encoding="utf-8", newline="")
        self._file.seek(whole)
        self._file.truncate()
        if not whole:
            self._write(self._header())

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        try:
            found = [json.loads(line) for line in text.splitlines()]
            return [each | {"record": str(each["record"])} for each in found]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise self._foreign() from error

    def _foreign(self) -> EcgotError:
        return EcgotError(f"out: expected {self._KIND} in {self.path}, got another file")

    def _start(self) -> str:
        """How a file of this kind begins."""
        return '{"record": '

    def _header(self) -> str:
        return ""

    def key(self, record: str | Path) -> str:
        """What is equal for the same record by any path."""
        return self.name(str(Path(record).resolve()))

    @staticmethod
    def name(record: str) -> str:
        """A record's name as the file holds it."""
        return record

    def add(self, found: Reading | ReadingError, page: str | None) -> None:
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

    _KIND = "a CSV of readings by this model"

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._columns = columns
        super().__init__(path)

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")  # of a spreadsheet program
        rows = list(csv.DictReader(io.StringIO(text)))
        if text and not text.startswith(self._header()):
            raise self._foreign()
        return rows

    def _start(self) -> str:
        return self._header()

    def _header(self) -> str:
        return self._line({name: name for name in self._columns})

    def _line(self, row: Mapping[str, Any]) -> str:
        line = io.StringIO()
        values = {name: self.name(str(value)) for name, value in row.items()}
        csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow(values)
        return line.getvalue()

    @staticmethod
    def name(record: str) -> str:
        """In one line, with bytes that are no UTF-8 escaped."""
        return " ".join(record.encode(errors="backslashreplace").decode().split())

    def add(self, found: Reading | ReadingError, page: str | None) -> None:
        """Write a row."""
        self._write(self._line(_row(found)))


class _Pages(_Lines):
    """A page for each record, and an index made from the lines beside them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        super().__init__(folder / "readings.jsonl")
        self._entries = list(self.earlier)
        numbers = [int(page.stem) for page in folder.glob("*.html") if page.stem.isdecimal()]
        self._last = max(numbers, default=0)

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        lines = super()._parsed(text)
        try:
            for each in lines:
                _entry(each)
        except (KeyError, TypeError, AttributeError) as error:
            raise self._foreign() from error
        return lines

    def add(self, found: Reading | ReadingError, page: str | None) -> None:
        values = _values(found)
        if page is not None:
            self._last += 1  # never a page that is there: lines may have been taken out by hand
            values["page"] = f"{self._last:06d}.html"
            write_text(self._folder / values["page"], page)
        self._write(json.dumps(values) + "\n")
        self._entries.append(values)

    def __exit__(self, *_: object) -> None:
        from ecgot.page.index import index

        super().__exit__()
        write_text(self._folder / "index.html", index(map(_entry, self._entries)))


def _begin(held: bytes, start: str) -> bool:
    """Whether what a file holds, and what it should begin with, begin alike."""
    wanted = start.encode()
    return held.startswith(wanted) or wanted.startswith(held)


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
