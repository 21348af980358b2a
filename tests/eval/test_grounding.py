"""Premature beats are found, and evidence that points elsewhere is no hit."""

import json

import numpy as np
import pytest

from ecgot.data.dataset import load_dataset
from ecgot.data.synth import simulate
from ecgot.eval.grounding import (
    MOST_BEATS,
    beats_s,
    grounding,
    measure,
    premature_beats_s,
    premature_ecgs,
    records_with,
)
from ecgot.runs.config import DataConfig
from ecgot.runs.run import PRETRAINED, Run


def test_beats_are_found_where_the_heart_made_them():
    missed = false = total = 0
    for seed in range(40):
        ecg = simulate(np.random.default_rng(seed))
        true = np.array([beat.peak_s for beat in ecg.beats if 0.2 < beat.peak_s < 9.8])
        found = beats_s(ecg.signal_mv, ecg.fs_hz)
        total += len(true)
        missed += sum(np.abs(found - each).min() > 0.1 for each in true)
        false += sum(np.abs(true - each).min() > 0.1 for each in found if 0.3 < each < 9.7)
    assert total > 400
    assert missed < 0.02 * total
    assert false < 0.02 * total


def test_premature_beats_are_told_from_others():
    waveform, beats = premature_ecgs(40, 0, DataConfig())
    assert all(beats)
    right = 0
    for signal_mv, true in zip(waveform.numpy(), beats, strict=True):
        found = premature_beats_s(signal_mv, 100.0)
        right += len(found) == len(true) and np.abs(np.subtract(found, true)).max() < 0.15
    assert right >= 36
    assert premature_beats_s(np.zeros((12, 1000)), 100.0) == []


def test_the_first_premature_beat_comes_anywhere():
    first = [min(each) for each in premature_ecgs(200, 1, DataConfig())[1]]
    assert np.histogram(first, bins=4, range=(0, 9))[0].min() > 15


def test_hits_and_chance_by_hand():
    measured = measure(np.array([1.0, 5.0, 9.0]), [[1.3], [4.0, 6.0], [9.0]], 10.0)
    assert measured["records"] == 3
    assert measured["hits"] == pytest.approx(2 / 3)
    assert measured["chance"] == pytest.approx((0.8 + 1.6 + 0.8) / 30, abs=0.005)


def test_evidence_points_at_the_beat_far_above_chance(synthetic, cache_dir):
    run, folds = Run.open(PRETRAINED), (9, 10)
    found = grounding(run, synthetic, folds=folds, records=60, cache_dir=cache_dir)["evidence"]
    assert set(found) == {"synthetic", "PVC"}  # this data set has no premature atrial beats
    assert found["synthetic"]["records"] == 60
    assert found["synthetic"]["hits"] > 0.9 > 0.2 > found["synthetic"]["chance"]
    assert found["PVC"]["hits"] > found["PVC"]["chance"] + 0.3
    json.dumps(found, allow_nan=False)


def test_records_that_any_guess_would_hit_do_not_count(synthetic, cache_dir):
    data = load_dataset(synthetic, folds=(1, 2), highpass_hz=0.3, cache_dir=cache_dir)
    signal_mv, beats = records_with(data, "PVC")
    assert 0 < len(beats) == len(signal_mv) < data.labels("form").matrix.any(1).sum()
    assert all(1 <= len(each) <= MOST_BEATS for each in beats)
    assert records_with(data, "PAC")[1] == []
