"""Fixtures of the kernels' tests."""

import math

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _true_fp32() -> None:
    """What a kernel is compared with is fp32 on a GPU too, where torch's convolutions default to TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, so that an element a kernel forgot to write shows."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor.fill_(-(2**30))

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **kwargs: poison(new_empty(self, *args, **kwargs))
    )
