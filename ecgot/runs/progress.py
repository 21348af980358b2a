"""How long work reports itself."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Progress:
    """How training reports itself; the command line draws it, a library user may ignore it."""

    bar: Callable[[str, int, int], None] = lambda _task, _done, _total: None
    note: Callable[[str], None] = lambda _line: None
