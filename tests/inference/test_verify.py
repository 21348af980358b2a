"""Contradictions are found, named in words, and gone once a report is resolved."""

import pytest

from ecgot.data.measurements import Measurements
from ecgot.inference.verify import LIMITS, NAMES, contradictions, resolve
from ecgot.text.labels import label_groups

NORMAL = Measurements((0.5, 1.3), 72.0, 0.03, 160.0, 90.0, 380.0, 400.0, 40.0, 0)


def measured(**values: object) -> Measurements:
    return Measurements(**{**vars(NORMAL), **values})  # type: ignore[arg-type]


def reasons(
    sentences: list[str], measurements: Measurements | None, probabilities=None, **options
) -> list[str]:
    return [each.reason for each in contradictions(sentences, measurements, probabilities or {}, **options)]


@pytest.mark.parametrize(
    ("sentence", "measurements", "reason"),
    [
        ("sinus bradycardia", NORMAL, "says bradycardia; measured 72/min"),
        ("sinus tachycardia", NORMAL, "says tachycardia; measured 72/min"),
        (
            "sinus rhythm",
            measured(heart_rate_bpm=48.0),
            "says sinus rhythm, neither slow nor fast; measured 48/min",
        ),
        (
            "sinus rhythm",
            measured(heart_rate_bpm=120.0),
            "says sinus rhythm, neither slow nor fast; measured 120/min",
        ),
        ("first degree av block", NORMAL, "says long PR; measured 160 ms"),
        ("prolonged pr interval", NORMAL, "says long PR; measured 160 ms"),
        ("prolonged qt", NORMAL, "says prolonged QT; measured QTc 400 ms"),
        ("left bundle branch block", NORMAL, "says bundle branch block; measured QRS 90 ms"),
        ("left axis deviation", NORMAL, "says left axis deviation; measured 40°"),
        ("left anterior fascicular block", NORMAL, "says left anterior fascicular block; measured 40°"),
        ("normal axis", measured(axis_deg=-60.0), "says normal axis; measured -60°"),
        ("atrial fibrillation", NORMAL, "says atrial fibrillation; measured RR varies by 3%"),
        (
            "atrial fibrillation",
            measured(rr_variation=0.2),
            "says atrial fibrillation; P waves precede the beats by 160 ms",
        ),
        ("normal ecg", measured(qrs_ms=150.0), "says normal ECG; measured QRS 150 ms"),
        ("sinus rhythm", measured(pacing_spikes=11), "says sinus rhythm; 11 pacing spikes"),
    ],
)
def test_measurements_contradict(sentence: str, measurements: Measurements, reason: str) -> None:
    assert reasons([sentence], measurements) == [reason]


@pytest.mark.parametrize(
    ("sentence", "measurements"),
    [
        ("sinus rhythm", NORMAL),
        ("sinus bradycardia", measured(heart_rate_bpm=50.0)),
        ("sinus rhythm with bradycardia", measured(heart_rate_bpm=50.0)),
        ("supraventricular tachycardia", NORMAL),
        ("first degree av block", measured(pr_ms=230.0)),
        ("first degree av block", measured(pr_ms=None)),
        ("incomplete right bundle branch block", NORMAL),
        ("left axis", measured(axis_deg=-20.0)),
        ("otherwise normal ecg", measured(qrs_ms=150.0)),
        ("atrial fibrillation", measured(rr_variation=0.2, pr_ms=None)),
        ("left bundle branch block", None),
        ("inferior myocardial infarction", NORMAL),
    ],
)
def test_what_holds_is_not_contradicted(sentence: str, measurements: Measurements | None) -> None:
    assert reasons([sentence], measurements) == []


def test_probabilities_contradict() -> None:
    probabilities = {"superclass": {"CD": 0.83, "MI": 0.02}, "rhythm": {"AFIB": 0.9, "SR": 0.4}}
    said = ["normal ecg", "sinus rhythm", "inferior myocardial infarction", "otherwise normal ecg"]
    assert reasons(said, None, probabilities) == [
        "says normal ECG; a conduction disturbance has a probability of 83%",
        "says sinus rhythm; atrial fibrillation has a probability of 90%",
        "says myocardial infarction; its probability is 2%",
    ]


def test_sentences_contradict_each_other() -> None:
    assert reasons(["normal ecg", "left bundle branch block"], None) == [
        'says normal ECG beside "left bundle branch block"'
    ]
    assert reasons(["sinus rhythm", "atrial fibrillation"], None) == [
        'says sinus rhythm beside "atrial fibrillation"'
    ]
    assert reasons(["normal ecg", "no left bundle branch block"], None) == []


def resolved(sentences: list[str], measurements: Measurements | None, probabilities=None) -> list[str | None]:
    return [each.sentence for each in resolve(sentences, measurements, probabilities or {})]


def test_rhythm_and_axis_are_said_anew() -> None:
    slow = measured(heart_rate_bpm=48.0, axis_deg=-50.0)
    assert resolved(["sinus rhythm", "normal axis"], slow) == ["sinus bradycardia", "left axis deviation"]
    assert resolved(["sinus bradycardia"], NORMAL) == ["sinus rhythm"]
    assert resolved(["sinus rhythm"], measured(heart_rate_bpm=110.0)) == ["sinus tachycardia"]
    assert resolved(["sinus rhythm"], measured(pacing_spikes=9)) == ["pacemaker rhythm"]
    assert resolved(["sinus rhythm"], NORMAL, {"rhythm": {"PACE": 0.8}}) == ["pacemaker rhythm"]
    assert resolved(["atrial fibrillation"], NORMAL, {"rhythm": {"SR": 0.9}}) == ["sinus rhythm"]


def test_other_contradicted_sentences_are_left_out() -> None:
    said = ["sinus rhythm", "first degree av block", "left bundle branch block", "abnormal qrs"]
    found = resolve(said, NORMAL, {})
    assert [each.sentence for each in found] == ["sinus rhythm", None, None, "abnormal qrs"]
    assert [each.said for each in found] == said
    assert [each.reason is None for each in found] == [True, False, False, True]


def test_a_sentence_is_not_said_twice() -> None:
    assert resolved(["sinus rhythm", "sinus bradycardia"], NORMAL) == ["sinus rhythm", None]


@pytest.mark.parametrize("rate_bpm", [45.0, 75.0, 120.0])
@pytest.mark.parametrize("axis_deg", [-150.0, -50.0, -10.0, 60.0, 120.0])
@pytest.mark.parametrize("rhythm", [{}, {"AFIB": 0.9}, {"PACE": 0.9}, {"SR": 0.01}])
def test_a_resolved_report_has_no_contradiction(
    rate_bpm: float, axis_deg: float, rhythm: dict[str, float]
) -> None:
    measurements = measured(heart_rate_bpm=rate_bpm, axis_deg=axis_deg)
    probabilities = {"rhythm": rhythm, "superclass": {"MI": 0.9, "NORM": 0.01}}
    said = ["sinus rhythm", "atrial fibrillation", "normal axis", "left axis", "normal ecg", "prolonged qt"]
    kept = [each.sentence for each in resolve(said, measurements, probabilities) if each.sentence is not None]
    assert contradictions(kept, measurements, probabilities) == ()


def test_every_class_has_a_name_and_every_limit_a_measure() -> None:
    assert {name for names in label_groups().values() for name in names} <= NAMES.keys()
    assert {limit.measure for limit in LIMITS} <= vars(NORMAL).keys()
