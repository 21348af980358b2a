"""NumPy arrays and tables of text: formats that say little of themselves."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecgot.data.formats.source import ArraySource, checked_fs_hz, mv_per_unit, unit_error
from ecgot.data.leads import STANDARD_LEADS, lead_name
from ecgot.errors import EcgotError, first_line

SECONDS_PER_UNIT = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(
    r"(?:elapsed[ _]?)?(?:time|t)(?:[ _]?[(\[]?(?P<unit>s|sec|seconds|ms|us|µs)[)\]]?)?$", re.I
)
_INDEX = re.compile(r"(unnamed: \d+|index|samples?)$", re.I)  # as pandas writes it
_UNIT = re.compile(r"(?P<lead>.*?)\s*(?:[(\[](?P<bracket>[^)\]]*)[)\]]|_(?P<tail>[munµμ]?v))$", re.I)
JITTER = 0.5  # of a step: how far the times of a table may stray, as they are rounded


def open_array(path: Path, fs_hz: float | None, leads: Sequence[str] | None) -> ArraySource:
    """A ``.npy`` or ``.npz`` file of mV.

    An ``.npz`` file has the keys ``signal`` (or ``signal_mv``), [P, T] or [T, P], ``fs_hz`` (or ``fs``) and
    ``leads``; arguments take their place, as they must for ``.npy``.

    Raises:
        EcgotError: no such array, no rate or no leads.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        keys = None
        if not isinstance(content, np.ndarray):
            with content as file:
                keys = {key: file[key] for key in file.files}
    except Exception as error:  # whatever a damaged file makes of it
        raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
    if keys is None:
        return ArraySource(content, name=str(path), **_described(path, fs_hz, leads))
    signal = next((keys[key] for key in ("signal_mv", "signal") if key in keys), None)
    if signal is None:
        raise EcgotError(f"record {path}: expected the key signal, got {', '.join(keys) or 'none'}")
    rates = (keys[key] for key in ("fs_hz", "fs") if key in keys)
    rate = next((float(each.item()) for each in rates if each.size == 1), None)
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
    or in the unit in its name, gives the rate, or ``fs_hz`` does. Empty cells are missing samples. Columns
    of text, of numbered rows or of other units are left out unless they are standard leads.

    Raises:
        EcgotError: no rate, no leads, a unit that is no voltage, or cells that are no numbers.
    """
    try:
        columns, named = _columns(path)
    except (OSError, ValueError, UnicodeError) as error:
        raise EcgotError(f"record {path}: it cannot be read ({first_line(error)})") from error
    if not named:
        names = list(leads or ())
        if names and len(names) != len(columns):
            raise EcgotError(f"record {path}: expected {len(names)} columns, got {len(columns)}")
        columns = dict(zip(names, columns.values(), strict=False))
    time = next((name for name in columns if _TIME.match(name)), None)
    if time is not None:
        fs_hz = _rate(path, time, columns.pop(time))
    described = _described(path, fs_hz, list(columns) or None)
    signals, notes = [], []
    for name, values in columns.items():
        lead, unit = _lead_and_unit(name)
        scale = mv_per_unit(unit)
        if scale is not None and values.dtype.kind in "fiu":
            signals.append((lead, values * scale))
        elif lead_name(lead) not in STANDARD_LEADS:
            notes.append(f"left out, as it is no voltage: {name}")
        elif scale is None:
            raise unit_error(str(path), unit)
        else:
            raise EcgotError(
                f"record {path}: it cannot be read (column {name} has cells that are no numbers)"
            )
    if not signals:
        raise EcgotError(f"record {path}: expected a column for each lead, got none")
    return ArraySource(
        np.stack([values for _, values in signals]),
        fs_hz=described["fs_hz"],
        leads=[lead for lead, _ in signals],
        name=str(path),
        notes=notes,
    )


def _columns(path: Path) -> tuple[dict[str, np.ndarray], bool]:
    """The columns of a table, without numbers of rows, and whether its first row names them."""
    import pandas as pd

    with path.open(encoding="utf-8-sig") as file:
        head = file.readline()
        some = file.read(4096)
    separator = max(";\t,", key=head.count)
    named = any(_number(cell, separator) is None for cell in head.strip().split(separator))
    table = pd.read_csv(
        path,
        sep=separator,
        header=0 if named else None,
        decimal="," if separator == ";" and "," in some else ".",
        encoding="utf-8-sig",
        skipinitialspace=True,
    )
    columns = {str(name).strip(): table[name].to_numpy() for name in table.columns}
    return {name: values for name, values in columns.items() if not (named and _INDEX.match(name))}, named


def _number(cell: str, separator: str) -> float | None:
    try:
        return float(cell.replace(",", ".") if separator == ";" else cell)
    except ValueError:
        return None if cell.strip() else np.nan


def _rate(path: Path, name: str, times: np.ndarray) -> float:
    """The sampling rate of evenly spaced ``times``."""
    if times.dtype.kind not in "fiu":
        raise EcgotError(f"record {path}: expected numbers in column {name}, got text")
    match = _TIME.match(name)
    unit = ((match["unit"] if match else "") or "").lower()
    steps = np.diff(times)
    step = (times[-1] - times[0]) / len(steps) if len(steps) else np.nan
    even = np.abs(times - times[0] - step * np.arange(len(times))) <= JITTER * abs(step)
    if not step > 0 or not even.all():
        raise EcgotError(f"record {path}: expected even steps in column {name}, got gaps or steps back")
    rate = 1.0 / (step * SECONDS_PER_UNIT[unit])
    return checked_fs_hz(str(path), round(rate) if abs(rate - round(rate)) < 1e-3 * rate else rate)


def _lead_and_unit(column: str) -> tuple[str, str]:
    """The lead's name and unit of a column, by its header; mV where that gives none."""
    match = _UNIT.match(column)
    if match is None:
        return column, "mV"
    return match["lead"], match["bracket"] if match["bracket"] is not None else match["tail"]
