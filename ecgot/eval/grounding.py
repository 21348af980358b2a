"""Whether evidence points at what it is of: premature beats, of which the time is known.

A record is hit if the stretch with the largest share of its class's score (see
:mod:`ecgot.inference.evidence`) has its middle within TOLERANCE_S of a premature beat. Chance is the part of
the record that lies that near: what a moment drawn at random hits.

Synthetic records have one premature beat or more, at known times. Of real ones the beats are peaks of the
leads' common slope, and a beat is premature if it comes after less than PREMATURE of the median interval.
Records with atrial fibrillation or flutter are left out, since there any beat is early or late, and so are
records without a premature beat by that rule or with more than MOST_BEATS, where any guess would hit.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import find_peaks
from torch import Tensor

from ecgot.data.baseline import remove_baseline
from ecgot.data.dataset import EcgDataset
from ecgot.data.heart import Heart, draw_orientation
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.synth import signal_of
from ecgot.errors import EcgotError
from ecgot.files import default_cache_dir
from ecgot.inference.evidence import class_shares, peaks_s, token_edges_s
from ecgot.inference.zeroshot import EmbeddedPrompts, model_and_prompts
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import fuse_norms
from ecgot.runs.config import DataConfig
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, load_folds
from ecgot.runs.run import Run

CODES = ("PVC", "PAC")  # classes of the group "form": ventricular and atrial premature beats
IRREGULAR = ("AFIB", "AFLT")  # classes of the group "rhythm"
TOLERANCE_S = 0.4
PREMATURE = 0.85  # of the median interval
MOST_BEATS = 3
FEWEST_PEAKS = 5  # of a record whose median interval means something
REFRACTORY_S = 0.28  # no second beat comes so soon
SLOPE_S = 0.07  # over which slopes are averaged: about a QRS complex
LEAST_SLOPE = 0.4  # of a beat, as a share of the median of the record's steepest
STEEPEST = 8


def grounding(
    run: Run,
    data_root: Path | None = None,
    *,
    folds: Sequence[int] = (),
    records: int = 300,
    seed: int = 0,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How often a run's evidence for premature beats points at one, as plain values for JSON.

    Args:
        data_root: a data set in PTB-XL's layout, of which ``folds`` are read; None: synthetic records alone.
        records, seed: of the synthetic records.
        cache_dir: of signals; by default :func:`ecgot.files.default_cache_dir`.

    Returns:
        "evidence": by name, "synthetic" and those of CODES that the data has, what :func:`measure` finds.

    Raises:
        EcgotError: the run or the data cannot be used, or the run's model reads other leads.
    """
    data = run.config().data
    if data.leads != STANDARD_LEADS:
        raise EcgotError(f"run: expected one that reads the 12 standard leads, got {', '.join(data.leads)}")
    model, prompts = model_and_prompts(run)
    waveform, beats = premature_ecgs(records, seed, data)
    found = {"synthetic": measure(_peaks(model, prompts, "PVC", waveform, data.fs_hz), beats, data.seconds)}
    if data_root is not None:
        cache = cache_dir or default_cache_dir()
        dataset = load_folds(run.config(), folds, cache, progress or Progress(), root=data_root)
        for code in CODES:
            signal_mv, beats = records_with(dataset, code)
            if beats:
                found[code] = measure(
                    _peaks(model, prompts, code, signal_mv, data.fs_hz), beats, data.seconds
                )
    return {"tolerance_s": TOLERANCE_S, "folds": list(folds), "evidence": found}


def records_with(dataset: EcgDataset, code: str) -> tuple[Tensor, list[list[float]]]:
    """Signals [B, L, T] in mV of the records of a class of the group "form", and their premature beats in s.

    Only those that count, see this module.
    """
    forms, rhythms = dataset.labels("form"), dataset.labels("rhythm")
    irregular = rhythms.matrix[:, [each in IRREGULAR for each in rhythms.classes]].any(1)
    labelled = forms.matrix[:, [each == code for each in forms.classes]].any(1)
    signal_mv = dataset.waveforms_mv(np.flatnonzero(labelled & ~irregular))
    beats = [premature_beats_s(each, dataset.fs_hz) for each in signal_mv]
    usable = [number for number, each in enumerate(beats) if 1 <= len(each) <= MOST_BEATS]
    return torch.from_numpy(signal_mv[usable]), [beats[number] for number in usable]


def premature_ecgs(count: int, seed: int, data: DataConfig) -> tuple[Tensor, list[list[float]]]:
    """Synthetic ECGs [B, 12, T] in mV, as a run reads them, and when their premature beats come, in s."""
    signals, beats = [], []
    rng = np.random.default_rng(seed)
    for _ in range(count):
        by_s = rng.uniform(0.3, 7.5)
        heart = replace(Heart(), rate_bpm=rng.uniform(55, 95), ectopic_share=0.01, ectopic_by_s=by_s)
        signal_mv, heart_beats = signal_of(heart, rng, data.fs_hz, draw_orientation(rng))
        signals.append(remove_baseline(signal_mv, data.fs_hz, data.highpass_hz))
        beats.append([beat.peak_s for beat in heart_beats if beat.premature])
    return torch.from_numpy(np.stack(signals)).float(), beats


def beats_s(signal_mv: np.ndarray, fs_hz: float) -> np.ndarray:
    """When beats come in a signal [L, T], in s: peaks of the root of the leads' summed squared slopes."""
    slope = np.sqrt((np.gradient(signal_mv, axis=1) ** 2).sum(0))
    width = max(1, round(SLOPE_S * fs_hz))
    smooth = np.convolve(slope, np.ones(width) / width, "same")
    apart = max(1, round(REFRACTORY_S * fs_hz))
    candidates, _ = find_peaks(smooth, distance=apart)
    if not len(candidates):
        return np.zeros(0)
    least = LEAST_SLOPE * np.median(np.sort(smooth[candidates])[-STEEPEST:])
    return find_peaks(smooth, distance=apart, height=least)[0] / fs_hz


def premature_beats_s(signal_mv: np.ndarray, fs_hz: float) -> list[float]:
    """When beats of a signal [L, T] come early, in s; none if there are too few beats to tell."""
    beats = beats_s(signal_mv, fs_hz)
    if len(beats) < FEWEST_PEAKS:
        return []
    intervals = np.diff(beats)
    return beats[1:][intervals < PREMATURE * np.median(intervals)].tolist()


def measure(peaks: np.ndarray, beats: Sequence[Sequence[float]], seconds: float) -> dict[str, Any]:
    """Of B records with peaks [B] and the times of their premature beats: "records", "hits", "chance"."""
    times = np.linspace(0, seconds, round(100 * seconds) + 1)
    return {
        "records": len(peaks),
        "hits": float(np.mean([_near(peak, each) for peak, each in zip(peaks, beats, strict=True)])),
        "chance": float(np.mean([np.mean([_near(time, each) for time in times]) for each in beats])),
    }


def _near(time_s: float, beats: Sequence[float]) -> bool:
    return min(abs(time_s - beat) for beat in beats) <= TOLERANCE_S


@torch.no_grad()
def _peaks(
    model: AlignmentModel, prompts: EmbeddedPrompts, code: str, waveform: Tensor, fs_hz: float
) -> np.ndarray:
    """Where evidence of a class of the group "form" is largest in each of B records [B, 12, T]: [B] in s."""
    device, encoder = next(model.parameters()).device, fuse_norms(model.encoder)
    shares = []
    for part in waveform.split(BATCH):
        ecg = model.project_tokens(encoder(part.to(device), None))
        shares.append(class_shares(ecg, prompts, "form", code).cpu().numpy())
    by_time = np.concatenate(shares)
    count = by_time.shape[1]
    return peaks_s(by_time, token_edges_s(waveform.shape[2], count, count, fs_hz))
