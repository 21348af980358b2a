"""The headline goals, for a GPU of the H100's class, and whether what was measured meets them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ecgot.bench.providers import OURS

Rows = Iterable[Mapping[str, str]]


@dataclass(frozen=True)
class Goal:
    """A bound on ecgot's time or memory, or a factor over peers that must be reached.

    Args:
        item: what its items' names begin with.
        limit: of ``column``, in its units.
        factor: of the fastest peer's time over ours.
        peers: providers that the factor counts; all if empty.
        own: providers of ours that count; the others are tuning.
    """

    name: str
    item: str
    limit: float | None = None
    column: str = "median_ms"
    factor: float | None = None
    peers: tuple[str, ...] = ()
    own: tuple[str, ...] = (OURS, f"{OURS}_graph")


@dataclass(frozen=True)
class Outcome:
    """met: None where it was not measured. measured: in words."""

    goal: Goal
    met: bool | None
    measured: str


_GRAPHS = ("torch_graph", "conv2d_graph", "conv2d_compiled_graph", "torch_compiled")
_FLASH = tuple(f"flash_sinkhorn{each}" for each in ("", "_graph", "_tf32", "_tf32_graph"))
_STREAMING = tuple(f"{OURS}{each}" for each in ("", "_graph", "_tf32"))
GOALS = (
    Goal("solver, forward", "solver forward", limit=0.150),
    Goal("solver, forward and backward", "solver gradient", limit=0.250),
    Goal("all pairs, forward and backward", "pairs gradient", limit=5.0),
    Goal("all pairs, memory", "pairs gradient", limit=1000.0, column="peak_mb"),
    Goal(
        "streaming, forward over flash-sinkhorn",
        "streaming forward",
        factor=1.5,
        peers=_FLASH,
        own=_STREAMING,
    ),
    Goal(
        "streaming, forward and backward over flash-sinkhorn",
        "streaming gradient",
        factor=1.5,
        peers=_FLASH,
        own=_STREAMING,
    ),
    Goal("encoder, inference over stock torch", "inference", factor=3.0, peers=("torch",)),
    Goal("encoder, inference over the best graph", "inference", factor=1.3, peers=_GRAPHS),
    Goal("encoder, training step over stock torch", "training", factor=2.0, peers=("torch",)),
    Goal("encoder, training step over the best graph", "training", factor=1.15, peers=_GRAPHS),
)


def outcome(goal: Goal, rows: Rows) -> Outcome:
    """A goal's outcome, from rows of ``measured.csv``."""
    of_item = [row for row in rows if row["item"].startswith(goal.item)]
    ours = _best(of_item, goal.own, goal.column)
    if ours is None:
        refused = next(
            (row["refused"] for row in of_item if row["provider"] in goal.own and row["refused"]), ""
        )
        return Outcome(goal, None, f"not measured{f': {refused}' if refused else ''}")
    value, provider = ours
    if goal.limit is not None:
        unit = "MB" if goal.column == "peak_mb" else "ms"
        said = f"{value:.3g} {unit} ({provider}), at most {goal.limit:g}"
        return Outcome(goal, value <= goal.limit, said + _against(of_item, value, goal))
    assert goal.factor is not None
    peer = _best(of_item, goal.peers, goal.column)
    if peer is None:
        return Outcome(goal, None, f"{value:.3g} ms ({provider}); no peer was measured")
    factor = peer[0] / value
    said = f"{factor:.2f} times: {value:.3g} ms ({provider}), {peer[1]} {peer[0]:.3g} ms"
    said += f"; at least {goal.factor:g} times"
    return Outcome(goal, factor >= goal.factor, said)


def _against(rows: Rows, value: float, goal: Goal) -> str:
    others = {row["provider"] for row in rows if not row["provider"].startswith(OURS)}
    peer = _best(rows, tuple(others), goal.column)
    return f"; {peer[0] / value:.1f} times better than {peer[1]}" if peer else ""


def _best(rows: Rows, providers: tuple[str, ...], column: str) -> tuple[float, str] | None:
    """The least value of those providers that were right, and whose it is."""
    found = [
        (float(row[column]), row["provider"])
        for row in rows
        if row[column] and not row["refused"] and (not providers or row["provider"] in providers)
    ]
    return min(found, default=None)
