"""PTB-XL's tables: records, folds, reports and labels. No signal is read here.

Source: Wagner et al. 2020, "PTB-XL, a large publicly available electrocardiography dataset".
"""

import ast
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ecgot.choices import GROUPS
from ecgot.errors import EcgotError
from ecgot.text.cleaning import clean_report

SUPERCLASSES = ("NORM", "MI", "STTC", "CD", "HYP")
NO_CODES = "{}"
FOLDS = 10
STATEMENT_COLUMNS = ("diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass")


@dataclass(frozen=True)
class Labels:
    """Class names, and which records have them: matrix [n, C], bool."""

    classes: tuple[str, ...]
    matrix: np.ndarray


@dataclass(frozen=True)
class PtbXlTable:
    """One row per record.

    Attributes:
        ecg_id, patient_id, fold: [n] int64.
        reports: n cleaned texts, "" if there is no usable one.
        originals: n cleaned texts of the report column; they differ from ``reports`` if a CSV replaces it.
        codes: n sets of SCP codes.
        recorders: n device names, "" if unknown; runs of white space are collapsed.
        record_paths: n paths relative to the data set's folder, without suffix.
        class_of: for each group, the class of each SCP code.
        classes: for each group, its classes in order.
        lacking: the columns that the file lacks and that were made up, see :func:`read_table`.
    """

    ecg_id: np.ndarray
    patient_id: np.ndarray
    fold: np.ndarray
    reports: tuple[str, ...]
    originals: tuple[str, ...]
    codes: tuple[frozenset[str], ...]
    recorders: tuple[str, ...]
    record_paths: tuple[str, ...]
    class_of: dict[str, dict[str, str]]
    classes: dict[str, tuple[str, ...]]
    lacking: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.ecg_id)

    def labels(self, group: str) -> Labels:
        """Labels for "superclass", "subclass", "form" or "rhythm"; a record may have several classes or none.

        Codes count regardless of their likelihood.
        """
        if group not in GROUPS:
            raise EcgotError(f"group: expected one of {', '.join(GROUPS)}, got {group!r}")
        classes, class_of = self.classes[group], self.class_of[group]
        column = {name: number for number, name in enumerate(classes)}
        matrix = np.zeros((len(self), len(classes)), dtype=bool)
        for row, codes in enumerate(self.codes):
            for code in codes & class_of.keys():
                matrix[row, column[class_of[code]]] = True
        return Labels(classes, matrix)

    def select(self, rows: Sequence[int] | np.ndarray) -> "PtbXlTable":
        """The given rows, in the given order."""
        index = np.asarray(rows, dtype=np.int64)
        picked = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value = value[index]
            elif isinstance(value, tuple):
                value = tuple(value[row] for row in index)
            picked[field.name] = value
        return PtbXlTable(**picked)


def read_table(
    root: str | Path,
    *,
    reports_csv: str | Path | None = None,
    folds: Iterable[int] | None = None,
    fs_hz: float = 100.0,
) -> PtbXlTable:
    """Read ``ptbxl_database.csv`` and ``scp_statements.csv`` of ``root``.

    Of the columns only ``ecg_id`` and a file name are needed. Without ``patient_id`` every record is a
    patient's own, without ``strat_fold`` patients are dealt to ten folds, see :func:`fold_of`, and without
    ``scp_codes`` there are no labels, nor need there be ``scp_statements.csv``.

    Args:
        reports_csv: a CSV ``ecg_id,report[,source]`` that replaces the report column; records without a row
            in it have no report. With neither CSV nor column, no record has one.
        folds: keep only these; ``None`` keeps all.
        fs_hz: up to 100, the 100 Hz files are preferred, above it the 500 Hz files; if the preferred file is
            missing, the other is used (and resampled later).

    Raises:
        EcgotError: a file or column is missing, a value cannot be read, or no record is left.
    """
    root = Path(root)
    database = root / "ptbxl_database.csv"
    table = read_csv(database, ("ecg_id",))
    if table["ecg_id"].duplicated().any():
        raise EcgotError(
            f"{database}: expected each ecg_id once, got "
            f"{table['ecg_id'][table['ecg_id'].duplicated()].iloc[0]} twice"
        )
    lacking = frozenset({"patient_id", "strat_fold", "scp_codes"} - set(table.columns))
    table = _completed(table, database)
    if folds is not None:
        table = _in_folds(table, database, tuple(folds))
    if not len(table):
        raise EcgotError(f"{database}: expected records, got none")
    statements = root / "scp_statements.csv"
    labelled = (table["scp_codes"] != NO_CODES).any() or statements.exists()
    class_of, classes = _read_statements(statements) if labelled else _no_statements()
    return PtbXlTable(
        ecg_id=_integers(table, "ecg_id", database),
        patient_id=_integers(table, "patient_id", database),
        fold=_integers(table, "strat_fold", database),
        reports=_reports(table, database, reports_csv),
        originals=_reports(table, database, reports_csv if "report" not in table.columns else None),
        codes=tuple(
            _codes(text, ecg_id, database)
            for text, ecg_id in zip(table["scp_codes"], table["ecg_id"], strict=True)
        ),
        recorders=tuple(" ".join(name.split()) for name in table["device"])
        if "device" in table.columns
        else ("",) * len(table),
        record_paths=_record_paths(table, database, root, fs_hz),
        class_of=class_of,
        classes=classes,
        lacking=lacking,
    )


def fold_of(patient_id: int) -> int:
    """The fold, 1 to 10, of a patient of a data set without folds: by a hash, so that new records of other
    patients move nobody."""
    digest = hashlib.blake2b(str(patient_id).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % FOLDS + 1


def available_folds(root: str | Path) -> tuple[int, ...]:
    """The folds that ``ptbxl_database.csv`` of ``root`` lists, in order."""
    database = Path(root) / "ptbxl_database.csv"
    table = _completed(read_csv(database, ("ecg_id",)), database)
    return tuple(np.unique(_integers(table, "strat_fold", database)).tolist())


def check_patient_split(first: PtbXlTable, second: PtbXlTable) -> None:
    """Raise EcgotError if a patient has records in both."""
    shared = np.intersect1d(first.patient_id, second.patient_id)
    if len(shared):
        raise EcgotError(
            f"data: expected folds by patient, got patient {shared[0]} in training and in evaluation"
        )


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV whose cells are all text.

    Raises:
        EcgotError: it cannot be read, or a column is missing.
    """
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False)
    except FileNotFoundError as error:
        raise EcgotError(f"data: there is no {path}") from error
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise EcgotError(f"{path}: cannot be read as CSV ({str(error).strip()})") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise EcgotError(
            f"{path}: expected column {', '.join(missing)}, got {', '.join(map(str, table.columns))}"
        )
    return table


def _completed(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with the columns that it may lack."""
    made: dict[str, Any] = {}
    if "patient_id" not in table.columns:
        made["patient_id"] = table["ecg_id"]
    if "strat_fold" not in table.columns:
        patients = _integers(table.assign(**made), "patient_id", path)
        made["strat_fold"] = [str(fold_of(patient)) for patient in patients.tolist()]
    if "scp_codes" not in table.columns:
        made["scp_codes"] = NO_CODES
    return table.assign(**made)


def _in_folds(table: pd.DataFrame, path: Path, folds: tuple[int, ...]) -> pd.DataFrame:
    fold = _integers(table, "strat_fold", path)
    kept = table[np.isin(fold, folds)]
    if not len(kept):
        there = ", ".join(map(str, np.unique(fold)))
        raise EcgotError(
            f"folds: expected some of {there or 'no folds'} in {path}, got {', '.join(map(str, folds))}"
        )
    return kept


def _integers(table: pd.DataFrame, column: str, path: Path) -> np.ndarray:
    try:
        return (
            table[column].astype(float).astype(np.int64).to_numpy()
        )  # PTB-XL writes patient 15709 as 15709.0
    except ValueError as error:
        raise EcgotError(
            f"{path}: expected numbers in column {column}, got another value ({error})"
        ) from error


def _codes(text: str, ecg_id: str, path: Path) -> frozenset[str]:
    try:
        return frozenset(map(str, ast.literal_eval(text)))
    except (ValueError, SyntaxError, TypeError) as error:
        raise EcgotError(
            f"{path}: expected a dictionary as scp_codes of ecg_id {ecg_id}, got {text[:40]!r}"
        ) from error


def _reports(table: pd.DataFrame, database: Path, reports_csv: str | Path | None) -> tuple[str, ...]:
    if reports_csv:
        path = Path(reports_csv)
        rows = read_csv(path, ("ecg_id", "report"))
        ids = _integers(rows, "ecg_id", path)
        if len(np.unique(ids)) < len(ids):
            values, counts = np.unique(ids, return_counts=True)
            raise EcgotError(f"{path}: expected each ecg_id once, got {values[counts > 1][0]} twice")
        text = dict(zip(ids.tolist(), rows["report"], strict=True))
        raw: Iterable[str] = (text.get(i, "") for i in _integers(table, "ecg_id", database).tolist())
    elif "report" in table.columns:
        raw = table["report"]
    else:  # labels only
        return ("",) * len(table)
    return tuple(clean_report(report) for report in raw)


def _record_paths(table: pd.DataFrame, path: Path, root: Path, fs_hz: float) -> tuple[str, ...]:
    order = ("filename_lr", "filename_hr") if fs_hz <= 100 else ("filename_hr", "filename_lr")
    columns = [column for column in order if column in table.columns]
    if not columns:
        raise EcgotError(f"{path}: expected column filename_lr or filename_hr, got neither")
    paths = []
    for row in zip(table["ecg_id"], *(table[column] for column in columns), strict=True):
        named = [name for name in row[1:] if name]
        if not named:
            raise EcgotError(
                f"{path}: expected a file in {' or '.join(columns)} of ecg_id {row[0]}, got none"
            )
        # A missing file keeps its preferred name; reading it reports the error.
        paths.append(next((name for name in named if (root / f"{name}.hea").exists()), named[0]))
    return tuple(paths)


def _no_statements() -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, ...]]]:
    """The groups of a data set without SCP codes."""
    classes: dict[str, tuple[str, ...]] = dict.fromkeys(GROUPS, ())
    return {group: {} for group in GROUPS}, classes | {"superclass": SUPERCLASSES}


def _read_statements(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, tuple[str, ...]]]:
    """For each group, the class of each SCP code, and the classes in order of first appearance."""
    table = read_csv(path, STATEMENT_COLUMNS)
    table.index = table.iloc[:, 0]  # the first column is the code; PTB-XL gives it no name
    class_of: dict[str, dict[str, str]] = {group: {} for group in GROUPS}
    for code, row in table.iterrows():
        name = str(code)
        if _flag(row["diagnostic"]):
            class_of["superclass"][name] = row["diagnostic_class"]
            class_of["subclass"][name] = row["diagnostic_subclass"]
        for group in ("form", "rhythm"):
            if _flag(row[group]):
                class_of[group][name] = name
    classes = {group: tuple(dict.fromkeys(codes.values())) for group, codes in class_of.items()}
    unknown = set(classes["superclass"]) - set(SUPERCLASSES)
    if unknown:
        raise EcgotError(
            f"{path}: expected diagnostic_class among {', '.join(SUPERCLASSES)}, got {sorted(unknown)[0]!r}"
        )
    return class_of, classes | {"superclass": SUPERCLASSES}


def _flag(text: str) -> bool:
    return text.strip() in ("1", "1.0")
