"""Reports in plain English."""

import re
from collections import Counter

import pytest

from ecgot.data.dataset import load_dataset
from ecgot.data.glossary import plain_english
from ecgot.data.ptbxl import read_table


@pytest.mark.parametrize(
    ("report", "english"),
    [
        ("sinusrhythmus normales ekg", "sinus rhythm. normal ecg"),
        (
            "sinusrhythmus linkstyp qrs(t) abnormal inferiorer infarkt alter unbest.",
            "sinus rhythm. left axis. abnormal qrs. inferior myocardial infarction age undetermined",
        ),
        ("sinustachykardie. vänster el-axel", "sinus tachycardia. left axis"),
        (
            "sinus rhythm. left type. unspecific abnormal t",
            "sinus rhythm. left axis. non-specific t abnormality",
        ),
        ("vorhofflimmern rechtsschenkelblock", "atrial fibrillation. right bundle branch block"),
        ("unvollständiger rechtsschenkelblock", "incomplete right bundle branch block"),
        ("av-block i. grades", "first degree av block"),
        ("sinus rhythm. normal ecg", "sinus rhythm. normal ecg"),
        ("", ""),
    ],
)
def test_statements_come_out_in_english(report, english):
    assert plain_english(report).rstrip(".") == english


def test_english_is_not_changed_twice():
    for report in (
        "sinus rhythm. voltages are high in chest leads suggesting lvh",
        "left hypertrophy possible",
    ):
        once = plain_english(report)
        assert plain_english(once) == once


def test_little_german_is_left_in_real_reports(ptbxl):
    table = read_table(ptbxl)
    german = re.compile(
        r"\b(?:sinusrhythmus|linkstyp|rechtstyp|lagetyp|infarkt|schenkelblock|normales|sonst)\b"
    )
    left = Counter(bool(german.search(plain_english(text))) for text in table.originals if text)
    before = sum(bool(german.search(text)) for text in table.originals)
    assert before > 0.1 * len(table)
    assert left[True] < 0.01 * len(table)


def test_originals_stand_beside_translations(few, tmp_path):
    ids = read_table(few).ecg_id
    csv = tmp_path / "reports.csv"
    csv.write_text("ecg_id,report\n" + f"{ids[0]},sinus rhythm. translated\n")
    table = read_table(few, reports_csv=csv)
    assert table.reports[0] == "sinus rhythm. translated"
    assert set(table.reports[1:]) == {""}
    assert table.originals == read_table(few).reports
    plain = load_dataset(few, reports_csv=csv, fs_hz=100, cache_dir=tmp_path / "cache").in_plain_english()
    assert plain.reports == tuple(plain_english(text) for text in plain.table.originals)
