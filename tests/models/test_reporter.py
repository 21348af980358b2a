"""Report generation through one path for causal and encoder-decoder language models."""

import math

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from ecgot.errors import EcgotError
from ecgot.models.language_models import (
    build_reporter,
    check_language_model,
    empty_reporter,
    fit_tokenizer,
    save_language_model_shape,
)
from ecgot.models.reporter import Reporter

REPORTS = ("sinus rhythm. normal ecg.", "atrial fibrillation. left bundle branch block.")
WIDTH = 10


def language_models(vocabulary: int):
    """A tiny random model of each family."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                **ids,
            )
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, **ids)),
        "t5": T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocabulary,
                d_model=32,
                d_kv=16,
                d_ff=64,
                num_layers=2,
                num_heads=2,
                dropout_rate=0.0,
                decoder_start_token_id=0,
                pad_token_id=0,
                eos_token_id=2,
            )
        ),
        "bart": BartForConditionalGeneration(
            BartConfig(
                vocab_size=vocabulary,
                d_model=32,
                encoder_layers=1,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                dropout=0.0,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                **ids,
            )
        ),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return fit_tokenizer(REPORTS)


def reporter(family: str, tokenizer) -> Reporter:
    torch.manual_seed(0)
    return Reporter(language_models(len(tokenizer))[family], tokenizer, WIDTH, max_tokens=40)


FAMILIES = ("llama", "gpt2", "t5", "bart")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_to_write_by_the_ecg_alone(family, tokenizer):
    model = reporter(family, tokenizer).train()
    torch.manual_seed(1)
    tokens = torch.randn(2, 5, WIDTH)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(tokens, mask, REPORTS).backward()
        optimizer.step()
    model.eval()
    for num_beams in (1, 3):
        assert model.generate(tokens, mask, num_beams=num_beams) == list(REPORTS)
    # Another ECG, another report: what is written comes from the tokens.
    assert model.generate(tokens.flip(0), mask.flip(0)) == list(REPORTS[::-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_tokens_and_batch_mates_change_nothing(family, tokenizer):
    model = reporter(family, tokenizer).eval()
    tokens, mask = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True, True, True, False, False]])
    other = tokens.clone()
    other[1, 3:] = 100.0
    with torch.no_grad():
        loss = model(tokens, mask, REPORTS)
        torch.testing.assert_close(model(other, mask, REPORTS), loss, atol=1e-5, rtol=1e-5)
        alone = [model(tokens[i : i + 1], mask[i : i + 1], REPORTS[i : i + 1]) for i in range(2)]
        lengths = torch.tensor([len(model._tokenized(text)) + 1.0 for text in REPORTS])
    mean = (torch.stack(alone) * lengths).sum() / lengths.sum()
    torch.testing.assert_close(loss, mean, atol=1e-4, rtol=1e-4)
    written = model.generate(tokens, mask)
    assert written[1] == model.generate(tokens[1:, :3], mask[1:, :3])[0]
    assert written[1] == model.generate(other, mask)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorder_is_one_more_token(family, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = Reporter(
        language_models(len(tokenizer))[family], tokenizer, WIDTH, max_tokens=40, recorders=("a", "b")
    ).eval()
    tokens, mask = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True, True, True, False, False]])
    loss = model(tokens, mask, REPORTS, recorders=["b", ""])
    loss.backward()
    assert model.recorder_embedding is not None
    assert model.recorder_embedding.weight.grad.abs().sum(1).gt(0).tolist() == [True, False, True]
    with torch.no_grad():
        unknown = model(tokens, mask, REPORTS)
        assert model(tokens, mask, REPORTS, recorders=["c", ""]) == unknown  # another name is an unknown one
        assert abs(loss - unknown) > 1e-6
        with pytest.raises(ValueError, match=r"recorders: expected 2, .* got 1"):
            model(tokens, mask, REPORTS, recorders=["b"])
        # By hand: the recorder's embedding, then the projected tokens.
        plain = Reporter(model.language_model, tokenizer, WIDTH, max_tokens=40).eval()
        row = model.recorder_embedding.weight[2]
        prefix = torch.cat([row.expand(1, 1, -1), model.projector(tokens[:1])], 1)
        plain.projector = torch.nn.Identity()
        expected = plain(prefix, torch.ones(1, 6, dtype=torch.bool), REPORTS[:1])
        torch.testing.assert_close(model(tokens[:1], mask[:1], REPORTS[:1], recorders=["b"]), expected)
    assert (
        model.generate(tokens, mask, recorders=["b", "a"])[1]
        == model.generate(tokens[1:, :3], mask[1:, :3], recorders=["a"])[0]
    )
    save_language_model_shape(model, tmp_path)
    again = empty_reporter(tmp_path, WIDTH, max_tokens=40, recorders=("a", "b")).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, mask, REPORTS, recorders=["b", ""]), loss.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_shape_and_weights_bring_the_model_back(family, tokenizer, tmp_path):
    model = reporter(family, tokenizer).eval()
    save_language_model_shape(model, tmp_path)
    again = empty_reporter(tmp_path, WIDTH, max_tokens=40).eval()
    again.load_state_dict(model.state_dict())
    tokens, mask = torch.randn(2, 5, WIDTH), torch.ones(2, 5, dtype=torch.bool)
    assert again.generate(tokens, mask) == model.generate(tokens, mask)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens, mask, REPORTS), model(tokens, mask, REPORTS))


def test_a_model_is_loaded_by_path(tokenizer, tmp_path):
    language_models(len(tokenizer))["gpt2"].save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = build_reporter(str(tmp_path), WIDTH, reports=REPORTS)
    assert type(model.language_model).__name__ == "GPT2LMHeadModel"


def test_the_fitted_tokenizer_gives_back_what_it_encoded(tokenizer):
    for text in (*REPORTS, "left st"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_long_reports_are_cut_and_end(tokenizer):
    model = build_reporter("scratch", WIDTH, reports=REPORTS, max_tokens=4, hidden_size=48, layers=1)
    labels = model._labels([REPORTS[1]])
    assert labels.shape == (1, 4)
    assert labels[0, -1] == model.tokenizer.eos_token_id


def test_bad_models_are_named(tmp_path, tokenizer):
    with pytest.raises(EcgotError, match=r"report\.language_model: expected .*absent") as caught:
        build_reporter(str(tmp_path / "absent"), WIDTH, reports=REPORTS)
    assert "\n" not in str(caught.value)
    with pytest.raises(EcgotError, match="expected a language model in"):
        empty_reporter(tmp_path, WIDTH, max_tokens=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_probabilities_are_those_of_token_after_token(family, tokenizer, monkeypatch):
    model = reporter(family, tokenizer).eval()
    torch.manual_seed(1)
    tokens, mask = torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True, True, True, False, False]])
    monkeypatch.setattr(model, "search", lambda *_, **__: list(REPORTS))  # a random model writes nonsense
    for row, report in enumerate(model.write(tokens, mask)):
        expected = [0.0, 0.0]
        ids = tokenizer(REPORTS[row], add_special_tokens=False).input_ids
        for step, token in enumerate(ids):
            if tokenizer.decode([token]).strip(" .") == "":
                continue  # a full stop of its own belongs to no sentence
            sentence = tokenizer.decode(ids[:step]).count(".")
            logits = _next(model, tokens[row : row + 1], mask[row : row + 1], ids[:step])
            expected[sentence] += logits[token].item()
        assert [text for text, _ in report.sentences] == REPORTS[row].rstrip(".").split(". ")
        found = [math.log(probability) for _, probability in report.sentences]
        assert found == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def _next(reporter: Reporter, tokens: torch.Tensor, mask: torch.Tensor, before: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after ``before``, by a pass that sees nothing else."""
    model, prefix = reporter.language_model, reporter.projector(tokens[:, mask[0]])
    if reporter.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *before]
        logits = model(inputs_embeds=prefix, decoder_input_ids=torch.tensor([start])).logits
    else:
        words = model.get_input_embeddings()(torch.tensor([[reporter.bos_id, *before]]))
        logits = model(inputs_embeds=torch.cat([prefix, words], 1)).logits
    return logits[0, -1].log_softmax(0)


def test_a_tokenizer_that_tells_no_places_gives_sentences_too(monkeypatch):
    """Such as one of bytes, whose tokens are not even whole letters."""
    words = ByT5Tokenizer()
    torch.manual_seed(0)
    model = Reporter(language_models(len(words))["t5"], words, WIDTH, max_tokens=40).eval()
    assert not words.is_fast
    text = "st-hebung über v2. normal"
    assert model._token_spans(text)[:2] == [(0, 1), (1, 2)]
    monkeypatch.setattr(model, "search", lambda *_, **__: [text])
    (written,) = model.write(torch.randn(1, 5, WIDTH), torch.ones(1, 5, dtype=torch.bool))
    assert [sentence for sentence, _ in written.sentences] == ["st-hebung über v2", "normal"]
    assert all(0 < probability < 1 for _, probability in written.sentences)


def test_a_tokenizer_that_cannot_end_a_text_is_refused_before_training(tokenizer, tmp_path):
    language_models(len(tokenizer))["gpt2"].save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(
        EcgotError, match=r"^report\.language_model: expected a tokenizer with an end-of-text token, got"
    ):
        check_language_model(str(tmp_path))


def test_no_sentence_is_left_without_its_probability(tokenizer, monkeypatch):
    """Not even those behind the longest report of training."""
    model = reporter("llama", tokenizer).eval()
    monkeypatch.setattr(model, "search", lambda *_, **__: [" ".join(REPORTS)])
    tokens, mask = torch.randn(1, 5, WIDTH), torch.ones(1, 5, dtype=torch.bool)
    (whole,) = model.write(tokens, mask)
    monkeypatch.setattr(model, "max_tokens", 3)
    (cut,) = model.write(tokens, mask)
    assert cut == whole
    assert all(0 < probability < 0.9 for _, probability in whole.sentences)  # of random weights


def test_a_published_models_own_search_is_left_out(tokenizer):
    language_model = language_models(len(tokenizer))["bart"]
    language_model.generation_config.min_length = 30
    torch.manual_seed(0)
    model = Reporter(language_model, tokenizer, WIDTH, max_tokens=40).eval()
    assert model.language_model.generation_config.min_length != 30
