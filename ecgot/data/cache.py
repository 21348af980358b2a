"""The signal cache: a data set's signals in one array on disk, keyed by a hash of their source files."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecgot.data.formats import record_files
from ecgot.data.ptbxl import PtbXlTable
from ecgot.data.record import fit_length, read_record
from ecgot.errors import EcgotError
from ecgot.files import atomic_folder

FORMAT = 3  # raise it when the cache's contents change for the same files
UV_PER_MV = 1000.0
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class SkippedRecord:
    """A record that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SignalFormat:
    """The common format of a data set's records.

    Attributes:
        fs_hz: sampling rate.
        leads: L names, in order.
        samples: T; shorter records are zero-padded.
        highpass_hz: what is slower is removed; None keeps it.
    """

    fs_hz: float
    leads: tuple[str, ...]
    samples: int
    highpass_hz: float | None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (L, T) of a record."""
        return len(self.leads), self.samples


def content_key(root: Path, table: PtbXlTable, form: SignalFormat) -> str:
    """Hash of every record's files below ``root``, and of the target format."""

    def digest(path: str) -> bytes:
        content = hashlib.blake2b(path.encode(), digest_size=16)
        for file in record_files(root / path):
            try:
                content.update(file.read_bytes())
            except (OSError, ValueError):
                content.update(b"missing")
        return content.digest()

    key = hashlib.blake2b(
        json.dumps([FORMAT, form.fs_hz, form.shape, list(form.leads), form.highpass_hz]).encode(),
        digest_size=16,
    )
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(digest, table.record_paths):
            key.update(part)
    return key.hexdigest()


def read_meta(folder: Path) -> dict | None:
    """The cache's metadata; None if there is no cache or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        signals = np.load(folder / "signals.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    return meta if list(signals.shape) == meta.get("shape") else None


def build(
    folder: Path,
    root: Path,
    table: PtbXlTable,
    form: SignalFormat,
    max_bad_share: float,
    progress: Callable[[int, int], None] | None,
) -> dict:
    """Read every record below ``root`` into the cache ``folder`` and return its metadata.

    Raises:
        EcgotError: more than ``max_bad_share`` of the records cannot be read.
    """
    with atomic_folder(folder, first_wins=True) as made:
        meta = _fill(made, root, table, form, max_bad_share, progress)
        (made / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if read_meta(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)  # damaged, if it exists
    return meta


def _fill(
    folder: Path,
    root: Path,
    table: PtbXlTable,
    form: SignalFormat,
    max_bad_share: float,
    progress: Callable[[int, int], None] | None,
) -> dict:
    """Write signals.npy [n, L, T] int16 in microvolts."""
    shape = (len(table), *form.shape)
    signals = np.lib.format.open_memmap(folder / "signals.npy", mode="w+", dtype=np.int16, shape=shape)
    lengths, skipped, repaired, flat = [0] * len(table), [], {}, {}
    for row, path in enumerate(table.record_paths):
        try:
            record = read_record(
                root / path,
                leads=form.leads,
                fs_hz=form.fs_hz,
                highpass_hz=form.highpass_hz,
                missing_leads="estimate",
            )
        except EcgotError as error:
            skipped.append(SkippedRecord(path, str(error)))
            check_share(skipped, len(table), max_bad_share)
        else:
            signal, lengths[row] = fit_length(record.signal_mv, form.samples)
            signals[row] = np.clip(np.rint(signal * UV_PER_MV), INT16.min, INT16.max).astype(np.int16)
            if record.repaired_samples:
                repaired[path] = sum(record.repaired_samples.values())
            if record.flat_leads:
                flat[path] = list(record.flat_leads)
        if progress is not None:
            progress(row + 1, len(table))
    signals.flush()  # and closed on return: Windows cannot rename a folder with open files
    return {
        "shape": list(shape),
        "lengths": lengths,
        "skipped": [vars(entry) for entry in skipped],
        "repaired": repaired,
        "flat": flat,
    }


def check_share(skipped: Sequence[SkippedRecord], total: int, max_bad_share: float) -> None:
    """Raise EcgotError if more than ``max_bad_share`` of ``total`` records were skipped."""
    if len(skipped) > max_bad_share * total:
        raise EcgotError(
            f"data.max_bad_share: expected at most {max_bad_share:.0%} of {total} records to be unreadable, "
            f"got more; the first: {skipped[0].reason}"
        )
