"""The problems that are measured: those of the goals, and tiny ones that a CPU solves in a rehearsal."""

from dataclasses import dataclass

import torch

from ecgot.bench.cases import Case, PairsCase
from ecgot.kernels.dispatch import INTERPRETED


@dataclass(frozen=True)
class Sizes:
    """What to measure, where, and how long.

    Args:
        solver: its iterations are ``iterations``, without a stopping rule.
        checked: problems of a batch, and clouds of all pairs, that are compared with fp64.
        seconds: that the timing of one call may take.
        kernels: whether Triton's kernels run on the device.
    """

    device: torch.device
    dtype: torch.dtype
    solver: Case
    iterations: int
    pairs: PairsCase
    streamed: Case
    small_d: tuple[int, ...]
    checked: int
    encoder: str
    batch: int
    samples: int
    peak_bytes: int
    peak_side: int
    seconds: float
    kernels: bool

    @property
    def inductor(self) -> str:
        """torch.compile's backend; a rehearsal compiles nothing."""
        return "inductor" if self.device.type == "cuda" else "eager"


FULL = Sizes(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    solver=Case(256, 128, 128, 256),
    iterations=100,
    pairs=PairsCase(512, 512, 64, 32, 128, iterations=20),
    streamed=Case(1, 10_000, 10_000, 64),
    small_d=(1, 3, 15, 16, 17),
    checked=4,
    encoder="xresnet1d101",
    batch=256,
    samples=1000,
    peak_bytes=2**32,
    peak_side=8192,
    seconds=0.5,
    kernels=True,
)
# fp32, as Triton's interpreter multiplies the raw bits of bf16.
REHEARSAL = Sizes(
    device=torch.device("cpu"),
    dtype=torch.float32,
    solver=Case(2, 8, 8, 8),
    iterations=40,
    pairs=PairsCase(3, 3, 6, 5, 8, iterations=20),
    streamed=Case(1, 40, 40, 8),
    small_d=(1, 3),
    checked=2,
    encoder="resnet1d_tiny",
    batch=4,
    samples=120,
    peak_bytes=2**20,
    peak_side=64,
    seconds=0.01,
    kernels=INTERPRETED,
)
