"""What runs, in which order, and for how long: correctness, the headline times, then what explains them.

A step's items are those that ``items(sizes, out)`` of its module lists. The limits add up to more than nine
minutes: the last steps get what the first leave.
"""

from dataclasses import dataclass, replace

HERE = "benchmarks.first_contact"


@dataclass(frozen=True)
class Step:
    """A module's items, in so many processes at a time, cut off after its seconds.

    Args:
        module: "" for the step that runs pytest.
        workers: processes that share the items. More than one where nothing is timed.
        warm: modules whose items run beside this step, unseen, so that they are compiled when they are timed.
    """

    module: str
    seconds: float
    workers: int = 1
    warm: tuple[str, ...] = ()


TIMED = tuple(f"{HERE}.{name}" for name in ("transport", "streaming", "networks"))
STEPS = {
    "small": Step(f"{HERE}.small", 60, workers=8),
    "tests": Step("", 125, workers=12, warm=TIMED),
    "transport": Step(f"{HERE}.transport", 110),
    "streaming": Step(f"{HERE}.streaming", 70),
    "networks": Step(f"{HERE}.networks", 130),
    "counters": Step(f"{HERE}.counters", 60),
    "table": Step(f"{HERE}.table", 60),
    "sanitizers": Step(f"{HERE}.sanitizers", 240),
}
# On a CPU's few cores most of the time goes into starting processes, so that no limit here is tight.
REHEARSED = {name: replace(step, seconds=600, workers=1, warm=()) for name, step in STEPS.items()}
# Those left out launch nothing on a GPU: they compile, or interpret in processes of their own.
KERNEL_TESTS = (
    "tests/kernels",
    "--ignore=tests/kernels/resources",
    "--ignore=tests/kernels/conv/test_backends.py",
)
REHEARSED_TESTS = ("tests/kernels/ot/test_checks.py",)
