"""Reading records of every kind with the packaged model: one, many, long, short, damaged, refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb

import ecgot
from ecgot.data.formats import ArraySource
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.ptbxl import read_table
from ecgot.data.quality import Quality, assess
from ecgot.data.record import prepare, read_record
from ecgot.data.synth import simulate
from ecgot.errors import EcgotError
from ecgot.inference.judgement import lacking
from ecgot.inference.reader import EcgReader
from ecgot.inference.reading import Reading, ReadingError
from ecgot.inference.zeroshot import class_scores

FS_HZ = 100.0


@pytest.fixture(scope="module")
def reader() -> EcgReader:
    return EcgReader.from_pretrained(num_beams=1)


@pytest.fixture(scope="module")
def records(few: Path) -> list[Path]:
    """Synthetic records that look like ECGs to the rules, which not all simulated hearts do."""
    paths = [few / path for path in read_table(few).record_paths[:40]]
    good = [
        path for path in paths if assess(read_record(path).signal_mv, FS_HZ, STANDARD_LEADS).verdict == "good"
    ]
    assert len(good) > 20
    return good


@pytest.fixture(scope="module")
def record(records: list[Path]) -> Path:
    return records[0]


def test_the_fused_copy_reads_and_not_the_model_s_encoder(reader, record, monkeypatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the encoder whose norms are not fused was asked")

    monkeypatch.setattr(reader.scorer.model.encoder, "forward", refuse)
    assert reader(record).report


def test_a_short_record_is_read_without_its_padding(reader, record) -> None:
    signal = read_record(record).signal_mv[:, :600]
    reading = reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert any("6 s, shorter than the 10 s" in note for note in reading.notes)
    with torch.no_grad():
        alone = reader.scorer.model.embed_ecg(torch.from_numpy(reading.signal.signal_mv)[None])
        expected = class_scores(alone, reader.scorer.prompts, score=reader.scorer.score)
    assert reading.signal.signal_mv.shape == (12, 600)
    for group, scores in reading.scores.items():
        np.testing.assert_allclose(list(scores.values()), expected[group][0].numpy(), atol=1e-3)


def test_paths_arrays_and_wfdb_records_read_the_same(reader, record) -> None:
    array = read_record(record).signal_mv
    readings = [
        reader(record),
        reader(str(record)),
        reader(array, fs_hz=FS_HZ, leads=STANDARD_LEADS),
        reader(array.T, fs_hz=FS_HZ, leads=STANDARD_LEADS),
        reader(torch.from_numpy(array), fs_hz=FS_HZ, leads=STANDARD_LEADS),
        reader(wfdb.rdrecord(str(record))),
        *reader(array[None], fs_hz=FS_HZ, leads=STANDARD_LEADS),
    ]
    for reading in readings[1:]:
        assert reading.report == readings[0].report
        for group, scores in reading.scores.items():
            assert scores == pytest.approx(readings[0].scores[group], abs=2e-2)


def test_a_list_keeps_its_order_and_a_bad_record_is_an_item(reader, records, tmp_path) -> None:
    paths = records[:3]
    (tmp_path / "broken.hea").write_text("broken 12 100\n")
    found = reader([paths[0], tmp_path / "absent", paths[1], tmp_path / "broken", paths[2]], recorder=None)
    assert [isinstance(each, Reading) for each in found] == [True, False, True, False, True]
    assert [each.record for each in found if isinstance(each, Reading)] == list(map(str, paths))
    assert "absent" in found[1].reason
    for path, each in zip(paths, found[::2], strict=True):
        alone = reader(path)
        assert each.report == alone.report
        for group, scores in alone.scores.items():
            assert each.scores[group] == pytest.approx(scores, abs=1e-3)
    with pytest.raises(EcgotError, match="absent"):
        reader(tmp_path / "absent")
    assert reader([]) == []


def test_a_parser_that_fails_in_its_own_way_is_an_item_too(reader, record, monkeypatch) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise KeyError("deep inside")

    monkeypatch.setattr("ecgot.inference.reader.load", fail)
    (found,) = reader([record])
    assert isinstance(found, ReadingError)
    assert "deep inside" in found.reason


def test_of_a_long_record_the_strongest_window_is_shown(reader) -> None:
    normal, block = _with_codes("NORM"), _with_codes("CLBBB")
    reading = reader(np.concatenate([normal, block, normal], 1), fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert [window.start_s for window in reading.windows] == [0.0, 10.0, 20.0]
    weights = [window.weight for window in reading.windows]
    assert reading.shown == weights.index(max(weights)) == 1
    assert reading.signal.start_s == 10.0
    alone = reader(block, fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert alone.window.stated[0].code == reading.window.stated[0].code
    part = reader(
        np.concatenate([normal, block], 1), fs_hz=FS_HZ, leads=STANDARD_LEADS, start_s=10.0, window_s=10.0
    )
    assert [window.start_s for window in part.windows] == [10.0]
    assert "at 10 s" in repr(reading)


def _with_codes(code: str) -> np.ndarray:
    for seed in range(200):
        ecg = simulate(np.random.default_rng([7, seed]))
        verdict = assess(ecg.signal_mv, FS_HZ, STANDARD_LEADS).verdict
        if code in ecg.codes and verdict == "good":
            return ecg.signal_mv
    raise AssertionError(f"no simulated heart has {code}")


def test_what_is_refused_says_nothing_unless_forced(reader) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, (12, 1000))
    reading = reader(noise, fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert reading.refused
    assert reading.report is None
    assert reading.findings == ()
    assert reading.quality.verdict == "refused"
    assert "not read" in repr(reading)
    forced = reader(noise, fs_hz=FS_HZ, leads=STANDARD_LEADS, force=True)
    assert forced.findings
    assert forced.report is not None


def test_nothing_is_said_of_leads_that_are_not_there(reader) -> None:
    signal = _with_codes("CLBBB").copy()
    assert reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS).finding("CD").stated
    signal[6:] = 0
    reading = reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert reading.finding("CD").stated is None
    assert reading.finding("sinus rhythm").stated is not None
    assert any("chest lead" in note for note in reading.notes)
    assert "bundle" not in reading.report


def test_evidence_is_of_the_window_that_is_shown(reader, record) -> None:
    reading = reader(record)
    finding = reading.window.stated[0]
    found = reading.evidence(finding.name)
    assert found.grid.shape == (12, len(found.by_time))
    assert found.times_s[0] == 0
    assert found.times_s[-1] == pytest.approx(10.0)
    with pytest.raises(EcgotError, match="expected one of"):
        reading.evidence("banana")


def test_a_reading_is_plain_values_and_a_page(reader, record) -> None:
    reading = reader(record)
    values = json.loads(json.dumps(reading.to_dict()))
    assert values["report"] == reading.report
    assert len(values["findings"]) == len(reading.findings)
    named = [each for each in reading.sentences if each.finding_probability is not None]
    assert named
    assert {each.finding_probability for each in named} <= {each.probability for each in reading.findings}
    assert "not a medical device" in values["notice"]
    assert reading.to_html().startswith("<!DOCTYPE html>")


def test_embeddings_are_of_unit_length_and_those_of_one(reader, records) -> None:
    paths = records[:2]
    both = reader.embed(paths)
    torch.testing.assert_close(both.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(reader.embed(paths[1]), both[1], atol=1e-4, rtol=0)


def test_saved_and_loaded_it_reads_the_same(reader, record, tmp_path) -> None:
    reader.save_pretrained(tmp_path / "copy")
    copy = EcgReader.from_pretrained(tmp_path / "copy", num_beams=1)
    assert copy(record).to_dict() == reader(record).to_dict()
    with pytest.raises(EcgotError, match="expected a new folder"):
        reader.save_pretrained(tmp_path / "copy")


def test_bad_requests(reader, record) -> None:
    signal = _with_codes("NORM")
    with pytest.raises(EcgotError, match="expected fs_hz and leads"):
        reader(signal)
    with pytest.raises(EcgotError, match="expected a path, an array"):
        reader(None)
    with pytest.raises(EcgotError, match="start: expected"):
        reader(record, start_s=11.0)
    with pytest.raises(EcgotError, match="window: expected"):
        reader(record, window_s=0.0)
    assert ecgot.EcgReader is EcgReader


@pytest.mark.parametrize("lead", [0, 6])
def test_nothing_is_said_of_the_axis_by_one_lead(reader, records, lead) -> None:
    for path in records[:4]:
        signal = read_record(path).signal_mv[lead : lead + 1]
        reading = reader(signal, fs_hz=FS_HZ, leads=[STANDARD_LEADS[lead]])
        assert "axis" in reading.written
        assert "axis" not in reading.report
        assert "limb" not in reading.report


def test_a_tensor_of_any_kind_and_an_array_of_one_lead_are_one_record(reader, record) -> None:
    signal = read_record(record).signal_mv
    plain = reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS, report=False)
    learnt = torch.tensor(signal, requires_grad=True)
    assert reader(learnt, fs_hz=FS_HZ, leads=STANDARD_LEADS, report=False).scores == plain.scores
    assert reader(learnt.bfloat16(), fs_hz=FS_HZ, leads=STANDARD_LEADS, report=False).findings
    one = reader(signal[1], fs_hz=FS_HZ, leads=["II"], report=False)
    assert one.scores == reader(signal[1:2], fs_hz=FS_HZ, leads=["II"], report=False).scores
    for nothing in (None, 5):
        with pytest.raises(EcgotError, match="records: expected"):
            reader(nothing)


def test_voltages_beyond_all_bounds_are_refused_and_make_no_nan(reader, record) -> None:
    signal = read_record(record).signal_mv.astype(np.float64) * 1e30
    assert reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS).refused
    with pytest.raises(EcgotError, match="far larger"):
        reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS, force=True)


@pytest.mark.parametrize(("seconds", "rest"), [(9.99, None), (10.01, None), (12.4, "2.4"), (12.6, None)])
def test_an_end_that_is_not_read_is_named(reader, record, seconds, rest) -> None:
    signal = np.tile(read_record(record).signal_mv, 2)[:, : round(seconds * FS_HZ)]
    notes = reader(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS, report=False).notes
    assert [note for note in notes if "not read" in note] == (
        [f"the last {rest} s are not read"] if rest else []
    )


def test_similarities_are_no_probabilities_and_state_nothing(record) -> None:
    reading = EcgReader.from_pretrained(score="cosine")(record, report=False)
    assert {finding.stated for finding in reading.findings} == {None}
    assert any("no probabilities" in note for note in reading.notes)


def test_only_one_record_is_classified(reader, record) -> None:
    with pytest.raises(EcgotError, match="expected one record"):
        reader.classify([record], ["sinus rhythm"])


def test_a_normal_ecg_is_undecided_beside_a_disease_and_everything_is_where_forced(reader) -> None:
    reading = reader(_with_codes("CLBBB"), fs_hz=FS_HZ, leads=STANDARD_LEADS)
    assert reading.finding("CD").stated
    assert reading.finding("NORM").stated is None
    noise = np.random.default_rng(0).normal(0, 0.3, (12, 1000))
    forced = reader(noise, fs_hz=FS_HZ, leads=STANDARD_LEADS, force=True)
    assert {(each.stated, each.low, each.high) for each in forced.findings} == {(None, 0.0, 1.0)}


@pytest.mark.parametrize(
    ("leads", "expected"),
    [
        (("V1",), {"chest", "limb"}),
        (("V1", "V2"), {"chest", "limb"}),
        (("V1", "V2", "V5"), {"limb"}),
        (("I", "V1"), {"chest", "limb"}),
        (("I", "II", "V1"), set()),
        (("I", "II"), {"chest"}),
        (STANDARD_LEADS, set()),
    ],
)
def test_one_chest_lead_is_enough_beside_the_limb_leads_alone(leads, expected) -> None:
    rows = [STANDARD_LEADS.index(lead) for lead in leads]
    source = ArraySource(_with_codes("CLBBB")[rows], fs_hz=FS_HZ, leads=leads)
    record = prepare(source, missing_leads="estimate")
    assert lacking(record, Quality("good", (), ())) == expected


class Torn:
    """A source whose signal cannot be read from its 12th second on."""

    name, fs_hz, leads, calibrated, notes = "torn", FS_HZ, STANDARD_LEADS, True, ()

    def __init__(self, signal: np.ndarray) -> None:
        self.signal, self.samples, self.damaged = signal, signal.shape[1], dict[str, str]()

    def read(self, start: int, stop: int) -> np.ndarray:
        if stop > 12 * FS_HZ:
            raise EcgotError("record torn: its signals cannot be read")
        return self.signal[:, start:stop].astype(np.float64)


def test_what_was_read_before_a_record_breaks_off_is_kept(reader, monkeypatch) -> None:
    monkeypatch.setattr("ecgot.inference.stretches.prepare", _without_margin)
    monkeypatch.setattr("ecgot.inference.reader.prepare", _without_margin)
    reading = reader(Torn(np.tile(_with_codes("CLBBB"), 3)))
    assert [window.start_s for window in reading.windows] == [0.0]
    assert reading.finding("CD").stated
    assert any("not read to the end" in note and "cannot be read" in note for note in reading.notes)
    with pytest.raises(EcgotError, match="cannot be read"):
        reader(Torn(np.tile(_with_codes("CLBBB"), 3)), start_s=10.0)


def _without_margin(source, start_s, window_s, **settings):
    """A stretch read alone: the real one reads what lies around it too."""
    first = round(start_s * FS_HZ)
    signal = source.read(first, first + round(window_s * FS_HZ))
    return prepare(ArraySource(signal, fs_hz=FS_HZ, leads=STANDARD_LEADS), **settings)


def test_what_cannot_be_measured_does_not_end_a_reading(reader, record, monkeypatch) -> None:
    def fail(*_arguments: object) -> None:
        raise ValueError("no beat")

    monkeypatch.setattr("ecgot.inference.reader.measure", fail)
    (reading,) = reader([record])
    assert reading.measurements is None
    assert reading.report
