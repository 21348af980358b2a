"""The encoder's layers in this package's kernels and in the vendor's library, for the table of dispatch."""

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.first_contact import journal
from benchmarks.first_contact.items import Item, Row
from benchmarks.first_contact.sizes import Sizes
from benchmarks.output import ROOT
from ecgot.bench.providers import OURS


def items(sizes: Sizes, out: Path) -> list[Item]:
    """The encoder of the goals, in bf16."""
    return [Item("table", functools.partial(table, sizes, out), 600)] if sizes.device.type == "cuda" else []


def table(sizes: Sizes, out: Path) -> Iterator[Row]:
    """``benchmarks.conv1d_backends``, whose rows are also in the log as they come."""
    path = out / journal.TABLE
    command = [sys.executable, "-m", "benchmarks.conv1d_backends", "--encoders", sizes.encoder]
    command += ["--dtypes", str(sizes.dtype).removeprefix("torch."), "--out", str(path)]
    command += ["--batch", str(sizes.batch), "--samples", str(sizes.samples)]
    subprocess.run(command, cwd=ROOT, check=True)
    rows = path.read_text(encoding="utf-8").splitlines()[1:]
    wins = sum(",triton," in row for row in rows)
    yield {
        "case": sizes.encoder,
        "provider": OURS,
        "note": f"faster than the library in {wins} of {len(rows)}",
    }
