"""The page without a browser: what it says, that nothing from a file becomes markup, and that it is small."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import made_readings as made
import numpy as np
import pytest

from ecgot.inference.display import NOTICE
from ecgot.page.named import named_findings
from ecgot.page.page import clock, facts, frame, page, percent, spans
from ecgot.page.trace import lay_out, svg_path

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"


class Text(HTMLParser):
    """The text of a page without its scripts and styles, and the names of its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: list[str] = []
        self.hidden = False
        self.feed(html)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def data_of(html: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html)
    return json.loads(found)


def test_the_page_says_what_the_reading_says() -> None:
    text = Text(page(made.reading())).text
    assert NOTICE in text
    assert "Research use only: not a medical device." in text
    for part in (
        "made.hea",
        "left bundle branch block CLBBB 87 % 79–93 %, threshold 40 %",
        "Undecided 2 myocardial infarction MI 41 %",
        "Not found 5",
        "right bundle branch block CRBBB < 1 %",
        "bradycardia 31 % Changed: measured 71/min",
        "Heart rate 71 /min",
        "PR not measurable",
        "QT / QTc (Fridericia) 404 / 428 ms",
        "Axis −31 °",
        "Signal: good",
        "baseline removed below 0.3 Hz",
        "25 mm/s 10 mm/mV",
        "worded as for the recorder CS-12",
    ):
        assert part in text, part
    assert "Probabilities are not calibrated" not in text
    assert "Probabilities are not calibrated" in Text(page(made.reading(calibrated=False))).text


def test_what_comes_from_files_stays_text() -> None:
    classes = [
        (each[0], each[1], HOSTILE, *each[3:]) if each[1] == "CLBBB" else each for each in made.CLASSES
    ]
    window = made.window(remarks=(made.Remark("x", "a remark", (HOSTILE,)),), classes=classes)
    html = page(
        made.reading(
            windows=(window,),
            record=HOSTILE,
            notes=(HOSTILE,),
            recorder=HOSTILE,
            sentences=(made.Sentence(HOSTILE, 0.5, HOSTILE),),
            signal=made.record(leads=(HOSTILE, *made.STANDARD_LEADS[1:])),
        )
    )
    parsed = Text(html)
    assert parsed.tags.count("script") == 2
    assert "img" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 7
    assert data_of(html)["findings"]["subclass/CLBBB"]["name"] == HOSTILE


def test_evidence_is_of_what_is_stated_named_and_most_probable() -> None:
    data = data_of(page(made.reading(sentences=(made.Sentence("low voltage in limb leads", 0.5),))))
    stated = {"superclass/CD", "subclass/CLBBB", "form/PVC", "rhythm/SR"}
    assert set(data["findings"]) == stated | {"form/LVOLT", "superclass/MI", "subclass/IMI", "superclass/HYP"}
    assert data["first"] == "form/PVC"  # of what is abnormal, what is read from one place
    found = data["findings"]["form/PVC"]
    assert found["edges"][0] == 0
    assert found["edges"][-1] == 10
    assert list(found["leads"]) == list(made.STANDARD_LEADS)
    grid = np.array(list(found["leads"].values()))
    assert grid.max() == 100
    assert np.unravel_index(grid.argmax(), grid.shape) == (11, made.PREMATURE)
    assert grid.min() == -30
    assert found["peak"] == made.PREMATURE


def test_a_reading_without_its_model_has_a_page_without_evidence() -> None:
    html = page(made.reading(explain=None))
    assert data_of(html)["findings"] == {}
    assert "button data-finding" not in html
    assert "left bundle branch block" in Text(html).text


def test_a_page_is_small_even_at_500_hz() -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (12, 5000))
    signal = made.signal(fs_hz=500.0) + noise.astype(np.float32)
    assert len(page(made.reading(signal=made.record(signal_mv=signal, fs_hz=500.0))).encode()) < 600_000
    assert len(page(made.reading()).encode()) < 200_000


@pytest.mark.parametrize("signal", [made.record(), None], ids=["trace", "no trace"])
def test_a_refused_record_shows_why_and_says_nothing(signal: object) -> None:
    remarks = (made.Remark("noise", "no ECG: looks like white noise"),)
    window = made.window(verdict="refused", remarks=remarks, classes=())
    html = page(made.reading(windows=(window,), sentences=(), measurements=None, signal=signal))
    parsed = Text(html)
    assert "Nothing is said about this record no ECG: looks like white noise" in parsed.text
    assert ('id="lead-0"' in html) == (signal is not None)
    assert "Findings" not in parsed.text
    assert "Report" not in parsed.text


def test_a_forced_reading_says_that_its_signal_was_refused() -> None:
    text = Text(page(made.reading(windows=(made.window(verdict="refused"),)))).text
    assert "Read against the verdict on its signal" in text


def test_windows_that_say_the_same_are_told_together() -> None:
    calm = [each for each in made.CLASSES if each[1] == "SR"]
    refused = made.window(30.0, verdict="refused", classes=())
    windows = (*(made.window(10.0 * n, classes=calm) for n in range(3)), refused, made.window(40.0))
    reading = made.reading(windows=windows, shown=4)
    told = spans(reading)
    assert [(each.start_s, each.stop_s) for each in told] == [(0, 30), (30, 40), (40, 50)]
    assert [each.abnormal for each in told] == [False, False, True]
    text = Text(page(reading)).text
    assert "0 s–30 s good sinus rhythm 93 %" in text
    assert "30 s–40 s refused not read" in text
    assert "40 s–50 s this page good conduction disturbance 91 %, left bundle branch block 87 %" in text
    assert "40 s to 50 s of 50 s" in text


def test_leads_that_were_not_recorded_are_named_and_drawn_differently() -> None:
    record = made.record(derived_leads=("III", "aVR"), estimated_leads=("V2", "V3"), flat_leads=("V2", "V6"))
    window = made.window(unusable=("V1",))
    text = Text(page(made.reading(signal=record, windows=(window,)))).text
    for part in (
        "III derived",
        "aVR derived",
        "V3 estimated",
        "V2 flat, estimated",
        "V6 flat",
        "V1 unusable",
    ):
        assert part in text
    states = {piece.lead: piece.state for piece in lay_out(record, ("V1",)).sheets[0].pieces}
    assert states["III"] == "derived"
    assert states["V2"] == "estimated"  # what is drawn is not flat
    assert states["II"] == ""


def test_the_layout_is_that_of_paper() -> None:
    trace = lay_out(made.record())
    paper, leads = trace.sheets
    assert trace.mm_per_mv == 10
    assert (paper.width, leads.width) == (265, 265)
    assert [piece.lead for piece in paper.pieces] == [
        *("I", "aVR", "V1", "V4", "II", "aVL", "V2", "V5", "III", "aVF", "V3", "V6"),
        "II",
    ]
    chest = paper.pieces[3]
    assert (chest.start_s, chest.stop_s, chest.width) == (7.5, 10, 62.5)
    assert paper.pieces[-1].width == 250
    assert [piece.lead for piece in leads.pieces] == list(made.STANDARD_LEADS)
    assert all(piece.width == 250 for piece in leads.pieces)


@pytest.mark.parametrize(
    ("seconds", "sheets", "quarter_s"), [(4.0, 1, 1.0), (10.0, 1, 2.5), (25.0, 3, 25 / 12)]
)
def test_other_lengths_take_their_own_share_of_paper(seconds: float, sheets: int, quarter_s: float) -> None:
    trace = lay_out(made.record(signal_mv=made.signal(seconds)))
    papers = [sheet for sheet in trace.sheets if sheet.view == "paper"]
    assert len(papers) == sheets
    assert papers[-1].stop_s == pytest.approx(seconds)
    for sheet in papers:
        first = sheet.pieces[0]
        assert first.stop_s - first.start_s == pytest.approx(quarter_s)


def test_a_subset_of_the_leads_is_drawn() -> None:
    few = lay_out(made.record(signal_mv=made.signal()[:2], leads=("V2", "I")))
    assert [piece.lead for piece in few.sheets[0].pieces] == [
        "I",
        "V2",
        "V2",
    ]  # no II: the first is the strip
    own = lay_out(made.record(signal_mv=made.signal()[:1], leads=("X",)))
    assert [sheet.view for sheet in own.sheets] == ["leads"]
    assert page(made.reading(signal=made.record(signal_mv=made.signal()[:1], leads=("X",))))


def test_a_signal_that_would_leave_the_paper_is_reduced() -> None:
    record = made.record(signal_mv=2.5 * made.signal())
    assert lay_out(record).mm_per_mv == 5
    assert "5 mm/mV" in Text(page(made.reading(signal=record))).text


def test_a_path_has_the_samples_where_they_belong() -> None:
    signal = np.random.default_rng(0).normal(size=500)
    numbers = [int(each) for each in re.findall(r"-?\d+", svg_path(signal, 100.0))]
    points = np.cumsum(np.array(numbers).reshape(-1, 2), axis=0) * 0.05
    np.testing.assert_allclose(points[:, 0], np.arange(500) * 0.25, atol=0.026)
    np.testing.assert_allclose(points[:, 1], -10 * signal, atol=0.026)


@pytest.mark.parametrize(
    ("sentence", "codes"),
    [
        ("Sinus rhythm", ["SR"]),
        ("premature ventricular contractions", ["PVC", "PRC(S)"]),
        ("left bundle branch block due to ischaemia", ["CLBBB", "CD"]),
        ("inferior myocardial infarction, probably old", ["IMI", "MI"]),
        ("no left bundle branch block", []),
        ("without evidence of inferior myocardial infarction", []),
        ("banana", []),
    ],
)
def test_a_sentence_names_its_findings(sentence: str, codes: list[str]) -> None:
    beats = ("form", "PRC(S)", "premature beats", 0.99, 0.9, 1.0, 0.5, True)  # more general than PVC
    found = [
        each.code for each in named_findings(sentence, made.window(classes=(*made.CLASSES, beats)).findings)
    ]
    assert found[: len(codes)] == codes
    assert bool(found) == bool(codes)


def test_numbers_are_written_for_people() -> None:
    assert [percent(each) for each in (0.0, 0.001, 0.5, 0.999, 1.0)] == [
        "0 %",
        "< 1 %",
        "50 %",
        "> 99 %",
        "100 %",
    ]
    assert [clock(each) for each in (7.5, 65, 3725)] == ["7.5 s", "1:05", "1:02:05"]
    measured = SimpleNamespace(
        heart_rate_bpm=float("nan"), pr_ms=161.6, qrs_ms=None, qt_ms=400.0, qtc_ms=None, axis_deg=60.0,
        pacing_spikes=9,
    )  # fmt: skip
    assert [fact.value for fact in facts(measured)] == [None, "162", None, "400 / –", "60", "9"]


def test_a_frame_holds_the_whole_page() -> None:
    class Frame(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tag, self.attributes = tag, dict(attrs)

    parsed = Frame()
    parsed.feed(frame(made.reading()))
    assert parsed.tag == "iframe"
    assert parsed.attributes["srcdoc"] == page(made.reading())


def test_the_page_needs_no_torch() -> None:
    code = "import sys, ecgot.page.page, ecgot.page.index, ecgot.page.figure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
