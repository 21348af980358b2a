"""What the fused encoders are built of: torch's own modules, run by this package's kernels.

A layer keeps its parameters in ``nn.Conv1d`` and ``nn.BatchNorm1d`` (or ``nn.SyncBatchNorm``), so that state
dicts, initialisation and conversions are torch's; what runs is :func:`ecgot.kernels.conv1d_norm`. Activations
travel as :class:`ecgot.kernels.LazyActivation`, channels-last and with each record's length, through strides
and pools.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ecgot.errors import EcgotError
from ecgot.kernels import (
    BatchNorm,
    FusedLayer,
    LazyActivation,
    conv1d,
    conv1d_bottleneck,
    conv1d_norm,
    materialize,
)
from ecgot.kernels.conv.checks import AUTOCAST
from ecgot.kernels.conv.conv1d_norm import conv1d_norm_beside
from ecgot.kernels.conv.geometry import checked_geometry, fill_past
from ecgot.kernels.lengths import length_mask

Norm = nn.BatchNorm1d | nn.SyncBatchNorm
Layer = tuple[nn.Conv1d, Norm]
Module = TypeVar("Module", bound=nn.Module)
FUSED = "_fused"  # attribute of a convolution: its fused layers by dtype and device
# Input channels up to which a 1x1 convolution is limited by memory, not by its products.
MAX_RECOMPUTE_CHANNELS = 128


# --- what goes in and what comes out ------------------------------------------------------------------------


@dataclass
class EncoderOutput:
    """tokens [B, N, D], mask [B, N] (True where a token covers signal), pooled [B, D] (mean of tokens)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def encoder_input(waveform: Tensor, lengths: Tensor | None, leads: int) -> LazyActivation:
    """What an encoder's first convolution reads: waveform [B, L, T] as [B, T, L], not copied.

    Args:
        waveform: [B, L, T] in mV.
        lengths: [B], integers, valid samples of each record; None for all.
        leads: L.

    Raises:
        EcgotError: the waveform does not have L leads, or the lengths are not B integers.
    """
    if waveform.dim() != 3 or waveform.shape[1] != leads:
        raise EcgotError(f"waveform: expected [B, {leads} leads, T], got shape {tuple(waveform.shape)}")
    if lengths is not None:
        if lengths.is_floating_point() or lengths.shape != waveform.shape[:1]:
            got = f"{lengths.dtype} of shape {tuple(lengths.shape)}"
            raise EcgotError(f"lengths: expected {len(waveform)} integers, got {got}")
        lengths = lengths.clamp(0, waveform.shape[2]).to(waveform.device, torch.int32)
    return LazyActivation(waveform.transpose(1, 2), lengths=lengths)


def encoder_output(x: LazyActivation) -> EncoderOutput:
    """x [B, N, D] as tokens, 0 past each record's end, with their mask and mean."""
    x = materialize(x)
    tokens = x.values
    if x.lengths is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return EncoderOutput(tokens, mask, tokens.mean(1))
    mask = length_mask(x.lengths, tokens.shape[1])
    tokens = fill_past(tokens, x.lengths)
    return EncoderOutput(tokens, mask, masked_mean(tokens, mask))


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] of tokens [B, N, D] over the N where mask [B, N] is True; 0 where there is none.

    >>> masked_mean(torch.tensor([[[1.0], [3.0], [8.0]]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    weight = mask.to(tokens.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return (weight[:, None, :] @ tokens).squeeze(1)


# --- single layers ------------------------------------------------------------------------------------------


def plain_conv(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> nn.Conv1d:
    """A convolution without bias, padded to ceil(T / stride) samples for odd kernels."""
    return nn.Conv1d(c_in, c_out, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False)


def conv_act(
    x: LazyActivation, conv: nn.Conv1d, activation: str | None = None, padding: tuple[int, int] | None = None
) -> LazyActivation:
    """activation(conv(x)), bias included, [B, T, C_in] to [B, T_out, C_out].

    padding: zeros on the left and right in place of the module's.
    """
    geometry = _geometry(conv)
    if padding is not None:
        geometry["padding"] = padding
    x = materialize(x)
    y = conv1d(x.values, conv.weight, conv.bias, activation=activation, lengths=x.lengths, **geometry)
    return LazyActivation(y, lengths=_output_lengths(x, conv, padding))


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

    Args:
        x: [B, T, C_in].
        conv, norm: the modules.
        activation: None, "relu", "gelu" or "silu".
        residual: [B, T_out, C_out].
        recompute: convolve again in the backward pass rather than save the output, see
            :func:`ecgot.kernels.conv1d_norm`.
        channels: those of a wider norm that this convolution makes.
    """
    if _is_fused(norm):
        return _fused_conv(x, _fused_layer(conv, norm, channels, x.values), conv, activation, residual)
    return conv1d_norm(
        x,
        conv.weight,
        _batch_norm(norm, channels),
        activation=activation,
        residual=residual,
        recompute=recompute,
        **_geometry(conv),
    )


def conv_norm_beside(
    x: LazyActivation, conv: nn.Conv1d, norm: Norm, activation: str | None = None
) -> tuple[LazyActivation, LazyActivation]:
    """As :func:`conv_norm`, and x once more, for a shortcut, see :func:`conv1d_norm_beside`."""
    if _is_fused(norm):
        return conv_norm(x, conv, norm, activation), x
    norms = _batch_norm(norm, slice(None))
    return conv1d_norm_beside(x, conv.weight, norms, activation=activation, **_geometry(conv))


def materialize_shared(x: LazyActivation) -> LazyActivation:
    """x for several convolutions, materialized once where each would otherwise do it again.

    That is so on the torch path; the kernels normalise for free what they read.
    """
    return x if x.rstd is None else materialize(x)


def _geometry(conv: nn.Conv1d) -> dict[str, Any]:
    """Keyword arguments of the kernels."""
    return {
        "stride": conv.stride[0],
        "padding": conv.padding[0],
        "dilation": conv.dilation[0],
        "groups": conv.groups,
    }


def _output_lengths(
    x: LazyActivation, conv: nn.Conv1d, padding: tuple[int, int] | None = None
) -> Tensor | None:
    """Tokens of each record after a convolution of x."""
    if x.lengths is None:
        return None
    geometry = checked_geometry(conv.stride[0], padding or conv.padding[0], conv.dilation[0], conv.groups)  # type: ignore[arg-type]
    return geometry.output_length(x.lengths, conv.kernel_size[0])


def _batch_norm(norm: Norm, channels: slice) -> BatchNorm:
    """A module as the kernels take it; they count the batch, as the module would."""
    momentum = 0.0 if norm.momentum is None else norm.momentum
    first = not channels.start  # several convolutions that share a norm count a batch once
    if norm.training and norm.num_batches_tracked is not None and norm.momentum is None:
        momentum = 1.0 / (float(norm.num_batches_tracked) + first)  # a plain average of all batches
    vectors: Sequence[Any] = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if channels != slice(None):
        vectors = [None if vector is None else vector[channels] for vector in vectors]
    gamma, beta, mean, var = vectors
    training = norm.training or norm.running_mean is None
    batches = norm.num_batches_tracked if norm.training and first else None
    return BatchNorm(gamma, beta, mean, var, norm.eps, momentum, training, _process_group(norm), batches)


def _process_group(norm: nn.Module) -> object | None:
    """The processes that a SyncBatchNorm shares its statistics with; None where it is alone."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training):
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    group = norm.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None


# --- bottleneck blocks --------------------------------------------------------------------------------------


class BottleneckBlock(Protocol):
    """A block of 1x1, convolution, 1x1, each with a batch norm, and a shortcut."""

    def layers(self) -> tuple[Layer, Layer, Layer]:
        """Narrow, middle and wide."""
        ...

    def shortcut_of(self, x: LazyActivation) -> LazyActivation:
        """[B, T, C_in] to [B, T_out, C_out]."""
        ...


def bottlenecks(x: LazyActivation, blocks: Sequence[BottleneckBlock]) -> LazyActivation:
    """Bottleneck blocks in a row, [B, T, C_in] to [B, T_out, C_out].

    At inference each also makes the next one's first convolution.
    """
    narrowed = None
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        narrow, middle, wide = block.layers()
        x = materialize_shared(x)
        y, x = conv_norm_beside(x, *narrow, "relu") if narrowed is None else (narrowed, x)
        residual = block.shortcut_of(x)
        if all(_is_fused(norm) for _, norm in (narrow, middle, wide)):
            layers = [middle, wide] if following is None else [middle, wide, following.layers()[0]]
            x, narrowed = _fused_bottleneck(y, layers, residual)
        else:
            y = conv_norm(y, *middle, "relu")
            # The block's widest output comes from its cheapest convolution.
            recompute = wide[0].in_channels <= MAX_RECOMPUTE_CHANNELS
            x, narrowed = conv_norm(y, *wide, "relu", residual=residual, recompute=recompute), None
    return x


# --- inference: norms fused into weights --------------------------------------------------------------------


def fuse_norms(encoder: Module) -> Module:
    """A copy for inference, in evaluation mode, that fuses norms into weights once, at the first use.

    The copy has the weights as they are now, and must not be trained or loaded into.

    >>> from ecgot.models.encoders import encoder
    >>> model = encoder("resnet1d_tiny").eval()
    >>> fast, waveform = fuse_norms(model), torch.zeros(1, 12, 200)
    >>> with torch.no_grad():
    ...     torch.allclose(fast(waveform).tokens, model(waveform).tokens, atol=1e-5)
    True
    """
    copied = copy.deepcopy(encoder).eval().requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.Conv1d):
            module.__dict__[FUSED] = {}
    return copied


def channels_last(weight: Tensor) -> Tensor:
    """[C_out, C_in, K] with the channels innermost, as convolutions of channels-last activations read it."""
    return weight.permute(0, 2, 1).contiguous().permute(0, 2, 1)


def _is_fused(norm: Norm) -> bool:
    """Whether the norm runs as part of its convolution: at inference, with running statistics."""
    batch_statistics = norm.training or norm.running_mean is None
    return not (batch_statistics or torch.is_grad_enabled() or torch.compiler.is_compiling())


def _fused_conv(
    x: LazyActivation,
    layer: FusedLayer,
    conv: nn.Conv1d,
    activation: str | None,
    residual: LazyActivation | None,
) -> LazyActivation:
    x, dtype = materialize(x), layer.weight.dtype
    y = conv1d(
        x.values.to(dtype),
        layer.weight,
        scale=layer.scale,
        shift=layer.shift,
        residual=None if residual is None else materialize(residual).values.to(dtype),
        activation=activation,
        lengths=x.lengths,
        **_geometry(conv),
    )
    return LazyActivation(y, lengths=_output_lengths(x, conv))


def _fused_bottleneck(
    x: LazyActivation, layers: Sequence[Layer], residual: LazyActivation
) -> tuple[LazyActivation, LazyActivation | None]:
    """The block's output, and that of the next one's first convolution where layers has it."""
    middle, wide, *narrow = (_fused_layer(conv, norm, slice(None), x.values) for conv, norm in layers)
    conv, dtype = layers[0][0], middle.weight.dtype
    geometry = _geometry(conv)
    del geometry["groups"]  # a bottleneck's convolution has one
    y, z = conv1d_bottleneck(
        x.values.to(dtype),
        middle,
        wide,
        materialize(residual).values.to(dtype),
        *narrow,
        lengths=x.lengths,
        **geometry,
    )
    lengths = _output_lengths(x, conv)
    return LazyActivation(y, lengths=lengths), None if z is None else LazyActivation(z, lengths=lengths)


def _fused_layer(conv: nn.Conv1d, norm: Norm, channels: slice, x: Tensor) -> FusedLayer:
    """In autocast's dtype where it is on; made once in a copy of :func:`fuse_norms`, else at every call."""
    device = x.device.type
    autocast = device in AUTOCAST and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else conv.weight.dtype
    made = conv.__dict__.get(FUSED)
    if made is None:
        return _fuse(conv, norm, channels, dtype)
    key = dtype, conv.weight.device
    if key not in made:
        made[key] = _fuse(conv, norm, channels, dtype)
    return made[key]


def _fuse(conv: nn.Conv1d, norm: Norm, channels: slice, dtype: torch.dtype) -> FusedLayer:
    """The scale goes into the weight, unless half precision would round it there."""
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
    """[C_out, C_in, K] laid out as the kernels read it, so that they need not copy it."""
    if weight.device.type == "cpu":
        return channels_last(weight)
    return weight.permute(2, 1, 0).contiguous().permute(2, 1, 0)
