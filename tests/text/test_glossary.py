"""Reports in plain English."""

import re
from collections import Counter

import pytest

from ecgot.data.dataset import load_dataset
from ecgot.data.ptbxl import read_table
from ecgot.text.glossary import plain_english


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
        # half-translated by a machine
        ("sinusrhythm lagetyp normal normal ekg", "sinus rhythm. normal axis. normal ecg"),
        (
            "sinus rhythm position type normal otherwise normal ekg",
            "sinus rhythm. normal axis. otherwise normal ecg",
        ),
        (
            "left sinus tachycardia unspecific abnormal t",
            "sinus tachycardia. left axis. non-specific t abnormality",
        ),
        (
            "tachycardial atrial fibrillation hyperturned left type qrs (t) abnormal inferior infarct "
            "old unconfirmed",
            "atrial fibrillation with rapid ventricular response. left axis deviation. abnormal qrs. "
            "inferior myocardial infarction age undetermined",
        ),
        (
            "sinus rhythm r-s # transition in v leads shifted to the right",
            "sinus rhythm. r-s transition displaced to the right",
        ),
        ("position type considering the age normal qt extension", "normal axis for age. prolonged qt"),
        # German
        (
            "sinusrhythmus r-s übergang in v ableitungen nach links verschoben linksanteriorer hemiblock",
            "sinus rhythm. r-s transition displaced to the left. left anterior fascicular block",
        ),
        (
            "sinusrhythmus schenkelblock partiell rechts grenzbefund",
            "sinus rhythm. incomplete right bundle branch block. borderline ecg",
        ),
        (
            "sinusrhythmus llt q in iii,avf t flach in v1 - v3 ekg pathologisch",
            "sinus rhythm. left axis. q in iii, avf. flat t in v1-3. abnormal ecg",
        ),
        (
            "regelmässiger rhythmus, keine p-welle erkannt rechtstyp",
            "regular rhythm, no p wave found. right axis",
        ),
        ("normokardes vorhofflimmern", "atrial fibrillation with controlled ventricular response"),
        (
            "st & t abnormal, wahrscheinlich anterolaterale ischämie oder linksbelastung",
            "abnormal st and t. probably anterolateral ischemia or left strain",
        ),
        (
            "qrs(t) abnorm hochlateraler myokardschaden nicht auszuschliessen",
            "abnormal qrs. high lateral myocardial damage cannot be excluded",
        ),
        (
            "unspezifisch abnormes st-t (hebung) sonst normales ekg",
            "non-specific st-t abnormality (elevation). otherwise normal ecg",
        ),
        (
            "interponierte ventrikuläre extrasystole(n), bigeminus",
            "interposed premature ventricular contractions, bigeminy",
        ),
        # a denial, a hedge and a number stay with what they are about
        ("sinusrhythmus nicht pathologisch", "sinus rhythm. no pathology"),
        ("linker vorhof normal", "linker vorhof normal"),
        ("vorhofflimmern möglich", "atrial fibrillation possible"),
        ("vorhofflimmern nicht mehr nachweisbar", "atrial fibrillation no longer present"),
        ("vorhofsueberlastung links moeglich pathologisch", "left atrial enlargement possible. abnormal ecg"),
        (
            "infarct of uncertain age cannot be excluded",
            "myocardial infarction age undetermined cannot be excluded",
        ),
        ("av block 3:1. av block ii-iii", "av block 3:1. av block ii-iii"),
        ("sinus tachycardia atrial fibrillation", "sinus tachycardia. atrial fibrillation"),
        ("q in v5. 2 ves", "q in v5. 2 premature ventricular contractions"),
        ("wandernder schrittmacher rhythmus", "wandering pacemaker"),
        # Swedish
        (
            "sinusrytm p förlängd extrem vänster el-axel avvikande qrs(t) förlopp",
            "sinus rhythm. broad p wave. left axis deviation. abnormal qrs",
        ),
        (
            "sinusrytm låga qrs amplituder i extremitetsavledningarna ospecifik t-förändring",
            "sinus rhythm. low voltage in limb leads. non-specific t changes",
        ),
        (
            "st-t sänkning, såsom vid hög lateral ischemi eller vänster belastning",
            "st-t depression as in high lateral ischemia or left strain",
        ),
        ("förmaksflimmer med hög kammarfrekvens", "atrial fibrillation with rapid ventricular response"),
        # English keeps its words, hedges and places
        (
            "t wave changes in v2-4 consistent with anterior ischaemia",
            "t wave changes in v2-4 consistent with anterior ischemia",
        ),
        ("widespread non-specific st-t abnormality", "widespread non-specific st-t abnormality"),
        ("probable left atrial enlargement", "probable left atrial enlargement"),
        ("slightly prolonged qt", "slightly prolonged qt"),
        (
            "premature ventricular contraction(s). sinus rhythm",
            "premature ventricular contractions. sinus rhythm",
        ),
        ("ves sinus rhythm", "premature ventricular contractions. sinus rhythm"),
        ("sinus rhythm left axis otherwise normal ecg", "sinus rhythm. left axis. otherwise normal ecg"),
        (
            "in the presence of lbbb, ischaemia is not excluded",
            "in the presence of left bundle branch block, ischemia is not excluded",
        ),
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
