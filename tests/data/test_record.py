"""WFDB records: what is read is what was written, and damage is named."""

import functools
import itertools
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgot.data.baseline import remove_baseline
from ecgot.data.formats import ArraySource
from ecgot.data.leads import INDEPENDENT_LEADS, LIMB_LEADS, STANDARD_LEADS, complete
from ecgot.data.record import prepare, read_record, resample
from ecgot.data.synth import simulate
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


@pytest.fixture
def faults() -> Path:
    """Folder of real records that once failed."""
    folder = os.environ.get("ECGOT_FAULTS")
    if not folder:
        pytest.skip("ECGOT_FAULTS is not set: no failing real records")
    return Path(folder)


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
    expect_error(write(tmp_path, SIGNAL[:, :1]), "got I, without II", leads=("I", "II"))
    expect_error(write(tmp_path), "without V7R", leads=("I", "V7R"), missing_leads="estimate")
    expect_error(write(tmp_path, SIGNAL[:, :1], leads=["X"]), "got X, without I,", missing_leads="estimate")


def test_a_lead_without_a_valid_sample_is_named(tmp_path):
    signal = SIGNAL.copy()
    signal[:, 8] = np.nan
    expect_error(write(tmp_path, signal), "lead V3")


@pytest.mark.parametrize("missing_leads", ["error", "estimate"])
def test_nothing_but_flat_leads_is_an_error(tmp_path, missing_leads):
    expect_error(write(tmp_path, np.zeros((1000, 12))), "flat", missing_leads=missing_leads)


def test_an_unknown_unit_is_named(tmp_path):
    expect_error(write(tmp_path, unit="mmHg"), "mmHg")


def test_real_records_agree_with_the_wfdb_library(ptbxl):
    paths = sorted(ptbxl.glob("records100/*/*.hea"))[:5]
    assert paths
    for path in paths:
        expected, fields = wfdb.rdsamp(str(path.with_suffix("")))
        assert [name.upper() for name in STANDARD_LEADS] == [name.upper() for name in fields["sig_name"]]
        np.testing.assert_allclose(read_record(path).signal_mv, expected.T, atol=1e-6)


@functools.cache
def long_source(fs_hz: float) -> ArraySource:
    """Two minutes of synthetic beats with offsets of mV, slow wander and noise."""
    rng = np.random.default_rng(0)
    beats = [simulate(rng, fs_hz=fs_hz).signal_mv for _ in range(12)]
    signal = np.concatenate(beats, axis=1)
    time = np.arange(signal.shape[1]) / fs_hz
    wander = np.sin(2 * np.pi * 0.13 * time + np.arange(12)[:, None])
    signal = signal + wander + rng.normal(0, 3, (12, 1)) + rng.normal(0, 0.01, signal.shape)
    return ArraySource(signal, fs_hz=fs_hz, leads=STANDARD_LEADS, name="long")


@settings(max_examples=40, deadline=None)
@given(
    fs_hz=st.sampled_from([100.0, 128.0, 250.0, 257.0, 360.0, 500.0, 1000.0]),
    start_s=st.floats(0, 119),
    window_s=st.floats(0.1, 60),
    highpass_hz=st.sampled_from([None, 0.3, 0.67]),
)
def test_a_window_is_what_one_cuts_from_the_whole(fs_hz, start_s, window_s, highpass_hz):
    source = long_source(fs_hz)
    arguments = {"fs_hz": 100.0, "highpass_hz": highpass_hz}
    whole, window = whole_record(fs_hz, highpass_hz), prepare(source, start_s, window_s, **arguments)
    first = round(start_s * 100)
    assert window.start_s == first / 100
    assert window.signal_mv.shape[1] == min(round(window_s * 100), 12000 - first)
    cut = whole[:, first : first + window.signal_mv.shape[1]]
    np.testing.assert_allclose(window.signal_mv, cut, atol=1e-4 if highpass_hz else 1e-6)


@functools.cache
def whole_record(fs_hz: float, highpass_hz: float | None) -> np.ndarray:
    return prepare(long_source(fs_hz), fs_hz=100.0, highpass_hz=highpass_hz).signal_mv


def test_a_window_reads_no_more_than_its_margins():
    source = long_source(500.0)
    pieces = []

    class Counted(ArraySource):
        def read(self, start, stop):
            pieces.append((start, stop))
            return super().read(start, stop)

    counted = Counted(source.read(0, source.samples), fs_hz=500, leads=STANDARD_LEADS)
    prepare(counted, 50.0, 10.0, fs_hz=100.0, highpass_hz=0.3)
    ((start, stop),) = pieces
    assert 38 * 500 < start < 40 * 500
    assert 70 * 500 < stop < 72 * 500


def test_memory_grows_with_the_window_and_not_with_the_record(tmp_path):
    peaks = []
    for minutes in (2, 20):
        samples = minutes * 60 * 500
        (tmp_path / "ecg.dat").write_bytes(RNG.integers(-500, 500, (samples, 12), dtype="<i2").tobytes())
        lines = [f"ecg.dat 16 1000/mV 16 0 0 0 0 {lead}" for lead in STANDARD_LEADS]
        (tmp_path / "ecg.hea").write_text("\n".join([f"ecg 12 500 {samples}", *lines]))
        tracemalloc.start()
        record = read_record(tmp_path / "ecg", start_s=60, window_s=10, fs_hz=100.0, highpass_hz=0.3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert record.signal_mv.shape == (12, 1000)
    assert peaks[1] < 1.2 * peaks[0] < 20e6


def test_without_a_filter_each_window_loses_its_own_mean():
    window = prepare(long_source(500.0), 20.0, 10.0, fs_hz=100.0, highpass_hz=0)
    np.testing.assert_allclose(window.signal_mv.mean(1), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_s": 120.0}, "start_s: expected 0 to less than 120 s"),
        ({"start_s": -1.0}, "start_s"),
        ({"start_s": float("nan")}, "start_s"),
        ({"window_s": 0.0}, "window_s"),
        ({"window_s": -3.0}, "window_s"),
        ({"window_s": float("nan")}, "window_s"),
    ],
)
def test_a_window_outside_the_record_is_named(arguments, message):
    with pytest.raises(EcgotError, match=message):
        prepare(long_source(100.0), **arguments)


def test_a_window_ends_with_the_record():
    assert prepare(long_source(100.0), 115.0, 30.0).signal_mv.shape == (12, 500)
    assert prepare(long_source(100.0), 115.0, float("inf")).signal_mv.shape == (12, 500)


def test_a_gap_at_the_edge_of_a_window_is_bridged_from_outside():
    signal = long_source(100.0).read(0, 12000)
    signal[4, 2950:3050] = np.nan
    source = ArraySource(signal, fs_hz=100, leads=STANDARD_LEADS)
    whole, window = prepare(source), prepare(source, 30.0, 10.0)
    np.testing.assert_allclose(window.signal_mv, whole.signal_mv[:, 3000:4000], atol=1e-6)
    assert window.repaired_samples == {"aVL": 50}
    assert whole.repaired_samples == {"aVL": 100}


# Leads


def heart() -> np.ndarray:
    """Twelve leads [12, 1000] that agree with one another, without a baseline."""
    signal = simulate(np.random.default_rng(3)).signal_mv
    rows = [STANDARD_LEADS.index(lead) for lead in INDEPENDENT_LEADS]
    return remove_baseline(complete(signal[rows], INDEPENDENT_LEADS)[0], 100.0, 0.3)


def source_of(*leads: str, **signals: np.ndarray) -> ArraySource:
    """``leads`` of :func:`heart`, or the given signals."""
    rows = [signals.get(lead, heart()[STANDARD_LEADS.index(lead)]) for lead in leads]
    return ArraySource(np.stack(rows), fs_hz=100, leads=leads, name="some")


@pytest.mark.parametrize("pair", list(itertools.combinations(LIMB_LEADS, 2)))
def test_any_two_limb_leads_give_the_other_four(pair):
    chest = STANDARD_LEADS[6:]
    record = prepare(source_of(*pair, *chest))
    np.testing.assert_allclose(record.signal_mv, heart(), atol=1e-6)
    assert set(record.derived_leads) == {*LIMB_LEADS} - {*pair}
    assert record.estimated_leads == ()
    assert record.source_leads == (*pair, *chest)


def test_other_leads_are_estimated_where_that_is_asked_for():
    source = source_of("I", "II", "V2")
    with pytest.raises(EcgotError, match="without V1, V3, V4, V5, V6"):
        prepare(source)
    record = prepare(source, missing_leads="estimate")
    assert record.derived_leads == ("III", "aVR", "aVL", "aVF")
    assert record.estimated_leads == ("V1", "V3", "V4", "V5", "V6")
    np.testing.assert_allclose(record.signal_mv[:6], heart()[:6], atol=1e-6)
    np.testing.assert_allclose(record.signal_mv[7], heart()[7], atol=1e-6)
    expected = complete(source.read(0, 1000), ("I", "II", "V2"))[0]
    np.testing.assert_allclose(record.signal_mv, expected, atol=1e-6)
    only = prepare(source_of("V2"), missing_leads="estimate")
    assert only.derived_leads == ()
    assert len(only.estimated_leads) == 11


def test_flat_and_empty_leads_count_as_missing_where_leads_are_estimated():
    gap, flat = np.full(1000, np.nan), np.zeros(1000)
    source = source_of(*STANDARD_LEADS, V3=gap, III=flat, V5=flat)
    record = prepare(source, missing_leads="estimate")
    assert record.flat_leads == ("III", "V5")
    assert record.derived_leads == ("III",)
    assert record.estimated_leads == ("V3", "V5")
    np.testing.assert_allclose(record.signal_mv[2], heart()[2], atol=1e-6)
    assert np.ptp(record.signal_mv[10]) > 0.1
    with pytest.raises(EcgotError, match="lead V3, got only NaN"):
        prepare(source)
    shown = prepare(source_of(*STANDARD_LEADS, V5=flat))
    assert shown.flat_leads == ("V5",)
    assert np.ptp(shown.signal_mv[10]) == 0  # what is there is shown where nothing is to be made up


def test_a_flat_limb_lead_derives_nothing():
    source = source_of("I", "II", I=np.zeros(1000))
    with pytest.raises(EcgotError, match="without III"):
        prepare(source, leads=("I", "II", "III"))


def test_names_go_by_any_spelling(tmp_path):
    spelled = ["DI", "MLII", "Lead III", "ECG_aVR", "avl", "AVF", "MDC_ECG_LEAD_V1", "C2", "V 3", "v4"]
    record = read_record(write(tmp_path, leads=[*spelled, "ECG V5", "V6"]))
    np.testing.assert_allclose(record.signal_mv, SIGNAL.T, atol=6e-4)
    assert record.source_leads == STANDARD_LEADS
    two = read_record(tmp_path / "ecg", leads=("Lead II", "C1"))
    np.testing.assert_allclose(two.signal_mv, SIGNAL.T[[1, 6]], atol=6e-4)
    assert two.leads == ("Lead II", "C1")


def test_a_lead_of_no_standard_name_is_read_by_its_own(tmp_path):
    record = read_record(write(tmp_path, leads=[*STANDARD_LEADS[:11], "Vx"]), leads=("VX", "I"))
    np.testing.assert_allclose(record.signal_mv, SIGNAL.T[[11, 0]], atol=6e-4)


# Failing inputs of the real world, where there are any


@pytest.mark.parametrize("name", ["skew", "two_samples_a_frame", "suffix_in_record_line", "eight_leads"])
def test_valid_real_files_are_read(faults, name):
    record = read_record(faults / name, fs_hz=500.0)
    assert record.signal_mv.shape == (12, 5000)
    assert 0.3 < np.ptp(record.signal_mv) < 10
    assert record.derived_leads == (("III", "aVR", "aVL", "aVF") if name == "eight_leads" else ())


def test_real_faults_are_named(faults):
    expect_error(faults / "no_signal_lines", "name its leads")
    assert "uncalibrated" in read_record(faults / "gain_zero").notes[0]
    record = read_record(faults / "six_flat_leads", missing_leads="estimate")
    assert record.flat_leads == record.estimated_leads == STANDARD_LEADS[6:]
    assert read_record(faults / "nine_of_ten_seconds_missing").repaired_samples["I"] == 4500


def test_skew_and_frames_do_not_change_the_signal(faults):
    frames = read_record(faults / "two_samples_a_frame").signal_mv
    skewed = read_record(faults / "skew").signal_mv
    np.testing.assert_allclose(skewed[1:], frames[1:])
    np.testing.assert_allclose(skewed[0, :-2], frames[0, 2:])
