"""Reports split into statements and sentences: the one place where it is said what ends them."""

import re

STATEMENT_END = re.compile(r"[.;:](?:\s|$)")


def statements(text: str) -> list[str]:
    """The statements of a report, at least one: it ends at a full stop, semicolon or colon."""
    found = [part.strip() for part in STATEMENT_END.split(text)]
    return [part for part in found if part] or [text.strip()]


_SENTENCE = re.compile(r"[^\s.](?:[^.]|\.(?!\s|$))*")


def sentences(report: str) -> list[str]:
    """The sentences of a report, without their full stops."""
    return [report[start:stop] for start, stop in sentence_spans(report)]


def sentence_spans(report: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends, its full stop left out."""
    return [match.span() for match in _SENTENCE.finditer(report)]
