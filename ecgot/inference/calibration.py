"""From a class's score to a probability, an interval, and whether the finding is stated.

A score is the log-odds that a *report* says a class; whether a record *has* the label is another question,
which a calibration answers by records whose labels are known. Of each class, with p = sigmoid(score),

    logit(probability) = slope_low log(p) - slope_high log(1 - p) + bias

(beta calibration: Kull, Silva Filho and Flach 2017, "Beyond sigmoids"), which rises with the score, as no
slope is negative, and is the identity at (1, 1, 0), where a class that few records have stays. The interval
is that of the fitted curve, from the parameters' covariance at the optimum: how often a record with this
score has the finding lies in it with 95 %, as far as the curve has the right form.

What is stated follows from a class-conditional conformal set (Vovk 2012, "Conditional validity of inductive
conformal predictors") at a stated level: "absent" belongs to it up to ``present_from`` and "present" from
``absent_below`` on. Where both do, the finding is undecided.
"""

import functools
import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ecgot.errors import EcgotError, first_line
from ecgot.files import write_text

FILE = "calibration.json"  # in a run's folder
FORMAT = 1
NAMES = Path(__file__).with_name("class_names.toml")
UNKNOWN = ((0.0,) * 3,) * 3  # a covariance
STATED = {1: True, 0: False, -1: None}
NORMAL_95 = 1.959964  # half the width of a 95 % interval, in standard deviations
UNCALIBRATED = (
    "probabilities are not calibrated: they are the model's own, with a threshold of 50 % for every class; "
    "ecgot calibrate fits a run of ecgot train to labelled records"
)


@dataclass(frozen=True)
class Finding:
    """What is said about one class of one record.

    Attributes:
        code: the class, such as "CLBBB".
        name: for a person, such as "left bundle branch block".
        group: its label group.
        probability: that the record has the finding.
        low, high: a 95 % interval of the probability, see this module; the whole of [0, 1] if uncalibrated.
        threshold: the probability from which the class is rather present than absent.
        stated: True if the finding is stated as present, False if not, None if it is undecided.
    """

    code: str
    name: str
    group: str
    probability: float
    low: float
    high: float
    threshold: float
    stated: bool | None

    def __str__(self) -> str:
        said = {True: "", False: ", not stated", None: ", undecided"}[self.stated]
        return f"{self.name} ({self.code}), {self.probability:.0%}{said}"


@dataclass(frozen=True)
class ClassCalibration:
    """The calibration of one class; the defaults are the identity.

    Attributes:
        slope_low, slope_high, bias: the curve, see this module.
        covariance: [3, 3] of these three; None if nothing is known.
        threshold: a probability.
        absent_below, present_from: below the one and from the other on the finding is decided; the threshold
            lies between them.
        positives: how many records it was learned from have the class.
    """

    slope_low: float = 1.0
    slope_high: float = 1.0
    bias: float = 0.0
    covariance: tuple[tuple[float, ...], ...] | None = None
    threshold: float = 0.5
    absent_below: float = 0.5
    present_from: float = 0.5
    positives: int = 0

    def probability(self, score: np.ndarray) -> np.ndarray:
        """Probabilities of scores of any shape."""
        return sigmoid(curve_features(score) @ np.array(self.parameters))

    def interval(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lower and upper end of the 95 % interval of the probabilities of scores of any shape."""
        if self.covariance is None:
            return np.zeros_like(score), np.ones_like(score)
        features = curve_features(score)
        middle, spread = features @ np.array(self.parameters), _spread(features, np.array(self.covariance))
        return sigmoid(middle - spread), sigmoid(middle + spread)

    def stated(self, probability: Any) -> Any:
        """Of probabilities of any shape: 1 where the finding is stated, 0 where not, -1 where undecided."""
        present, absent = probability >= self.present_from, probability < self.absent_below
        return present * 1 - (1 - present) * (1 - absent)

    @property
    def parameters(self) -> tuple[float, float, float]:
        """The slopes and the bias of the curve."""
        return self.slope_low, self.slope_high, self.bias


@dataclass(frozen=True)
class Calibration:
    """The calibration of a run's classes.

    Attributes:
        classes: group -> class -> its calibration; a class without one keeps the model's own probability.
        fingerprint: of the model and prompts whose scores it takes, see
            :func:`ecgot.inference.zeroshot.scores_fingerprint`; "" takes any.
        level: of the conformal sets, such as 0.9.
        folds, records: what it was learned from.
        trained_on: those of the folds on which the model was trained. What it says of them is too sure.
        data: the name of the data set's folder.
        version: of ecgot.
    """

    classes: Mapping[str, Mapping[str, ClassCalibration]] = field(default_factory=dict)
    fingerprint: str = ""
    level: float = 0.9
    folds: tuple[int, ...] = ()
    records: int = 0
    trained_on: tuple[int, ...] = ()
    data: str = ""
    version: str = ""

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Calibration":
        """Read the calibration at ``path``, made for the model and prompts of this fingerprint.

        Raises:
            EcgotError: the file cannot be read, is damaged, or belongs to another model.
        """
        try:
            calibration = _parsed(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise EcgotError(f"calibration: {path} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise EcgotError(
                f"calibration: expected what ecgot calibrate writes in {path}, got something else "
                f"({first_line(error)})"
            ) from error
        if calibration.fingerprint != fingerprint:
            raise EcgotError(
                f"calibration: expected one of this model and its prompts in {path}, got one of another; "
                "run ecgot calibrate again"
            )
        return calibration

    def save(self, path: Path) -> None:
        """Write the calibration to ``path`` as JSON."""
        write_text(path, json.dumps({"format": FORMAT} | asdict(self), indent=1) + "\n")

    @property
    def note(self) -> str | None:
        """What a reader of its probabilities should know beforehand; None if there is nothing."""
        return None if self.classes else UNCALIBRATED

    def of(self, group: str, code: str) -> ClassCalibration:
        """The calibration of one class; the identity if there is none."""
        return self.classes.get(group, {}).get(code, ClassCalibration())

    def findings(self, scores: Mapping[str, Mapping[str, float]]) -> tuple[Finding, ...]:
        """Every class of one record as a finding, in the order of ``scores``.

        Args:
            scores: group -> class -> "phrase" score, see :func:`ecgot.inference.zeroshot.class_scores`.
        """
        keys = [(group, code) for group, table in scores.items() for code in table]
        each = [self.of(*key) for key in keys]
        features = curve_features(np.array([scores[group][code] for group, code in keys]))
        middle = (features * np.array([one.parameters for one in each])).sum(-1)
        spread = _spread(features, np.array([one.covariance or UNKNOWN for one in each]))
        probability, low, high = sigmoid(np.stack([middle, middle - spread, middle + spread])).tolist()
        return tuple(
            Finding(
                code=code,
                name=class_name(group, code),
                group=group,
                probability=probability[k],
                low=0.0 if each[k].covariance is None else low[k],
                high=1.0 if each[k].covariance is None else high[k],
                threshold=each[k].threshold,
                stated=STATED[int(each[k].stated(probability[k]))],
            )
            for k, (group, code) in enumerate(keys)
        )


def class_name(group: str, code: str) -> str:
    """A class's name for a person; its code if it has none.

    >>> class_name("subclass", "CLBBB"), class_name("subclass", "XYZ")
    ('left bundle branch block', 'XYZ')
    """
    return _names().get(group, {}).get(code, code)


def curve_features(score: np.ndarray) -> np.ndarray:
    """[..., 3] of scores [...]: log p, -log(1 - p) and 1, whose weighted sum is the calibrated log-odds."""
    value = np.asarray(score, np.float64)
    return np.stack([-np.logaddexp(0, -value), np.logaddexp(0, value), np.ones_like(value)], axis=-1)


def _spread(features: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Half the width [...] of the curve's 95 % interval in log-odds, of features [..., 3]."""
    return NORMAL_95 * np.sqrt(np.einsum("...i,...ij,...j->...", features, covariance, features))


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Probabilities of log-odds of any shape, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(log_odds, np.float64)))


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    return tomllib.loads(NAMES.read_text(encoding="utf-8"))


def _parsed(text: str) -> Calibration:
    values = json.loads(text)
    form = values.pop("format")
    if form != FORMAT:
        raise ValueError(f"format {form}, not {FORMAT}")
    classes = {
        group: {code: _class_calibration(**each) for code, each in table.items()}
        for group, table in values.pop("classes").items()
    }
    folds, trained_on = tuple(values.pop("folds")), tuple(values.pop("trained_on"))
    return Calibration(classes=classes, folds=folds, trained_on=trained_on, **values)


def _class_calibration(**values: Any) -> ClassCalibration:
    """Checked: all numbers finite, no negative slope, the thresholds in order."""
    if values["covariance"] is not None:
        values["covariance"] = tuple(map(tuple, values["covariance"]))
        if np.shape(values["covariance"]) != (3, 3):
            raise ValueError(f"covariance of shape {np.shape(values['covariance'])}")
    made = ClassCalibration(**values)
    numbers = [made.slope_low, made.slope_high, made.bias, made.absent_below, made.present_from]
    numbers += [made.threshold, *np.ravel(made.covariance or 0.0)]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("a number that is not finite")
    if (
        min(made.slope_low, made.slope_high) < 0
        or not made.absent_below <= made.threshold <= made.present_from
    ):
        raise ValueError("a falling curve, or thresholds out of order")
    return made
