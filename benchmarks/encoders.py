"""An encoder's contestants: ecgot's, the same network in torch's modules, and what users do to those by hand.

:func:`make_case` draws weights and a batch, and has the fp64 twin say what is right; :func:`inference` and
:func:`training` make a provider's run.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ecgot.bench.providers import OURS
from ecgot.models.encoders import encoder, fuse_norms, plain_encoder, to_channels_last

# Relative to the norm. A ReLU whose input is 0 but for rounding falls to either side, and with it a unit's
# gradient: torch's own error is 1e-6 or up to 3e-2, as it happens. Half precision may be as wrong as torch's
# own is, twice.
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-3, 5e-2
CHECKED = 4  # records that the fp64 twin sees: batch norms need some, fp64 wants few
RESIDUAL = ("resnet1d", "merl_", "xresnet1d")  # those whose modules also run on images

Encode = Callable[[Tensor], Tensor]  # waveform [B, L, T] to tokens [B, N, D]


@dataclass
class Case:
    """An encoder's twin, a batch, what the fp64 twin makes of its first records, and torch's own error."""

    name: str
    dtype: torch.dtype
    twin: nn.Module
    waveform: Tensor
    cotangent: Tensor
    tokens: Tensor
    grads: list[Tensor]
    tolerance: tuple[float, float] = (0.0, 0.0)

    def __str__(self) -> str:
        shape = f"B={len(self.waveform)} L={self.waveform.shape[2]}"
        return f"{self.name} {shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def checked(self) -> Tensor:
        """The records that are compared with fp64."""
        return self.waveform[: len(self.tokens)].contiguous()


def make_case(
    name: str, batch: int, samples: int, dtype: torch.dtype, device: torch.device, checked: int = CHECKED
) -> Case:
    """Random weights and records, the same at every call; ``checked`` records are compared with fp64."""
    torch.manual_seed(0)
    twin = plain_encoder(name)
    for module in twin.modules():
        if isinstance(module, nn.BatchNorm1d):  # blocks that differ from their shortcuts
            nn.init.uniform_(module.weight, 0.5, 1.0)
    twin = twin.to(device)
    waveform = torch.randn(batch, 12, samples, device=device)
    cotangent = torch.randn(batch, *_shape(twin, waveform), device=device)
    tokens, grads = _truth(twin, waveform[:checked].double(), cotangent[:checked])
    case = Case(name, dtype, twin, waveform, cotangent, tokens, grads)
    own = copy.deepcopy(twin).eval(), copy.deepcopy(twin).train()
    case.tolerance = (
        max(OUTPUT_TOLERANCE, 2 * inference_error(case, inference_run(case, own[0], case.checked)())),
        max(
            GRADIENT_TOLERANCE,
            2 * gradient_error(case, training_run(case, own[1], list(own[1].parameters()), case.checked)()),
        ),
    )
    return case


def _shape(twin: nn.Module, waveform: Tensor) -> torch.Size:
    with torch.no_grad():
        tokens: Tensor = twin.eval()(waveform[:1])
    return tokens.shape[1:]


def _truth(twin: nn.Module, waveform: Tensor, cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Tokens at inference and gradients in training of the twin in fp64."""
    exact = copy.deepcopy(twin).double()
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # the search takes longer than what runs once
    try:
        with torch.no_grad():
            tokens = exact.eval()(waveform)
        loss = (exact.train()(waveform) * cotangent).sum()
        return tokens, list(torch.autograd.grad(loss, list(exact.parameters())))
    finally:
        torch.backends.cudnn.benchmark = searches


# --- models -------------------------------------------------------------------------------------------------


def stock(case: Case) -> nn.Module:
    """A copy of the twin."""
    return copy.deepcopy(case.twin)


def ours(case: Case) -> nn.Module:
    """ecgot's encoder with the twin's weights."""
    model = encoder(case.name).to(case.waveform.device)
    model.load_state_dict(case.twin.state_dict())
    return model


class AsImage(nn.Module):
    """A residual network with Conv2d(1, k) in place of Conv1d(k), channels-last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _image_modules(model)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.train(model.training)  # the new modules' mode is not yet that of those they replace

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


def inference(provider: str, case: Case, **compilation: Any) -> Encode:
    """A provider's encoder at inference: its name up to the first "_" and "_compiled" where it has that.

    Args:
        compilation: options of torch.compile.
    """
    if provider.startswith(OURS):
        fused = fuse_norms(ours(case))
        return lambda waveform: fused(waveform).tokens
    return _by_hand(provider, stock(case).eval(), compilation)


def training(provider: str, case: Case, **compilation: Any) -> tuple[Encode, list[nn.Parameter]]:
    """A provider's encoder in training mode, and its parameters in the twin's order."""
    if provider.startswith(OURS):
        model = ours(case).train()
        if case.waveform.device.type == "cpu":
            to_channels_last(model)
        return (lambda waveform: model(waveform).tokens), list(model.parameters())
    model = stock(case).train()
    encode = _by_hand(provider, model, compilation)
    return encode, list(encode.parameters())


def _by_hand(provider: str, model: nn.Module, compilation: dict[str, Any]) -> nn.Module:
    if provider.startswith("conv2d"):
        model = AsImage(model)
    return compiled(model, **compilation) if "_compiled" in provider else model


# --- runs and their errors ----------------------------------------------------------------------------------


def _autocast(case: Case) -> torch.autocast:
    # torch's cache of cast weights must not live across a captured graph.
    enabled = case.dtype != torch.float32
    return torch.autocast(case.waveform.device.type, case.dtype, enabled=enabled, cache_enabled=False)


def inference_run(case: Case, encode: Encode, waveform: Tensor | None = None) -> Callable[[], Tensor]:
    """Tokens of the whole batch, or of another waveform."""
    given = case.waveform if waveform is None else waveform

    def run() -> Tensor:
        with torch.no_grad(), _autocast(case):
            return encode(given)

    return run


def training_run(
    case: Case, encode: Encode, parameters: list[nn.Parameter], waveform: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """Gradients in all parameters of the whole batch, or of another waveform."""
    given = case.waveform if waveform is None else waveform

    def run() -> tuple[Tensor, ...]:
        with _autocast(case):
            tokens = encode(given)
        return torch.autograd.grad(tokens, parameters, case.cotangent[: len(tokens)].to(tokens.dtype))

    return run


def inference_error(case: Case, tokens: Tensor) -> float:
    """Of the checked records' tokens."""
    return _relative(tokens[: len(case.tokens)], case.tokens)


def gradient_error(case: Case, grads: tuple[Tensor, ...]) -> float:
    """Of the checked records' gradients, all parameters together."""
    return _relative(*(torch.cat([grad.flatten() for grad in each]) for each in (grads, case.grads)))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


# --- work ---------------------------------------------------------------------------------------------------


def gflop(case: Case) -> float:
    """Of the convolutions and products of a forward pass over the batch."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.twin.eval()(case.waveform[:1])
    return counter.get_total_flops() * len(case.waveform) / 1e9


def gbyte(case: Case) -> float:
    """What a forward pass must move if each convolution reads its input and writes its output once."""
    values = 0

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        records = len(case.waveform)
        values += (inputs[0].numel() + output.numel()) * records + module.weight.numel()  # type: ignore[operator]

    hooks = [m.register_forward_hook(note) for m in case.twin.modules() if isinstance(m, nn.Conv1d)]
    with torch.no_grad():
        case.twin.eval()(case.waveform[:1])
    for hook in hooks:
        hook.remove()
    return values * case.dtype.itemsize / 1e9
