"""Read records with a trained model: findings, a written report, and where they come from."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ecgot.choices import BEAMS
from ecgot.data.formats import RecordSource
from ecgot.data.measurements import Measurements, measure
from ecgot.data.record import Record, prepare
from ecgot.errors import EcgotError, first_line
from ecgot.inference.judgement import agreed, consistent, lacking, notes_on, without
from ecgot.inference.prompts import prompt_scores
from ecgot.inference.reading import Reading, ReadingError, Sentence, Window
from ecgot.inference.scorers import Scored, Supervised, ZeroShot
from ecgot.inference.stretches import Stretch, is_source, load, source_of, starts
from ecgot.inference.zeroshot import BUILT_IN
from ecgot.models.writer import Writer, WrittenReport
from ecgot.runs.checkpoints import load_reporter
from ecgot.runs.run import PRETRAINED, Run
from ecgot.runs.supervised import STAGE

BATCH = 64  # stretches that are encoded, and reports that are written, at once
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class ReadOptions:
    """How records are to be read, see :meth:`EcgReader.__call__`."""

    recorder: str = ""
    fs_hz: float | None = None
    leads: Sequence[str] | None = None
    report: bool = True
    measurements: bool = True
    force: bool = False
    start_s: float = 0.0
    window_s: float | None = None


@dataclass
class _Opened:
    """A record on its way through the model.

    Attributes:
        shown: number of the strongest window so far.
        best: what that window was read from; None while no window could be read.
        refused: signal of the first window that could not be read.
        written: the report of the strongest window; None if none is to be written.
        failure: why reading ended before the record did; what was read before stays.
    """

    name: str
    source: RecordSource
    starts: list[float]
    windows: list[Window] = field(default_factory=list)
    shown: int = 0
    best: Scored | None = None
    refused: Record | None = None
    written: WrittenReport | None = None
    failure: str | None = None

    def add_refused(self, stretch: Stretch) -> None:
        """Add a window of which nothing is said. The first one's signal is shown if nothing else is."""
        self.windows.append(Window(stretch.start_s, stretch.stop_s, stretch.quality))
        if self.refused is None:
            self.refused = stretch.record

    def add(self, window: Window, scored: Scored) -> None:
        """Add a window, and what it was read from, which is kept if it is the strongest so far."""
        self.windows.append(window)
        if self.best is None or window.weight > self.windows[self.shown].weight:
            self.shown, self.best = len(self.windows) - 1, scored


class EcgReader:
    """A trained model, loaded once to read any number of records.

    Args:
        run: the run to load; by default the model that comes with the package.
        prompts: a TOML file to use instead of the built-in prompts.
        score: how classes are scored, see :func:`ecgot.inference.zeroshot.check_score`.
        num_beams: beams of the report search; 1 is greedy.

    Attributes:
        config: the run's :class:`ecgot.runs.config.Config`.
        scorer: what gives classes their scores, see :mod:`ecgot.inference.scorers`.
        reporter: what writes reports; None if stage 2 has not been trained.
        recorders: the recorders whose wording a report can follow.
        threads: that read files.
        settings: the arguments but ``run``.

    Raises:
        EcgotError: the run cannot be used.
    """

    def __init__(
        self,
        run: Run | None = None,
        *,
        prompts: Path = BUILT_IN,
        score: str | None = None,
        num_beams: int = BEAMS,
    ) -> None:
        self.run = Run.open(PRETRAINED) if run is None else run
        self.config, self.num_beams, self.threads = self.run.config(), num_beams, os.cpu_count()
        self.settings = {"prompts": prompts, "score": score, "num_beams": num_beams}
        self.scorer: ZeroShot | Supervised
        self.reporter: Writer | None = None
        if self.run.done(STAGE):
            self.scorer = Supervised(self.run)
        else:
            self.scorer = ZeroShot(self.run, prompts, score)
            if self.run.done("report"):
                self.reporter = load_reporter(self.run, self.scorer.model.ecg_width)
        self.recorders = () if self.reporter is None else self.reporter.recorders

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, **settings: Any) -> "EcgReader":
        """The reader of a run's folder, or of one that :meth:`save_pretrained` or ``ecgot export`` made.

        Args:
            path: by default the model that comes with the package.
            settings: see :class:`EcgReader`.

        Raises:
            EcgotError: the folder cannot be used.
        """
        return cls(None if path is None else Run.open(Path(path)), **settings)

    def save_pretrained(self, folder: str | Path, *, trained_on: str | None = None) -> None:
        """Write the model to a new folder, from which it can be read without a text encoder.

        Raises:
            EcgotError: the folder exists, or the run cannot be exported.
        """
        from ecgot.inference.export import UNKNOWN, export

        export(self.run, Path(folder), trained_on=trained_on or UNKNOWN)

    def __repr__(self) -> str:
        data = self.config.data
        return (
            f"EcgReader({str(self.run.folder)!r}, {self.config.encoder.name}, {len(data.leads)} leads, "
            f"{data.seconds:g} s at {data.fs_hz:g} Hz)"
        )

    # --- reading --------------------------------------------------------------------------------------------

    def __call__(
        self,
        records: Any,
        *,
        fs_hz: float | None = None,
        leads: Sequence[str] | None = None,
        recorder: str | None = None,
        report: bool = True,
        measurements: bool = True,
        force: bool = False,
        start_s: float = 0.0,
        window_s: float | None = None,
    ) -> Any:
        """Read one record, or a list of them.

        Args:
            records: a path, an array [L, T] or [T, L] in mV, a :class:`wfdb.Record`, or a list or batch
                [B, L, T] of them.
            fs_hz, leads: of arrays: the sampling rate and the leads' names.
            recorder: one of ``reader.recorders``, whose wording the report should follow; None if unknown.
            report: write a report, if the run can.
            measurements: measure rate, intervals and axis, and compare the report with them.
            force: say what the model makes of it even where the signal is refused.
            start_s, window_s: the part of each record to read; by default all of it.

        Returns:
            A :class:`Reading`; for a list, a list in its order, with a :class:`ReadingError` where a record
            cannot be read.

        Raises:
            EcgotError: a single record cannot be read, or the model does not know the recorder.
        """
        single = not _is_list(records)
        options = self.options(
            recorder=recorder,
            fs_hz=fs_hz,
            leads=leads,
            report=report,
            measurements=measurements,
            force=force,
            start_s=start_s,
            window_s=window_s,
        )
        found = list(self.stream([records] if single else records, options))
        if not single:
            return found
        if isinstance(found[0], ReadingError):
            raise EcgotError(found[0].reason)
        return found[0]

    def options(self, *, recorder: str | None = None, **settings: Any) -> ReadOptions:
        """How to read, checked: the keywords of :meth:`__call__`.

        Raises:
            EcgotError: the model does not know the recorder.
        """
        return ReadOptions(recorder=self._known_recorder(recorder), **settings)

    @torch.no_grad()
    def stream(self, records: Iterable[Any], options: ReadOptions) -> Iterator[Reading | ReadingError]:
        """The readings of any number of records, in order, holding no more than a batch of them."""
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            for some in _batches(records):
                opened = list(pool.map(functools.partial(_open, options, self.config.data.seconds), some))
                good = [each for each in opened if isinstance(each, _Opened)]
                self._score(good, options, pool)
                self._write(good, options)
                for each in opened:
                    if isinstance(each, ReadingError):
                        yield each
                    elif each.failure is not None and not each.windows:
                        yield ReadingError(each.name, each.failure)
                    else:
                        yield self._reading(each, options)

    def _score(self, opened: Sequence[_Opened], options: ReadOptions, pool: ThreadPoolExecutor) -> None:
        """Read, encode and score every stretch of the records."""
        jobs = ((each, start_s) for each in opened for start_s in each.starts)
        for some in _batches(jobs):
            stretches = list(pool.map(lambda job: self._load(job[0], job[1], options), some))
            read = [each.record for each in stretches if each is not None and each.readable and each.record]
            scored = iter(self.scorer.scored(read) if read else ())
            for (each, _), stretch in zip(some, stretches, strict=True):
                if stretch is None:
                    continue
                if stretch.record is None or not stretch.readable:
                    each.add_refused(stretch)
                    continue
                found = next(scored)
                each.add(self._window(stretch, found), found)

    def _window(self, stretch: Stretch, scored: Scored) -> Window:
        """What is found in a stretch."""
        lacks = lacking(scored.record, stretch.quality)
        findings = consistent(self.scorer.findings(scored.scores), stretch.quality)
        findings = without(findings, lacks)
        return Window(stretch.start_s, stretch.stop_s, stretch.quality, findings, scored.scores)

    def _load(self, opened: _Opened, start_s: float, options: ReadOptions) -> Stretch | None:
        """A stretch; None if it cannot be read, which ends the reading of its record."""
        if opened.failure is not None:
            return None
        data = self.config.data
        length_s = data.seconds if options.window_s is None else min(data.seconds, options.window_s)
        found = attempt(
            opened.name, lambda: load(opened.source, start_s, length_s, data, force=options.force)
        )
        if isinstance(found, ReadingError):
            opened.failure = found.reason
            return None
        return found

    def _write(self, opened: Sequence[_Opened], options: ReadOptions) -> None:
        """Write the reports of those records of which a window could be read."""
        if not options.report or self.reporter is None:
            return
        said = [(each, each.best) for each in opened if each.best is not None]
        if not said:
            return
        written = self.reporter.write(
            torch.stack([best.tokens for _, best in said]),
            torch.stack([best.mask for _, best in said]),
            recorders=[options.recorder] * len(said),
            num_beams=self.num_beams,
        )
        for (each, _), report in zip(said, written, strict=True):
            each.written = report

    def _reading(self, opened: _Opened, options: ReadOptions) -> Reading:
        """Everything that is said of a record whose windows were scored."""
        best, written = opened.best, opened.written
        window, signal = opened.windows[opened.shown], opened.refused
        unread_notes = [] if opened.failure is None else [f"not read to the end: {opened.failure}"]
        notes, measured = (
            [*unread_notes, *opened.source.notes, *unread(opened.windows, opened.source, options)],
            None,
        )
        sentences: tuple[Sentence, ...] = ()
        if best is not None:
            signal = best.record
            lacks = lacking(signal, window.quality)
            notes += [] if self.scorer.note is None else [self.scorer.note]
            notes += notes_on(signal, window, lacks, self.config.data.seconds)
            if options.measurements:
                measured = self._measured(opened, window)
            if written is not None:
                sentences, left_out = agreed(written.sentences, window, measured, lacks)
                notes += left_out
        return Reading(
            record=opened.name,
            duration_s=opened.source.samples / opened.source.fs_hz,
            windows=tuple(opened.windows),
            shown=opened.shown,
            report=None if written is None else ". ".join(each.text for each in sentences),
            sentences=sentences,
            written=None if written is None else written.text,
            measurements=measured,
            notes=tuple(notes),
            recorder=options.recorder or None,
            calibrated=bool(self.scorer.calibration.classes),
            signal=signal,
            explain=None if best is None else functools.partial(self.scorer.explain, best.record),
        )

    def _measured(self, opened: _Opened, window: Window) -> Measurements | None:
        """Measured at the record's own rate, at which pacing spikes and the ends of waves show."""
        length_s = window.stop_s - window.start_s
        data = self.config.data

        def measured() -> Measurements:
            raw = prepare(
                opened.source,
                window.start_s,
                length_s,
                highpass_hz=data.highpass_hz,
                missing_leads="estimate",
            )
            return measure(raw.signal_mv, raw.fs_hz, raw.leads)

        found = attempt(opened.name, measured)
        return None if isinstance(found, ReadingError) else found

    # --- other uses -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(self, record: Any, prompts: Sequence[str], **options: Any) -> dict[str, float]:
        """The score of each text for a record's strongest window; needs the run's text encoder.

        Args:
            record: as in :meth:`__call__`, whose keywords ``fs_hz``, ``leads``, ``force``, ``start_s`` and
                ``window_s`` are taken too.
            prompts: texts such as a report's phrases. A text that denies a finding gets the score of the
                finding with the opposite sign.

        Raises:
            EcgotError: the record or the text encoder cannot be used, or a text is empty or no finding.
        """
        scorer = self._zero_shot()
        if _is_list(record):
            raise EcgotError("record: expected one record, got several")
        model, text = scorer.model_with_text()
        reading = self(record, report=False, measurements=False, **options)
        ecg = model.project_tokens(scorer.encode([_signal(reading)]))
        scores = prompt_scores(model, text, ecg, prompts, score=scorer.score)
        return {prompt: float(score[0]) for prompt, score in scores.items()}

    @torch.no_grad()
    def embed(self, records: Any, **options: Any) -> Tensor:
        """Unit-length embeddings [n, E] of a list of records, or [E] of one: of each one's strongest window.

        Args:
            records: as in :meth:`__call__`, whose keywords ``fs_hz``, ``leads``, ``force``, ``start_s`` and
                ``window_s`` are taken too.

        Raises:
            EcgotError: a record cannot be read, or is refused.
        """
        scorer = self._zero_shot()
        single = not _is_list(records)
        readings = self([records] if single else records, report=False, measurements=False, **options)
        signals = [_signal(reading) for reading in readings]
        parts = [scorer.model.project_tokens(scorer.encode(some)).pooled for some in _batches(signals)]
        pooled = torch.cat(parts) if parts else torch.zeros(0, self.config.align.width)
        return pooled[0] if single else pooled

    def _zero_shot(self) -> ZeroShot:
        if isinstance(self.scorer, Supervised):
            raise EcgotError("run: expected one of ecgot train, got one of ecgot supervise")
        return self.scorer

    def _known_recorder(self, recorder: str | None) -> str:
        """The recorder with single spaces, "" if it is unknown."""
        name = "" if recorder is None else " ".join(recorder.split())
        if recorder is not None and name not in self.recorders:
            if not self.recorders:
                raise EcgotError(
                    f"recorder: expected none, as this model knows no recorder, got {recorder!r}"
                )
            raise EcgotError(
                f"recorder: expected one of {', '.join(map(repr, self.recorders))}, got {recorder!r}"
            )
        return name


def _is_list(records: Any) -> bool:
    """Whether these are several records: a list, an iterator, or a batch [B, L, T]."""
    if isinstance(records, str | Path) or is_source(records) or hasattr(records, "sig_name"):
        return False
    if hasattr(records, "ndim"):
        return bool(records.ndim > 2)
    if not isinstance(records, Iterable):
        raise EcgotError(f"records: expected a path, an array, or a list of them, got {records!r}")
    return True


def _name(item: Any) -> str:
    return str(item) if isinstance(item, str | Path) else str(getattr(item, "name", None) or "array")


def unread(windows: Sequence[Window], source: RecordSource, options: ReadOptions) -> tuple[str, ...]:
    """A note on the end of what was asked for, if it is too short to be read on its own."""
    stop_s = source.samples / source.fs_hz
    if options.window_s is not None:
        stop_s = min(stop_s, options.start_s + options.window_s)
    rest_s = stop_s - windows[-1].stop_s
    return (f"the last {rest_s:.3g} s are not read",) if rest_s >= 1.5 / source.fs_hz else ()


def _open(options: ReadOptions, seconds: float, item: Any) -> _Opened | ReadingError:
    def opened() -> _Opened:
        source = source_of(item, fs_hz=options.fs_hz, leads=options.leads)
        where = starts(source, seconds, start_s=options.start_s, window_s=options.window_s)
        name = str(item) if isinstance(item, str | Path) else source.name
        return _Opened(name, source, where)

    return attempt(_name(item), opened)


def attempt(name: str, read: Callable[[], _Found]) -> _Found | ReadingError:
    """What ``read`` returns, or why it failed: one record never ends the reading of others."""
    try:
        return read()
    except EcgotError as error:
        return ReadingError(name, str(error))
    except Exception as error:  # whatever a parser makes of a damaged file
        return ReadingError(name, f"record {name}: cannot be read ({first_line(error)})")


def _batches(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    iterator = iter(items)
    while some := list(islice(iterator, BATCH)):
        yield some


def _signal(reading: Reading | ReadingError) -> Record:
    if isinstance(reading, ReadingError):
        raise EcgotError(reading.reason)
    if reading.signal is None or reading.refused:
        reasons = "; ".join(remark.text for remark in reading.quality.remarks)
        raise EcgotError(f"record {reading.record}: expected an ECG that can be read, got {reasons}")
    return reading.signal
