"""One WFDB record as a checked array in mV: leads by name, gaps repaired, resampled."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import wfdb
from scipy.signal import resample_poly

from ecgot.data.baseline import remove_baseline
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError, first_line


def fit_length(signal_mv: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    """Cut or zero-pad signal [L, T] to [L, samples]; also returns the number of valid samples."""
    valid = min(signal_mv.shape[1], samples)
    fitted = np.zeros((signal_mv.shape[0], samples), dtype=np.float32)
    fitted[:, :valid] = signal_mv[:, :valid]
    return fitted, valid


MV_PER_UNIT = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "nv": 1e-6}
BYTES_PER_SAMPLE = {"8": 1.0, "80": 1.0, "212": 1.5, "16": 2.0, "61": 2.0, "24": 3.0, "32": 4.0}
KNOWN_FORMATS = {*BYTES_PER_SAMPLE, "310", "311", "160", "508", "516", "524"}  # all that wfdb reads


@dataclass(frozen=True)
class Record:
    """One ECG.

    Attributes:
        name: path without suffix, as requested.
        signal_mv: [L, T] float32, in mV, without NaN.
        fs_hz: sampling rate of ``signal_mv``.
        leads: L names, as requested.
        repaired_samples: number of filled NaN samples by lead, before resampling; empty if there are none.
        flat_leads: leads whose signal is constant.
    """

    name: str
    signal_mv: np.ndarray
    fs_hz: float
    leads: tuple[str, ...]
    repaired_samples: dict[str, int]
    flat_leads: tuple[str, ...]


def read_record(
    path: str | Path,
    *,
    leads: Sequence[str] = STANDARD_LEADS,
    fs_hz: float | None = None,
    highpass_hz: float | None = None,
) -> Record:
    """Read one WFDB record.

    Args:
        path: the record, with or without ``.hea`` or ``.dat``.
        leads: leads to return, in this order; matched by name, ignoring case and the file's order.
        fs_hz: resample to this rate (polyphase, with anti-aliasing); ``None`` keeps the record's.
        highpass_hz: remove offset and wander, see :func:`ecgot.data.baseline.remove_baseline`.

    Raises:
        EcgotError: a missing or damaged file, a header that disagrees with its signal file, a lead that is
            missing or all NaN, an unknown unit, or only flat leads.
    """
    name = _without_suffix(Path(path))
    digital = _read_digital(name)
    rows = _lead_rows(name, digital.sig_name, leads)
    signal = digital.dac()[:, rows].T * _mv_per_unit(name, digital.units, rows)[:, None]
    signal, repaired = _fill_gaps(name, signal, leads)
    flat = tuple(lead for lead, row in zip(leads, signal, strict=True) if np.ptp(row) == 0)
    if len(flat) == len(leads):
        raise EcgotError(f"record {name}: expected a signal, got only flat leads")
    if fs_hz is not None and fs_hz != digital.fs:
        signal = resample(signal, float(digital.fs), fs_hz)
    rate = float(digital.fs) if fs_hz is None else float(fs_hz)
    if highpass_hz is not None:
        signal = remove_baseline(signal, rate, highpass_hz)
    return Record(str(name), signal.astype(np.float32), rate, tuple(leads), repaired, flat)


def resample(signal: np.ndarray, from_hz: float, to_hz: float) -> np.ndarray:
    """signal [L, T] at ``from_hz`` to [L, ceil(T to_hz / from_hz)] at ``to_hz``.

    The ends are padded with their edge values, as an ECG does not start and end at 0 mV.
    """
    ratio = Fraction(to_hz / from_hz).limit_denominator(1000)
    return resample_poly(signal, ratio.numerator, ratio.denominator, axis=1, padtype="edge")


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".hea", ".dat", ".mat") else path


def _read_digital(name: Path) -> wfdb.Record:
    """The record in ADC units, checked against its header."""
    if not name.with_name(name.name + ".hea").is_file():
        raise EcgotError(f"record {name}: there is no {name.name}.hea")
    try:
        header = wfdb.rdheader(str(name))
    except (ValueError, IndexError, TypeError, KeyError, OSError, wfdb.io.header.HeaderSyntaxError) as error:
        raise EcgotError(f"record {name}: {name.name}.hea cannot be parsed ({first_line(error)})") from error
    if not isinstance(header, wfdb.Record):
        raise EcgotError(f"record {name}: expected one segment, got several")
    if not header.n_sig or header.sig_name is None or len(header.sig_name) != header.n_sig:
        raise EcgotError(
            f"record {name}: expected {name.name}.hea to describe its {header.n_sig} signals, got fewer"
        )
    if not (header.fs and np.isfinite(header.fs) and 1 <= header.fs <= 100_000):
        raise EcgotError(f"record {name}: expected a sampling rate of 1 to 100000 Hz, got {header.fs} Hz")
    unknown = [fmt for fmt in header.fmt if fmt not in KNOWN_FORMATS]
    if unknown:
        raise EcgotError(f"record {name}: expected a known WFDB format, got {unknown[0]!r}")
    _check_sizes(name, header)
    try:
        record = wfdb.rdrecord(str(name), physical=False)
    except (ValueError, IndexError, TypeError, KeyError, OSError) as error:
        raise EcgotError(f"record {name}: its signals cannot be read ({first_line(error)})") from error
    expected, actual = header.checksum, record.calc_checksum()
    for lead, left, right in zip(record.sig_name, expected or [], actual, strict=False):
        # A checksum is 16 bits, written signed or unsigned by different tools.
        if left is not None and (left - right) % 65536:
            raise EcgotError(
                f"record {name}: expected checksum {left} of lead {lead}, as its header says, got {right}"
            )
    return record


def _check_sizes(name: Path, header: wfdb.Record) -> None:
    """Check that every signal file exists with the size that the header implies."""
    signals = list(zip(header.file_name, header.fmt, header.samps_per_frame, strict=True))
    for file in dict.fromkeys(header.file_name):
        path = name.parent / file
        if not path.is_file():
            raise EcgotError(f"record {name}: there is no {file}")
        sizes = [BYTES_PER_SAMPLE.get(fmt, np.nan) * (spf or 1) for f, fmt, spf in signals if f == file]
        offset = header.byte_offset[header.file_name.index(file)] or 0
        if not header.sig_len or np.isnan(sum(sizes)):
            continue  # open-ended header or compressed format: wfdb checks it on reading
        expected, actual = offset + int(np.ceil(sum(sizes) * header.sig_len)), path.stat().st_size
        # Format 212 packs two samples into three bytes and may end with padding.
        if actual < expected or actual > expected + 3:
            raise EcgotError(f"record {name}: expected {expected} bytes in {file}, got {actual}")


def _lead_rows(name: Path, available: Sequence[str], leads: Sequence[str]) -> list[int]:
    position = {lead.strip().lower(): row for row, lead in reversed(list(enumerate(available)))}
    missing = [lead for lead in leads if lead.lower() not in position]
    if missing:
        raise EcgotError(
            f"record {name}: expected leads {', '.join(leads)}, got "
            f"{', '.join(map(str, available))}, without {', '.join(missing)}"
        )
    return [position[lead.lower()] for lead in leads]


def _mv_per_unit(name: Path, units: Sequence[str], rows: Sequence[int]) -> np.ndarray:
    unknown = [units[row] for row in rows if str(units[row]).strip().lower() not in MV_PER_UNIT]
    if unknown:
        raise EcgotError(f"record {name}: expected units V, mV, uV or nV, got {unknown[0]!r}")
    return np.array([MV_PER_UNIT[units[row].strip().lower()] for row in rows])


def _fill_gaps(name: Path, signal: np.ndarray, leads: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """Fill NaN gaps of signal [L, T] by linear interpolation over time, lead by lead."""
    repaired: dict[str, int] = {}
    time = np.arange(signal.shape[1])
    for lead, row in zip(leads, signal, strict=True):
        gap = ~np.isfinite(row)
        if not gap.any():
            continue
        if gap.all():
            raise EcgotError(f"record {name}: expected valid samples in lead {lead}, got only NaN")
        row[gap] = np.interp(time[gap], time[~gap], row[~gap])
        repaired[lead] = int(gap.sum())
    return signal, repaired
