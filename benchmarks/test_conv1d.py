"""A residual network's layer, relu(scale * conv(x) + shift): ecgot and torch.

The layers are those of ``resnet1d_small`` on ten seconds at 100 Hz, and a wider one. Each provider gets the
layout that it prefers: ecgot [B, T, C], torch [B, C, T]. At inference torch also runs with the scale folded
into the weight and the shift as bias, beforehand and for nothing: the best that one can do with it by hand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.conftest import Measure
from ecgot.bench.providers import OURS
from ecgot.kernels import conv1d
from ecgot.models.encoders import plain_encoder

BATCH = 64
SAMPLES = 1000
OUTPUT_TOLERANCE = 1e-5  # relative to the largest entry; fp32 sums of up to 1280 products
GRADIENT_TOLERANCE = 1e-4  # the same; sums over batch and time as well
NEAR_ZERO = 1e-4  # ReLU's derivative depends on rounding nearer to its corner than this


@dataclass(frozen=True)
class Shape:
    """A layer's channels, kernel and stride, and the length of its input."""

    c_in: int
    c_out: int
    kernel_size: int
    stride: int
    length: int

    def __str__(self) -> str:
        return f"{self.c_in}to{self.c_out}_k{self.kernel_size}_s{self.stride}_T{self.length}"

    @property
    def geometry(self) -> dict[str, Any]:
        """Stride and padding, as a convolution takes them."""
        return {"stride": self.stride, "padding": self.kernel_size // 2}


def _encoder_shapes() -> list[Shape]:
    """Those of the encoder's layers, as it calls them."""
    shapes: dict[Shape, None] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, nn.Conv1d)
        c_out, c_in, kernel_size = module.weight.shape
        shapes[Shape(c_in, c_out, kernel_size, module.stride[0], inputs[0].shape[2])] = None

    model = plain_encoder("resnet1d_small").eval()
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 12, SAMPLES))
    return list(shapes)


SHAPES = [*_encoder_shapes(), Shape(256, 256, kernel_size=5, stride=1, length=250)]


# --- layers and their fp64 result ---------------------------------------------------------------------------


@dataclass
class Layer:
    """Tensors of a layer (x [B, T, C_in]), a cotangent, the fp64 output [B, T_out, C_out] and gradients."""

    shape: Shape
    tensors: dict[str, Tensor]
    cotangent: Tensor
    output: Tensor
    grads: tuple[Tensor, ...]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def layer(request: pytest.FixtureRequest, device: torch.device) -> Layer:
    shape = request.param
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(BATCH, shape.length, shape.c_in, generator=generator),
        "weight": torch.randn(shape.c_out, shape.c_in, shape.kernel_size, generator=generator),
        "scale": torch.rand(shape.c_out, generator=generator) + 0.5,
        "shift": torch.randn(shape.c_out, generator=generator),
    }
    tensors["weight"] /= math.sqrt(shape.c_in * shape.kernel_size)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    truth = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    linear = _linear_fp64(*truth.values(), **shape.geometry)
    cotangent = torch.randn(linear.shape, generator=generator).to(device)
    cotangent = cotangent.masked_fill(linear.abs() < NEAR_ZERO, 0.0)
    output = linear.relu()
    grads = torch.autograd.grad(output, list(truth.values()), cotangent.double())
    return Layer(shape, tensors, cotangent, output.detach(), grads)


def _linear_fp64(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, padding: int
) -> Tensor:
    """The layer before its ReLU as a sum over windows; no convolution of torch's is involved."""
    windows = F.pad(x, (0, 0, padding, padding)).unfold(1, weight.shape[2], stride)  # [B, T_out, C_in, K]
    return torch.einsum("btck,ock->bto", windows, weight) * scale + shift


# --- providers: a layer's tensors and geometry, x in the provider's layout, to the output in that layout ----


def _ecgot(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, padding: int) -> Tensor:
    return conv1d(x, weight, stride=stride, padding=padding, scale=scale, shift=shift, activation="relu")


def _torch(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, padding: int) -> Tensor:
    y = F.conv1d(x, weight, stride=stride, padding=padding)
    return torch.relu(y * scale[:, None] + shift[:, None])


def _in_layout(provider: str, tensor: Tensor) -> Tensor:
    """[B, T, C] to the provider's layout, and back."""
    return tensor if provider == OURS else tensor.mT.contiguous()


# --- benchmarks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", [OURS, "torch", "torch_folded"])
def test_conv1d_inference(provider: str, layer: Layer, measure: Measure) -> None:
    forward = _forward(provider, layer)
    with torch.inference_mode():
        error = _relative_error(_in_layout(provider, forward()), layer.output)
        errors = {"output": (error, OUTPUT_TOLERANCE)}
        measure(forward, provider=provider, case=str(layer.shape), errors=errors)


def _forward(provider: str, layer: Layer) -> Callable[[], Tensor]:
    x, weight, scale, shift = layer.tensors.values()
    x, geometry = _in_layout(provider, x), layer.shape.geometry
    if provider == "torch_folded":
        fused = weight * scale[:, None, None]
        return lambda: F.conv1d(x, fused, shift, **geometry).relu_()
    function = _ecgot if provider == OURS else _torch
    return lambda: function(x, weight, scale, shift, **geometry)


@pytest.mark.parametrize("provider", [OURS, "torch"])
def test_conv1d_training(provider: str, layer: Layer, measure: Measure) -> None:
    x, *others = layer.tensors.values()
    leaves = [t.detach().clone().requires_grad_() for t in (_in_layout(provider, x), *others)]
    cotangent = _in_layout(provider, layer.cotangent)
    function = _ecgot if provider == OURS else _torch

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, **layer.shape.geometry), leaves, cotangent)

    grad_x, *grads = forward_backward()
    found = (_in_layout(provider, grad_x), *grads)
    errors = {"gradient": (max(map(_relative_error, found, layer.grads)), GRADIENT_TOLERANCE)}
    measure(forward_backward, provider=provider, case=str(layer.shape), errors=errors)


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
