"""Calls whose launches are counted: the headline cases of docs/benchmarks.md, on meta tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv.conv1d_norm import conv1d_norm
from ecgot.kernels.conv.join import materialize
from ecgot.kernels.conv.operands import BatchNorm, LazyActivation
from ecgot.kernels.ot.pairwise import sinkhorn_pairwise
from ecgot.kernels.ot.sinkhorn import sinkhorn
from ecgot.kernels.resources.launches import as_on_gpu
from ecgot.kernels.scaling.doubly_stochastic import doubly_stochastic

Call = Callable[[], object]
ALL_ITERATIONS: dict[str, Any] = {"eps": 0.1, "tol": 0.0}
BF16, FP32 = torch.bfloat16, torch.float32


def _points(*shape: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _solver(cost: str, backward: bool) -> Call:
    x, y = (_points(256, 128, 256, grad=backward) for _ in range(2))
    solve = _value(x, y, cost=cost, max_iter=100)
    return (lambda: _derived(solve())) if backward else solve


def _pairs(backward: bool) -> Call:
    x, y = _points(512, 64, 128, grad=backward), _points(512, 32, 128, grad=backward)

    def solve() -> Tensor:
        return sinkhorn_pairwise(x, y, max_iter=20, **ALL_ITERATIONS)

    return (lambda: _derived(solve())) if backward else solve


def _streaming() -> Call:
    x, y = (_points(1, 10_000, 64, dtype=FP32) for _ in range(2))
    return _value(x, y, cost="sqeuclidean", max_iter=16)


def _matrices(backward: bool) -> Call:
    """Of hyper-connections: a matrix a token, 32 layers of 32,768 tokens."""
    logits = _points(2**20, 4, 4, dtype=FP32, grad=backward)
    if not backward:
        return lambda: doubly_stochastic(logits)
    return lambda: _derived(doubly_stochastic(logits))


def _value(x: Tensor, y: Tensor, **settings: Any) -> Callable[[], Tensor]:
    return lambda: sinkhorn(x, y, **settings, **ALL_ITERATIONS).value


def _derived(value: Tensor) -> None:
    """Gradients, given one in each value."""
    torch.autograd.backward(value, torch.empty_like(value))


def _convolutions() -> Call:
    """Two layers, as the second reads what the first one's norm is to normalise."""
    x, weights = _points(256, 250, 64, grad=True), [_points(64, 64, 5, dtype=FP32, grad=True) for _ in "12"]
    vectors = [[_points(64, dtype=FP32, grad=grad) for grad in (True, True, False, False)] for _ in weights]

    def train() -> None:
        y = LazyActivation(x)
        for weight, (gamma, beta, mean, var) in zip(weights, vectors, strict=True):
            norm = BatchNorm(gamma, beta, running_mean=mean, running_var=var, training=True)
            y = conv1d_norm(y, weight, norm, padding=2, activation="relu")
        _derived(materialize(y).values)

    return train


def _encoder(training: bool, dtype: torch.dtype) -> Call:
    """xresnet1d101 on 10 s at 100 Hz: tokens, or the gradients of all parameters from one in the tokens."""
    from ecgot.models.encoders import encoder, fuse_norms

    with torch.device("meta"):
        model = encoder("xresnet1d101").train(training)
    waveform = _points(256, 12, 1000, dtype=FP32)

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", BF16, enabled=dtype == BF16, cache_enabled=False)

    def train() -> None:
        with autocast():
            tokens = model(waveform).tokens
        _derived(tokens)

    if training:
        return train
    fused = fuse_norms(model)

    def infer() -> None:
        with torch.no_grad(), autocast():
            fused(waveform)

    as_on_gpu(infer)  # the first use fuses
    return infer


# Names, and what makes their calls.
WORKLOADS: dict[str, Callable[[], Call]] = {
    "sinkhorn sqeuclidean bf16 256x128x128x256": lambda: _solver("sqeuclidean", False),
    "sinkhorn sqeuclidean bf16 256x128x128x256 and gradient": lambda: _solver("sqeuclidean", True),
    "sinkhorn cosine bf16 256x128x128x256": lambda: _solver("cosine", False),
    "sinkhorn cosine bf16 256x128x128x256 and gradient": lambda: _solver("cosine", True),
    "pairwise sqeuclidean bf16 512x512 64x32x128": lambda: _pairs(False),
    "pairwise sqeuclidean bf16 512x512 64x32x128 and gradient": lambda: _pairs(True),
    "streaming sqeuclidean fp32 10000x10000x64, 16 iterations": _streaming,
    "doubly stochastic fp32 1048576x4x4, 20 iterations": lambda: _matrices(False),
    "doubly stochastic fp32 1048576x4x4, 20 iterations and gradient": lambda: _matrices(True),
    "conv1d_norm bf16 256x250x64 k5 twice and gradient": _convolutions,
    "xresnet1d101 bf16 256x12x1000 inference": lambda: _encoder(False, BF16),
    "xresnet1d101 fp32 256x12x1000 inference": lambda: _encoder(False, FP32),
    "xresnet1d101 bf16 256x12x1000 training step": lambda: _encoder(True, BF16),
    "xresnet1d101 fp32 256x12x1000 training step": lambda: _encoder(True, FP32),
}
