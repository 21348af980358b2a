"""Verdicts on signals: real and synthetic ECGs pass, what is no ECG does not, and faults are named."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import wfdb

from benchmarks.quality import MADE, exchange, made_signals
from ecgot.data.findings import CONDUCTION, INFARCT, PREMATURE, RHYTHMS, VOLTAGE
from ecgot.data.heart import Heart, Wave, draw_orientation, leads_mv, moving_dipole, noise_mv
from ecgot.data.leads import STANDARD_LEADS, lead_name
from ecgot.data.quality import Quality, assess
from ecgot.data.synth import simulate
from ecgot.errors import EcgotError

FS_HZ = 250.0
ADC_PER_MV = 1000.0


def ecg(heart: Heart | None = None, *, seed: int = 0, fs_hz: float = FS_HZ) -> np.ndarray:
    """Twelve leads of a synthetic heart, in whole µV as recorders store them."""
    rng = np.random.default_rng(seed)
    moments, _ = moving_dipole(heart or Heart(), rng, fs_hz)
    dipole = moments @ draw_orientation(rng).T
    signal = leads_mv(dipole) + _electrode_noise(rng, len(dipole), fs_hz)
    return np.rint(signal * ADC_PER_MV) / ADC_PER_MV


def _electrode_noise(rng: np.random.Generator, samples: int, fs_hz: float) -> np.ndarray:
    """Noise that obeys Einthoven, as each electrode's goes into all leads that use it."""
    noise = noise_mv(rng, samples, fs_hz)
    first, second = noise[0], noise[1]
    noise[2:6] = [second - first, -(first + second) / 2, first - second / 2, second - first / 2]
    return noise


def verdict(signal: np.ndarray, *, fs_hz: float = FS_HZ, calibrated: bool = True) -> Quality:
    return assess(signal, fs_hz, STANDARD_LEADS[: len(signal)], calibrated=calibrated)


def codes(quality: Quality) -> set[str]:
    return {remark.code for remark in quality.remarks}


@pytest.mark.parametrize("fs_hz", [100.0, 250.0, 500.0, 1000.0])
def test_an_ecg_is_good(fs_hz: float) -> None:
    assert verdict(ecg(fs_hz=fs_hz), fs_hz=fs_hz) == Quality("good", (), ())


@pytest.mark.parametrize("finding", [*RHYTHMS, *PREMATURE, *CONDUCTION, *VOLTAGE, INFARCT[0]])
def test_no_disease_is_refused(finding) -> None:
    for seed in range(5):
        heart = finding.change(Heart(), np.random.default_rng(seed))
        assert verdict(ecg(heart, seed=seed)).verdict != "refused", finding.codes


@pytest.mark.parametrize("rate_bpm", [35.0, 200.0])
def test_slow_and_fast_hearts_are_not_refused(rate_bpm: float) -> None:
    assert verdict(ecg(replace(Heart(), rate_bpm=rate_bpm))).verdict == "good"


def test_a_paced_heart_is_not_refused() -> None:
    wide = Wave(0.0, 0.04, (-0.6, -1.0, 0.9))
    heart = Heart(p=(), qrs=(Wave(-0.10, 0.001, (2.0, 2.0, 0.5)), wide), irregularity=0.0, breathing=0.0)
    assert verdict(ecg(heart, fs_hz=500.0), fs_hz=500.0).verdict != "refused"


def test_ventricular_fibrillation_is_doubtful_but_not_refused() -> None:
    rng = np.random.default_rng(0)
    time_s = np.arange(2500) / FS_HZ
    angle = 2 * np.pi * np.cumsum(5 + np.cumsum(rng.normal(0, 0.04, (3, 2500)), axis=1), axis=1) / FS_HZ
    size = 0.5 + 0.2 * np.sin(2 * np.pi * np.array([[0.3], [0.4], [0.5]]) * time_s)
    quality = verdict(leads_mv((size * np.sin(angle)).T))
    assert (quality.verdict, codes(quality)) == ("doubtful", {"no_complexes"})


def test_few_synthetic_ecgs_are_doubted_in_chest_leads_alone() -> None:
    found = []
    for seed in range(100):
        signal = np.rint(simulate(np.random.default_rng(seed)).signal_mv * ADC_PER_MV) / ADC_PER_MV
        found.append(assess(signal[6:], 100.0, STANDARD_LEADS[6:]).verdict)
    # In chest leads alone, a left bundle branch block at 130/min and more is as smooth as no real one.
    assert found.count("refused") <= 2
    assert found.count("good") >= 95


@pytest.mark.parametrize("kind", MADE)
def test_what_is_no_ecg_is_refused(kind: str) -> None:
    for seed in range(40):
        signal, fs_hz = made_signals(kind, np.random.default_rng(seed))
        quality = verdict(signal, fs_hz=fs_hz)
        assert quality.verdict == "refused", (seed, signal.shape, fs_hz)
        assert codes(quality) & {"no_ecg", "too_little"}


def test_too_little_signal_is_refused() -> None:
    signal = ecg()
    assert codes(verdict(signal[:, :5])) == {"too_little"}
    missing = signal.copy()
    missing[:, 250:] = np.nan
    assert codes(verdict(missing)) == {"too_little"}
    missing = signal.copy()
    missing[:, 250:] = 0.0  # stored as a constant
    assert codes(verdict(missing)) == {"too_little"}
    assert codes(verdict(np.zeros((12, 0)))) == {"too_little"}


def test_a_gap_is_noted_and_a_large_one_is_doubtful() -> None:
    signal = ecg()
    signal[3, 500:600] = np.nan
    quality = verdict(signal)
    assert (quality.verdict, codes(quality)) == ("good", {"some_missing"})
    signal[3, 500:1500] = np.nan
    quality = verdict(signal)
    assert (quality.verdict, codes(quality)) == ("doubtful", {"missing"})
    assert quality.remarks[0].leads == ("aVR",)


@pytest.mark.parametrize("factor", [5.0, 1000.0, 0.02])
def test_an_implausible_amplitude_is_refused(factor: float) -> None:
    quality = verdict(ecg(Heart().scaled("qrs", (1.2, 1.2, 1.2))) * factor)
    assert (quality.verdict, "implausible_amplitude" in codes(quality)) == ("refused", True)


def test_uncalibrated_is_said() -> None:
    quality = verdict(ecg(), calibrated=False)
    assert (quality.verdict, codes(quality)) == ("doubtful", {"uncalibrated"})


def test_an_offset_is_a_note() -> None:
    quality = verdict(ecg() + 5.0)
    assert (quality.verdict, codes(quality)) == ("good", {"offset"})
    assert "5" in quality.remarks[0].text


def test_flat_and_empty_leads_are_unusable() -> None:
    signal = ecg()
    signal[6:9] = 0.0
    signal[9] = np.nan
    quality = verdict(signal)
    assert quality.verdict == "doubtful"
    assert quality.unusable_leads == ("V1", "V2", "V3", "V4")
    assert {remark.leads for remark in quality.remarks} == {("V1", "V2", "V3", "V4")}


def test_a_lead_of_noise_alone_is_unusable() -> None:
    signal = ecg()
    signal[7] = np.random.default_rng(0).normal(0, 0.3, signal.shape[1])
    quality = verdict(signal)
    assert quality.unusable_leads == ("V2",)
    assert codes(quality) == {"noise_alone"}


def test_noise_in_one_lead_is_a_note_and_in_many_is_doubtful() -> None:
    signal = ecg(fs_hz=100.0)
    noise = np.random.default_rng(0).normal(0, 0.08, signal[6:].shape)
    one, many = signal.copy(), signal.copy()
    one[8] += noise[2]
    many[6:] += noise
    assert (verdict(one, fs_hz=100.0).verdict, codes(verdict(one, fs_hz=100.0))) == ("good", {"some_noise"})
    assert (verdict(many, fs_hz=100.0).verdict, codes(verdict(many, fs_hz=100.0))) == ("doubtful", {"noisy"})


def test_a_clipped_lead_is_doubtful() -> None:
    signal = ecg()
    signal[10] = np.clip(signal[10], -0.2, 0.4)
    quality = verdict(signal)
    assert (quality.verdict, codes(quality), quality.remarks[0].leads) == ("doubtful", {"clipped"}, ("V5",))


@pytest.mark.parametrize("code", ["arms_reversed", "right_arm_left_leg_reversed"])
def test_exchanged_electrodes_are_named(code: str) -> None:
    quality = verdict(exchange(ecg(), code))
    assert (quality.verdict, codes(quality)) == ("doubtful", {code})


def test_exchanged_arms_turn_lead_i_over() -> None:
    signal = ecg()
    swapped = exchange(signal, "arms_reversed")
    np.testing.assert_allclose(swapped[0], -signal[0], atol=0.01)
    np.testing.assert_allclose(swapped[1], signal[2], atol=0.01)
    np.testing.assert_allclose(swapped[3], signal[4], atol=0.01)


@pytest.mark.parametrize("lead", ["I", "II", "aVR", "aVF"])
def test_an_inverted_limb_lead_is_named(lead: str) -> None:
    signal = ecg()
    signal[STANDARD_LEADS.index(lead)] *= -1
    quality = verdict(signal)
    assert (quality.verdict, codes(quality), quality.remarks[0].leads) == ("doubtful", {"inverted"}, (lead,))


def test_limb_leads_that_contradict_each_other_are_doubtful() -> None:
    signal = ecg()
    signal[2] = ecg(seed=1)[2]
    assert codes(verdict(signal)) == {"limb_leads_disagree"}


@pytest.mark.parametrize(
    ("signal", "fs_hz", "message"),
    [
        (np.zeros((2, 1000)), 100.0, "signal: expected one row for each of 12 leads, got \\[2, 1000\\]"),
        (np.zeros((12, 1000)), 0.0, "fs_hz: expected a rate above 0 Hz, got 0.0"),
    ],
)
def test_wrong_arguments(signal: np.ndarray, fs_hz: float, message: str) -> None:
    with pytest.raises(EcgotError, match=message):
        assess(signal, fs_hz, STANDARD_LEADS)


def test_at_most_two_percent_of_real_records_are_doubted(ptbxl: Path) -> None:
    names = sorted((ptbxl / "records100").glob("*/*.hea"))
    names = names[:: max(1, len(names) // 200)][:200]
    found = []
    for name in names:
        signal = wfdb.rdrecord(str(name.with_suffix(""))).p_signal.T
        found.append(verdict(signal, fs_hz=100.0).verdict)
    assert found.count("good") >= 0.98 * len(found)


FAULTS: dict[str, tuple[str, str | None]] = {
    "offset_5mv": ("good", "offset"),
    "electrode_offset": ("good", "offset"),
    "eight_leads": ("good", None),
    "gain_200_for_1000": ("refused", "implausible_amplitude"),
    "white_noise": ("refused", "no_ecg"),
    "sine": ("refused", "no_ecg"),
    "arms_reversed": ("doubtful", "arms_reversed"),
    "six_flat_leads": ("doubtful", "flat"),
    "nine_of_ten_seconds_missing": ("refused", "too_little"),
    "twenty_milliseconds": ("refused", "too_little"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_inputs(name: str) -> None:
    folder = os.environ.get("ECGOT_FAULTS")
    if not folder:
        pytest.skip("ECGOT_FAULTS is not set: no faulty inputs")
    record = wfdb.rdrecord(str(Path(folder) / name), physical=False)
    leads = [lead_name(lead) for lead in record.sig_name]
    quality = assess(record.dac().T, record.fs, leads)
    expected, code = FAULTS[name]
    assert quality.verdict == expected
    assert code is None or code in codes(quality)


def test_a_verdict_takes_milliseconds() -> None:
    signal = ecg(fs_hz=100.0)
    best = min(_seconds(lambda: verdict(signal, fs_hz=100.0)) for _ in range(20))
    assert best < 0.02  # 1 to 3 ms where nothing else runs


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
