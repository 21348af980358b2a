"""Phrases of reports."""

import pytest
import torch

from ecgot.errors import EcgotError
from ecgot.models.losses import phrase_loss
from ecgot.models.scores import phrase_logits
from ecgot.text.phrases import find_phrases
from ecgot.train.align import PhraseSource

REPORTS = (
    "sinus rhythm. left axis deviation",
    "sinus rhythm. normal ecg",
    "sinus tachycardia. normal ecg",
    "atrial fibrillation. left bundle branch block",
    "",
)


def test_phrases_are_runs_of_words_within_a_statement():
    phrases = find_phrases(REPORTS, min_count=1, max_words=3)
    for said in ("sinus rhythm", "left axis deviation", "normal ecg", "left", "sinus"):
        assert said in phrases.texts
    for not_said in ("rhythm left", "rhythm. left", "fibrillation left", "left bundle branch"):
        assert not_said not in phrases.texts
    assert "left bundle branch block" in phrases.texts  # a whole statement, however long


def test_rows_say_what_their_report_says():
    phrases = find_phrases(REPORTS, min_count=2, max_words=3)
    assert phrases.texts == ("left", "normal ecg", "sinus", "sinus rhythm")  # of equal ones the longest
    said = PhraseSource(phrases, torch.zeros(4, 2), torch.device("cpu")).batch(torch.tensor([1, 3, 4])).said
    assert said.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert said.dtype == torch.float32


def test_joining_words_and_numbers_are_no_phrases():
    reports = ["st and t changes in the v1 4.46 lead", "old or new infarction of the wall"]
    texts = find_phrases(reports, min_count=1, max_words=3).texts
    assert "t changes in" not in texts
    assert "and t changes" not in texts
    assert "wall" in " ".join(texts)
    assert not any(text.split()[-1] in ("the", "of", "in", "and") for text in texts)
    assert not any(text == "v1" or text == "t" for text in texts)


def test_knowing_the_shares_alone_costs_one():
    phrases = find_phrases(REPORTS, min_count=1, max_words=3)
    said = torch.from_numpy(phrases.said.toarray())
    share = said.mean(0)
    logits = torch.logit(share).expand_as(said)
    torch.testing.assert_close(phrase_loss(logits, said, phrases.weight), torch.tensor(1.0))
    assert phrase_loss(100 * (said - 0.5), said, phrases.weight) < 1e-6


def test_logits_are_scaled_similarities_and_a_prior():
    generator = torch.Generator().manual_seed(0)
    ecg, phrases, prior = (torch.randn(size, generator=generator) for size in ((2, 5), (3, 5), (3,)))
    logits = phrase_logits(ecg, phrases, prior, torch.tensor(4.0))
    for b in range(2):
        for k in range(3):
            torch.testing.assert_close(logits[b, k], 4 * (ecg[b] * phrases[k]).sum() + prior[k])


def test_too_few_reports_are_named():
    with pytest.raises(EcgotError, match=r"phrase_min_count: expected .* of 5 reports reaches, got 9"):
        find_phrases(REPORTS, min_count=9, max_words=3)
