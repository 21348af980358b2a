"""Read records with a trained model: findings, a written report, and where they come from."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ecgot.choices import BEAMS
from ecgot.data.formats import RecordSource
from ecgot.data.measurements import measure
from ecgot.data.record import Record, fit_length
from ecgot.errors import EcgotError, first_line
from ecgot.inference import calibration as calibrations
from ecgot.inference.calibration import Calibration, Finding
from ecgot.inference.evidence import Evidence, explain
from ecgot.inference.judgement import agreed, lacking, notes_on, without
from ecgot.inference.reading import Reading, ReadingError, Sentence, Window
from ecgot.inference.stretches import Stretch, load, source_of, starts
from ecgot.inference.zeroshot import (
    BUILT_IN,
    EmbeddedPrompts,
    check_score,
    class_scores,
    embed_prompts,
    load_prompts,
    read_prompts,
    scores_fingerprint,
)
from ecgot.models.encoders import EncoderOutput, fuse_norms
from ecgot.models.writer import WrittenReport
from ecgot.runs.checkpoints import load_alignment, load_reporter, transport
from ecgot.runs.device import choose_device
from ecgot.runs.run import PRETRAINED, Run

BATCH = 64  # stretches that are encoded, and reports that are written, at once
_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Asked:
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
        shown: the strongest window so far.
        shown_from: its signal and tokens; None if no window can be read.
        failure: why reading ended before the record did.
    """

    name: str
    source: RecordSource
    starts: list[float]
    windows: list[Window] = field(default_factory=list)
    shown: int = 0
    shown_from: tuple[Record, Tensor, Tensor] | None = None
    failure: str | None = None

    def add(self, window: Window, origin: tuple[Record, Tensor, Tensor] | None) -> None:
        """Add a window, and what it was read from, which is kept if it is the strongest so far."""
        self.windows.append(window)
        if origin is None:
            return
        if self.shown_from is None or window.weight > self.windows[self.shown].weight:
            self.shown, self.shown_from = len(self.windows) - 1, origin


class EcgReader:
    """A trained model, loaded once to read any number of records.

    Args:
        run: the run to load; by default the model that comes with the package.
        prompts: a TOML file to use instead of the built-in prompts.
        score: how classes are scored, see :func:`ecgot.inference.zeroshot.check_score`.
        num_beams: beams of the report search; 1 is greedy.

    Attributes:
        model: the :class:`ecgot.models.alignment.AlignmentModel`; ``model.encoder`` is the ECG encoder, with
            its norms as trained. Records are read by a fused copy of it, made when the reader is.
        config: the run's :class:`ecgot.runs.config.Config`.
        recorders: the recorders whose wording a report can follow.
        calibration: from scores to probabilities.

    The text encoder is loaded only when it is needed: for prompts that the run does not hold as embeddings,
    and for :meth:`classify`.

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
        self.config = self.run.config()
        self.score, self.num_beams = check_score(score, self.config.align), num_beams
        self.device = choose_device(self.config.device)
        self._transport = transport(self.config.align)
        self._text: Any = None
        if prompts == BUILT_IN and self.run.prompts.exists():
            self.model = load_alignment(self.run, None)
            self.prompts = load_prompts(self.run.prompts, self.device)
        else:
            wanted = read_prompts(prompts)
            text = self._load_with_text()
            self.prompts = embed_prompts(self.model, text, wanted)
        self.calibration = self._calibration(prompts)
        self._fused_encoder = fuse_norms(self.model.encoder)
        has_report = self.run.done("report")
        self.reporter = load_reporter(self.run, self.model.ecg_width) if has_report else None
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

    def _calibration(self, prompts: Path) -> Calibration:
        """The run's calibration, which is one of "phrase" scores by the built-in prompts; else the identity."""
        file = self.run.folder / calibrations.FILE
        if self.score != "phrase" or prompts != BUILT_IN or not file.exists():
            return Calibration()
        return Calibration.load(file, scores_fingerprint(self.model, self.prompts))

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
        asked = self.asked(
            recorder=recorder,
            fs_hz=fs_hz,
            leads=leads,
            report=report,
            measurements=measurements,
            force=force,
            start_s=start_s,
            window_s=window_s,
        )
        found = list(self.stream([records] if single else records, asked))
        if not single:
            return found
        if isinstance(found[0], ReadingError):
            raise EcgotError(found[0].reason)
        return found[0]

    def asked(self, *, recorder: str | None = None, **settings: Any) -> Asked:
        """How to read, checked: the keywords of :meth:`__call__`.

        Raises:
            EcgotError: the model does not know the recorder.
        """
        return Asked(recorder=self._known_recorder(recorder), **settings)

    @torch.no_grad()
    def stream(self, records: Iterable[Any], asked: Asked) -> Iterator[Reading | ReadingError]:
        """The readings of any number of records, in order, holding no more than a batch of them."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for some in _batches(records):
                opened = list(pool.map(functools.partial(_open, asked, self.config.data.seconds), some))
                good = [each for each in opened if isinstance(each, _Opened)]
                self._score(good, asked, pool)
                written = self._write(good, asked)
                for each in opened:
                    if isinstance(each, ReadingError):
                        yield each
                    elif each.failure is not None:
                        yield ReadingError(each.name, each.failure)
                    else:
                        yield self._reading(each, written.get(id(each)), asked)

    def _score(self, opened: Sequence[_Opened], asked: Asked, pool: ThreadPoolExecutor) -> None:
        """Read, encode and score every stretch of the records."""
        jobs = ((each, start_s) for each in opened for start_s in each.starts)
        for some in _batches(jobs):
            stretches = list(pool.map(lambda job: self._load(*job, asked), some))
            read = [each.record for each in stretches if each is not None and each.record is not None]
            encoded = self._encode(read) if read else None
            scores = iter(self._scores(encoded) if encoded is not None else ())
            row = 0
            for (each, _), stretch in zip(some, stretches, strict=True):
                if stretch is None:
                    continue
                if stretch.record is None or encoded is None:
                    each.add(Window(stretch.start_s, stretch.stop_s, stretch.quality), None)
                    continue
                by_group = next(scores)
                lacks = lacking(stretch.record, stretch.quality)
                findings = without(self.calibration.findings(by_group), lacks)
                window = Window(stretch.start_s, stretch.stop_s, stretch.quality, findings, by_group)
                each.add(window, (stretch.record, encoded.tokens[row], encoded.mask[row]))
                row += 1

    def _load(self, opened: _Opened, start_s: float, asked: Asked) -> Stretch | None:
        """A stretch; None if it cannot be read, which ends the reading of its record."""
        if opened.failure is not None:
            return None
        data = self.config.data
        length_s = data.seconds if asked.window_s is None else min(data.seconds, asked.window_s)
        found = attempt(opened.name, lambda: load(opened.source, start_s, length_s, data, force=asked.force))
        if isinstance(found, ReadingError):
            opened.failure = found.reason
            return None
        return found

    def _encode(self, records: Sequence[Record]) -> EncoderOutput:
        """The tokens of prepared stretches."""
        samples = round(self.config.data.fs_hz * self.config.data.seconds)
        fitted = [fit_length(record.signal_mv, samples) for record in records]
        waveform = torch.from_numpy(np.stack([signal for signal, _ in fitted])).to(self.device)
        lengths = torch.tensor([valid for _, valid in fitted], device=self.device)
        return self._fused_encoder(waveform, None if bool((lengths == samples).all()) else lengths)

    def _scores(self, encoded: EncoderOutput) -> list[dict[str, dict[str, float]]]:
        """Each ECG's score of each class."""
        return scores_by_record(
            class_scores(
                self.model.project_tokens(encoded), self.prompts, score=self.score, transport=self._transport
            ),
            self.prompts,
        )

    def _write(self, opened: Sequence[_Opened], asked: Asked) -> dict[int, WrittenReport]:
        """The reports of the records of which something can be said, by the id of each."""
        if not asked.report or self.reporter is None:
            return {}
        said = [each for each in opened if each.shown_from is not None and each.failure is None]
        if not said:
            return {}
        origins = [each.shown_from for each in said if each.shown_from is not None]
        tokens, masks = ([origin[part] for origin in origins] for part in (1, 2))
        written = self.reporter.write(
            torch.stack(tokens),
            torch.stack(masks),
            recorders=[asked.recorder] * len(said),
            num_beams=self.num_beams,
        )
        return {id(each): text for each, text in zip(said, written, strict=True)}

    def _reading(self, opened: _Opened, written: WrittenReport | None, asked: Asked) -> Reading:
        """Everything that is said of a record whose windows were scored."""
        window, signal = opened.windows[opened.shown], None
        notes, measured = [*opened.source.notes, *filter(None, [self.calibration.note])], None
        sentences: tuple[Sentence, ...] = ()
        if opened.shown_from is not None:
            signal = opened.shown_from[0]
            lacks = lacking(signal, window.quality)
            notes += notes_on(signal, window, lacks, self.config.data.seconds)
            if asked.measurements:
                measured = measure(signal.signal_mv, signal.fs_hz, signal.leads)
            if written is not None:
                sentences = agreed(written.sentences, window, measured, lacks)
        return Reading(
            record=opened.name,
            duration_s=opened.source.samples / opened.source.fs_hz,
            windows=tuple(opened.windows),
            shown=opened.shown,
            report=None if written is None else "".join(f"{each.text}. " for each in sentences).strip(),
            sentences=sentences,
            measurements=measured,
            notes=tuple(notes),
            recorder=asked.recorder or None,
            calibrated=bool(self.calibration.classes),
            signal=signal,
            explain=None if signal is None else functools.partial(self._explain, signal),
        )

    def _explain(self, signal: Record, finding: Finding) -> Evidence:
        if self.score != "phrase":
            raise EcgotError(f"evidence: expected the score 'phrase', got {self.score!r}")
        data = self.config.data
        waveform, valid = fit_length(signal.signal_mv, round(data.fs_hz * data.seconds))
        return explain(
            self.model,
            torch.from_numpy(waveform).to(self.device),
            valid,
            self.prompts,
            finding,
            leads=signal.leads,
            fs_hz=data.fs_hz,
            encode=self._fused_encoder,
        )

    # --- other uses -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def classify(self, record: Any, prompts: Sequence[str], **asked: Any) -> dict[str, float]:
        """The score of each text for a record's strongest window; needs the run's text encoder.

        Args:
            record: as in :meth:`__call__`, whose keywords ``fs_hz``, ``leads``, ``force``, ``start_s`` and
                ``window_s`` are taken too.
            prompts: texts such as a report's phrases. A text that denies a finding gets the score of the
                finding with the opposite sign.

        Raises:
            EcgotError: the record or the text encoder cannot be used, or a text is empty or no finding.
        """
        text = self._text or self._load_with_text()
        reading = self(record, report=False, measurements=False, **asked)
        if reading.signal is None:
            raise EcgotError(
                f"record {reading.record}: " + "; ".join(r.text for r in reading.quality.remarks)
            )
        scored = score_texts(self.model, text, self._encode([reading.signal]), prompts, score=self.score)
        return dict(zip(prompts, scored, strict=True))

    @torch.no_grad()
    def embed(self, records: Any, **asked: Any) -> Tensor:
        """Unit-length embeddings [n, E] of a list of records, or [E] of one: of each one's strongest window.

        Args:
            records: as in :meth:`__call__`, whose keywords ``fs_hz``, ``leads``, ``force``, ``start_s`` and
                ``window_s`` are taken too.

        Raises:
            EcgotError: a record cannot be read, or is refused.
        """
        single = not _is_list(records)
        readings = self([records] if single else records, report=False, measurements=False, **asked)
        for reading in readings:
            if isinstance(reading, ReadingError):
                raise EcgotError(reading.reason)
            if reading.signal is None:
                reasons = "; ".join(remark.text for remark in reading.quality.remarks)
                raise EcgotError(f"record {reading.record}: {reasons}")
        parts = [
            self.model.project_tokens(self._encode([reading.signal for reading in some])).pooled
            for some in _batches(readings)
        ]
        pooled = torch.cat(parts) if parts else torch.zeros(0, self.config.align.width)
        return pooled[0] if single else pooled

    def _load_with_text(self) -> Any:
        from ecgot.models.text_encoder import TextEncoder

        text = TextEncoder(self.config.text.name, max_tokens=self.config.text.max_tokens)
        self.model = load_alignment(self.run, text)
        self._text = text  # only once load_alignment has accepted it as the run's own
        return text

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
    if isinstance(records, str | Path) or hasattr(records, "sig_name") or isinstance(records, RecordSource):
        return False
    return getattr(records, "ndim", 3) != 2


def _name(item: Any) -> str:
    return str(item) if isinstance(item, str | Path) else str(getattr(item, "name", "array"))


def _open(asked: Asked, seconds: float, item: Any) -> _Opened | ReadingError:
    def opened() -> _Opened:
        source = source_of(item, fs_hz=asked.fs_hz, leads=asked.leads)
        where = starts(source, seconds, start_s=asked.start_s, window_s=asked.window_s)
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


def scores_by_record(
    scores: dict[str, Tensor], prompts: EmbeddedPrompts
) -> list[dict[str, dict[str, float]]]:
    """Group -> class -> score of each record, from group -> [B, C]."""
    rows = {group: values.tolist() for group, values in scores.items()}
    count = len(next(iter(rows.values())))
    return [
        {group: dict(zip(prompts.rows[group], values[row], strict=True)) for group, values in rows.items()}
        for row in range(count)
    ]
