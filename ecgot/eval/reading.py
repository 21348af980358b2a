"""One record, read by a trained run: class scores and a written report."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecgot.data.dataset import fit_length
from ecgot.data.record import Record, read_record
from ecgot.eval.zeroshot import BUILT_IN, class_scores, embed_prompts, read_prompts
from ecgot.models.text import TextEncoder
from ecgot.train.align import load_alignment
from ecgot.train.report import load_reporter
from ecgot.train.run import Run, choose_device


@dataclass(frozen=True)
class Reading:
    """What a run says of a record.

    Attributes:
        scores: group -> class -> similarity to the class's prompts. Compare records by one class, not
            classes within a record: prompts differ in how near they lie to everything.
        report: the generated text; None where stage 2 has not been trained.
        notes: what was done to the signal: repaired gaps, flat leads, cutting, padding.
    """

    record: str
    scores: dict[str, dict[str, float]]
    report: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def read(
    run: Run, path: Path, *, num_beams: int = 1, score: str = "cosine", prompts: Path = BUILT_IN
) -> Reading:
    """Read the WFDB record at ``path``.

    Raises:
        EcgotError: the run or the record cannot be used.
    """
    config, texts = run.config(), read_prompts(prompts)
    record = read_record(path, leads=config.data.leads, fs_hz=config.data.fs_hz)
    signal, valid = fit_length(record.signal_mv, round(config.data.fs_hz * config.data.seconds))
    text = TextEncoder(config.text.name, max_tokens=config.text.max_tokens)
    model, device = load_alignment(run, text), choose_device(config.device)
    encoded = model.encoder(torch.from_numpy(signal)[None].to(device), torch.tensor([valid], device=device))
    embedded = embed_prompts(model, text, texts)
    values = class_scores(model.project_tokens(encoded), embedded, score=score, transport=config.align)
    scores = {group: dict(zip(texts[group], row[0].tolist(), strict=True)) for group, row in values.items()}
    written = None
    if run.done("report"):
        reporter = load_reporter(run, model.ecg_width)
        written = reporter.generate(encoded.tokens, encoded.mask, num_beams=num_beams)[0]
    return Reading(str(path), scores, written, _notes(record, signal.shape[1]))


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
