"""Where in a record a finding is seen: shares of its score by time and by lead.

By time. A "phrase" score is scale <m, u> / |m| + prior, where u is the phrase's unit embedding and m the mean
of the record's N tokens x_n in the shared space. So it is a sum over tokens, exactly:

    score - prior = sum_n share_n,    share_n = scale <x_n, u> / (N |m|)

A class of several phrases scores by their noisy-or, whose gradient in their log-odds l_k is sigmoid(l_k) /
sigmoid(score): the part of the class's probability that phrase k accounts for. The class's shares are those
of its phrases, weighted by it. With one phrase the weight is 1.

By lead. The record is encoded again without each lead, and the grid holds what each token's share loses by
it. A lead left out is zero, as a flat one is once its baseline is removed. It is not estimated from the
others: III, aVR, aVL and aVF follow from I and II, so that no limb lead would count at all. Leads act
together, so a column of the grid need not sum to the token's share.

A transport plan is no evidence: its marginals are fixed, so every statement has its stretches whether it is
true or not. :func:`statement_assignment` gives it as what it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecgot.errors import EcgotError
from ecgot.inference.calibration import Finding
from ecgot.inference.zeroshot import EmbeddedPrompts, noisy_or
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.encoders import EncoderOutput, masked_mean
from ecgot.models.scores import Transport, phrase_logits, transport_plan

SMOOTHING = np.array([0.25, 0.5, 0.25])  # over neighbouring tokens: a beat often lies in two


@dataclass(frozen=True)
class Evidence:
    """Where in a record a finding is seen.

    Attributes:
        finding: whose evidence it is.
        leads: L names.
        times_s: [N + 1] edges of the N stretches, in s from the start of what the model read.
        grid: [L, N], what each stretch's share loses without the lead; may be negative.
        by_time: [N], each stretch's share of the score, in log-odds; may be negative.
    """

    finding: Finding
    leads: tuple[str, ...]
    times_s: np.ndarray
    grid: np.ndarray
    by_time: np.ndarray

    @property
    def peak_s(self) -> float:
        """The middle of the stretch that speaks most for the finding, smoothed over its neighbours."""
        return float(peaks_s(self.by_time, self.times_s))


Encode = Callable[[Tensor, Tensor | None], EncoderOutput]


@torch.no_grad()
def explain(
    model: AlignmentModel,
    waveform: Tensor,
    valid: int,
    prompts: EmbeddedPrompts,
    finding: Finding,
    *,
    leads: tuple[str, ...],
    fs_hz: float,
    encode: Encode | None = None,
) -> Evidence:
    """The evidence of a finding in one record, by one call of the encoder.

    Args:
        waveform: [L, T] in mV, as the model reads it.
        valid: how many of its T samples are signal, not padding.
        prompts: among which are those of the finding's group and code.
        leads: L names.
        fs_hz: of the waveform.
        encode: the encoder's fused copy; by default ``model.encoder``.

    Raises:
        EcgotError: the prompts lack the finding's class.
    """
    rows = torch.tensor(_rows(prompts, finding))
    count, samples = waveform.shape
    batch = waveform.expand(count + 1, -1, -1).clone()
    batch[torch.arange(1, count + 1), torch.arange(count)] = 0.0  # the whole record, then without each lead
    lengths = None if valid == samples else torch.full((count + 1,), valid, device=waveform.device)
    ecg = model.project_tokens((encode or model.encoder)(batch, lengths))
    shares = phrase_shares(ecg, prompts, rows)
    by_time = (shares * phrase_weights(ecg, prompts, rows)[:1, :, None]).sum(1).double().cpu().numpy()
    kept = int(ecg.mask[0].sum())
    times_s = token_edges_s(samples, ecg.tokens.shape[1], kept, fs_hz)
    times_s[-1] = valid / fs_hz
    return Evidence(
        finding=finding,
        leads=leads,
        times_s=times_s,
        grid=by_time[0, :kept] - by_time[1:, :kept],
        by_time=by_time[0, :kept],
    )


def phrase_shares(ecg: Embedding, prompts: EmbeddedPrompts, rows: Tensor) -> Tensor:
    """Shares [B, K, N] of the phrase scores of the prompts ``rows`` [K], 0 where a token is masked.

    Over the tokens they sum to the score less the phrase's prior.
    """
    mean = masked_mean(ecg.tokens, ecg.mask)
    size = mean.norm(dim=1) * ecg.mask.sum(1)
    phrases = prompts.embedding.pooled[rows.to(ecg.tokens.device)]
    shares = torch.einsum("bne,ke->bkn", ecg.tokens, phrases) * prompts.phrase_scale
    return (shares / size[:, None, None]).masked_fill(~ecg.mask[:, None, :], 0.0)


def phrase_weights(ecg: Embedding, prompts: EmbeddedPrompts, rows: Tensor) -> Tensor:
    """The gradient [B, K] of a class's score in the log-odds of its K phrases, see this module."""
    texts, rows = prompts.embedding, rows.to(ecg.tokens.device)
    assert texts.prior is not None
    logits = phrase_logits(ecg.pooled, texts.pooled[rows], texts.prior[rows], prompts.phrase_scale)
    return torch.exp(
        torch.nn.functional.logsigmoid(logits) - torch.nn.functional.logsigmoid(noisy_or(logits))[:, None]
    )


def token_edges_s(samples: int, tokens: int, kept: int, fs_hz: float) -> np.ndarray:
    """Edges [kept + 1] in s of the stretches that the first tokens of N stand for.

    Strides of 2 make a stride that is a power of two, with token n centred at its n-th multiple, since all
    convolutions are padded alike on both sides. Otherwise the tokens are patches from edge to edge.

    Args:
        samples: T, of the waveform that the encoder took.
        tokens: N, that it gave.
    """
    stride = 2 ** int(np.ceil(np.log2(samples / tokens)))
    if -(-samples // stride) == tokens:
        edges = (np.arange(kept + 1) - 0.5) * stride
    else:
        edges = np.arange(kept + 1) * (samples / tokens)
    return np.clip(edges, 0, samples) / fs_hz


def peaks_s(by_time: np.ndarray, times_s: np.ndarray) -> np.ndarray:
    """The middles [...] in s of the stretches with the largest share of [..., N], smoothed over neighbours.

    At the ends a stretch stands for its missing neighbour.
    """
    padded = np.concatenate([by_time[..., :1], by_time, by_time[..., -1:]], axis=-1)
    smooth = sum(
        weight * padded[..., shift : shift + by_time.shape[-1]] for shift, weight in enumerate(SMOOTHING)
    )
    best = np.argmax(smooth, axis=-1)
    return (times_s[best] + times_s[best + 1]) / 2


@torch.no_grad()
def statement_assignment(ecg: Embedding, words: Embedding, transport: Transport) -> np.ndarray:
    """How a transport plan assigns a report's S statements to the N stretches of one ECG: [S, N], of sum 1.

    The plan moves the words of all statements, each of equal mass, to the tokens, each of equal mass too, at
    the cosine cost with which the run was trained. A statement's row adds up its words. Every word and every
    stretch is used up, whatever the record shows: this says which statement fits a stretch best among those
    that are there, not that it is true.

    Args:
        ecg: one embedded ECG, tokens [1, N, E].
        words: S embedded statements, tokens [S, M, E].
        transport: the run's settings, see :func:`ecgot.runs.checkpoints.transport`.

    Raises:
        EcgotError: there is no statement, or more than one ECG.
    """
    count = len(words.tokens)
    if len(ecg.tokens) != 1 or not count:
        got = f"{len(ecg.tokens)} ECGs and {count} statements"
        raise EcgotError(f"statements: expected one ECG and at least one statement, got {got}")
    cloud = words.tokens[words.mask][None]
    whole = Embedding(cloud, cloud.new_ones(cloud.shape[:2], dtype=torch.bool), words.pooled[:1])
    plan = transport_plan(ecg, whole, transport)[0].T  # [words, N]
    summed = plan.new_zeros(count, plan.shape[1]).index_add(0, words.mask.nonzero()[:, 0], plan)
    return summed.double().cpu().numpy()


def _rows(prompts: EmbeddedPrompts, finding: Finding) -> list[int]:
    """Indices of the prompts of a finding's class."""
    rows = prompts.rows.get(finding.group, {}).get(finding.code)
    if rows is None:
        raise EcgotError(f"finding: expected a class with prompts, got {finding.group} {finding.code!r}")
    return rows
