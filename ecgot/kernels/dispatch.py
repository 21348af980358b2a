"""Which path a kernel call takes: Triton for CUDA tensors, torch otherwise.

With ``TRITON_INTERPRET=1`` in the environment when Triton is first imported, the Triton kernels also run for
CPU tensors, in Triton's interpreter: slow, but it checks a kernel without a GPU.
"""

import contextlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is decorated. Reading it once here too keeps both in agreement.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
HIP = bool(torch.version.hip)  # torch is built for AMD's GPUs
# The interpreter patches Triton's functions while it runs, so threads take turns.
_TURN = threading.RLock() if INTERPRETED else contextlib.nullcontext()

# Takes what launch() takes.
Recorder = Callable[..., None]
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton kernels run on these tensors, which are on one device; ``None`` is ignored."""
    accepted = ("cpu", "cuda") if INTERPRETED else ("cuda",) if HAS_TRITON else ()
    return all(tensor.device.type in accepted for tensor in tensors if tensor is not None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """Launch ``kernel[grid](...)`` of a Triton kernel on its tensors' device; any thread may call it."""
    record = _recorder.get()
    if record is not None:
        record(kernel, grid, *arguments, **named)
        return
    with _TURN, _device_of((*arguments, *named.values())):
        kernel[grid](*arguments, **named)


@contextlib.contextmanager
def recording(record: Recorder) -> Iterator[None]:
    """Within this context, and in this thread, ``launch`` hands its arguments to ``record`` instead."""
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


def _device_of(arguments: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Makes the first CUDA tensor's device current, as Triton launches on the current one."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor) and argument.is_cuda:
            if argument.get_device() != torch.cuda.current_device():
                return torch.cuda.device(argument.get_device())
            break
    return contextlib.nullcontext()
