"""Rows of several lengths in one padded batch."""

import torch
from torch import Tensor


def length_mask(lengths: Tensor, t: int) -> Tensor:
    """[B, t], True for the first lengths[b] samples, points or tokens of row b.

    >>> length_mask(torch.tensor([2, 0]), 3)
    tensor([[ True,  True, False],
            [False, False, False]])
    """
    return torch.arange(t, device=lengths.device) < lengths[:, None]
