"""Helpers for Hugging Face models: a fingerprint of the weights, and quiet loading."""

import hashlib

import torch
from torch import nn
from transformers.utils import logging as transformers_logging


def fingerprint(model: nn.Module, settings: str = "") -> str:
    """Hash of a model's weights and of settings: 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class quiet_transformers:
    """Context manager that silences transformers' progress bars and loading messages."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_exception: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        transformers_logging.enable_progress_bar()
