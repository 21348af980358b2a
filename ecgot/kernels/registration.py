"""Operators of torch, and the two ways past them.

The dispatcher knows an operator: torch.compile, torch.export and modes of torch want it. Where nothing of the
kind looks on, a dispatch costs as much as a small problem, and the kernel is called. Under torch.func and
torch.vmap, which registered derivatives do not take part in, an ``autograd.Function`` stands in.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "ecgot"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Kernel = Callable[..., Any]  # returns a tensor or a tuple of them


def register(name: str, schema: str) -> Callable[[Kernel], Any]:
    """Register a function as an operator, which it becomes; the function itself is its ``kernel``.

    As ``torch.library.custom_op``, which imports torch._dynamo at the first call: two seconds.
    """

    def operator(kernel: Kernel) -> Any:
        def call(*flat: Any) -> Any:
            # Once there is a compiler, it shall not look into a kernel.
            return (torch._disable_dynamo(kernel) if "torch._dynamo" in sys.modules else kernel)(*flat)

        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, call, "CompositeExplicitAutograd")
        registered = getattr(getattr(torch.ops, NAMESPACE), name).default
        registered.kernel = kernel
        return registered

    return operator


class Caller:
    """Calls an operator in the way that fits the place.

    Its tensors have the problems in dimension 0, as have its results that are not empty.

    Args:
        op: made by :func:`register`.
        setup_context, backward: its first derivative, as registered; None where only the operator has one.
        is_folded: whether more problems of these arguments are one longer batch; else each has its own call.
    """

    def __init__(
        self,
        op: Any,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        *,
        is_folded: Callable[[Sequence[Any]], bool],
    ) -> None:
        class Function(torch.autograd.Function):
            @staticmethod
            def forward(*flat: Any) -> Any:
                return op.kernel(*flat)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                if setup_context is not None:
                    setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if backward is None:
                    raise RuntimeError("sinkhorn: expected a first derivative under torch.func, got a second")
                return backward(ctx, *grads)

            @staticmethod
            def vmap(info: Any, in_dims: Any, *flat: Any) -> tuple[Any, Any]:
                pairs = zip(flat, in_dims, strict=True)
                first = [_in_front(each, dim, info.batch_size) for each, dim in pairs]
                if not is_folded(flat):
                    every = [Function.apply(*_at(first, i)) for i in range(info.batch_size)]
                    return tuple(map(torch.stack, zip(*every, strict=True))), (0,) * len(every[0])
                folded = [each.flatten(0, 1) if isinstance(each, Tensor) else each for each in first]
                found = Function.apply(*folded)
                dims = tuple(None if each.shape == (0,) else 0 for each in found)
                return tuple(
                    each if dim is None else each.unflatten(0, (info.batch_size, -1))
                    for each, dim in zip(found, dims, strict=True)
                ), dims

        class Plain(torch.autograd.Function):
            """The same without transforms: torch binds a signature at each call of the other's kind."""

            @staticmethod
            def forward(ctx: Any, *flat: Any) -> Any:
                found = op.kernel(*flat)
                if setup_context is not None:
                    setup_context(ctx, flat, found)
                return found

            backward = Function.backward

        self._op, self._function = op, Function
        self._differentiable = Plain.apply if backward is not None else op

    def __call__(self, *flat: Any) -> Any:
        """The operator's results."""
        if is_transformed():
            return self._function.apply(*flat)
        tensors = [each for each in flat if isinstance(each, Tensor)]
        if not _is_unobserved(tensors):
            return self._op(*flat)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            return self._differentiable(*flat)
        return self._op.kernel(*flat)


def is_transformed() -> bool:
    """Whether a function transform of torch.func, or torch.vmap, is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _is_unobserved(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd would see an operator."""
    return (
        not torch.compiler.is_compiling()
        and all(type(each) in (Tensor, torch.nn.Parameter) for each in tensors)
        and torch._C._len_torch_dispatch_stack() == 0
        and not (tensors and tensors[0].is_meta)
    )


def pulled_back(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Gradients of a function in its inputs from those of its results, in a backward pass of any kind."""
    if is_transformed():
        pull = torch.func.vjp(function, *inputs)[1]
        return tuple(pull(tuple(grads)))
    leaves = [each.detach().requires_grad_() for each in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, list(grads), allow_unused=True)


def _in_front(value: Any, dim: int | None, size: int) -> Any:
    """A tensor with the mapped dimension in front, repeated if it has none; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _at(flat: Sequence[Any], i: int) -> list[Any]:
    return [each[i] if isinstance(each, Tensor) else each for each in flat]
