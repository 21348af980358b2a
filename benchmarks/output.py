"""What every benchmark writes: rows of CSV, stamped with device, versions and commit.

    python -m benchmarks.output > COMMIT

keeps the commit for a machine that gets the sources without their history.
"""

import csv
import hashlib
import io
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ecgot.bench.origin import origin
from ecgot.files import write_text

ROOT = Path(__file__).parents[1]
# What a result depends on. Results of earlier runs in benchmarks/ do not change the code.
SOURCES = ("ecgot/**/*.py", "ecgot/**/*.csv", "benchmarks/**/*.py", "tests/kernels/**/*.py")


def stamp() -> dict[str, str]:
    """Device, versions and commit of a measurement."""
    return origin() | {"ecgot commit": commit()}


def commit(root: Path = ROOT) -> str:
    """The short commit; with "+dirty." and a digest of the sources where these differ from it.

    Without git it stands in the file COMMIT, the digest of its sources behind it; without that it is
    "unknown." and the digest. Where many processes measure together, ECGOT_COMMIT says it for all.
    """
    if "ECGOT_COMMIT" in os.environ:
        return os.environ["ECGOT_COMMIT"]
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        changed = bool(_git(root, "status", "--porcelain", "--", *(f":(glob){each}" for each in SOURCES)))
    except (OSError, subprocess.CalledProcessError):
        file = root / "COMMIT"
        if not file.exists():
            return f"unknown.{digest(root)}"
        head, _, sources = file.read_text(encoding="utf-8").strip().partition(" ")
        changed = bool(sources) and sources != digest(root)
        head = head.partition("+")[0] if changed else head
    return f"{head}+dirty.{digest(root)}" if changed else head


def digest(root: Path = ROOT) -> str:
    """Eight digits that tell one state of the sources from another."""
    found = hashlib.sha256()
    for path in sorted(_sources(root)):
        found.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return found.hexdigest()[:8]


def _sources(root: Path) -> Iterator[Path]:
    for pattern in SOURCES:
        yield from root.glob(pattern)


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


if __name__ == "__main__":
    print(commit(), digest())
