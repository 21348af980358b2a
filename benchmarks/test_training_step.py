"""One stage-1 training step, forward, backward and AdamW, with and without the transport loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import OURS, Measure
from ecgot.models.alignment import AlignmentLoss, AlignmentModel
from ecgot.models.encoders import encoder, masked_mean
from ecgot.models.text import TextTokens

BATCH, LEADS, SAMPLES = 64, 12, 1000
WORDS, LONGEST, TEXT_WIDTH = 16, 61, 384  # reports of PTB-XL: words on average, tokens in the longest
# So small that the last round solves the transport problems of the first.
LEARNING_RATE = 1e-6


@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_training_step(token_weight: float, device: torch.device, measure: Measure) -> None:
    model = AlignmentModel(encoder("resnet1d_small", leads=LEADS), TEXT_WIDTH).to(device).train()
    terms = _terms(model, AlignmentLoss(token_weight=token_weight), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        terms()["loss"].backward()
        optimizer.step()

    step()  # blocks start as their shortcuts: only after a step do gradients reach every weight
    _check_gradients(model, terms())
    measure(step, provider=OURS, case=f"token_weight={token_weight:g}")


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
    return lambda: loss(model.embed_ecg(waveform), model.embed_text(text), text_id, model)


def _check_gradients(model: AlignmentModel, terms: dict[str, Tensor]) -> None:
    """All finite; and those of the transport loss alone reach every parameter of the encoder."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(terms["loss"], parameters, retain_graph=True, allow_unused=True)
    for (name, _), grad in zip(model.named_parameters(), grads, strict=True):
        if name == "log_token_temperature" and "token" not in terms:
            continue
        assert torch.isfinite(grad).all(), f"{name}: the gradient is not finite"
    if "token" not in terms:
        return
    transport_grads = torch.autograd.grad(terms["token"], list(model.encoder.parameters()))
    for (name, _), grad in zip(model.encoder.named_parameters(), transport_grads, strict=True):
        assert grad.any(), f"encoder.{name}: no gradient of the transport loss"
