"""A data set's signals in one memory-mapped array, cached under the hash of the files they come from."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ecgot.data.glossary import plain_english
from ecgot.data.ptbxl import Labels, PtbXlTable, read_table
from ecgot.data.record import STANDARD_LEADS, read_record
from ecgot.errors import EcgotError
from ecgot.files import default_cache_dir

FORMAT = 2  # of the cache; raise it when the contents change for the same files
UV_PER_MV = 1000.0
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class SkippedRecord:
    """A record that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class EcgDataset:
    """Records of equal shape.

    Attributes:
        table: one row a record.
        index: [n], each record's row in ``signals_uv``.
        signals_uv: [rows, L, T] int16, memory-mapped, in microvolts (finer than the ADC of any ECG recorder;
            what lies beyond +-32.8 mV saturates). Zero beyond a record's length.
        all_lengths: [rows] int32, valid samples of each row.
        fs_hz, leads: of the signals.
        skipped: records that could not be read.
        repaired: NaN samples filled, by record name.
        flat: leads without any signal, by record name; such a record stays in.
    """

    table: PtbXlTable
    index: np.ndarray
    signals_uv: np.ndarray
    all_lengths: np.ndarray
    fs_hz: float
    leads: tuple[str, ...]
    skipped: tuple[SkippedRecord, ...]
    repaired: dict[str, int]
    flat: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.table)

    @property
    def reports(self) -> tuple[str, ...]:
        """n cleaned report texts, "" where there is no usable one."""
        return self.table.reports

    def in_plain_english(self) -> "EcgDataset":
        """With each record's original report in plain English for its report.

        For learning what reports mean: originals are there for more records than translations, and all say
        the same thing in the same words. See :func:`ecgot.data.glossary.plain_english`.
        """
        table = self.table
        chosen = [own or other for own, other in zip(table.originals, table.reports, strict=True)]
        english = {text: plain_english(text) for text in set(chosen)}
        return replace(self, table=replace(table, reports=tuple(english[text] for text in chosen)))

    @property
    def lengths(self) -> np.ndarray:
        """[n] int32, valid samples of each record."""
        return self.all_lengths[self.index]

    def labels(self, group: str) -> Labels:
        """See :meth:`PtbXlTable.labels`."""
        return self.table.labels(group)

    def waveforms_mv(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Waveforms [b, L, T] float32 in mV of the given rows."""
        signals = self.signals_uv[self.index[np.asarray(rows, dtype=np.int64)]]
        return signals.astype(np.float32) / np.float32(UV_PER_MV)

    def select(self, rows: Sequence[int] | np.ndarray) -> "EcgDataset":
        """The given rows; the signals are shared, not copied."""
        picked = np.asarray(rows, dtype=np.int64)
        return replace(self, table=self.table.select(picked), index=self.index[picked])

    def folds(self, folds: Iterable[int]) -> "EcgDataset":
        """The records of these folds.

        Raises:
            EcgotError: there are none.
        """
        wanted = tuple(folds)
        rows = np.flatnonzero(np.isin(self.table.fold, wanted))
        if not len(rows):
            raise EcgotError(
                f"folds: no readable record in fold {', '.join(map(str, wanted))}; "
                f"there are folds {', '.join(map(str, np.unique(self.table.fold)))}"
            )
        return self.select(rows)


def load_dataset(
    root: str | Path,
    *,
    reports_csv: str | Path | None = None,
    folds: Iterable[int] | None = None,
    fs_hz: float = 100.0,
    seconds: float = 10.0,
    leads: Sequence[str] = STANDARD_LEADS,
    max_bad_share: float = 0.05,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EcgDataset:
    """Read a data set in PTB-XL's layout; a second time from the cache, unless a file has changed.

    Args:
        root, reports_csv, folds: see :func:`ecgot.data.ptbxl.read_table`.
        fs_hz, seconds, leads: what every record is brought to: resampled, cut to its first ``seconds`` or
            padded with zeros, leads picked by name.
        max_bad_share: unreadable records are named and left out; a larger share of them is an error.
        cache_dir: ``None`` is :func:`default_cache_dir`.
        progress: called with (records done, records in all).

    Raises:
        EcgotError: see :func:`read_table`; too many bad records.
    """
    table = read_table(root, reports_csv=reports_csv, folds=folds, fs_hz=fs_hz)
    shape = (len(leads), round(fs_hz * seconds))
    folder = (
        cache_dir or default_cache_dir()
    ) / f"ecg-{_content_key(Path(root), table, fs_hz, shape, leads)}"
    meta = _read_meta(folder)
    if meta is None:
        meta = _build(folder, Path(root), table, fs_hz, shape, leads, max_bad_share, progress)
    skipped = tuple(SkippedRecord(**entry) for entry in meta["skipped"])
    _check_share(skipped, len(table), max_bad_share)
    bad = {entry.name for entry in skipped}
    rows = np.flatnonzero([path not in bad for path in table.record_paths])
    return EcgDataset(
        table=table.select(rows),
        index=rows,
        signals_uv=np.load(folder / "signals.npy", mmap_mode="r"),
        all_lengths=np.array(meta["lengths"], dtype=np.int32),
        fs_hz=float(fs_hz),
        leads=tuple(leads),
        skipped=skipped,
        repaired=meta["repaired"],
        flat=meta["flat"],
    )


def fit_length(signal_mv: np.ndarray, samples: int) -> tuple[np.ndarray, int]:
    """signal [L, T] cut or zero-padded to [L, samples], and how many of them are valid."""
    valid = min(signal_mv.shape[1], samples)
    fitted = np.zeros((signal_mv.shape[0], samples), dtype=np.float32)
    fitted[:, :valid] = signal_mv[:, :valid]
    return fitted, valid


def _content_key(
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


def _read_meta(folder: Path) -> dict | None:
    """The cache's description, if the cache is whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        signals = np.load(folder / "signals.npy", mmap_mode="r")
    except (OSError, ValueError):
        return None
    return meta if list(signals.shape) == meta.get("shape") else None


def _build(
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
                _check_share(skipped, len(table), max_bad_share)
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
        if _read_meta(folder) is None:  # else another process was faster, with the same content
            shutil.rmtree(folder, ignore_errors=True)  # damaged, where it exists
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def _check_share(skipped: Sequence[SkippedRecord], total: int, max_bad_share: float) -> None:
    if len(skipped) > max_bad_share * total:
        raise EcgotError(
            f"data: more than {max_bad_share:.0%} of {total} records cannot be read (data.max_bad_share); "
            f"the first: {skipped[0].reason}"
        )
