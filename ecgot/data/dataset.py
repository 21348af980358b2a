"""A data set: its table, and its signals memory-mapped from the cache."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ecgot.data.cache import (
    UV_PER_MV,
    SignalFormat,
    SkippedRecord,
    build,
    check_share,
    content_key,
    read_meta,
)
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.ptbxl import Labels, PtbXlTable, read_table
from ecgot.errors import EcgotError
from ecgot.files import default_cache_dir
from ecgot.text.glossary import plain_english


@dataclass(frozen=True)
class EcgDataset:
    """Records of equal shape.

    Attributes:
        table: one row per record.
        index: [n], each record's row in ``signals_uv``.
        signals_uv: [rows, L, T] int16, memory-mapped, in microvolts: finer than any recorder's ADC, and
            saturating at +-32.8 mV. Zero past a record's length.
        all_lengths: [rows] int32, valid samples of each row.
        fs_hz, leads: of the signals.
        skipped: records that could not be read.
        repaired: number of NaN samples filled, by record name.
        flat: constant leads, by record name; such a record stays in.
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
        """n cleaned report texts, "" if there is no usable one."""
        return self.table.reports

    def in_plain_english(self) -> "EcgDataset":
        """The same records, with their original reports put into plain English.

        These train better than translations: more records have an original, and after
        :func:`ecgot.text.glossary.plain_english` equal findings have equal wording.
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
                f"folds: expected some of {', '.join(map(str, np.unique(self.table.fold)))}, "
                f"got {', '.join(map(str, wanted))}, without a readable record"
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
    highpass_hz: float | None = None,
    max_bad_share: float = 0.05,
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EcgDataset:
    """Read a data set in PTB-XL's layout, from the cache if no file has changed.

    Args:
        root, reports_csv, folds: see :func:`ecgot.data.ptbxl.read_table`.
        fs_hz, seconds, leads: format of every record: resampled, cut to its first ``seconds`` or zero-padded,
            leads selected by name.
        highpass_hz: remove offset and wander, see :func:`ecgot.data.baseline.remove_baseline`.
        max_bad_share: unreadable records are skipped and listed; a larger share of them is an error.
        cache_dir: by default :func:`ecgot.files.default_cache_dir`.
        progress: called with (records done, total records).

    Raises:
        EcgotError: see :func:`read_table`; or too many records are unreadable.
    """
    table = read_table(root, reports_csv=reports_csv, folds=folds, fs_hz=fs_hz)
    form = SignalFormat(fs_hz, tuple(leads), round(fs_hz * seconds), highpass_hz)
    folder = (cache_dir or default_cache_dir()) / f"ecg-{content_key(Path(root), table, form)}"
    meta = read_meta(folder)
    if meta is None:
        meta = build(folder, Path(root), table, form, max_bad_share, progress)
    skipped = tuple(SkippedRecord(**entry) for entry in meta["skipped"])
    check_share(skipped, len(table), max_bad_share)
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
