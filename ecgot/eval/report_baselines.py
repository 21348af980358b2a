"""Reports of systems without a language model, as baselines for generated ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MAX_TYPICAL_CANDIDATES = 60  # distinct reports to search for the most typical one
MIN_REPORTS = 3  # reports by one recorder with the same codes that are enough to pick the typical one
_Key = TypeVar("_Key")
_RecorderAndCodes = tuple[str, frozenset[str]]


@dataclass(frozen=True)
class Baselines:
    """Reports picked from the training folds for n records.

    Attributes:
        most_frequent: the most common report, the same for every record.
        nearest: for each record the report of the nearest training ECG.
        same_codes: for each record, of all reports with its SCP codes, the one most like the others.
        same_codes_and_recorder: the same among reports by its recorder, whose software and readers have their
            own wording; empty if no record names a recorder.

    The last two are given the record's codes: they show how far knowing every finding goes without the
    wording, and with the recorder's wording.
    """

    most_frequent: str
    nearest: tuple[str, ...]
    same_codes: tuple[str, ...]
    same_codes_and_recorder: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaselineInputs:
    """What baselines know about n records.

    Attributes:
        features: pooled encoder tokens [n, D].
        codes: n sets of SCP codes.
        recorders: n names, "" if unknown.
    """

    features: np.ndarray
    codes: Sequence[frozenset[str]]
    recorders: Sequence[str]


def baseline_reports(
    train: BaselineInputs, train_reports: Sequence[str], wanted: BaselineInputs
) -> Baselines | None:
    """Baselines for n records; None if no training record has a report.

    Args:
        train: m records.
        train_reports: their m reports, "" for none.
        wanted: n records. The nearest ECG is the one whose features have the largest cosine.
    """
    rows = np.array([row for row, text in enumerate(train_reports) if text], dtype=np.int64)
    if not len(rows):
        return None
    train_features, targets = _unit(train.features[rows]), _unit(wanted.features)
    nearest = [int((train_features @ each).argmax()) for each in targets]
    texts = [train_reports[row] for row in rows]
    same_codes = _same_codes([train.codes[row] for row in rows], texts, wanted.codes)
    return Baselines(
        most_frequent=Counter(texts).most_common(1)[0][0],
        nearest=tuple(texts[row] for row in nearest),
        same_codes=same_codes,
        same_codes_and_recorder=_of_recorder(
            [(train.recorders[row], train.codes[row]) for row in rows],
            texts,
            list(zip(wanted.recorders, wanted.codes, strict=True)),
            otherwise=same_codes,
        )
        if any(wanted.recorders)
        else (),
    )


def _same_codes(
    train_codes: Sequence[frozenset[str]], texts: Sequence[str], wanted: Sequence[frozenset[str]]
) -> tuple[str, ...]:
    by_codes = _grouped(train_codes, texts)
    typical = {codes: _most_typical(_of_codes(by_codes, codes)) for codes in set(wanted)}
    return tuple(typical[codes] for codes in wanted)


def _of_recorder(
    train_keys: Sequence[_RecorderAndCodes],
    texts: Sequence[str],
    wanted: Sequence[_RecorderAndCodes],
    *,
    otherwise: Sequence[str],
) -> tuple[str, ...]:
    """The most typical report of a recorder with the same codes; ``otherwise`` if it has too few."""
    by_both = _grouped(train_keys, texts)
    typical = {
        both: _most_typical(by_both[both])
        for both in set(wanted) & by_both.keys()
        if both[0] and by_both[both].total() >= MIN_REPORTS
    }
    return tuple(typical.get(both, other) for both, other in zip(wanted, otherwise, strict=True))


def _grouped(keys: Sequence[_Key], texts: Sequence[str]) -> dict[_Key, Counter[str]]:
    found: dict[_Key, Counter[str]] = {}
    for key, text in zip(keys, texts, strict=True):
        found.setdefault(key, Counter())[text] += 1
    return found


def _of_codes(by_codes: Mapping[frozenset[str], Counter[str]], codes: frozenset[str]) -> Counter[str]:
    """Reports of records with exactly these codes, else with the most similar set (by Jaccard index)."""
    if codes in by_codes:
        return by_codes[codes]
    return by_codes[max(by_codes, key=lambda other: len(other & codes) / max(len(other | codes), 1))]


def _most_typical(reports: Counter[str]) -> str:
    """Among the most common reports, the one that shares most n-grams of up to four words with the rest."""
    counted = [(text, _ngrams(text), count) for text, count in reports.most_common(MAX_TYPICAL_CANDIDATES)]
    shared = {
        text: sum(count * _overlap(ngrams, others) for _, others, count in counted)
        for text, ngrams, _ in counted
    }
    return max(shared, key=shared.__getitem__)


def _ngrams(text: str) -> list[Counter[tuple[str, ...]]]:
    words = text.split()
    return [Counter(zip(*(words[start:] for start in range(order)), strict=False)) for order in range(1, 5)]


def _overlap(first: list[Counter[tuple[str, ...]]], second: list[Counter[tuple[str, ...]]]) -> float:
    """F1 of shared n-grams, the mean over their orders."""
    scores = []
    for one, other in zip(first, second, strict=True):
        total = one.total() + other.total()
        scores.append(2 * (one & other).total() / total if total else 0.0)
    return sum(scores) / len(scores)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
