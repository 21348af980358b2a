"""Prompts and class scores."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from ecgot.choices import GROUPS, SCORES
from ecgot.data.findings import STATEMENTS
from ecgot.data.ptbxl import SUPERCLASSES, read_table
from ecgot.errors import EcgotError
from ecgot.files import save_tensors
from ecgot.inference.zeroshot import (
    EmbeddedPrompts,
    check_score,
    class_scores,
    embed_prompts,
    load_prompts,
    noisy_or,
    read_prompts,
    save_prompts,
    scores_fingerprint,
    select_prompts,
)
from ecgot.kernels.ot import reference
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.encoders import encoder
from ecgot.models.scores import Transport
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.config import AlignConfig


@pytest.fixture
def prompts() -> EmbeddedPrompts:
    torch.manual_seed(0)
    tokens = torch.randn(3, 5, 8)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    embedding = Embedding(tokens, mask, F.normalize(torch.randn(3, 8), dim=1), torch.randn(3))
    rows = {"superclass": {"NORM": [0], "MI": [1, 2]}, "rhythm": {"SR": [2]}}
    return EmbeddedPrompts(embedding, rows, ("normal", "infarct", "sinus rhythm"), torch.tensor(7.0))


def ecgs(count: int) -> Embedding:
    torch.manual_seed(1)
    return Embedding(
        torch.randn(count, 6, 8),
        torch.ones(count, 6, dtype=torch.bool),
        F.normalize(torch.randn(count, 8), dim=1),
    )


def row(ecg: Embedding, index: int) -> Embedding:
    part = slice(index, index + 1)
    return Embedding(ecg.tokens[part], ecg.mask[part], ecg.pooled[part])


def test_the_built_in_prompts_name_every_class_of_the_synthetic_data():
    prompts = read_prompts()
    assert tuple(prompts) == GROUPS
    assert tuple(prompts["superclass"]) == SUPERCLASSES
    for code, (_, diagnostic, form, rhythm, _, subclass) in STATEMENTS.items():
        for flag, group, name in (
            (diagnostic, "subclass", subclass),
            (form, "form", code),
            (rhythm, "rhythm", code),
        ):
            assert not flag or name in prompts[group], code


def test_the_built_in_prompts_are_for_exactly_the_classes_of_ptbxl(ptbxl):
    prompts, table = read_prompts(), read_table(ptbxl)
    for group in GROUPS:
        assert set(prompts[group]) == set(table.labels(group).classes), group


def test_cosine_scores_are_means_over_a_class_s_prompts(prompts):
    ecg = ecgs(4)
    scores = class_scores(ecg, prompts, score="cosine")
    similarity = ecg.pooled @ prompts.embedding.pooled.T
    torch.testing.assert_close(
        scores["superclass"], torch.stack([similarity[:, 0], similarity[:, 1:].mean(1)], 1)
    )
    torch.testing.assert_close(scores["rhythm"], similarity[:, 2:])


def test_phrase_scores_are_log_odds_of_any_prompt(prompts):
    ecg, text = ecgs(4), prompts.embedding
    scores = class_scores(ecg, prompts)
    logits = (7.0 * (ecg.pooled @ text.pooled.T) + text.prior).double()
    torch.testing.assert_close(scores["rhythm"], logits[:, 2:].float())
    torch.testing.assert_close(scores["superclass"][:, 0], logits[:, 0].float())
    none = torch.sigmoid(-logits[:, 1]) * torch.sigmoid(-logits[:, 2])
    torch.testing.assert_close(torch.sigmoid(scores["superclass"][:, 1]).double(), 1 - none)


def test_noisy_or_is_right_where_fp32_ends():
    torch.manual_seed(0)
    log_odds = 12 * torch.randn(500, 6)
    wide = log_odds.double()
    expected = torch.log(torch.expm1(F.softplus(wide).sum(1)))
    torch.testing.assert_close(noisy_or(log_odds).double(), expected, atol=1e-5, rtol=2e-6)
    rare = torch.full((4,), -200.0)  # a probability that fp32 does not hold
    torch.testing.assert_close(noisy_or(rare), torch.tensor(-200.0 + math.log(4)))
    sure = torch.tensor([1e4, 1e4])
    assert noisy_or(sure) == 2e4
    torch.testing.assert_close(noisy_or(torch.tensor([[-3.5], [80.0]])), torch.tensor([-3.5, 80.0]))


def test_noisy_or_s_gradient_is_a_phrase_s_share_of_the_probability():
    """By the closed form sigmoid(l_k) / sigmoid(score)."""
    log_odds = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    score = noisy_or(log_odds)
    (gradient,) = torch.autograd.grad(score, log_odds)
    torch.testing.assert_close(gradient, torch.sigmoid(log_odds.detach()) / torch.sigmoid(score.detach()))


def test_a_fingerprint_changes_with_the_weights_and_the_prompts_alone(prompts):
    torch.manual_seed(0)
    model = AlignmentModel(encoder("resnet1d_tiny"), 24, 8)
    first = scores_fingerprint(model, prompts)
    assert scores_fingerprint(model, prompts) == first
    assert scores_fingerprint(model, replace(prompts, texts=("normal", "infarct", "sinus"))) != first
    assert scores_fingerprint(model, replace(prompts, rows=prompts.rows | {"form": {}})) != first
    with torch.no_grad():
        model.project_ecg.bias[0] += 1e-3
    assert scores_fingerprint(model, prompts) != first


def test_a_run_without_phrases_has_no_phrase_score():
    assert check_score(None, AlignConfig()) == "phrase"
    without = AlignConfig(phrase_weight=0)
    assert check_score(None, without) == "cosine"
    assert check_score("ot", without) == "ot"
    with pytest.raises(EcgotError, match=r"align\.phrase_weight=0"):
        check_score("phrase", without)
    with pytest.raises(EcgotError, match="expected one of phrase, cosine, ot"):
        check_score("dot", without)


def test_transport_scores_are_minus_the_cost_of_each_pair(prompts):
    ecg = ecgs(2)
    settings = Transport(eps=0.2, max_iter=2000, tol=1e-7)
    scores = class_scores(ecg, prompts, score="ot", transport=settings)["superclass"]
    text = prompts.embedding
    for b in range(2):
        costs = []
        for k in range(3):
            cost = reference.cost_matrix(
                ecg.tokens[b].double(), text.tokens[k][text.mask[k]].double(), "cosine"
            )
            n, m = cost.shape
            uniform = torch.full((n,), 1 / n).double(), torch.full((m,), 1 / m).double()
            costs.append(reference.solve(cost, *uniform, 0.2, max_iter=5000, tol=1e-12).value)
        expected = torch.stack([-costs[0], -(costs[1] + costs[2]) / 2]).float()
        torch.testing.assert_close(scores[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", ["phrase", "cosine", "ot"])
def test_a_record_s_score_does_not_depend_on_its_batch_mates(prompts, score):
    ecg = ecgs(5)
    together = class_scores(ecg, prompts, score=score)
    for index in range(5):
        alone = class_scores(row(ecg, index), prompts, score=score)
        for group in together:
            torch.testing.assert_close(together[group][index : index + 1], alone[group], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("score", ["phrase", "cosine", "ot"])
def test_from_waveform_to_score_no_batch_mate_matters(tiny_bert, score):
    torch.manual_seed(0)
    text = TextEncoder(str(tiny_bert))
    model = AlignmentModel(encoder("resnet1d_tiny"), text.width, 16).eval()
    prompts = embed_prompts(model, text, read_prompts())
    waveform = torch.randn(4, 12, 500)
    waveform[3] *= 1000  # a neighbour out of all proportion
    with torch.no_grad():
        together = class_scores(model.embed_ecg(waveform), prompts, score=score)
        alone = class_scores(model.embed_ecg(waveform[:1]), prompts, score=score)
    for group in GROUPS:
        torch.testing.assert_close(together[group][:1], alone[group], atol=1e-5, rtol=1e-5)


def test_an_unknown_score_or_class_is_named(prompts):
    with pytest.raises(EcgotError, match="expected one of phrase, cosine, ot"):
        class_scores(ecgs(1), prompts, score="dot")
    with pytest.raises(EcgotError, match="prompts: expected one of SR, got rhythm class 'VT'"):
        select_prompts({"rhythm": {"SR": ("sinus rhythm",)}}, "rhythm", ("SR", "VT"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("[rhythm", "not valid TOML"),
        ("[mood]\nSR = ['a']", "got 'mood'"),
        ("[rhythm]\nSR = 'a'", "rhythm.SR"),
        ("[rhythm]\nSR = []", "rhythm.SR"),
        ("", "got no class"),
        ("[rhythm]", "got no class"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path: Path, content, part):
    path = tmp_path / "prompts.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(EcgotError, match=part) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", SCORES)
def test_a_group_without_classes_has_no_scores(prompts, score):
    some = replace(prompts, rows=prompts.rows | {"form": {}})
    assert class_scores(ecgs(3), some, score=score)["form"].shape == (3, 0)


def test_damaged_embedded_prompts_are_named(prompts, tmp_path):
    path = tmp_path / "prompts.safetensors"
    save_prompts(prompts, path)
    assert load_prompts(path, torch.device("cpu")).texts == prompts.texts
    save_tensors({"tokens": torch.zeros(1)}, path)  # no rows
    with pytest.raises(EcgotError, match="damaged"):
        assert load_prompts(path, torch.device("cpu")).texts == prompts.texts
    save_tensors({"tokens": torch.zeros(1)}, path, {"rows": "{"})
    with pytest.raises(EcgotError, match="damaged"):
        load_prompts(path, torch.device("cpu"))
