"""Read records with a trained model: class scores and a written report."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecgot.choices import BEAMS
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
from ecgot.models.encoders import EncoderOutput, fuse_norms
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment, load_reporter, transport
from ecgot.runs.device import choose_device
from ecgot.runs.run import PRETRAINED, Run


@dataclass(frozen=True)
class Reading:
    """What the model says about one record.

    Attributes:
        record: the path that was read.
        scores: group -> class -> score, see :func:`ecgot.inference.zeroshot.class_scores`: the log-odds that
            a report would name the class, where the run has learned phrases. Compare one class across
            records, not classes within a record: some classes are named more often, or in more words.
        report: the generated text; None if stage 2 has not been trained.
        sentences: the report's sentences, each with the probability that the model gives its exact words.
        notes: what was done to the signal: repaired gaps, flat leads, cropping, padding.
        recorder: the recorder whose wording the report follows; None if unknown.
    """

    record: str
    scores: dict[str, dict[str, float]]
    report: str | None
    sentences: tuple[tuple[str, float], ...]
    notes: tuple[str, ...]
    recorder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain values for JSON."""
        return dataclasses.asdict(self)


class Reader:
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
        recorders: the recorders that :meth:`read` accepts.

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
        self._text: TextEncoder | None = None
        if prompts == BUILT_IN and self.run.prompts.exists():
            self.model = load_alignment(self.run, None)
            self.prompts = load_prompts(self.run.prompts, self.device)
        else:
            wanted = read_prompts(prompts)
            text = self._load_with_text()
            self.prompts = embed_prompts(self.model, text, wanted)
        self._fused_encoder = fuse_norms(self.model.encoder)
        has_report = self.run.done("report")
        self.reporter = load_reporter(self.run, self.model.ecg_width) if has_report else None
        self.recorders = () if self.reporter is None else self.reporter.recorders

    def _load_with_text(self) -> TextEncoder:
        text = TextEncoder(self.config.text.name, max_tokens=self.config.text.max_tokens)
        self.model = load_alignment(self.run, text)
        self._text = text  # only once load_alignment has accepted it as the run's own
        return text

    @torch.no_grad()
    def read(self, path: Path, *, recorder: str | None = None) -> Reading:
        """Read the WFDB record at ``path``.

        Args:
            path: with or without its extension.
            recorder: one of ``reader.recorders``, whose wording the report should follow; None if unknown.

        Raises:
            EcgotError: the record cannot be used, or the model does not know the recorder.
        """
        name = self._known_recorder(recorder)
        encoded, notes = self._encode(path)
        scores = self._scores(encoded, self.prompts)
        if self.reporter is None:
            return Reading(str(path), scores, None, (), notes)
        written = self.reporter.write(
            encoded.tokens, encoded.mask, recorders=[name], num_beams=self.num_beams
        )[0]
        return Reading(str(path), scores, written.text, written.sentences, notes, name or None)

    @torch.no_grad()
    def classify(self, path: Path, prompts: Sequence[str]) -> Reading:
        """Score the WFDB record at ``path`` by any texts, without writing a report.

        The scores are those of a single group, "prompts", with a class for each text. Needs the run's text
        encoder.

        Raises:
            EcgotError: the record or the text encoder cannot be used.
        """
        text = self._text or self._load_with_text()
        encoded, notes = self._encode(path)
        wanted = {"prompts": {prompt: (prompt,) for prompt in prompts}}
        scores = self._scores(encoded, embed_prompts(self.model, text, wanted))
        return Reading(str(path), scores, None, (), notes)

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

    def _encode(self, path: Path) -> tuple[EncoderOutput, tuple[str, ...]]:
        """The record's tokens [1, N, D], and notes on what was done to its signal."""
        data = self.config.data
        record = read_record(path, leads=data.leads, fs_hz=data.fs_hz, highpass_hz=data.highpass_hz)
        signal_mv, valid = fit_length(record.signal_mv, round(data.fs_hz * data.seconds))
        waveform = torch.from_numpy(signal_mv)[None].to(self.device)
        lengths = None if valid == waveform.shape[2] else torch.tensor([valid], device=self.device)
        return self._fused_encoder(waveform, lengths), _notes(record, waveform.shape[2])

    def _scores(self, encoded: EncoderOutput, prompts: EmbeddedPrompts) -> dict[str, dict[str, float]]:
        ecg = self.model.project_tokens(encoded)
        values = class_scores(ecg, prompts, score=self.score, transport=self._transport)
        return {
            group: dict(zip(prompts.rows[group], row[0].tolist(), strict=True))
            for group, row in values.items()
        }


def load_pretrained(
    run: Run | Path | str | None = None,
    *,
    prompts: Path = BUILT_IN,
    score: str | None = None,
    num_beams: int = BEAMS,
) -> Reader:
    """Load a trained model to read records with.

    Args:
        run: a :class:`ecgot.runs.run.Run` or its folder; by default the model that comes with the package.
        prompts, score, num_beams: see :class:`Reader`.

    Raises:
        EcgotError: the run cannot be used.
    """
    opened = Run.open(Path(run)) if isinstance(run, str | Path) else run
    return Reader(opened, prompts=prompts, score=score, num_beams=num_beams)


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
