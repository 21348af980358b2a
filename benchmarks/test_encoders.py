"""Whole encoders, inference and training step (forward and backward), against the same networks in torch.

Providers: "torch", the plain modules; on a GPU also "torch_compiled" (max-autotune), "conv2d_compiled" (the
network rewritten as Conv2d(1, k), channels-last, max-autotune with CUDA graphs: the best that a user can do
by hand) and "ecgot_graph", ecgot captured in a CUDA graph. Every result is compared with the fp64 network's
first; half precision may be as wrong as torch's own is, twice.

On a GPU all are in bf16, B = 256, at 10 s of 100 Hz and of 500 Hz; on a CPU in fp32, B = 64, at 100 Hz.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.conftest import Compare, Errors, Measure, Work
from ecgot.bench.providers import OURS
from ecgot.models.encoders import (
    ENCODERS,
    CapturedInference,
    CapturedTraining,
    encoder,
    fuse_norms,
    plain_encoder,
    to_channels_last,
)

GPU = torch.cuda.is_available()
BATCH = 256 if GPU else 64
DTYPE = torch.bfloat16 if GPU else torch.float32
CASES = [(name, samples) for name in ENCODERS for samples in ((1000, 5000) if GPU else (1000,))]
RESIDUAL = ("resnet1d", "merl_", "xresnet1d")  # those whose modules also run on images
# Relative to the norm. A ReLU whose input is 0 but for rounding falls to either side, and with it a unit's
# gradient: torch's own error is 1e-6 or up to 3e-2, as it happens.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 5e-2
Run = Callable[[], object]


@dataclass
class Case:
    """An encoder's twin, a batch, what the fp64 twin makes of it, and torch's own error."""

    name: str
    twin: nn.Module
    waveform: Tensor
    cotangent: Tensor
    tokens: Tensor
    grads: list[Tensor]
    tolerance: tuple[float, float]
    work: Work  # of a forward pass
    training_work: Work

    def __str__(self) -> str:
        return f"{self.name} B={BATCH} L={self.waveform.shape[2]} {str(DTYPE).removeprefix('torch.')}"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    name, samples = request.param
    torch.manual_seed(0)
    twin = plain_encoder(name)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):  # blocks that differ from their shortcuts
            nn.init.uniform_(module.weight, 0.5, 1.0)
    twin = twin.to(device)
    waveform = torch.randn(BATCH, 12, samples, device=device)
    few = waveform[:4].double()  # batch norms need some records, fp64 wants few
    truth = copy.deepcopy(twin).double()
    with torch.no_grad():
        tokens = truth.eval()(few)
    cotangent = torch.randn(BATCH, *tokens.shape[1:], device=device)
    loss = (truth.train()(few) * cotangent[:4]).sum()
    grads = list(torch.autograd.grad(loss, list(truth.parameters())))
    gflop = _gflop(twin, waveform)
    # A backward does the work of two forwards; its bytes are not counted.
    work = Work(gflop, None if name.startswith("vit") else _gbyte(twin, waveform)), Work(3 * gflop)
    made = Case(name, twin, waveform, cotangent, tokens, grads, (0.0, 0.0), *work)
    own = _inference_error(made, _eager(made)), _gradient_error(made, _eager(made))
    made.tolerance = max(OUTPUT_TOLERANCE, 2 * own[0]), max(GRADIENT_TOLERANCE, 2 * own[1])
    return made


# --- providers: waveform [B, L, T] to tokens [B, N, D] ------------------------------------------------------

Encode = Callable[[Tensor], Tensor]


def _eager(case: Case) -> nn.Module:
    return copy.deepcopy(case.twin)


def _ours(case: Case) -> nn.Module:
    model = encoder(case.name).to(case.waveform.device)
    model.load_state_dict(case.twin.state_dict())
    return model


class AsImage(nn.Module):
    """A residual network with Conv2d(1, k) in place of Conv1d(k), channels-last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _image_modules(model)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [B, L, T] to tokens [B, N, D]."""
        image = waveform[:, :, None, :].to(memory_format=torch.channels_last)
        return self.model(image).squeeze(1).mT  # the twin swaps dimensions 1 and 2: [B, 1, C, T]


def _image_modules(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, _image_modules(child))
    if isinstance(module, nn.Conv1d):
        (k,), (stride,), padding = module.kernel_size, module.stride, module.padding[0]
        assert isinstance(padding, int)
        image = nn.Conv2d(
            module.in_channels,
            module.out_channels,
            (1, k),
            (1, stride),
            (0, padding),
            groups=module.groups,
            bias=module.bias is not None,
        )
        image.weight.data = module.weight.data[:, :, None, :]
        return image
    if isinstance(module, nn.BatchNorm1d):
        norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
        norm.load_state_dict(module.state_dict())
        return norm
    if isinstance(module, nn.MaxPool1d):
        window: Any = (1, module.kernel_size), (1, module.stride), (0, module.padding)
        return nn.MaxPool2d(*window)
    if isinstance(module, nn.AvgPool1d):
        return nn.AvgPool2d((1, 2), (1, 2), ceil_mode=True)
    return module


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    """The model compiled for exactly the shapes it meets.

    Without the reset torch would compile a class for only a few shapes, from the second on for any size.
    """
    torch.compiler.reset()
    return cast(nn.Module, torch.compile(model, dynamic=False, **options))


def _providers(case: Case) -> list[str]:
    if not GPU:
        return [OURS, "torch"]
    by_hand = ["conv2d_compiled"] if case.name.startswith(RESIDUAL) else []
    return [OURS, "ecgot_graph", "torch", "torch_compiled", *by_hand]


def _inference(provider: str, case: Case) -> Encode:
    if provider == OURS:
        ours = fuse_norms(_ours(case))
        return lambda waveform: ours(waveform).tokens
    if provider == "ecgot_graph":
        captured = CapturedInference(_ours(case))
        return lambda waveform: captured(waveform).tokens
    if provider == "torch":
        return _eager(case).eval()
    model = AsImage(_eager(case)) if provider == "conv2d_compiled" else _eager(case)
    return compiled(model.eval(), mode="max-autotune")


def _training(provider: str, case: Case) -> tuple[Encode, list[nn.Parameter]]:
    if provider in (OURS, "ecgot_graph"):
        model = _ours(case).train()
        if not GPU:
            to_channels_last(model)
        encode = CapturedTraining(model) if provider == "ecgot_graph" else model
        return (lambda waveform: encode(waveform).tokens), list(model.parameters())
    model = AsImage(_eager(case)) if provider == "conv2d_compiled" else _eager(case)
    model.train()
    encode = model if provider == "torch" else compiled(model, mode="max-autotune")
    return encode, list(model.parameters())


# --- benchmarks ---------------------------------------------------------------------------------------------


def test_encoder_inference(case: Case, compare: Compare) -> None:
    def make(provider: str) -> tuple[Run, Errors]:
        errors = {"tokens": (_inference_error(case, _inference(provider, case)), case.tolerance[0])}
        encode = _inference(provider, case)

        def run() -> Tensor:
            with torch.no_grad(), _autocast(case):
                return encode(case.waveform)

        return run, errors

    makers = {provider: functools.partial(make, provider) for provider in _providers(case)}
    compare(makers, case=str(case), work=case.work)


def test_encoder_training(case: Case, compare: Compare) -> None:
    def make(provider: str) -> tuple[Run, Errors]:
        errors = {"gradient": (_gradient_error(case, *_training(provider, case)), case.tolerance[1])}
        encode, parameters = _training(provider, case)

        def run() -> tuple[Tensor, ...]:
            with _autocast(case):
                tokens = encode(case.waveform)
            return torch.autograd.grad(tokens, parameters, case.cotangent.to(tokens.dtype))

        return run, errors

    makers = {provider: functools.partial(make, provider) for provider in _providers(case)}
    compare(makers, case=str(case), work=case.training_work)


def test_peak_copy(device: torch.device, measure: Measure) -> None:
    size = 2**30 if GPU else 2**28
    source = torch.empty(size // 4, device=device)
    target = torch.empty_like(source)
    measure(lambda: target.copy_(source), provider="torch", case="copy", work=Work(gbyte=2 * size / 1e9))


def test_peak_convolution(device: torch.device, measure: Measure) -> None:
    """The best that the vendor's library does: many channels, channels-last."""
    x = torch.randn(BATCH, 256, 1, 250, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 1, 5, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    gflop = 2 * BATCH * 250 * 5 * 256**2 / 1e9
    case = f"256 to 256 channels, k 5, {DTYPE}"
    measure(lambda: F.conv2d(x, weight, padding=(0, 2)), provider="torch", case=case, work=Work(gflop))


def test_peak_product(device: torch.device, measure: Measure) -> None:
    side = 8192 if GPU else 1024
    a = torch.randn(side, side, device=device, dtype=DTYPE)
    measure(lambda: a @ a, provider="torch", case=f"matrices {DTYPE}", work=Work(2 * side**3 / 1e9))


# --- errors and work ----------------------------------------------------------------------------------------


def _autocast(case: Case) -> torch.autocast:
    # torch's cache of cast weights must not live across a captured graph.
    enabled = torch.float32 != DTYPE
    return torch.autocast(case.waveform.device.type, DTYPE, enabled=enabled, cache_enabled=False)


def _inference_error(case: Case, encode: Encode) -> float:
    if isinstance(encode, nn.Module):
        encode.eval()
    with torch.no_grad(), _autocast(case):
        tokens = encode(case.waveform[:4].contiguous())
    return _relative(tokens, case.tokens)


def _gradient_error(case: Case, encode: Encode, parameters: list[nn.Parameter] | None = None) -> float:
    if isinstance(encode, nn.Module):
        encode.train()
        parameters = parameters or list(encode.parameters())
    assert parameters is not None
    with _autocast(case):
        tokens = encode(case.waveform[:4].contiguous())
    grads = torch.autograd.grad(tokens, parameters, case.cotangent[:4].to(tokens.dtype))
    flat, expected = (torch.cat([grad.flatten() for grad in each]) for each in (grads, case.grads))
    return _relative(flat, expected)


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def _gflop(model: nn.Module, waveform: Tensor) -> float:
    """Of the convolutions and products of a forward pass over the batch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(waveform[:1])
    return counter.get_total_flops() * len(waveform) / 1e9


def _gbyte(model: nn.Module, waveform: Tensor) -> float:
    """What a forward pass must move if each convolution reads its input and writes its output once."""
    values = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        values += (inputs[0].numel() + output.numel()) * len(waveform) + module.weight.numel()  # type: ignore[operator]

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Conv1d)]
    with torch.no_grad():
        model.eval()(waveform[:1])
    for hook in hooks:
        hook.remove()
    return values * DTYPE.itemsize / 1e9
