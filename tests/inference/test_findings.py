"""What a calibration says about one record, and its file."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ecgot.errors import EcgotError
from ecgot.inference.calibration import Calibration, ClassCalibration, class_name
from ecgot.inference.zeroshot import load_prompts, read_prompts, scores_fingerprint
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.run import PRETRAINED, Run

COVARIANCE = ((0.04, 0.0, 0.0), (0.0, 0.04, 0.0), (0.0, 0.0, 0.01))
BLOCK = ClassCalibration(0.8, 1.3, -0.5, COVARIANCE, 0.4, 0.2, 0.6, 30)


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(
        classes={"subclass": {"CLBBB": BLOCK}}, fingerprint="abc", folds=(8,), records=100, version="1"
    )


def test_every_class_with_a_prompt_has_a_name():
    for group, classes in read_prompts().items():
        names = {code: class_name(group, code) for code in classes}
        assert all(name != code for code, name in names.items()), names
        assert len(set(names.values())) == len(names), group


def test_a_finding_has_a_name_a_code_a_probability_and_an_interval(calibration):
    (finding,) = calibration.findings({"subclass": {"CLBBB": 2.0}})
    p = 1 / (1 + math.exp(-2))
    log_odds = 0.8 * math.log(p) - 1.3 * math.log(1 - p) - 0.5
    assert finding.probability == pytest.approx(1 / (1 + math.exp(-log_odds)))
    assert 0 < finding.low < finding.probability < finding.high < 1
    spread = 1.96 * math.sqrt(0.04 * math.log(p) ** 2 + 0.04 * math.log(1 - p) ** 2 + 0.01)
    assert finding.high == pytest.approx(1 / (1 + math.exp(-log_odds - spread)), rel=1e-4)
    assert (finding.code, finding.group, finding.threshold) == ("CLBBB", "subclass", 0.4)
    assert str(finding) == f"left bundle branch block (CLBBB), {finding.probability:.0%}"


def test_probabilities_rise_with_the_score_and_never_overflow(calibration):
    scores = np.array([-1e4, -50.0, -3.0, 0.0, 0.1, 4.0, 50.0, 1e4])
    probability = BLOCK.probability(scores)
    assert (np.diff(probability) >= 0).all()
    assert (np.diff(probability[2:6]) > 0).all()
    assert probability[0] == 0
    assert probability[-1] == 1


def test_what_lies_between_the_two_bounds_is_undecided(calibration):
    stated = {
        score: calibration.findings({"subclass": {"CLBBB": score}})[0].stated for score in (-3.0, 0.4, 3.0)
    }
    assert stated == {-3.0: False, 0.4: None, 3.0: True}
    assert BLOCK.stated(np.array([0.19, 0.2, 0.59, 0.6])).tolist() == [0, -1, -1, 1]


def test_without_a_calibration_the_score_s_own_probability_counts_and_a_note_says_so(calibration):
    none = Calibration()
    assert none.note is not None
    assert "not calibrated" in none.note
    assert calibration.note is None
    low, high = none.findings({"rhythm": {"SR": -0.1, "AFIB": 3.0}})
    assert low.probability == pytest.approx(1 / (1 + math.exp(0.1)))
    assert (low.low, low.high, low.threshold, low.stated) == (0, 1, 0.5, False)
    assert high.stated is True


def test_a_file_gives_back_what_was_saved(calibration, tmp_path: Path):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    assert Calibration.load(path, "abc") == calibration
    assert [each.name for each in tmp_path.iterdir()] == ["calibration.json"]


def test_the_packaged_model_brings_its_own_calibration():
    run = Run.open(PRETRAINED)
    prompts = load_prompts(run.prompts, torch.device("cpu"))
    fingerprint = scores_fingerprint(load_alignment(run, None), prompts)
    calibration = Calibration.load(run.folder / "calibration.json", fingerprint)
    assert {group: set(table) for group, table in calibration.classes.items()} == {
        group: set(table) for group, table in prompts.rows.items()
    }
    assert calibration.folds == calibration.trained_on == (8,)


def test_another_model_s_calibration_is_refused(calibration, tmp_path: Path):
    calibration.save(tmp_path / "calibration.json")
    with pytest.raises(EcgotError, match="one of another"):
        Calibration.load(tmp_path / "calibration.json", "abd")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda values: values.pop("format"), "format"),
        (lambda values: values.update(format=99), "format 99"),
        (lambda values: values.update(more=1), "more"),
        (lambda values: values["classes"]["subclass"]["CLBBB"].update(bias=float("nan")), "not finite"),
        (lambda values: values["classes"]["subclass"]["CLBBB"].update(slope_low=-0.1), "falling"),
        (lambda values: values["classes"]["subclass"]["CLBBB"].update(threshold=0.9), "out of order"),
        (lambda values: values["classes"]["subclass"]["CLBBB"].update(covariance=[[1.0]]), "shape"),
        (lambda values: values["classes"]["subclass"].update(CLBBB=3), "mapping"),
        (lambda values: values.update(classes=[]), "items"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(calibration, tmp_path: Path, change, part):
    path = tmp_path / "calibration.json"
    calibration.save(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(EcgotError, match=part) as caught:
        Calibration.load(path, "abc")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"3"])
def test_a_file_of_something_else_is_named(tmp_path: Path, content):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(EcgotError, match="expected what ecgot calibrate writes"):
        Calibration.load(path, "abc")
    with pytest.raises(EcgotError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json", "abc")
