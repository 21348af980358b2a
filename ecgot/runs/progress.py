"""Progress reports of long-running work."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Progress:
    """Callbacks for progress; the command line draws it, library users may ignore it.

    Attributes:
        bar: called with (task, steps done, total steps).
        note: called with one line of text.
    """

    bar: Callable[[str, int, int], None] = lambda _task, _done, _total: None
    note: Callable[[str], None] = lambda _line: None
