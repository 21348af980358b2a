"""Measured facts of an ECG: rate, intervals, axis and pacing spikes.

As recorders do, the beats of the most frequent kind are aligned and their median is measured over all leads
at once: QRS from the earliest to the latest lead by spatial velocity, the end of T by the tangent at its
steepest fall. neurokit2's delineators were tried first: on lead II of normal ECGs "dwt" finds QRS complexes
twice as long as they are, and "prominence" none over 100 ms even in bundle branch blocks
(`python -m benchmarks.quality DATA --neurokit2`; without the option, this module alone).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy.signal import find_peaks, resample_poly

from ecgot.data.baseline import remove_baseline
from ecgot.data.complexes import Complexes, Floats, Samples, at_work_rate, find_complexes, moving_mean

RATE_HZ = 500.0  # of the median beat
BASELINE_HZ = 0.5
BEFORE_S, AFTER_S = 0.45, 0.65  # of a beat, around its complex
ALIGNED_S = 0.02  # how far a beat is moved to fit the others
SAME_BEAT = 0.8  # correlation with the median of the QRS of a beat of the most frequent kind
BEATS_MIN = 3  # of it, for intervals
QRS_SPEED = 0.05  # of the largest spatial velocity: where QRS begins and ends
QUIET_S = 0.012  # for which it stays below
P_LEAST_MV = 0.03  # over all leads, root of the sum of squares
# Median correlation of single P waves with their median; where RR varies, as in fibrillation, more is asked.
P_SAME, P_SAME_VARYING, VARYING = 0.65, 0.85, 0.12
P_SHARE = 0.15  # of the P wave's height: where it begins
T_LEAST_MV = 0.08
SPIKE_MV, SPIKE_S, SPIKE_HZ = 0.2, 0.002, 450.0  # size and duration; a lower rate blurs them
SPIKE_LEADS, SPIKE_SHARE, SPIKE_NOISE = 2, 0.5, 8.0
PLAUSIBLE_MS = {"pr": (80.0, 450.0), "qrs": (50.0, 260.0), "qt": (200.0, 700.0)}
AXIS_LEAST_MV_MS = 2.0  # net area of QRS; less has no direction


@dataclass(frozen=True)
class Measurements:
    """What was measured; None where it could not be.

    Attributes:
        r_peaks_s: times of all QRS complexes.
        heart_rate_bpm: ventricular, over the whole signal.
        rr_variation: coefficient of variation of the RR intervals: standard deviation over mean.
        pr_ms: from the onset of P to that of QRS; None without a P wave that recurs with every beat.
        qrs_ms: over all leads.
        qt_ms: from the onset of QRS to the end of T.
        qtc_ms: corrected by Fridericia, QT over the cube root of RR in s, which overcorrects less than
            Bazett's square root where the heart is fast or slow.
        axis_deg: of QRS in the frontal plane, from net areas in I and aVF: 0 to the left, 90 to the feet.
        pacing_spikes: how many; 0 also where the rate is below SPIKE_HZ, at which they cannot be seen.
    """

    r_peaks_s: tuple[float, ...]
    heart_rate_bpm: float | None
    rr_variation: float | None
    pr_ms: float | None
    qrs_ms: float | None
    qt_ms: float | None
    qtc_ms: float | None
    axis_deg: float | None
    pacing_spikes: int


@dataclass(frozen=True)
class _Beat:
    """The median beat.

    Attributes:
        median: [L, S] in mV at RATE_HZ, 0 before P.
        each: [L, B, S], the beats it is of.
        qrs: samples of QRS onset and offset.
    """

    median: Floats
    each: Floats
    qrs: tuple[int, int]


def measure(signal_mv: np.ndarray, fs_hz: float, leads: Sequence[str]) -> Measurements:
    """Measure an ECG.

    Args:
        signal_mv: [L, T] in mV, without NaN; at the file's own rate, or pacing spikes are lost.
        leads: L names.
    """
    signal = np.asarray(signal_mv, np.float64)
    signal = signal[np.ptp(signal, axis=1) > 0]
    names = [name for name, row in zip(leads, signal_mv, strict=True) if np.ptp(row) > 0]
    if not len(signal) or signal.shape[1] < 2 * fs_hz:
        return Measurements((), None, None, None, None, None, None, None, 0)
    spikes = _spikes(signal, fs_hz)
    complexes = find_complexes(*at_work_rate(signal, fs_hz))
    peaks_s = _r_peaks(complexes) / complexes.fs_hz
    rate, variation = _rhythm(peaks_s)
    beat = _median_beat(signal, fs_hz, peaks_s)
    if beat is None:
        return Measurements(tuple(peaks_s.tolist()), rate, variation, None, None, None, None, None, spikes)
    rr_s = 60 / rate if rate else 1.0
    pr, qrs, qt = (
        _pr_ms(beat, rr_s, variation or 0.0),
        _plausible("qrs", _ms(beat.qrs[1] - beat.qrs[0])),
        _qt_ms(beat, rr_s),
    )
    qtc = None if qt is None or rate is None else qt / rr_s ** (1 / 3)
    axis = _axis_deg(beat, names)
    return Measurements(tuple(peaks_s.tolist()), rate, variation, pr, qrs, qt, qtc, axis, spikes)


def _r_peaks(complexes: Complexes) -> Samples:
    """Where each complex is largest over all leads."""
    size = (complexes.signal**2).sum(0)
    half = round(0.06 * complexes.fs_hz)
    return np.array(
        [
            max(0, peak - half) + int(size[max(0, peak - half) : peak + half + 1].argmax())
            for peak in complexes.peaks
        ],
        np.int64,
    )


def _ms(samples: float) -> float:
    return 1000 * samples / RATE_HZ


def _plausible(name: str, value_ms: float) -> float | None:
    low, high = PLAUSIBLE_MS[name]
    return value_ms if low <= value_ms <= high else None


def _rhythm(peaks_s: Floats) -> tuple[float | None, float | None]:
    """Rate in beats a minute and relative variation of RR; None with too few beats."""
    if len(peaks_s) < 2:
        return None, None
    rr_s = np.diff(peaks_s)
    return float(60 / rr_s.mean()), float(rr_s.std() / rr_s.mean()) if len(rr_s) > 2 else None


def _median_beat(signal: Floats, fs_hz: float, peaks_s: Floats) -> _Beat | None:
    """The median of the most frequent kind of beats; None if there are too few of them."""
    ratio = Fraction(RATE_HZ / fs_hz).limit_denominator(1000)
    fine = resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="edge")
    fine = remove_baseline(fine, RATE_HZ, BASELINE_HZ)
    before, after, move = round(BEFORE_S * RATE_HZ), round(AFTER_S * RATE_HZ), round(ALIGNED_S * RATE_HZ)
    peaks = np.round(peaks_s * RATE_HZ).astype(np.int64)
    peaks = peaks[(peaks >= before + move) & (peaks < fine.shape[1] - after - move)]
    if len(peaks) < BEATS_MIN:
        return None
    peaks, alike = _aligned(fine, peaks)
    peaks = peaks[alike]
    if len(peaks) < BEATS_MIN:
        return None
    each = fine[:, peaks[:, None] + np.arange(-before, after)]
    median = np.median(each, axis=1)
    qrs = _qrs(median, before)
    return None if qrs is None else _Beat(median, each, qrs)


def _aligned(fine: Floats, peaks: Samples) -> tuple[Samples, np.ndarray]:
    """Peaks moved so that their complexes fit the most typical one, and which are of its kind."""
    half, move = round(0.08 * RATE_HZ), round(ALIGNED_S * RATE_HZ)
    wide = fine[:, peaks[:, None] + np.arange(-half - move, half + move + 1)]
    lags = np.arange(-move, move + 1)
    shifted = np.lib.stride_tricks.sliding_window_view(wide, 2 * half + 1, axis=2)  # [L, B, lags, samples]
    shifted = shifted - shifted.mean(3, keepdims=True)
    size = np.sqrt((shifted**2).sum((0, 3))) + 1e-9  # [B, lags]
    middle = shifted[:, :, move] / size[None, :, move, None]
    correlation = np.einsum("lbs,lcs->bc", middle, middle)
    typical = middle[:, np.median(correlation, axis=1).argmax()]
    fit = np.einsum("lbms,ls->bm", shifted, typical) / size
    return peaks + lags[fit.argmax(1)], fit.max(1) >= SAME_BEAT


def _qrs(median: Floats, at: int) -> tuple[int, int] | None:
    """QRS onset and offset: where the spatial velocity has come down and stays down."""
    speed = _speed(median)
    near = slice(at - round(0.12 * RATE_HZ), at + round(0.12 * RATE_HZ))
    top = near.start + int(speed[near].argmax())
    low = speed < max(QRS_SPEED * speed[top], 1.5 * float(np.median(speed)))
    quiet = round(QUIET_S * RATE_HZ)
    stays = np.all(np.lib.stride_tricks.sliding_window_view(low, quiet), axis=1)  # from each sample on
    ahead = np.flatnonzero(stays[: top - quiet + 1])
    behind = np.flatnonzero(stays[top:])
    if not len(ahead) or not len(behind):
        return None
    return int(ahead[-1]) + quiet, top + int(behind[0])


def _speed(median: Floats) -> Floats:
    return np.sqrt((np.gradient(moving_mean(median, 0.006, RATE_HZ), axis=1) ** 2).sum(0))


def _size(waves: Floats) -> Floats:
    """Root of the sum of squares over leads, scaled to the eight independent ones."""
    return np.sqrt((waves**2).mean(0) * min(len(waves), 8))


def _pr_ms(beat: _Beat, rr_s: float, variation: float) -> float | None:
    """From where the P wave leaves the level before QRS; None where single beats do not show it."""
    start = beat.qrs[0]
    first = max(0, start - round(min(0.40, 0.55 * rr_s) * RATE_HZ))
    last = start - round(0.03 * RATE_HZ)
    if last - first < round(0.08 * RATE_HZ):
        return None
    window = moving_mean(beat.median[:, first:start], 0.02, RATE_HZ)
    quiet = np.median(window[:, -round(0.02 * RATE_HZ) :], axis=1, keepdims=True)
    height = _size(window - quiet)[: last - first]
    peaks, found = find_peaks(height, height=P_LEAST_MV, prominence=0.5 * P_LEAST_MV)
    if not len(peaks) or not _p_comes_back(beat, first, last, variation):
        return None
    peak = int(peaks[found["prominences"].argmax()])
    before = height[:peak]
    floor = float(before.min()) if len(before) else 0.0
    low = np.flatnonzero(before <= floor + P_SHARE * (height[peak] - floor))
    return _plausible("pr", _ms(start - first - int(low[-1]))) if len(low) else None


def _p_comes_back(beat: _Beat, first: int, last: int, variation: float) -> bool:
    """Whether single beats have the median's P wave."""
    each = beat.each[:, :, first:last] - beat.each[:, :, first:last].mean(2, keepdims=True)
    median = np.median(each, axis=1)
    fit = np.einsum("lbs,ls->b", each, median)
    size = np.sqrt((each**2).sum((0, 2)) * (median**2).sum()) + 1e-9
    return bool(np.median(fit / size) >= (P_SAME if variation < VARYING else P_SAME_VARYING))


def _qt_ms(beat: _Beat, rr_s: float) -> float | None:
    """By the tangent where the T wave falls fastest, down to the level after it."""
    start, end = beat.qrs
    first = end + round(0.06 * RATE_HZ)
    last = min(beat.median.shape[1], start + round(min(0.62, 0.80 * rr_s) * RATE_HZ))
    if last - first < round(0.1 * RATE_HZ):
        return None
    level = np.median(beat.median[:, max(0, start - round(0.02 * RATE_HZ)) : start], axis=1, keepdims=True)
    height = moving_mean(_size(beat.median[:, first:last] - level), 0.03, RATE_HZ)
    peaks, found = find_peaks(height, height=T_LEAST_MV, prominence=0.3 * T_LEAST_MV)
    if not len(peaks):
        return None
    peak = int(peaks[found["prominences"].argmax()])
    fall = np.gradient(height)[peak:]
    stop = min(len(fall), round(0.16 * RATE_HZ))
    steepest = peak + int(fall[:stop].argmin())
    if fall[steepest - peak] >= 0:
        return None
    floor = float(height[steepest:].min())
    end_of_t = steepest + (height[steepest] - floor) / -fall[steepest - peak]
    if first + end_of_t > last:
        return None
    return _plausible("qt", float(_ms(first + end_of_t - start)))


def _axis_deg(beat: _Beat, names: Sequence[str]) -> float | None:
    rows = {name: row for row, name in enumerate(names)}
    if "I" not in rows or not {"II", "aVF"} & rows.keys():
        return None
    start, end = beat.qrs
    level = np.median(beat.median[:, max(0, start - 10) : start], axis=1, keepdims=True)
    area = (beat.median[:, start:end] - level).sum(1) * 1000 / RATE_HZ  # mV ms
    first = float(area[rows["I"]])
    foot = float(area[rows["aVF"]]) if "aVF" in rows else float(area[rows["II"]]) - first / 2
    foot *= 2 / np.sqrt(3)  # aVF is as long as the other leads only after this
    if np.hypot(first, foot) < AXIS_LEAST_MV_MS:
        return None
    return float(np.degrees(np.arctan2(foot, first)))


def _spikes(signal: Floats, fs_hz: float) -> int:
    """Jumps in several leads at once. The tip of a QRS deviates from its neighbours by the square of their
    distance, a spike from all alike."""
    if fs_hz < SPIKE_HZ:
        return 0
    near = max(1, round(SPIKE_S * fs_hz))
    tips, wide = (_deviation(signal, near, steps) for steps in (1, 3))
    several = np.sort(np.where(tips >= SPIKE_SHARE * wide, tips, 0.0), axis=0)[-min(SPIKE_LEADS, len(signal))]
    least = max(SPIKE_MV, SPIKE_NOISE * float(np.quantile(tips, 0.9)))
    return len(find_peaks(several, height=least, distance=max(1, round(0.05 * fs_hz)))[0])


def _deviation(signal: Floats, near: int, steps: int) -> Floats:
    """How far samples lie from the mean of those ``steps`` times ``near`` away: [L, T - 6 near]."""
    edge, away = 3 * near, steps * near
    around = signal[:, edge - away : -edge - away] + signal[:, edge + away : signal.shape[1] - edge + away]
    return np.abs(signal[:, edge:-edge] - around / 2)
