"""Is it an ECG, and how good: a verdict on a record and its leads before anything is said of it.

A record is judged by what makes an ECG: complexes that stand out from a quiet baseline, look alike, and
return to where they started, at a rate that a heart can have (:mod:`ecgot.data.complexes`).

Libraries were tried. neurokit2's ``ecg_quality`` rates the beats of one lead that is known to be an ECG: it
does not ask whether it is one, nor look at electrodes, gain or clipping
(`python -m benchmarks.quality DATA --neurokit2`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ecgot.data.complexes import FLAT_MV, Complexes, Floats, Mask, at_work_rate, find_complexes
from ecgot.data.electrodes import EINTHOVEN_MAX, exchanged, inverted_lead, law_residuals
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError

Verdict = Literal["good", "doubtful", "refused"]

LEAST_S = 2.5  # of signal: less holds too few beats to compare
LEAST_SHARE = 0.5  # of a record's samples that must be there
DEAD_S = 0.5  # a lead that does not move at all for so long is not connected
# Limits of an ECG. How near real records and other signals come: `python -m benchmarks.quality DATA`.
BEATS_MIN = 2
RATES_BPM = (18.0, 320.0)
# Correlation of complexes, less what lies between them over their size, plus 0.05 of their excess kurtosis.
STANDS_OUT_FEW, STANDS_OUT_MIN = 0.42, 0.3
FEW_LEADS = 2  # up to so many must stand out by the former
PEAKED_WEIGHT, PEAKED_MIN, PEAKED_MOST = 0.05, 3.2, 13.0
PEAKED_SURE = 6.0  # no sine has it, so that its spectrum is not asked
STEP_MAX = 0.45  # change of level across a complex, over its size; square waves have 0.5 to 1
WIDE_ALIKE_MIN, WIDE_STEP_MAX = 0.95, 0.7  # of wide complexes, which are neither peaked nor return at once
WIDE_RANK_MIN = (
    0.02  # second over first eigenvalue of the leads' products: one generator makes leads of rank 1
)
SHARP_MIN = 0.06  # of the power above the baseline that lies in the QRS band; a slow sine has none
STILL_MAX = 0.7  # of the samples that repeat the one before; a square wave has 0.9
LEVEL_MAX = 0.08  # mean deviation from the nearer of two levels, over their distance; real leads have more
COPY_MIN = 0.98  # correlation of leads of one size that are copies but for noise
PURE_MAX = 0.9  # of the power at one frequency; of PTB-XL's single leads the highest have 0.6
# Fibrillation and fast wide-complex rhythms have no complexes that stand out, but a band of their own.
FIBRILLATION_HZ = (2.0, 9.0)
FIBRILLATION_SHARE = 0.75
HARMONICS = 8
# Medians of PTB-XL's complexes by lead. A record's are at most LARGE times as high, in the median over its
# leads, and those of fewer than LEADS_TOGETHER at most ALONE times.
TYPICAL_MV = dict(
    zip(STANDARD_LEADS, (0.85, 0.83, 0.63, 0.78, 0.62, 0.59, 0.99, 1.55, 1.65, 1.74, 1.48, 1.09), strict=True)
)
LARGE, ALONE, LEADS_TOGETHER = 2.9, 4.2, 3
SMALL_MV = 0.1  # largest lead's complexes
NOISY_MV = 0.05  # standard deviation of what is faster than the waves
NOISY_DOUBTFUL = 3  # leads
NOISE_ALIKE = 0.3  # a lead whose complexes correlate less says nothing
OFFSET_MV = 0.5
CLIPPED_RUNS, CLIPPED_RUN = 3, 4  # so many runs of so many samples at the extreme value
MISSING_MIN, MISSING_DOUBTFUL = 0.01, 0.2  # share of a lead's samples

REFUSED = frozenset({"no_ecg", "too_little", "implausible_amplitude"})
NOTES = frozenset({"offset", "some_noise", "some_missing"})  # said, but no reason for doubt


@dataclass(frozen=True)
class Remark:
    """One thing that a person should know of a signal.

    Attributes:
        code: such as "flat" or "arms_reversed".
        text: the same as a person would say it.
        leads: which it is about; empty: the record.
    """

    code: str
    text: str
    leads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quality:
    """How far a record can be read.

    Attributes:
        verdict: "refused": nothing should be said of it; "doubtful": what is said may be wrong, for a reason
            that the remarks give; "good".
        remarks: most serious first.
        unusable_leads: leads that say nothing: flat, missing, or noise alone.
    """

    verdict: Verdict
    remarks: tuple[Remark, ...]
    unusable_leads: tuple[str, ...]


def assess(signal_mv: np.ndarray, fs_hz: float, leads: Sequence[str], *, calibrated: bool = True) -> Quality:
    """The verdict on a signal as it was recorded, before anything is filled or filtered.

    Args:
        signal_mv: [P, T] in mV, NaN where a sample is missing.
        fs_hz: its rate.
        leads: P names; what is said of limb leads needs the standard ones.
        calibrated: False where the file gives no gain, so that mV are a guess.

    Raises:
        EcgotError: the shape is another, or the rate is not positive.
    """
    signal = np.asarray(signal_mv, np.float64)
    if signal.ndim != 2 or len(signal) != len(leads) or not len(leads):
        raise EcgotError(f"signal: expected one row for each of {len(leads)} leads, got {list(signal.shape)}")
    if not (np.isfinite(fs_hz) and fs_hz > 0):
        raise EcgotError(f"fs_hz: expected a rate above 0 Hz, got {fs_hz}")
    remarks = [] if calibrated else [UNCALIBRATED]
    finite = np.isfinite(signal)
    live = _live(signal, finite, fs_hz)
    live_s = live.sum(1) / fs_hz
    whole_s = signal.shape[1] / fs_hz
    if live_s.max() < max(LEAST_S, LEAST_SHARE * whole_s):
        return _verdict([_too_little(float(live_s.max()), whole_s), *remarks], ())
    filled = _filled(signal, finite)
    complexes = find_complexes(*at_work_rate(filled, fs_hz))
    names = np.array(leads, dtype=object)
    flat = np.ptp(complexes.signal, 1) < FLAT_MV
    missing = ~flat & (live_s < LEAST_S)
    usable = ~(flat | missing)
    reason = _no_ecg(complexes, usable, leads)
    if reason:
        return _verdict([Remark("no_ecg", f"no ECG: {reason}"), *remarks], tuple(names[~usable]))
    noise = usable & (complexes.alike < NOISE_ALIKE) & (len(complexes.peaks) > BEATS_MIN)
    usable &= ~noise
    remarks += _amplitude(complexes, usable, leads)
    whole = _whole(live[usable], fs_hz, complexes.signal.shape[1])
    remarks += _limbs(complexes, usable, leads, whole)
    remarks += _each("flat", "flat", names[flat])
    remarks += _each("no_signal", "without signal", names[missing])
    remarks += _each("noise_alone", "noise alone", names[noise])
    remarks += _each(
        "clipped", "cut off at the largest value that the recorder holds", names[usable & _clipped(signal)]
    )
    remarks += _noisy(complexes, names, usable)
    remarks += _missing(1 - live_s / whole_s, names, usable)
    remarks += _offset(filled)
    return _verdict(remarks, tuple(names[~usable]))


UNCALIBRATED = Remark(
    "uncalibrated", "uncalibrated: the file gives no gain, so voltages are a guess and may be far off"
)


def _verdict(remarks: Sequence[Remark], unusable: tuple[str, ...]) -> Quality:
    ordered = sorted(remarks, key=lambda remark: (remark.code not in REFUSED, remark.code in NOTES))
    codes = {remark.code for remark in ordered}
    verdict: Verdict = "refused" if codes & REFUSED else "doubtful" if codes - NOTES else "good"
    return Quality(verdict, tuple(ordered), unusable)


def _each(code: str, what: str, leads: Sequence[str]) -> list[Remark]:
    """A remark on some leads; none if there are none."""
    if not len(leads):
        return []
    verb = "is" if len(leads) == 1 else "are"
    return [Remark(code, f"{_listed(leads)} {verb} {what}", tuple(leads))]


def _listed(leads: Sequence[str]) -> str:
    return f"lead {leads[0]}" if len(leads) == 1 else f"leads {', '.join(leads)}"


def _too_little(live_s: float, whole_s: float) -> Remark:
    needs = f"at least {LEAST_S} s and half of the record are needed"
    return Remark("too_little", f"too little signal: {live_s:.2g} s of {whole_s:.3g} s; {needs}")


def _live(signal: Floats, finite: Mask, fs_hz: float) -> Mask:
    """Where a lead holds signal, neither missing nor standing still for DEAD_S: [P, T]."""
    length = max(2, round(DEAD_S * fs_hz))
    blocks = signal.shape[1] // length
    live = finite.copy()
    pieces = signal[:, : blocks * length].reshape(len(signal), blocks, length)
    still = (pieces == pieces[:, :, :1]).all(2)
    if still.any():
        live[:, : blocks * length] &= ~np.repeat(still, length, axis=1)
    return live


def _filled(signal: Floats, finite: Mask) -> Floats:
    """Gaps filled by straight lines; a lead without samples is 0."""
    if finite.all():
        return signal
    filled = np.zeros_like(signal)
    time = np.arange(signal.shape[1])
    for row, values, there in zip(filled, signal, finite, strict=True):
        if there.any():
            row[:] = np.interp(time, time[there], values[there])
    return filled


def _no_ecg(complexes: Complexes, usable: Mask, leads: Sequence[str]) -> str:
    """Why it is no ECG; "" if it is one."""
    if not usable.any():
        return f"no lead moves by more than {FLAT_MV * 1000:.0f} µV"
    signal = complexes.signal[usable]
    if _jumps(signal):
        return "it jumps between levels"
    if len(signal) > 2 and _copies(signal):
        return "all leads hold the same"
    if _stands_out(complexes, usable):
        sharp = np.median(complexes.peaked[usable]) > PEAKED_SURE
        return "" if sharp or _purity(signal, complexes.fs_hz, 1) <= PURE_MAX else "it is a single sine wave"
    if _fibrillates(complexes, usable, leads):
        return ""
    return "no QRS complexes that repeat"


def _stands_out(complexes: Complexes, usable: Mask) -> bool:
    """Whether complexes stand out, look alike and come at a heart's rate."""
    peaked = float(np.median(complexes.peaked[usable]))
    least = STANDS_OUT_FEW if usable.sum() <= FEW_LEADS else STANDS_OUT_MIN
    clear = complexes.together - complexes.quiet + PEAKED_WEIGHT * (min(peaked, PEAKED_MOST) - 3)
    if not (
        len(complexes.peaks) >= BEATS_MIN
        and RATES_BPM[0] <= complexes.rate_bpm <= RATES_BPM[1]
        and clear >= least
        and np.median(complexes.sharp[usable]) >= SHARP_MIN
    ):
        return False
    return (peaked >= PEAKED_MIN and complexes.step <= STEP_MAX) or _wide(complexes, usable)


def _wide(complexes: Complexes, usable: Mask) -> bool:
    """Whether wide complexes repeat faithfully in leads that differ, as in a bundle branch block."""
    signal = complexes.signal[usable]
    if len(signal) <= FEW_LEADS or complexes.together < WIDE_ALIKE_MIN or complexes.step > WIDE_STEP_MAX:
        return False
    values = np.linalg.eigvalsh(signal @ signal.T)
    return values[-2] >= WIDE_RANK_MIN * values[-1] and _purity(signal, complexes.fs_hz, 1) <= PURE_MAX


def _jumps(signal: Floats) -> bool:
    """Whether most leads stand still but for jumps, or the largest rests at two levels but for noise."""
    if np.median((np.abs(np.diff(signal, axis=1)) < 1e-9).mean(1)) > STILL_MAX:
        return True
    return _deviation(signal[np.ptp(signal, axis=1).argmax()]) < LEVEL_MAX


def _deviation(row: Floats) -> float:
    """Mean deviation from the nearer of two levels, of the worse of the two, over their distance."""
    upper = row > (row.min() + row.max()) / 2
    high, low = np.median(row[upper]), np.median(row[~upper])
    worse = max(np.abs(row[upper] - high).mean(), np.abs(row[~upper] - low).mean())
    return float(worse / (high - low))


def _copies(signal: Floats) -> bool:
    size = signal.std(1)
    return bool(size.max() < 1.1 * size.min() and np.abs(np.corrcoef(signal)).min() > COPY_MIN)


def _purity(signal: Floats, fs_hz: float, harmonics: int) -> float:
    """Share of the power at each lead's strongest frequency and its multiples, the median over leads."""
    power, frequency = _spectrum(signal, fs_hz)
    strongest = frequency[power.argmax(1)]
    width = max(0.3, 2 * fs_hz / signal.shape[1])
    near = np.zeros(power.shape, bool)
    for number in range(1, harmonics + 1):
        near |= np.abs(frequency - number * strongest[:, None]) <= width
    return float(np.median((power * near).sum(1) / power.sum(1)))


def _spectrum(signal: Floats, fs_hz: float) -> tuple[Floats, Floats]:
    """Power [P, F] and the F frequencies."""
    power = np.abs(np.fft.rfft(signal * np.hanning(signal.shape[1]), axis=1)) ** 2 + 1e-30
    return power, np.arange(power.shape[1]) * (fs_hz / signal.shape[1])


def _fibrillates(complexes: Complexes, usable: Mask, leads: Sequence[str]) -> bool:
    """Whether it may be ventricular fibrillation or a fast wide rhythm: a band of frequencies, none alone.

    Three limb leads that agree prove that it is regular by a heart, not by a generator.
    """
    signal = complexes.signal[usable]
    laws = law_residuals(complexes.signal, _rows(usable, leads))
    if any(size > EINTHOVEN_MAX for size in laws.values()) or np.ptp(signal, 1).max() < SMALL_MV:
        return False
    power, frequency = _spectrum(signal, complexes.fs_hz)
    inside = (frequency >= FIBRILLATION_HZ[0]) & (frequency <= FIBRILLATION_HZ[1])
    share = float(np.median(power[:, inside].sum(1) / power.sum(1)))
    return (
        share >= FIBRILLATION_SHARE and _purity(signal, complexes.fs_hz, 1 if laws else HARMONICS) <= PURE_MAX
    )


def _rows(usable: Mask, leads: Sequence[str]) -> dict[str, int]:
    return {lead: row for row, lead in enumerate(leads) if usable[row]}


def _amplitude(complexes: Complexes, usable: Mask, leads: Sequence[str]) -> list[Remark]:
    """Whether a heart can make complexes of this height, and whether they stand out at all."""
    if not _stands_out(complexes, usable):
        text = "no QRS complexes, but a fast wave: a wide-complex tachycardia, fibrillation, or no ECG"
        return [Remark("no_complexes", text)]
    height_mv = complexes.height_mv[usable]
    names = [lead for lead, good in zip(leads, usable, strict=True) if good]
    typical_mv = [TYPICAL_MV.get(lead, max(TYPICAL_MV.values())) for lead in names]
    largest, relative = float(height_mv.max()), float(np.median(height_mv / typical_mv))
    if largest < SMALL_MV:
        return [_implausible(f"the largest QRS complexes have {largest * 1000:.0f} µV")]
    if relative > (LARGE if len(names) >= LEADS_TOGETHER else ALONE):
        return [_implausible(f"QRS complexes have up to {largest:.3g} mV")]
    return []


def _implausible(what: str) -> Remark:
    return Remark(
        "implausible_amplitude", f"implausible amplitude: {what}; the file's gain or unit is probably wrong"
    )


def _whole(live: Mask, fs_hz: float, samples: int) -> Mask:
    """At which of ``samples`` of the work rate no lead of ``live`` [P, T] lacks anything."""
    if live.all():
        return np.ones(samples, bool)
    return np.equal(at_work_rate(np.all(live, axis=0)[None].astype(np.float64), fs_hz)[0][0], 1)


def _limbs(complexes: Complexes, usable: Mask, leads: Sequence[str], whole: Mask) -> list[Remark]:
    rows = _rows(usable, leads)
    there = complexes.signal[:, whole]
    if there.shape[1] and any(size > EINTHOVEN_MAX for size in law_residuals(there, rows).values()):
        lead = inverted_lead(there, rows)
        if lead is not None:
            return [
                Remark("inverted", f"lead {lead} looks inverted: the other limb leads contradict it", (lead,))
            ]
        return [
            Remark("limb_leads_disagree", "the limb leads contradict each other (I + III = II does not hold)")
        ]
    exchange = exchanged(complexes, rows)
    if exchange is None:
        return []
    return [Remark(exchange.code, f"{exchange.electrodes} look exchanged")]


def _clipped(signal: Floats) -> Mask:
    """Which leads rest at their extreme value again and again: [P]."""
    clipped = np.zeros(len(signal), bool)
    for row, values in enumerate(signal):
        for extreme in (np.nanmax(values, initial=-np.inf), np.nanmin(values, initial=np.inf)):
            (at,) = np.nonzero(values == extreme)
            if len(at) < CLIPPED_RUNS * CLIPPED_RUN:
                continue
            runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
            clipped[row] |= sum(len(run) >= CLIPPED_RUN for run in runs) >= CLIPPED_RUNS
    return clipped


def _noisy(complexes: Complexes, names: np.ndarray, usable: Mask) -> list[Remark]:
    """Leads whose second differences are large, as the waves' are not: the median leaves complexes out."""
    size_mv = np.median(np.abs(np.diff(complexes.signal, 2, axis=1)), 1) / (0.6745 * np.sqrt(6))
    noisy = usable & (size_mv > NOISY_MV)
    code = "noisy" if noisy.sum() >= NOISY_DOUBTFUL else "some_noise"
    return _each(code, "noisy", names[noisy])


def _missing(share: Floats, names: np.ndarray, usable: Mask) -> list[Remark]:
    some = usable & (share >= MISSING_MIN)
    if not some.any():
        return []
    worst = float(share[some].max())
    code = "missing" if worst >= MISSING_DOUBTFUL else "some_missing"
    text = f"up to {worst:.0%} of {_listed(list(names[some]))} missing"
    return [Remark(code, text, tuple(names[some]))]


def _offset(filled: Floats) -> list[Remark]:
    largest = float(np.abs(np.median(filled, 1)).max())
    if largest < OFFSET_MV:
        return []
    return [Remark("offset", f"offset of up to {largest:.2g} mV removed")]
