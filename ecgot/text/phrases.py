"""The phrases that reports are made of: what each ECG's report says and does not say.

Only text is read here. A report is a set of statements, and most disease classes are stated in few words, so
whether a report contains a phrase is a label that needs no annotator.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ecgot.errors import EcgotError
from ecgot.text.statements import statements

_WORD = re.compile(r"[^\W_](?:[\w&()/'-]*)")
# A phrase neither begins nor ends with these words.
_JOINING = {"and", "or", "of", "to", "be", "is", "are"}
_LEADING = _JOINING | {"the", "a", "in", "with", "for", "this"}


@dataclass(frozen=True)
class Phrases:
    """K phrases and which of n reports say them.

    Attributes:
        texts: K phrases.
        said: [n, K], 1 if the report contains the phrase.
        weight: [K], for :func:`ecgot.models.losses.phrase_loss`: 1 / sqrt(entropy of the phrase), so that
            common phrases weigh less, scaled so that predicting every phrase at its base rate costs 1.
        log_odds: mean over phrases of their log-odds of being in a report.
    """

    texts: tuple[str, ...]
    said: sparse.csr_matrix
    weight: Tensor
    log_odds: float


def find_phrases(reports: Sequence[str], *, min_count: int, max_words: int) -> Phrases:
    """Find the phrases that at least ``min_count`` reports contain.

    A phrase is a run of up to ``max_words`` words within a statement, or a whole statement. Of phrases that
    occur in exactly the same reports, only the longest is kept.

    Raises:
        EcgotError: there is no such phrase.
    """
    rows_of: defaultdict[str, list[int]] = defaultdict(list)
    for row, report in enumerate(reports):
        for phrase in _phrases(report, max_words):
            rows_of[phrase].append(row)
    longest: dict[bytes, str] = {}
    for phrase, found in rows_of.items():
        if len(found) >= min_count:
            key = np.array(found, np.int32).tobytes()
            longest[key] = max(longest.get(key, ""), phrase, key=lambda text: (len(text), text))
    texts = tuple(sorted(longest.values()))
    if not texts:
        raise EcgotError(
            f"align.phrase_min_count: expected a count that some phrase of {len(reports)} reports reaches, "
            f"got {min_count}"
        )
    counts = [len(rows_of[text]) for text in texts]
    columns = np.repeat(np.arange(len(texts)), counts)
    rows = np.concatenate([rows_of[text] for text in texts])
    said = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), (len(reports), len(texts)))
    share = torch.from_numpy(np.asarray(said.mean(0)).ravel()).float().clamp(max=0.995)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log())
    weight = entropy.rsqrt()
    return Phrases(texts, said, weight / (weight @ entropy), float(torch.logit(share).mean()))


def _phrases(report: str, max_words: int) -> set[str]:
    found: set[str] = set()
    for statement in statements(report):
        words = _WORD.findall(statement)
        runs = [
            words[start : start + length]
            for length in range(1, max_words + 1)
            for start in range(len(words) - length + 1)
        ]
        if len(words) > max_words:
            runs.append(words)  # the whole statement
        found.update(" ".join(run) for run in runs if _is_phrase(run))
    return found


def _is_phrase(words: Sequence[str]) -> bool:
    if words[0] in _JOINING or words[-1] in _LEADING:
        return False
    return any(sum(letter.isalpha() for letter in word) > 1 for word in words)
