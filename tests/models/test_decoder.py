"""The decoder in plain torch writes what transformers' search writes with the same weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ecgot.errors import EcgotError
from ecgot.models.beam_search import search
from ecgot.models.decoder import Decoder, read_shape
from ecgot.models.decoder_writer import DecoderWriter
from ecgot.models.language_models import build_reporter, empty_reporter, save_language_model_shape
from ecgot.models.reporter import Reporter
from ecgot.models.writer import Writer, WrittenReport
from ecgot.runs.checkpoints import load_reporter
from ecgot.runs.run import PRETRAINED, Run

REPORTS = (
    "sinus rhythm. normal ecg.",
    "atrial fibrillation. left bundle branch block. st depression in v4 - v6.",
    "sinus bradycardia, first degree av block. otherwise normal ecg.",
)
WIDTH = 10
RECORDERS = ("AT-6", "CS-12")


def reporter(seed: int, *, layers: int, hidden_size: int, max_tokens: int, end: float) -> Reporter:
    """A reporter from scratch with wide random weights, so that it has preferences, and ends after a while.

    ``end`` is how much longer than others' the end-of-text token's embedding is: the more extreme its logit.
    """
    torch.manual_seed(seed)
    made = build_reporter(
        "scratch",
        WIDTH,
        reports=REPORTS,
        max_tokens=max_tokens,
        hidden_size=hidden_size,
        layers=layers,
        recorders=RECORDERS,
    ).eval()
    with torch.no_grad():
        for parameter in made.language_model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
        made.language_model.get_input_embeddings().weight[made.eos_id] *= end
    return made


def same_in_plain_torch(of: Reporter, folder: Path) -> DecoderWriter:
    save_language_model_shape(of, folder)
    made = DecoderWriter(folder, WIDTH, max_tokens=of.max_tokens, recorders=of.recorders).eval()
    missing, unexpected = made.load_state_dict(of.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["language_model.lm_head.weight"]  # tied
    return made


def ecgs(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return 3 * torch.randn(len(lengths), max(lengths), WIDTH, generator=generator), mask


def assert_same(found: list[WrittenReport], expected: list[WrittenReport]) -> None:
    assert [each.text for each in found] == [each.text for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert [text for text, _ in one.sentences] == [text for text, _ in other.sentences]
        assert [p for _, p in one.sentences] == pytest.approx([p for _, p in other.sentences], abs=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 48, 96, 144]),
    max_tokens=st.sampled_from([1, 2, 5, 12, 30]),
    end=st.sampled_from([0.3, 1.0, 1.5, 3.0]),
    num_beams=st.integers(1, 6),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
def test_it_writes_what_transformers_does(
    tmp_path_factory, seed, layers, hidden_size, max_tokens, end, num_beams, lengths
):
    expected = reporter(seed, layers=layers, hidden_size=hidden_size, max_tokens=max_tokens, end=end)
    found = same_in_plain_torch(expected, tmp_path_factory.mktemp("model"))
    tokens, mask = ecgs(seed, lengths)
    names = [("", *RECORDERS)[(seed + row) % 3] for row in range(len(lengths))]
    wanted = expected.write(tokens, mask, recorders=names, num_beams=num_beams)
    assert_same(found.write(tokens, mask, recorders=names, num_beams=num_beams), wanted)
    for row in range(len(lengths)):  # alone, and without its padding
        own = slice(row, row + 1)
        alone = found.write(
            tokens[own, : lengths[row]], mask[own, : lengths[row]], recorders=names[own], num_beams=num_beams
        )
        assert_same(alone, wanted[own])


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_its_tokens_are_those_of_transformers_and_so_are_their_probabilities(num_beams, tmp_path):
    """Texts alone would not show a special token in the midst, or where the search ended."""
    expected = reporter(7, layers=2, hidden_size=48, max_tokens=20, end=3.0)
    writer = same_in_plain_torch(expected, tmp_path)
    tokens, mask = ecgs(5, [6] * 24)
    prefix, attention = expected._condition(tokens, mask, None)
    ids = expected.language_model.generate(
        inputs_embeds=prefix,
        attention_mask=attention,
        generation_config=GenerationConfig(
            max_new_tokens=20, num_beams=num_beams, do_sample=False, pad_token_id=0, eos_token_id=2
        ),
    )
    with torch.no_grad():
        texts = search(writer.language_model, prefix, attention, beams=num_beams, max_tokens=20)
        counts = set()
        for row, (text, own) in enumerate(zip(texts, ids.tolist(), strict=True)):
            whole = own[: own.index(2)] if 2 in own else own
            assert text.ids == whole
            counts.add(len(whole))
            embedded = expected.language_model.get_input_embeddings()(torch.tensor([whole]).long())
            given = torch.cat([prefix[row : row + 1], embedded], 1)
            logits = expected.language_model(inputs_embeds=given).logits[0, -len(whole) - 1 : -1]
            known = logits.log_softmax(-1)[range(len(whole)), whole]
            torch.testing.assert_close(text.log_probability, known, atol=1e-4, rtol=1e-4)
    assert len(counts) > 8  # some end early, others late


def test_words_in_other_tokens_get_the_probability_of_their_own(tmp_path, monkeypatch):
    """As when the search finds "si" and "nus" where the tokenizer has "sinus"."""
    expected = reporter(1, layers=2, hidden_size=48, max_tokens=20, end=1.0)
    writer = same_in_plain_torch(expected, tmp_path)
    tokens, mask = ecgs(2, [4, 6])
    text = REPORTS[0]
    letters = [writer.tokenizer.token_to_id(each) for each in "▁" + text.replace(" ", "▁")]
    assert writer.tokenizer.decode(letters) == text
    from ecgot.models import decoder_writer
    from ecgot.models.beam_search import Text

    found = Text(letters, torch.zeros(len(letters)))
    monkeypatch.setattr(decoder_writer, "search", lambda *_, **__: [found, found])
    monkeypatch.setattr(expected, "search", lambda *_, **__: [text, text])
    assert_same(writer.write(tokens, mask), expected.write(tokens, mask))


def test_unknown_recorders_and_wrong_numbers_of_them(tmp_path):
    of = reporter(3, layers=1, hidden_size=48, max_tokens=8, end=1.0)
    writer = same_in_plain_torch(of, tmp_path)
    tokens, mask = ecgs(1, [5, 5])
    assert writer.write(tokens, mask, recorders=["no such", ""]) == writer.write(tokens, mask)
    with pytest.raises(ValueError, match=r"recorders: expected 2, .* got 1"):
        writer.write(tokens, mask, recorders=["AT-6"])
    assert writer.write(tokens[:0], mask[:0]) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "gpt2"),
        ("tie_word_embeddings", False),
        ("num_key_value_heads", 1),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        ("vocab_size", None),
    ],
)
def test_another_kind_of_model_is_not_taken_for_its_own(name, value, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(PRETRAINED / "language_model", folder)
    config = json.loads((folder / "config.json").read_text())
    assert read_shape(folder).width == config["hidden_size"]
    changed = config | {name: value}
    if value is None:
        del changed[name]
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(EcgotError, match=f"expected a language model in .*{name.split('_')[0]}") as caught:
        DecoderWriter(folder, WIDTH)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_or_model_is_one_line(tmp_path):
    with pytest.raises(EcgotError, match="expected a language model in"):
        DecoderWriter(tmp_path, WIDTH)
    shutil.copy(PRETRAINED / "language_model" / "config.json", tmp_path)
    with pytest.raises(EcgotError, match="expected a tokenizer in") as caught:
        DecoderWriter(tmp_path, WIDTH)
    assert "\n" not in str(caught.value)


def test_missing_weights_are_missed():
    decoder = Decoder(read_shape(PRETRAINED / "language_model"))
    weights = load_file(PRETRAINED / "report.safetensors")
    own = {
        name.removeprefix("language_model."): value
        for name, value in weights.items()
        if name.startswith("language_model.")
    }
    assert decoder.load_state_dict(own) == ([], [])
    del own["model.layers.1.self_attn.k_proj.weight"]
    missing, unexpected = decoder.load_state_dict(own, strict=False)
    assert missing == ["layers.1.qkv.weight"]
    assert len(unexpected) == 2
    again = Decoder(decoder.shape)
    assert again.load_state_dict(decoder.state_dict()) == ([], [])


@pytest.fixture(scope="module")
def packaged() -> tuple[Writer, Reporter]:
    """The packaged writer as runs load it, and the same weights through transformers."""
    run = Run.open(PRETRAINED)
    width = run.shape("report", "projector.0.weight")[0]
    through = empty_reporter(
        run.folder / "language_model",
        width,
        max_tokens=run.config().report.max_tokens,
        recorders=run.recorders,
    ).eval()
    run.load("report", through)
    writer = load_reporter(run, width)
    assert isinstance(writer, DecoderWriter)
    return writer, through


def real_tokens(ptbxl: Path, count: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Encoder tokens and masks of real records from all over the data set, and their recorders."""
    from ecgot.data.ptbxl import read_table
    from ecgot.data.record import read_record
    from ecgot.models.encoders import fuse_norms
    from ecgot.runs.checkpoints import load_alignment

    table = read_table(ptbxl)
    rows = torch.linspace(0, len(table.record_paths) - 1, count).long().tolist()
    signals = [read_record(ptbxl / table.record_paths[row]).signal_mv for row in rows]
    encoder = fuse_norms(load_alignment(Run.open(PRETRAINED), None).encoder)
    with torch.no_grad():
        encoded = encoder(torch.stack([torch.from_numpy(each) for each in signals]), None)
    return encoded.tokens, encoded.mask, [table.recorders[row] for row in rows]


def test_the_packaged_model_writes_the_same_of_real_records(ptbxl, packaged):
    writer, through = packaged
    tokens, mask, names = real_tokens(ptbxl, 128)
    for num_beams in (1, 4):
        expected = [
            report
            for start in range(0, 128, 16)
            for report in through.write(
                tokens[start : start + 16],
                mask[start : start + 16],
                recorders=names[start : start + 16],
                num_beams=num_beams,
            )
        ]
        found = writer.write(tokens, mask, recorders=names, num_beams=num_beams)
        assert_same(found, expected)
        assert len({report.text for report in found}) > 20
    alone = [
        writer.write(tokens[row : row + 1], mask[row : row + 1], recorders=names[row : row + 1])[0]
        for row in range(0, 128, 4)
    ]
    assert_same(alone, found[::4])


LIGHT = """
import sys
import torch
from ecgot.inference.zeroshot import class_scores, load_prompts
from ecgot.runs.checkpoints import load_alignment, load_reporter
from ecgot.runs.run import PRETRAINED, Run

run = Run.open(PRETRAINED)
model = load_alignment(run, None)
writer = load_reporter(run, model.ecg_width)
with torch.no_grad():
    encoded = model.encoder(torch.randn(2, 12, 1000))
    scores = class_scores(model.project_tokens(encoded), load_prompts(run.prompts, torch.device("cpu")))
    assert len(writer.write(encoded.tokens, encoded.mask)) == 2
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_reading_imports_no_heavy_module():
    """A first answer in a fresh process would wait seconds for them."""
    heavy = ["transformers", "numba", "triton", "sklearn", "pandas", "torch._dynamo", "sympy", "wfdb"]
    found = subprocess.run(
        [sys.executable, "-c", LIGHT, *heavy, "tokenizers"], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["tokenizers"]  # which it does need


def test_the_writer_s_tokenizer_is_the_reporter_s(tmp_path):
    of = reporter(0, layers=1, hidden_size=48, max_tokens=8, end=1.0)
    writer = same_in_plain_torch(of, tmp_path)
    assert isinstance(of.tokenizer, PreTrainedTokenizerFast)
    for text in (*REPORTS, "", "öäü ß 0.5 mv, [EOS] x"):
        assert writer.tokenizer.encode(text, add_special_tokens=False).ids == of._tokenized(text)
