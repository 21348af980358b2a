"""The registered operators under :func:`doubly_stochastic`, and which implementation they run."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.dispatch import use_triton
from ecgot.kernels.registration import LIBRARY, register
from ecgot.kernels.scaling import torch_iteration

MAX_SIDE = 16  # of the matrices that Triton's tiles hold


def _implementation(logits: Tensor) -> ModuleType:
    """Triton for fp32 and half precision on a GPU, torch otherwise."""
    if logits.dtype != torch.float64 and logits.shape[-1] <= MAX_SIDE and use_triton(logits):
        from ecgot.kernels.scaling import triton_iteration

        return triton_iteration
    return torch_iteration


@register("doubly_stochastic", "(Tensor logits, SymInt iterations) -> Tensor")
def doubly_stochastic_op(logits: Tensor, iterations: int) -> Tensor:
    """The normalised matrices [N, n, n] of logits [N, n, n], N and n >= 1, columns first."""
    return _implementation(logits).forward(logits, iterations)


@register("doubly_stochastic_bwd", "(Tensor logits, Tensor grad, SymInt iterations) -> Tensor")
def doubly_stochastic_bwd_op(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """The gradient in the logits [N, n, n], given that in the result."""
    return _implementation(logits).backward(logits, grad, iterations)


@torch.library.register_fake("ecgot::doubly_stochastic", lib=LIBRARY)
def _(logits: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("ecgot::doubly_stochastic_bwd", lib=LIBRARY)
def _(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.iterations = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (logits,) = ctx.saved_tensors
    return doubly_stochastic_bwd_op(logits, grad, ctx.iterations), None


torch.library.register_autograd(
    "ecgot::doubly_stochastic", _backward, setup_context=_setup_context, lib=LIBRARY
)
