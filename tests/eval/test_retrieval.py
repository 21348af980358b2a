"""Recall of reports by ECGs and back, by hand."""

import pytest
import torch

from ecgot.eval.retrieval import retrieval
from ecgot.models.alignment import Embedding


def embedding(pooled: list[list[float]]) -> Embedding:
    values = torch.nn.functional.normalize(torch.tensor(pooled), dim=1)
    return Embedding(values[:, None], torch.ones(len(values), 1, dtype=torch.bool), values)


def test_recall_by_hand():
    reports = embedding([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    ecg = embedding([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
    own = torch.tensor([0, 1, 1, 2])  # the second ECG has the second report and looks like the first
    found = retrieval(ecg, reports, own)
    assert found["ecg_to_report@1"] == pytest.approx(2 / 4)  # the last one's own report is the farthest
    assert found["ecg_to_report@5"] == 1.0
    # The first report finds its ECG, the second one of its two; the third finds ECGs of others first.
    assert found["report_to_ecg@1"] == pytest.approx(2 / 3)
    assert retrieval(ecg, reports, own, score="mean_match") == found


def test_a_model_that_says_the_same_of_all_finds_nothing():
    same = embedding([[1.0, 0.0]] * 30)
    found = retrieval(same, same, torch.arange(30))
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("score", ["cosine", "ot", "best_match"])
def test_it_does_not_depend_on_the_parts_it_is_made_in(score, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ecg, reports = (
        Embedding(
            torch.randn(count, 3, 4, generator=generator),
            torch.ones(count, 3, dtype=torch.bool),
            torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1),
        )
        for count in (9, 7)
    )
    own = torch.arange(9) % 7
    whole = retrieval(ecg, reports, own, score=score)
    monkeypatch.setattr("ecgot.eval.retrieval.BATCH", 2)
    assert retrieval(ecg, reports, own, score=score) == whole
    assert 0 < whole["ecg_to_report@5"] < 1
