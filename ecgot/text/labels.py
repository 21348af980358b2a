"""The classes that a report states, read from its text by the rules of ``labels.toml``."""

import functools
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ecgot.text.cleaning import clean_report
from ecgot.text.glossary import plain_english
from ecgot.text.statements import sentences

RULES = Path(__file__).with_name("labels.toml")
Patterns = Iterable[Sequence[re.Pattern[str]]]
# A negation reaches up to "but" or "with", which introduce findings; "no change in" negates nothing.
_DENIED_BEFORE = re.compile(r"\b(?:no|without)(?: (?!(?:but|with|change)\b)\w+){0,8} ?$")
_DENIED_AFTER = re.compile(
    r"^\w*(?: (?!(?:but|with|and|or|cannot|not|no)\b)\w+){0,5}?"
    r" (?:ruled out|excluded|absent|(?:not|no longer) (?:present|seen|detected|evident))\b"
)


@functools.cache
def _rules() -> dict[str, dict[str, list[re.Pattern[str]]]]:
    tables = tomllib.loads(RULES.read_text(encoding="utf-8"))
    return {
        group: {name: [re.compile(p) for p in patterns] for name, patterns in classes.items()}
        for group, classes in tables.items()
    }


def label_groups() -> dict[str, tuple[str, ...]]:
    """Classes that can be read from a report, by label group."""
    return {group: tuple(classes) for group, classes in _rules().items()}


def stated_labels(reports: Sequence[str], group: str) -> np.ndarray:
    """Which classes of ``group`` each of n reports states: [n, C], in the order of :func:`label_groups`."""
    rules = _rules()[group].values()
    distinct = {report: _states(_plain(report), rules) for report in set(reports)}
    return np.array([distinct[report] for report in reports], bool).reshape(len(reports), len(rules))


@functools.lru_cache(maxsize=1 << 16)
def _plain(report: str) -> str:
    return plain_english(clean_report(report))


def _states(report: str, rules: Patterns) -> list[bool]:
    parts = sentences(report)
    return [any(_found(pattern, text) for pattern in patterns for text in parts) for patterns in rules]


def _found(pattern: re.Pattern[str], sentence: str) -> bool:
    return any(
        not _DENIED_BEFORE.search(sentence[: match.start()])
        and not _DENIED_AFTER.search(sentence[match.end() :])
        for match in pattern.finditer(sentence)
    )
