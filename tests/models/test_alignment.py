"""The alignment losses."""

import math

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.nn import functional as F

from ecgot.choices import TOKEN_LOSSES, TOKEN_SIMILARITIES
from ecgot.kernels.ot import reference
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.encoders import encoder
from ecgot.models.losses import (
    AlignmentLoss,
    SaidPhrases,
    contrastive_loss,
    phrase_loss,
    wasserstein_1d,
)
from ecgot.models.scores import Transport, phrase_logits, token_similarity
from ecgot.models.text_encoder import TextTokens


def text_tokens(batch=4, count=7, width=24, seed=0) -> TextTokens:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, count, width, generator=generator)
    mask = torch.arange(count) < torch.randint(1, count + 1, (batch, 1), generator=generator)
    return TextTokens(tokens, mask, torch.randn(batch, width, generator=generator))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AlignmentModel(encoder("resnet1d_tiny"), text_width=24, width=32)
    for layer in model.modules():
        # Zero as they start, these gates keep gradients from what lies behind them.
        if isinstance(layer, torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.0)
    return model


def test_contrastive_loss_without_repeated_reports_is_info_nce():
    torch.manual_seed(0)
    ecg, text = F.normalize(torch.randn(5, 8), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    loss = contrastive_loss(ecg @ text.T, torch.arange(5), torch.tensor(0.1))
    logits = ecg @ text.T / 0.1
    own = torch.arange(5)
    torch.testing.assert_close(loss, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2)


def test_identical_reports_are_positives_of_each_other():
    ecg = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=1)
    loss = contrastive_loss(ecg @ ecg.T, torch.tensor([0, 0, 1]), torch.tensor(0.01))
    # Perfect: both first rows spread over both first columns, which costs log 2 and no more.
    assert loss.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-4)
    as_strangers = contrastive_loss(ecg @ ecg.T, torch.arange(3), torch.tensor(0.01))
    apart = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]), dim=1)
    pushed = contrastive_loss(apart @ apart.T, torch.arange(3), torch.tensor(0.01))
    assert pushed < as_strangers  # without the rule, equal reports are pushed apart


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_token_loss_alone_reaches_every_encoder_parameter(model, name):
    loss = AlignmentLoss(contrastive_weight=0.0, token_loss=name)
    ecg = model.embed_ecg(torch.randn(4, 12, 500))
    terms = loss(ecg, model.embed_text(text_tokens()), torch.arange(4), model)
    assert set(terms) == {"token", "loss"} | ({"ot_converged"} if name.startswith("ot") else set())
    assert 0 <= terms.get("ot_converged", 0) <= 1
    terms["loss"].backward()
    for name, parameter in [*model.encoder.named_parameters(), *model.project_ecg.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    for name, parameter in model.project_text.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_weights_switch_terms_off(model):
    ecg, text = model.embed_ecg(torch.randn(4, 12, 300)), model.embed_text(text_tokens())
    phrases = SaidPhrases(torch.randn(3, 24), torch.rand(3), torch.ones(4, 3))
    loss = AlignmentLoss(contrastive_weight=2.0, token_weight=0.5, phrase_weight=3.0)
    terms = loss(ecg, text, torch.arange(4), model, phrases)
    expected = 2 * terms["contrastive"] + 0.5 * terms["token"] + 3 * terms["phrase"]
    torch.testing.assert_close(terms["loss"], expected)
    logits = phrase_logits(ecg.pooled, *model.embed_phrases(phrases.pooled), model.phrase_scale)
    torch.testing.assert_close(terms["phrase"], phrase_loss(logits, phrases.said, phrases.weight))
    alone = AlignmentLoss(token_weight=0.0)(ecg, text, torch.arange(4), model)
    assert set(alone) == {"contrastive", "loss"}
    with pytest.raises(ValueError, match="phrases: expected SaidPhrases"):
        loss(ecg, text, torch.arange(4), model)


@pytest.mark.parametrize("name", [*TOKEN_SIMILARITIES, "ot_matched"])
def test_padding_of_either_side_changes_nothing(model, name):
    model.eval()
    loss = AlignmentLoss(contrastive_weight=0.0, token_loss=name)
    ecg = model.embed_ecg(torch.randn(4, 12, 500))
    text = text_tokens()
    short = loss(ecg, model.embed_text(text), torch.arange(4), model)["token"]
    padded = TextTokens(
        torch.cat([text.tokens, torch.full((4, 3, 24), 5.0)], 1),
        torch.cat([text.mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
        text.pooled,
    )
    long = loss(ecg, model.embed_text(padded), torch.arange(4), model)["token"]
    torch.testing.assert_close(short, long)


@pytest.mark.parametrize("name", TOKEN_SIMILARITIES)
def test_the_contrast_by_tokens_is_of_all_pairs(model, name):
    ecg, text = model.embed_ecg(torch.randn(4, 12, 300)), model.embed_text(text_tokens())
    transport = Transport(tol=1e-5)
    loss = AlignmentLoss(contrastive_weight=0.0, token_loss=name, transport=transport)
    terms = loss(ecg, text, torch.arange(4), model)
    similarity = token_similarity(name, ecg, text, transport)
    expected = contrastive_loss(similarity, torch.arange(4), model.token_temperature)
    torch.testing.assert_close(terms["token"], expected)


def test_matches_of_tokens_by_hand():
    torch.manual_seed(0)
    ecg_mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    text_mask = torch.tensor([[True] * 4, [True, True, False, False], [True, False, True, True]])
    ecg = Embedding(torch.randn(2, 5, 8), ecg_mask, torch.randn(2, 8))
    text = Embedding(torch.randn(3, 4, 8), text_mask, torch.randn(3, 8))
    best, mean = (token_similarity(name, ecg, text, Transport()) for name in ("best_match", "mean_match"))
    for b in range(2):
        for k in range(3):
            x, y = ecg.tokens[b][ecg_mask[b]], text.tokens[k][text_mask[k]]
            cosine = torch.stack([F.cosine_similarity(each, y) for each in x])
            torch.testing.assert_close(mean[b, k], cosine.mean())
            both = (cosine.max(1).values.mean() + cosine.max(0).values.mean()) / 2
            torch.testing.assert_close(best[b, k], both)


def test_wasserstein_1d_is_scipys():
    x, y = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(-2, 3, 32).view(4, 8)
    expected = wasserstein_distance(x.flatten().numpy(), y.flatten().numpy())
    assert wasserstein_1d(x, y).item() == pytest.approx(expected, rel=1e-5)


def test_batch_transport_does_not_see_who_belongs_to_whom(model):
    ecg, text = model.embed_ecg(torch.randn(4, 12, 300)), model.embed_text(text_tokens())
    loss = AlignmentLoss(contrastive_weight=0.0, token_loss="ot_batch", transport=Transport(max_iter=500))
    order = torch.tensor([2, 0, 3, 1])
    swapped = Embedding(text.tokens[order], text.mask[order], text.pooled[order])
    own, other = (loss(ecg, each, torch.arange(4), model)["token"] for each in (text, swapped))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


def test_transport_similarity_of_every_pair_is_its_own_problem():
    torch.manual_seed(0)
    ecg = Embedding(torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool), torch.randn(3, 8))
    text_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    text = Embedding(torch.randn(2, 4, 8), text_mask, torch.randn(2, 8))
    scores = token_similarity("ot", ecg, text, Transport(eps=0.2, max_iter=2000, tol=1e-6))
    for row in range(3):
        for column in range(2):
            (solution,) = reference.sinkhorn(
                ecg.tokens[row : row + 1].double(),
                text.tokens[column : column + 1][:, text_mask[column]].double(),
                eps=0.2,
                cost="cosine",
            )
            assert scores[row, column].item() == pytest.approx(-solution.value.item(), abs=1e-4)


def test_the_temperature_stays_above_a_hundredth(model):
    with torch.no_grad():
        model.log_temperature.fill_(-100.0)
    assert model.temperature.item() == pytest.approx(0.01)


@pytest.mark.parametrize("name", TOKEN_SIMILARITIES)
def test_a_side_without_tokens_is_like_nothing(name):
    empty = Embedding(torch.randn(2, 3, 8), torch.tensor([[True] * 3, [False] * 3]), torch.randn(2, 8))
    found = token_similarity(name, empty, empty, Transport())
    assert found.isfinite().all()
    assert found[1].tolist() == [0.0, 0.0]
