"""What is measured within one process: item by item, each checked against fp64 before it is timed.

    python -m benchmarks.first_contact.items OUT STEP --module MODULE [--share I/N] [--warm] [--rehearse]

The runner starts this, and starts it again where a process dies: what an item found is in OUT by then, the
item that killed it is known by name, and the others go on without it.
"""

import argparse
import faulthandler
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_contact import journal
from benchmarks.first_contact.sizes import FULL, REHEARSAL, Sizes
from benchmarks.output import stamp
from ecgot.bench.stopwatch import Call, summary, synchronize
from ecgot.bench.stopwatch import seconds as seconds_from_idle

SHOWN = 300  # characters of what went wrong
LOST = 70  # exit code: this process has lost its GPU, so that the next item needs another process
TRIES = 2
WARM_UP = 3
FLUSHED_BYTES = 2**28  # more than any GPU's cache holds
Row = dict[str, Any]
Errors = Mapping[str, tuple[float, float]]  # name to (error, tolerance)


@dataclass(frozen=True)
class Item:
    """run() yields rows for ``measured.csv`` as it finds them; it is ended after so many seconds."""

    name: str
    run: Callable[[], Iterable[Row]]
    seconds: float = 60.0


# --- check and time -----------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||."""
    expected = expected.double()
    return ((found.detach().double() - expected).norm() / expected.norm()).item()


def compared(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: tuple[float, float]) -> Errors:
    """Of values and, where they were found, gradients in x and y; tolerances of values and of gradients."""
    names = ("value", "grad x", "grad y")[: len(found)]
    return {
        name: (relative(each, wanted), tolerance[min(index, 1)])
        for index, (name, each, wanted) in enumerate(zip(names, found, expected[: len(found)], strict=True))
    }


def checked(errors: Errors) -> Row:
    """Columns that say how wrong a result is, and whether too much so."""
    wrong = [
        f"{name} error {error:.1e} > {tolerance:.1e}"
        for name, (error, tolerance) in errors.items()
        if not error <= tolerance  # NaN is wrong as well
    ]
    shown = "; ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())
    return {"errors": shown} | ({"refused": ", ".join(wrong)} if wrong else {})


def timed(call: Call, sizes: Sizes, *, graph: bool) -> Row:
    """Median and quantiles of a call, of a graph's replays with a cold cache or else from an idle device."""
    for _ in range(WARM_UP):
        call()
    clock = _replay_seconds if graph else seconds_from_idle
    first = clock(call, sizes.device)
    rounds = int(min(max(sizes.seconds / max(first, 1e-6), 5), 200))
    times = summary(clock(call, sizes.device) for _ in range(rounds))
    on_gpu = "replays, cold cache" if graph else "from idle"
    return {
        "clock": on_gpu if sizes.device.type == "cuda" else "wall",
        "rounds": rounds,
        "median_ms": times.median_ms,
        "q20_ms": times.q20_ms,
        "q80_ms": times.q80_ms,
    }


def _replay_seconds(call: Call, device: torch.device) -> float:
    """The GPU's time for one call, queued behind a write that empties its cache and hides the launch."""
    if device.type != "cuda":
        return seconds_from_idle(call, device)
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    flushed.zero_()
    begin.record()
    call()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3


def recorded(call: Callable[[], Any], device: torch.device) -> tuple[Call, Any]:
    """A CUDA graph of the call, and what each replay writes anew; on a CPU the call and what it gave."""
    if device.type != "cuda":
        return call, call()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles and tunes, which a recording must not
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    return graph.replay, found


def peak_mb(call: Call, device: torch.device) -> float | None:
    """Most megabytes that torch has allocated at a time during a call, on top of what was there."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# --- a process ----------------------------------------------------------------------------------------------


def items_of(module: str, sizes: Sizes, out: Path) -> list[Item]:
    """The items of a module."""
    found: list[Item] = importlib.import_module(module).items(sizes, out)
    return found


def run(items: Iterable[Item], step: str, out: Path, *, warm: bool = False) -> int:
    """Run the items that have not ended yet; ``LOST`` where this process has lost its GPU.

    Args:
        warm: run only to fill the compilers' caches; nothing is recorded.
    """
    stamped = stamp()
    for item in items:
        if warm:
            _rows(item, lambda _row: None)
        elif _due(item, step, out, stamped["ecgot commit"]):
            _measure(item, step, out, stamped)
        if not _clean_up():
            return LOST
    return 0


def _due(item: Item, step: str, out: Path, commit: str) -> bool:
    """Whether an item is still to be run: not if it has ended, nor if it never did in ``TRIES`` tries."""
    told = journal.events(out, commit)
    if item.name in journal.ended(told, step):
        return False
    if journal.open_items(told, step).get(item.name, 0) < TRIES:
        return True
    journal.tell(out, commit, "given up", step, item.name, why=f"started {TRIES} times and never ended")
    return False


def _measure(item: Item, step: str, out: Path, stamped: Mapping[str, str]) -> None:
    commit, start = stamped["ecgot commit"], time.perf_counter()
    journal.tell(out, commit, "started", step, item.name, process=os.getpid())
    named = {**stamped, "step": step, "item": item.name}
    failure = _rows(item, lambda row: journal.append(out, journal.MEASURED, named | row))
    if failure:
        print(f"{step} {item.name}: {failure}", file=sys.stderr, flush=True)
    end = {"event": "failed", "why": failure} if failure else {"event": "done"}
    journal.tell(out, commit, step=step, item=item.name, seconds=f"{time.perf_counter() - start:.1f}", **end)


def _rows(item: Item, take: Callable[[Row], None]) -> str:
    """Pass on an item's rows, and return in one line what it raised. Past its seconds the process ends."""
    faulthandler.dump_traceback_later(item.seconds, exit=True)
    try:
        for row in item.run():
            take(row)
    except Exception as raised:  # of any library, and of ours: the next item does not depend on it
        return f"{type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"[:SHOWN]
    finally:
        faulthandler.cancel_dump_traceback_later()
    return ""


def _clean_up() -> bool:
    """Free what an item held; False where the GPU does not answer any more."""
    gc.collect()
    if "torch._dynamo" in sys.modules:  # else this would import it, for seconds
        torch.compiler.reset()
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _share(items: list[Item], share: str) -> Iterator[Item]:
    """Every N-th item, from the I-th on."""
    index, _, count = share.partition("/")
    return iter(items[int(index) :: int(count)])


def main(arguments: list[str] | None = None) -> int:
    """Run one step's items, or a share of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("step")
    parser.add_argument("--module", required=True, help="where the step's items are")
    parser.add_argument("--share", default="0/1", metavar="I/N")
    parser.add_argument("--warm", action="store_true", help="fill the compilers' caches and record nothing")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    options = parser.parse_args(arguments)
    sizes = REHEARSAL if options.rehearse else FULL
    faulthandler.enable()  # a process that dies says where
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    found = items_of(options.module, sizes, options.out)
    return run(_share(found, options.share), options.step, options.out, warm=options.warm)


if __name__ == "__main__":
    sys.exit(main())
