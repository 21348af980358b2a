"""Report metrics by values worked out by hand."""

import math

import pytest

from ecgot.eval.text_metrics import DIALECT, report_metrics

NAMES = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l"}
NAMES |= {"label_f1_superclass", "label_f1_rhythm"}
REPORT = "sinus rhythm. left axis deviation. otherwise normal ecg."


def test_a_perfect_report():
    metrics = report_metrics([REPORT.upper()], [REPORT])
    assert metrics.keys() == NAMES
    for name in NAMES - {"meteor"}:
        assert metrics[name] == pytest.approx(1.0)
    # METEOR's penalty for chunks, 0.5 (chunks / words)^3, stays even where all words match.
    assert metrics["meteor"] == pytest.approx(1 - 0.5 / 8**3)


def test_a_report_without_a_common_word():
    metrics = report_metrics(["atrial fibrillation"], ["sinus bradycardia"])
    assert metrics["meteor"] == metrics["rouge_1"] == metrics["rouge_l"] == 0
    assert metrics["bleu_1"] == metrics["bleu_4"] == 0  # smoothing is for longer runs of words


def test_bleu_is_of_the_corpus_and_punishes_short_hypotheses_alone():
    short, long = "sinus rhythm normal ecg", "sinus rhythm normal ecg left axis deviation seen"
    metrics = report_metrics([short], [long])
    assert metrics["bleu_1"] == pytest.approx(math.exp(1 - 8 / 4))  # all words right, half the length
    assert report_metrics([long], [short])["bleu_1"] == pytest.approx(4 / 8)
    both = report_metrics([short, long], [long, short])
    assert both["bleu_1"] == pytest.approx(8 / 12)  # the lengths of the corpus agree


def test_rouge_l_counts_the_longest_common_subsequence():
    metrics = report_metrics(["a b c d"], ["a c d b x"])
    precision, recall = 3 / 4, 3 / 5  # a c d
    assert metrics["rouge_l"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert metrics["rouge_1"] == pytest.approx(2 * 1.0 * 0.8 / 1.8)


def test_meteor_matches_stems_and_prefers_recall():
    assert report_metrics(["extrasystoles"], ["extrasystole"])["meteor"] == pytest.approx(0.5)
    # Two of four words, one chunk: F = 10 P R / (R + 9 P), penalty 0.5 (1 / 2)^3.
    missing = report_metrics(["sinus rhythm"], ["sinus rhythm left axis"])["meteor"]
    assert missing == pytest.approx(10 * 0.5 / (0.5 + 9) * (1 - 0.5 / 8))
    extra = report_metrics(["sinus rhythm left axis"], ["sinus rhythm"])["meteor"]
    assert extra == pytest.approx(10 * 0.5 / (1 + 9 * 0.5) * (1 - 0.5 / 8))


def test_an_empty_report_counts_as_nothing_and_breaks_nothing():
    metrics = report_metrics(["", REPORT], [REPORT, REPORT])
    assert metrics["rouge_l"] == pytest.approx(0.5)
    assert 0 < metrics["bleu_1"] < 1


def test_unequal_numbers_are_an_error():
    with pytest.raises(ValueError, match=r"hypotheses: expected 2, .* got 1"):
        report_metrics([REPORT], [REPORT, REPORT])
    with pytest.raises(ValueError, match="references: expected at least 1"):
        report_metrics([], [])


def test_every_metric_has_its_dialect():
    told = {name: [kind for kind in DIALECT if name.startswith(kind)] for name in NAMES}
    assert all(len(kinds) == 1 for kinds in told.values()), told
    assert {kinds[0] for kinds in told.values()} == DIALECT.keys()
    assert "nrefs:1|case:lc|eff:no|tok:13a|smooth:exp" in DIALECT["bleu"]
