"""ECG encoders by name: waveform [B, L, T] in mV to tokens [B, N, D], a mask and a pooled embedding."""

from ecgot.models.encoders.cuda_graph import CapturedInference, CapturedTraining
from ecgot.models.encoders.layers import EncoderOutput, fuse_norms, masked_mean
from ecgot.models.encoders.registry import (
    ENCODERS,
    Encoder,
    encoder,
    plain_encoder,
    published,
    to_channels_last,
)

__all__ = [
    "ENCODERS",
    "CapturedInference",
    "CapturedTraining",
    "Encoder",
    "EncoderOutput",
    "encoder",
    "fuse_norms",
    "masked_mean",
    "plain_encoder",
    "published",
    "to_channels_last",
]
