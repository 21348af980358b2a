"""CUDA graphs of encoders."""

import pytest
import torch
from torch import Tensor, nn

from ecgot.models.encoders import CapturedInference, CapturedTraining, encoder

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Graphed:
    """Stands in for a CUDA graph: runs the module at capture, as warming up does, and at every call."""

    def __init__(self) -> None:
        self.calls = 0

    def make(self, module: nn.Module, sample: tuple[Tensor, ...]):  # type: ignore[no-untyped-def]
        for _ in range(3):
            module(*sample)

        def call(waveform: Tensor) -> tuple[Tensor, ...]:
            self.calls += 1
            return module(waveform)

        return call


def test_capturing_leaves_the_running_statistics_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = Graphed()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed.make)
    torch.manual_seed(0)
    model, other = (encoder("resnet1d_tiny").train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    captured = CapturedTraining(model)
    for samples in (200, 200, 150):
        waveform = torch.randn(4, 12, samples)
        found, expected = captured(waveform), other(waveform)
        torch.testing.assert_close(found.pooled, expected.pooled)
        torch.testing.assert_close(found.mask, expected.mask)
    assert graphed.calls == 2  # another shape runs as it is
    for (name, buffer), (_, plain) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, plain, msg=name)


def test_ragged_batches_and_evaluation_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    graphed = Graphed()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed.make)
    model = encoder("resnet1d_tiny").train()
    waveform = torch.randn(2, 12, 200)
    mask = CapturedTraining(model)(waveform, torch.tensor([200, 100])).mask
    assert mask.sum(1).tolist() == [7, 4]
    CapturedTraining(model.eval())(waveform)
    assert graphed.calls == 0


@GPU
@pytest.mark.parametrize("name", ["resnet1d_tiny", "merl_resnet18", "xresnet1d101"])
def test_a_captured_step_is_the_step(name: str) -> None:
    torch.manual_seed(0)
    model, other = (encoder(name).cuda().train() for _ in range(2))
    other.load_state_dict(model.state_dict())
    captured = CapturedTraining(model)
    for _ in range(3):
        waveform = torch.randn(4, 12, 1000, device="cuda")
        for module, encode in ((model, captured), (other, other)):
            module.zero_grad()
            encode(waveform).pooled.square().sum().backward()
        for (key, parameter), plain in zip(model.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, plain.grad, atol=1e-4, rtol=1e-3, msg=key)


@GPU
@pytest.mark.parametrize("name", ["resnet1d_tiny", "merl_resnet18", "xresnet1d101"])
def test_captured_inference_is_inference(name: str) -> None:
    model = encoder(name).cuda().eval()
    captured = CapturedInference(model)
    for batch in (4, 4, 2):
        waveform = torch.randn(batch, 12, 1000, device="cuda")
        with torch.no_grad():
            expected = model(waveform)
        torch.testing.assert_close(captured(waveform).tokens, expected.tokens, atol=1e-4, rtol=1e-3)
