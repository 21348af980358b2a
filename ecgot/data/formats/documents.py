"""DICOM, GE MUSE XML, HL7 aECG and SCP-ECG, by ecgdatakit.

It decodes what these formats allow - packed and differenced SCP, companded and padded DICOM, MUSE's check
sums, aECG's origins and units - and says what it left out. Such files hold seconds to minutes and are read
whole.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ecgot.data.formats.source import ArraySource, at_rate
from ecgot.errors import EcgotError, first_line


def open_document(path: Path) -> ArraySource:
    """A DICOM waveform, GE MUSE XML, HL7 aECG or SCP-ECG file.

    Raises:
        EcgotError: it is none of these, damaged, or gives no unit of voltage.
    """
    parser = _parser(path)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            record = parser.parse(path)
    except Exception as error:  # whatever a damaged file makes of it
        raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
    if not record.leads:
        raise EcgotError(f"record {path}: expected a rhythm waveform, got none")
    highest = max(int(lead.sampling_rate) for lead in record.leads)
    rows = [_mv(path, lead, highest) for lead in record.leads]
    signal_mv = np.full((len(rows), max(map(len, rows))), np.nan)
    for row, values in zip(signal_mv, rows, strict=True):
        row[: len(values)] = values
    return ArraySource(
        signal_mv,
        fs_hz=_exact_rate(record, highest),
        leads=[lead.label for lead in record.leads],
        name=str(path),
        notes=[str(entry.message).splitlines()[0].replace(f"{path}", path.name) for entry in said],
    )


def _mv(path: Path, lead: Any, rate: int) -> np.ndarray:
    """A lead's samples in mV at ``rate``; an SCP file may let a lead begin later than others."""
    try:
        values = lead.to_physical().convert_units("mV").samples
    except Exception as error:  # no unit, or none of voltage
        raise EcgotError(
            f"record {path}: expected lead {lead.label} in V, mV, uV or nV, got {first_line(error)}"
        ) from error
    late = int(lead.annotations.get("start_sample", 1)) - 1
    values = np.concatenate([np.full(late, np.nan), values])
    own = int(lead.sampling_rate)
    return values if own == rate else at_rate(values, own, 0, len(values) * rate // own, rate)


def _exact_rate(record: Any, rate: int) -> float:
    """``rate``, which ecgdatakit rounds, as the file gives it."""
    meta = record.raw_metadata
    exact = meta.get("rhythm_time", {}).get("sampling_rate_exact")
    groups = meta.get("multiplex_groups", [])
    exact = exact or next((group["sampling_frequency"] for group in groups), None)
    return float(exact) if exact and 1e-3 < abs(exact - rate) < 1 else float(rate)


def _parser(path: Path) -> Any:
    """ecgdatakit's parser of the format that the file's beginning shows."""
    from ecgdatakit.parsing.parsers.dicom_waveform import DICOMWaveformParser
    from ecgdatakit.parsing.parsers.ge_muse_xml import GEMuseXMLParser
    from ecgdatakit.parsing.parsers.hl7_aecg import HL7aECGParser
    from ecgdatakit.parsing.parsers.scp_ecg import SCPECGParser

    with path.open("rb") as file:
        head = file.read(65536)
    for parser in (DICOMWaveformParser, GEMuseXMLParser, HL7aECGParser, SCPECGParser):
        if parser.can_parse(path, head):
            return parser()
    raise EcgotError(f"record {path}: expected DICOM, GE MUSE XML, HL7 aECG or SCP-ECG, got none of them")
