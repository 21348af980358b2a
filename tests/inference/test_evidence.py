"""Where a finding is seen: identities that hold exactly, and a beat that is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ecgot.data.baseline import remove_baseline
from ecgot.data.heart import Heart, draw_orientation
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.synth import signal_of
from ecgot.errors import EcgotError
from ecgot.inference.calibration import Calibration, Finding
from ecgot.inference.evidence import (
    explain,
    peaks_s,
    phrase_shares,
    phrase_weights,
    statement_assignment,
    token_edges_s,
)
from ecgot.inference.zeroshot import EmbeddedPrompts, class_scores, load_prompts
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.encoders import fuse_norms
from ecgot.models.losses import Transport, phrase_logits
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.run import PRETRAINED, Run


@pytest.fixture(scope="module")
def model() -> AlignmentModel:
    return load_alignment(Run.open(PRETRAINED), None)


@pytest.fixture(scope="module")
def prompts() -> EmbeddedPrompts:
    return load_prompts(Run.open(PRETRAINED).prompts, torch.device("cpu"))


def ecg_with_a_premature_beat(seed: int) -> tuple[torch.Tensor, list[float]]:
    """Waveform [12, 1000] without its baseline, and when its premature beats come, in s."""
    rng = np.random.default_rng(seed)
    heart = replace(Heart(), ectopic_share=0.01, ectopic_by_s=rng.uniform(0.5, 7.5))
    signal_mv, beats = signal_of(heart, rng, 100.0, draw_orientation(rng))
    waveform = torch.from_numpy(remove_baseline(signal_mv, 100.0, 0.3).astype(np.float32))
    return waveform, [beat.peak_s for beat in beats if beat.premature]


def finding_of(group: str, code: str) -> Finding:
    (finding,) = Calibration().findings({group: {code: 0.0}})
    return finding


@pytest.mark.parametrize("valid", [1000, 600])
def test_shares_sum_to_the_score_less_the_prior(model, prompts, valid):
    waveform = ecg_with_a_premature_beat(0)[0]
    waveform[:, valid:] = 0.0
    lengths = None if valid == 1000 else torch.tensor([valid])
    with torch.no_grad():
        ecg = model.embed_ecg(waveform[None], lengths)
    rows = torch.arange(len(prompts.texts))
    texts = prompts.embedding
    assert texts.prior is not None
    scores = phrase_logits(ecg.pooled, texts.pooled, texts.prior, prompts.phrase_scale)
    shares = phrase_shares(ecg, prompts, rows)
    torch.testing.assert_close(shares.sum(2), scores - texts.prior, atol=2e-4, rtol=1e-4)
    assert (shares[:, :, ~ecg.mask[0]] == 0).all()


def test_weights_are_the_noisy_or_s_gradient(model, prompts):
    with torch.no_grad():
        ecg = model.embed_ecg(ecg_with_a_premature_beat(1)[0][None])
    rows = torch.tensor(prompts.rows["superclass"]["MI"])
    prior = prompts.embedding.prior
    assert prior is not None
    moved = replace(prompts, embedding=replace(prompts.embedding, prior=prior.double().requires_grad_()))
    moved.embedding.pooled = moved.embedding.pooled.double()
    moved_ecg = replace(ecg, pooled=ecg.pooled.double())
    with torch.enable_grad():
        score = class_scores.__wrapped__(moved_ecg, moved)["superclass"][0, 1]
        (gradient,) = torch.autograd.grad(score, moved.embedding.prior)
    weights = phrase_weights(ecg, prompts, rows)[0]
    torch.testing.assert_close(weights.double(), gradient[rows], atol=1e-5, rtol=1e-4)


def test_one_call_of_the_encoder_gives_time_and_leads(model, prompts):
    waveform = ecg_with_a_premature_beat(2)[0]
    calls = []

    def encode(batch, lengths):
        calls.append(batch.shape)
        return model.encoder(batch, lengths)

    found = explain(
        model,
        waveform,
        1000,
        prompts,
        finding_of("form", "PVC"),
        leads=STANDARD_LEADS,
        fs_hz=100.0,
        encode=encode,
    )
    assert calls == [(13, 12, 1000)]
    assert found.by_time.shape == (32,)
    assert found.times_s.shape == (33,)
    assert found.grid.shape == (12, 32)
    with torch.no_grad():  # the first chest lead left out by hand
        without = waveform.clone()
        without[6] = 0
        both = model.embed_ecg(torch.stack([waveform, without]))
        shares = phrase_shares(both, prompts, torch.tensor(prompts.rows["form"]["PVC"]))[:, 0]
    np.testing.assert_allclose(found.by_time, shares[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(found.grid[6], (shares[0] - shares[1]).numpy(), atol=1e-5)


def test_a_short_record_has_no_stretch_past_its_end(model, prompts):
    waveform = ecg_with_a_premature_beat(3)[0]
    waveform[:, 600:] = 0.0
    found = explain(
        model, waveform, 600, prompts, finding_of("form", "PVC"), leads=STANDARD_LEADS, fs_hz=100.0
    )
    assert len(found.by_time) == 19
    assert found.times_s[-1] == 6.0
    assert found.grid.shape == (12, 19)


def test_the_premature_beat_is_where_the_evidence_is(model, prompts):
    encode = fuse_norms(model.encoder)
    hits = 0
    for seed in range(20):
        waveform, beats = ecg_with_a_premature_beat(seed)
        found = explain(
            model,
            waveform,
            1000,
            prompts,
            finding_of("form", "PVC"),
            leads=STANDARD_LEADS,
            fs_hz=100.0,
            encode=encode,
        )
        hits += min(abs(found.peak_s - beat) for beat in beats) <= 0.4
    assert hits >= 18


def test_stretches_are_centred_where_strided_convolutions_look():
    edges = token_edges_s(1000, 32, 32, 100.0)
    assert edges[0] == 0
    assert edges[-1] == 10
    np.testing.assert_allclose(edges[1:-1], np.arange(0.16, 9.9, 0.32))
    np.testing.assert_allclose(token_edges_s(1000, 20, 20, 100.0), np.arange(21) * 0.5)  # patches
    centres = []
    tokens = load_alignment(Run.open(PRETRAINED), None).encoder
    for index in (8, 16, 24):
        waveform = torch.randn(1, 12, 1000, generator=torch.Generator().manual_seed(index)).requires_grad_()
        (gradient,) = torch.autograd.grad(tokens(waveform).tokens[0, index].sum(), waveform)
        energy = gradient[0].square().sum(0)
        centres.append(float((energy * torch.arange(1000)).sum() / energy.sum()) / 100)
    middles = (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(centres, middles[[8, 16, 24]], atol=0.1)


def test_the_peak_counts_neighbours_too():
    edges = np.arange(7.0)
    assert peaks_s(np.array([3, 3.2, 3, 0, 3.5, 0]), edges) == 1.5
    np.testing.assert_array_equal(peaks_s(np.eye(6), edges), np.arange(6) + 0.5)


def test_a_class_without_prompts_has_no_evidence(model, prompts):
    with pytest.raises(EcgotError, match="got rhythm 'XYZ'"):
        explain(
            model, torch.zeros(12, 1000), 1000, prompts, finding_of("rhythm", "XYZ"), leads=(), fs_hz=100.0
        )


def test_statements_are_assigned_to_stretches_and_all_are_used_up():
    torch.manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(1, 8, 16), dim=2)
    ecg = Embedding(tokens, torch.tensor([[True] * 6 + [False] * 2]), tokens.mean(1))
    words = torch.zeros(2, 3, 16)
    words[0, :2], words[1, :3] = tokens[0, :2], tokens[0, 3:6]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    transport = Transport(eps=0.02, max_iter=2000, tol=1e-6)
    plan = statement_assignment(ecg, Embedding(words, mask, words.mean(1)), transport)
    assert plan.shape == (2, 8)
    np.testing.assert_allclose(plan.sum(1), [2 / 5, 3 / 5], atol=1e-4)  # by their words
    np.testing.assert_allclose(plan.sum(0), [1 / 6] * 6 + [0, 0], atol=1e-4)
    assert (plan[0, :2] > 5 * plan[1, :2]).all()
    assert (plan[1, 3:6] > 5 * plan[0, 3:6]).all()
    with pytest.raises(EcgotError, match="at least one statement"):
        statement_assignment(ecg, Embedding(words[:0], mask[:0], words[:0, 0]), transport)
