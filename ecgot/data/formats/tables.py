"""NumPy arrays and tables of text: formats that say little of themselves."""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecgot.data.formats.source import ArraySource, checked_fs_hz, mv_per_unit, unit_error
from ecgot.errors import EcgotError, first_line

SECONDS_PER_UNIT = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(
    r"(?:elapsed[ _]?)?(?:time|t)(?:[ _]?[(\[]?(?P<unit>s|sec|seconds|ms|us|µs)[)\]]?)?$", re.I
)
_UNIT = re.compile(r"(?P<lead>.*?)\s*(?:[(\[](?P<bracket>[^)\]]*)[)\]]|_(?P<tail>[munµμ]?v))$", re.I)
JITTER = 0.01  # of a sample: how far the times of a table may stray, as they are rounded


def open_array(path: Path, fs_hz: float | None, leads: Sequence[str] | None) -> ArraySource:
    """A ``.npy`` or ``.npz`` file of mV.

    An ``.npz`` file has the keys ``signal`` (or ``signal_mv``), [P, T] or [T, P], ``fs_hz`` (or ``fs``) and
    ``leads``; arguments take their place, as they must for ``.npy``.

    Raises:
        EcgotError: no such array, no rate or no leads.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return ArraySource(content, name=str(path), **_described(path, fs_hz, leads))
        with content as file:
            keys = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
    signal = next((keys[key] for key in ("signal_mv", "signal") if key in keys), None)
    if signal is None:
        raise EcgotError(f"record {path}: expected the key signal, got {', '.join(keys) or 'none'}")
    rate = next(
        (float(keys[key].item()) for key in ("fs_hz", "fs") if key in keys and keys[key].size == 1), None
    )
    names = [str(lead) for lead in keys["leads"].ravel()] if "leads" in keys else None
    return ArraySource(signal, name=str(path), **_described(path, fs_hz or rate, leads or names))


def _described(path: Path, fs_hz: float | None, leads: Sequence[str] | None) -> dict:
    if fs_hz is None or leads is None:
        missing = " and ".join(name for name, value in (("fs_hz", fs_hz), ("leads", leads)) if value is None)
        raise EcgotError(f"record {path}: expected {missing}, as the file does not say it, got none")
    return {"fs_hz": fs_hz, "leads": leads}


def open_csv(path: Path, fs_hz: float | None, leads: Sequence[str] | None) -> ArraySource:
    """A table with a column for each lead.

    Columns are separated by comma, semicolon or tab. The first row names the leads, with a unit where it is
    not mV, as in ``V1 (uV)`` or ``V1_uV``; without such a row, ``leads`` does. A column ``time``, in seconds
    or in the unit in its name, gives the rate, or ``fs_hz`` does. Empty cells are missing samples.

    Raises:
        EcgotError: no rate, no leads, a unit that is no voltage, or cells that are no numbers.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig") as file:
            head = file.readline()
        separator = max(";\t,", key=head.count)
        named = any(_number(cell, separator) is None for cell in head.strip().split(separator))
        table = pd.read_csv(
            path,
            sep=separator,
            header=0 if named else None,
            decimal="," if separator == ";" and "," in path.read_text(encoding="utf-8-sig") else ".",
            encoding="utf-8-sig",
            skipinitialspace=True,
        )
        columns = table.to_numpy(dtype=np.float64).T
    except (OSError, ValueError, UnicodeError) as error:
        raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
    names = [str(name).strip() for name in table.columns] if named else list(leads or ())
    times = [row for row, name in enumerate(names) if _TIME.match(name)]
    if times:
        fs_hz = _rate(path, names[times[0]], columns[times[0]])
        columns = np.delete(columns, times[0], axis=0)
        names.pop(times[0])
    described = _described(path, fs_hz, names or None)
    units = [_unit(path, name) for name in names]
    if len(names) == len(columns):
        columns = columns * np.array([scale for _, scale in units])[:, None]
    return ArraySource(columns, name=str(path), fs_hz=described["fs_hz"], leads=[lead for lead, _ in units])


def _number(cell: str, separator: str) -> float | None:
    try:
        return float(cell.replace(",", ".") if separator == ";" else cell)
    except ValueError:
        return None if cell.strip() else np.nan


def _rate(path: Path, name: str, times: np.ndarray) -> float:
    """The sampling rate of evenly spaced ``times``."""
    match = _TIME.match(name)
    unit = ((match["unit"] if match else "") or "").lower()
    steps = np.diff(times)
    step = (times[-1] - times[0]) / len(steps) if len(steps) else np.nan
    even = np.abs(times - times[0] - step * np.arange(len(times))) <= max(JITTER, 0.5) * abs(step)
    if not step > 0 or not even.all():
        raise EcgotError(f"record {path}: expected even steps in column {name}, got gaps or steps back")
    rate = 1.0 / (step * SECONDS_PER_UNIT[unit])
    return checked_fs_hz(str(path), round(rate) if abs(rate - round(rate)) < 1e-3 * rate else rate)


def _unit(path: Path, column: str) -> tuple[str, float]:
    """The lead's name and mV per unit of a column, by its header."""
    match = _UNIT.match(column)
    if match is None:
        return column, 1.0
    unit = match["bracket"] if match["bracket"] is not None else match["tail"]
    scale = mv_per_unit(unit)
    if scale is None:
        raise unit_error(str(path), unit)
    return match["lead"], scale
