"""Retrieval between ECGs and reports."""

import torch
from torch import Tensor

from ecgot.choices import TOKEN_SIMILARITIES
from ecgot.models.alignment import Embedding, rank_of_match
from ecgot.models.scores import Transport, token_similarity
from ecgot.runs.records import BATCH

DEPTHS = (1, 5, 10)


@torch.no_grad()
def retrieval(
    ecg: Embedding,
    reports: Embedding,
    own: Tensor,
    *,
    score: str = "cosine",
    transport: Transport | None = None,
) -> dict[str, float]:
    """Recall at 1, 5 and 10: of each ECG's report among distinct reports, and of each report's ECGs.

    A report is found if any of its own ECGs is among the first. Ties and NaN count against the model.

    Args:
        ecg: n records.
        reports: K distinct texts, each the report of at least one record.
        own: [n], the index of each record's report.
        score: a token similarity, see :data:`ecgot.choices.TOKEN_SIMILARITIES`; any other name is the cosine
            of the pooled embeddings.
        transport: settings of the "ot" similarity; the defaults if omitted.

    Returns:
        "ecg_to_report@1", ..., "report_to_ecg@10".
    """
    texts = [_rows(reports, columns) for columns in torch.arange(len(reports.pooled)).split(BATCH)]
    transport = transport or Transport()
    similarity = torch.cat(
        [
            torch.cat([_similarity(some, each, score, transport) for each in texts], dim=1)
            for some in (_rows(ecg, rows) for rows in torch.arange(len(own)).split(BATCH))
        ]
    )
    matching = own[:, None] == torch.arange(similarity.shape[1], device=own.device)
    found: dict[str, float] = {}
    for name, values, match in (
        ("ecg_to_report", similarity, matching),
        ("report_to_ecg", similarity.T, matching.T),
    ):
        rank = rank_of_match(values, match)
        found |= {f"{name}@{depth}": (rank < depth).float().mean().item() for depth in DEPTHS}
    return found


def _rows(embedding: Embedding, rows: Tensor) -> Embedding:
    return Embedding(embedding.tokens[rows], embedding.mask[rows], embedding.pooled[rows])


def _similarity(ecg: Embedding, reports: Embedding, score: str, transport: Transport) -> Tensor:
    if score in TOKEN_SIMILARITIES:
        return token_similarity(score, ecg, reports, transport)
    return ecg.pooled @ reports.pooled.T
