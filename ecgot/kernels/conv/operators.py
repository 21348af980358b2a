"""The two passes of a convolution and of a join, wherever they run, and the operators registered for them.

A registered operator is for torch.compile, which takes it whole. Eager code calls the function under it: on a
CPU going through the dispatcher costs as much as a small layer's work.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.backends import choose
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import PLAIN, Epilogue, LazyActivation, OutputGradient, Settings
from ecgot.kernels.dispatch import use_triton

Named = dict[str, Any]  # a flat operator's arguments by name


def _register(
    name: str, arguments: str, results: str, run: Callable[[Named], Any], fake: Callable[[Named], Any]
) -> Callable[[Named], Any]:
    """Register ``ecgot::name``; ``run`` and ``fake`` take its arguments as one dictionary.

    Returns:
        A function that calls the operator with those entries of a dictionary that it has arguments for.
    """
    names = [argument.split()[-1] for argument in arguments.split(", ")]

    def named(function: Callable[[Named], Any]) -> Callable[..., Any]:
        return lambda *flat: function(dict(zip(names, flat, strict=True)))

    schema = f"({arguments}) -> {results}"
    operator = torch.library.custom_op(f"ecgot::{name}", named(run), mutates_args=(), schema=schema)
    operator.register_fake(named(fake))
    return lambda given: operator(*[given[name] for name in names])


# --- convolution --------------------------------------------------------------------------------------------


def forward(
    x: LazyActivation,
    weight: Tensor,
    settings: Settings,
    epilogue: Epilogue = PLAIN,
    *,
    statistics: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T_out, C_out], its mean and biased variance [C_out] (empty without statistics).

    lengths: [B], of the output, given where x has lengths.
    """
    if not torch.compiler.is_compiling():
        return _forward(x, weight, settings, epilogue, statistics, lengths)
    given = x.flatten("x", "x_") | epilogue.flatten() | _flat_settings(settings)
    return _forward_operator(given | {"weight": weight, "statistics": statistics, "lengths": lengths})


def gradients(
    grad: OutputGradient, weight: Tensor, settings: Settings, x: LazyActivation, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x.values, its shift and scale (where it is normalised) and the weight.

    needs: whether that in x is wanted, with its shift and scale, and whether that in the weight is.
    """
    needs_x, needs_weight = needs
    if torch.compiler.is_compiling():
        given = grad.flatten() | x.flatten("x", "x_") | _flat_settings(settings)
        given |= {"weight": weight, "needs_x": needs_x, "needs_weight": needs_weight}
        found = _gradient_operator(given)
    else:
        found = _gradients(grad, weight, settings, x, needs)
    grad_x, shift, scale, grad_weight = found
    norm = needs_x and x.mean is not None
    return (
        grad_x if needs_x else None,
        shift if norm else None,
        scale if norm else None,
        grad_weight if needs_weight else None,
    )


def _flat_settings(settings: Settings) -> Named:
    return settings.geometry.flatten() | {"precision": settings.precision, "backend": settings.backend}


def _named_settings(given: Named) -> Settings:
    return Settings(Geometry.unflatten(given), given["precision"], given["backend"])


def _forward(
    x: LazyActivation,
    weight: Tensor,
    settings: Settings,
    epilogue: Epilogue,
    statistics: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = settings.geometry
    given = (x, weight, geometry, epilogue)
    options: Named = {"statistics": statistics, "lengths": lengths}
    if choose("forward", x.values, weight, geometry, settings.backend) == "triton":
        from ecgot.kernels.conv import triton_conv1d

        y, mean, var = triton_conv1d.convolve(*given, **options, precision=settings.precision)
    else:
        y, mean, var = torch_conv1d.convolve(*given, **options)
    kind = torch.promote_types(x.values.dtype, torch.float32)
    y = y.contiguous()
    if mean is None or var is None:
        return y, y.new_empty(0, dtype=kind), y.new_empty(0, dtype=kind)
    return y, mean, var


def _gradients(
    grad: OutputGradient, weight: Tensor, settings: Settings, x: LazyActivation, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geometry, precision = settings.geometry, settings.precision
    triton_x, triton_weight = (
        needed and choose(what, x.values, weight, geometry, settings.backend) == "triton"
        for what, needed in zip(("input_gradient", "weight_gradient"), needs, strict=True)
    )
    # Torch makes both at once, as they share what they read.
    grad_x, shift, scale, grad_weight = torch_conv1d.gradients(
        grad, weight, geometry, x, needs[0] and not triton_x, needs[1] and not triton_weight
    )
    if triton_x or triton_weight:
        from ecgot.kernels.conv import triton_conv1d

        if triton_x:
            grad_x, shift, scale = triton_conv1d.input_gradient(
                grad, weight, geometry, x, precision=precision
            )
        if triton_weight:
            k = weight.shape[2]
            grad_weight = triton_conv1d.weight_gradient(grad, x, geometry, k, precision=precision)
            grad_weight = grad_weight.to(weight.dtype)
    none = x.values.new_empty(0)
    no_sums = x.values.new_empty(0, dtype=torch.promote_types(x.values.dtype, torch.float32))
    return (
        none if grad_x is None else grad_x.contiguous(),
        no_sums if shift is None else shift,
        no_sums.clone() if scale is None else scale,
        none.clone() if grad_weight is None else _strided_as(weight, grad_weight),
    )


def _strided_as(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def _fake_forward(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    x, (c_out, _, k) = given["x"], given["weight"].shape
    t_out = Geometry.unflatten(given).output_length(x.shape[1], k)
    kind = torch.promote_types(x.dtype, torch.float32)
    mean, var = (x.new_empty(c_out if given["statistics"] else 0, dtype=kind) for _ in range(2))
    return x.new_empty(x.shape[0], t_out, c_out), mean, var


def _fake_gradients(given: Named) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, needs_x = given["x"], given["weight"], given["needs_x"]
    kind = torch.promote_types(x.dtype, torch.float32)
    sums = x.shape[2] if needs_x and given["x_mean"] is not None else 0
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(sums, dtype=kind),
        x.new_empty(sums, dtype=kind),
        torch.empty_like(weight) if given["needs_weight"] else weight.new_empty(0),
    )


_GEOMETRY = "SymInt stride, SymInt padding, SymInt dilation, SymInt groups, SymInt end"
_forward_operator = _register(
    "conv1d_forward",
    "Tensor x, Tensor? x_mean, Tensor? x_scale, Tensor? x_shift, str? x_activation, Tensor? x_lengths, "
    f"Tensor weight, {_GEOMETRY}, "
    "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, str? activation, "
    "bool statistics, Tensor? lengths, str precision, str backend",
    "(Tensor, Tensor, Tensor)",
    lambda given: _forward(
        LazyActivation.unflatten(given, "x", "x_"),
        given["weight"],
        _named_settings(given),
        Epilogue.unflatten(given),
        given["statistics"],
        given["lengths"],
    ),
    _fake_forward,
)
_gradient_operator = _register(
    "conv1d_gradients",
    "Tensor g, Tensor? y, Tensor? y_mean, Tensor? c0, Tensor? c1, Tensor? y_lengths, "
    f"Tensor weight, {_GEOMETRY}, "
    "Tensor x, Tensor? x_mean, Tensor? x_scale, Tensor? x_shift, Tensor? x_rstd, str? x_activation, "
    "Tensor? x_lengths, bool needs_x, bool needs_weight, str precision, str backend",
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda given: _gradients(
        OutputGradient.unflatten(given),
        given["weight"],
        _named_settings(given),
        LazyActivation.unflatten(given, "x", "x_"),
        (given["needs_x"], given["needs_weight"]),
    ),
    _fake_gradients,
)


# --- join ---------------------------------------------------------------------------------------------------


def join_forward(y: LazyActivation, residual: LazyActivation | None, activation: str | None) -> Tensor:
    """activation(normalised y + residual) [B, T, C]."""
    if not torch.compiler.is_compiling():
        return _join_forward(y, residual, activation)
    return _join_operator(_flat_join(y, residual, activation))


def join_gradients(
    grad: Tensor, z: Tensor | None, y: LazyActivation, residual: LazyActivation | None, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a join from that in its output z: in y and the residual, and in their shifts and scales.

    Args:
        grad: [B, T, C].
        z: [B, T, C], read where the activation is ReLU.
        y, residual: as in :func:`join_forward`; the residual's values are read where it is normalised or the
            activation is GELU or SiLU.

    Returns:
        [B, T, C] in y.values and in residual.values (empty without one); [4, C] in y's shift and scale, and
        in the residual's.
    """
    if not torch.compiler.is_compiling():
        return _join_gradients(grad, z, y, residual, activation)
    given = _flat_join(y, residual, activation)
    return _join_gradient_operator(given | {"grad": grad, "z": z, "has_residual": residual is not None})


def _flat_join(y: LazyActivation, residual: LazyActivation | None, activation: str | None) -> Named:
    r = LazyActivation(y.values) if residual is None else residual
    given = y.flatten("y", "") | r.flatten("r", "r_") | {"activation": activation}
    return given if residual is not None else given | {"r": None}


def _named_join(given: Named) -> tuple[LazyActivation, LazyActivation | None, str | None]:
    y = LazyActivation.unflatten(given | {"activation": None}, "y", "")
    residual = None if given["r"] is None else LazyActivation.unflatten(given, "r", "r_")
    return y, residual, given["activation"]


def _join_forward(y: LazyActivation, residual: LazyActivation | None, activation: str | None) -> Tensor:
    if use_triton(y.values) and y.values.dtype != torch.float64:
        from ecgot.kernels.conv import triton_join

        return triton_join.join(y, residual, activation)
    return torch_conv1d.join(y, residual, activation).contiguous()


def _join_gradients(
    grad: Tensor, z: Tensor | None, y: LazyActivation, residual: LazyActivation | None, activation: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton(y.values) and y.values.dtype != torch.float64:
        from ecgot.kernels.conv import triton_join

        grad_y, grad_r, sums = triton_join.join_gradient(grad, z, y, residual, activation)
    else:
        grad_y, grad_r, sums = torch_conv1d.join_gradient(grad, z, y, residual, activation)
    grad_r = y.values.new_empty(0) if grad_r is None else grad_r.contiguous()
    # An operator must not return one of its inputs.
    return grad_y.contiguous(), grad_r.clone() if grad_r is grad else grad_r, sums


def _fake_join_gradients(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    y, mean = given["y"], given["mean"]
    of_residual = y.shape if given["has_residual"] else (0,)
    return y.new_empty(y.shape), y.new_empty(of_residual), mean.new_empty(4, len(mean))


_join_operator = _register(
    "join",
    "Tensor y, Tensor mean, Tensor scale, Tensor shift, "
    "Tensor? r, Tensor? r_mean, Tensor? r_scale, Tensor? r_shift, str? r_activation, str? activation",
    "Tensor",
    lambda given: _join_forward(*_named_join(given)),
    lambda given: given["y"].new_empty(given["y"].shape),
)
_join_gradient_operator = _register(
    "join_gradient",
    "Tensor grad, Tensor? z, Tensor y, Tensor mean, Tensor scale, Tensor shift, Tensor? rstd, "
    "Tensor? r, Tensor? r_mean, Tensor? r_scale, Tensor? r_shift, Tensor? r_rstd, str? r_activation, "
    "bool has_residual, str? activation",
    "(Tensor, Tensor, Tensor)",
    lambda given: _join_gradients(given["grad"], given["z"], *_named_join(given)),
    _fake_join_gradients,
)
