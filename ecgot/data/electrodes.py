"""Faults of limb leads: Einthoven's law broken, a lead inverted, electrodes reversed."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ecgot.data.complexes import Complexes, Floats, median_beat
from ecgot.data.leads import LIMB_LEADS, STANDARD_LEADS, completion

EINTHOVEN_MAX = 0.25  # of the leads' size; PTB-XL has at most 0.011
# Each sum of limb leads is 0: Einthoven, and Goldberger's leads from I and II or II and III.
LAWS: tuple[Mapping[str, float], ...] = (
    {"I": 1.0, "III": 1.0, "II": -1.0},
    {"aVR": 1.0, "I": 0.5, "II": 0.5},
    {"aVL": 1.0, "I": -1.0, "II": 0.5},
    {"aVF": 1.0, "II": -1.0, "I": 0.5},
)
EXCHANGED_MIN = 3.0  # log-odds
BEFORE_S, AFTER_S = 0.30, 0.45  # of a beat, around its complex
WAVES_S = ((-0.24, -0.07), (-0.06, 0.07), (0.12, 0.42))  # P, QRS, T


@dataclass(frozen=True)
class Exchange:
    """Two limb electrodes exchanged.

    Attributes:
        code: of the remark.
        electrodes: in words.
        lead: which the exchange inverts.
        weights: of logistic regression, for the P wave, QRS and T wave of that lead in turn: its cosine with
            what the chest leads predict of it, and its mean over its largest value. The exchange changes the
            sign of all of them, so there is no intercept.
    """

    code: str
    electrodes: str
    lead: str
    weights: tuple[float, ...]


# Fitted on 1000 records of PTB-XL's folds 1-7 and the same with electrodes exchanged, by
# `python -m benchmarks.quality DATA --fit`. Left arm and leg are not here: at 2 % false alarms a third of
# their exchanges were found.
EXCHANGES = (
    Exchange("arms_reversed", "the arm electrodes", "I", (2.85, 0.31, 2.13, 3.36, 2.33, 0.08)),
    Exchange(
        "right_arm_left_leg_reversed",
        "the electrodes of right arm and left leg",
        "II",
        (3.37, -0.02, 2.83, -2.32, 1.48, 1.14),
    ),
)


def law_residuals(signal_mv: Floats, rows: Mapping[str, int]) -> dict[int, float]:
    """By number in LAWS, where all leads of the law are there: the size of their sum over that of the leads.

    Args:
        signal_mv: [P, T] without baseline.
        rows: rows of the usable leads by name.
    """
    return {
        number: _residual(signal_mv, rows, law)
        for number, law in enumerate(LAWS)
        if law.keys() <= rows.keys()
    }


def inverted_lead(signal_mv: Floats, rows: Mapping[str, int]) -> str | None:
    """The limb lead whose inversion restores every law; None if there is none."""
    known = [law for law in LAWS if law.keys() <= rows.keys()]
    for lead in LIMB_LEADS:
        if not any(lead in law for law in known):
            continue
        turned = [
            {name: -weight if name == lead else weight for name, weight in law.items()} for law in known
        ]
        if all(_residual(signal_mv, rows, law) <= EINTHOVEN_MAX for law in turned):
            return lead
    return None


def exchanged(complexes: Complexes, rows: Mapping[str, int]) -> Exchange | None:
    """The exchange of electrodes that the chest leads speak for, if any."""
    chest = tuple(lead for lead in STANDARD_LEADS[6:] if lead in rows)
    if len(chest) < 2 or "I" not in rows or "II" not in rows:
        return None
    beat = median_beat(complexes, BEFORE_S, AFTER_S)
    if beat is None:
        return None
    beat = beat - np.median(beat, 1, keepdims=True)
    predicted = completion(chest).matrix @ beat[[rows[lead] for lead in chest]]
    odds = [
        -float(
            np.dot(
                each.weights,
                lead_features(
                    beat[rows[each.lead]], predicted[STANDARD_LEADS.index(each.lead)], complexes.fs_hz
                ),
            )
        )
        for each in EXCHANGES
    ]
    best = int(np.argmax(odds))
    return EXCHANGES[best] if odds[best] > EXCHANGED_MIN else None


def lead_features(beat: Floats, predicted: Floats, fs_hz: float) -> Floats:
    """What :class:`Exchange` weighs: [6], of a lead's beat and its prediction, both [S]."""
    features = []
    for start_s, stop_s in WAVES_S:
        part = slice(round((BEFORE_S + start_s) * fs_hz), round((BEFORE_S + stop_s) * fs_hz))
        size = np.linalg.norm(beat[part]) * np.linalg.norm(predicted[part])
        features += [float(beat[part] @ predicted[part] / (size + 1e-6))]
        features += [float(beat[part].mean() / (np.abs(beat).max() + 1e-3))]
    return np.array(features)


def _residual(signal_mv: Floats, rows: Mapping[str, int], law: Mapping[str, float]) -> float:
    """Size of a law's sum over the mean size of its leads."""
    leads = signal_mv[[rows[name] for name in law]]
    total = np.array(list(law.values())) @ leads
    return float(np.sqrt((total**2).mean() / ((leads**2).mean() + 1e-12)))
