"""The alignment losses."""

import math

import pytest
import torch
from torch.nn import functional as F

from ecgot.kernels import reference
from ecgot.models.alignment import (
    AlignmentLoss,
    AlignmentModel,
    Embedding,
    contrastive_loss,
    transport_similarity,
)
from ecgot.models.encoders import encoder
from ecgot.models.text import TextTokens


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


@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_transport_alone_reaches_every_encoder_parameter(model, pairs):
    loss = AlignmentLoss(contrastive_weight=0.0, ot_weight=1.0, ot_pairs=pairs)
    ecg = model.embed_ecg(torch.randn(4, 12, 500))
    terms = loss(ecg, model.embed_text(text_tokens()), torch.arange(4), model)
    assert set(terms) == {"ot", "ot_converged", "loss"}
    assert 0 <= terms["ot_converged"] <= 1
    terms["loss"].backward()
    for name, parameter in [*model.encoder.named_parameters(), *model.project_ecg.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    for name, parameter in model.project_text.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_weights_switch_terms_off(model):
    ecg, text = model.embed_ecg(torch.randn(4, 12, 300)), model.embed_text(text_tokens())
    both = AlignmentLoss(contrastive_weight=2.0, ot_weight=0.5)(ecg, text, torch.arange(4), model)
    assert both["loss"].item() == pytest.approx(2 * both["contrastive"].item() + 0.5 * both["ot"].item())
    alone = AlignmentLoss(ot_weight=0.0)(ecg, text, torch.arange(4), model)
    assert set(alone) == {"contrastive", "loss"}


@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_padding_of_either_side_changes_nothing(model, pairs):
    model.eval()
    loss = AlignmentLoss(contrastive_weight=0.0, ot_weight=1.0, ot_pairs=pairs)
    ecg = model.embed_ecg(torch.randn(4, 12, 500))
    text = text_tokens()
    short = loss(ecg, model.embed_text(text), torch.arange(4), model)["ot"]
    padded = TextTokens(
        torch.cat([text.tokens, torch.full((4, 3, 24), 5.0)], 1),
        torch.cat([text.mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
        text.pooled,
    )
    long = loss(ecg, model.embed_text(padded), torch.arange(4), model)["ot"]
    torch.testing.assert_close(short, long)


def test_the_contrast_by_transport_is_of_all_pairs(model):
    ecg, text = model.embed_ecg(torch.randn(4, 12, 300)), model.embed_text(text_tokens())
    terms = AlignmentLoss(contrastive_weight=0.0, tol=1e-5)(ecg, text, torch.arange(4), model)
    similarity = transport_similarity(ecg, text, eps=0.1, max_iter=50, tol=1e-5)
    expected = contrastive_loss(similarity, torch.arange(4), model.ot_temperature)
    torch.testing.assert_close(terms["ot"], expected)


def test_transport_similarity_of_every_pair_is_its_own_problem():
    torch.manual_seed(0)
    ecg = Embedding(torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool), torch.randn(3, 8))
    text_mask = torch.tensor([[True] * 4, [True, True, False, False]])
    text = Embedding(torch.randn(2, 4, 8), text_mask, torch.randn(2, 8))
    scores = transport_similarity(ecg, text, eps=0.2, max_iter=2000, tol=1e-6)
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
