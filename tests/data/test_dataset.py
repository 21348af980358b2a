"""The signal cache: keyed by content, never half there; bad records are named, counted, limited."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import wfdb

from ecgot.data import cache as module
from ecgot.data.dataset import load_dataset
from ecgot.data.record import read_record
from ecgot.data.synth import write_dataset
from ecgot.errors import EcgotError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", records=40, seed=3)
    return tmp_path / "data"


@pytest.fixture
def unreadable(monkeypatch):
    """From now on no record can be read: what comes can only come from the cache."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a record was read")

    return lambda: monkeypatch.setattr(module, "read_record", refuse)


def first_record(root: Path) -> Path:
    return sorted(root.glob("records100/*/*.dat"))[0]


def test_waveforms_are_the_records(root, tmp_path):
    data = load_dataset(root, cache_dir=tmp_path / "cache")
    assert len(data) == 40
    for row in (0, 17, 39):
        expected = read_record(root / data.table.record_paths[row]).signal_mv
        np.testing.assert_allclose(data.waveforms_mv([row])[0], expected, atol=6e-4)
    assert data.lengths.tolist() == [1000] * 40
    assert set(data.folds([2, 5]).table.fold.tolist()) == {2, 5}


def test_selected_rows_keep_signal_label_and_report_together(root, tmp_path):
    data = load_dataset(root, cache_dir=tmp_path / "cache")
    rows = [31, 4, 8]
    picked = data.select(rows)
    np.testing.assert_array_equal(picked.waveforms_mv([0, 1, 2]), data.waveforms_mv(rows))
    assert picked.reports == tuple(data.reports[row] for row in rows)
    np.testing.assert_array_equal(picked.labels("superclass").matrix, data.labels("superclass").matrix[rows])


def test_a_second_load_reads_no_record(root, tmp_path, unreadable):
    first = load_dataset(root, cache_dir=tmp_path / "cache")
    unreadable()
    second = load_dataset(root, cache_dir=tmp_path / "cache")
    np.testing.assert_array_equal(first.waveforms_mv(range(40)), second.waveforms_mv(range(40)))


def test_the_cache_is_keyed_by_content_not_by_place_or_time(root, tmp_path, unreadable):
    load_dataset(root, cache_dir=tmp_path / "cache")
    shutil.copytree(root, tmp_path / "elsewhere")
    other_leads = {"leads": ("I", "II")}
    assert load_dataset(root, cache_dir=tmp_path / "cache", **other_leads).waveforms_mv([0]).shape[1] == 2
    path = first_record(root)
    path.write_bytes(first_record(root.parent / "elsewhere").read_bytes()[::-1])
    changed = load_dataset(root, cache_dir=tmp_path / "cache", max_bad_share=1.0)
    assert len(changed.skipped) == 1  # its checksum no longer holds
    unreadable()
    assert len(load_dataset(tmp_path / "elsewhere", cache_dir=tmp_path / "cache")) == 40


def test_a_damaged_cache_is_made_anew(root, tmp_path):
    load_dataset(root, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "signals.npy").write_bytes(b"half")
    assert load_dataset(root, cache_dir=tmp_path / "cache").waveforms_mv([0]).shape == (1, 12, 1000)


def test_an_interrupted_build_leaves_nothing(root, tmp_path):
    class Interrupted(Exception):
        pass

    def interrupt(done, _total):
        if done == 20:
            raise Interrupted

    with pytest.raises(Interrupted):
        load_dataset(root, cache_dir=tmp_path / "cache", progress=interrupt)
    assert list((tmp_path / "cache").iterdir()) == []


def test_one_bad_record_is_named_and_skipped(root, tmp_path):
    path = first_record(root)
    path.write_bytes(path.read_bytes()[:100])
    for _ in range(2):  # from the files, then from the cache
        data = load_dataset(root, cache_dir=tmp_path / "cache")
        assert len(data) == 39
        (skipped,) = data.skipped
        assert skipped.name == "records100/00000/00001_lr"
        assert "got 100" in skipped.reason
        assert 1 not in data.table.ecg_id
        expected = read_record(root / data.table.record_paths[0]).signal_mv
        np.testing.assert_allclose(data.waveforms_mv([0])[0], expected, atol=6e-4)


def test_a_record_with_a_flat_lead_stays_and_is_named(root, tmp_path):
    path = first_record(root)
    record = wfdb.rdrecord(str(path.with_suffix("")))
    record.p_signal[:, 3] = 0
    wfdb.wrsamp(
        record.record_name,
        fs=record.fs,
        units=record.units,
        sig_name=record.sig_name,
        p_signal=record.p_signal,
        fmt=record.fmt,
        write_dir=str(path.parent),
    )
    for _ in range(2):  # from the files, then from the cache
        data = load_dataset(root, cache_dir=tmp_path / "cache")
        assert len(data) == 40
        assert data.flat == {"records100/00000/00001_lr": ["aVR"]}


def test_too_many_bad_records_stop(root, tmp_path):
    for path in sorted(root.glob("records100/*/*.dat"))[:3]:
        path.unlink()
    with pytest.raises(EcgotError, match=r"data\.max_bad_share: expected at most 5% of 40 records") as caught:
        load_dataset(root, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load_dataset(root, cache_dir=tmp_path / "cache", max_bad_share=0.1)) == 37
    with pytest.raises(EcgotError, match="at most 5%"):  # a cache made under a looser limit changes nothing
        load_dataset(root, cache_dir=tmp_path / "cache")


def test_shorter_and_longer_records_are_padded_and_cut(root, tmp_path):
    longer = load_dataset(root, cache_dir=tmp_path / "cache", seconds=12.5)
    assert longer.waveforms_mv([0]).shape == (1, 12, 1250)
    assert longer.lengths[0] == 1000
    assert (longer.waveforms_mv([0])[:, :, 1000:] == 0).all()
    shorter = load_dataset(root, cache_dir=tmp_path / "cache", seconds=2.5)
    np.testing.assert_array_equal(shorter.waveforms_mv([0]), longer.waveforms_mv([0])[:, :, :250])


def test_absent_folds_are_named(root, tmp_path):
    data = load_dataset(root, cache_dir=tmp_path / "cache", folds=[1, 2])
    with pytest.raises(EcgotError, match=r"folds: expected some of .*, got 9"):
        data.folds([9])
