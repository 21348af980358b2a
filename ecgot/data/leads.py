"""Lead names in the spellings that files use, and leads that are missing, from those that are there.

Of the twelve leads eight are independent. III, aVR, aVL and aVF follow from I and II (Einthoven, Goldberger),
and any two limb leads give the other four. What cannot be derived is estimated: the conditional mean given
the leads that are there, under the covariance of the eight independent leads over a training set.
"""

import csv
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

STANDARD_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
LIMB_LEADS = STANDARD_LEADS[:6]
INDEPENDENT_LEADS = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
# Of the independent leads, after the baseline was removed at 0.3 Hz, in mV^2; of PTB-XL's folds 1 to 8, by
# `python -m benchmarks.lead_covariance DATA`.
COVARIANCE = Path(__file__).with_name("lead_covariance.csv")
NOISE = 1e-9  # relative to the covariance: what is linear in the leads that are there stays exact
_LIMB_FROM_I_II = np.array([[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]])

_PREFIXES = ("", "MDC_ECG_LEAD_", "MDC_ECG_", "ECG_LEAD_", "ECG_", "EKG_", "LEAD_", "ECG", "EKG", "LEAD")
_REVERSED = re.compile(r"^[-−–]|[-−–]$")  # "-aVR" has the other sign


@functools.cache
def _spellings() -> dict[str, str]:
    """Upper-case spellings, without a prefix, of the standard names."""
    limbs = dict(zip(("I", "II", "III"), LIMB_LEADS, strict=False))
    known = {f"{prefix}{roman}": lead for prefix in ("", "D", "L", "ML") for roman, lead in limbs.items()}
    known |= {f"{prefix}{number}": LIMB_LEADS[number - 1] for prefix in "DL" for number in (1, 2, 3)}
    known |= {lead.upper(): lead for lead in LIMB_LEADS[3:]}
    known |= {f"{letter}{number}": f"V{number}" for letter in ("V", "C") for number in range(1, 7)}
    return known


@functools.lru_cache(maxsize=4096)
def lead_name(name: str) -> str:
    """The standard name of a lead, or ``name`` itself where it is none of the twelve.

    >>> [lead_name(name) for name in ("Lead II", "DIII", "MLII", "ECG_avr", "C4", "MDC_ECG_LEAD_V1", "PLETH")]
    ['II', 'III', 'II', 'aVR', 'V4', 'V1', 'PLETH']
    """
    plain = re.sub(r"[^A-Z0-9]+", "_", name.upper()).strip("_")
    known = _spellings()
    if _REVERSED.search(name.strip()):
        return name.strip()
    rest = [plain[len(prefix) :] for prefix in _PREFIXES if plain.startswith(prefix)]
    # "V_1" is V1, but "I_II" is not III.
    whole = [each.replace("_", "") for each in rest if not re.match("I+_I", each)]
    return next((known[each] for each in whole if each in known), name.strip())


@dataclass(frozen=True)
class Completion:
    """How the standard leads follow from those of a record.

    Attributes:
        matrix: [12, P], of the P leads that are there: the standard leads are its product with them.
        derived: leads that follow exactly from others.
        estimated: leads that do not.
    """

    matrix: np.ndarray
    derived: tuple[str, ...]
    estimated: tuple[str, ...]


@functools.lru_cache(maxsize=1024)
def completion(present: tuple[str, ...]) -> Completion:
    """How the twelve standard leads follow from ``present``, one or more of them by their standard names."""
    rows = [STANDARD_LEADS.index(lead) for lead in present]
    whole, covariance = _from_independent(), _covariance()
    some = whole[rows]
    between = some @ covariance @ some.T
    matrix = whole @ covariance @ some.T @ np.linalg.pinv(between, rcond=NOISE, hermitian=True)
    matrix[rows] = np.eye(len(rows))
    missing = [lead for lead in STANDARD_LEADS if lead not in present]
    limbs_known = sum(lead in LIMB_LEADS for lead in present) >= 2
    derived = tuple(lead for lead in missing if limbs_known and lead in LIMB_LEADS)
    return Completion(matrix, derived, tuple(lead for lead in missing if lead not in derived))


def complete(signal: np.ndarray, present: Sequence[str]) -> tuple[np.ndarray, Completion]:
    """All twelve leads [12, T] from signal [P, T] of the leads ``present``."""
    how = completion(tuple(present))
    return how.matrix @ signal, how


def _from_independent() -> np.ndarray:
    """[12, 8]: the standard leads from the independent ones."""
    whole = np.zeros((12, 8))
    whole[:6, :2] = _LIMB_FROM_I_II
    whole[6:, 2:] = np.eye(6)
    return whole


@functools.cache
def _covariance() -> np.ndarray:
    """[8, 8] of the independent leads."""
    with COVARIANCE.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file)
    assert tuple(names) == INDEPENDENT_LEADS
    return np.array(rows, dtype=np.float64)
