"""The kernels that a call starts on a GPU, and the bytes that they move, counted without one.

``count`` runs a function on meta tensors, which have shapes but no values, while they claim to be on a GPU:
whoever asks for ``tensor.device`` is told "cuda:0". So code that branches on the device takes a GPU's branch,
Triton launches are noted instead of made, and registered operators run their GPU implementation.

What counts: every operator of torch that computes or copies is one kernel (those in ``PARTS`` are more, and
composite operators are their parts); views, metadata and ``empty`` are none, nor is work on nothing. It is a
lower bound, as a library may need several kernels for a product or a convolution. Under autocast, operators
of torch are counted in their arguments' dtype. A value that the host reads is one copy, and is 1 or true, so
that a loop that asks whether it may end does not.

Bytes: each tensor that a kernel reads or writes counts once per kernel, at the size that its storage has
(expanded tensors are small), however often the kernel's programs read it.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from ecgot.kernels import dispatch

T = TypeVar("T")
GPU = torch.device("cuda", 0)
META = torch.device("meta")
_DEVICE = torch._C.TensorBase.device  # as torch itself answers
# Operators without kernels whose schemas do not say that they return views.
_FREE = frozenset(
    ("_unsafe_view", "_reshape_alias", "empty_like", "new_empty", "new_empty_strided", "resize_")
)
# Written in C++ in terms of other operators, yet dispatched as one.
_COMPOSITE = frozenset(("constant_pad_nd", "diagonal_backward", "select_backward", "slice_backward"))
# Kernels of operators that start several: torch's native CUDA sources, in 2.11.
PARTS = {
    "logsumexp": 6,  # amax, its infinities to 0, sub, exp, sum, log and add in one
    "native_batch_norm": 3,  # statistics, running statistics, values
    "native_batch_norm_backward": 2,  # sums, values
    "native_layer_norm_backward": 2,  # values, sums
}


@dataclass(frozen=True)
class Launch:
    """One kernel.

    Attributes:
        name: of the Triton kernel or torch's operator.
        bytes: of all tensors that it reads or writes.
        products: floating-point operations of torch's matrix products and convolutions.
        half: whether these multiply numbers of 16 bits.
        kernel, grid, arguments: of a Triton kernel; arguments by name, with options such as num_warps.
    """

    name: str
    bytes: int
    products: int = 0
    half: bool = False
    kernel: Any = None
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Launches:
    """What a call starts, in order."""

    each: tuple[Launch, ...]

    @property
    def triton(self) -> int:
        """Launches of Triton kernels."""
        return sum(launch.kernel is not None for launch in self.each)

    @property
    def torch(self) -> int:
        """Kernels of torch and its libraries."""
        return len(self.each) - self.triton

    @property
    def total(self) -> int:
        """All of them."""
        return len(self.each)

    @property
    def megabytes(self) -> float:
        """Bytes that they move, in units of 10^6."""
        return sum(launch.bytes for launch in self.each) / 1e6

    def by_name(self) -> list[tuple[str, int, float]]:
        """Name, kernels and megabytes, the most frequent first."""
        counts = Counter(launch.name for launch in self.each)
        moved = {name: sum(each.bytes for each in self.each if each.name == name) for name in counts}
        return [(name, many, moved[name] / 1e6) for name, many in counts.most_common()]


def count(function: Callable[[], object]) -> Launches:
    """What ``function`` starts on a GPU.

    Args:
        function: takes nothing, and works on meta tensors; what it makes with device "cuda" is one, too.
            Operators of other packages run their fake implementations, and count as one kernel.

    Raises:
        RuntimeError: Triton is missing, or set to interpret.
    """
    counter = _Counter()
    _run(function, counter)
    return Launches(tuple(counter.found))


def as_on_gpu(function: Callable[[], T]) -> T:
    """What ``function`` returns where :func:`count` would run it: preparations that do not count."""
    return _run(function, _Counter())


def _run(function: Callable[[], T], counter: "_Counter") -> T:
    if not dispatch.HAS_TRITON or dispatch.INTERPRETED:
        got = "TRITON_INTERPRET=1" if dispatch.INTERPRETED else "none"
        raise RuntimeError(f"triton: expected one that compiles, got {got}")
    with counter.claimed_gpu(), dispatch.recording(counter.note_triton), counter:
        return function()


class _Counter(TorchDispatchMode):
    """Notes every operator that reaches a device.

    found: the kernels so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Launch] = []
        self._claiming = True

    @contextlib.contextmanager
    def claimed_gpu(self) -> Iterator[None]:
        """Meta tensors say that they are on a GPU, and a machine without one does not mind."""

        def device(tensor: Tensor) -> torch.device:
            real: torch.device = _DEVICE.__get__(tensor)
            return GPU if self._claiming and real.type == "meta" else real

        answers: list[tuple[object, str, object]] = [
            (Tensor, "device", property(device)),
            (Tensor, "is_cuda", property(lambda tensor: device(tensor).type == "cuda")),
        ]
        if not torch.cuda.is_available():
            answers += [
                (torch.cuda, "_lazy_init", lambda: None),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
                (torch.cuda, "is_bf16_supported", lambda: True),
                (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            ]
        with contextlib.ExitStack() as stack:
            for owner, name, answer in answers:
                stack.enter_context(mock.patch.object(owner, name, answer, create=True))
            yield

    @contextlib.contextmanager
    def _truthful(self) -> Iterator[None]:
        """Meta tensors say what they are, as torch's own functions for them ask."""
        self._claiming = False
        try:
            yield
        finally:
            self._claiming = True

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take an operator apart, or run it and note its kernels."""
        args, kwargs = tree_map_only(
            torch.device, lambda device: META if device.type == "cuda" else device, (args, kwargs or {})
        )
        parts = _parts(func)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note("copy to the host", [args[0]])
            return torch.ones((), dtype=args[0].dtype).item()
        with self._truthful():
            result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not _is_free(func, name):
            written = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            written += _mutated(func, args, kwargs)
            values = [*written, *([] if _only_writes(name) else tree_leaves((args, kwargs)))]
            kernels = _kernels(name, args) if any(map(_on_gpu, written)) else 0
            formula = flop_registry.get(func.overloadpacket)
            products = formula(*args, **kwargs, out_val=result) if formula and kernels else 0
            for _ in range(kernels):
                self._note(name, values, products // kernels)
        return result

    def note_triton(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        """What ``dispatch.launch`` hands over."""
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        # Aliases: autograd copies a gradient that somebody else holds, where it would take it over.
        given = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in given.items()
        }
        self.found.append(
            Launch(kernel.__name__, _bytes(given.values()), kernel=kernel, grid=grid, arguments=given)
        )

    def _note(self, name: str, values: list[Any], products: int = 0) -> None:
        half = all(value.itemsize == 2 for value in values if isinstance(value, Tensor))
        self.found.append(Launch(name, _bytes(values), products, half))


def _parts(func: Any) -> Callable[..., Any] | None:
    """What runs instead of an operator and calls others."""
    from torch._library.custom_ops import OPDEFS

    if func.namespace == "ecgot":
        kernel = getattr(func, "kernel", None)  # of kernels/registration.py
        return kernel or OPDEFS[func._schema.name]._init_fn
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if has(func.name(), "CompositeImplicitAutograd"):
        return func.decompose
    if func.overloadpacket.__name__ in _COMPOSITE:
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        return lambda *args, **kwargs: func._op_dk(key, *args, **kwargs)
    return None


def _is_free(func: Any, name: str) -> bool:
    """Whether an operator makes a view, memory without values, or no tensor."""
    if func.namespace == "prim" or name in _FREE or name.startswith("empty"):
        return True
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _mutated(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    named = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    writes = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
    return tree_leaves([named[name] for name in writes if name in named])


def _only_writes(name: str) -> bool:
    return name in ("fill_", "zero_") or name.endswith("_like") or name.startswith("new_")


def _on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and _DEVICE.__get__(value).type == "meta" and value.numel() > 0


def _kernels(name: str, args: tuple[Any, ...]) -> int:
    if name == "convolution_backward":
        return sum(args[-1])  # which gradients are wanted
    return PARTS.get(name, 1)


def _bytes(values: Iterable[Any]) -> int:
    """Of the storage of tensors, each part of it once."""
    sizes: dict[tuple[int, int], int] = {}
    for value in filter(_on_gpu, values):
        place = value.untyped_storage()._cdata, value.storage_offset()
        touched = math.prod(n for n, step in zip(value.shape, value.stride(), strict=True) if step)
        sizes[place] = max(sizes.get(place, 0), touched * value.itemsize)
    return sum(sizes.values())
