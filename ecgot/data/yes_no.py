"""Yes/no labels of one's own: a CSV with one row per record and one column per label.

The first column names the record: ``ecg_id``, or ``record`` with its path relative to the data set's folder.
Every other column is a label: 1 is yes, 0 is no, and an empty cell is unknown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ecgot.data.ptbxl import PtbXlTable, read_csv
from ecgot.errors import EcgotError

KEYS = ("ecg_id", "record")
ANSWERS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "": -1}
UNKNOWN = -1


@dataclass(frozen=True)
class YesNoLabels:
    """What a CSV says.

    Attributes:
        path: of the CSV.
        by_id: whether records are named by ``ecg_id``, not by path.
        names: of m records, as the CSV names them; paths without suffix.
        classes: the C labels.
        answers: [m, C] int8: 1 yes, 0 no, -1 unknown.
    """

    path: Path
    by_id: bool
    names: tuple[str, ...]
    classes: tuple[str, ...]
    answers: np.ndarray

    def of(self, table: PtbXlTable) -> np.ndarray:
        """The answers [n, C] for the n records of a table; those that the CSV does not name are unknown."""
        row_of = {name: row for row, name in enumerate(self.names)}
        found = np.full((len(table), len(self.classes)), UNKNOWN, np.int8)
        for row, name in enumerate(self._names(table)):
            if name in row_of:
                found[row] = self.answers[row_of[name]]
        return found

    def named(self, table: PtbXlTable) -> int:
        """How many of the CSV's records are in a table."""
        return len(set(self.names) & set(self._names(table)))

    def _names(self, table: PtbXlTable) -> Sequence[str]:
        return [str(number) for number in table.ecg_id] if self.by_id else table.record_paths


def read_yes_no(path: str | Path) -> YesNoLabels:
    """Read a CSV of yes/no labels.

    Raises:
        EcgotError: it cannot be read, names a record twice, has no label, or a cell is not 1, 0 or empty.
    """
    path = Path(path)
    table = read_csv(path, ())
    key = next((name for name in KEYS if name in table.columns), None)
    if key is None:
        raise EcgotError(
            f"{path}: expected column {' or '.join(KEYS)}, got {', '.join(map(str, table.columns))}"
        )
    classes = tuple(str(column) for column in table.columns if column != key)
    if not classes:
        raise EcgotError(f"{path}: expected a column for each label beside {key}, got none")
    names = tuple(_name(text.strip(), key, path) for text in table[key])
    repeated = pd.Index(names)[pd.Index(names).duplicated()]
    if len(repeated):
        raise EcgotError(f"{path}: expected each {key} once, got {repeated[0]} twice")
    answers = np.full((len(table), len(classes)), UNKNOWN, np.int8)
    for column, label in enumerate(classes):
        for row, text in enumerate(table[label]):
            answer = ANSWERS.get(text.strip())
            if answer is None:
                raise EcgotError(
                    f"{path}: expected 1, 0 or nothing in column {label} of {key} {names[row]}, got {text!r}"
                )
            answers[row, column] = answer
    return YesNoLabels(path, key == "ecg_id", names, classes, answers)


def _name(text: str, key: str, path: Path) -> str:
    """A record's name: an integer without decimals, or a path without suffix."""
    if key == "record":
        plain = PurePosixPath(text.replace("\\", "/"))
        return str(plain.with_suffix("") if plain.suffix in (".hea", ".dat", ".mat") else plain)
    try:
        return str(int(float(text)))
    except (ValueError, OverflowError) as error:
        raise EcgotError(f"{path}: expected numbers in column {key}, got {text!r}") from error
