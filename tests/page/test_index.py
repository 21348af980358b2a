"""Rows of the index, from readings and errors."""

from types import SimpleNamespace

import pytest

from ecgot.page.index import Entry, index

FINDINGS = [
    {"code": "SR", "name": "sinus rhythm", "probability": 0.9, "stated": True},
    {"code": "NORM", "name": "normal ECG", "probability": 0.3, "stated": None},
    {"code": "PVC", "name": "premature ventricular beats", "probability": 0.6, "stated": True},
    {"code": "CLBBB", "name": "left bundle branch block", "probability": 0.8, "stated": True},
    {"code": "NST_", "name": "non-specific ST changes", "probability": 0.55, "stated": True},
    {"code": "NST_", "name": "non-specific ST changes", "probability": 0.45, "stated": True},
]
READ = {
    "record": "a",
    "verdict": "good",
    "remarks": [],
    "findings": FINDINGS,
    "measurements": {"heart_rate_bpm": 70.0},
}


def test_a_reading_becomes_a_row() -> None:
    entry = Entry.of(SimpleNamespace(to_dict=lambda: READ), "a.html")
    assert [code for _, code, _ in entry.found] == ["CLBBB", "PVC", "NST_", "SR"]
    assert entry.probability == 0.8
    assert (entry.link, entry.verdict, entry.heart_rate_bpm, entry.problem) == ("a.html", "good", 70.0, "")


def test_a_refused_reading_says_why() -> None:
    refused = READ | {
        "verdict": "refused",
        "remarks": [{"text": "no ECG: noise"}],
        "findings": [],
        "measurements": None,
    }
    entry = Entry.from_dict(refused)
    assert (entry.problem, entry.probability, entry.heart_rate_bpm) == ("no ECG: noise", None, None)


def test_a_record_that_cannot_be_read_is_a_row_too() -> None:
    entry = Entry.of(SimpleNamespace(record="b", reason="record b: there is no b.dat"))
    assert entry == Entry("b", problem="record b: there is no b.dat")
    assert "1 record, 1 of them could not be read" in index([entry])


def test_a_normal_finding_has_no_probability_of_something_abnormal() -> None:
    entry = Entry.from_dict(READ | {"findings": FINDINGS[:2]})
    assert entry.found == (("sinus rhythm", "SR", 0.9),)
    assert entry.probability is None


@pytest.mark.parametrize("hostile", ['"><script>alert(1)</script>', "javascript:alert(1)"])
def test_names_stay_text(hostile: str) -> None:
    html = index([Entry(hostile, hostile, "good", ((hostile, hostile, 0.5),), problem="")])
    assert html.count("<script") == 1
    assert 'href="javascript:' not in html


def test_names_stand_below_their_common_folder() -> None:
    html = index([Entry("/data/ward/a/1.hea", "1.html", "good"), Entry("/data/ward/2.edf", "2.html", "good")])
    assert "2 records in /data/ward" in html
    assert '<a href="1.html">a/1.hea</a>' in html
    assert '<a href="2.html">2.edf</a>' in html
    for names in (("/data/1", "made"), ("/1", "/2"), ("1", "2"), ()):
        apart = index([Entry(name, "x.html", "good") for name in names])
        assert all(f">{name}</a>" in apart for name in names)
