"""Removing electrode offset and baseline wander, which do not come from the heart."""

import functools

import numpy as np
from scipy.signal import butter, sosfiltfilt

HIGHPASS_HZ = 0.3  # half a period is longer than any beat's ST segment and T wave together
ORDER = 2
PADDED_CYCLES = 3.0  # of the cut-off, mirrored at both ends, where a filter would otherwise swing


def remove_baseline(signal: np.ndarray, fs_hz: float, highpass_hz: float) -> np.ndarray:
    """signal [..., T] without what is slower than ``highpass_hz``; 0 removes each lead's mean alone.

    A Butterworth filter of order 2 runs forwards and backwards, so that no wave moves; at the cut-off half of
    the amplitude is left. Only the mean is removed where the signal is shorter than a quarter of a cycle.
    """
    signal = signal - signal.mean(-1, keepdims=True)
    samples = signal.shape[-1]
    if not highpass_hz or samples * highpass_hz < 0.25 * fs_hz or highpass_hz >= fs_hz / 2:
        return signal
    padded = min(samples - 1, round(PADDED_CYCLES * fs_hz / highpass_hz))
    return sosfiltfilt(_filter(fs_hz, highpass_hz), signal, axis=-1, padlen=padded)


@functools.lru_cache(maxsize=64)
def _filter(fs_hz: float, highpass_hz: float) -> np.ndarray:
    return butter(ORDER, highpass_hz, "highpass", fs=fs_hz, output="sos")
