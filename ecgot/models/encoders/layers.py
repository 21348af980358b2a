"""What the fused encoders are built of: torch's own modules, run by this package's kernels.

A layer keeps its parameters in ``nn.Conv1d`` and ``nn.BatchNorm1d`` (or ``nn.SyncBatchNorm``), so that state
dicts, initialisation and conversions are torch's; what runs is :func:`ecgot.kernels.conv1d_norm`.
Activations travel as :class:`ecgot.kernels.LazyActivation`, channels-last and with each record's length,
through strides and pools.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ecgot.errors import EcgotError
from ecgot.kernels import FusedLayer, LazyActivation, conv1d, conv1d_bottleneck, conv1d_norm, materialize

# --- residual networks --------------------------------------------------------------------------------------


def plain_conv(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(c_in, c_out, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False)


Norm = nn.BatchNorm1d | nn.SyncBatchNorm
Layer = tuple[nn.Conv1d, Norm]


class Bottleneck(Protocol):
    """1x1, convolution, 1x1, each with a batch norm, and a shortcut."""

    def layers(self) -> tuple[Layer, Layer, Layer]: ...

    def shortcut_of(self, x: LazyActivation) -> LazyActivation: ...


@dataclass
class EncoderOutput:
    """tokens [B, N, D], mask [B, N] (True where a token covers signal), pooled [B, D] (mean of tokens)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def encoder_input(waveform: Tensor, lengths: Tensor | None, leads: int) -> LazyActivation:
    """The signal that a first convolution reads, of waveform [B, L, T] as it lies in memory.

    Raises:
        EcgotError: the waveform does not have L leads.
    """
    if waveform.dim() != 3 or waveform.shape[1] != leads:
        raise EcgotError(f"waveform: got shape {tuple(waveform.shape)}, accepted is [B, {leads} leads, T]")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.shape != waveform.shape[:1]:
            got = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            raise EcgotError(f"lengths: got {got}, accepted are {len(waveform)} integers")
        lengths = lengths.clamp(0, waveform.shape[2]).to(waveform.device, torch.int32)
    return LazyActivation(waveform.transpose(1, 2), lengths=lengths)


def encoder_output(x: LazyActivation) -> EncoderOutput:
    """Tokens, 0 beyond a record's end, their mask and mean."""
    x = materialize(x)
    tokens = x.values
    if x.lengths is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return EncoderOutput(tokens, mask, tokens.mean(1))
    mask = torch.arange(tokens.shape[1], device=tokens.device) < x.lengths[:, None]
    tokens = torch.where(mask[:, :, None], tokens, 0.0)
    return EncoderOutput(tokens, mask, masked_mean(tokens, mask))


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] of tokens [B, N, D] over the N where mask [B, N] is True; 0 where there is none."""
    weight = mask.to(tokens.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return (weight[:, None, :] @ tokens).squeeze(1)


def conv_norm(
    x: LazyActivation,
    conv: nn.Conv1d,
    norm: Norm,
    activation: str | None = None,
    *,
    residual: LazyActivation | None = None,
    recompute: bool = False,
    channels: slice = slice(None),
) -> LazyActivation:
    """activation(norm(conv(x)) + residual), in training and evaluation as the modules would do it.

    channels: those of a wider norm that this convolution makes.
    recompute: convolve again in the backward rather than keep the output, see
        :func:`ecgot.kernels.conv1d_norm`.
    """
    if _infers(norm):
        return _inferred(x, conv, norm, activation, residual, channels)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.num_batches_tracked is not None:
        if not channels.start:  # once, where several convolutions share a norm
            norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # a plain average of all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    vectors: tuple[Tensor | None, ...] = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if channels != slice(None):
        vectors = tuple(None if vector is None else vector[channels] for vector in vectors)
    return conv1d_norm(
        x,
        conv.weight,
        *vectors,  # type: ignore[arg-type]
        training=norm.training or norm.running_mean is None,
        momentum=momentum,
        eps=norm.eps,
        activation=activation,
        residual=residual,
        recompute=recompute,
        process_group=_process_group(norm),
        **_geometry(conv),
    )


def _inferred(
    x: LazyActivation,
    conv: nn.Conv1d,
    norm: Norm,
    activation: str | None,
    residual: LazyActivation | None,
    channels: slice,
) -> LazyActivation:
    """Without gradients: the norm is fused into the weight; once for all in a copy of :func:`fuse_norms`."""
    x = materialize(x)
    weight, scale, shift = _fused_layer(conv, norm, channels, x.values)
    y = conv1d(
        x.values.to(weight.dtype),
        weight,
        scale=scale,
        shift=shift,
        residual=None if residual is None else materialize(residual).values.to(weight.dtype),
        activation=activation,
        lengths=x.lengths,
        **_geometry(conv),
    )
    return LazyActivation(y, lengths=None if x.lengths is None else strided(x.lengths, conv))


MAX_RECOMPUTE_CHANNELS = (
    128  # input channels of a 1x1 convolution that is limited by memory, not by its products
)


def bottlenecks(x: LazyActivation, blocks: Sequence[Bottleneck]) -> LazyActivation:
    """Bottleneck blocks in a row; at inference each makes the next one's first convolution, too."""
    narrowed = None
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        narrow, middle, wide = block.layers()
        x = materialize_shared(x)
        residual = block.shortcut_of(x)
        y = conv_norm(x, *narrow, "relu") if narrowed is None else narrowed
        if any(not _infers(norm) for _, norm in (narrow, middle, wide)):
            y = conv_norm(y, *middle, "relu")
            # The block's widest output comes from its cheapest convolution.
            recompute = wide[0].in_channels <= MAX_RECOMPUTE_CHANNELS
            x = conv_norm(y, *wide, "relu", residual=residual, recompute=recompute)
            continue
        layers = [middle, wide] if following is None else [middle, wide, following.layers()[0]]
        x, narrowed = _inferred_bottleneck(y, layers, residual)
    return x


def _inferred_bottleneck(
    x: LazyActivation, layers: Sequence[Layer], residual: LazyActivation
) -> tuple[LazyActivation, LazyActivation | None]:
    fused_layers = [_fused_layer(conv, norm, slice(None), x.values) for conv, norm in layers]
    middle, wide, *narrow = fused_layers
    conv = layers[0][0]
    y, z = conv1d_bottleneck(
        x.values.to(middle.weight.dtype),
        middle,
        wide,
        materialize(residual).values.to(middle.weight.dtype),
        *narrow,
        stride=conv.stride[0],
        padding=conv.padding[0],  # type: ignore[arg-type]
        dilation=conv.dilation[0],
        lengths=x.lengths,
    )
    lengths = None if x.lengths is None else strided(x.lengths, conv)
    return LazyActivation(y, lengths=lengths), None if z is None else LazyActivation(z, lengths=lengths)


def _infers(norm: Norm) -> bool:
    batch_statistics = norm.training or norm.running_mean is None
    return not (batch_statistics or torch.is_grad_enabled() or torch.compiler.is_compiling())


def _fused_layer(conv: nn.Conv1d, norm: Norm, channels: slice, x: Tensor) -> FusedLayer:
    """In autocast's dtype where it is on; kept by what :func:`fuse_norms` returns."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else conv.weight.dtype
    kept = conv.__dict__.get(FUSED)
    if kept is None:
        return _fuse(conv, norm, channels, dtype)
    key = dtype, conv.weight.device
    if key not in kept:
        kept[key] = _fuse(conv, norm, channels, dtype)
    return kept[key]


def _fuse(conv: nn.Conv1d, norm: Norm, channels: slice, dtype: torch.dtype) -> FusedLayer:
    """No scale where it is in the weight, which half precision would round."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    kind = torch.promote_types(dtype, torch.float32)
    scale = (norm.weight.to(kind) * torch.rsqrt(norm.running_var.to(kind) + norm.eps))[channels]
    shift = norm.bias.to(kind)[channels] - norm.running_mean.to(kind)[channels] * scale
    weight = conv.weight.detach()
    if dtype.itemsize == 2:
        return FusedLayer(_inference_layout(weight.to(dtype)), scale.detach(), shift.detach())
    return FusedLayer(_inference_layout(weight * scale[:, None, None].to(dtype)), None, shift.detach())


def _inference_layout(weight: Tensor) -> Tensor:
    """[C_out, C_in, K] as the kernels read it, which then need not copy it."""
    if weight.device.type == "cpu":
        return channels_last(weight)
    return weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def channels_last(weight: Tensor) -> Tensor:
    """[C_out, C_in, K] with the channels innermost, as convolutions of channels-last signals read it."""
    return weight.permute(0, 2, 1).contiguous().permute(0, 2, 1)


FUSED = "_folded"  # attribute of a convolution: its folded weights by dtype and device

Encoder = TypeVar("Encoder", bound=nn.Module)


def fuse_norms(encoder: Encoder) -> Encoder:
    """A copy for inference, in evaluation mode: norms are folded into weights once, at the first use.

    The copy is of the weights as they are now, and must not be trained or loaded into.
    """
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.Conv1d):
            module.__dict__[FUSED] = {}
    return copied


def materialize_shared(x: LazyActivation) -> LazyActivation:
    """x for several convolutions: computed once, where each would otherwise do all of it again.

    That is the torch path; the kernels do it on the way.
    """
    return x if x.rstd is None else materialize(x)


def conv_act(
    x: LazyActivation, conv: nn.Conv1d, activation: str | None = None, padding: tuple[int, int] | None = None
) -> LazyActivation:
    """activation(conv(x)), bias included; padding on the left and right in place of the module's."""
    geometry = _geometry(conv)
    if padding is not None:
        geometry["padding"] = padding
    x = materialize(x)
    values, weight, bias = x.values, conv.weight, conv.bias
    y = conv1d(values, weight, bias, activation=activation, lengths=x.lengths, **geometry)
    return LazyActivation(
        y, lengths=None if x.lengths is None else strided(x.lengths, conv, geometry["padding"])
    )


def strided(lengths: Tensor, conv: nn.Conv1d, padding: int | tuple[int, int] | None = None) -> Tensor:
    """Tokens of records of these lengths after a convolution."""
    (kernel_size,), (stride,), (dilation,) = conv.kernel_size, conv.stride, conv.dilation
    padding = conv.padding[0] if padding is None else padding  # type: ignore[assignment]
    both = sum(padding) if isinstance(padding, tuple) else 2 * padding  # type: ignore[operator]
    return ((lengths + both - dilation * (kernel_size - 1) - 1) // stride + 1).clamp_min(0)


def _geometry(conv: nn.Conv1d) -> dict:
    return {
        "stride": conv.stride[0],
        "padding": conv.padding[0],
        "dilation": conv.dilation[0],
        "groups": conv.groups,
    }


def _process_group(norm: nn.Module) -> object | None:
    """Of a SyncBatchNorm in training over several processes."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None
