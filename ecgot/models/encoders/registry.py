"""ECG encoders by name: waveform [B, L, T] in mV to tokens [B, N, D], a mask and a pooled embedding.

Published encoders take published weights: :func:`published` renames the entries of their state dicts.
"""

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ecgot.errors import EcgotError
from ecgot.models.encoders.inception1d import Inception1d, PlainInception1d
from ecgot.models.encoders.layers import channels_last
from ecgot.models.encoders.net1d import Net1d, PlainNet1d
from ecgot.models.encoders.resnet1d import PlainResNet1d, ResNet1d
from ecgot.models.encoders.vit1d import PlainViT1d, ViT1d
from ecgot.models.encoders.xresnet1d import PlainXResNet1d, XResNet1d

Encoder = ResNet1d | XResNet1d | Inception1d | ViT1d | Net1d
_OWN = {"kernel_sizes": (5, 5), "stem_kernel_size": 15, "strides": (2, 2, 2, 2), "he_init": True}
_WANG = {"widths": (128,) * 3, "blocks": (1,) * 3, "kernel_sizes": (5, 3), "stem_stride": 1}
_MERL50 = {
    "widths": (256, 512, 1024, 2048),
    "blocks": (3, 4, 6, 3),
    "stem_width": 64,
    "bottleneck": True,
}
# name: the fused encoder, its twin in plain torch, and the arguments of both.
ENCODERS: dict[str, tuple[Callable[..., Encoder], Callable[..., nn.Module], dict]] = {
    "resnet1d_tiny": (ResNet1d, PlainResNet1d, _OWN | {"widths": (16, 32, 64, 128), "blocks": (1,) * 4}),
    "resnet1d_small": (ResNet1d, PlainResNet1d, _OWN | {"widths": (32, 64, 128, 256), "blocks": (1,) * 4}),
    "resnet1d": (ResNet1d, PlainResNet1d, _OWN),
    "merl_resnet18": (ResNet1d, PlainResNet1d, {}),
    "merl_resnet50": (ResNet1d, PlainResNet1d, _MERL50),
    "resnet1d_wang": (ResNet1d, PlainResNet1d, _WANG),
    "xresnet1d101": (XResNet1d, PlainXResNet1d, {}),
    "inception1d": (Inception1d, PlainInception1d, {}),
    "vit1d_tiny": (ViT1d, PlainViT1d, {"width": 192, "heads": 3}),
    "vit1d_small": (ViT1d, PlainViT1d, {"width": 384, "heads": 6}),
    "net1d": (Net1d, PlainNet1d, {}),
}
# Of the published state dicts' names, what is called otherwise here; None: not part of the encoder.
_RENAMED: dict[str, list[tuple[str, str | None]]] = {
    "resnet1d_wang": [
        (r"^0\.", "conv1."),
        (r"^1\.", "bn1."),
        (r"^3\.", "layer1."),
        (r"^4\.", "layer2."),
        (r"^5\.", "layer3."),
        (r"^6\.", None),
        (r"\.downsample\.", ".shortcut."),
    ],
    "xresnet1d101": [(r"^8\.", None), (r"\.convpath\.", None)],
    "inception1d": [(r"^layers\.0\.", ""), (r"^layers\.1\.", None)],
    "merl_resnet18": [(r"^linear\.", None)],
    "merl_resnet50": [(r"^linear\.", None)],
    "vit1d_tiny": [(r"^head\.", None)],
    "vit1d_small": [(r"^head\.", None)],
    "net1d": [(r"^dense\.", None), (r"(^|\.)(first_)?bn\d?\.", None)],
}


def encoder(name: str, *, leads: int = 12, **options: object) -> Encoder:
    """An encoder by name, with random weights.

    Args:
        name: one of ``ENCODERS``.
        leads: L.
        options: of the encoder's class, in place of those that the name stands for.

    Returns:
        A module that takes waveform [B, L, T] in mV and lengths [B] (optional) to an :class:`EncoderOutput`,
        with the attributes ``leads`` and ``width`` (D).

    Raises:
        EcgotError: the name is unknown.

    >>> import torch
    >>> model = encoder("resnet1d_tiny")
    >>> encoded = model(torch.zeros(2, 12, 1000), lengths=torch.tensor([1000, 500]))  # 10 s and 5 s at 100 Hz
    >>> encoded.tokens.shape, encoded.mask.sum(1), encoded.pooled.shape
    (torch.Size([2, 32, 128]), tensor([32, 16]), torch.Size([2, 128]))
    """
    made, _, settings = _entry(name)
    return made(leads, **settings | options)


def to_channels_last(module: nn.Module) -> None:
    """Lay out convolutions' weights as a training step on a CPU reads them, which saves copies.

    For training only: some tools, such as ``torch.nn.utils.parameters_to_vector``, need contiguous weights.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv1d):
            layer.weight.data = channels_last(layer.weight.data)


def plain_encoder(name: str, *, leads: int = 12, **options: object) -> nn.Module:
    """The same network in plain torch: waveform [B, L, T] to tokens [B, N, D]. Its state dict is the same.

    >>> import torch
    >>> plain_encoder("resnet1d_tiny")(torch.zeros(2, 12, 1000)).shape
    torch.Size([2, 32, 128])
    """
    _, made, settings = _entry(name)
    return made(leads, **settings | options)


def published(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published checkpoint's state dict with this package's names, without the head.

    Sources: helme/ecg_ptbxl_benchmarking for xresnet1d101, resnet1d_wang and inception1d,
    cheliu-computation/MERL-ICML2024 for merl_resnet18, merl_resnet50 and vit1d_*,
    PKUDigitalHealth/ECGFounder for net1d (whose batch norms take no part).
    """
    _entry(name)
    renamed = {}
    for key, value in state_dict.items():
        new: str | None = key.removeprefix("module.")
        for pattern, replacement in _RENAMED.get(name, []):
            if new is not None and re.search(pattern, new):
                new = None if replacement is None else re.sub(pattern, replacement, new)
        if new is not None:
            renamed[new] = value
    return renamed


def _entry(name: str) -> tuple[Callable[..., Encoder], Callable[..., nn.Module], dict]:
    if name not in ENCODERS:
        raise EcgotError(f"encoder.name: expected one of {', '.join(ENCODERS)}, got {name!r}")
    return ENCODERS[name]
