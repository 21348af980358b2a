"""Arrays of NumPy and tensors of torch: what comes in goes out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Arrays:
    """The library of a call's arguments, torch if any of them is a tensor, and how to go there and back.

    Args:
        given: the call's arguments; lists are read as NumPy's arrays, None is ignored.
    """

    def __init__(self, *given: Any) -> None:
        tensors = [each for each in given if isinstance(each, Tensor)]
        self.is_torch = bool(tensors)
        self.device = tensors[0].device if tensors else torch.device("cpu")

    def tensor(self, given: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A floating point tensor: fp64 unless ``given`` or ``dtype`` says otherwise."""
        if not isinstance(given, Tensor):
            array = np.asarray(given)
            given = (
                torch.from_numpy(np.ascontiguousarray(array))
                if array.flags.writeable
                else torch.tensor(array)
            )
            given = given.to(self.device)
        if not given.is_floating_point():
            given = given.double()
        return given if dtype is None else given.to(dtype)

    def weights(self, given: Any, count: int, like: Tensor) -> Tensor:
        """Weights, uniform with sum 1 for None and for nothing, in the dtype of ``like``."""
        if given is None or len(given) == 0:
            return like.new_full((count,), 1 / max(count, 1))
        return self.tensor(given, like.dtype)

    def back(self, found: Tensor) -> Any:
        """A tensor, or an array; a scalar of NumPy where the tensor has no dimensions."""
        return found if self.is_torch else found.detach().cpu().numpy()[()]
