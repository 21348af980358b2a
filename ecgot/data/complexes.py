"""QRS complexes of all leads at once, by box filters: below a millisecond for ten seconds of twelve leads."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

Floats = NDArray[np.float64]
Samples = NDArray[np.int64]
Mask = NDArray[np.bool_]

WORK_HZ = 100.0  # at least: rates are divided by whole numbers, by averaging neighbours
FLAT_MV = 0.02  # less, peak to peak and without the baseline, is no lead; PTB-XL's lowest have 0.1 mV
MOST_BEATS = 60  # that are compared, evenly over the record
REFRACTORY_S = 0.17
HALF_QRS_S = 0.1
T_WAVE_S, T_WAVE_SHARE = 0.4, 0.6  # how soon after a complex, and how large beside it, T waves are


@dataclass(frozen=True)
class Complexes:
    """A signal as it is judged, and what stands out of it.

    Attributes:
        signal: [P, T] in mV, without baseline.
        fs_hz: its rate.
        peaked: [P], kurtosis within the QRS band, about 5 to 25 Hz; noise has 3, a sine 1.5.
        sharp: [P], the share of the power that lies in that band.
        peaks: all samples at which complexes were found.
        rate_bpm: from their median distance; 0 with fewer than two.
        quiet: median of the envelope over its median at the complexes.
        alike: [P], correlation of two complexes that 15 % of the pairs exceed.
        together: the same of all leads at once.
        height_mv: [P], median peak to peak of a complex.
        step: median over leads of the change of level across a complex, over its height.
    """

    signal: Floats
    fs_hz: float
    peaked: Floats
    sharp: Floats
    peaks: Samples
    rate_bpm: float
    quiet: float
    alike: Floats
    together: float
    height_mv: Floats
    step: float


def at_work_rate(signal_mv: Floats, fs_hz: float) -> tuple[Floats, float]:
    """The signal at WORK_HZ or somewhat more, each sample the mean of its neighbours."""
    factor = max(1, int(fs_hz // WORK_HZ))
    if factor == 1:
        return signal_mv, fs_hz
    length = signal_mv.shape[1] // factor * factor
    return signal_mv[:, :length].reshape(len(signal_mv), -1, factor).mean(2), fs_hz / factor


def moving_mean(signal: Floats, seconds: float, fs_hz: float) -> Floats:
    """Mean over an odd number of samples about each."""
    return uniform_filter1d(signal, 2 * round(seconds * fs_hz / 2) + 1, axis=-1, mode="nearest")


def find_complexes(signal_mv: Floats, fs_hz: float) -> Complexes:
    """What stands out of a signal [P, T] without NaN, at its work rate (:func:`at_work_rate`)."""
    signal = signal_mv - np.median(signal_mv, 1, keepdims=True)
    signal = signal - moving_mean(signal, 0.8, fs_hz)
    sharp = moving_mean(signal, 0.02, fs_hz) - moving_mean(signal, 0.14, fs_hz)
    square = sharp * sharp
    power = square.mean(1) + 1e-30
    envelope = np.sqrt(np.maximum(moving_mean(square, 0.08, fs_hz), 0.0))
    moves = np.ptp(signal, 1) >= FLAT_MV
    joint = np.zeros(signal.shape[1])
    if moves.any():
        joint = (envelope[moves] / (envelope[moves].mean(1, keepdims=True) + 1e-9)).mean(0)
    peaks = _peaks(joint, fs_hz)
    rate_bpm = 60.0 * fs_hz / float(np.median(np.diff(peaks))) if len(peaks) > 1 else 0.0
    quiet = float(np.median(joint) / np.median(joint[peaks])) if len(peaks) else 1.0
    some = peaks
    if len(some) > MOST_BEATS:
        some = some[np.linspace(0, len(some) - 1, MOST_BEATS).astype(int)]
    half = round(HALF_QRS_S * fs_hz)
    some = some[(some >= half) & (some < signal.shape[1] - half)]
    beats = signal[:, some[:, None] + np.arange(-half, half + 1)]  # [P, beats, samples]
    alike, together = _alikeness(beats, moves)
    height_mv = np.median(np.ptp(beats, 2), 1) if len(some) else np.zeros(len(signal))
    step = _step(signal, some, height_mv, fs_hz)
    middle = float(np.median(step[moves])) if moves.any() else 1.0
    peaked = (square * square).mean(1) / power**2
    share = power / ((signal * signal).mean(1) + 1e-30)
    return Complexes(signal, fs_hz, peaked, share, peaks, rate_bpm, quiet, alike, together, height_mv, middle)


def median_beat(complexes: Complexes, before_s: float, after_s: float) -> Floats | None:
    """[P, S]: the median over beats of ``before_s`` before to ``after_s`` after each; None without beats."""
    start, stop = round(before_s * complexes.fs_hz), round(after_s * complexes.fs_hz)
    peaks, signal = complexes.peaks, complexes.signal
    whole = peaks[(peaks >= start) & (peaks < signal.shape[1] - stop)][:MOST_BEATS]
    if not len(whole):
        return None
    return np.median(signal[:, whole[:, None] + np.arange(-start, stop + 1)], axis=1)


def _peaks(joint: Floats, fs_hz: float) -> Samples:
    """Where the envelope stands out. Its height is the median of the largest of each 2 s, so that a burst of
    noise does not hide the beats."""
    pieces = np.array_split(joint, max(1, len(joint) // round(2 * fs_hz)))
    height = float(np.median([piece.max(initial=0.0) for piece in pieces]))
    if height <= 0:
        return np.zeros(0, np.int64)
    distance = max(1.0, REFRACTORY_S * fs_hz)
    peaks = find_peaks(joint, height=0.4 * height, prominence=0.25 * height, distance=distance)[0]
    return peaks[~_t_waves(peaks, joint, fs_hz)]


def _t_waves(peaks: Samples, joint: Floats, fs_hz: float) -> Mask:
    """Which peaks follow a much larger one as closely as a T wave does."""
    close = np.diff(peaks) < T_WAVE_S * fs_hz
    lower = joint[peaks[1:]] < T_WAVE_SHARE * joint[peaks[:-1]]
    return np.concatenate([np.zeros(min(1, len(peaks)), bool), close & lower])


def _alikeness(beats: Floats, moves: Mask) -> tuple[Floats, float]:
    """Correlation of two complexes that 15 % of the pairs exceed, as they do where several kinds of beats, or
    T waves among them, take turns: [P], and of all moving leads at once."""
    if beats.shape[1] < 2 or not moves.any():
        return np.zeros(len(beats)), 0.0
    centred = beats - beats.mean(2, keepdims=True)
    unit = centred / (np.linalg.norm(centred, axis=2, keepdims=True) + 1e-9)
    first, second = np.triu_indices(beats.shape[1], 1)
    correlation = (unit @ unit.transpose(0, 2, 1))[:, first, second]
    kept = max(1, round(0.15 * correlation.shape[1]))
    alike = -np.partition(-correlation, kept - 1, axis=1)[:, kept - 1]
    joint = -correlation[moves].mean(0)
    return alike, float(-np.partition(joint, kept - 1)[kept - 1])


def _step(signal: Floats, peaks: Samples, height_mv: Floats, fs_hz: float) -> Floats:
    """Median change of level from before to after a complex, over its height: [P]."""
    near, far = round(0.08 * fs_hz), round(0.14 * fs_hz)
    inside = peaks[(peaks >= far) & (peaks < signal.shape[1] - far)]
    if not len(inside):
        return np.ones(len(signal))
    around = np.arange(near, far + 1)
    before = signal[:, inside[:, None] - around].mean(2)
    after = signal[:, inside[:, None] + around].mean(2)
    return np.median(np.abs(after - before), 1) / (height_mv + 1e-9)
