"""One stage-1 training step of the default recipe, forward, backward and AdamW, with and without transport.

On a GPU also with the encoder in plain torch ("torch"), compiled ("torch_compiled"), and rewritten as Conv2d
channels-last and compiled ("conv2d_compiled"); the loss is ecgot's for all.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Measure
from benchmarks.encoders import AsImage, compiled
from ecgot.bench.providers import OURS
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import EncoderOutput, encoder, masked_mean, plain_encoder
from ecgot.models.losses import AlignmentLoss, SaidPhrases
from ecgot.models.text_encoder import TextTokens

BATCH, LEADS, SAMPLES = 64, 12, 1000
WORDS, LONGEST, TEXT_WIDTH = 16, 61, 384  # reports of PTB-XL: words on average, tokens in the longest
PHRASES, PHRASE_WEIGHT = 1100, 3.0
# So small that the last round solves the transport problems of the first.
LEARNING_RATE = 1e-6
STOCK = ("torch", "torch_compiled", "conv2d_compiled") if torch.cuda.is_available() else ("torch",)


class Stock(nn.Module):
    """The encoder in torch's own modules, as the alignment model takes it; its records are whole."""

    def __init__(self, provider: str, name: str) -> None:
        super().__init__()
        self.width = encoder(name, leads=LEADS).width
        plain = plain_encoder(name, leads=LEADS)
        if provider == "conv2d_compiled":
            plain = AsImage(plain)
        self.encode = plain if provider == "torch" else compiled(plain)

    def forward(self, waveform: Tensor, _lengths: Tensor | None = None) -> EncoderOutput:
        """waveform [B, L, T] to tokens, their mask (all valid) and their mean."""
        tokens = self.encode(waveform)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return EncoderOutput(tokens, mask, tokens.mean(1))


@pytest.mark.parametrize("provider", [OURS, *STOCK])
@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_training_step(token_weight: float, provider: str, device: torch.device, measure: Measure) -> None:
    name = "resnet1d_small"
    made: Any = encoder(name, leads=LEADS) if provider == OURS else Stock(provider, name)
    model = AlignmentModel(made, TEXT_WIDTH).to(device).train()
    terms = _terms(model, AlignmentLoss(token_weight=token_weight, phrase_weight=PHRASE_WEIGHT), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        terms()["loss"].backward()
        optimizer.step()

    step()  # blocks start as their shortcuts: only after a step do gradients reach every weight
    _check_gradients(model, terms)
    measure(step, provider=provider, case=f"token_weight={token_weight:g}")


def _terms(
    model: AlignmentModel, loss: AlignmentLoss, device: torch.device
) -> Callable[[], dict[str, Tensor]]:
    waveform = torch.randn(BATCH, LEADS, SAMPLES, device=device)
    tokens = torch.randn(BATCH, LONGEST, TEXT_WIDTH, device=device)
    words = torch.linspace(3, 2 * WORDS, BATCH, device=device).round()
    words[-1] = LONGEST
    mask = torch.arange(LONGEST, device=device) < words[:, None]
    text = TextTokens(tokens, mask, masked_mean(tokens, mask))
    text_id = torch.arange(BATCH, device=device)
    said = (torch.rand(BATCH, PHRASES, device=device) < 0.05).float()
    pooled = nn.functional.normalize(torch.randn(PHRASES, TEXT_WIDTH, device=device), dim=1)
    phrases = SaidPhrases(pooled, torch.full((PHRASES,), 1 / PHRASES, device=device), said)
    return lambda: loss(model.embed_ecg(waveform), model.embed_text(text), text_id, model, phrases)


def _check_gradients(model: AlignmentModel, terms: Callable[[], dict[str, Tensor]]) -> None:
    """All finite; and those of the transport loss alone reach every parameter of the encoder."""
    parameters = list(model.parameters())
    found = terms()
    grads = torch.autograd.grad(found["loss"], parameters, allow_unused=True)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        if name == "log_token_temperature" and "token" not in found:
            continue
        assert torch.isfinite(grad).all(), f"{name}: the gradient is not finite"
    if "token" not in found:
        return
    transport_grads = torch.autograd.grad(terms()["token"], list(model.encoder.parameters()))
    for (name, _), grad in zip(model.encoder.named_parameters(), transport_grads, strict=True):
        assert grad.any(), f"encoder.{name}: no gradient of the transport loss"
