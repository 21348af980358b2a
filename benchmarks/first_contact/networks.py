"""An encoder's inference and training step (forward and backward) at the size of the goals.

"ecgot" and "torch" (its stock modules) as they are and in a CUDA graph of the whole step; "ecgot_captured" by
the classes that users have for it; "torch_compiled" by torch.compile's default; "conv2d_graph" and
"conv2d_compiled_graph", the modules rewritten as Conv2d, channels-last: the best that one does by hand.
What is timed is what was compared with fp64, the whole batch of it.
"""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from benchmarks import encoders
from benchmarks.first_contact.items import Item, Row, checked, peak_mb, recorded, timed
from benchmarks.first_contact.sizes import Sizes
from ecgot.bench.providers import OURS
from ecgot.models.encoders import CapturedInference, CapturedTraining

CAPTURED = f"{OURS}_captured"
# What takes no compilation of torch's comes first.
PROVIDERS = (
    f"{OURS}_graph",
    OURS,
    "torch",
    "torch_graph",
    "conv2d_graph",
    CAPTURED,
    "torch_compiled",
    "conv2d_compiled_graph",
)
SLOW = 90.0  # seconds that an item, a compilation say, may take before it is given up


def items(sizes: Sizes, _out: Path) -> list[Item]:
    """Inference and training in turns, so that neither waits for the compilations of the other."""
    return [Item("truth", functools.partial(truth, sizes), SLOW)] + [
        Item(
            f"{what} {provider}",
            functools.partial(run, provider, sizes),
            SLOW,
        )
        for provider in PROVIDERS
        for what, run in (("inference", inference), ("training", training))
        if sizes.device.type == "cuda" or provider != CAPTURED
    ]


@functools.lru_cache(maxsize=1)
def _case(sizes: Sizes) -> encoders.Case:
    return encoders.make_case(
        sizes.encoder, sizes.batch, sizes.samples, sizes.dtype, sizes.device, checked=sizes.batch
    )


def truth(sizes: Sizes) -> Iterator[Row]:
    """How long fp64 takes for what all others are compared with, and how wrong torch's own dtype may be."""
    start = time.perf_counter()
    tokens, gradient = _case(sizes).tolerance
    took = f"{time.perf_counter() - start:.1f} s; tolerances {tokens:.1e} and {gradient:.1e}"
    yield {"case": str(_case(sizes)), "provider": "fp64", "note": took}


def inference(provider: str, sizes: Sizes) -> Iterator[Row]:
    """Check and time a provider's tokens of the whole batch."""
    case = _case(sizes)
    if provider == CAPTURED:
        captured = CapturedInference(encoders.ours(case))
        run = encoders.inference_run(case, lambda waveform: captured(waveform).tokens)
    else:
        encode = encoders.inference(provider, case, backend=sizes.inductor)
        run = encoders.inference_run(case, encode)

    def error(tokens: Tensor) -> float:
        return encoders.inference_error(case, tokens)

    yield {"case": str(case)} | _timed(provider, run, error, case.tolerance[0], sizes)


def training(provider: str, sizes: Sizes) -> Iterator[Row]:
    """Check and time a provider's gradients in all parameters."""
    case = _case(sizes)
    if provider == CAPTURED:
        model = encoders.ours(case).train()
        captured = CapturedTraining(model)
        run = encoders.training_run(
            case, lambda waveform: captured(waveform).tokens, list(model.parameters())
        )
    else:
        run = encoders.training_run(case, *encoders.training(provider, case, backend=sizes.inductor))

    def error(grads: tuple[Tensor, ...]) -> float:
        return encoders.gradient_error(case, grads)

    yield {"case": str(case)} | _timed(provider, run, error, case.tolerance[1], sizes)


def _timed(
    provider: str, run: Callable[[], object], error: Callable[..., float], tolerance: float, sizes: Sizes
) -> Row:
    graph = provider.endswith("_graph")
    call, found = recorded(run, sizes.device) if graph else (run, run())
    row: Row = {"provider": provider} | checked({"result": (error(found), tolerance)})
    if "refused" in row:
        return row
    row |= timed(call, sizes, graph=graph)
    return row | {"peak_mb": None if graph else peak_mb(call, sizes.device)}
