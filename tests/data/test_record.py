"""WFDB records: what is read is what was written, and damage is named."""

from pathlib import Path

import numpy as np
import pytest
import wfdb

from ecgot.data.record import STANDARD_LEADS, read_record, resample
from ecgot.errors import EcgotError

RNG = np.random.default_rng(0)
SIGNAL = np.cumsum(RNG.normal(0, 0.02, (1000, 12)), axis=0)


def write(folder: Path, signal=SIGNAL, *, leads=STANDARD_LEADS, fs=100, unit="mV", gain=1000.0, fmt="16"):
    """Write ``folder``/ecg.hea and .dat; returns the record's path."""
    count = signal.shape[1]
    wfdb.wrsamp(
        "ecg",
        fs=fs,
        units=[unit] * count,
        sig_name=list(leads)[:count],
        p_signal=signal,
        fmt=[fmt] * count,
        adc_gain=[gain] * count,
        baseline=[0] * count,
        write_dir=str(folder),
    )
    return folder / "ecg"


def edit_header(path: Path, old: str, new: str) -> None:
    header = path.with_suffix(".hea")
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new))


def test_reads_millivolts(tmp_path):
    record = read_record(write(tmp_path))
    np.testing.assert_allclose(record.signal_mv, SIGNAL.T, atol=6e-4)  # half an ADC unit
    assert record.signal_mv.dtype == np.float32
    assert (record.fs_hz, record.leads) == (100.0, STANDARD_LEADS)
    assert record.repaired_samples == {}
    assert record.flat_leads == ()


@pytest.mark.parametrize("suffix", ["", ".hea", ".dat"])
def test_takes_a_path_with_or_without_suffix(tmp_path, suffix):
    path = write(tmp_path)
    assert read_record(Path(f"{path}{suffix}")).signal_mv.shape == (12, 1000)


def test_leads_go_by_name_in_any_order_and_case(tmp_path):
    order = [7, 3, 0, 11, 5, 1, 9, 2, 10, 4, 8, 6]
    names = [STANDARD_LEADS[i].upper() for i in order]
    record = read_record(write(tmp_path, SIGNAL[:, order], leads=names))
    np.testing.assert_allclose(record.signal_mv, SIGNAL.T, atol=6e-4)
    two = read_record(tmp_path / "ecg", leads=("v6", "i"))
    np.testing.assert_allclose(two.signal_mv, SIGNAL.T[[11, 0]], atol=6e-4)


@pytest.mark.parametrize(("unit", "per_mv"), [("uV", 1000.0), ("V", 0.001), ("mV", 1.0)])
def test_units_become_millivolts(tmp_path, unit, per_mv):
    record = read_record(write(tmp_path, SIGNAL * per_mv, unit=unit, gain=1000.0 / per_mv))
    np.testing.assert_allclose(record.signal_mv, SIGNAL.T, atol=6e-4)


def test_resampling_keeps_a_slow_wave_and_removes_a_fast_one(tmp_path):
    time = np.arange(5000) / 500
    slow, fast = np.sin(2 * np.pi * 3 * time), np.sin(2 * np.pi * 120 * time)
    record = read_record(write(tmp_path, np.tile((slow + fast)[:, None], (1, 12)), fs=500), fs_hz=100)
    assert record.signal_mv.shape == (12, 1000)
    assert record.fs_hz == 100.0
    expected = np.sin(2 * np.pi * 3 * np.arange(1000) / 100)
    np.testing.assert_allclose(record.signal_mv[0, 50:-50], expected[50:-50], atol=0.01)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(257, 100), (1000, 100), (128, 250), (360, 100)])
def test_resampling_has_the_right_length(from_hz, to_hz):
    samples = from_hz * 10
    assert abs(resample(np.ones((1, samples)), from_hz, to_hz).shape[1] - to_hz * 10) <= 1
    np.testing.assert_allclose(resample(np.ones((1, samples)), from_hz, to_hz), 1.0, atol=0.02)


def test_gaps_are_bridged_along_time_lead_by_lead_and_reported(tmp_path):
    signal = SIGNAL.copy()
    signal[100:110, 3] = np.nan
    signal[:5, 7] = np.nan
    record = read_record(write(tmp_path, signal))
    assert record.repaired_samples == {"aVR": 10, "V2": 5}
    line = np.interp(np.arange(100, 110), [99, 110], SIGNAL[[99, 110], 3])
    np.testing.assert_allclose(record.signal_mv[3, 100:110], line, atol=1.2e-3)
    np.testing.assert_allclose(record.signal_mv[7, :5], SIGNAL[5, 7], atol=1.2e-3)
    np.testing.assert_allclose(record.signal_mv[4], SIGNAL[:, 4], atol=6e-4)


def test_flat_leads_are_reported(tmp_path):
    signal = SIGNAL.copy()
    signal[:, 2] = 0.25
    assert read_record(write(tmp_path, signal)).flat_leads == ("III",)


def expect_error(path: Path, *parts: str, **arguments) -> None:
    with pytest.raises(EcgotError) as caught:
        read_record(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in (path.name, *parts):
        assert part in message


def test_damage_is_named(tmp_path):
    expect_error(tmp_path / "absent", "absent.hea")

    path = write(tmp_path)
    path.with_suffix(".dat").unlink()
    expect_error(path, "there is no ecg.dat")

    path = write(tmp_path)
    data = path.with_suffix(".dat").read_bytes()
    path.with_suffix(".dat").write_bytes(data[:-240])
    expect_error(path, "24000 bytes", "got 23760")

    path.with_suffix(".dat").write_bytes(data + data[:2400])
    expect_error(path, "24000 bytes", "got 26400")

    path.with_suffix(".dat").write_bytes(data[:5000] + bytes([data[5000] ^ 4]) + data[5001:])
    expect_error(path, "checksum")

    path.with_suffix(".dat").write_bytes(b"")
    expect_error(path, "got 0")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("ecg 12 100", "ecg 13 100"),
        ("ecg 12 100", "ecg 11 100"),
        ("100 1000", "100 900"),
        ("ecg 12", "@@@ x"),
        ("ecg 12 100", "ecg 12 0"),
        (".dat 16", ".dat 19"),
    ],
)
def test_a_header_that_disagrees_with_its_signals_is_named(tmp_path, old, new):
    path = write(tmp_path)
    edit_header(path, old, new)
    expect_error(path)


def test_an_empty_header_is_named(tmp_path):
    path = write(tmp_path)
    path.with_suffix(".hea").write_text("")
    expect_error(path)


def test_missing_leads_are_named(tmp_path):
    expect_error(write(tmp_path, SIGNAL[:, :3]), "V1", "got I, II, III, without")


def test_a_lead_without_a_valid_sample_is_named(tmp_path):
    signal = SIGNAL.copy()
    signal[:, 8] = np.nan
    expect_error(write(tmp_path, signal), "lead V3")


def test_nothing_but_flat_leads_is_an_error(tmp_path):
    expect_error(write(tmp_path, np.zeros((1000, 12))), "flat")


def test_an_unknown_unit_is_named(tmp_path):
    expect_error(write(tmp_path, unit="mmHg"), "mmHg")


def test_real_records_agree_with_the_wfdb_library(ptbxl):
    paths = sorted(ptbxl.glob("records100/*/*.hea"))[:5]
    assert paths
    for path in paths:
        expected, fields = wfdb.rdsamp(str(path.with_suffix("")))
        assert [name.upper() for name in STANDARD_LEADS] == [name.upper() for name in fields["sig_name"]]
        np.testing.assert_allclose(read_record(path).signal_mv, expected.T, atol=1e-6)
