"""EDF and BDF files, by edfio.

pyedflib reads them too, but refuses a whole file for a malformed date or patient field, and needs a compiler
where there is no wheel. edfio reads an EDF file's pieces from the disk; a BDF file it loads as a whole.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ecgot.data.formats.source import (
    at_rate,
    checked_fs_hz,
    common_rate,
    mv_per_unit,
    standard_names,
    unit_error,
)
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError, first_line


class EdfSource:
    """An EDF, EDF+, BDF or BDF+ file without interruptions.

    See :class:`ecgot.data.formats.source.RecordSource`. A lead with a lower rate than the standard leads'
    highest is brought to it by straight lines.
    """

    def __init__(self, path: Path) -> None:
        import edfio

        self.name = str(path)
        read = edfio.read_bdf if path.suffix.lower() == ".bdf" else edfio.read_edf
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                file: Any = read(path, header_encoding="latin-1")
                continuous = file.is_continuous
        except Exception as error:  # whatever a damaged header makes of it
            raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
        # -1 records are what a recorder writes that was switched off before it counted them.
        cut = [str(entry.message) for entry in said if "indicates -1 data records" not in str(entry.message)]
        if cut:
            raise EcgotError(f"record {path}: {cut[0].splitlines()[0]}")
        if not continuous:
            raise EcgotError(f"record {path}: expected a recording without interruptions, got EDF+D")
        leads, rows = standard_names([signal.label for signal in file.signals])
        signals = {lead: file.signals[row] for lead, row in zip(leads, rows, strict=True)}
        voltages = {lead: each for lead, each in signals.items() if _mv(each) is not None}
        for lead, signal in signals.items():
            if lead not in voltages and lead in STANDARD_LEADS:
                raise unit_error(self.name, signal.physical_dimension)
        if not voltages:
            raise EcgotError(f"record {path}: expected signals in V, mV, uV or nV, got none")
        self._signals, self.leads = voltages, tuple(voltages)
        self._duration = file.num_data_records
        self._record_s = float(file.data_record_duration)
        self._set_rate()
        self.calibrated = all(_is_calibrated(signal) for signal in voltages.values())
        left_out = [
            f"{lead} ({each.physical_dimension})" for lead, each in signals.items() if lead not in voltages
        ]
        notes = [f"left out, as they are no voltage: {', '.join(left_out)}"] if left_out else []
        if not self.calibrated:
            notes.append("uncalibrated: the header gives no range of its signals")
        self.notes = tuple(notes)
        self.damaged: Mapping[str, str] = {}

    def _set_rate(self) -> None:
        counts = [signal.samples_per_data_record for signal in self._signals.values()]
        self._rate = common_rate(counts, self.leads)  # samples of a data record
        self.samples = self._duration * self._rate
        if not self.samples or not self._record_s:
            raise EcgotError(f"record {self.name}: expected samples, got none")
        self.fs_hz = checked_fs_hz(self.name, self._rate / self._record_s)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See :meth:`ecgot.data.formats.source.RecordSource.read`."""
        start, stop = max(0, start), min(stop, self.samples)
        signal_mv = np.empty((len(self.leads), max(0, stop - start)))
        if stop <= start:
            return signal_mv
        first, last = start // self._rate, -(-stop // self._rate)
        for row, signal in enumerate(self._signals.values()):
            beyond = min(last + (signal.samples_per_data_record != self._rate), self._duration)
            values = signal.get_data_slice(first * self._record_s, beyond * self._record_s)
            physical = at_rate(values, signal.samples_per_data_record, start, stop, self._rate)
            np.multiply(physical, _mv(signal) or np.nan, out=signal_mv[row])
        return signal_mv


def _mv(signal: Any) -> float | None:
    return mv_per_unit(signal.physical_dimension)


def _is_calibrated(signal: Any) -> bool:
    return signal.physical_min != signal.physical_max and signal.digital_min != signal.digital_max
