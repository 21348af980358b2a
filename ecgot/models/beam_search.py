"""Search for the most probable text of a decoder: greedy, or with beams.

The rules are those of transformers' ``generate`` by default: a text's score is its log-probability over its
number of tokens, the end-of-text token counted; of the 2 K best continuations of K beams those that end are
put aside if they are among the best K, and the best K others go on; a record is done when K texts are put
aside and the best beam's score is no better than the worst of them.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ecgot.models.decoder import Decoder

_NEVER = -1e9  # score of what does not exist


class Text(NamedTuple):
    """Tokens without the end-of-text token, and their log-probabilities [len(ids)]."""

    ids: list[int]
    log_probability: Tensor


@dataclass
class _Beams:
    """b records that are being written, with K beams each and the K best texts that have ended.

    Attributes:
        row: [b], the record's number in the batch.
        score, done_score: [b, K], best first; the sum of log-probabilities, and their mean.
        tokens, done_tokens: [b, K, T], filled up with end-of-text tokens.
        known, done_known: [b, K, T], their log-probabilities.
        is_done: [b, K], whether there is such a text.
    """

    row: Tensor
    score: Tensor
    tokens: Tensor
    known: Tensor
    done_score: Tensor
    done_tokens: Tensor
    done_known: Tensor
    is_done: Tensor

    @classmethod
    def begin(cls, records: int, beams: int, max_tokens: int, eos_id: int, like: Tensor) -> "_Beams":
        score = like.new_full((records, beams), _NEVER)
        tokens = torch.full((records, beams, max_tokens), eos_id, device=like.device)
        known = like.new_zeros(records, beams, max_tokens)
        first = score.index_fill(1, torch.tensor([0], device=like.device), 0.0)  # all begin as one
        row = torch.arange(records, device=like.device)
        return cls(row, first, tokens, known, score, tokens, known, score > 0)

    def advance(self, log_probability: Tensor, length: int, *, eos_id: int) -> tuple[Tensor, Tensor]:
        """Add a token to every beam, given log-probabilities [b, K, V]; texts then have ``length`` tokens.

        Returns each beam's new token and the beam that it goes on from, [b, K] each.
        """
        beams, vocabulary = log_probability.shape[1:]
        total = (log_probability + self.score[:, :, None]).flatten(1)
        score, index = total.topk(2 * beams)
        parent, token = index // vocabulary, index % vocabulary
        known = log_probability.flatten(1).gather(1, index)
        ends = token == eos_id if length < self.tokens.shape[2] else torch.ones_like(token, dtype=torch.bool)
        ended = ends & (torch.arange(2 * beams, device=token.device) < beams)
        if bool(ended.any()):
            self._put_aside(score / length, ended, parent, token, known, length)
        on = (score + ends * _NEVER).topk(beams).indices
        self.score, token = (score + ends * _NEVER).gather(1, on), token.gather(1, on)
        parent, known = parent.gather(1, on), known.gather(1, on)
        self.tokens = _with_last(self.tokens, parent, token, length)
        self.known = _with_last(self.known, parent, known, length)
        return token, parent

    def _put_aside(
        self, mean: Tensor, ended: Tensor, parent: Tensor, token: Tensor, known: Tensor, length: int
    ) -> None:
        """Keep the best K of the texts that ended before and of those that ended now."""
        scores = torch.cat([self.done_score, mean.masked_fill(~ended, _NEVER)], 1)
        self.done_score, best = scores.topk(self.done_score.shape[1])
        self.is_done = torch.cat([self.is_done, ended], 1).gather(1, best)
        now = _with_last(self.tokens, parent, token, length), _with_last(self.known, parent, known, length)
        self.done_tokens = _picked(torch.cat([self.done_tokens, now[0]], 1), best)
        self.done_known = _picked(torch.cat([self.done_known, now[1]], 1), best)

    def closed(self, length: int) -> Tensor:
        """[b], whether the best of the running beams cannot better the texts put aside."""
        worst = self.done_score.amin(1).masked_fill(~self.is_done.all(1), _NEVER)
        return self.score[:, 0] / length <= worst

    def best(self, which: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Record, tokens and log-probabilities of the best text of each of the records ``which`` [b] bool."""
        rows = self.row[which].tolist()
        return list(zip(rows, self.done_tokens[which, 0], self.done_known[which, 0], strict=True))

    def keep(self, order: Tensor) -> None:
        """Keep only the records ``order`` [count], in this order."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[order])


def _picked(values: Tensor, beam: Tensor) -> Tensor:
    """[b, n, T] of values [b, m, T], by the numbers [b, n] of beams."""
    return values.gather(1, beam[:, :, None].expand(-1, -1, values.shape[2]))


def _with_last(values: Tensor, parent: Tensor, last: Tensor, length: int) -> Tensor:
    """The values [b, n, T] of the beams ``parent`` [b, n], with ``last`` as the value numbered ``length``."""
    picked = _picked(values, parent)
    picked[:, :, length - 1] = last
    return picked


@torch.no_grad()
def search(decoder: Decoder, prefix: Tensor, mask: Tensor, *, beams: int, max_tokens: int) -> list[Text]:
    """The best text after each prefix [b, P, W] with mask [b, P] of 0 and 1.

    Args:
        beams: K, 1 takes the most probable token each time.
        max_tokens: T, the longest text, its end-of-text token included.
    """
    if beams == 1:
        return _greedy(decoder, prefix, mask, max_tokens)
    eos_id = decoder.shape.eos_id
    first, cache = decoder.read(prefix, mask, beams=beams)
    state = _Beams.begin(len(prefix), beams, max_tokens, eos_id, prefix)
    log_probability = first[:, None].expand(-1, beams, -1)
    found: dict[int, Text] = {}
    for length in range(1, max_tokens + 1):
        token, parent = state.advance(log_probability, length, eos_id=eos_id)
        closed = state.closed(length) if length < max_tokens else torch.ones_like(state.row, dtype=torch.bool)
        if bool(closed.any()):
            found |= {row: _text(tokens, known, eos_id) for row, tokens, known in state.best(closed)}
            order = _open_in_front(closed)
            if not len(order):
                break
            state.keep(order)
            cache.keep(order)
            token, parent = token[order], parent[order]
        log_probability = decoder.step(token, parent, cache)
    return [found[row] for row in range(len(prefix))]


def _open_in_front(closed: Tensor) -> Tensor:
    """Numbers of the open records, given which are closed [b]; as many as can stay where they are."""
    count = int((~closed).sum())
    order = torch.arange(count, device=closed.device)
    order[closed[:count]] = count + (~closed[count:]).nonzero().squeeze(1)
    return order


def _text(tokens: Tensor, known: Tensor, eos_id: int) -> Text:
    """The text of tokens [T], which are filled up with end-of-text tokens."""
    count = int((tokens != eos_id).sum())
    return Text(tokens[:count].tolist(), known[:count].cpu())


def _greedy(decoder: Decoder, prefix: Tensor, mask: Tensor, max_tokens: int) -> list[Text]:
    """The most probable token each time."""
    eos_id, count = decoder.shape.eos_id, len(prefix)
    first, cache = decoder.read(prefix, mask, beams=1)
    log_probability, row = first[:, None], torch.arange(count, device=prefix.device)
    tokens = torch.full((count, max_tokens), eos_id, device=prefix.device)
    known = prefix.new_zeros(count, max_tokens)
    for length in range(max_tokens):
        best, token = log_probability.max(2)
        tokens[row, length], known[row, length] = token[:, 0], best[:, 0]
        order = _open_in_front(token[:, 0] == eos_id)
        if not len(order):
            break
        if len(order) < len(row):
            cache.keep(order)
            row, token = row[order], token[order]
        if length + 1 < max_tokens:
            log_probability = decoder.step(token, torch.zeros_like(token), cache)
    return [_text(*each, eos_id) for each in zip(tokens, known, strict=True)]
