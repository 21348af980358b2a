"""Prompts and class scores."""

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
    read_prompts,
    save_prompts,
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
    return EmbeddedPrompts(embedding, rows, torch.tensor(7.0))


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


def test_phrase_scores_are_soft_maxima_of_log_odds(prompts):
    ecg, text = ecgs(4), prompts.embedding
    scores = class_scores(ecg, prompts)
    logits = 7.0 * (ecg.pooled @ text.pooled.T) + text.prior
    torch.testing.assert_close(scores["rhythm"], logits[:, 2:])
    torch.testing.assert_close(scores["superclass"][:, 0], logits[:, 0])
    expected = 2 * (logits[:, 1:] / 2).exp().sum(1).log()
    torch.testing.assert_close(scores["superclass"][:, 1], expected)
    assert (scores["superclass"][:, 1] > logits[:, 1:].amax(1)).all()


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
    load_prompts(path, torch.device("cpu"))
    save_tensors({"tokens": torch.zeros(1)}, path)  # no rows
    with pytest.raises(EcgotError, match="damaged"):
        load_prompts(path, torch.device("cpu"))
    save_tensors({"tokens": torch.zeros(1)}, path, {"rows": "{"})
    with pytest.raises(EcgotError, match="damaged"):
        load_prompts(path, torch.device("cpu"))
