"""What every benchmark writes: rows of CSV, stamped with device, versions and commit."""

import csv
import io
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ecgot.bench.origin import origin
from ecgot.files import write_text

ROOT = Path(__file__).parents[1]


def stamp() -> dict[str, str]:
    """Device, versions and commit of a measurement."""
    return origin() | {"ecgot commit": commit()}


def commit(root: Path = ROOT) -> str:
    """The short commit; "+dirty" where ecgot or its benchmarks differ from it, "unknown" without git."""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        # Results of earlier runs in benchmarks/ do not change the code.
        changes = _git(root, "status", "--porcelain", "--", "ecgot", ":(glob)benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if changes else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    """Write a CSV file atomically; by default its columns are the keys of the first row.

    Cells a row lacks, and those that are None, stay empty.
    """
    rows = list(rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())
