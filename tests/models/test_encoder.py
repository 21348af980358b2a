"""The ECG encoder: shapes, masks, batch independence, and the fused path against plain torch."""

import pytest
import torch
from torch.nn import functional as F

from ecgot.errors import EcgotError
from ecgot.models.encoder import ENCODERS, BasicBlock, ConvNorm, encoder, masked_mean


def with_running_statistics(module: torch.nn.Module, *shape: int) -> torch.nn.Module:
    """The module in eval mode with batch-norm statistics and weights that are not their initial values."""
    torch.manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.2)
            torch.nn.init.normal_(layer.running_mean, std=0.2)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return module.eval()


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return with_running_statistics(encoder("resnet1d_tiny"))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("samples", [1000, 333, 1])
def test_shapes(name, samples):
    model = encoder(name, leads=3).eval()
    out = model(torch.randn(2, 3, samples))
    tokens = -(-samples // 32)
    assert out.tokens.shape == (2, tokens, model.width)
    assert out.mask.shape == (2, tokens)
    assert out.mask.all()
    assert out.pooled.shape == (2, model.width)
    torch.testing.assert_close(out.pooled, out.tokens.mean(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("activation", [True, False])
def test_the_fused_layer_is_convolution_norm_residual_relu(stride, activation):
    layer = with_running_statistics(ConvNorm(5, 7, 3, stride, activation=activation))
    x, residual = torch.randn(2, 11, 5), torch.randn(2, -(-11 // stride), 7)
    y = F.conv1d(x.transpose(1, 2), layer.weight, stride=stride, padding=1)
    norm = layer.norm
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias).transpose(1, 2)
    expected = y + residual
    expected = torch.relu(expected) if activation else expected
    torch.testing.assert_close(layer(x, residual), expected, atol=1e-5, rtol=1e-5)


def test_training_mode_normalises_by_the_batch():
    layer = ConvNorm(3, 4, 3, activation=False).train()
    y = layer(torch.randn(6, 50, 3))
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 1), correction=0), torch.ones(4), atol=1e-3, rtol=0)


def test_a_new_block_is_its_shortcut():
    block = BasicBlock(4, 4, 5, 1).eval()
    x = torch.rand(2, 9, 4)  # positive, so that the last ReLU changes nothing
    torch.testing.assert_close(block(x, None)[0], x)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 500, 777])
def test_a_masked_record_gives_what_the_cropped_record_gives(tiny, length):
    signal = torch.randn(1, 12, 1000)
    signal[:, :, length:] = float("nan")  # what lies behind the end must not be read
    masked, cropped = tiny(signal, torch.tensor([length])), tiny(signal[:, :, :length])
    count = cropped.tokens.shape[1]
    assert masked.mask[0].tolist() == [True] * count + [False] * (32 - count)
    torch.testing.assert_close(masked.tokens[:, :count], cropped.tokens, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masked.pooled, cropped.pooled, atol=1e-5, rtol=1e-4)


def test_a_record_does_not_depend_on_its_batch_mates(tiny):
    signal = torch.randn(5, 12, 1000)
    alone = tiny(signal[2:3]).pooled
    torch.testing.assert_close(tiny(signal).pooled[2:3], alone, atol=1e-6, rtol=1e-5)
    louder = signal.clone()
    louder[[0, 1, 3, 4]] *= 100
    torch.testing.assert_close(tiny(louder).pooled[2:3], alone, atol=1e-6, rtol=1e-5)


def test_masked_mean_of_nothing_is_zero():
    mean = masked_mean(torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False] * 3]))
    assert mean[1].tolist() == [0.0] * 4


def test_bad_input_is_named(tiny):
    with pytest.raises(
        EcgotError, match=r"waveform: got shape \(2, 3, 100\), accepted is \[B, 12 leads, T\]"
    ):
        tiny(torch.randn(2, 3, 100))
    with pytest.raises(EcgotError, match=r"encoder.name: got 'vgg', accepted are resnet1d_tiny"):
        encoder("vgg")
