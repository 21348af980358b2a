"""Scores of ECGs against texts: log-odds of phrases, and similarities of token sets."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels import sinkhorn, sinkhorn_pairwise
from ecgot.models.alignment import Embedding
from ecgot.models.encoders import masked_mean


def phrase_logits(ecg: Tensor, phrases: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
    """Log-odds [B, K] that an ECG's report says a phrase.

    Args:
        ecg, phrases: pooled embeddings [B, E] and [K, E].
        prior: [K], the model's prior for each phrase.
        scale: [], the model's scale.
    """
    return scale * ecg @ phrases.T + prior


@dataclass(frozen=True)
class Transport:
    """Solver settings for :func:`ecgot.sinkhorn` on the cosine cost, which lies in [0, 2]."""

    eps: float = 0.1
    max_iter: int = 50
    tol: float = 1e-3

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of :func:`ecgot.sinkhorn`."""
        return {"cost": "cosine", **asdict(self)}


def token_similarity(name: str, ecg: Embedding, text: Embedding, transport: Transport) -> Tensor:
    """Similarity [B, K] between the tokens of each ECG and each text, one of ``TOKEN_SIMILARITIES``.

    Each pair is scored on its own.
    """
    return token_similarity_and_convergence(name, ecg, text, transport)[0]


def transport_plan(ecg: Embedding, text: Embedding, transport: Transport) -> Tensor:
    """The plan [B, N, M] that moves each text's tokens to those of its ECG; 0 at masked tokens, of sum 1."""
    masks: dict[str, Any] = {"x_mask": ecg.mask, "y_mask": text.mask}
    return sinkhorn(ecg.tokens, text.tokens, **masks, **transport.arguments()).plan()


def token_similarity_and_convergence(
    name: str, ecg: Embedding, text: Embedding, transport: Transport
) -> tuple[Tensor, Tensor | None]:
    """The similarity, and which transport problems converged, if it is transport."""
    if name == "ot":
        masks: dict[str, Any] = {"x_mask": ecg.mask, "y_mask": text.mask}
        solved = sinkhorn_pairwise(
            ecg.tokens, text.tokens, **masks, **transport.arguments(), full_output=True
        )
        return -solved.value, solved.converged
    x, y = F.normalize(ecg.tokens, dim=-1), F.normalize(text.tokens, dim=-1)
    if name == "mean_match":
        return masked_mean(x, ecg.mask) @ masked_mean(y, text.mask).T, None
    cosine = torch.einsum("bnd,kmd->bknm", x, y)
    x_mask, y_mask = ecg.mask[:, None, :], text.mask[None, :, :]
    best_of_x = cosine.masked_fill(~y_mask[:, :, None, :], -2).max(3).values.masked_fill(~x_mask, 0).sum(2)
    best_of_y = cosine.masked_fill(~x_mask[:, :, :, None], -2).max(2).values.masked_fill(~y_mask, 0).sum(2)
    # A side without tokens gives 0, not NaN.
    some = x_mask.any(2) & y_mask.any(2)
    both = best_of_x / x_mask.sum(2).clamp_min(1) + best_of_y / y_mask.sum(2).clamp_min(1)
    return (both / 2).masked_fill(~some, 0.0), None
