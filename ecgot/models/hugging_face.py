"""Helpers for Hugging Face models: a fingerprint of the weights, and quiet loading."""

import hashlib

import torch
from torch import nn


def fingerprint(model: nn.Module, settings: str = "") -> str:
    """Hash of a model's weights and of settings: 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class quiet_transformers:
    """Context manager that silences transformers' progress bars and loading messages."""

    def __init__(self) -> None:
        from transformers.utils import logging  # here, as reading an ECG needs none of it

        self._logging = logging

    def __enter__(self) -> None:
        self._verbosity = self._logging.get_verbosity()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_exception: object) -> None:
        self._logging.set_verbosity(self._verbosity)
        self._logging.enable_progress_bar()
