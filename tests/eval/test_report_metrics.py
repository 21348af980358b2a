"""Labels read from reports, baselines, and what sentence scores are worth."""

import dataclasses

import numpy as np
import pytest

from ecgot.data.ptbxl import read_table
from ecgot.eval.report_baselines import BaselineInputs, baseline_reports
from ecgot.eval.report_metrics import measure_reports, sentence_confidence
from ecgot.eval.text_metrics import label_f1, report_statistics
from ecgot.models.writer import WrittenReport
from ecgot.text.labels import label_groups, stated_labels
from ecgot.text.statements import sentences


@pytest.mark.parametrize(
    ("report", "superclasses", "rhythms"),
    [
        ("sinus rhythm. normal ecg.", {"NORM"}, {"SR"}),
        ("sinusrhythmus lagetyp normal normales ekg", {"NORM"}, {"SR"}),
        ("vorhofflimmern linksschenkelblock", {"CD"}, {"AFIB"}),
        ("sinus rhythm. no evidence of infarction. prolonged qt", {"STTC"}, {"SR"}),
        ("sinus bradycardia. possible left atrial enlargement", set(), {"SBRAD"}),
        ("left atrial enlargement. inferior infarction cannot be excluded", {"HYP", "MI"}, set()),
        ("sinus rhythm. abnormal ecg.", set(), {"SR"}),
        ("this is not a normal ecg. t waves are normal. widely spaced beats", set(), set()),
        ("no ecg evidence of left ventricular hypertrophy or recent ischemia", set(), set()),
        ("no signs of old anterior infarction but left bundle branch block", {"CD"}, set()),
        ("atrial fibrillation is ruled out. ischemia no longer present", set(), set()),
        ("old infarction cannot be entirely excluded. no change in t wave inversion", {"MI", "STTC"}, set()),
        ("", set(), set()),
    ],
)
def test_labels_read_from_a_report(report, superclasses, rhythms):
    for group, expected in (("superclass", superclasses), ("rhythm", rhythms)):
        stated = stated_labels([report], group)[0]
        assert {name for name, yes in zip(label_groups()[group], stated, strict=True) if yes} == expected


def test_labels_of_real_references_agree_with_the_codes(ptbxl):
    """The rule, checked where cardiologists' codes stand beside the report."""
    table = read_table(ptbxl)
    reports = np.array(table.reports, dtype=object)
    rows = np.flatnonzero(reports != "")
    for group, least in (("superclass", 0.6), ("rhythm", 0.7)):
        labels = table.labels(group)
        columns = [labels.classes.index(name) for name in label_groups()[group] if name in labels.classes]
        kept = [index for index, name in enumerate(label_groups()[group]) if name in labels.classes]
        stated = stated_labels(list(reports[rows]), group)[:, kept]
        assert label_f1(stated, labels.matrix[rows][:, columns], np.ones(len(rows))) > least


def test_label_f1_by_hand():
    stated = np.array([[True, False, False], [True, True, False]])
    wanted = np.array([[True, False, False], [False, True, False]])
    assert label_f1(stated, wanted, np.ones(2)) == pytest.approx((2 / 3 + 1) / 2)
    assert label_f1(stated, wanted, np.array([1.0, 0.0])) == 1.0  # of the first record alone
    assert np.isnan(label_f1(stated[:, 2:], wanted[:, 2:], np.ones(2)))


def test_weights_count_reports():
    texts = ["sinus rhythm. normal ecg", "atrial fibrillation", "sinus rhythm"]
    wanted = ["sinus rhythm. normal ecg", "atrial fibrillation. left axis", "pacemaker rhythm"]
    twice = report_statistics([*texts, texts[1]], [*wanted, wanted[1]]).metrics()
    assert report_statistics(texts, wanted).metrics(np.array([1.0, 2.0, 1.0])) == pytest.approx(twice)


def test_intervals_shrink_with_patients():
    texts, wanted = ["sinus rhythm. normal ecg", "left axis"] * 20, ["sinus rhythm. normal ecg"] * 40
    statistics = report_statistics(texts, wanted)
    few = statistics.intervals(np.arange(40) % 4, resamples=200)["rouge_l"]
    many = statistics.intervals(np.arange(40), resamples=200)["rouge_l"]
    assert few[0] < many[0] < statistics.metrics()["rouge_l"] < many[1] < few[1]


def test_baselines():
    ill, well = frozenset({"AFIB"}), frozenset({"NORM", "SR"})
    known = BaselineInputs(
        np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]]), [well, ill, ill, well], [""] * 4
    )
    reports = ["normal ecg", "", "left axis", "normal ecg"]
    wanted = BaselineInputs(np.array([[0.1, 3.0], [2.0, 0.1]]), [well, frozenset({"AFIB", "PVC"})], [""] * 2)
    found = baseline_reports(known, reports, wanted)
    assert found is not None
    assert found.nearest == ("left axis", "normal ecg")  # the record without a report is no neighbour
    assert found.most_frequent == "normal ecg"
    assert found.same_codes == (
        "normal ecg",
        "left axis",
    )  # of no other record the codes, so the closest set's
    assert found.same_codes_and_recorder == ()  # no record names its recorder
    assert baseline_reports(known, [""] * 4, wanted) is None


def test_a_recorder_has_its_own_words():
    well, ill = frozenset({"NORM"}), frozenset({"AFIB"})
    codes = [well] * 7 + [ill] * 2
    known = BaselineInputs(np.ones((9, 1)), codes, ["one"] * 4 + ["two"] * 3 + ["two"] * 2)
    reports = ["sinus rhythm normal ecg"] * 4 + ["within normal limits"] * 3 + ["fibrillation"] * 2
    wanted = BaselineInputs(np.ones((5, 1)), [well] * 4 + [ill], ["one", "two", "three", "", "two"])
    found = baseline_reports(known, reports, wanted)
    assert found is not None
    assert found.same_codes_and_recorder == (
        "sinus rhythm normal ecg",
        "within normal limits",
        *["sinus rhythm normal ecg"] * 2,  # of an unknown recorder, or of none, by the codes alone
        "fibrillation",  # and of one with too few
    )
    few = dataclasses.replace(known, recorders=["one"] * 5 + ["two"] * 4)
    found = baseline_reports(few, reports, wanted)
    assert found is not None
    assert found.same_codes_and_recorder[1] == found.same_codes[1] == "sinus rhythm normal ecg"
    measured = measure_reports(
        [WrittenReport("", ())] * 5,
        [*["within normal limits"] * 4, "fibrillation"],
        np.arange(5),
        [""] * 5,
        baselines=found,
        in_plain_english=False,
        resamples=5,
    )
    # Four of five say "sinus rhythm normal ecg": one word of its four, of the reference's three.
    assert measured["same_codes_and_recorder"]["rouge_l"]["value"] == pytest.approx(0.2 + 0.8 * 2 / 7)


def test_a_record_without_codes_is_like_those_without():
    none, well = frozenset[str](), frozenset({"NORM"})
    known = BaselineInputs(np.ones((2, 1)), [well, none], ["", ""])
    found = baseline_reports(known, ["normal ecg", "trace"], BaselineInputs(np.ones((1, 1)), [none], [""]))
    assert found is not None
    assert found.same_codes == ("trace",)


def test_the_typical_report_shares_most_with_the_others():
    reports = ["a b c d e", "a b c d f", "a b c x y", "a b c x y", "q r s t u"]
    same = BaselineInputs(np.ones((5, 1)), [frozenset({"NORM"})] * 5, [""] * 5)
    found = baseline_reports(same, reports, BaselineInputs(np.ones((1, 1)), [frozenset({"NORM"})], [""]))
    # "a b c x y" has itself as a neighbour; were it there once, one of the first two would be most typical.
    assert found is not None
    assert found.same_codes == ("a b c x y",)
    once = BaselineInputs(np.ones((4, 1)), [frozenset({"NORM"})] * 4, [""] * 4)
    single = baseline_reports(
        once, ["a b c x y", *reports[:2], reports[4]], BaselineInputs(np.ones((1, 1)), [frozenset()], [""])
    )
    assert single is not None
    assert single.same_codes == ("a b c d e",)


def test_references_in_plain_english_are_what_is_measured():
    written = [WrittenReport("atrial fibrillation", (("atrial fibrillation", 0.9),))] * 2
    references = ["vorhofflimmern"] * 2
    measured = measure_reports(
        written, references, np.arange(2), [""] * 2, baselines=None, in_plain_english=True, resamples=5
    )
    assert measured["generated"]["rouge_l"]["value"] == pytest.approx(1.0)
    assert measured["generated_as_written"]["rouge_l"]["value"] == 0
    assert measured.keys() == {"generated", "generated_as_written", "shuffled"}


def test_confidence_by_hand():
    written = [WrittenReport("a. b. c", (("a", 0.9), ("b", 0.6), ("c", 0.1)))]
    assert sentences("a. c. ") == ["a", "c"]
    found = sentence_confidence(written, ["a. d."])
    assert found == pytest.approx({"auroc": 1.0, "said": 1 / 3, "said_sure": 1 / 2, "said_unsure": 0.0})
    assert sentence_confidence([WrittenReport("", ())], ["a"]) == {}
