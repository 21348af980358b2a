"""Every other format: what a file of it says in mV is what is read, and damage is one line."""

import base64
import binascii
import builtins
import importlib.util
import struct
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pandas as pd
import pytest

from ecgot.data.formats import FORMATS, ArraySource, open_record, record_files
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.record import read_record
from ecgot.errors import EcgotError

EIGHT = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
RNG = np.random.default_rng(1)
COUNTS = np.cumsum(RNG.integers(-20, 21, (12, 1000)), axis=1)  # ADC units
MV = COUNTS / 1000


def refuses(path: Path, *parts: str, **arguments) -> None:
    with pytest.raises(EcgotError) as caught:
        open_record(path, **arguments)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# NumPy and CSV


def test_numpy_files_say_or_are_told_rate_and_leads(tmp_path):
    np.save(tmp_path / "ecg.npy", MV.T)
    source = open_record(tmp_path / "ecg.npy", fs_hz=500, leads=STANDARD_LEADS)
    np.testing.assert_array_equal(source.read(10, 400), MV[:, 10:400])
    assert (source.fs_hz, source.samples) == (500.0, 1000)
    refuses(tmp_path / "ecg.npy", "expected fs_hz and leads")
    refuses(tmp_path / "ecg.npy", "expected leads", fs_hz=500)
    for keys in ({"signal": MV, "fs_hz": 500}, {"signal_mv": MV.astype(np.float32), "fs": [500.0]}):
        np.savez(tmp_path / "ecg.npz", leads=STANDARD_LEADS, **keys)
        source = open_record(tmp_path / "ecg.npz")
        np.testing.assert_allclose(source.read(0, 1000), MV, rtol=1e-6)
    np.savez(tmp_path / "ecg.npz", x=MV)
    refuses(tmp_path / "ecg.npz", "the key signal", "got x")
    np.save(tmp_path / "ecg.npy", np.array([{}], dtype=object))
    refuses(tmp_path / "ecg.npy", "cannot be read")
    (tmp_path / "ecg.npz").write_bytes(b"PK\3\4nonsense")
    refuses(tmp_path / "ecg.npz", "cannot be read")


def test_an_array_is_checked():
    source = ArraySource(MV.T, fs_hz=500, leads=[f"Lead {lead}" for lead in STANDARD_LEADS])
    assert source.leads == STANDARD_LEADS
    np.testing.assert_array_equal(source.read(990, 2000), MV[:, 990:])
    assert ArraySource(MV[0], fs_hz=500, leads=["I"]).read(0, 3).shape == (1, 3)
    gap = MV.copy()
    gap[3, 5] = np.inf
    assert np.isnan(ArraySource(gap, fs_hz=500, leads=STANDARD_LEADS).read(5, 6)[3, 0])
    for signal, fs_hz, message in [
        (MV, 0, "sampling rate"),
        (MV, float("nan"), "sampling rate"),
        (MV[:5], 500, "12 leads"),
        (MV.astype(complex), 500, "numbers"),
        (np.zeros((12, 0)), 500, "12 leads"),
    ]:
        with pytest.raises(EcgotError, match=message):
            ArraySource(signal, fs_hz=fs_hz, leads=STANDARD_LEADS)


def test_a_lead_that_is_there_twice_is_taken_once():
    source = ArraySource(MV[:4], fs_hz=500, leads=["MLII", "II", "V1", "V1"])
    assert source.leads == ("MLII", "II", "V1")
    np.testing.assert_array_equal(source.read(0, 1000), MV[:3])
    assert source.notes == ("repeated and left out: V1",)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_has_a_column_for_each_lead(tmp_path, separator):
    path = tmp_path / "ecg.csv"
    decimal = "," if separator == ";" else "."
    table = pd.DataFrame(MV.T, columns=[*STANDARD_LEADS[:11], "V6 (uV)"])
    table["V6 (uV)"] *= 1000
    table.loc[5, "I"] = np.nan
    table.to_csv(path, sep=separator, decimal=decimal, index=False)
    expected = MV.copy()
    expected[0, 5] = np.nan
    source = open_record(path, fs_hz=250)
    np.testing.assert_allclose(source.read(0, 1000), expected, atol=1e-9)
    refuses(path, "expected fs_hz")
    table.insert(0, "time_ms", np.round(np.arange(1000) * 1000 / 360, 3))
    table.to_csv(path, sep=separator, decimal=decimal, index=False)
    source = open_record(path)
    assert (source.fs_hz, source.leads) == (360.0, STANDARD_LEADS)
    np.testing.assert_allclose(source.read(0, 1000), expected, atol=1e-9)


def test_csv_without_names_is_told_them_and_nonsense_is_named(tmp_path):
    path = tmp_path / "ecg.csv"
    np.savetxt(path, MV.T, delimiter=",")
    source = open_record(path, fs_hz=500, leads=STANDARD_LEADS)
    np.testing.assert_allclose(source.read(0, 1000), MV, atol=1e-12)
    refuses(path, "expected leads", fs_hz=500)
    path.write_text("time,I\n0,1\n0.5,2\n7,3\n")
    refuses(path, "even steps in column time")
    path.write_text("time,I\nnow,1\nthen,2\n")
    refuses(path, "numbers in column time")
    path.write_text("time,I (mmHg)\n0,1\n0.002,2\n")
    refuses(path, "'mmHg'")
    path.write_text("time,I\n0,one\n0.002,2\n")
    refuses(path, "cannot be read")
    path.write_text("time,PLETH (NU)\n0,1\n0.002,2\n")
    refuses(path, "a column for each lead")
    path.write_text("")
    refuses(path)


def test_columns_of_a_table_that_are_no_leads_are_left_out(tmp_path):
    path = tmp_path / "ecg.csv"
    table = pd.DataFrame(MV[:2].T, columns=["I", "Lead II"])
    table["rhythm"], table["PLETH (NU)"] = "sinus", 1.0
    table.to_csv(path)
    source = open_record(path, fs_hz=500)
    assert source.leads == ("I", "II")
    np.testing.assert_allclose(source.read(0, 1000), MV[:2], atol=1e-12)
    assert [note.rpartition(": ")[2] for note in source.notes] == ["rhythm", "PLETH (NU)"]


# EDF and BDF


def edf_signal(module, kind: str, label: str, physical: np.ndarray, fs_hz: int, limit: float, unit: str):
    digital = 32767 if kind == "edf" else 2**23 - 1
    make = module.EdfSignal if kind == "edf" else module.BdfSignal
    return make(
        physical,
        fs_hz,
        label=label,
        physical_dimension=unit,
        physical_range=(-limit, 2 * limit),
        digital_range=(-digital, digital),
    )


@pytest.mark.parametrize("kind", ["edf", "bdf"])
def test_edf_with_its_ranges_units_and_several_rates(tmp_path, kind):
    edfio = pytest.importorskip("edfio")
    slow = np.sin(np.arange(500) / 40)
    signals = [edf_signal(edfio, kind, "EKG I", MV[0], 500, 2.5, "mV")]
    signals += [edf_signal(edfio, kind, "ECG II", MV[1] * 1000, 500, 3000, "uV")]
    signals += [edf_signal(edfio, kind, "V1", slow, 250, 2, "mV")]
    signals += [edf_signal(edfio, kind, "SpO2", slow * 10 + 50, 250, 100, "%")]
    path = tmp_path / f"ecg.{kind}"
    (edfio.Edf if kind == "edf" else edfio.Bdf)(signals).write(path)
    source = open_record(path)
    assert (source.fs_hz, source.leads, source.samples) == (500.0, ("I", "II", "V1"), 1000)
    assert source.notes == ("left out, as they are no voltage: SpO2 (%)",)
    whole = source.read(0, 1000)
    step = 9000 / (65534 if kind == "edf" else 2**24)  # of the coarsest, in uV
    np.testing.assert_allclose(whole[:2], MV[:2], atol=step / 1000)
    np.testing.assert_allclose(whole[2, ::2], slow, atol=step / 1000)
    np.testing.assert_allclose(whole[2, 1:-1:2], (slow[:-1] + slow[1:]) / 2, atol=step / 1000)
    for start, stop in [(0, 1), (499, 503), (701, 1000)]:
        np.testing.assert_allclose(source.read(start, stop), whole[:, start:stop], atol=1e-12)
    content = path.read_bytes()
    path.write_bytes(content[:-700])
    refuses(path, str(path))
    path.write_bytes(content[:300])
    refuses(path, "cannot be read")
    path.write_bytes(content.replace(b"-2.5    ", b"-2-5    ", 1))
    refuses(path, "cannot be read")
    path.write_bytes(content.replace(b"5.0     ", b"-2.5    ", 1).replace(b"5       ", b"-2.5    ", 1))
    assert not open_record(path).calibrated


def test_an_edf_with_a_micro_sign_and_an_unknown_number_of_records(tmp_path):
    edfio = pytest.importorskip("edfio")
    path = tmp_path / "ecg.edf"
    edfio.Edf([edf_signal(edfio, "edf", "ECG II", MV[1] * 1000, 500, 3000, "uV")]).write(path)
    content = path.read_bytes()
    content = content.replace(b"uV      ", "µV      ".encode("latin-1"))
    path.write_bytes(content[:236] + b"-1      " + content[244:])
    np.testing.assert_allclose(open_record(path).read(0, 1000), MV[1:2], atol=2e-4)


# DICOM


def dicom(path: Path, *, unit="uV") -> Path:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    data = Dataset()
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.9.1.1"
    data.SOPInstanceUID = generate_uid()
    group = Dataset()
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = 12, 1000
    group.SamplingFrequency, group.WaveformOriginality = "500", "ORIGINAL"
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    stored = COUNTS.T.astype("<i2").copy()
    stored[7, 3] = -32768
    group.WaveformPaddingValue = struct.pack("<h", -32768)
    group.WaveformData = stored.tobytes()
    channels = []
    for row, lead in enumerate(STANDARD_LEADS):
        channel, source, units = Dataset(), Dataset(), Dataset()
        source.CodeValue, source.CodingSchemeDesignator = f"9.{row}", "LOCAL"
        source.CodeMeaning = f"Lead {lead}"
        units.CodeValue, units.CodingSchemeDesignator, units.CodeMeaning = unit, "UCUM", unit
        channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [source], [units]
        channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor = str(1.25 + row), "2"
        channel.ChannelBaseline, channel.ChannelSampleSkew = str(10 * row), "0"
        channel.WaveformBitsStored = 16
        channels.append(channel)
    group.ChannelDefinitionSequence = channels
    data.WaveformSequence = [group]
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


@pytest.mark.parametrize("name", ["ecg.dcm", "IM0001"])
def test_dicom_with_sensitivity_correction_baseline_and_padding(tmp_path, name):
    pytest.importorskip("ecgdatakit")
    source = open_record(dicom(tmp_path / name))
    row = np.arange(12)[:, None]
    expected = (COUNTS * (1.25 + row) * 2 + 10 * row) / 1000
    expected[3, 7] = np.nan
    assert (source.fs_hz, source.leads) == (500.0, STANDARD_LEADS)
    np.testing.assert_allclose(source.read(0, 1000), expected, atol=1e-9)


def test_a_carts_dicom_file_is_read_as_pydicom_reads_it():
    pytest.importorskip("ecgdatakit")
    pydicom = pytest.importorskip("pydicom")
    from pydicom.data import get_testdata_file
    from pydicom.waveforms.numpy_handler import multiplex_array

    path = get_testdata_file("waveform_ecg.dcm", download=False)  # comes with pydicom
    source = open_record(path)
    expected = multiplex_array(pydicom.dcmread(path), 0, as_raw=False).T / 1000
    assert (source.fs_hz, source.leads) == (1000.0, STANDARD_LEADS)
    np.testing.assert_allclose(source.read(0, source.samples), expected, atol=1e-12)


def test_dicom_without_a_unit_of_voltage_or_cut_short_is_refused(tmp_path):
    pytest.importorskip("ecgdatakit")
    refuses(dicom(tmp_path / "ecg.dcm", unit="mm[Hg]"), "lead I in V, mV, uV or nV")
    path = dicom(tmp_path / "ecg.dcm")
    path.write_bytes(path.read_bytes()[:3000])
    refuses(path, "cannot be read")


# GE MUSE XML


def muse(path: Path, leads=EIGHT, *, units="MICROVOLTS", declared: int | None = None) -> Path:
    """A resting ECG: median beats first, which are no rhythm, then the leads that a MUSE system stores."""

    def lead_data(lead: str, counts: np.ndarray) -> str:
        coded = base64.encodebytes(counts.astype("<i2").tobytes()).decode()
        return (
            f"<LeadData><LeadByteCountTotal>{declared or 2 * len(counts)}</LeadByteCountTotal>"
            f"<LeadSampleCountTotal>{len(counts)}</LeadSampleCountTotal>"
            f"<LeadAmplitudeUnitsPerBit>4.88</LeadAmplitudeUnitsPerBit>"
            f"<LeadAmplitudeUnits>{units}</LeadAmplitudeUnits><LeadID>{lead}</LeadID>"
            f"<LeadDataCRC32>{zlib_crc(counts)}</LeadDataCRC32><LeadSampleSize>2</LeadSampleSize>"
            f"<WaveFormData>\n{escape(coded)}</WaveFormData></LeadData>"
        )

    def waveform(kind: str, samples: int, base: int, exponent: int) -> str:
        rows = [STANDARD_LEADS.index(lead) for lead in leads]
        data = "".join(lead_data(lead, COUNTS[row, :samples]) for lead, row in zip(leads, rows, strict=True))
        return (
            f"<Waveform><WaveformType>{kind}</WaveformType><SampleBase>{base}</SampleBase>"
            f"<SampleExponent>{exponent}</SampleExponent>{data}</Waveform>"
        )

    path.write_text(
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<!DOCTYPE RestingECG SYSTEM "restecg.dtd">\n'
        f"<RestingECG><MuseInfo/>{waveform('Median', 600, 500, 0)}{waveform('Rhythm', 1000, 25, 1)}"
        "</RestingECG>",
        encoding="latin-1",
    )
    return path


def zlib_crc(counts: np.ndarray) -> int:
    return binascii.crc32(counts.astype("<i2").tobytes())


def test_muse_rhythm_is_read_and_its_missing_limb_leads_derived(tmp_path):
    pytest.importorskip("ecgdatakit")
    source = open_record(muse(tmp_path / "ecg.xml"))
    assert (source.fs_hz, source.leads, source.samples) == (250.0, EIGHT, 1000)
    rows = [STANDARD_LEADS.index(lead) for lead in EIGHT]
    np.testing.assert_allclose(source.read(0, 1000), COUNTS[rows] * 4.88e-3, atol=1e-9)
    record = read_record(tmp_path / "ecg.xml")
    assert record.derived_leads == ("III", "aVR", "aVL", "aVF")
    np.testing.assert_allclose(record.signal_mv[2], (COUNTS[1] - COUNTS[0]) * 4.88e-3, atol=1e-6)


def test_damaged_muse_files_are_named(tmp_path):
    pytest.importorskip("ecgdatakit")
    path = tmp_path / "ecg.xml"
    refuses(muse(path, units="FURLONGS"), "lead I in V, mV, uV or nV")
    refuses(muse(path, declared=1998), "cannot be read", "1998")
    path.write_text("<RestingECG><MuseInfo/></RestingECG>")
    refuses(path, "cannot be read")
    path.write_text(muse(path).read_text()[:2000])
    refuses(path, "cannot be read")
    path.write_text("<html></html>")
    refuses(path, "expected DICOM, GE MUSE XML, HL7 aECG or SCP-ECG")


# HL7 aECG


def aecg(path: Path, *, unit="uV", increment='value="0.002" unit="s"') -> Path:
    sequences = [
        '<component><sequence><code code="TIME_ABSOLUTE" codeSystem="2.16.840.1.113883.5.4"/>'
        '<value xsi:type="GLIST_TS"><head value="20200101120000.000"/>'
        f"<increment {increment}/></value></sequence></component>"
    ]
    for row, lead in enumerate(STANDARD_LEADS):
        digits = " ".join("nan" if (row, t) == (3, 7) else str(v) for t, v in enumerate(COUNTS[row]))
        sequences.append(
            f'<component><sequence><code code="MDC_ECG_LEAD_{lead.upper()}"/>'
            f'<value xsi:type="SLIST_PQ"><origin value="0.0{row}" unit="mV"/>'
            f'<scale value="2.5" unit="{unit}"/><digits>{digits}</digits></value></sequence></component>'
        )
    path.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<AnnotatedECG xmlns="urn:hl7-org:v3" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">'
        '<component><series><code code="RHYTHM"/><component><sequenceSet>'
        f"{''.join(sequences)}</sequenceSet></component></series></component></AnnotatedECG>",
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize(
    ("increment", "fs_hz"),
    [
        ('value="0.002" unit="s"', 500.0),
        ('value="4" unit="ms"', 250.0),
        ('value="0.0029" unit="s"', 1 / 0.0029),
    ],
)
def test_aecg_with_origin_scale_units_and_missing_digits(tmp_path, increment, fs_hz):
    pytest.importorskip("ecgdatakit")
    source = open_record(aecg(tmp_path / "ecg.xml", increment=increment))
    expected = COUNTS * 2.5e-3 + np.array([float(f"0.0{row}") for row in range(12)])[:, None]
    expected[3, 7] = np.nan
    assert source.leads == STANDARD_LEADS
    assert source.fs_hz == pytest.approx(fs_hz)
    np.testing.assert_allclose(source.read(0, 1000), expected, atol=1e-9)


def test_aecg_without_a_unit_of_voltage_or_time_is_refused(tmp_path):
    pytest.importorskip("ecgdatakit")
    refuses(aecg(tmp_path / "ecg.xml", unit="bar"), "lead I in V, mV, uV or nV")
    refuses(aecg(tmp_path / "ecg.xml", increment='value="1"'), "cannot be read", "increment")


# SCP-ECG


def huffman(values: np.ndarray) -> bytes:
    """Second differences in SCP's default code: ones and a sign, or an escape with 8 or 16 bits."""
    values = values.astype(int)
    second = np.concatenate([values[:2], np.diff(values, 2)])
    bits = []
    for value in second:
        if value == 0:
            bits.append("0")
        elif abs(value) <= 8:
            bits.append("1" * abs(value) + "0" + ("1" if value < 0 else "0"))
        elif -128 <= value < 128:
            bits.append("1111111110" + f"{value & 0xFF:08b}")
        else:
            bits.append("1111111111" + f"{value & 0xFFFF:016b}")
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def scp(path: Path, *, late: int = 0) -> Path:
    """Eight leads of 2.5 uV a count, 500 Hz, of second differences in Huffman's code; V6 begins ``late``."""

    def section(number: int, body: bytes) -> bytes:
        body += b"\0" * (len(body) % 2)
        rest = struct.pack("<HIBB6x", number, 16 + len(body), 20, 20) + body
        return struct.pack("<H", binascii.crc_hqx(rest, 0xFFFF)) + rest

    rows = {lead: COUNTS[STANDARD_LEADS.index(lead)] for lead in EIGHT}
    rows["V6"] = rows["V6"][late:]
    codes = {lead: number for number, lead in enumerate(EIGHT, 1)}
    packed = [huffman(values) for values in rows.values()]
    definition = b"".join(
        struct.pack("<IIB", 1001 - len(values), 1000, codes[lead]) for lead, values in rows.items()
    )
    bodies = {
        1: struct.pack("<BH", 255, 0),
        2: struct.pack("<H", 19999),
        3: struct.pack("<BB", 8, 0b01000100) + definition,
        6: struct.pack("<HHBB", 2500, 2000, 2, 0)
        + b"".join(struct.pack("<H", len(each)) for each in packed)
        + b"".join(packed),
    }
    sections = {number: section(number, body) for number, body in bodies.items()}
    place, pointers = 7 + 16 + 120, {}
    for number, content in sections.items():
        pointers[number] = (len(content), place)
        place += len(content)
    table = struct.pack("<HII", 0, 136, 7)
    table += b"".join(struct.pack("<HII", n, *pointers.get(n, (0, 0))) for n in range(1, 12))
    content = section(0, table)[:8] + b"\x14\x14SCPECG" + table
    content = struct.pack("<H", binascii.crc_hqx(content[2:], 0xFFFF)) + content[2:]
    content += b"".join(sections.values())
    content = struct.pack("<I", len(content) + 6) + content
    path.write_bytes(struct.pack("<H", binascii.crc_hqx(content, 0xFFFF)) + content)
    return path


def test_scp_with_second_differences_in_huffmans_code(tmp_path):
    pytest.importorskip("ecgdatakit")
    source = open_record(scp(tmp_path / "ecg.scp"))
    rows = [STANDARD_LEADS.index(lead) for lead in EIGHT]
    assert (source.fs_hz, source.leads, source.notes) == (500.0, EIGHT, ())
    np.testing.assert_allclose(source.read(0, 1000), COUNTS[rows] * 2.5e-3, atol=1e-9)


def test_an_scp_lead_that_begins_late_stays_in_its_place(tmp_path):
    pytest.importorskip("ecgdatakit")
    signal = open_record(scp(tmp_path / "ecg.scp", late=300)).read(0, 1000)
    assert np.isnan(signal[7, :300]).all()
    np.testing.assert_allclose(signal[7, 300:], COUNTS[11, 300:] * 2.5e-3, atol=1e-9)


def test_damaged_scp_is_named_or_noted(tmp_path):
    pytest.importorskip("ecgdatakit")
    path = scp(tmp_path / "ecg.scp")
    content = bytearray(path.read_bytes())
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert open_record(path).notes == ("SCP-ECG CRC mismatch in: record",)  # no sample is touched
    content[-100] ^= 1
    path.write_bytes(content)
    refuses(path, "checksum", "Section 6")
    path.write_bytes(content[:-500])
    refuses(path, "cannot be read")


# All of them


def test_a_format_without_its_library_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    absent = {"edfio", "ecgdatakit", "pydicom"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    for name in ("ecg.edf", "ecg.bdf", "ecg.dcm", "ecg.xml", "ecg.scp"):
        (tmp_path / name).write_bytes(b"anything")
        refuses(tmp_path / name, 'pip install "ecgot[formats]"')
    assert [each.name for each in FORMATS if each.installed] == ["WFDB", "NumPy", "CSV"]


def test_wfdb_needs_no_library_of_another_format(tmp_path, monkeypatch):
    real = builtins.__import__

    def only(name, *arguments, **keywords):
        assert name.partition(".")[0] not in ("edfio", "ecgdatakit", "pydicom", "pandas", "wfdb")
        return real(name, *arguments, **keywords)

    (tmp_path / "ecg.dat").write_bytes(COUNTS.T.astype("<i2").tobytes())
    lines = [f"ecg.dat 16 1000/mV 16 0 0 0 0 {lead}" for lead in STANDARD_LEADS]
    (tmp_path / "ecg.hea").write_text("\n".join(["ecg 12 500 1000", *lines]))
    monkeypatch.setattr(builtins, "__import__", only)
    np.testing.assert_allclose(read_record(tmp_path / "ecg").signal_mv, MV, atol=1e-6)


def test_what_is_no_record_is_one_line(tmp_path):
    refuses(tmp_path / "ecg.edf", "there is no such file")
    refuses(tmp_path / "ecg", "there is no ecg.hea")
    refuses(tmp_path, "got a folder")
    (tmp_path / "letter.docx").write_bytes(b"Dear colleague")
    refuses(tmp_path / "letter.docx", *(each.name for each in FORMATS))
    assert record_files(tmp_path / "ecg.edf") == [tmp_path / "ecg.edf"]


@pytest.mark.parametrize("suffix", sorted({suffix for each in FORMATS for suffix in each.suffixes}))
@pytest.mark.parametrize("content", [b"", b"\0" * 600, bytes(range(256)) * 4, b"<a>" * 50, b"1,2\n3,4\n"])
def test_nonsense_under_any_suffix_is_one_line(tmp_path, suffix, content):
    (tmp_path / f"ecg{suffix}").write_bytes(content)
    refuses(tmp_path / f"ecg{suffix}", "ecg")
