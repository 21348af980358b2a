"""Alignment of ECG and report tokens in one space: contrasts of pooled embeddings, of token sets by optimal
transport, and of each ECG with the phrases that reports are made of."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import sinkhorn, sinkhorn_pairwise
from ecgot.kernels.sinkhorn import SinkhornOutput, SinkhornPairwiseOutput
from ecgot.models.encoders import Encoder, EncoderOutput
from ecgot.models.text import TextTokens


@dataclass
class Embedding:
    """tokens [B, N, E] in the shared space, mask [B, N], pooled [B, E] of unit length.

    prior: of texts, [B]: how common the model expects a phrase to be, as log-odds.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    prior: Tensor | None = None


class AlignmentModel(nn.Module):
    """An ECG encoder, the two projections into the shared space, and how common a phrase is.

    One map a modality serves tokens and pooled embedding alike, so that what transport teaches the tokens
    also moves the embedding that zero-shot scores read. That of text, which comes from a frozen model, has a
    hidden layer.

    Args:
        encoder: waveform [B, L, T] to :class:`EncoderOutput`.
        text_width: width of the text encoder's tokens.
        width: E, of the shared space.

    Attributes:
        ecg_width: width of the encoder's tokens.
    """

    def __init__(self, encoder: Encoder, text_width: int, width: int = 256) -> None:
        super().__init__()
        self.encoder, self.ecg_width = encoder, encoder.width
        self.project_ecg = nn.Linear(encoder.width, width)
        self.project_text = nn.Sequential(
            nn.Linear(text_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.phrase_prior = nn.Sequential(nn.Linear(text_width, width), nn.GELU(), nn.Linear(width, 1))
        self.log_phrase_scale = nn.Parameter(torch.tensor(10.0).log())
        # Of the frozen text encoder that the model was trained on: 16 bytes, which travel with the weights.
        self.text_fingerprint: Tensor
        self.register_buffer("text_fingerprint", torch.zeros(16, dtype=torch.uint8))
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        self.log_ot_temperature = nn.Parameter(torch.tensor(0.07).log())

    def embed_ecg(self, waveform: Tensor, lengths: Tensor | None = None) -> Embedding:
        """waveform [B, L, T] in mV, lengths [B]: see the encoder."""
        return self.project_tokens(self.encoder(waveform, lengths))

    def project_tokens(self, encoded: EncoderOutput) -> Embedding:
        """The encoder's output into the shared space."""
        return _embedding(self.project_ecg(encoded.tokens), encoded.mask, self.project_ecg(encoded.pooled))

    def embed_text(self, text: TextTokens) -> Embedding:
        """Text tokens into the shared space."""
        tokens = _project_valid(self.project_text, text.tokens, text.mask)
        return Embedding(tokens, text.mask, *self.embed_phrases(text.pooled))

    def embed_phrases(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled embeddings [K, E] of unit length and priors [K], of the text encoder's [K, D]."""
        return F.normalize(self.project_text(pooled), dim=-1), self.phrase_prior(pooled).squeeze(1)

    @property
    def temperature(self) -> Tensor:
        """The contrastive loss's temperature, kept above 0.01 (as in CLIP) so that logits stay below 100."""
        return self.log_temperature.exp().clamp_min(0.01)

    @property
    def phrase_scale(self) -> Tensor:
        """That of :func:`phrase_logits`."""
        return self.log_phrase_scale.exp()

    @property
    def ot_temperature(self) -> Tensor:
        """That of the contrast by transport, alike."""
        return self.log_ot_temperature.exp().clamp_min(0.01)


def _embedding(projected: Tensor, mask: Tensor, pooled: Tensor) -> Embedding:
    return Embedding(projected, mask, F.normalize(pooled, dim=-1))


def _project_valid(projection: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """tokens [B, M, D] to [B, M, E], 0 where masked: most of a batch of reports is padding, so it pays."""
    valid = mask.flatten().nonzero().squeeze(1)
    projected = projection(tokens.flatten(0, 1).index_select(0, valid))
    whole = projected.new_zeros(mask.numel(), projected.shape[1])
    return whole.index_copy(0, valid, projected).view(*mask.shape, -1)


def contrastive_loss(similarity: Tensor, text_id: Tensor, temperature: Tensor) -> Tensor:
    """InfoNCE over a batch, both directions, with identical reports as positives of each other.

    Args:
        similarity: [B, B], of each ECG (row) to each report.
        text_id: [B], equal where reports are the same text. An ECG's targets are spread evenly over all
            columns that hold its report: otherwise the same words would be right and wrong at once.
        temperature: [].
    """
    logits = similarity / temperature
    same = text_id[:, None] == text_id[None, :]
    target = same / same.sum(1, keepdim=True)  # symmetric, so it serves both directions
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def phrase_logits(ecg: Tensor, phrases: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
    """Log-odds [B, K] that an ECG's report says a phrase.

    Args:
        ecg, phrases: pooled embeddings [B, E] and [K, E].
        prior: [K], of the phrases; scale: [], both of the model.
    """
    return scale * ecg @ phrases.T + prior


def phrase_loss(logits: Tensor, said: Tensor, weight: Tensor) -> Tensor:
    """Whether each phrase is said: the weighted sum of cross entropies over phrases, the mean over records.

    Args:
        logits: [B, K], log-odds.
        said: [B, K], 1 where the record's report says the phrase.
        weight: [K], of the phrases.
    """
    loss = F.binary_cross_entropy_with_logits(logits, said, reduction="none")
    return (loss @ weight).mean()


OT_PAIRS = ("all", "matched")


class AlignmentLoss(nn.Module):
    """contrastive_weight * contrast of the pooled embeddings + ot_weight * transport between token sets.

    Args:
        contrastive_weight, ot_weight: 0 leaves a term out (and its cost).
        ot_pairs: "all": transport between each ECG and each report of the batch is the similarity of a second
            contrast; "matched": the mean cost between each ECG and its own report.
        eps, max_iter, tol: of :func:`ecgot.sinkhorn`, on the cosine cost.
    """

    def __init__(
        self,
        *,
        contrastive_weight: float = 1.0,
        ot_weight: float = 1.0,
        ot_pairs: str = "all",
        eps: float = 0.1,
        max_iter: int = 50,
        tol: float = 1e-3,
    ) -> None:
        super().__init__()
        if ot_pairs not in OT_PAIRS:
            raise ValueError(f"ot_pairs: got {ot_pairs!r}, accepted are {' and '.join(map(repr, OT_PAIRS))}")
        self.contrastive_weight, self.ot_weight, self.ot_pairs = contrastive_weight, ot_weight, ot_pairs
        self.eps, self.max_iter, self.tol = eps, max_iter, tol

    def forward(
        self, ecg: Embedding, text: Embedding, text_id: Tensor, model: AlignmentModel
    ) -> dict[str, Tensor]:
        """The terms and their weighted sum: "loss", "contrastive", "ot" (those with a weight).

        With "ot" comes "ot_converged", the share of its problems that converged; it carries no gradient.
        ``model`` holds the temperatures.
        """
        terms: dict[str, Tensor] = {}
        total = ecg.pooled.new_zeros(())
        if self.contrastive_weight:
            similarity = ecg.pooled @ text.pooled.T
            terms["contrastive"] = contrastive_loss(similarity, text_id, model.temperature)
            total = total + self.contrastive_weight * terms["contrastive"]
        if self.ot_weight:
            settings = _transport_settings(ecg, text, self.eps, self.max_iter, self.tol)
            transport: SinkhornOutput | SinkhornPairwiseOutput
            if self.ot_pairs == "all":
                transport = sinkhorn_pairwise(ecg.tokens, text.tokens, **settings, full_output=True)
                terms["ot"] = contrastive_loss(-transport.value, text_id, model.ot_temperature)
            else:
                transport = sinkhorn(ecg.tokens, text.tokens, **settings)
                terms["ot"] = transport.value.mean()
            terms["ot_converged"] = transport.converged.float().mean()
            total = total + self.ot_weight * terms["ot"]
        return terms | {"loss": total}


def transport_similarity(ecg: Embedding, text: Embedding, *, eps: float, max_iter: int, tol: float) -> Tensor:
    """Minus the transport cost between each ECG and each text: [B, K]; every pair is solved alone."""
    return -sinkhorn_pairwise(ecg.tokens, text.tokens, **_transport_settings(ecg, text, eps, max_iter, tol))


def _transport_settings(
    ecg: Embedding, text: Embedding, eps: float, max_iter: int, tol: float
) -> dict[str, Any]:
    sides = {"x_mask": ecg.mask, "y_mask": text.mask}
    return sides | {"cost": "cosine", "eps": eps, "max_iter": max_iter, "tol": tol}
