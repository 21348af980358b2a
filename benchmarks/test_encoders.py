"""Whole encoders, inference and training step (forward and backward), against the same networks in torch.

Providers: "torch", the plain modules; on a GPU also "torch_compiled" (max-autotune), "conv2d_compiled" (the
network rewritten as Conv2d(1, k), channels-last, max-autotune with CUDA graphs: the best that a user can do
by hand) and "ecgot_graph", ecgot captured in a CUDA graph. Every result is compared with the fp64 network's
first; half precision may be as wrong as torch's own is, twice.

On a GPU all are in bf16, B = 256, at 10 s of 100 Hz and of 500 Hz; on a CPU in fp32, B = 64, at 100 Hz.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import encoders
from benchmarks.conftest import Compare, Errors, Measure, Work
from benchmarks.encoders import Case, Encode
from ecgot.bench.providers import OURS
from ecgot.models.encoders import ENCODERS, CapturedInference, CapturedTraining

GPU = torch.cuda.is_available()
BATCH = 256 if GPU else 64
DTYPE = torch.bfloat16 if GPU else torch.float32
CASES = [(name, samples) for name in ENCODERS for samples in ((1000, 5000) if GPU else (1000,))]
Run = Callable[[], object]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, device: torch.device) -> Case:
    name, samples = request.param
    return encoders.make_case(name, BATCH, samples, DTYPE, device)


def _providers(case: Case) -> list[str]:
    if not GPU:
        return [OURS, "torch"]
    by_hand = ["conv2d_compiled"] if case.name.startswith(encoders.RESIDUAL) else []
    return [OURS, "ecgot_graph", "torch", "torch_compiled", *by_hand]


def _inference(provider: str, case: Case) -> Encode:
    if provider == "ecgot_graph":
        captured = CapturedInference(encoders.ours(case))
        return lambda waveform: captured(waveform).tokens
    return encoders.inference(provider, case, mode="max-autotune")


def _training(provider: str, case: Case) -> tuple[Encode, list[nn.Parameter]]:
    if provider == "ecgot_graph":
        model = encoders.ours(case).train()
        captured = CapturedTraining(model)
        return (lambda waveform: captured(waveform).tokens), list(model.parameters())
    return encoders.training(provider, case, mode="max-autotune")


def test_encoder_inference(case: Case, compare: Compare) -> None:
    def make(provider: str) -> tuple[Run, Errors]:
        # A graph is captured for one size of batch: the check's and the timing's are two.
        tokens = encoders.inference_run(case, _inference(provider, case), case.checked)()
        errors = {"tokens": (encoders.inference_error(case, tokens), case.tolerance[0])}
        return encoders.inference_run(case, _inference(provider, case)), errors

    makers = {provider: functools.partial(make, provider) for provider in _providers(case)}
    gbyte = None if case.name.startswith("vit") else encoders.gbyte(case)
    compare(makers, case=str(case), work=Work(encoders.gflop(case), gbyte))


def test_encoder_training(case: Case, compare: Compare) -> None:
    def make(provider: str) -> tuple[Run, Errors]:
        grads = encoders.training_run(case, *_training(provider, case), case.checked)()
        errors = {"gradient": (encoders.gradient_error(case, grads), case.tolerance[1])}
        return encoders.training_run(case, *_training(provider, case)), errors

    makers = {provider: functools.partial(make, provider) for provider in _providers(case)}
    # A backward does the work of two forwards; its bytes are not counted.
    compare(makers, case=str(case), work=Work(3 * encoders.gflop(case)))


def test_peak_copy(device: torch.device, measure: Measure) -> None:
    size = 2**30 if GPU else 2**28
    source = torch.empty(size // 4, device=device)
    target = torch.empty_like(source)
    measure(lambda: target.copy_(source), provider="torch", case="copy", work=Work(gbyte=2 * size / 1e9))


def test_peak_convolution(device: torch.device, measure: Measure) -> None:
    """The best that the vendor's library does: many channels, channels-last."""
    x = torch.randn(BATCH, 256, 1, 250, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 1, 5, device=device, dtype=DTYPE).to(memory_format=torch.channels_last)
    gflop = 2 * BATCH * 250 * 5 * 256**2 / 1e9
    case = f"256 to 256 channels, k 5, {DTYPE}"
    measure(lambda: F.conv2d(x, weight, padding=(0, 2)), provider="torch", case=case, work=Work(gflop))


def test_peak_product(device: torch.device, measure: Measure) -> None:
    side = 8192 if GPU else 1024
    a = torch.randn(side, side, device=device, dtype=DTYPE)
    measure(lambda: a @ a, provider="torch", case=f"matrices {DTYPE}", work=Work(2 * side**3 / 1e9))
