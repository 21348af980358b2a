"""The two passes of a convolution and of a join, wherever they run, and the operators registered for them.

A registered operator is for torch.compile, which takes it whole. Eager code calls the function under it: on a
CPU going through the dispatcher costs as much as a small layer's work.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.backends import choose
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import (
    PLAIN,
    VECTORS,
    BatchNorm,
    Epilogue,
    Gradients,
    LazyActivation,
    OutputGradient,
    Settings,
)
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


def for_kernels(x: LazyActivation, weight: Tensor, settings: Settings) -> Tensor:
    """The weight as the kernels of every pass of this convolution read it; itself where torch convolves."""
    from ecgot.kernels.conv import triton_conv1d

    if choose("forward", x.values, weight, settings.geometry, settings.backend) == "torch":
        return weight
    return triton_conv1d.readable(weight, x.values.dtype)


def normalised(
    x: LazyActivation, weight: Tensor, norm: BatchNorm, settings: Settings, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [B, T_out, C_out] and the norm's vectors [C_out], see :class:`LazyActivation`; on a GPU, eagerly.

    Moves the norm's running statistics in training. lengths: [B], of the output, given where x has lengths.
    """
    from ecgot.kernels.conv import triton_conv1d, triton_statistics

    if choose("forward", x.values, weight, settings.geometry, settings.backend) == "triton":
        y, tiles = triton_conv1d.convolve(
            *(x, weight, settings.geometry),
            statistics=True,
            lengths=lengths,
            precision=settings.precision,
        )
        assert tiles is not None
        return y, triton_statistics.normalise(tiles, norm)
    y, mean, var = _forward(x, weight.to(x.values.dtype), settings, PLAIN, True, lengths)
    count = var.new_full((1,), y.shape[0] * y.shape[1]) if lengths is None else lengths.sum()[None].to(var)
    one_tile = triton_statistics.TileStatistics(count, mean[None], (var * count)[None])
    return y, triton_statistics.normalise(one_tile, norm)


def gradients(
    grad: OutputGradient,
    weight: Tensor,
    settings: Settings,
    x: LazyActivation,
    needs: tuple[bool, bool],
    like: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Gradients, Tensor | None]:
    """Gradients of ``x.tensors()`` and of the weight.

    Args:
        grad: the gradient in y.
        weight: [C_out, C_in / groups, K]; for the kernels in any dtype and layout.
        settings: the convolution's.
        x: what it read.
        needs: whether those of x are wanted, and whether the weight's is.
        like: the weight by whose dtype and layout to make its gradient; the weight itself where omitted.
        beside: [B, T, C_in], a further gradient in x.values, where x is materialized; eagerly.
    """
    needs_x, needs_weight = needs
    like = weight if like is None else like
    if torch.compiler.is_compiling():
        given = grad.flatten() | x.flatten("x", "x_") | _flat_settings(settings)
        given |= {"weight": weight, "needs_x": needs_x, "needs_weight": needs_weight}
        grad_x, shift, scale, grad_weight = _gradient_operator(given)
        found = _Found(grad_x, shift, scale, None, grad_weight)
    else:
        found = _gradients(grad, weight, settings, x, needs, like, beside)
    of_weight = found.weight if needs_weight else None
    if not needs_x:
        return x.gradients(None, None, None), of_weight
    if x.mean is None:
        return x.gradients(found.x, None, None), of_weight
    return x.gradients(found.x, found.shift, found.scale, found.vectors), of_weight


class _Found(NamedTuple):
    """Gradients of a convolution; vectors in place of shift and scale where the kernels merge them."""

    x: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    vectors: Tensor | None
    weight: Tensor | None


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
        from ecgot.kernels.conv import triton_conv1d, triton_statistics

        y, tiles = triton_conv1d.convolve(*given, **options, precision=settings.precision)
        mean, var = (None, None) if tiles is None else triton_statistics.moments(tiles)
    else:
        with torch_conv1d.library_precision(x.values, settings.precision):
            y, mean, var = torch_conv1d.convolve(*given, **options)
    kind = torch.promote_types(x.values.dtype, torch.float32)
    y = y.contiguous()
    if mean is None or var is None:
        return y, y.new_empty(0, dtype=kind), y.new_empty(0, dtype=kind)
    return y, mean, var


def _gradients(
    grad: OutputGradient,
    weight: Tensor,
    settings: Settings,
    x: LazyActivation,
    needs: tuple[bool, bool],
    like: Tensor,
    beside: Tensor | None = None,
) -> _Found:
    geometry, precision = settings.geometry, settings.precision
    triton_x, triton_weight = (
        needed and choose(what, x.values, weight, geometry, settings.backend) == "triton"
        for what, needed in zip(("input_gradient", "weight_gradient"), needs, strict=True)
    )
    torch_x, torch_weight = needs[0] and not triton_x, needs[1] and not triton_weight
    found = _Found(None, None, None, None, None)
    if torch_x or torch_weight:  # at once, as they share what they read
        of_x = weight.to(x.values.dtype)
        with torch_conv1d.library_precision(x.values, precision):
            grad_x, shift, scale, grad_weight = torch_conv1d.gradients(
                grad, of_x, geometry, x, torch_x, torch_weight
            )
        grad_x = None if grad_x is None else (grad_x if beside is None else grad_x + beside).contiguous()
        grad_weight = None if grad_weight is None else _as(like, grad_weight)
        found = _Found(grad_x, shift, scale, None, grad_weight)
    if triton_x or triton_weight:
        from ecgot.kernels.conv import triton_conv1d

        if triton_x:
            grad_x, merged = triton_conv1d.input_gradient(
                grad, weight, geometry, x, beside, precision=precision
            )
            found = found._replace(x=grad_x)
            if merged is not None and x.vectors is not None:
                found = found._replace(vectors=merged)
            elif merged is not None:
                found = found._replace(shift=merged[0], scale=merged[1])
        if triton_weight:
            grad_weight = triton_conv1d.weight_gradient(grad, x, geometry, like, precision=precision)
            found = found._replace(weight=grad_weight)
    return found


def _flat_gradients(found: _Found, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As an operator returns them: tensors of their own, empty for what there is not."""
    kind = torch.promote_types(x.dtype, torch.float32)
    none, no_sums = x.new_empty(0), x.new_empty(0, dtype=kind)
    return (
        none if found.x is None else found.x,
        no_sums if found.shift is None else found.shift.clone(),
        no_sums.clone() if found.scale is None else found.scale.clone(),
        none.clone() if found.weight is None else found.weight,
    )


def _as(weight: Tensor, gradient: Tensor) -> Tensor:
    same = gradient.stride() == weight.stride() and gradient.dtype == weight.dtype
    return gradient if same else torch.empty_like(weight).copy_(gradient)


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
    lambda given: _flat_gradients(
        _gradients(
            OutputGradient.unflatten(given),
            given["weight"],
            _named_settings(given),
            LazyActivation.unflatten(given, "x", "x_"),
            (given["needs_x"], given["needs_weight"]),
            given["weight"],
        ),
        given["x"],
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
) -> tuple[Gradients, Gradients]:
    """Gradients of ``y.tensors()`` and ``residual.tensors()`` (all None without one) from that in z.

    Args:
        grad: [B, T, C].
        z: [B, T, C], the join's output, read where the activation is ReLU.
        y, residual: as in :func:`join_forward`; the residual's values are read where it is normalised or the
            activation is GELU or SiLU.
    """
    if torch.compiler.is_compiling():
        given = _flat_join(y, residual, activation) | {"grad": grad, "z": z}
        grad_y, grad_r, sums = _join_gradient_operator(given | {"has_residual": residual is not None})
        of_y, of_r = _of_norm(sums[:2]), _of_norm(sums[2:])
    else:
        grad_y, grad_r, of_its, of_residuals = _join_gradients(grad, z, y, residual, activation)
        of_y, of_r = _of_norm(of_its), _of_norm(of_residuals)
    if residual is None:
        return y.gradients(grad_y, *of_y), (None,) * 7
    if residual.mean is None:
        return y.gradients(grad_y, *of_y), residual.gradients(grad_r, None, None)
    return y.gradients(grad_y, *of_y), residual.gradients(grad_r, *of_r)


def _of_norm(sums: Tensor | None) -> tuple[Tensor | None, ...]:
    """Merged sums, [2, C] or [5, C], as the last arguments of :meth:`LazyActivation.gradients`."""
    if sums is None:
        return None, None
    if len(sums) == VECTORS:
        return None, None, sums
    return sums[0], sums[1]


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """In y.values and residual.values, and the sums of both norms, see :func:`_of_norm`."""
    if use_triton(y.values) and y.values.dtype != torch.float64:
        from ecgot.kernels.conv import triton_join

        return triton_join.join_gradient(grad, z, y, residual, activation)
    grad_y, grad_r, sums = torch_conv1d.join_gradient(grad, z, y, residual, activation)
    return grad_y.contiguous(), None if grad_r is None else grad_r.contiguous(), sums[:2], sums[2:]


def _flat_join_gradients(given: Named) -> tuple[Tensor, Tensor, Tensor]:
    """As an operator returns them: the sums as [4, C], and no tensor that came in."""
    grad, (y, residual, activation) = given["grad"], _named_join(given)
    grad_y, grad_r, of_y, of_r = _join_gradients(grad, given["z"], y, residual, activation)
    grad_r = y.values.new_empty(0) if grad_r is None else grad_r
    sums = torch.cat([of_y, of_y if of_r is None else of_r])
    return grad_y, grad_r.clone() if grad_r is grad else grad_r, sums


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
    _flat_join_gradients,
    _fake_join_gradients,
)
