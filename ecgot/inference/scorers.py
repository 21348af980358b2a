"""What gives classes their scores: prompts beside an aligned encoder, or a classifier's labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecgot.data.record import Record, fit_length
from ecgot.errors import EcgotError
from ecgot.inference import calibration as calibrations
from ecgot.inference.calibration import Calibration, Finding
from ecgot.inference.evidence import Evidence, explain
from ecgot.inference.zeroshot import (
    BUILT_IN,
    check_score,
    class_scores,
    embed_prompts,
    load_prompts,
    read_prompts,
    scores_fingerprint,
)
from ecgot.models.encoders import EncoderOutput, fuse_norms
from ecgot.runs.checkpoints import load_alignment, load_classifier, transport
from ecgot.runs.config import DataConfig
from ecgot.runs.device import choose_device
from ecgot.runs.run import Run

SIMILARITIES = (
    "similarities, no probabilities: what is shown as a percentage only ranks records by one finding, and "
    "nothing is stated as found; the score 'phrase' has probabilities"
)
OWN_PROBABILITIES = (
    "probabilities are not calibrated: they are the classifier's own, and every threshold is 50 %"
)


@dataclass(frozen=True)
class Scored:
    """What a model makes of one stretch of a record.

    Attributes:
        record: the stretch, as the model takes it.
        scores: group -> class -> score, in log-odds where they are probabilities.
        tokens, mask: [N, D] and [N], from which a report is written; empty if a classifier gave the scores.
    """

    record: Record
    scores: Mapping[str, Mapping[str, float]]
    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    mask: Tensor = field(default_factory=lambda: torch.empty(0))


class ZeroShot:
    """Classes are scored by prompts, as ``ecgot evaluate`` does.

    Attributes:
        model: the aligned model, with its encoder's norms as trained. Records are scored by a fused copy.
        prompts: embedded.
        classes: group -> its classes.
        calibration: from scores to probabilities.
        note: what a reader of its probabilities should know; None if there is nothing.

    The text encoder is loaded only when it is needed, for prompts that the run does not hold as embeddings.
    """

    def __init__(self, run: Run, prompts: Path, score: str | None) -> None:
        self.run, self.config = run, run.config()
        self.score = check_score(score, self.config.align)
        self.device = choose_device(self.config.device)
        self._transport = transport(self.config.align)
        self._text: Any = None
        if prompts == BUILT_IN and run.prompts.exists():
            self.model = load_alignment(run, None)
            self.prompts = load_prompts(run.prompts, self.device)
        else:
            wanted = read_prompts(prompts)
            self.prompts = embed_prompts(*self.model_with_text(), wanted)
        self.classes = {group: tuple(rows) for group, rows in self.prompts.rows.items()}
        self._fused_encoder = fuse_norms(self.model.encoder)
        self.calibration = Calibration()
        file = run.folder / calibrations.FILE  # is one of "phrase" scores by the built-in prompts
        if self.score == "phrase" and prompts == BUILT_IN and file.exists():
            self.calibration = Calibration.load(file, scores_fingerprint(self.model, self.prompts))
        self.note = self.calibration.note if self.score == "phrase" else SIMILARITIES

    def findings(self, scores: Mapping[str, Mapping[str, float]]) -> tuple[Finding, ...]:
        """Every class of one record as a finding; all undecided where scores are but similarities."""
        found = self.calibration.findings(scores)
        return found if self.score == "phrase" else tuple(replace(each, stated=None) for each in found)

    def model_with_text(self) -> tuple[Any, Any]:
        """The model and the text encoder that it was trained with.

        Raises:
            EcgotError: the text encoder cannot be loaded, or is another.
        """
        if self._text is None:
            from ecgot.models.text_encoder import TextEncoder

            text = TextEncoder(self.config.text.name, max_tokens=self.config.text.max_tokens)
            self.model = load_alignment(self.run, text)
            self._text = text  # only once load_alignment has accepted it as the run's own
        return self.model, self._text

    @torch.no_grad()
    def encode(self, records: Sequence[Record]) -> EncoderOutput:
        """The tokens of prepared stretches."""
        waveform, lengths = stacked(records, self.config.data, self.device)
        return self._fused_encoder(waveform, lengths)

    @torch.no_grad()
    def scored(self, records: Sequence[Record]) -> list[Scored]:
        """Scores and tokens of prepared stretches, encoded as one batch."""
        encoded = self.encode(records)
        ecg = self.model.project_tokens(encoded)
        values = class_scores(ecg, self.prompts, score=self.score, transport=self._transport)
        scores = by_record(values, self.classes)
        return [Scored(*each) for each in zip(records, scores, encoded.tokens, encoded.mask, strict=True)]

    def explain(self, record: Record, finding: Finding) -> Evidence:
        """See :func:`ecgot.inference.evidence.explain`.

        Raises:
            EcgotError: classes are not scored by phrases.
        """
        if self.score != "phrase":
            raise EcgotError(f"evidence: expected the score 'phrase', got {self.score!r}")
        waveform, lengths = stacked([record], self.config.data, self.device)
        return explain(
            self.model,
            waveform[0],
            waveform.shape[2] if lengths is None else int(lengths[0]),
            self.prompts,
            finding,
            leads=record.leads,
            fs_hz=self.config.data.fs_hz,
            encode=self._fused_encoder,
        )


class Supervised:
    """Classes are scored by a classifier that ``ecgot supervise`` trained on labels."""

    def __init__(self, run: Run) -> None:
        self.config = run.config()
        self.classifier = load_classifier(run).fused()
        self.device = choose_device(self.config.device)
        self.classes = {group: tuple(names) for group, names in self.classifier.classes.items()}
        self.calibration, self.note = Calibration(), OWN_PROBABILITIES

    def findings(self, scores: Mapping[str, Mapping[str, float]]) -> tuple[Finding, ...]:
        """Every class of one record as a finding."""
        return self.calibration.findings(scores)

    @torch.no_grad()
    def scored(self, records: Sequence[Record]) -> list[Scored]:
        """Scores of prepared stretches, as one batch."""
        waveform, lengths = stacked(records, self.config.data, self.device)
        scores = by_record(self.classifier.class_logits(waveform, lengths), self.classes)
        return [Scored(*each) for each in zip(records, scores, strict=True)]

    def explain(self, record: Record, finding: Finding) -> Evidence:
        """There is none: a classifier is no sum over time."""
        raise EcgotError("evidence: expected a run of ecgot train, got one of ecgot supervise")


def stacked(
    records: Sequence[Record], data: DataConfig, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Waveforms [B, L, T] and lengths [B], None if all are T, as a model takes them."""
    samples = round(data.fs_hz * data.seconds)
    fitted = [fit_length(record.signal_mv, samples) for record in records]
    waveform = torch.from_numpy(np.stack([signal for signal, _ in fitted])).to(device)
    lengths = torch.tensor([valid for _, valid in fitted], device=device)
    return waveform, None if bool((lengths == samples).all()) else lengths


def by_record(
    scores: Mapping[str, Tensor], classes: Mapping[str, Sequence[str]]
) -> list[dict[str, dict[str, float]]]:
    """Group -> class -> score of each record, from group -> [B, C]."""
    rows = {group: values.tolist() for group, values in scores.items()}
    count = len(next(iter(rows.values())))
    return [
        {group: dict(zip(classes[group], values[row], strict=True)) for group, values in rows.items()}
        for row in range(count)
    ]
