"""Which findings a sentence of a report names."""

import functools
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# How reports word each class: group -> class -> phrases.
PHRASES = Path(__file__).parents[1] / "inference" / "prompts.toml"
_DENIED = re.compile(r"\b(?:no|not|without)\b(?: \w+){0,4} ?$")


def named_findings(sentence: str, findings: Sequence[Any]) -> tuple[Any, ...]:
    """The findings that a sentence names, the one with the longest words first.

    A finding is named by its name or by a phrase by which its class is scored. Among equals the first is
    the one with this very name, then the more special class, which has fewer phrases and is no superclass,
    then what is stated and more probable.

    Args:
        findings: each an :class:`ecgot.inference.calibration.Finding`.
    """
    said = _plain(sentence)
    found = []
    for finding in findings:
        phrases = _phrases().get(finding.group, {}).get(finding.code, [])
        words = [finding.name, *phrases]
        longest = max((len(each) for each in map(_plain, words) if _says(said, each)), default=0)
        if longest:
            special, stated = finding.group != "superclass", finding.stated is True
            own = _says(said, _plain(finding.name))
            rank = (longest, own, special, -len(phrases), stated, finding.probability)
            found.append((rank, finding))
    return tuple(finding for _, finding in sorted(found, key=lambda each: each[0], reverse=True))


def _says(sentence: str, phrase: str) -> bool:
    at = re.search(rf"\b{re.escape(phrase)}\b", sentence)
    return bool(phrase) and at is not None and not _DENIED.search(sentence[: at.start()])


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text.casefold().replace("ischaemi", "ischemi")).strip()


@functools.cache
def _phrases() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads(PHRASES.read_text(encoding="utf-8"))
