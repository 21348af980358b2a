"""WFDB records, read piece by piece, of one segment or of several."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ecgot.data.formats.source import at_rate, common_rate, mv_per_unit, standard_names, unit_error
from ecgot.data.formats.wfdb_header import WfdbHeader, WfdbSignal, read_header
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError, first_line

NO_FILE = "~"
# Samples that numpy reads as they are; what is packed in bits or compressed the wfdb library unpacks.
ALIGNED = {"16": "<i2", "61": ">i2", "32": "<i4", "80": "u1", "160": "<u2"}
OFFSETS = {"80": 128, "160": 32768}
_BITS = {"80": 8, "508": 8, "310": 10, "311": 10, "212": 12, "16": 16, "61": 16, "160": 16, "516": 16}
_BITS |= {"24": 24, "524": 24, "32": 32}
MISSING = {"8": None, **{fmt: -(2 ** (bits - 1)) for fmt, bits in _BITS.items()}}  # by all known formats
BYTES_PER_SAMPLE = {"8": 1.0, "80": 1.0, "212": 1.5, "16": 2.0, "61": 2.0, "160": 2.0, "24": 3.0, "32": 4.0}


def open_wfdb(path: Path) -> "WfdbSource | WfdbSegments":
    """The record ``path``, with or without ``.hea``, ``.dat`` or ``.mat``.

    Raises:
        EcgotError: a missing or damaged file, a header that disagrees with its signal file, an unknown unit
            or format, or a header without names of leads.
    """
    header = read_header(record_path(path))
    return WfdbSegments(header) if header.segments else WfdbSource(header)


def record_path(path: Path) -> Path:
    """``path`` without a suffix that names one of the record's files."""
    if path.suffix.lower() in (".hea", ".dat", ".mat") and not path.with_name(f"{path.name}.hea").is_file():
        return path.with_suffix("")
    return path


def wfdb_files(path: Path) -> list[Path]:
    """Header and signal files of the record ``path`` and of its segments, whether they exist or not."""
    record = record_path(path)
    files = [record.with_name(f"{record.name}.hea")]
    try:
        header = read_header(record)
    except EcgotError:
        return files
    names = dict.fromkeys(signal.file for signal in header.signals if signal.file != NO_FILE)
    files += [record.parent / name for name in names]
    for name, _ in header.segments:
        if name not in (NO_FILE, record.name):
            files += wfdb_files(record.parent / name)
    return list(dict.fromkeys(files))


class WfdbSource:
    """A record of one segment; see :class:`ecgot.data.formats.source.RecordSource`.

    Signals that are no voltage, as of blood pressure, are left out. A signal with fewer samples a frame than
    the standard leads is brought to their rate by straight lines. Where everything is read at once, checksums
    are compared with the header's.
    """

    def __init__(self, header: WfdbHeader, rate: int | None = None) -> None:
        """``rate`` in samples a frame; None takes the highest of the standard leads."""
        self.name = str(header.path)
        self._header = header
        named = [signal for signal in header.signals if signal.name]
        if not named:
            raise EcgotError(
                f"record {self.name}: expected {header.path.name}.hea to name its leads, got no name"
            )
        leads, rows = standard_names([signal.name for signal in named])
        channels = {lead: named[row] for lead, row in zip(leads, rows, strict=True)}
        self._signals = _voltages(self.name, channels)
        self.damaged: Mapping[str, str] = self._damage()
        if len(self.damaged) == len(self._signals):
            raise EcgotError(next(iter(self.damaged.values())))
        self._signals = {lead: signal for lead, signal in self._signals.items() if lead not in self.damaged}
        self.leads = tuple(self._signals)
        self.rate = rate or common_rate([signal.per_frame for signal in self._signals.values()], self.leads)
        self.fs_hz = header.fs_hz * self.rate
        self._frames = header.frames or self._frames_of_file()
        self.samples = self._frames * self.rate
        self.calibrated = all(signal.calibrated for signal in self._signals.values())
        self.notes = self._remarks(channels)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See :meth:`ecgot.data.formats.source.RecordSource.read`."""
        start, stop = max(0, start), min(stop, self.samples)
        first, last = start // self.rate, -(-stop // self.rate)
        signal_mv = np.empty((len(self._signals), max(0, stop - start)))
        if stop <= start:
            return signal_mv
        whole = first == 0 and last == self._frames
        beyond = min(last + 1, self._frames)  # one more frame, for a lower rate to draw a line to
        for file in dict.fromkeys(signal.file for signal in self._signals.values()):
            mine = {lead: signal for lead, signal in self._signals.items() if signal.file == file}
            skew = max(signal.skew for signal in mine.values())
            digital = self._read_frames(file, first, min(beyond + skew, self._frames))
            for lead, signal in mine.items():
                values = digital[self._place(signal)]
                if whole:
                    self._check_sum(lead, signal, values)
                physical = self._physical(signal, values, beyond - first)
                signal_mv[self.leads.index(lead)] = at_rate(
                    physical, signal.per_frame, start, stop, self.rate
                )
        return signal_mv

    def _physical(self, signal: WfdbSignal, values: np.ndarray, frames: int) -> np.ndarray:
        """mV of ``frames`` frames or more, moved by the skew."""
        missing = MISSING[signal.fmt]
        physical = np.subtract(values, float(signal.baseline))
        physical *= (mv_per_unit(signal.unit) or np.nan) / signal.gain
        if missing is not None:
            physical[values == missing] = np.nan
        if not signal.skew:
            return physical
        physical = physical[signal.skew * signal.per_frame :]
        short = frames * signal.per_frame - len(physical)
        return np.pad(physical, (0, short), constant_values=np.nan) if short > 0 else physical

    def _place(self, signal: WfdbSignal) -> int:
        """Which signal of its file it is."""
        of_file = [each for each in self._header.signals if each.file == signal.file]
        return next(place for place, each in enumerate(of_file) if each is signal)

    def _read_frames(self, file: str, start: int, stop: int) -> list[np.ndarray]:
        """ADC units of every signal of ``file``, from frame ``start`` to ``stop``."""
        signals = [signal for signal in self._header.signals if signal.file == file]
        path, fmt = self._header.path.parent / file, signals[0].fmt
        try:
            if fmt not in ALIGNED:
                return _read_packed(path, signals, self._frames, start, stop)
            counts = [signal.per_frame for signal in signals]
            kind = np.dtype(ALIGNED[fmt])
            offset = signals[0].byte_offset + start * sum(counts) * kind.itemsize
            flat = np.fromfile(path, kind, (stop - start) * sum(counts), offset=offset)
            frames = flat.reshape(stop - start, sum(counts))
        except (ValueError, IndexError, TypeError, KeyError, OSError) as error:
            raise EcgotError(
                f"record {self.name}: its signals cannot be read ({first_line(error)})"
            ) from error
        if fmt in OFFSETS:
            frames = frames.astype(np.int32) - OFFSETS[fmt]
        ends = np.cumsum(counts)
        return [frames[:, end - count : end].reshape(-1) for end, count in zip(ends, counts, strict=True)]

    def _check_sum(self, lead: str, signal: WfdbSignal, values: np.ndarray) -> None:
        """Of the samples as they lie in the file, before any skew; 16 bits, signed or not by the writer."""
        actual = int(values.sum(dtype=np.int64)) % 65536
        if signal.checksum is not None and (signal.checksum - actual) % 65536:
            raise EcgotError(
                f"record {self.name}: expected checksum {signal.checksum} of lead {lead}, as its header "
                f"says, got {actual}"
            )

    def _damage(self) -> dict[str, str]:
        """Leads whose file is missing or of a wrong size or format, and why."""
        reasons = {
            file: _file_fault(self._header, file)
            for file in dict.fromkeys(signal.file for signal in self._signals.values())
        }
        return {
            lead: f"record {self.name}: {reason}"
            for lead, signal in self._signals.items()
            if (reason := reasons[signal.file])
        }

    def _frames_of_file(self) -> int:
        """Of a header that does not tell the length."""
        file = next(iter(self._signals.values())).file
        signals = [signal for signal in self._header.signals if signal.file == file]
        if signals[0].fmt not in BYTES_PER_SAMPLE:
            raise EcgotError(
                f"record {self.name}: expected a number of samples in its header, as its format "
                f"{signals[0].fmt} does not tell it, got none"
            )
        size = (self._header.path.parent / file).stat().st_size - signals[0].byte_offset
        frames = int(size // _bytes_per_frame(signals))
        if not frames:
            raise EcgotError(f"record {self.name}: expected samples in {file}, got none")
        return frames

    def _remarks(self, channels: Mapping[str, WfdbSignal]) -> tuple[str, ...]:
        left_out = [
            f"{lead} ({signal.unit})" for lead, signal in channels.items() if mv_per_unit(signal.unit) is None
        ]
        notes = [f"left out, as they are no voltage: {', '.join(left_out)}"] if left_out else []
        notes += [reason.partition(": ")[2] for reason in dict.fromkeys(self.damaged.values())]
        raw = [lead for lead, signal in self._signals.items() if not signal.calibrated]
        if raw:
            notes.append(
                f"uncalibrated: the header gives no gain of {', '.join(raw)}; 200 units per mV are assumed"
            )
        return tuple(notes)


class WfdbSegments:
    """A record of several segments, of fixed or variable layout; gaps between them are NaN.

    See :class:`ecgot.data.formats.source.RecordSource`. A segment is opened when its samples are asked for.
    """

    def __init__(self, header: WfdbHeader) -> None:
        self.name, self._header = str(header.path), header
        self._parts = [part for part in header.segments if part[1]]
        first = self._layout()
        self.leads, self.rate, self.fs_hz = first.leads, first.rate, first.fs_hz
        self.damaged: Mapping[str, str] = first.damaged
        self._starts = np.concatenate([[0], np.cumsum([frames for _, frames in self._parts])]) * self.rate
        self.samples = int(self._starts[-1])
        if header.frames is not None and header.frames * self.rate != self.samples:
            raise EcgotError(
                f"record {self.name}: expected {header.frames} samples, as its header says, got "
                f"{self.samples // self.rate} in its segments"
            )
        self._open = functools.lru_cache(maxsize=4)(functools.partial(self._opened, rate=self.rate))
        gaps = sum(name == NO_FILE for name, _ in self._parts)
        some = self._first_part()
        self.calibrated = some.calibrated
        self.notes = (*some.notes, *([f"{gaps} gaps between segments"] if gaps else []))

    def read(self, start: int, stop: int) -> np.ndarray:
        """See :meth:`ecgot.data.formats.source.RecordSource.read`."""
        start, stop = max(0, start), min(stop, self.samples)
        signal_mv = np.full((len(self.leads), max(0, stop - start)), np.nan)
        for number, (name, _) in enumerate(self._parts):
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            left, right = max(start, begin), min(stop, end)
            if name == NO_FILE or left >= right:
                continue
            part = self._open(name)
            rows = [self.leads.index(lead) for lead in part.leads if lead in self.leads]
            taken = [row for row, lead in enumerate(part.leads) if lead in self.leads]
            signal_mv[rows, left - start : right - start] = part.read(left - begin, right - begin)[taken]
        return signal_mv

    def _layout(self) -> "WfdbSource | _Layout":
        """What names the leads: a header of length 0 (variable layout) or the first segment (fixed)."""
        name, frames = self._header.segments[0]
        if not self._parts:
            raise EcgotError(f"record {self.name}: expected segments with samples, got none")
        if frames:
            return self._first_part()
        return _Layout(read_header(self._header.path.parent / name))

    def _first_part(self) -> WfdbSource:
        for name, _ in self._parts:
            if name != NO_FILE:
                return self._opened(name)
        raise EcgotError(f"record {self.name}: expected segments with samples, got only gaps")

    def _opened(self, name: str, rate: int | None = None) -> WfdbSource:
        """The segment ``name`` at ``rate`` samples a frame."""
        header = read_header(self._header.path.parent / name)
        if header.segments:
            raise EcgotError(f"record {self.name}: expected segments without segments, got {name}")
        return WfdbSource(header, rate)


class _Layout:
    """Leads and rate of a layout header, which has no samples."""

    def __init__(self, header: WfdbHeader) -> None:
        leads, rows = standard_names([signal.name for signal in header.signals])
        signals = _voltages(
            str(header.path), dict(zip(leads, [header.signals[r] for r in rows], strict=True))
        )
        self.leads = tuple(signals)
        self.rate = common_rate([signal.per_frame for signal in signals.values()], self.leads)
        self.fs_hz = header.fs_hz * self.rate
        self.damaged: Mapping[str, str] = {}


def _voltages(name: str, channels: Mapping[str, WfdbSignal]) -> dict[str, WfdbSignal]:
    """Those that are in a unit of voltage.

    Raises:
        EcgotError: a standard lead is in another unit, or all are.
    """
    for lead, signal in channels.items():
        if mv_per_unit(signal.unit) is None and lead in STANDARD_LEADS:
            raise unit_error(name, signal.unit)
    found = {lead: signal for lead, signal in channels.items() if mv_per_unit(signal.unit) is not None}
    if not found:
        raise unit_error(name, next(iter(channels.values())).unit)
    return found


def _file_fault(header: WfdbHeader, file: str) -> str:
    """What is wrong with a signal file; empty if nothing is seen."""
    signals = [signal for signal in header.signals if signal.file == file]
    fmt, path = signals[0].fmt, header.path.parent / file
    if fmt not in MISSING:
        return f"expected a known WFDB format, got {fmt!r}"
    if not path.is_file():
        return f"there is no {file}"
    if not header.frames or fmt not in BYTES_PER_SAMPLE:
        return ""  # open-ended header or packed format: seen on reading
    expected = signals[0].byte_offset + int(np.ceil(_bytes_per_frame(signals) * header.frames))
    actual = path.stat().st_size
    # Format 212 packs two samples into three bytes and may end with padding.
    if actual < expected or actual > expected + 3:
        return f"expected {expected} bytes in {file}, got {actual}"
    return ""


def _bytes_per_frame(signals: Sequence[WfdbSignal]) -> float:
    return sum(BYTES_PER_SAMPLE[signal.fmt] * signal.per_frame for signal in signals)


def _read_packed(
    path: Path, signals: Sequence[WfdbSignal], frames: int, start: int, stop: int
) -> list[np.ndarray]:
    """ADC units of each of the ``signals`` of a file in a format that is packed in bits or compressed."""
    from wfdb.io import _signal  # only here: it takes most of a second

    # Format 8 holds differences: it is read from its beginning.
    first = 0 if signals[0].fmt == "8" else start
    values = _signal._rd_dat_signals(
        file_name=path.name,
        dir_name=str(path.parent.absolute()),
        pn_dir=None,
        fmt=signals[0].fmt,
        n_sig=len(signals),
        sig_len=frames,
        byte_offset=signals[0].byte_offset,
        samps_per_frame=[signal.per_frame for signal in signals],
        skew=[0] * len(signals),
        init_value=[signal.first_value for signal in signals],
        sampfrom=first,
        sampto=stop,
    )
    return [each[(start - first) * signal.per_frame :] for each, signal in zip(values, signals, strict=True)]
