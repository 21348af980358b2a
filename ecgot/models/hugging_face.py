"""Small helpers around Hugging Face models: a fingerprint of their weights, and silence while they load."""

import hashlib

import torch
from torch import nn
from transformers.utils import logging as transformers_logging


def fingerprint(model: nn.Module, settings: str = "") -> str:
    """A hash of settings and of a model's weights, 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class quiet_transformers:
    """Keep transformers' progress bars and loading notes off the terminal."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_exception: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        transformers_logging.enable_progress_bar()
