"""What all report writers share: how ECG tokens condition a language model, and what a written report is.

Report wording depends on the ECG device ("recorder") and its readers. A known recorder adds a token in front
of the ECG's; "" is the unknown recorder, which also occurs in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecgot.choices import BEAMS
from ecgot.text.statements import sentence_spans


@dataclass(frozen=True)
class WrittenReport:
    """A generated report and its sentences with their probabilities.

    A sentence's probability is the product over its tokens, given the ECG and the preceding text.
    """

    text: str
    sentences: tuple[tuple[str, float], ...]


def with_sentences(
    report: str, token_spans: Sequence[tuple[int, int]], log_probability: Tensor
) -> WrittenReport:
    """The report with the probability of each sentence.

    Args:
        token_spans: start and end of each of the report's tokens, in characters.
        log_probability: of these tokens and possibly more, such as the end of the text.
    """
    spans = torch.tensor(token_spans).view(-1, 2)
    found = []
    for start, stop in sentence_spans(report):
        # One token may hold both the sentence's last letters and its full stop.
        inside = (spans[:, 0] < stop) & (spans[:, 1] > start)
        found.append((report[start:stop], log_probability[: len(spans)][inside].double().sum().exp().item()))
    return WrittenReport(report, tuple(found))


class Writer(nn.Module):
    """The ECG's side of a model that writes reports; subclasses add the language model.

    Args:
        ecg_width: D, width of the ECG tokens.
        width: W, of the language model's embeddings.
        recorders: names with an embedding; all others are unknown. Empty: no conditioning on recorders.
    """

    def __init__(self, ecg_width: int, width: int, recorders: Sequence[str] = ()) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.LayerNorm(ecg_width), nn.Linear(ecg_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.recorders = tuple(recorders)
        self.recorder_embedding: nn.Embedding | None = None
        if self.recorders:
            self.recorder_embedding = nn.Embedding(1 + len(self.recorders), width)  # row 0: unknown
            nn.init.normal_(self.recorder_embedding.weight, std=0.02)  # usual for language models

    def write(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        recorders: Sequence[str] | None = None,
        num_beams: int = BEAMS,
    ) -> list[WrittenReport]:
        """Write reports of B ECGs by beam search, which is greedy with one beam.

        A record's report does not depend on the rest of its batch.

        Args:
            tokens: ECG tokens [B, N, D].
            mask: [B, N] bool, True at tokens, False at padding.
            recorders: names of the B recorders, "" if unknown; None: all unknown.
            num_beams: beams of the search.
        """
        raise NotImplementedError

    def condition(
        self, tokens: Tensor, mask: Tensor, recorders: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """The prefix [B, P, W] that a report is conditioned on, and its mask [B, P] of 0 and 1."""
        prefix, mask = self.projector(tokens), mask.long()
        if self.recorder_embedding is not None:
            row_of = {name: row for row, name in enumerate(self.recorders, start=1)}
            names = [""] * len(tokens) if recorders is None else recorders
            if len(names) != len(tokens):
                raise ValueError(f"recorders: expected {len(tokens)}, one for each ECG, got {len(names)}")
            rows = torch.tensor([row_of.get(name, 0) for name in names], dtype=torch.long)
            token = self.recorder_embedding(rows.to(tokens.device))[:, None]
            # In front: after the ECG it would follow padding, which relative positions count.
            prefix = torch.cat([token.to(prefix.dtype), prefix], 1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return prefix, mask
