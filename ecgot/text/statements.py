"""Splitting report text into sentences or statements.

A sentence ends at a full stop; a statement also ends at a semicolon or colon. A full stop without white
space after it, as in "0.5 mv", ends neither.
"""

import re

_STATEMENT_END = re.compile(r"[.;:](?:\s|$)")
_SENTENCE = re.compile(r"[^\s.](?:[^.]|\.(?!\s|$))*")


def statements(text: str) -> list[str]:
    """The statements of a text, at least one, without their final punctuation and surrounding white space."""
    found = [part.strip() for part in _STATEMENT_END.split(text)]
    return [part for part in found if part] or [text.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a text, without their full stops."""
    return [text[start:stop] for start, stop in sentence_spans(text)]


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and stop of each sentence in characters, its full stop not included."""
    return [match.span() for match in _SENTENCE.finditer(text)]
