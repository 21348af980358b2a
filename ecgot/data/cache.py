"""A data set's signals on disk, under the hash of the files that they come from."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ecgot.data.ptbxl import PtbXlTable
from ecgot.data.record import fit_length, read_record
from ecgot.errors import EcgotError

FORMAT = 2  # of the cache; raise it when the contents change for the same files
UV_PER_MV = 1000.0
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class SkippedRecord:
    """A record that could not be read, and why."""

    name: str
    reason: str


def content_key(
    root: Path, table: PtbXlTable, fs_hz: float, shape: tuple[int, int], leads: Sequence[str]
) -> str:
    """A hash over the bytes of every header and signal file, and over what is made of them."""

    def digest(path: str) -> bytes:
        header = root / f"{path}.hea"
        content = hashlib.blake2b(path.encode(), digest_size=16)
        try:
            text = header.read_bytes()
        except OSError:
            return content.digest()
        content.update(text)
        for name in _signal_files(text.decode("utf-8", errors="replace")):
            try:
                content.update((header.parent / name).read_bytes())
            except (OSError, ValueError):
                content.update(b"missing")
        return content.digest()

    key = hashlib.blake2b(json.dumps([FORMAT, fs_hz, shape, list(leads)]).encode(), digest_size=16)
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(digest, table.record_paths):
            key.update(part)
    return key.hexdigest()


def _signal_files(header: str) -> list[str]:
    """The files that a WFDB header names: the first word of every line after the first."""
    lines = [line for line in header.splitlines() if line.strip() and not line.startswith("#")]
    return list(dict.fromkeys(line.split()[0] for line in lines[1:]))


def read_meta(folder: Path) -> dict | None:
    """The cache's description, if the cache is whole."""
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
    fs_hz: float,
    shape: tuple[int, int],
    leads: Sequence[str],
    max_bad_share: float,
    progress: Callable[[int, int], None] | None,
) -> dict:
    """Read every record into ``folder``, by way of a temporary one, so that half a cache is never seen."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        signals = np.lib.format.open_memmap(
            temporary / "signals.npy", mode="w+", dtype=np.int16, shape=(len(table), *shape)
        )
        lengths, skipped, repaired, flat = [0] * len(table), [], {}, {}
        for row, path in enumerate(table.record_paths):
            try:
                record = read_record(root / path, leads=leads, fs_hz=fs_hz)
            except EcgotError as error:
                skipped.append(SkippedRecord(path, str(error)))
                check_share(skipped, len(table), max_bad_share)
            else:
                signal, lengths[row] = fit_length(record.signal_mv, shape[1])
                signals[row] = np.clip(np.rint(signal * UV_PER_MV), INT16.min, INT16.max).astype(np.int16)
                if record.repaired_samples:
                    repaired[path] = sum(record.repaired_samples.values())
                if record.flat_leads:
                    flat[path] = list(record.flat_leads)
            if progress is not None:
                progress(row + 1, len(table))
        signals.flush()
        del signals  # Windows renames no folder with an open file
        meta = {
            "shape": [len(table), *shape],
            "lengths": lengths,
            "skipped": [vars(entry) for entry in skipped],
            "repaired": repaired,
            "flat": flat,
        }
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        if read_meta(folder) is None:  # else another process was faster, with the same content
            shutil.rmtree(folder, ignore_errors=True)  # damaged, where it exists
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def check_share(skipped: Sequence[SkippedRecord], total: int, max_bad_share: float) -> None:
    if len(skipped) > max_bad_share * total:
        raise EcgotError(
            f"data: more than {max_bad_share:.0%} of {total} records cannot be read (data.max_bad_share); "
            f"the first: {skipped[0].reason}"
        )
