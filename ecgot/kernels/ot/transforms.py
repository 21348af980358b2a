"""Registered operators under ``torch.func``: ``vmap`` folds its dimension into the batch of problems.

A registered operator with derivatives takes part in autograd and torch.compile, but not in function
transforms. There an ``autograd.Function`` with the same derivatives stands in for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Transformable:
    """An operator that ``torch.func.grad``, ``vjp``, ``jacrev`` and ``torch.vmap`` can go through.

    Its tensors have the problems in dimension 0, those of its results that are not empty as well.

    Args:
        op: the registered operator.
        setup_context, backward: its derivative, as registered; none if None.
        is_folded: whether more problems of these arguments are one longer batch; else each has its own call.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        *,
        is_folded: Callable[[Sequence[Any]], bool],
    ) -> None:
        class Transformed(torch.autograd.Function):
            @staticmethod
            def forward(*flat: Any) -> Any:
                return op(*flat)

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
                    every = [Transformed.apply(*_at(first, i)) for i in range(info.batch_size)]
                    return tuple(map(torch.stack, zip(*every, strict=True))), (0,) * len(every[0])
                folded = [each.flatten(0, 1) if isinstance(each, Tensor) else each for each in first]
                found = Transformed.apply(*folded)
                dims = tuple(None if each.shape == (0,) else 0 for each in found)
                return tuple(
                    each if dim is None else each.unflatten(0, (info.batch_size, -1))
                    for each, dim in zip(found, dims, strict=True)
                ), dims

        self._op, self._transformed = op, Transformed

    def __call__(self, *flat: Any) -> Any:
        """The operator's results."""
        if is_transformed():
            return self._transformed.apply(*flat)
        return self._op(*flat)


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


def is_transformed() -> bool:
    """Whether a function transform of torch.func, or torch.vmap, is at work."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _in_front(value: Any, dim: int | None, size: int) -> Any:
    """A tensor with the mapped dimension in front, repeated if it has none; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _at(flat: Sequence[Any], i: int) -> list[Any]:
    return [each[i] if isinstance(each, Tensor) else each for each in flat]
