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

    def weights(self, name: str, given: Any, count: int, like: Tensor) -> Tensor:
        """Weights, uniform with sum 1 for None and for nothing, in the dtype of ``like``."""
        found = None if given is None else self.tensor(given, like.dtype)
        if found is None or (found.dim() and not found.numel()):
            return like.new_full((count,), 1 / max(count, 1))
        if tuple(found.shape) in ((1, count), (count, 1)):
            return found.reshape(count)
        return self.of_shape(name, found, (count,), like)

    def of_shape(self, name: str, given: Any, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of this shape, in the dtype of ``like``."""
        found = self.tensor(given, like.dtype)
        if tuple(found.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(found.shape)}")
        return found

    def shaped(self, name: str, given: Any, wanted: str) -> Tensor:
        """A tensor with as many dimensions as ``wanted`` writes, "costs [N, M]" for one."""
        found = self.tensor(given)
        if found.dim() != wanted.count(",") + 1:
            raise ValueError(f"{name}: expected {wanted}, got shape {tuple(found.shape)}")
        return found

    def back(self, found: Tensor) -> Any:
        """A tensor, or an array; a scalar of NumPy where the tensor has no dimensions."""
        return found if self.is_torch else found.detach().cpu().numpy()[()]
