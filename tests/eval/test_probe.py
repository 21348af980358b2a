"""The linear probe finds what is linear, and nothing where there is nothing."""

import numpy as np
from sklearn.metrics import roc_auc_score

from ecgot.eval.probe import linear_probe


def test_a_linear_label_is_found_and_a_random_one_is_not():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(600, 8)) * 50 + 7, rng.normal(size=(300, 8)) * 50 + 7
    direction = rng.normal(size=8)
    truth = np.stack([(features - 7) @ direction > 0, rng.random(600) < 0.5], axis=1)
    scores = linear_probe(features, truth, targets)
    assert scores.shape == (300, 2)
    assert roc_auc_score((targets - 7) @ direction > 0, scores[:, 0]) > 0.98
    assert 0.4 < roc_auc_score(rng.random(300) < 0.5, scores[:, 1]) < 0.6


def test_a_class_that_training_never_or_always_saw_scores_the_same_for_all():
    rng = np.random.default_rng(0)
    truth = np.zeros((50, 2), dtype=bool)
    truth[:, 1] = True
    scores = linear_probe(rng.normal(size=(50, 3)), truth, rng.normal(size=(9, 3)))
    assert (scores == scores[0]).all()
