"""Whether a calibration is learned right, and measured right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ecgot.errors import EcgotError
from ecgot.eval.calibration import (
    MIN_THRESHOLD,
    calibrate,
    calibration_error,
    calibration_report,
    error_floor,
    f1_threshold,
    fit_class,
    measure_class,
)
from ecgot.inference.calibration import Calibration, ClassCalibration, sigmoid
from ecgot.runs.run import PRETRAINED, Run

TRUE = ClassCalibration(slope_low=0.8, slope_high=1.2, bias=-1.0)


def draw(count: int, seed: int, shift: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores and truths of a class whose right curve is TRUE."""
    rng = np.random.default_rng(seed)
    score = rng.normal(shift, 2.0, count)
    return score, rng.random(count) < TRUE.probability(score)


def test_the_right_curve_is_found():
    score, truth = draw(20_000, seed=0)
    fitted = fit_class(score, truth)
    assert fitted.slope_low == pytest.approx(0.8, abs=0.1)
    assert fitted.slope_high == pytest.approx(1.2, abs=0.1)
    assert fitted.bias == pytest.approx(-1.0, abs=0.15)
    measured = measure_class(fitted, *draw(20_000, seed=1))
    assert measured["ece"] < 0.012 < 0.08 < measured["ece_before"]


def test_the_interval_holds_the_right_probability_19_times_of_20():
    at = np.linspace(-4, 3, 8)
    held = []
    for seed in range(300):
        low, high = fit_class(*draw(500, seed)).interval(at)
        held.append((low <= TRUE.probability(at)) & (TRUE.probability(at) <= high))
    assert 0.92 < np.mean(held) < 0.99
    assert np.mean(held, axis=0).min() > 0.88


def test_few_positives_leave_the_identity_nearly_in_place():
    score = np.full(1000, -6.0)
    truth = np.arange(1000) < 2  # as often as the score says
    fitted = fit_class(score, truth)
    assert abs(fitted.slope_low - 1) < 0.1
    assert abs(fitted.slope_high - 1) < 0.1
    none = fit_class(score, np.zeros(1000, bool))
    assert 0 < none.probability(np.array(-6.0)) < sigmoid(np.array(-6.0))
    assert none.absent_below == none.threshold == none.present_from  # no set without positives


def test_no_slope_falls_even_where_the_score_is_upside_down():
    score, truth = draw(5000, seed=3)
    fitted = fit_class(-score, truth)
    assert min(fitted.slope_low, fitted.slope_high) >= 0


def test_the_conformal_sets_hold_the_truth_as_often_as_they_say():
    present, absent, undecided = [], [], []
    for seed in range(200):
        fitted = fit_class(*draw(300, seed, shift=-2.0))
        measured = measure_class(fitted, *draw(2000, seed + 1000, shift=-2.0))
        present.append(measured["coverage_present"])
        absent.append(measured["coverage_absent"])
        undecided.append(measured["undecided"])
    assert np.mean(present) > 0.895
    assert np.mean(absent) > 0.895
    assert 0.02 < np.mean(undecided) < 0.6


def test_nothing_is_stated_below_its_threshold_or_denied_above():
    for seed in range(20):
        fitted = fit_class(*draw(200, seed))
        assert fitted.absent_below <= fitted.threshold <= fitted.present_from
        assert fitted.threshold >= MIN_THRESHOLD


def test_the_threshold_is_where_f1_is_largest():
    rng = np.random.default_rng(0)
    probability = sigmoid(rng.normal(-2, 2, 50_000))
    truth = rng.random(50_000) < probability
    tried = np.linspace(0.01, 0.99, 99)
    f1 = [2 * (truth & (probability >= t)).sum() / (truth.sum() + (probability >= t).sum()) for t in tried]
    assert f1_threshold(probability) == pytest.approx(tried[np.argmax(f1)], abs=0.05)


def test_the_calibration_error_in_closed_form():
    truth = np.arange(1000) % 4 == 0
    assert calibration_error(np.full(1000, 0.25), truth) < 0.01
    assert calibration_error(np.full(1000, 0.75), truth) == pytest.approx(0.5, abs=0.01)
    halves = np.r_[np.zeros(500), np.ones(500)]
    assert calibration_error(halves, halves == 1, bins=2) == 0
    assert calibration_error(halves, halves == 0, bins=2) == 1
    assert calibration_error(np.array([0.5]), np.array([True])) == 0.5


def test_the_floor_is_what_right_probabilities_show():
    rng = np.random.default_rng(1)
    probability = rng.random(3000)
    shown = [calibration_error(probability, rng.random(3000) < probability) for _ in range(20)]
    assert error_floor(probability) == pytest.approx(np.mean(shown), rel=0.2)
    assert error_floor(np.round(probability)) == 0


def test_counts_at_the_threshold_by_hand():
    one = ClassCalibration(threshold=0.5, absent_below=0.2, present_from=0.8)
    probability = np.array([0.9, 0.6, 0.4, 0.1, 0.9, 0.1])
    truth = np.array([True, True, True, True, False, False])
    measured = measure_class(one, np.log(probability / (1 - probability)), truth)
    assert measured["sensitivity"] == 0.5
    assert measured["specificity"] == 0.5
    assert measured["precision"] == pytest.approx(2 / 3)
    assert measured["stated_sensitivity"] == 0.5
    assert measured["stated_precision"] == 0.5
    assert measured["coverage_present"] == 0.75
    assert measured["coverage_absent"] == 0.5
    assert measured["undecided"] == pytest.approx(1 / 3)
    assert measured["has_set"]


@pytest.fixture(scope="module")
def packaged(few, cache_dir, tmp_path_factory) -> tuple[Path, Calibration]:
    out = tmp_path_factory.mktemp("calibration")
    folds = (5, 6, 7, 8, 9)
    return out, calibrate(Run.open(PRETRAINED), few, folds, cache_dir, out=out)


def test_a_run_is_calibrated_and_measured_on_other_folds(packaged, few, cache_dir):
    out, calibration = packaged
    assert calibration.trained_on == (5, 6, 7, 8)
    assert calibration.records > 60
    assert Calibration.load(out / "calibration.json", calibration.fingerprint) == calibration
    report = calibration_report(Run.open(PRETRAINED), calibration, few, (10,), cache_dir)
    assert report["folds"] == [10]
    assert report["calibrated_in_sample"] == [5, 6, 7, 8]
    assert set(report["classes"]["superclass"]) <= {"NORM", "MI", "STTC", "CD", "HYP"}
    assert report["summary"]["all"]["classes"] >= report["summary"]["superclass"]["classes"]
    json.dumps(report, allow_nan=False)


def test_what_it_was_learned_from_measures_nothing(packaged, few, cache_dir):
    run, calibration = Run.open(PRETRAINED), packaged[1]
    for fold in (1, 9):  # the model's, the calibration's
        with pytest.raises(EcgotError, match=f"got fold {fold}, which was learned from"):
            calibration_report(run, calibration, few, (fold,), cache_dir)
    with pytest.raises(EcgotError, match="another model"):
        calibration_report(run, replace(calibration, fingerprint="x"), few, (10,), cache_dir)
