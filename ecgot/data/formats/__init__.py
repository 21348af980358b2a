"""Records of any format behind one face: :func:`open_record` and :class:`RecordSource`.

Imports of libraries wait until a file needs them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecgot.data.formats.source import ArraySource, RecordSource
from ecgot.errors import EcgotError

__all__ = [
    "FORMATS",
    "ArraySource",
    "Format",
    "RecordSource",
    "open_record",
    "record_files",
]


@dataclass(frozen=True)
class Format:
    """A format that can be read.

    Attributes:
        name: as people call it.
        suffixes: of its files, in lower case.
        modules: Python modules that read it.
        library: their name on PyPI.
        starts: bytes at which files of no or another suffix are known, and their place.
    """

    name: str
    suffixes: tuple[str, ...]
    modules: tuple[str, ...]
    library: str
    starts: tuple[tuple[int, bytes], ...] = ()

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)


FORMATS = (
    Format("WFDB", (".hea", ".dat", ".mat"), ("wfdb",), "wfdb"),
    Format("NumPy", (".npy", ".npz"), ("numpy",), "numpy", ((0, b"\x93NUMPY"),)),
    Format("CSV", (".csv", ".tsv"), ("pandas",), "pandas"),
    Format("EDF", (".edf", ".rec"), ("edfio",), "edfio", ((0, b"0       "),)),
    Format("BDF", (".bdf",), ("edfio",), "edfio", ((0, b"\xffBIOSEMI"),)),
    Format("DICOM", (".dcm", ".dicom"), ("ecgdatakit", "pydicom"), "ecgdatakit", ((128, b"DICM"),)),
    Format("GE MUSE XML", (".xml",), ("ecgdatakit",), "ecgdatakit"),
    Format("HL7 aECG", (".xml",), ("ecgdatakit",), "ecgdatakit"),
    Format("SCP-ECG", (".scp", ".ecg"), ("ecgdatakit",), "ecgdatakit"),
)


def open_record(
    path: str | Path, *, fs_hz: float | None = None, leads: Sequence[str] | None = None
) -> RecordSource:
    """A record of any format.

    Args:
        path: a file; of a WFDB record with or without the suffix.
        fs_hz, leads: what a NumPy or CSV file does not say of itself; other formats do.

    Raises:
        EcgotError: there is no such record, it is damaged, its format is unknown or its library missing.
    """
    path = Path(path)
    kind = _format(path)
    if kind.name == "WFDB":
        from ecgot.data.formats.wfdb_record import open_wfdb

        return open_wfdb(path)
    if not kind.installed:
        raise EcgotError(
            f"record {path}: expected {kind.library} to read {kind.name}, got none; "
            'pip install "ecgot[formats]" brings it'
        )
    return _opener(kind.name)(path, fs_hz, leads)


def record_files(path: str | Path) -> list[Path]:
    """Every file of a record, whether it exists or not: what its content depends on."""
    path = Path(path)
    if _is_wfdb(path):
        from ecgot.data.formats.wfdb_record import wfdb_files

        return wfdb_files(path)
    return [path]


def _opener(name: str) -> Callable[[Path, float | None, Sequence[str] | None], RecordSource]:
    if name == "NumPy":
        from ecgot.data.formats.tables import open_array

        return open_array
    if name == "CSV":
        from ecgot.data.formats.tables import open_csv

        return open_csv
    if name in ("EDF", "BDF"):
        from ecgot.data.formats.edf import EdfSource

        return lambda path, _fs_hz, _leads: EdfSource(path)
    from ecgot.data.formats.documents import open_document

    return lambda path, _fs_hz, _leads: open_document(path)


def _format(path: Path) -> Format:
    """By suffix, else by the file's first bytes; WFDB where there is a header of this name."""
    if _is_wfdb(path):
        return FORMATS[0]
    by_suffix = next((each for each in FORMATS if path.suffix.lower() in each.suffixes), None)
    if path.is_dir():
        raise EcgotError(f"record {path}: expected a file, got a folder")
    if not path.is_file():
        raise EcgotError(f"record {path}: there is no such file")
    if by_suffix is not None:
        return by_suffix
    with path.open("rb") as file:
        head = file.read(512)
    for each in FORMATS:
        if any(head[place:].startswith(start) for place, start in each.starts):
            return each
    known = ", ".join(dict.fromkeys(each.name for each in FORMATS))
    raise EcgotError(f"record {path}: expected one of {known}, got a file of an unknown format")


def _is_wfdb(path: Path) -> bool:
    """By suffix or header; also what is not there under any other format's suffix, as the error says best."""
    if path.suffix.lower() in FORMATS[0].suffixes or path.with_name(f"{path.name}.hea").is_file():
        return True
    return not path.exists() and not any(path.suffix.lower() in each.suffixes for each in FORMATS)
