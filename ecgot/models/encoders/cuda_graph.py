"""CUDA graphs of encoders: at the usual lengths of ECGs a step is bound by its launches, not by its work.

A captured encoder gives what the encoder gives. Its graph serves batches of one shape without lengths; other
batches run without it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ecgot.models.encoders.layers import EncoderOutput, fuse_norms


class CapturedTraining:
    """Forward and backward of an encoder in training mode as CUDA graphs, captured at the first batch.

    Args:
        encoder: on a CUDA device. Its parameters and buffers may change in place, but not move.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self._graphed: Any = None
        self._shape = torch.Size()

    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        """waveform [B, L, T] in mV, encoded. The tensors are valid until the next call."""
        if lengths is not None or not self.encoder.training:
            return self.encoder(waveform, lengths)
        if self._graphed is None:
            self._capture(waveform)
        if waveform.shape != self._shape:
            return self.encoder(waveform)
        tokens, pooled = self._graphed(waveform)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return EncoderOutput(tokens, mask, pooled)

    def _capture(self, waveform: Tensor) -> None:
        # Capturing runs the encoder several times, which must not move the running statistics.
        kept = [(buffer, buffer.clone()) for buffer in self.encoder.buffers()]
        self._graphed = torch.cuda.make_graphed_callables(_Tensors(self.encoder), (waveform.clone(),))
        self._shape = waveform.shape
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


class _Tensors(nn.Module):
    """An encoder that returns a tuple, as make_graphed_callables needs."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        encoded = self.encoder(waveform)
        return encoded.tokens, encoded.pooled


class CapturedInference:
    """A copy of an encoder with fused norms, as a CUDA graph that is captured at the first batch.

    Args:
        encoder: on a CUDA device; its weights as they are now.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = fuse_norms(encoder)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._waveform: Tensor
        self._encoded: EncoderOutput

    @torch.no_grad()
    def __call__(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        """waveform [B, L, T] in mV, encoded. The tensors are valid until the next call."""
        if lengths is not None:
            return self.encoder(waveform, lengths)
        if self._graph is None:
            self._capture(waveform)
        if waveform.shape != self._waveform.shape or waveform.dtype != self._waveform.dtype:
            return self.encoder(waveform)
        self._waveform.copy_(waveform)
        self._graph.replay()  # type: ignore[union-attr]
        return self._encoded

    def _capture(self, waveform: Tensor) -> None:
        self._waveform = waveform.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiles, fuses and tunes, none of which may be captured
            for _ in range(3):
                self.encoder(self._waveform)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._encoded = self.encoder(self._waveform)
