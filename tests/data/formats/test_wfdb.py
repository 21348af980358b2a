"""WFDB in all that it allows: pieces equal the whole, whatever the format, skew, frame, name or segment."""

from pathlib import Path

import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgot.data.formats import open_record, record_files
from ecgot.data.formats.wfdb_header import read_header
from ecgot.data.formats.wfdb_record import from_wfdb
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.record import read_record
from ecgot.errors import EcgotError

FS_HZ = 100
RNG = np.random.default_rng(0)
DIGITAL = np.cumsum(RNG.integers(-9, 10, (601, 12)), axis=0)  # ADC units of 1 uV


def write_dat(path: Path, digital: np.ndarray = DIGITAL) -> None:
    """Samples in format 16."""
    path.write_bytes(digital.astype("<i2").tobytes())


def signal_line(file: str, lead: str, values: np.ndarray, *, fmt="16", gain="1000(0)/mV") -> str:
    checksum = int(values.sum()) % 65536
    return f"{file} {fmt} {gain} 16 0 {int(values[0])} {checksum} 0 {lead}"


def write(folder: Path, name="ecg", *, record=None, leads=STANDARD_LEADS, lines=None) -> Path:
    """A record of format 16 in ``folder``, with ``lines`` in place of the usual signal lines."""
    write_dat(folder / f"{name}.dat")
    usual = [signal_line(f"{name}.dat", lead, values) for lead, values in zip(leads, DIGITAL.T, strict=True)]
    header = [f"{record or name} 12 {FS_HZ} {len(DIGITAL)}", *(lines or usual), ""]
    (folder / f"{name}.hea").write_text("\n".join(header), encoding="utf-8")
    return folder / name


def refuses(path: Path, *parts: str, opened: Path | None = None, **arguments) -> None:
    with pytest.raises(EcgotError) as caught:
        read_record(opened or path, **arguments)
    for part in (path.name, *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fmt", ["16", "24", "32", "80", "212", "508", "516", "524"])
def test_pieces_equal_the_whole_as_the_wfdb_library_reads_it(tmp_path, fmt):
    digital = np.clip(DIGITAL, -127, 127) if fmt in ("80", "508") else np.clip(DIGITAL, -2047, 2047)
    names = list(STANDARD_LEADS)
    wfdb.wrsamp(
        "ecg",
        fs=FS_HZ,
        units=["mV"] * 12,
        sig_name=names,
        d_signal=digital,
        fmt=[fmt] * 12,
        adc_gain=[1000.0] * 12,
        baseline=[3] * 12,
        write_dir=str(tmp_path),
    )
    expected = wfdb.rdrecord(str(tmp_path / "ecg")).p_signal.T
    source = open_record(tmp_path / "ecg")
    whole = source.read(0, source.samples)
    np.testing.assert_allclose(whole, expected, atol=1e-12)
    for start, stop in [(0, 1), (1, 2), (7, 400), (333, 601), (590, 700)]:
        np.testing.assert_array_equal(source.read(start, stop), whole[:, start:stop])


@settings(max_examples=25, deadline=None)
@given(
    skews=st.lists(st.integers(0, 40), min_size=12, max_size=12),
    frames=st.lists(st.sampled_from([1, 2, 4]), min_size=12, max_size=12),
    data=st.data(),
)
def test_any_skew_and_frame_reads_in_pieces_as_in_one(tmp_path_factory, skews, frames, data):
    folder = tmp_path_factory.mktemp("skew")
    count, columns, lines = 50, [], []
    for lead, skew, per_frame in zip(STANDARD_LEADS, skews, frames, strict=True):
        values = RNG.integers(-2000, 2000, (count, per_frame))
        columns.append(values)
        lines.append(signal_line("ecg.dat", lead, values.ravel(), fmt=f"16x{per_frame}:{skew}"))
    write_dat(folder / "ecg.dat", np.concatenate(columns, axis=1))
    (folder / "ecg.hea").write_text("\n".join([f"ecg 12 {FS_HZ} {count}", *lines, ""]))
    source = open_record(folder / "ecg")
    rate = max(frames)
    assert (source.fs_hz, source.samples) == (FS_HZ * rate, count * rate)
    whole = source.read(0, source.samples)
    for row, (skew, per_frame) in enumerate(zip(skews, frames, strict=True)):
        moved = columns[row].ravel()[skew * per_frame :] / 1000
        own = whole[row, :: rate // per_frame]
        np.testing.assert_allclose(own[: len(moved)], moved, atol=1e-12)  # a line goes through its points
        assert np.isnan(own[len(moved) :]).all()
    start = data.draw(st.integers(0, source.samples - 1))
    stop = data.draw(st.integers(start + 1, source.samples))
    np.testing.assert_allclose(source.read(start, stop), whole[:, start:stop], atol=1e-12)


def test_differences_of_format_8_are_summed_from_the_beginning(tmp_path):
    differences = np.diff(DIGITAL, axis=0, prepend=DIGITAL[:1] - 1)
    (tmp_path / "ecg.dat").write_bytes(differences.astype("i1").tobytes())
    lines = [
        f"ecg.dat 8 1000(0)/mV 16 0 {values[0] - 1} {int(values.sum()) % 65536} 0 {lead}"
        for lead, values in zip(STANDARD_LEADS, DIGITAL.T, strict=True)
    ]
    (tmp_path / "ecg.hea").write_text("\n".join([f"ecg 12 {FS_HZ} {len(DIGITAL)}", *lines]))
    source = open_record(tmp_path / "ecg")
    np.testing.assert_allclose(source.read(0, 601), DIGITAL.T / 1000, atol=1e-12)
    np.testing.assert_allclose(source.read(300, 400), DIGITAL.T[:, 300:400] / 1000, atol=1e-12)


def test_without_a_baseline_the_adc_zero_is_it(tmp_path):
    lines = [f"ecg.dat 16 1000/mV 16 100 0 0 0 {lead}" for lead in STANDARD_LEADS]
    record = read_record(write(tmp_path, lines=lines))
    np.testing.assert_allclose(record.signal_mv, (DIGITAL.T - 100) / 1000, atol=1e-6)


def test_a_wrong_checksum_is_found_with_skew_and_frames_too(tmp_path):
    path = write(tmp_path)
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(".dat 16 ", ".dat 16:3 ", 1))
    read_record(path)
    data = bytearray((tmp_path / "ecg.dat").read_bytes())
    data[0] ^= 4
    (tmp_path / "ecg.dat").write_bytes(data)
    refuses(path, "checksum", "lead I,")


@pytest.mark.parametrize("checksum", ["0", ""])
def test_a_checksum_of_zero_or_none_is_accepted(tmp_path, checksum):
    lines = [
        f"ecg.dat 16 1000(0)/mV 16 0 0 {checksum} 0 {lead}" if checksum else f"ecg.dat 16 1000/mV {lead}"
        for lead in STANDARD_LEADS
    ]
    record = read_record(write(tmp_path, lines=lines))
    np.testing.assert_allclose(record.signal_mv, DIGITAL.T / 1000, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["Bläck 2.0 ecg", "a.b.c", "my record", "12 500 5000", "patient.2024.v1", "心电图", "a(1)+b"],
)
def test_names_may_have_dots_spaces_numbers_and_letters_of_any_script(tmp_path, name):
    path = write(tmp_path, name)
    for given_path in (path, Path(f"{path}.hea"), Path(f"{path}.dat")):
        record = read_record(given_path)
        np.testing.assert_allclose(record.signal_mv, DIGITAL.T / 1000, atol=1e-6)
    assert record_files(path) == [tmp_path / f"{name}.hea", tmp_path / f"{name}.dat"]


@pytest.mark.parametrize("record", ["ecg.mat", "other", "other 2.mat"])
def test_the_record_line_may_name_a_file(tmp_path, record):
    np.testing.assert_allclose(
        read_record(write(tmp_path, record=record)).signal_mv, DIGITAL.T / 1000, atol=1e-6
    )


def test_an_older_writers_micro_sign_is_read(tmp_path):
    path = write(tmp_path)
    header = path.with_suffix(".hea")
    header.write_bytes(header.read_text().replace("1000(0)/mV", "1(0)/µV").encode("latin-1"))
    np.testing.assert_allclose(read_record(path).signal_mv, DIGITAL.T / 1000, atol=1e-6)


def test_a_file_that_no_wanted_lead_needs_may_be_missing(tmp_path):
    lines = [signal_line("ecg.dat", lead, v) for lead, v in zip(STANDARD_LEADS, DIGITAL.T, strict=True)]
    (tmp_path / "ecg.hea").write_text(
        "\n".join([f"ecg 13 {FS_HZ} 601", *lines, "pleth.dat 16 1/mV 16 0 0 0 0 PLETH", ""])
    )
    write_dat(tmp_path / "ecg.dat")
    record = read_record(tmp_path / "ecg")
    assert record.notes == ("there is no pleth.dat",)
    refuses(tmp_path / "ecg", "there is no pleth.dat", leads=("I", "PLETH"))


def test_a_missing_file_of_a_standard_lead_matters_only_to_it(tmp_path):
    lines = [
        signal_line("chest.dat" if lead == "V6" else "ecg.dat", lead, values)
        for lead, values in zip(STANDARD_LEADS, DIGITAL.T, strict=True)
    ]
    path = write(tmp_path, lines=lines)
    write_dat(tmp_path / "ecg.dat", DIGITAL[:, :11])
    for missing_leads in ("error", "estimate"):
        refuses(path, "there is no chest.dat", missing_leads=missing_leads)
    record = read_record(path, leads=("V5", "I"))
    np.testing.assert_allclose(record.signal_mv, DIGITAL.T[[10, 0]] / 1000, atol=1e-6)


def test_a_header_without_signals_or_names_is_one_line(tmp_path):
    path = write(tmp_path, lines=["# nothing"])
    refuses(path, "got 0 lines for 12 signals")
    path = write(tmp_path, lines=[f"ecg.dat 16 1000(0)/mV 16 0 {v[0]} 0 0" for v in DIGITAL.T])
    refuses(path, "expected ecg.hea to name its leads")
    (tmp_path / "ecg.hea").write_text("ecg 0 100 601\n")
    refuses(path, "got 0 lines for 0 signals")


@pytest.mark.parametrize("gain", ["0/mV", "0", "0(0)/mV"])
def test_a_gain_of_zero_is_uncalibrated(tmp_path, gain):
    lines = [
        signal_line("ecg.dat", lead, values, gain=gain)
        for lead, values in zip(STANDARD_LEADS, DIGITAL.T, strict=True)
    ]
    path = write(tmp_path, lines=lines)
    source = open_record(path)
    assert not source.calibrated
    assert "uncalibrated" in source.notes[0]
    np.testing.assert_allclose(source.read(0, 601), DIGITAL.T / 200)  # WFDB's default
    assert open_record(write(tmp_path)).calibrated


def test_what_is_no_voltage_is_left_out_and_noted(tmp_path):
    lines = [signal_line("ecg.dat", lead, v) for lead, v in zip(STANDARD_LEADS, DIGITAL.T, strict=True)]
    lines[11] = lines[11].replace("/mV", "/mmHg").replace("V6", "ABP")
    path = write(tmp_path, lines=lines)
    source = open_record(path)
    assert source.leads == STANDARD_LEADS[:11]
    assert source.notes == ("left out, as they are no voltage: ABP (mmHg)",)
    np.testing.assert_allclose(source.read(0, 601), DIGITAL.T[:11] / 1000)


def test_a_length_that_the_header_does_not_tell_is_the_files(tmp_path):
    path = write(tmp_path)
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace(f"{FS_HZ} 601", f"{FS_HZ}"))
    assert open_record(path).samples == 601


def segment(folder: Path, name: str, leads: tuple[str, ...], start: int, stop: int) -> None:
    """A segment of ``leads`` with samples ``start`` to ``stop``, its own gain included."""
    rows = [STANDARD_LEADS.index(lead) for lead in leads]
    values = DIGITAL[start:stop, rows] * 2
    write_dat(folder / f"{name}.dat", values)
    lines = [
        signal_line(f"{name}.dat", lead, column, gain="2000(0)/mV")
        for lead, column in zip(leads, values.T, strict=True)
    ]
    header = [f"{name} {len(leads)} {FS_HZ} {stop - start}", *lines, ""]
    (folder / f"{name}.hea").write_text("\n".join(header))


def test_segments_of_fixed_layout_and_gaps(tmp_path):
    segment(tmp_path, "a", STANDARD_LEADS, 0, 200)
    segment(tmp_path, "b", STANDARD_LEADS, 250, 601)
    (tmp_path / "ecg.hea").write_text(f"ecg/3 12 {FS_HZ} 601\na 200\n~ 50\nb 351\n")
    source = open_record(tmp_path / "ecg")
    assert (source.leads, source.samples, source.notes) == (
        STANDARD_LEADS,
        601,
        ("gaps between segments: 1",),
    )
    expected = DIGITAL.T / 1000
    expected[:, 200:250] = np.nan
    np.testing.assert_allclose(source.read(0, 601), expected, atol=1e-12)
    np.testing.assert_allclose(source.read(150, 300), expected[:, 150:300], atol=1e-12)
    assert read_record(tmp_path / "ecg").repaired_samples["I"] == 50
    assert len(record_files(tmp_path / "ecg")) == 5


def test_segments_of_variable_layout_have_their_own_leads(tmp_path):
    segment(tmp_path, "a", ("II", "V1"), 0, 200)
    segment(tmp_path, "b", ("V1", "I", "II"), 200, 601)
    layout = [f"layout 3 {FS_HZ} 0", *(f"~ 0 1000(0)/mV 16 0 0 0 0 {lead}" for lead in ("I", "II", "V1")), ""]
    (tmp_path / "layout.hea").write_text("\n".join(layout))
    (tmp_path / "ecg.hea").write_text(f"ecg/3 3 {FS_HZ} 601\nlayout 0\na 200\nb 401\n")
    source = open_record(tmp_path / "ecg")
    assert source.leads == ("I", "II", "V1")
    expected = DIGITAL.T[[0, 1, 6]] / 1000
    expected[0, :200] = np.nan
    np.testing.assert_allclose(source.read(0, 601), expected, atol=1e-12)


def test_broken_segments_are_named(tmp_path):
    segment(tmp_path, "a", STANDARD_LEADS, 0, 200)
    (tmp_path / "ecg.hea").write_text(f"ecg/2 12 {FS_HZ} 601\na 200\nb 401\n")
    refuses(tmp_path / "b", "there is no b.hea", opened=tmp_path / "ecg")
    (tmp_path / "ecg.hea").write_text(f"ecg/2 12 {FS_HZ} 601\na 200\n")
    refuses(tmp_path / "ecg", "expected 2 segments, got 1")
    (tmp_path / "ecg.hea").write_text(f"ecg/1 12 {FS_HZ} 601\na 200\n")
    refuses(tmp_path / "ecg", "expected 601 samples", "got 200")
    (tmp_path / "ecg.hea").write_text(f"ecg/1 12 {FS_HZ} 300\na 300\n")
    refuses(tmp_path / "ecg", "expected 300 samples at 100 Hz in segment a, got 200")
    (tmp_path / "ecg.hea").write_text("ecg/1 12 50 200\na 200\n")
    refuses(tmp_path / "ecg", "expected 200 samples at 50 Hz in segment a, got 200 at 100 Hz")
    (tmp_path / "ecg.hea").write_text(f"ecg/1 12 {FS_HZ} 601\necg 601\n")
    refuses(tmp_path / "ecg", "without segments")


def test_a_damaged_segment_is_no_gap(tmp_path):
    segment(tmp_path, "a", STANDARD_LEADS, 0, 200)
    segment(tmp_path, "b", STANDARD_LEADS, 200, 601)
    header = tmp_path / "b.hea"
    header.write_text(header.read_text().replace("b.dat", "c.dat", 1))
    (tmp_path / "ecg.hea").write_text(f"ecg/2 12 {FS_HZ} 601\na 200\nb 401\n")
    refuses(tmp_path / "b", "there is no c.dat", opened=tmp_path / "ecg")


def test_a_record_of_the_wfdb_library_is_a_source_too(tmp_path):
    path = write(tmp_path)
    record = wfdb.rdrecord(str(path))
    source = from_wfdb(record)
    np.testing.assert_allclose(source.read(0, 601), DIGITAL.T / 1000)
    assert (source.name, source.fs_hz, source.leads) == ("ecg", 100.0, STANDARD_LEADS)
    with pytest.raises(EcgotError, match="p_signal"):
        from_wfdb(wfdb.rdheader(str(path)))
    record.units = ["mmHg"] * 12
    with pytest.raises(EcgotError, match="mmHg"):
        from_wfdb(record)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=80))
def test_no_header_makes_more_than_one_line(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("header")
    messages = []
    for content in (text, f"ecg 1 100 10\n{text}", f"ecg/1 1 100 10\n{text}"):
        (folder / "ecg.hea").write_text(content, encoding="utf-8")
        try:
            read_header(folder / "ecg")
        except EcgotError as error:
            messages.append(str(error))
    assert not [message for message in messages if "\n" in message]


@settings(max_examples=100, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 200), st.sampled_from("0123456789 x:+/()-~.e\nIV#")), min_size=1, max_size=4
    )
)
def test_a_header_with_other_letters_is_read_or_refused_and_nothing_else(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("edited")
    path = write(folder)
    header = list((folder / "ecg.hea").read_text())
    for place, letter in edits:
        header[place] = letter
    (folder / "ecg.hea").write_text("".join(header))
    shape = (12, len(DIGITAL))
    try:
        shape = read_record(path, missing_leads="estimate").signal_mv.shape
    except EcgotError as error:
        shape = (12, 0) if "\n" in str(error) else shape
    assert shape[0] == 12
    assert shape[1] > 0
