"""The linear probe finds what is linear, and nothing where there is nothing."""

import numpy as np
from sklearn.metrics import roc_auc_score

from ecgot.eval.probe import linear_probe


def test_a_linear_label_is_found_and_a_random_one_is_not():
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(600, 8)) * 50 + 7, rng.normal(size=(300, 8)) * 50 + 7
    direction = rng.normal(size=8)
    learned = (features - 7) @ direction > 0
    truth = np.stack([learned, rng.permutation(learned)], axis=1)
    scores = linear_probe(features, truth, targets)
    assert scores.shape == (300, 2)
    wanted = (targets - 7) @ direction > 0
    assert roc_auc_score(wanted, scores[:, 0]) > 0.98
    # Shuffled labels teach nothing of the very class that is plain in the features.
    assert abs(roc_auc_score(wanted, scores[:, 1]) - 0.5) < 0.35
    kept = linear_probe(features, truth, features)
    assert roc_auc_score(truth[:, 1], kept[:, 1]) < 0.65  # nor are 600 records learned by heart


def test_a_class_that_training_never_or_always_saw_scores_the_same_for_all():
    rng = np.random.default_rng(0)
    truth = np.zeros((50, 2), dtype=bool)
    truth[:, 1] = True
    scores = linear_probe(rng.normal(size=(50, 3)), truth, rng.normal(size=(9, 3)))
    assert (scores == scores[0]).all()
