"""Records, read by a trained run: class scores and a written report."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecgot.data.record import Record, fit_length, read_record
from ecgot.errors import EcgotError
from ecgot.inference.zeroshot import (
    BUILT_IN,
    EmbeddedPrompts,
    check_score,
    class_scores,
    embed_prompts,
    load_prompts,
    read_prompts,
)
from ecgot.models.encoders import EncoderOutput
from ecgot.models.reporter import BEAMS
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment, load_reporter, transport
from ecgot.runs.device import choose_device
from ecgot.runs.run import PRETRAINED, Run


@dataclass(frozen=True)
class Reading:
    """What a run says of a record.

    Attributes:
        scores: group -> class -> score, see :func:`ecgot.inference.zeroshot.class_scores`: log-odds that a
            report would name the class where the run has learned phrases. Compare records by one class
            rather than classes within a record: classes differ in how often and in how many words they are
            named.
        report: the generated text; None where stage 2 has not been trained.
        sentences: of the report, each with the probability that the model gives to these very words.
        notes: what was done to the signal: repaired gaps, flat leads, cutting, padding.
        recorder: in whose words the report is written; None: of an unknown one.
    """

    record: str
    scores: dict[str, dict[str, float]]
    report: str | None
    sentences: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]
    recorder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Reader:
    """A trained run, loaded once to read any number of records.

    Args:
        run: the run's folder; the model that comes with the package where omitted.
        prompts: a TOML file in place of the built-in prompts.
        score: see :func:`ecgot.inference.zeroshot.check_score`.
        num_beams: of the search for a report; 1 writes greedily.

    Attributes:
        model: the :class:`ecgot.models.alignment.AlignmentModel`; ``model.encoder`` is the ECG encoder.
        config: the run's :class:`ecgot.runs.config.Config`.
        recorders: names of the recorders that :meth:`read` can be told.

    The text encoder is needed, and loaded, only for prompts that the run's folder does not hold embedded, and
    for :meth:`classify`.

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
        self._text: TextEncoder | None = None
        if prompts == BUILT_IN and self.run.prompts.exists():
            self.model = load_alignment(self.run, None)
            self.prompts = load_prompts(self.run.prompts, self.device)
        else:
            wanted = read_prompts(prompts)
            text = self._load_with_text()
            self.prompts = embed_prompts(self.model, text, wanted)
        done = self.run.done("report")
        self.reporter = load_reporter(self.run, self.model.ecg_width) if done else None
        self.recorders = () if self.reporter is None else self.reporter.recorders

    def _load_with_text(self) -> TextEncoder:
        text = TextEncoder(self.config.text.name, max_tokens=self.config.text.max_tokens)
        self.model = load_alignment(self.run, text)
        self._text = text  # not before it has proved to be the run's
        return text

    @torch.no_grad()
    def read(self, path: Path, *, recorder: str | None = None) -> Reading:
        """Read the WFDB record at ``path``.

        Args:
            recorder: the one in whose words the report is written, of ``reader.recorders``; None: unknown.

        Raises:
            EcgotError: the record cannot be used, or the model does not know the recorder.
        """
        told = "" if recorder is None else " ".join(recorder.split())
        if recorder is not None and told not in self.recorders:
            known = ", ".join(map(repr, self.recorders)) or "none by this model"
            raise EcgotError(f"recorder: got {recorder!r}, accepted are {known}")
        encoded, notes = self._encode(path)
        scores = self._scores(encoded, self.prompts)
        if self.reporter is None:
            return Reading(str(path), scores, None, (), notes)
        written = self.reporter.write(
            encoded.tokens, encoded.mask, recorders=[told], num_beams=self.num_beams
        )[0]
        return Reading(str(path), scores, written.text, written.sentences, notes, told or None)

    @torch.no_grad()
    def classify(self, path: Path, prompts: Sequence[str]) -> Reading:
        """The record's score of each text, as those of the classes of a group "prompts", without a report.

        Any text will do, which takes the run's text encoder.

        Raises:
            EcgotError: the record or the text encoder cannot be used.
        """
        text = self._text or self._load_with_text()
        encoded, notes = self._encode(path)
        wanted = {"prompts": {text: (text,) for text in prompts}}
        scores = self._scores(encoded, embed_prompts(self.model, text, wanted))
        return Reading(str(path), scores, None, (), notes)

    def _encode(self, path: Path) -> tuple[EncoderOutput, tuple[str, ...]]:
        data = self.config.data
        record = read_record(path, leads=data.leads, fs_hz=data.fs_hz)
        signal, valid = fit_length(record.signal_mv, round(data.fs_hz * data.seconds))
        waveform, lengths = torch.from_numpy(signal)[None], torch.tensor([valid])
        encoded = self.model.encoder(waveform.to(self.device), lengths.to(self.device))
        return encoded, _notes(record, signal.shape[1])

    def _scores(self, encoded: EncoderOutput, prompts: EmbeddedPrompts) -> dict[str, dict[str, float]]:
        ecg = self.model.project_tokens(encoded)
        values = class_scores(ecg, prompts, score=self.score, transport=transport(self.config.align))
        return {
            group: dict(zip(prompts.rows[group], row[0].tolist(), strict=True))
            for group, row in values.items()
        }


def load_pretrained(
    run: Run | None = None, *, prompts: Path = BUILT_IN, score: str | None = None, num_beams: int = BEAMS
) -> Reader:
    """A :class:`Reader` of the model that comes with the package, or of a run of your own."""
    return Reader(run, prompts=prompts, score=score, num_beams=num_beams)


def _notes(record: Record, samples: int) -> tuple[str, ...]:
    notes = [
        f"{count} missing samples filled in lead {lead}" for lead, count in record.repaired_samples.items()
    ]
    notes += [f"lead {lead} is flat" for lead in record.flat_leads]
    length = record.signal_mv.shape[1]
    if length > samples:
        notes.append(f"only the first {samples / record.fs_hz:g} s of {length / record.fs_hz:g} s were read")
    if length < samples:
        notes.append(
            f"{length / record.fs_hz:g} s, shorter than the {samples / record.fs_hz:g} s of training"
        )
    return tuple(notes)
