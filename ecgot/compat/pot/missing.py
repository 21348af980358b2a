"""What POT's modules have and ours do not is an error in one line."""

from collections.abc import Callable, Sequence
from typing import Any


def refuse_others(module: str, names: Sequence[str]) -> Callable[[str], Any]:
    """A module's ``__getattr__``: an AttributeError that names what the module has."""

    def refuse(name: str) -> Any:
        raise AttributeError(
            f"{module}: expected one of {', '.join(names)} (for others use POT itself), got {name}"
        )

    return refuse
