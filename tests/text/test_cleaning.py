"""Report text: boilerplate and label codes go, the reading stays."""

import pandas as pd
import pytest

from ecgot.text.cleaning import clean_report


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("sinus rhythm. normal ecg.", "sinus rhythm. normal ecg."),
        ("Sinus  Rhythm\n normal", "sinus rhythm normal"),
        ("sinusrhythmus normales ekg 4.46 unbestätigter bericht", "sinusrhythmus normales ekg"),
        ("sinus rhythm 4.46   unconfirmed report", "sinus rhythm"),
        ("sinus rhythm unconfirmed report", "sinus rhythm"),
        ("sinus rhythm 4.40 unconfi", "sinus rhythm"),
        ("ischemia or left loading 4.46 not confirmed", "ischemia or left loading"),
        ("abnorm in lateralen ableitungen 4.46 un", "abnorm in lateralen ableitungen"),
        ("prolonged pr interval 0.24 sec.", "prolonged pr interval 0.24 sec."),
        ("sinus rhythm. Edit: IMI 50, NORM 100", "sinus rhythm."),
        ("trace only requested.", ""),
        ("Trace only requested", ""),
        ("trace only.", ""),
        (" -- .", ""),
        ("", ""),
        ("inferior infarct age unconfirmed", "inferior infarct age unconfirmed"),
    ],
)
def test_clean_report(raw, clean):
    assert clean_report(raw) == clean


def test_cleaning_is_idempotent_and_leaves_no_label_code_of_an_annotator(ptbxl):
    english = pd.read_csv(ptbxl / "reports_en.csv", keep_default_na=False)
    original = pd.read_csv(ptbxl / "ptbxl_database.csv", keep_default_na=False)
    for report in [*english["report"], *original["report"]]:
        once = clean_report(report)
        assert clean_report(once) == once
        assert "edit:" not in once
        assert "unconfirmed report" not in once
        assert "bericht" not in once
        assert " 4.46" not in once
