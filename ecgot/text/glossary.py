"""Report statements in plain English, with one spelling for each meaning."""

import functools
import re
from importlib import resources

_SPACE_BEFORE = re.compile(r"\s+([.,])")
_PUNCTUATION_RUN = re.compile(r"[.,](?:\s*[.,])+")
_PART = re.compile(r"\{([A-Z]+)\}")


def plain_english(text: str) -> str:
    """A cleaned report with its German, Swedish and half-translated statements in English.

    ``glossary.txt`` holds the rules. Text that no rule covers stays as it is; English text only has its
    spelling unified.

    Args:
        text: as returned by :func:`ecgot.text.cleaning.clean_report`.
    """
    text = " ".join(text.split())
    for guard, rules in _groups():
        if guard is None or guard.search(text):
            for pattern, replacement in rules:
                text, changes = pattern.subn(replacement, text)
                if changes:
                    text = _tidy(text)
    return _tidy(text).strip(" ,.;-")


def _tidy(text: str) -> str:
    text = _SPACE_BEFORE.sub(r"\1", " ".join(text.split()))
    return _PUNCTUATION_RUN.sub(lambda run: "." if "." in run[0] else ",", text)


@functools.cache
def _groups() -> list[tuple[re.Pattern[str] | None, list[tuple[re.Pattern[str], str]]]]:
    text = (resources.files("ecgot.text") / "glossary.txt").read_text(encoding="utf-8")
    parts: dict[str, str] = {}
    groups = []
    for block in text.split("\n\n"):
        guard = None
        rules = []
        for line in block.splitlines():
            if not line or line.startswith("#"):
                continue
            if line.startswith("IF "):
                guard = re.compile(line.removeprefix("IF "))
            elif " := " in line:
                name, _, part = line.partition(" := ")
                parts[name] = _with_parts(part, parts)
            else:
                pattern, _, replacement = line.partition(" => ")
                rules.append((re.compile(_with_parts(pattern, parts)), replacement))
        groups.append((guard, rules))
    return groups


def _with_parts(pattern: str, parts: dict[str, str]) -> str:
    return _PART.sub(lambda match: parts[match[1]], pattern)
