"""Fused channels-last 1-D convolution: the public function, and the registered operators behind it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels import _torch_conv1d
from ecgot.kernels._convolution import PLAIN, Epilogue, Geometry, OutputGradient, Signal
from ecgot.kernels._convolution import geometry as checked_geometry
from ecgot.kernels.conv1d_table import BACKENDS, choose

ACTIVATIONS = (None, "relu", "gelu", "silu")
PRECISIONS = ("fp32", "tf32", "ieee")


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    lengths: Tensor | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> Tensor:
    """y = activation(scale * (conv(x) + bias) + shift + residual), channels-last.

    With scale and shift folded from a batch norm, this is a residual network's whole layer at inference.

    Args:
        x: [B, T, C_in], floating point, any strides: a loader's [B, C_in, T] comes as ``x.transpose(1, 2)``,
            uncopied.
        weight: [C_out, C_in / groups, K], as in ``torch.nn.Conv1d``; same dtype as x.
        bias, scale, shift: [C_out]; scale and shift may be fp32 where x is of half precision, and should be
            where channels have means far from 0: they are used as they come.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``; zeros are padded on both
            sides, or as many as a pair says on the left and right.
        residual: [B, T_out, C_out].
        activation: None, "relu", "gelu" (the exact one) or "silu".
        lengths: [B], integers: samples of each record; what lies beyond is read as 0, whatever it is.
        precision: of fp32 products on a GPU: "fp32" (three TF32 products), "tf32" (one) or "ieee"
            (multiply-adds).
        backend: "triton", "torch" (the vendor's library on a GPU), or "auto", see
            :func:`ecgot.kernels.conv1d_backends`. fp64 and CPU tensors always go to torch, but for Triton's
            interpreter.

    Returns:
        [B, T_out, C_out] in the dtype of x, T_out = (T + both paddings - dilation (K - 1) - 1) // stride + 1;
        beyond a record's end what is made of zeros. Differentiable in every floating tensor.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    Under autocast all but scale and shift are cast, as torch's convolutions and norms have it.
    In Triton one kernel does all of it, accumulating in fp32 (fp64 takes the torch path), and one kernel each
    makes the gradients in x and weight, without atomics: the same input gives the same bits. On a CPU the
    torch path serves, unless TRITON_INTERPRET=1 is set.
    """
    x, weight, bias, residual = cast_by_autocast(x, weight, bias, residual)
    geometry = checked_geometry(stride, padding, dilation, groups)
    _check(x, weight, bias, geometry, scale, shift, residual, activation)
    lengths = check_lengths(lengths, x)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    if choose("forward", x, weight, geometry, backend) == "triton":
        settings = (geometry, activation, precision, backend)
        return _Convolution.apply(x, weight, bias, scale, shift, residual, lengths, *settings)
    # torch's own autograd serves the torch path, and may be differentiated twice.
    y = Signal(x, lengths=lengths)
    return _torch_conv1d.folded(y, weight, geometry, Epilogue(bias, scale, shift, residual, activation))


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays, as in torch."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def check_choice(name: str, given: object, accepted: tuple[object, ...]) -> None:
    if given not in accepted:
        *most, last = map(repr, accepted)
        raise ValueError(f"{name}: got {given!r}, accepted are {', '.join(most)} and {last}")


def check_lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """As [B] int32 on x's device."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or len(lengths) != len(x):
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths: got {got}, accepted is a tensor of shape ({len(x)},)")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: got dtype {lengths.dtype}, accepted are integers")
    return lengths.clamp(0, x.shape[1]).to(x.device, torch.int32)


def check_shapes(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """T_out, where x [B, T, C_in] and weight [C_out, C_in / groups, K] go together."""
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: got {type(given).__name__}, accepted is a torch.Tensor")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, accepted is [B, T, C_in] with T and C_in >= 1")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, accepted is floating point")
    groups = geometry.groups
    if x.shape[2] % groups:
        raise ValueError(f"groups: got {groups}, accepted is a divisor of C_in = {x.shape[2]}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] // groups or 0 in weight.shape:
        accepted = f"[C_out, {x.shape[2] // groups}, K], C_out and K >= 1"
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted is {accepted}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups: got {groups}, accepted is a divisor of C_out = {weight.shape[0]}")
    k = weight.shape[2]
    t_out = int(geometry.length(x.shape[1], k))
    if t_out < 1:
        shortest = geometry.dilation * (k - 1) + 1 - sum(geometry.paddings)
        raise ValueError(f"x: got T = {x.shape[1]}, accepted is at least {shortest} for this kernel")
    return t_out


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    t_out = check_shapes(x, weight, geometry)
    check_choice("activation", activation, ACTIVATIONS)
    c_out = weight.shape[0]
    shapes = {"bias": (c_out,), "scale": (c_out,), "shift": (c_out,), "residual": (x.shape[0], t_out, c_out)}
    tensors = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, accepted is a torch.Tensor")
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, accepted is {shapes[name]}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, accepted is that of x, {x.device}")
        if not fits_dtype(name, tensor, x):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted is that of x, {x.dtype}")


def fits_dtype(name: str, tensor: Tensor, x: Tensor) -> bool:
    """Whether x's dtype, or fp32 for the scale and shift of half precision."""
    wide = name in ("scale", "shift") and x.dtype.itemsize == 2 and tensor.dtype == torch.float32
    return tensor.dtype == x.dtype or wide


class _Convolution(torch.autograd.Function):
    """Of the Triton path. Nothing but the inputs is kept, and the output where its activation is ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        lengths: Tensor | None,
        geometry: Geometry,
        activation: str | None,
        precision: str,
        backend: str,
    ) -> Tensor:
        signal, epilogue = Signal(x, lengths=lengths), Epilogue(bias, scale, shift, residual, activation)
        y, _, _ = forward(signal, weight, geometry, epilogue, precision=precision, backend=backend)
        # ReLU's derivative is read off its output; GELU and SiLU need the pre-activation, which is
        # recomputed, as is the convolution for the gradient in scale.
        smooth = activation in ("gelu", "silu")
        ctx.save_for_backward(
            x,
            weight,
            bias,
            scale,
            shift,
            residual if smooth else None,
            y if activation == "relu" else None,
            lengths,
        )
        ctx.settings = geometry, activation, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, residual, output, lengths = ctx.saved_tensors
        geometry, activation, precision, backend = ctx.settings
        needs_x, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual = ctx.needs_input_grad[:6]
        signal = Signal(x, lengths=lengths)
        smooth = activation in ("gelu", "silu")
        if activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, output, 0)  # as torch treats NaN and infinity
        elif smooth:
            before = Epilogue(bias, scale, shift, residual)
            z, _, _ = forward(signal, weight, geometry, before, precision=precision, backend=backend)
            grad = grad * _torch_conv1d.slope(z, activation)
        grad_residual = grad if needs_residual else None
        grad_shift = grad.sum((0, 1)).to(shift.dtype) if needs_shift else None
        grad_scale = None
        if needs_scale:
            convolved, _, _ = forward(
                signal, weight, geometry, Epilogue(bias), precision=precision, backend=backend
            )
            grad_scale = (grad * convolved).sum((0, 1)).to(scale.dtype)
        if scale is not None:
            grad = (grad * scale).to(grad.dtype)
        grad_bias = grad.sum((0, 1)) if needs_bias else None
        grad_x, _, _, grad_weight = gradients(
            OutputGradient(grad, lengths=None if lengths is None else out_lengths(lengths, weight, geometry)),
            weight,
            geometry,
            signal,
            needs_x,
            needs_weight,
            precision=precision,
            backend=backend,
        )
        return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_residual, *[None] * 5


def out_lengths(lengths: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Samples of each record after a convolution, as if it were alone."""
    length = geometry.length(lengths, weight.shape[2])
    assert isinstance(length, Tensor)
    return length.clamp_min(0)


# --- the two passes, wherever they run ----------------------------------------------------------------------


def forward(
    x: Signal,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    statistics: bool = False,
    lengths: Tensor | None = None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T_out, C_out], its mean and biased variance [C_out] (empty without statistics)."""
    run = _forward_operator if torch.compiler.is_compiling() else _forward
    return run(
        *(x.values, x.mean, x.scale, x.shift, x.activation, x.lengths),
        weight,
        *(geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.paddings[1]),
        *(epilogue.bias, epilogue.scale, epilogue.shift, epilogue.residual, epilogue.activation),
        *(statistics, lengths, precision, backend),
    )


def gradients(
    grad: OutputGradient,
    weight: Tensor,
    geometry: Geometry,
    x: Signal,
    needs_x: bool,
    needs_weight: bool,
    *,
    precision: str,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x.values, its shift and scale (where it is normalised) and the weight."""
    run = _gradient_operator if torch.compiler.is_compiling() else _gradients
    grad_x, shift, scale, grad_weight = run(
        grad.g,
        *(grad.y, grad.mean, grad.c0, grad.c1, grad.lengths),
        weight,
        *(geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.paddings[1]),
        x.values,
        *(x.mean, x.scale, x.shift, x.rstd),
        *(x.activation, x.lengths),
        needs_x,
        needs_weight,
        *(precision, backend),
    )
    norm = needs_x and x.mean is not None
    return (
        grad_x if needs_x else None,
        shift if norm else None,
        scale if norm else None,
        grad_weight if needs_weight else None,
    )


# A registered operator is for torch.compile, which takes it whole; called as one it costs a CPU's small
# layers as much as their work.


def _forward(
    x: Tensor,
    x_mean: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_activation: str | None,
    x_lengths: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    end: int,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    statistics: bool,
    lengths: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    signal = Signal(x, x_mean, x_scale, x_shift, x_activation, x_lengths)
    geometry = Geometry(stride, padding, dilation, groups, end)
    epilogue = Epilogue(bias, scale, shift, residual, activation)
    given = (signal, weight, geometry, epilogue)
    if choose("forward", x, weight, geometry, backend) == "triton":
        from ecgot.kernels import _triton_conv1d

        y, mean, var = _triton_conv1d.convolve(
            *given, statistics=statistics, lengths=lengths, precision=precision
        )
    else:
        y, mean, var = _torch_conv1d.convolve(*given, statistics=statistics, lengths=lengths)
    kind = torch.promote_types(x.dtype, torch.float32)
    y = y.contiguous()
    if mean is None or var is None:
        return y, y.new_empty(0, dtype=kind), y.new_empty(0, dtype=kind)
    return y, mean, var


_forward_operator = torch.library.custom_op("ecgot::conv1d_forward", _forward, mutates_args=())


@_forward_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    x_mean,
    x_scale,
    x_shift,
    x_activation,
    x_lengths,
    weight,
    stride,
    padding,
    dilation,
    groups,
    end,
    bias,
    scale,
    shift,
    residual,
    activation,
    statistics,
    lengths,
    precision,
    backend,
):
    c_out, _, k = weight.shape
    t_out = Geometry(stride, padding, dilation, groups, end).length(x.shape[1], k)
    kind = torch.promote_types(x.dtype, torch.float32)
    moments = [x.new_empty(c_out if statistics else 0, dtype=kind) for _ in range(2)]
    return x.new_empty(x.shape[0], t_out, c_out), *moments


def _gradients(
    g: Tensor,
    y: Tensor | None,
    y_mean: Tensor | None,
    c0: Tensor | None,
    c1: Tensor | None,
    y_lengths: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    end: int,
    x: Tensor,
    x_mean: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_rstd: Tensor | None,
    x_activation: str | None,
    x_lengths: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = OutputGradient(g, y, y_mean, c0, c1, y_lengths)
    signal = Signal(x, x_mean, x_scale, x_shift, x_activation, x_lengths, x_rstd)
    geometry = Geometry(stride, padding, dilation, groups, end)
    takes = {
        what: needed and choose(what, x, weight, geometry, backend) == "triton"
        for what, needed in (("input_gradient", needs_x), ("weight_gradient", needs_weight))
    }
    # Of torch, both at once: they share what they read.
    grad_x, shift, scale, grad_weight = _torch_conv1d.gradients(
        grad,
        weight,
        geometry,
        signal,
        needs_x and not takes["input_gradient"],
        needs_weight and not takes["weight_gradient"],
    )
    if any(takes.values()):
        from ecgot.kernels import _triton_conv1d

        if takes["input_gradient"]:
            grad_x, shift, scale = _triton_conv1d.input_gradient(
                grad, weight, geometry, signal, precision=precision
            )
        if takes["weight_gradient"]:
            grad_weight = _triton_conv1d.weight_gradient(
                grad, signal, geometry, weight.shape[2], precision=precision
            ).to(weight.dtype)
    kind = torch.promote_types(x.dtype, torch.float32)
    none, no_sums = x.new_empty(0), x.new_empty(0, dtype=kind)
    return (
        none if grad_x is None else grad_x.contiguous(),
        no_sums if shift is None else shift,
        no_sums.clone() if scale is None else scale,
        none.clone() if grad_weight is None else _laid_out_as(weight, grad_weight),
    )


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


_gradient_operator = torch.library.custom_op("ecgot::conv1d_gradients", _gradients, mutates_args=())


@_gradient_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    g,
    y,
    y_mean,
    c0,
    c1,
    y_lengths,
    weight,
    stride,
    padding,
    dilation,
    groups,
    end,
    x,
    x_mean,
    x_scale,
    x_shift,
    x_rstd,
    x_activation,
    x_lengths,
    needs_x,
    needs_weight,
    precision,
    backend,
):
    kind = torch.promote_types(x.dtype, torch.float32)
    sums = x.shape[2] if needs_x and x_mean is not None else 0
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(sums, dtype=kind),
        x.new_empty(sums, dtype=kind),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )
