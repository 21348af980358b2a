"""From a file or an array to the stretches of signal that a model reads at once. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ecgot.data.formats import ArraySource, RecordSource, open_record
from ecgot.data.quality import Quality, assess
from ecgot.data.record import Record, prepare
from ecgot.errors import EcgotError
from ecgot.runs.config import DataConfig

LARGEST_MV = 1e6  # models count in float32, which holds no squares of 1e20
SHORTEST_S = 2.5  # a remainder that is shorter is not read on its own


@dataclass(frozen=True)
class Stretch:
    """A stretch of a record.

    Attributes:
        start_s, stop_s: in the record.
        quality: of its raw signal.
        record: the signal as a model takes it; None if there is none, as where all leads are flat.
        readable: whether something may be said of it.
    """

    start_s: float
    stop_s: float
    quality: Quality
    record: Record | None
    readable: bool


def source_of(item: Any, *, fs_hz: float | None = None, leads: Sequence[str] | None = None) -> RecordSource:
    """The source of a path, an array [L, T] or [T, L] in mV, or a :class:`wfdb.Record`.

    Args:
        fs_hz, leads: of an array, and of files that do not say.

    Raises:
        EcgotError: the item cannot be used.
    """
    if isinstance(item, str | Path):
        return open_record(item, fs_hz=fs_hz, leads=leads)
    if hasattr(item, "p_signal") or hasattr(item, "d_signal"):
        from ecgot.data.formats.wfdb_record import from_wfdb

        return from_wfdb(item)
    if is_source(item):
        return item
    if hasattr(item, "detach"):  # a tensor, wherever it is; numpy knows no bfloat16
        item = item.detach().cpu()
        item = item.double() if item.is_floating_point() else item
    array = np.asarray(item)
    if array.dtype.kind not in "iuf":
        raise EcgotError(
            f"record: expected a path, an array in mV or a wfdb.Record, got {type(item).__name__}"
        )
    if fs_hz is None or leads is None:
        raise EcgotError("record: expected fs_hz and leads with an array, got none")
    return ArraySource(array, fs_hz=fs_hz, leads=leads)


def is_source(item: Any) -> bool:
    """Whether it is a :class:`ecgot.data.formats.RecordSource`."""
    return hasattr(item, "read") and hasattr(item, "samples")


def starts(
    source: RecordSource, seconds: float, *, start_s: float = 0.0, window_s: float | None = None
) -> list[float]:
    """Where the stretches of ``seconds`` begin; the last one ends where the record, or the window, does.

    Args:
        start_s, window_s: the part of the record to read; by default all of it.

    Raises:
        EcgotError: it begins behind the record's end, or is empty.
    """
    duration_s = source.samples / source.fs_hz
    if not 0 <= start_s < duration_s:
        raise EcgotError(f"start: expected 0 s to the record's end at {duration_s:g} s, got {start_s:g} s")
    if window_s is not None and not window_s > 0:
        raise EcgotError(f"window: expected more than 0 s, got {window_s:g} s")
    stop_s = duration_s if window_s is None else min(duration_s, start_s + window_s)
    whole = math.floor((stop_s - start_s) / seconds + 1e-6)
    found = [start_s + number * seconds for number in range(whole)]
    rest_s = stop_s - start_s - whole * seconds
    if not found:
        return [start_s]
    return found if rest_s < SHORTEST_S else [*found, stop_s - seconds]


def load(source: RecordSource, start_s: float, length_s: float, data: DataConfig, *, force: bool) -> Stretch:
    """One stretch of at most ``length_s``, judged and prepared; readable unless refused and not forced."""
    first = round(start_s * source.fs_hz)
    last = min(source.samples, round((start_s + length_s) * source.fs_hz))
    quality = assess(source.read(first, last), source.fs_hz, source.leads, calibrated=source.calibrated)
    refused = quality.verdict == "refused"
    record = None
    try:
        record = prepare(
            source,
            start_s,
            length_s,
            leads=data.leads,
            fs_hz=data.fs_hz,
            highpass_hz=data.highpass_hz,
            missing_leads="estimate",
        )
    except EcgotError:
        if not refused or force:
            raise
    if record is not None and not np.abs(record.signal_mv).max() <= LARGEST_MV:  # a NaN fails it too
        record = None
        if force:
            raise EcgotError(f"record {source.name}: expected voltages of an ECG in mV, got far larger ones")
    return Stretch(start_s, last / source.fs_hz, quality, record, force or not refused)
