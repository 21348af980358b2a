"""Baseline: offset and wander go, the heart stays."""

import numpy as np
import pytest

from ecgot.data.baseline import HIGHPASS_HZ, remove_baseline

FS_HZ = 100.0
TIME = np.arange(3000) / FS_HZ


def wave(hz: float, fs_hz: float = FS_HZ) -> np.ndarray:
    return np.sin(2 * np.pi * hz * np.arange(round(30 * fs_hz)) / fs_hz)


@pytest.mark.parametrize("fs_hz", [100.0, 257.0, 500.0])
def test_offset_and_slow_waves_go_and_fast_ones_stay_in_place(fs_hz):
    heart = wave(5, fs_hz)
    cleaned = remove_baseline((heart + wave(0.05, fs_hz) + 40.0)[None], fs_hz, HIGHPASS_HZ)[0]
    inside = slice(round(5 * fs_hz), -round(5 * fs_hz))
    np.testing.assert_allclose(cleaned[inside], heart[inside], atol=0.01)


def test_half_is_left_at_the_cut_off():
    cleaned = remove_baseline(wave(HIGHPASS_HZ), FS_HZ, HIGHPASS_HZ)
    assert np.ptp(cleaned[1000:2000]) == pytest.approx(1.0, abs=0.01)


def test_an_offset_of_a_volt_changes_nothing():
    heart = wave(1)[None]
    np.testing.assert_allclose(
        remove_baseline(heart + 1000.0, FS_HZ, HIGHPASS_HZ),
        remove_baseline(heart, FS_HZ, HIGHPASS_HZ),
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("samples", "highpass_hz"), [(1000, 0.0), (80, 0.3), (2, 0.3), (1, 0.3), (500, 60.0)]
)
def test_without_room_for_a_filter_the_mean_goes(samples, highpass_hz):
    signal = np.random.default_rng(0).normal(2, 1, (3, samples))
    np.testing.assert_allclose(
        remove_baseline(signal, FS_HZ, highpass_hz), signal - signal.mean(1, keepdims=True)
    )


def test_leads_do_not_touch_one_another():
    signal = np.random.default_rng(0).normal(size=(2, 4, 900))
    together = remove_baseline(signal, FS_HZ, HIGHPASS_HZ)
    np.testing.assert_allclose(together[1, 2], remove_baseline(signal[1, 2], FS_HZ, HIGHPASS_HZ))
