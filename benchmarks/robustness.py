"""Zero-shot AUROC where electrodes are offset, the baseline wanders, or leads are missing.

python -m benchmarks.robustness PTBXL [RUN] --folds 9 [--highpass 0] [--out FILE.json]

Signals are changed as they were recorded and then read as any record is: baseline removed, missing leads
derived or estimated.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.output import stamp
from ecgot.choices import GROUPS
from ecgot.data.baseline import remove_baseline
from ecgot.data.dataset import EcgDataset, load_dataset
from ecgot.data.leads import INDEPENDENT_LEADS, LIMB_LEADS, STANDARD_LEADS, complete
from ecgot.eval.auroc import macro_auroc
from ecgot.inference.zeroshot import EmbeddedPrompts, class_scores, model_and_prompts
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import fuse_norms
from ecgot.runs.config import parse_folds
from ecgot.runs.run import PRETRAINED, Run

BATCH = 128
OFFSET_MV, WANDER_MV, WANDER_HZ = 0.5, 1.0, (0.05, 0.5)
LEADS = {
    "8 leads": INDEPENDENT_LEADS,
    "6 leads, limb": LIMB_LEADS,
    "3 leads, I II V2": ("I", "II", "V2"),
    "2 leads, I II": ("I", "II"),
    "1 lead, I": ("I",),
    "1 lead, II": ("II",),
}
Change = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]


def unchanged(signal: np.ndarray, _rng: np.random.Generator, _fs_hz: float) -> np.ndarray:
    """The signal itself."""
    return signal


def offset(signal: np.ndarray, rng: np.random.Generator, _fs_hz: float) -> np.ndarray:
    """Each lead of [B, L, T] moved up or down by ``OFFSET_MV``."""
    return signal + OFFSET_MV * rng.choice((-1.0, 1.0), size=(*signal.shape[:2], 1))


def wander(signal: np.ndarray, rng: np.random.Generator, fs_hz: float) -> np.ndarray:
    """A sine of ``WANDER_MV`` in each lead, its frequency the record's, its phase the lead's own."""
    frequency = rng.uniform(*WANDER_HZ, size=(len(signal), 1, 1))
    phase = rng.uniform(0, 2 * np.pi, size=(*signal.shape[:2], 1))
    time_s = np.arange(signal.shape[2]) / fs_hz
    return signal + WANDER_MV * np.sin(2 * np.pi * frequency * time_s + phase)


def fewer(leads: tuple[str, ...]) -> Change:
    """All leads but these are missing, and derived or estimated."""

    def change(signal: np.ndarray, _rng: np.random.Generator, _fs_hz: float) -> np.ndarray:
        rows = [STANDARD_LEADS.index(lead) for lead in leads]
        return np.stack([complete(record[rows], leads)[0] for record in signal])

    return change


CONDITIONS: dict[str, Change] = {
    "12 leads, as recorded": unchanged,
    f"offset of {OFFSET_MV} mV": offset,
    f"wander of {WANDER_MV} mV": wander,
    **{name: fewer(leads) for name, leads in LEADS.items()},
}


def scores(
    model: AlignmentModel, prompts: EmbeddedPrompts, data: EcgDataset, change: Change, highpass_hz: float
) -> dict[str, np.ndarray]:
    """Scores [n, C] by group of every record, changed."""
    encoder, rng = fuse_norms(model.encoder), np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {group: [] for group in prompts.rows}
    for signal in _batches(data):
        signal = change(signal, rng, data.fs_hz)
        if highpass_hz >= 0:  # a filter and the estimate of leads are linear: their order does not matter
            signal = remove_baseline(signal, data.fs_hz, highpass_hz)
        with torch.no_grad():
            embedded = model.project_tokens(encoder(torch.from_numpy(signal.astype(np.float32)), None))
            for group, values in class_scores(embedded, prompts).items():
                found[group].append(values.numpy())
    return {group: np.concatenate(parts) for group, parts in found.items()}


def _batches(data: EcgDataset) -> Iterator[np.ndarray]:
    for start in range(0, len(data), BATCH):
        yield data.waveforms_mv(np.arange(start, min(start + BATCH, len(data)))).astype(np.float64)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path, nargs="?", default=PRETRAINED)
    parser.add_argument("--folds", default="9")
    parser.add_argument("--highpass", type=float, help="default: the run's; -1 leaves the baseline as it is")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run = Run.open(options.run)
    config = run.config()
    highpass_hz = config.data.highpass_hz if options.highpass is None else options.highpass
    data = load_dataset(options.data, folds=parse_folds(options.folds), fs_hz=config.data.fs_hz)
    model, prompts = model_and_prompts(run)
    prompts = prompts.select({group: data.labels(group).classes for group in GROUPS})
    rows = {}
    print("| signal | " + " | ".join(GROUPS) + " |", "| --- |" + " --- |" * len(GROUPS), sep="\n")
    for name, change in CONDITIONS.items():
        by_group = scores(model, prompts, data, change, highpass_hz)
        results = {
            group: macro_auroc(by_group[group], data.labels(group), data.table.patient_id) for group in GROUPS
        }
        rows[name] = {group: dataclasses.asdict(result) for group, result in results.items()}
        print(
            f"| {name} | " + " | ".join(f"{results[group].macro:.3f}" for group in GROUPS) + " |", flush=True
        )
    if options.out is not None:
        result = {"origin": stamp(), "folds": options.folds, "highpass_hz": highpass_hz, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
