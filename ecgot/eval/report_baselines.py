"""Reports that a system without a language model would write: what generated ones are compared with."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

MAX_TYPICAL_CANDIDATES = 60  # distinct reports among which the most typical one is looked for
_Key = TypeVar("_Key")
_Both = tuple[str, frozenset[str]]  # recorder, codes
MIN_REPORTS = 3  # reports of a recorder with the same codes, to go by them alone


@dataclass(frozen=True)
class Baselines:
    """Reports that a system without a language model would write: texts of the training folds.

    most_frequent: the commonest one; nearest: for each of n records that of the nearest training ECG;
    same_codes: for each of n records the one most like the others among the reports of the same SCP codes;
    same_codes_and_recorder: and of the same recorder, whose program and readers have their own words; empty
    where no record names one. The last two know the record's codes, so that they show how far knowing every
    finding goes, without the words, and with the recorder's.
    """

    most_frequent: str
    nearest: tuple[str, ...]
    same_codes: tuple[str, ...]
    same_codes_and_recorder: tuple[str, ...] = ()


@dataclass(frozen=True)
class BaselineInputs:
    """What baselines know of n records: pooled encoder tokens [n, D], SCP codes, recorders ("": unknown)."""

    features: np.ndarray
    codes: Sequence[frozenset[str]]
    recorders: Sequence[str]


def baseline_reports(
    train: BaselineInputs, train_reports: Sequence[str], wanted: BaselineInputs
) -> Baselines | None:
    """Baselines for n records; None where no training record has a report.

    Args:
        train: m records.
        train_reports: m, "" where there is none.
        wanted: n records; neighbours are by cosine of the features.
    """
    rows = np.array([row for row, text in enumerate(train_reports) if text], dtype=np.int64)
    if not len(rows):
        return None
    known, targets = _unit(train.features[rows]), _unit(wanted.features)
    nearest = [int((known @ each).argmax()) for each in targets]
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
    known: Sequence[frozenset[str]], texts: Sequence[str], wanted: Sequence[frozenset[str]]
) -> tuple[str, ...]:
    by_codes = _grouped(known, texts)
    typical = {codes: _most_typical(_of_codes(by_codes, codes)) for codes in set(wanted)}
    return tuple(typical[codes] for codes in wanted)


def _of_recorder(
    known: Sequence[_Both], texts: Sequence[str], wanted: Sequence[_Both], *, otherwise: Sequence[str]
) -> tuple[str, ...]:
    """The most typical report of a recorder and codes; ``otherwise`` where it is unknown or has few."""
    by_both = _grouped(known, texts)
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
    """The reports of records with these codes or, where there are none, of the set that shares most."""
    if codes in by_codes:
        return by_codes[codes]
    return by_codes[max(by_codes, key=lambda other: len(other & codes) / max(len(other | codes), 1))]


def _most_typical(reports: Counter[str]) -> str:
    """The report that shares most n-grams of up to four words with all, among the commonest few."""
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
    """Mean F1 of n-grams over the orders."""
    scores = []
    for one, other in zip(first, second, strict=True):
        total = one.total() + other.total()
        scores.append(2 * (one & other).total() / total if total else 0.0)
    return sum(scores) / len(scores)


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
