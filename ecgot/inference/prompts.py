"""Prompts that a user types: what they affirm and deny, and whether they name a finding at all.

A prompt is cleaned as training reports are, German or Swedish into English included. What stands after "no"
or "without", or before "absent" or "ruled out", is denied: it scores by the log-odds that a report does *not*
say it. The parts of "sinus rhythm without st changes" hold together, as independent events.

Text encoders embed any text, and a score comes out for "banana" too. So a prompt must lie nearer to texts
about ECGs than to others, see :class:`FindingTest`.
"""

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.errors import EcgotError
from ecgot.inference.calibration import NAMES
from ecgot.inference.zeroshot import class_scores, embed_prompts, noisy_or, read_prompts
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.scores import Transport
from ecgot.models.text_encoder import TextEncoder
from ecgot.text.cleaning import clean_report
from ecgot.text.glossary import plain_english

TEXTS = Path(__file__).with_name("finding_texts.toml")
LEAST_SIMILARITY = 0.3  # cosine to the nearest finding
PROMPTS = "prompts"  # the group of a user's prompts

_OF_WHAT = r"(?:(?:any|a|an|the|definite)\s+)*(?:(?:evidence|signs?|indications?)\s+(?:of|for)\s+)?"
# "no change" and "no longer" deny nothing by themselves; "not" may belong to a verb except at the start.
_DENIES_NEXT = re.compile(
    r"(?:(?:^|[\s,;]+)(?:(?:and|but|with)\s+)?(?:no|without|absence\s+of|negative\s+for)|^not)\s+"
    rf"(?!change|longer){_OF_WHAT}"
)
_DENIES_LAST = re.compile(
    r"(?<!cannot be)(?<!not)(?<!not be)\s+(?:(?:is|are|was|were)\s+)?"
    r"(?:absent|excluded|ruled\s+out|not\s+(?:present|seen|detected|evident|found))$"
)
_DENIAL_ENDS = re.compile(r"\s*(?:[,;]|\bbut\b|\bwith\b)\s*")


@dataclass(frozen=True)
class Part:
    """A part of a prompt: a finding, and whether the prompt denies it."""

    text: str
    denied: bool


def parse_prompt(prompt: str) -> tuple[Part, ...]:
    """The parts of a prompt, at least one.

    >>> parse_prompt("Sinus rhythm, no evidence of right bundle branch block")
    (Part(text='sinus rhythm', denied=False), Part(text='right bundle branch block', denied=True))
    >>> parse_prompt("Atrial fibrillation is absent")
    (Part(text='atrial fibrillation', denied=True),)

    Raises:
        EcgotError: the prompt is empty, or nothing is left of it.
    """
    known = _texts()["abbreviations"]
    text = re.sub(r"[^\W_]+", lambda word: known.get(word[0], word[0]), plain_english(clean_report(prompt)))
    parts: list[Part] = []
    rest = text
    while found := _DENIES_NEXT.search(rest):
        parts += _affirmed(rest[: found.start()])
        denied, end, after = _split(rest[found.end() :])
        parts += [Part(denied, denied=True)] if denied else []
        rest = after if end else ""
    parts += _affirmed(rest)
    if not parts:
        raise EcgotError(f"prompt: expected the words of a finding, got {prompt!r}")
    return tuple(parts)


def _split(text: str) -> tuple[str, bool, str]:
    """What is denied at the start of a text, whether more follows, and what."""
    end = _DENIAL_ENDS.search(text)
    return (text.strip(" ."), False, "") if end is None else (text[: end.start()], True, text[end.end() :])


def _affirmed(text: str) -> list[Part]:
    """The part before or after a denial, itself denied if it ends so."""
    stripped = text.strip(" ,;.")
    if stripped in ("", "no", "not", "without"):
        return []
    last = _DENIES_LAST.search(stripped)
    return [Part(stripped[: last.start()].strip(" ,;.") if last else stripped, denied=last is not None)]


@functools.cache
def _texts() -> dict[str, Any]:
    return tomllib.loads(TEXTS.read_text(encoding="utf-8"))


class FindingTest:
    """Tells texts that name a finding of an ECG from any others, by a text encoder.

    Embeddings are centred between the texts about ECGs (the built-in prompts, the names of classes and the
    terms of ``finding_texts.toml``) and the other texts there. A text is a finding if its nearest neighbour
    by cosine is one, at LEAST_SIMILARITY or above.
    """

    def __init__(self, text: TextEncoder) -> None:
        tables = _texts()
        names = tomllib.loads(NAMES.read_text(encoding="utf-8"))
        findings = {each for group in read_prompts().values() for texts in group.values() for each in texts}
        findings |= {name.lower() for group in names.values() for name in group.values()}
        self._text = text
        about, others = (
            self._embedded(sorted(findings | set(tables["terms"]))),
            self._embedded(tables["others"]),
        )
        self._centre = (about.mean(0) + others.mean(0)) / 2
        self._about, self._others = self._centred(about), self._centred(others)

    def __call__(self, texts: Sequence[str]) -> list[bool]:
        """Whether each of the texts names a finding."""
        embedded = self._centred(self._embedded(texts))
        finding, other = (embedded @ known.T for known in (self._about, self._others))
        nearest = finding.amax(1)
        return ((nearest > other.amax(1)) & (nearest >= LEAST_SIMILARITY)).tolist()

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> Tensor:
        return self._text.eval()(texts).pooled

    def _centred(self, embedded: Tensor) -> Tensor:
        return F.normalize(embedded - self._centre, dim=1)


@torch.no_grad()
def prompt_scores(
    model: AlignmentModel,
    text: TextEncoder,
    ecg: Embedding,
    prompts: Sequence[str],
    *,
    names_finding: FindingTest | None = None,
    score: str = "phrase",
    transport: Transport | None = None,
) -> dict[str, Tensor]:
    """Scores [B] of B embedded ECGs by a user's prompts.

    Args:
        text: the run's text encoder.
        names_finding: made of ``text`` if omitted.
        score, transport: see :func:`ecgot.inference.zeroshot.class_scores`. What is denied has the score's
            negative. Several parts score by the log-odds of all together; with another score than "phrase" by
            the lowest.

    Raises:
        EcgotError: a prompt is empty or names no finding.
    """
    parsed = {prompt: parse_prompt(prompt) for prompt in prompts}
    texts = sorted({part.text for parts in parsed.values() for part in parts})
    if not texts:
        return {}
    check_findings(names_finding or FindingTest(text), parsed)
    embedded = embed_prompts(model, text, {PROMPTS: {each: (each,) for each in texts}})
    scores = class_scores(ecg, embedded, score=score, transport=transport)[PROMPTS]
    return {
        prompt: _together([_signed(scores[:, texts.index(part.text)], part) for part in parts], score)
        for prompt, parts in parsed.items()
    }


def check_findings(names_finding: FindingTest, parsed: dict[str, tuple[Part, ...]]) -> None:
    """Raise EcgotError for the first prompt with a part that names no finding."""
    texts = sorted({part.text for parts in parsed.values() for part in parts})
    known = dict(zip(texts, names_finding(texts), strict=True))
    for prompt, parts in parsed.items():
        if not all(known[part.text] for part in parts):
            raise EcgotError(
                "prompt: expected a finding of an ECG in a report's words, such as 'atrial fibrillation', "
                f"got {prompt!r}"
            )


def _signed(score: Tensor, part: Part) -> Tensor:
    return -score if part.denied else score


def _together(scores: list[Tensor], score: str) -> Tensor:
    """The score of all parts together: of not any that does not hold."""
    stacked = torch.stack(scores, dim=-1)
    return -noisy_or(-stacked) if score == "phrase" else stacked.amin(-1)
