"""Report statements in plain English, one spelling for each meaning."""

import functools
import re
from importlib import resources

_SPACE_BEFORE = re.compile(r"\s+([.,])")
_REPEATED = re.compile(r"([.,])[.,\s]*([.,])")


def plain_english(text: str) -> str:
    """A cleaned report with its German, Swedish and half-translated statements in English.

    ``glossary.txt`` holds the rules. What no rule knows stays as it is; text that is English already only
    gets one spelling.

    Args:
        text: as :func:`ecgot.data.reports.clean_report` leaves it.
    """
    text = " ".join(text.split())
    for pattern, replacement in _rules():
        text = pattern.sub(replacement, text)
    text = _SPACE_BEFORE.sub(r"\1", " ".join(text.split()))
    return _REPEATED.sub(r"\2", text).strip(" ,.;-")


@functools.cache
def _rules() -> list[tuple[re.Pattern[str], str]]:
    lines = (resources.files("ecgot.data") / "glossary.txt").read_text(encoding="utf-8").splitlines()
    rules = []
    for line in lines:
        if line.strip() and not line.startswith("#"):
            pattern, _, replacement = line.partition("=>")
            rules.append((re.compile(pattern.strip()), replacement.removeprefix(" ")))
    return rules
