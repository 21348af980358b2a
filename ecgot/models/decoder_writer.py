"""The writer of reports with a small decoder from scratch: no transformers, many records at once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ecgot.choices import BEAMS
from ecgot.errors import EcgotError, first_line
from ecgot.models.beam_search import Text, search
from ecgot.models.decoder import Decoder, read_shape
from ecgot.models.writer import Writer, WrittenReport, with_sentences

_BATCH = 64  # records that are searched at once: more no longer share work, but leave the processor's cache


class DecoderWriter(Writer):
    """Writes what :class:`ecgot.models.reporter.Reporter` would with the same weights, which it loads.

    Args:
        folder: with the language model's config.json and tokenizer.json, as a run keeps them.
        ecg_width: D, width of the ECG tokens.
        max_tokens: maximum report length in tokens.
        recorders: see :class:`Writer`.

    Raises:
        EcgotError: the folder holds no language model from scratch.
    """

    def __init__(
        self, folder: Path, ecg_width: int, *, max_tokens: int = 96, recorders: Sequence[str] = ()
    ) -> None:
        shape = read_shape(folder)
        super().__init__(ecg_width, shape.width, recorders)
        self.max_tokens, self.language_model = max_tokens, Decoder(shape)
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises Exception itself
            raise EcgotError(
                f"run: expected a tokenizer in {folder}, got none ({first_line(error)})"
            ) from error

    @torch.no_grad()
    def write(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        recorders: Sequence[str] | None = None,
        num_beams: int = BEAMS,
    ) -> list[WrittenReport]:
        """See :meth:`Writer.write`."""
        prefix, attention = self.condition(tokens, mask, recorders)
        start = self.language_model.embed_tokens.weight[self.language_model.shape.bos_id]
        prefix = torch.cat([prefix, start.expand(len(prefix), 1, -1)], 1)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        written = []
        for part, valid in zip(prefix.split(_BATCH), attention.split(_BATCH), strict=True):
            found = search(self.language_model, part, valid, beams=num_beams, max_tokens=self.max_tokens)
            written += [self._report(text, part[i : i + 1], valid[i : i + 1]) for i, text in enumerate(found)]
        return written

    def _report(self, text: Text, prefix: Tensor, mask: Tensor) -> WrittenReport:
        """The report of a text that was found, with its sentences."""
        report = self.tokenizer.decode(text.ids, skip_special_tokens=True).strip()
        encoded = self.tokenizer.encode(report, add_special_tokens=False)
        known = text.log_probability
        if encoded.ids != text.ids:  # other tokens of the same words; these are asked for
            ids = torch.tensor([encoded.ids], dtype=torch.long, device=prefix.device)
            known = self.language_model.log_probability_of(prefix, mask, ids)[0].cpu()
        return with_sentences(report, encoded.offsets, known)
