"""What commands print fits 80 columns: no line is longer, and no cell is folded or cut."""

import io
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from ecgot.cli.tables import (
    print_benchmark,
    print_evaluation,
    print_formats,
    print_reading,
    print_scores,
    print_supervised,
)
from ecgot.data.formats import FORMATS
from ecgot.data.measurements import Measurements
from ecgot.data.quality import Quality, Remark
from ecgot.inference.calibration import Finding
from ecgot.inference.reading import Reading, Sentence, Window

NOTHING = Measurements((), None, None, None, None, None, None, None, 0)
SYSTEMS = (
    "generated",
    "generated_recorder_unknown",
    "nearest_neighbour",
    "most_frequent",
    "same_codes",
    "same_codes_and_recorder",
    "generated_as_written",
    "shuffled",
)
METRICS = (
    *("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l"),
    *("label_f1_superclass", "label_f1_rhythm"),
)
GROUPS = ("superclass", "subclass", "form", "rhythm")
PROVIDERS = ("ecgot", "torch", "torch_graph", "pot_sinkhorn_log", "flash_sinkhorn")


def printed(show, *arguments, width: int = 80, **options) -> str:
    """What ``show`` prints on a terminal of this width, without trailing spaces."""
    console = Console(file=io.StringIO(), width=width)
    show(console, *arguments, **options)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    return "\n".join(lines)


def auroc(number: int) -> dict:
    value = 0.9 + number / 1000
    return {"macro": value, "low": value - 0.05, "high": value + 0.05, "records": 2198, "auroc": {"A": 1.0}}


def evaluation() -> dict:
    numbers = iter(range(100, 900))
    reports = {
        system: {
            metric: {"value": number / 1000, "low": number / 1000 - 0.02, "high": number / 1000 + 0.02}
            for metric in METRICS
            for number in [next(numbers)]
        }
        for system in SYSTEMS
    }
    return {
        "folds": [9, 10],
        "records": 2198,
        "score": "best_match",
        "zero_shot": {group: auroc(number) for number, group in enumerate(GROUPS)},
        "probe": {group: auroc(10 + number) for number, group in enumerate(GROUPS)},
        "retrieval": {f"{way}@{k}": 0.5 for way in ("ecg_to_report", "report_to_ecg") for k in (1, 5, 10)},
        "reports": reports,
        "references": 2000,
        "dialect": {"bleu": "corpus BLEU by sacrebleu, " + "whose signature is long, " * 9},
        "examples": [{"ecg_id": 8, "reference": "sinus rhythm. " * 20, "generated": "[normal] ecg"}],
    }


@pytest.mark.parametrize("intervals", [False, True])
@pytest.mark.parametrize("width", [80, 60, 250])
def test_an_evaluation_has_systems_as_rows_and_metrics_as_columns(intervals, width):
    result = evaluation()
    text = printed(print_evaluation, result, intervals=intervals, width=width)
    lines = text.splitlines()
    for system, metrics in result["reports"].items():
        rows = [line for line in lines if line.startswith(system.replace("_", " ") + "  ")]
        cells = " ".join(rows)
        for metric in metrics.values():  # each value stands whole in a row of its system
            shown = f"{metric['value']:.3f}"
            if intervals:
                shown += f" [{metric['low']:.3f}, {metric['high']:.3f}]"
            assert shown in cells
    for header in ("BLEU-1", "BLEU-4", "METEOR", "ROUGE-2", "ROUGE-L", "label F1", "superclass"):
        assert header in text
    assert "zero-shot (best_match)" in text
    assert "linear probe" in text
    assert ("0.900 [0.850, 0.950]" in text) == intervals
    assert ("[95 % interval]" in text) == intervals
    assert "generated: [normal] ecg" in text
    assert "not a medical device" in " ".join(text.split())


def test_a_wide_terminal_gets_one_table_of_reports_and_80_columns_get_two():
    headers = [
        printed(print_evaluation, evaluation(), intervals=False, width=width).count("system  ")
        for width in (250, 80)
    ]
    assert headers == [1, 2]


def test_an_evaluation_of_unknown_values_and_without_reports():
    result = evaluation()
    result["reports"]["shuffled"]["label_f1_rhythm"] = {"value": None, "low": None, "high": None}
    text = printed(print_evaluation, result, intervals=True)
    (row,) = [line for line in text.splitlines() if line.startswith("shuffled") and line.endswith("-")]
    assert row
    bare = result | {"reports": {}, "probe": {}, "retrieval": {}, "examples": []}
    text = printed(print_evaluation, bare, intervals=False)
    assert "linear probe" not in text
    assert "BLEU" not in text


@pytest.mark.parametrize("intervals", [False, True])
def test_a_supervised_evaluation(intervals):
    result = {"encoder": "merl_resnet18", "folds": [10], "records": 2198}
    ranking = {group: auroc(number) for number, group in enumerate(GROUPS)}
    text = printed(print_supervised, result | {"ranking": ranking}, intervals=intervals)
    assert "supervised (merl_resnet18)" in text
    assert ("0.903 [0.853, 0.953]" if intervals else "0.903\n") in text
    assert "not a medical device" in " ".join(text.split())


def reading(**changed) -> Reading:
    finding = Finding("CLBBB", "left bundle branch block", "subclass", 0.87, 0.8, 0.92, 0.4, True)
    unsure = replace(finding, code="PAC", name="premature atrial complexes [2]", probability=0.3, stated=None)
    quality = Quality("doubtful", (Remark("flat", "lead III is flat", ("III",)),), ("III",))
    window = Window(10.0, 20.0, quality, (finding, unsure), {"subclass": {"CLBBB": 1.9, "PAC": -0.8}})
    values = {
        "record": "folder/" * 20 + "record",
        "duration_s": 20.0,
        "windows": (replace(window, start_s=0.0, stop_s=10.0, findings=()), window),
        "shown": 1,
        "report": "sinus rhythm. normal ecg. " * 9,
        "sentences": (
            Sentence("sinus rhythm [1]", 0.91),
            Sentence("normal ecg", 0.3),
            Sentence("sinus bradycardia", None, "measured 40/min"),
        ),
        "written": "sinus rhythm. normal ecg.",
        "measurements": replace(NOTHING, heart_rate_bpm=71.6, qrs_ms=148.0),
        "notes": ("III derived from other leads",),
        "recorder": "AT-6 C 5.5",
        "calibrated": True,
    }
    return Reading(**values | changed)


def test_a_reading():
    text = printed(print_reading, reading())
    assert "an ECG, with reservations" in text
    assert "  lead III is flat\n" in text
    assert "note: III derived from other leads" in text
    assert "shown is the strongest, from 10 to" in text
    assert "       0.0 to     10.0 s  nothing\n" in text
    assert "      10.0 to     20.0 s  left bundle branch block\n" in text
    assert "Found\n   87%   80% to  92%  left bundle branch block (CLBBB)\nUndecided\n" in text
    assert "   30%   80% to  92%  premature atrial complexes [2] (PAC)\n" in text
    assert "measured: heart rate 72 /min, QRS 148 ms" in text
    assert "report in the wording of AT-6 C 5.5: sinus rhythm." in text
    assert "    91%  sinus rhythm [1]\n" in text
    assert "         sinus bradycardia  (measured 40/min)\n" in text
    assert "    30%  normal ecg  (unsure)\n" in text
    assert "not a medical device" in " ".join(text.split())
    untrained = printed(print_reading, reading(report=None, sentences=(), recorder=None, calibrated=False))
    assert "report" not in untrained
    assert "80% to  92%" not in untrained


def test_windows_that_say_the_same_share_a_line():
    shown = reading().window
    nothing = [replace(shown, start_s=at, stop_s=at + 10.0, findings=()) for at in (0.0, 10.0, 30.0)]
    windows = (*nothing[:2], replace(shown, start_s=20.0, stop_s=30.0), nothing[2])
    text = printed(print_reading, reading(windows=windows, shown=2, duration_s=40.0))
    found = ["0.0 to 20.0 s nothing", "20.0 to 30.0 s left bundle branch block", "30.0 to 40.0 s nothing"]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert [
        line for line in lines if " s nothing" in line or line.endswith("s left bundle branch block")
    ] == found


def test_a_finding_of_several_groups_is_listed_once():
    window = reading().window
    same = Finding("NORM", "normal ECG", "superclass", 0.2, 0.1, 0.3, 0.4, None)
    window = replace(window, findings=(same, replace(same, group="subclass")))
    text = printed(print_reading, reading(windows=(window,), shown=0))
    assert text.count("normal ECG (NORM)") == 1


def test_a_refused_reading_says_why_and_nothing_else():
    quality = Quality("refused", (Remark("no_ecg", "no ECG: no QRS complexes that repeat", ()),), ())
    text = printed(
        print_reading,
        reading(windows=(Window(0.0, 10.0, quality),), shown=0, report=None, sentences=(), measurements=None),
    )
    assert "not a usable ECG\n  no ECG: no QRS complexes that repeat\n" in text
    assert "--force" in text
    assert "Findings" not in text
    assert "not a medical device" in " ".join(text.split())


def test_scores_of_texts_the_highest_first():
    lines = printed(print_scores, {"a long text of your own " * 6: -1.5, "sinus rhythm": 2.25}).splitlines()
    assert lines[0] == "sinus rhythm 2.25"
    assert "not a medical device" in " ".join(lines)


def test_formats_fit():
    text = printed(print_formats, FORMATS)
    assert ".hea" in text
    assert "ecgot[formats]" in text


def test_a_benchmark_says_what_was_refused_and_why():
    case = "B=1024 N=10000 M=10000 D=256 eps=0.05 tol=1e-05"
    rows = [
        SimpleNamespace(
            case=case,
            provider=provider,
            refused="",
            median_ms=1234.5 * (1 + number),
            q20_ms=1200.0,
            q80_ms=1345.67,
            value_error=3e-7,
            peak_mb=543.2,
        )
        for number, provider in enumerate(PROVIDERS)
    ]
    refused = SimpleNamespace(case=case, provider="geomloss", refused="value error 1e-01 " * 9)
    text = printed(print_benchmark, [*rows, refused], {"device": "a processor of some name", "torch": "2.9"})
    assert text.startswith(case)
    for provider, ratio in zip(PROVIDERS, ("1.0 x", "2.0 x", "3.0 x", "4.0 x", "5.0 x"), strict=True):
        (row,) = [line for line in text.splitlines() if line.startswith(provider + " ")]
        assert ratio in row
        assert row.endswith("3e-07  543.2")
    assert "geomloss: value error 1e-01" in text
    assert text.endswith("device a processor of some name, torch 2.9")
