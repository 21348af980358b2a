"""Which path a kernel call takes: Triton for CUDA tensors, torch otherwise.

With ``TRITON_INTERPRET=1`` in the environment when Triton is first imported, the Triton kernels also run
for CPU tensors, in Triton's interpreter: slow, but anyone can check a kernel without a GPU.
"""

import contextlib
import importlib.util
import os
import threading
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads the variable once, when a kernel is decorated; so do we, so that both always agree.
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
# The interpreter replaces functions of Triton while it runs, so threads take turns in it.
_TURN = threading.RLock() if INTERPRETED else contextlib.nullcontext()


def use_triton(*tensors: torch.Tensor | None) -> bool:
    """Whether the Triton kernels serve these tensors (all on one device; ``None`` is passed over)."""
    accepted = ("cpu", "cuda") if INTERPRETED else ("cuda",) if HAS_TRITON else ()
    return all(tensor.device.type in accepted for tensor in tensors if tensor is not None)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
    """``kernel[grid](...)`` of a Triton kernel, from any thread."""
    with _TURN:
        kernel[grid](*arguments, **named)
