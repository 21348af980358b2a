"""A record, or a window of it, as a checked array in mV: leads by name, gaps filled, resampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.signal import firwin, resample_poly

from ecgot.data.baseline import PADDED_CYCLES, remove_baseline
from ecgot.data.formats import RecordSource, open_record
from ecgot.data.leads import LIMB_LEADS, STANDARD_LEADS, complete, lead_name
from ecgot.errors import EcgotError

MissingLeads = Literal["error", "estimate"]
GAP_MARGIN_S = 1.0  # read on either side of a window, to bridge a gap that its edge cuts


def fit_length(signal_mv: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    """Cut or zero-pad signal [L, T] to [L, samples]; also returns the number of valid samples."""
    valid = min(signal_mv.shape[1], samples)
    fitted = np.zeros((signal_mv.shape[0], samples), dtype=np.float32)
    fitted[:, :valid] = signal_mv[:, :valid]
    return fitted, valid


@dataclass(frozen=True)
class Record:
    """One ECG, or a window of it.

    Attributes:
        name: as its source calls it.
        signal_mv: [L, T] float32, in mV, without NaN.
        fs_hz: sampling rate of ``signal_mv``.
        leads: L names, as requested.
        repaired_samples: number of filled NaN samples by lead, before resampling; empty if there are none.
        flat_leads: leads of the record whose signal is constant, or was while any was valid.
        derived_leads: leads that follow exactly from others, as aVF from I and II.
        estimated_leads: leads that are a guess from others.
        start_s: where the window begins in the record.
        source_leads: leads of the record, by their standard names.
        notes: what a person should know of how it was read.
    """

    name: str
    signal_mv: np.ndarray
    fs_hz: float
    leads: tuple[str, ...]
    repaired_samples: dict[str, int]
    flat_leads: tuple[str, ...]
    derived_leads: tuple[str, ...] = ()
    estimated_leads: tuple[str, ...] = ()
    start_s: float = 0.0
    source_leads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_record(
    path: str | Path,
    *,
    leads: Sequence[str] = STANDARD_LEADS,
    fs_hz: float | None = None,
    highpass_hz: float | None = None,
    start_s: float = 0.0,
    window_s: float | None = None,
    missing_leads: MissingLeads = "error",
) -> Record:
    """Read a record of any format of :mod:`ecgot.data.formats`, or a window of it.

    Args:
        path: the record; of a WFDB record with or without the suffix.
        leads: leads to return, in this order, in any spelling.
        fs_hz: resample to this rate (polyphase, with anti-aliasing); ``None`` keeps the record's.
        highpass_hz: remove offset and wander, see :func:`ecgot.data.baseline.remove_baseline`.
        start_s: where the window begins.
        window_s: how long it is, less where the record ends; ``None`` takes all that follows. What is read,
            and the memory it takes, grows with the window, not with the record.
        missing_leads: ``"error"``, or ``"estimate"`` for leads that are missing, flat or without a valid
            sample and do not follow from the others. Leads that follow exactly are derived either way.

    Raises:
        EcgotError: a missing or damaged file, a header that disagrees with its signal file, a lead that is
            missing or all NaN, an unknown unit, only flat leads, or a window outside the record.
    """
    return prepare(
        open_record(path),
        start_s,
        window_s,
        leads=leads,
        fs_hz=fs_hz,
        highpass_hz=highpass_hz,
        missing_leads=missing_leads,
    )


def prepare(
    source: RecordSource,
    start_s: float = 0.0,
    window_s: float | None = None,
    *,
    leads: Sequence[str] = STANDARD_LEADS,
    fs_hz: float | None = None,
    highpass_hz: float | None = None,
    missing_leads: MissingLeads = "error",
) -> Record:
    """The record from an opened source; arguments and errors as of :func:`read_record`.

    A window equals the same piece of the whole record's result: a margin is read on either side, beyond which
    the filters' tails are below 1e-5 of the signal.
    """
    rate = source.fs_hz if fs_hz is None else float(fs_hz)
    span = _span(source, rate, start_s, window_s, highpass_hz)
    signal = source.read(span.read_from, span.read_to)
    inside = signal[:, span.inside]
    valid = np.isfinite(inside)
    flat = _flat(source.leads, inside, valid)
    plan = _plan(source, valid.any(1), flat, leads, missing_leads)
    rows = [source.leads.index(lead) for lead in plan.used]
    gaps = {lead: int(count) for lead, count in zip(plan.used, (~valid[rows]).sum(1), strict=True) if count}
    signal = signal[rows]
    _fill_gaps(signal)
    if rate != source.fs_hz:
        signal = resample(signal, source.fs_hz, rate)
    if highpass_hz:
        signal = remove_baseline(signal, rate, highpass_hz)
    signal = signal[:, span.cut]
    if highpass_hz == 0:
        signal = remove_baseline(signal, rate, 0)
    return Record(
        source.name,
        plan.arrange(signal).astype(np.float32),
        rate,
        tuple(leads),
        gaps,
        flat,
        plan.derived,
        plan.estimated,
        span.start_s,
        source.leads,
        source.notes,
    )


def resample(signal: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """signal [L, T] at ``from_hz`` to [L, ceil(T to_hz / from_hz)] at ``to_hz``.

    The ends are padded with their edge values, as an ECG does not start and end at 0 mV.
    """
    up, down = _ratio(from_hz, to_hz)
    taps: Any = _taps(up, down)  # scipy's stubs know no array here
    return resample_poly(signal, up, down, axis=1, window=taps, padtype="edge")


def _ratio(from_hz: float, to_hz: float) -> tuple[int, int]:
    ratio = Fraction(to_hz / from_hz).limit_denominator(1000)
    return ratio.numerator, ratio.denominator


@lru_cache(maxsize=64)
def _taps(up: int, down: int) -> np.ndarray:
    """scipy's own filter for this ratio, which it would design anew for every record."""
    highest = max(up, down)
    return firwin(20 * highest + 1, 1.0 / highest, window=("kaiser", 5.0))


@dataclass(frozen=True)
class _Span:
    """What to read of a source for a window, in its samples, and what to keep of the result, in its own.

    Attributes:
        read_from, read_to: samples of the source, with a margin.
        inside: the window within what is read.
        cut: the window within what was read and resampled.
        start_s: where the window begins.
    """

    read_from: int
    read_to: int
    inside: slice
    cut: slice
    start_s: float


def _span(
    source: RecordSource, rate: float, start_s: float, window_s: float | None, highpass_hz: float | None
) -> _Span:
    """Raises EcgotError where the window is not in the record."""
    up, down = _ratio(source.fs_hz, rate)
    total = -(-source.samples * up // down)
    first = round(start_s * rate) if np.isfinite(start_s) else -1
    if not 0 <= first < total:
        raise EcgotError(
            f"start_s: expected 0 to less than {source.samples / source.fs_hz:g} s, the length of record "
            f"{source.name}, got {start_s:g}"
        )
    if window_s is not None and not window_s * rate >= 0.5:
        raise EcgotError(f"window_s: expected a length above 0 s, got {window_s:g}")
    last = total if window_s is None else min(total, first + max(1, round(min(window_s * rate, total))))
    margin_s = GAP_MARGIN_S + (PADDED_CYCLES / highpass_hz if highpass_hz else 0.0)
    margin = int(margin_s * rate) + 10 * max(up, down) // down + 1
    # Samples of the result lie on those of the source once in every `up`: what is read begins at such a one.
    block = max(0, first - margin) // up
    read_to = min(source.samples, -(-(last + margin) * down // up))
    inside = slice(first * down // up - block * down, -(-last * down // up) - block * down)
    return _Span(block * down, read_to, inside, slice(first - block * up, last - block * up), first / rate)


@dataclass(frozen=True)
class _Plan:
    """From which leads of a source the wanted ones come.

    Attributes:
        used: leads to process.
        wanted: leads to return, by their standard names.
        derived, estimated: those of ``wanted`` that are not in ``used``.
    """

    used: tuple[str, ...]
    wanted: tuple[str, ...]
    derived: tuple[str, ...]
    estimated: tuple[str, ...]

    def arrange(self, signal: np.ndarray) -> np.ndarray:
        """signal [U, T] of ``used`` as [L, T] of ``wanted``."""
        if not (self.derived or self.estimated):
            return signal[[self.used.index(lead) for lead in self.wanted]]
        present = [row for row, lead in enumerate(self.used) if lead in STANDARD_LEADS]
        twelve, _ = complete(signal[present], [self.used[row] for row in present])
        rows = [
            signal[self.used.index(lead)] if lead in self.used else twelve[STANDARD_LEADS.index(lead)]
            for lead in self.wanted
        ]
        return np.stack(rows)


def _plan(
    source: RecordSource,
    valid: np.ndarray,
    flat: Sequence[str],
    leads: Sequence[str],
    missing_leads: MissingLeads,
) -> _Plan:
    """Raises EcgotError for a wanted lead that is damaged, or missing where it must not be."""
    by_name = {lead.casefold(): lead for lead in source.leads}
    wanted = tuple(by_name.get(lead.casefold(), lead_name(lead)) for lead in leads)
    estimate = missing_leads == "estimate"
    empty = [lead for lead, some in zip(source.leads, valid, strict=True) if not some]
    for lead in wanted:
        if lead in source.damaged:
            raise EcgotError(source.damaged[lead])
        if lead in empty and not (estimate and lead in STANDARD_LEADS):
            raise EcgotError(f"record {source.name}: expected valid samples in lead {lead}, got only NaN")
    # What is flat is no lead to estimate from, nor to show where an estimate is wanted.
    sound = [lead for lead in source.leads if lead not in empty and lead not in flat]
    if not sound:
        got = "only flat leads" if flat else "only missing samples"
        raise EcgotError(f"record {source.name}: expected a signal, got {got}")
    kept = [lead for lead in source.leads if lead in wanted and lead not in empty]
    used = [lead for lead in kept if lead in sound or not (estimate and lead in STANDARD_LEADS)]
    missing = [lead for lead in wanted if lead not in used]
    limbs = [lead for lead in sound if lead in LIMB_LEADS]
    derived = tuple(lead for lead in missing if lead in LIMB_LEADS and len(limbs) >= 2)
    others = [lead for lead in missing if lead not in derived]
    standard = [lead for lead in sound if lead in STANDARD_LEADS]
    hopeless = others and (not estimate or not standard or any(lead not in STANDARD_LEADS for lead in others))
    if hopeless:
        raise EcgotError(
            f"record {source.name}: expected leads {', '.join(leads)}, got {', '.join(source.leads)}, "
            f"without {', '.join(others)}"
        )
    if missing:
        used += [lead for lead in (standard if others else limbs) if lead not in used]
    return _Plan(tuple(used), wanted, derived, tuple(others))


def _flat(leads: Sequence[str], signal: np.ndarray, valid: np.ndarray) -> tuple[str, ...]:
    """Leads that have samples, all of one value."""
    if valid.all():
        highest, lowest = signal.max(1), signal.min(1)
    else:
        highest = np.where(valid, signal, -np.inf).max(1)
        lowest = np.where(valid, signal, np.inf).min(1)
    return tuple(lead for lead, top, low in zip(leads, highest, lowest, strict=True) if top == low)


def _fill_gaps(signal: np.ndarray) -> None:
    """Fill NaN gaps of signal [L, T] by straight lines over time, lead by lead."""
    valid = np.isfinite(signal)
    time = np.arange(signal.shape[1])
    for row in np.flatnonzero(~valid.all(1)):
        there = valid[row]
        signal[row, ~there] = np.interp(time[~there], time[there], signal[row, there])
