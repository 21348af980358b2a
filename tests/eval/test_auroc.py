"""AUROC and its interval against scikit-learn, closed forms and brute force."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ecgot.data.ptbxl import Labels
from ecgot.eval.auroc import macro_auroc, patient_weights, weighted_auroc


@pytest.mark.parametrize("decimals", [8, 1, 0])  # fewer decimals, more ties
def test_weighted_auroc_is_scikit_learn_s(decimals):
    rng = np.random.default_rng(decimals)
    truth = rng.random(60) < 0.3
    scores = np.round(rng.normal(size=60) + truth, decimals)
    weights = rng.integers(0, 4, (5, 60)).astype(float)
    expected = [roc_auc_score(truth, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(weighted_auroc(scores, truth, weights), expected, atol=1e-12)


def test_weighted_auroc_without_positives_or_negatives_is_nan():
    truth = np.array([True, False, False])
    weights = np.array([[0.0, 1, 1], [1, 0, 0], [1, 1, 0]])
    areas = weighted_auroc(np.array([3.0, 2, 1]), truth, weights)
    np.testing.assert_array_equal(np.isnan(areas), [True, True, False])


def test_a_resample_draws_patients_whole():
    patients = np.array([7, 7, 3, 9, 9, 9])
    weights = patient_weights(patients, resamples=200, seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()  # as many patients as there are
    assert weights[:, 2].std() > 0.5


def test_records_without_a_label_and_classes_without_both_sides_take_no_part():
    matrix = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 1], [0, 0, 0]], dtype=bool)
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.1, 0.05, 0.0], [1.0, 1.0, 1.0]])
    result = macro_auroc(scores, Labels(("A", "B", "C"), matrix), np.arange(4), resamples=50)
    assert result.records == 3
    assert result.positives == {"A": 1, "B": 2}
    assert result.auroc == {"A": 1.0, "B": 0.5}
    assert result.macro == 0.75


def test_nothing_to_score_is_nan_and_not_an_error():
    result = macro_auroc(np.zeros((3, 1)), Labels(("A",), np.zeros((3, 1), dtype=bool)), np.arange(3))
    assert np.isnan(result.macro)
    assert result.records == 0


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Positives are N(1, 1), negatives N(0, 1): the true AUROC is Phi(1 / sqrt 2)."""
    true_area, covered, trials = 0.7602499, 0, 200
    for trial in range(trials):
        rng = np.random.default_rng(trial)
        truth = rng.random(200) < 0.4
        scores = rng.normal(size=200) + truth
        labels = Labels(("A", "not A"), np.stack([truth, ~truth], axis=1))
        result = macro_auroc(
            np.stack([scores, -scores], 1), labels, np.arange(200), resamples=200, seed=trial
        )
        covered += result.low <= true_area <= result.high
    assert 0.90 <= covered / trials <= 0.99


def test_a_class_that_a_resample_misses_does_not_move_the_interval():
    """One positive among many, ranked worst: without it, the mean of a third of the resamples would be 1."""
    truth = np.arange(400) % 2 == 0
    rare = np.arange(400) == 7
    labels = Labels(("A", "B", "rare"), np.stack([truth, ~truth, rare], axis=1))
    scores = np.stack([truth, ~truth, ~rare], axis=1).astype(float)
    result = macro_auroc(scores, labels, np.arange(400))
    assert result.macro == pytest.approx(2 / 3)
    assert (result.low, result.high) == pytest.approx((2 / 3, 2 / 3))


def test_two_records_a_patient_widen_the_interval():
    rng = np.random.default_rng(0)
    truth = rng.random(100) < 0.5
    scores = rng.normal(size=100) + truth
    twice = np.repeat(np.stack([scores, -scores], 1), 2, axis=0)
    labels = Labels(("A", "B"), np.repeat(np.stack([truth, ~truth], 1), 2, axis=0))
    by_patient = macro_auroc(twice, labels, np.repeat(np.arange(100), 2))
    by_record = macro_auroc(twice, labels, np.arange(200))
    assert by_patient.high - by_patient.low > 1.2 * (by_record.high - by_record.low)


def test_of_known_labels_negatives_count_as_much_as_positives():
    truth = np.array([[1, 0], [0, 0], [0, 1], [0, 0], [1, 1]], dtype=bool)
    known = np.array([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0]], dtype=bool)
    scores = np.array([[0.5, 0.1], [0.4, 0.9], [0.6, 0.8], [0.1, 0.3], [0.0, 0.0]])
    labels = Labels(("A", "B"), truth)
    result = macro_auroc(scores, labels, np.arange(5), known=known, resamples=50)
    assert result.records == 4  # nothing is known of the last
    assert (result.positives, result.negatives) == ({"A": 1, "B": 1}, {"A": 3, "B": 2})
    assert result.auroc == {"A": pytest.approx(2 / 3), "B": 1.0}
    assert macro_auroc(scores, labels, np.arange(5), resamples=50).records == 3  # by the protocol


def test_the_interval_of_a_class_is_that_of_the_class_alone():
    rng = np.random.default_rng(0)
    truth = np.stack([rng.random(200) < 0.4, np.arange(200) % 2 == 0], 1)
    scores, everything = rng.normal(size=(200, 2)) + truth, np.ones((200, 2), dtype=bool)
    both = macro_auroc(scores, Labels(("A", "B"), truth), np.arange(200), known=everything, resamples=200)
    for column, name in enumerate(("A", "B")):
        one = [each[:, [column]] for each in (scores, truth, everything)]
        alone = macro_auroc(one[0], Labels((name,), one[1]), np.arange(200), known=one[2], resamples=200)
        assert both.intervals[name] == pytest.approx((alone.low, alone.high))
        assert both.intervals[name][0] < both.auroc[name] < both.intervals[name][1]
