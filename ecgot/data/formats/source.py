"""What every format gives: leads by name and signals in mV, piece by piece."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from ecgot.data.leads import STANDARD_LEADS, lead_name
from ecgot.errors import EcgotError

MV_PER_UNIT = {"mv": 1.0, "uv": 1e-3, "µv": 1e-3, "μv": 1e-3, "v": 1e3, "nv": 1e-6}
LOWEST_FS_HZ, HIGHEST_FS_HZ = 1.0, 100_000.0


class RecordSource(Protocol):
    """An opened record, whatever its format.

    Attributes:
        name: what a person would call it.
        fs_hz: sampling rate of all leads.
        leads: P names without repetition; the standard ones where known.
        samples: length of every lead.
        calibrated: False where the file does not say what a unit of its signal is, so that mV are a guess.
        notes: what a person should know of how it was read.
        damaged: leads that the file announces but that cannot be read, and why.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 (described above, as are the others)
    @property
    def fs_hz(self) -> float: ...  # noqa: D102
    @property
    def leads(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def samples(self) -> int: ...  # noqa: D102
    @property
    def calibrated(self) -> bool: ...  # noqa: D102
    @property
    def notes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def damaged(self) -> Mapping[str, str]: ...  # noqa: D102

    def read(self, start: int, stop: int) -> np.ndarray:
        """Samples ``start`` to ``stop`` of every lead, [P, stop - start] float64 in mV, NaN where missing."""


class ArraySource:
    """A record in memory.

    Args:
        signal_mv: [P, T] or [T, P]; which of the two tells the number of leads.
        fs_hz: sampling rate.
        leads: P names, in any spelling.
        name: what a person would call it.
        calibrated, notes: as in :class:`RecordSource`.

    Raises:
        EcgotError: an array that is not of real numbers or does not fit ``leads``, an impossible rate.
    """

    def __init__(
        self,
        signal_mv: np.ndarray,
        *,
        fs_hz: float,
        leads: Sequence[str],
        name: str = "array",
        calibrated: bool = True,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.calibrated = name, calibrated
        self.fs_hz = checked_fs_hz(name, fs_hz)
        self.leads, rows = standard_names(leads)
        left_out = [str(lead) for row, lead in enumerate(leads) if row not in rows]
        self.notes = (*notes, *([f"repeated and left out: {', '.join(left_out)}"] if left_out else []))
        self.damaged: Mapping[str, str] = {}
        self._signal = _leads_first(name, signal_mv, len(leads))
        self._rows = rows
        self.samples = self._signal.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """See :meth:`RecordSource.read`."""
        signal = self._signal[:, start:stop]
        if len(self._rows) != len(signal):
            signal = signal[list(self._rows)]
        signal = np.array(signal, dtype=np.float64)
        signal[~np.isfinite(signal)] = np.nan
        return signal


def checked_fs_hz(name: str, fs_hz: float | None) -> float:
    """``fs_hz`` as a float.

    Raises:
        EcgotError: it is no rate at which an ECG is sampled.
    """
    if fs_hz is None or not (LOWEST_FS_HZ <= fs_hz <= HIGHEST_FS_HZ):  # a NaN fails it too
        raise EcgotError(
            f"record {name}: expected a sampling rate of {LOWEST_FS_HZ:g} to {HIGHEST_FS_HZ:g} Hz, "
            f"got {'none' if fs_hz is None else f'{fs_hz:g} Hz'}"
        )
    return float(fs_hz)


def standard_names(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Leads by their standard names, each once, and their places in ``names``.

    Where several mean the same lead, as II and MLII, the one that is spelled the standard way is taken, else
    the first; another one keeps its own name.
    """
    standard = [lead_name(str(name)) for name in names]
    taken: dict[str, int] = {}
    for row, (name, lead) in enumerate(zip(names, standard, strict=True)):
        if lead not in taken or (_same(name, lead) and not _same(names[taken[lead]], lead)):
            taken[lead] = row
    for row, (name, lead) in enumerate(zip(names, standard, strict=True)):
        if taken[lead] != row:
            taken.setdefault(str(name).strip(), row)
    rows = sorted(set(taken.values()))
    by_row = {row: lead for lead, row in taken.items()}
    return tuple(by_row[row] for row in rows), tuple(rows)


def _same(name: str, lead: str) -> bool:
    return str(name).strip().casefold() == lead.casefold()


def mv_per_unit(unit: str | None) -> float | None:
    """How many mV a unit is; None if it is no voltage."""
    return MV_PER_UNIT.get(str(unit).strip().lower())


def unit_error(name: str, unit: str | None) -> EcgotError:
    """The error of a lead in a unit that is no voltage."""
    return EcgotError(f"record {name}: expected units V, mV, uV or nV, got {unit!r}")


def common_rate(rates: Sequence[int], leads: Sequence[str]) -> int:
    """The highest of ``rates`` of the standard leads, or of all where there is none of them."""
    some = [rate for rate, lead in zip(rates, leads, strict=True) if lead_name(lead) in STANDARD_LEADS]
    return max(some or rates)


def at_rate(values: np.ndarray, rate: int, start: int, stop: int, target: int) -> np.ndarray:
    """Samples ``start`` to ``stop`` at ``target`` per frame, by straight lines between those at ``rate``.

    ``values`` begin with the first sample of the frame in which ``start`` lies.
    """
    first_frame = start // target
    if rate == target:
        return values[start - first_frame * target : stop - first_frame * target]
    times = np.arange(start, stop) / target - first_frame
    return np.interp(times, np.arange(len(values)) / rate, values)


def _leads_first(name: str, signal: np.ndarray, leads: int) -> np.ndarray:
    """signal as [P, T] of ``leads`` rows."""
    if not isinstance(signal, np.ndarray):
        signal = np.asarray(signal)
    if signal.dtype.kind not in "fiu":
        raise EcgotError(f"record {name}: expected numbers in mV, got an array of {signal.dtype}")
    if signal.ndim == 1 and leads == 1:
        return signal[None]
    if signal.ndim == 2 and signal.size and signal.shape[0] == leads:
        return signal
    if signal.ndim == 2 and signal.size and signal.shape[1] == leads:
        return signal.T
    raise EcgotError(
        f"record {name}: expected an array of {leads} leads by samples, got shape {signal.shape}"
    )
