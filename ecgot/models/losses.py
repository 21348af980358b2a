"""Alignment losses: contrasts of pooled embeddings and of token sets (by optimal transport or its rivals),
and whether each ECG's report says each phrase."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.choices import TOKEN_LOSSES, TOKEN_SIMILARITIES
from ecgot.kernels import sinkhorn
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.scores import Transport, phrase_logits, token_similarity_and_convergence


def contrastive_loss(similarity: Tensor, text_id: Tensor, temperature: Tensor) -> Tensor:
    """InfoNCE over a batch, both directions, with identical reports as positives of each other.

    Args:
        similarity: [B, B], of each ECG (row) to each report.
        text_id: [B], equal where reports are the same text. An ECG's targets are spread evenly over all
            columns that hold its report: otherwise the same words would count as both right and wrong.
        temperature: [].
    """
    logits = similarity / temperature
    same = text_id[:, None] == text_id[None, :]
    target = same / same.sum(1, keepdim=True)  # symmetric, so it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def phrase_loss(logits: Tensor, said: Tensor, weight: Tensor) -> Tensor:
    """Binary cross-entropy for saying each phrase: weighted sum over phrases, mean over records.

    Args:
        logits: [B, K], log-odds.
        said: [B, K], 1 where the record's report says the phrase.
        weight: [K], a weight for each phrase.
    """
    loss = F.binary_cross_entropy_with_logits(logits, said, reduction="none")
    return (loss @ weight).mean()


@dataclass
class SaidPhrases:
    """K phrases, and which of them each report of a batch says.

    Attributes:
        pooled: [K, D], the phrases' pooled embeddings from the text encoder.
        weight: [K], each phrase's weight in the loss.
        said: [B, K], 1 where a report says the phrase.
    """

    pooled: Tensor
    weight: Tensor
    said: Tensor


class AlignmentLoss(nn.Module):
    """The weighted sum of a contrast of the pooled embeddings, a token loss and :func:`phrase_loss`.

    Args:
        contrastive_weight, token_weight, phrase_weight: a term with weight 0 is not computed.
        token_loss: one of ``TOKEN_LOSSES``; those of ``TOKEN_SIMILARITIES`` are the similarity of a second
            contrast.
        transport: solver settings for the losses that use transport.
    """

    def __init__(
        self,
        *,
        contrastive_weight: float = 1.0,
        token_weight: float = 1.0,
        token_loss: str = "ot",
        phrase_weight: float = 0.0,
        transport: Transport | None = None,
    ) -> None:
        super().__init__()
        if token_loss not in TOKEN_LOSSES:
            raise ValueError(f"token_loss: expected one of {', '.join(TOKEN_LOSSES)}, got {token_loss!r}")
        self.contrastive_weight, self.token_weight = contrastive_weight, token_weight
        self.token_loss, self.phrase_weight = token_loss, phrase_weight
        self.transport = transport or Transport()

    def forward(
        self,
        ecg: Embedding,
        text: Embedding,
        text_id: Tensor,
        model: AlignmentModel,
        phrases: SaidPhrases | None = None,
    ) -> dict[str, Tensor]:
        """The terms with a weight ("contrastive", "token", "phrase") and their weighted sum, "loss".

        A transport loss adds "ot_converged", the share of its problems that converged, without a gradient.
        ``model`` holds the temperatures and the phrase prior; a phrase weight needs ``phrases``.
        """
        terms: dict[str, Tensor] = {}
        total = ecg.pooled.new_zeros(())
        if self.contrastive_weight:
            similarity = ecg.pooled @ text.pooled.T
            terms["contrastive"] = contrastive_loss(similarity, text_id, model.temperature)
            total = total + self.contrastive_weight * terms["contrastive"]
        if self.token_weight:
            terms["token"], converged = self._token_term(ecg, text, text_id, model)
            if converged is not None:
                terms["ot_converged"] = converged.float().mean()
            total = total + self.token_weight * terms["token"]
        if self.phrase_weight:
            if phrases is None:
                raise ValueError("phrases: expected SaidPhrases with a phrase_weight other than 0, got None")
            logits = phrase_logits(ecg.pooled, *model.embed_phrases(phrases.pooled), model.phrase_scale)
            terms["phrase"] = phrase_loss(logits, phrases.said, phrases.weight)
            total = total + self.phrase_weight * terms["phrase"]
        return terms | {"loss": total}

    def _token_term(
        self, ecg: Embedding, text: Embedding, text_id: Tensor, model: AlignmentModel
    ) -> tuple[Tensor, Tensor | None]:
        """The token term, and which of its transport problems converged, if it has any."""
        settings = self.transport
        if self.token_loss in TOKEN_SIMILARITIES:
            similarity, converged = token_similarity_and_convergence(self.token_loss, ecg, text, settings)
            return contrastive_loss(similarity, text_id, model.token_temperature), converged
        if self.token_loss == "wasserstein_1d":
            return wasserstein_1d(ecg.pooled, text.pooled), None
        masks: dict[str, Any] = {"x_mask": ecg.mask, "y_mask": text.mask}
        x, y = ecg.tokens, text.tokens
        if self.token_loss == "ot_batch":
            x, y, masks = ecg.pooled[None], text.pooled[None], {}
        solved = sinkhorn(x, y, **masks, **settings.arguments())
        return solved.value.mean(), solved.converged


def wasserstein_1d(x: Tensor, y: Tensor) -> Tensor:
    """W1 distance between the values of two tensors of equal shape: mean distance of the sorted values."""
    return (x.flatten().sort().values - y.flatten().sort().values).abs().mean()
