"""Measured intervals equal those of synthetic hearts, and are None where there is nothing to measure."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wfdb

from ecgot.data.findings import CONDUCTION, RHYTHMS, Finding
from ecgot.data.heart import Heart, Wave, draw_orientation, leads_mv, moving_dipole, noise_mv
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.measurements import Measurements, measure

FINDINGS = {each.codes[0]: each for each in (*RHYTHMS, *CONDUCTION)}
EDGE = 2.3  # standard deviations from a wave's middle, at which 7 % of its height are left


def measured(heart: Heart, *, seed: int = 0, fs_hz: float = 500.0) -> Measurements:
    rng = np.random.default_rng(seed)
    moments, _ = moving_dipole(heart, rng, fs_hz)
    dipole = moments @ draw_orientation(rng).T
    return measure(leads_mv(dipole) + noise_mv(rng, len(dipole), fs_hz), fs_hz, STANDARD_LEADS)


def with_finding(code: str, *, seed: int = 0) -> Heart:
    finding: Finding = FINDINGS[code]
    return finding.change(Heart(), np.random.default_rng(seed))


def first_s(waves: tuple[Wave, ...]) -> float:
    return min(wave.time_s - EDGE * wave.width_s for wave in waves)


def last_s(waves: tuple[Wave, ...]) -> float:
    return max(wave.time_s + EDGE * wave.width_s for wave in waves)


@pytest.mark.parametrize("fs_hz", [100.0, 500.0, 1000.0])
@pytest.mark.parametrize("rate_bpm", [40.0, 72.0, 130.0])
def test_the_rate(rate_bpm: float, fs_hz: float) -> None:
    found = measured(replace(Heart(), rate_bpm=rate_bpm), fs_hz=fs_hz)
    assert found.heart_rate_bpm == pytest.approx(rate_bpm, rel=0.04)
    assert found.rr_variation is not None
    assert found.rr_variation < 0.06


def test_r_peaks_are_where_the_complexes_are() -> None:
    signal = np.zeros((1, 5000))
    beats_s = np.array([0.7, 1.5, 2.4, 3.2, 4.1, 4.9, 5.8, 6.6, 7.5, 8.4, 9.2])
    time_s = np.arange(5000) / 500
    for beat_s in beats_s:
        signal[0] += np.exp(-0.5 * ((time_s - beat_s) / 0.012) ** 2)
    np.testing.assert_allclose(measure(signal, 500.0, ["II"]).r_peaks_s, beats_s, atol=0.02)


@pytest.mark.parametrize("code", [None, "1AVB", "CRBBB", "LAFB"])
@pytest.mark.parametrize("rate_bpm", [50.0, 75.0])
def test_intervals(code: str | None, rate_bpm: float) -> None:
    heart = replace(Heart() if code is None else with_finding(code), rate_bpm=rate_bpm)
    found = measured(heart)
    begin_s = first_s(heart.qrs)
    assert found.pr_ms == pytest.approx(1000 * (begin_s - first_s(heart.p)), abs=25)
    assert found.qrs_ms == pytest.approx(1000 * (last_s(heart.qrs) - begin_s), abs=20)
    t_end_s = max((wave.time_s + 2 * wave.width_s) * np.sqrt(60 / rate_bpm) for wave in heart.t)
    assert found.qt_ms == pytest.approx(1000 * (t_end_s - begin_s), abs=25)
    assert found.qtc_ms == pytest.approx(found.qt_ms * (found.heart_rate_bpm / 60) ** (1 / 3), rel=1e-6)


def test_a_left_bundle_branch_block_is_wide() -> None:
    found = measured(with_finding("CLBBB"))
    assert found.qrs_ms is not None
    assert found.qrs_ms > 150


@pytest.mark.parametrize("angle_deg", [-60.0, 0.0, 45.0, 100.0])
def test_the_axis(angle_deg: float) -> None:
    angle = np.radians(angle_deg)
    qrs = np.exp(-0.5 * ((np.arange(5000) / 500 % 0.8 - 0.4) / 0.015) ** 2)
    first = np.cos(angle) * qrs
    foot = np.sin(angle) * qrs * np.sqrt(3) / 2  # aVF's size beside I's
    signal = np.stack([first, foot]) + np.random.default_rng(0).normal(0, 0.003, (2, 5000))
    assert measure(signal, 500.0, ["I", "aVF"]).axis_deg == pytest.approx(angle_deg, abs=4)
    second = foot + first / 2  # aVF = II - I / 2
    assert measure(np.stack([first, second]), 500.0, ["I", "II"]).axis_deg == pytest.approx(angle_deg, abs=4)


def test_fibrillation_has_no_pr_and_varies() -> None:
    found = [measured(with_finding("AFIB", seed=seed), seed=seed) for seed in range(10)]
    assert sum(each.pr_ms is None for each in found) >= 9
    assert all(each.rr_variation is not None and each.rr_variation > 0.1 for each in found)


def test_pacing_spikes_are_counted_where_the_rate_shows_them() -> None:
    heart = Heart(p=(), qrs=(Wave(0.0, 0.03, (-0.6, -1.0, 0.9)),), irregularity=0.0, breathing=0.0)
    rng = np.random.default_rng(0)
    dipole, _ = moving_dipole(heart, rng, 500.0)
    signal = leads_mv(dipole) + noise_mv(rng, len(dipole), 500.0)
    assert measure(signal, 500.0, STANDARD_LEADS).pacing_spikes == 0
    beats = np.round((np.array(measure(signal, 500.0, STANDARD_LEADS).r_peaks_s) - 0.09) * 500).astype(int)
    for at in beats[beats > 0]:
        signal[:, at] += 0.8
    assert measure(signal, 500.0, STANDARD_LEADS).pacing_spikes == (beats > 5).sum()
    assert measure(signal[:, ::2], 250.0, STANDARD_LEADS).pacing_spikes == 0


def test_a_high_narrow_qrs_is_no_spike() -> None:
    heart = Heart().scaled("qrs", (2.5, 2.5, 2.5))
    assert all(measured(heart, seed=seed).pacing_spikes == 0 for seed in range(5))


@pytest.mark.parametrize("signal", [np.zeros((12, 5000)), np.zeros((12, 10)), np.ones((12, 5000))])
def test_nothing_is_measured_where_there_is_nothing(signal: np.ndarray) -> None:
    nothing = Measurements((), None, None, None, None, None, None, None, 0)
    assert measure(signal, 500.0, STANDARD_LEADS) == nothing


def test_noise_gives_no_intervals_out_of_range() -> None:
    for seed in range(10):
        found = measure(np.random.default_rng(seed).normal(0, 0.3, (12, 5000)), 500.0, STANDARD_LEADS)
        assert found.pr_ms is None
        assert found.qrs_ms is None or 50 <= found.qrs_ms <= 260
        assert found.qt_ms is None or 200 <= found.qt_ms <= 700


def test_groups_of_real_records_differ_as_their_diagnoses_say(ptbxl: Path) -> None:
    table = pd.read_csv(ptbxl / "ptbxl_database.csv")

    def median(code: str, name: str) -> float:
        rows = table[table.scp_codes.str.contains(f"'{code}'")]
        if len(rows) < 5:  # of a part of PTB-XL
            return math.nan
        rows = rows.sample(n=min(25, len(rows)), random_state=0)
        signals = [wfdb.rdrecord(str(ptbxl / path)).p_signal.T for path in rows.filename_lr]
        found = [getattr(measure(signal, 100.0, STANDARD_LEADS), name) for signal in signals]
        return float(np.median([value for value in found if value is not None]))

    assert median("NORM", "pr_ms") < 200
    assert not median("1AVB", "pr_ms") <= 200
    assert median("NORM", "qrs_ms") < 110
    assert not median("CLBBB", "qrs_ms") <= 130
    assert not median("SBRAD", "heart_rate_bpm") >= 60
    assert not median("STACH", "heart_rate_bpm") <= 100
    assert not median("LNGQT", "qtc_ms") <= median("NORM", "qtc_ms") + 20
