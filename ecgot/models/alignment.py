"""The alignment model: ECG and report tokens in one shared space."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.models.encoders import Encoder, EncoderOutput
from ecgot.models.text_encoder import TextTokens


@dataclass
class Embedding:
    """tokens [B, N, E] in the shared space, mask [B, N], pooled [B, E] of unit length.

    prior: [B], texts only: how often the model expects a phrase to be said, as log-odds.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    prior: Tensor | None = None


class AlignmentModel(nn.Module):
    """An ECG encoder, a projection into the shared space for each modality, and a prior for phrases.

    Each modality has one projection, shared by its tokens and its pooled embedding, so that a loss on tokens
    also moves the embedding that zero-shot scores use. The text projection has a hidden layer, as the text
    encoder is usually frozen.

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
        # Identifies the frozen text encoder that the model was trained with; saved with the weights.
        self.text_fingerprint: Tensor
        self.register_buffer("text_fingerprint", torch.zeros(16, dtype=torch.uint8))
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())
        self.log_token_temperature = nn.Parameter(torch.tensor(0.07).log())

    def embed_ecg(self, waveform: Tensor, lengths: Tensor | None = None) -> Embedding:
        """Embed waveform [B, L, T] in mV; lengths [B] as the encoder takes them."""
        return self.project_tokens(self.encoder(waveform, lengths))

    def project_tokens(self, encoded: EncoderOutput) -> Embedding:
        """Project the encoder's output into the shared space."""
        return _embedding(self.project_ecg(encoded.tokens), encoded.mask, self.project_ecg(encoded.pooled))

    def embed_text(self, text: TextTokens) -> Embedding:
        """Project text tokens into the shared space."""
        tokens = _project_valid(self.project_text, text.tokens, text.mask)
        return Embedding(tokens, text.mask, *self.embed_phrases(text.pooled))

    def embed_phrases(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length embeddings [K, E] and priors [K] of the text encoder's pooled embeddings [K, D]."""
        return F.normalize(self.project_text(pooled), dim=-1), self.phrase_prior(pooled).squeeze(1)

    @property
    def temperature(self) -> Tensor:
        """Temperature of the contrastive loss, at least 0.01 as in CLIP, so that logits stay within 100."""
        return self.log_temperature.exp().clamp_min(0.01)

    @property
    def phrase_scale(self) -> Tensor:
        """The scale of :func:`ecgot.models.scores.phrase_logits`."""
        return self.log_phrase_scale.exp()

    @property
    def token_temperature(self) -> Tensor:
        """Temperature of the contrastive token loss, also at least 0.01."""
        return self.log_token_temperature.exp().clamp_min(0.01)


def _embedding(projected: Tensor, mask: Tensor, pooled: Tensor) -> Embedding:
    return Embedding(projected, mask, F.normalize(pooled, dim=-1))


def _project_valid(projection: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Project tokens [B, M, D] to [B, M, E], 0 where masked. Padding is skipped."""
    valid = mask.flatten().nonzero().squeeze(1)
    projected = projection(tokens.flatten(0, 1).index_select(0, valid))
    whole = projected.new_zeros(mask.numel(), projected.shape[1])
    return whole.index_copy(0, valid, projected).view(*mask.shape, -1)


def rank_of_match(similarity: Tensor, match: Tensor) -> Tensor:
    """For each row, how many non-matching columns rank above its best match: [n], 0 if the match is on top.

    Ties and NaN count against the match.

    Args:
        similarity: [n, K].
        match: [n, K] bool.
    """
    best = similarity.masked_fill(~match, -torch.inf).amax(1, keepdim=True)
    return (~(similarity < best) & ~match).sum(1)
