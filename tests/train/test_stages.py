"""Training runs: what they leave behind, how they resume, what they refuse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from ecgot.data.ptbxl import read_table
from ecgot.errors import EcgotError
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import build_model, load_alignment, load_reporter
from ecgot.runs.config import Config, resolve
from ecgot.runs.progress import Progress
from ecgot.runs.records import load_folds
from ecgot.runs.run import Run
from ecgot.train import align as align_module
from ecgot.train import loop
from ecgot.train.align import PhraseSource, ReportSource, validate
from ecgot.train.batches import epoch_order, with_reports
from ecgot.train.loop import rate_factor
from ecgot.train.stages import train
from tests.conftest import small_settings


@pytest.fixture
def settings(few, tiny_bert) -> list[str]:
    return small_settings(few, tiny_bert)


@pytest.fixture(scope="module")
def aligned(few, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    """Stage 1 of the settings, trained without a break; do not write into it."""
    config = resolve(None, small_settings(few, tiny_bert))
    return train(config, tmp_path_factory.mktemp("aligned") / "run", stages=["align"], cache_dir=cache_dir)


def weights(run: Run, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / f"{stage}.safetensors")


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=0, rtol=0, msg=name)


class Stopped(Exception):
    pass


def stop_after(epoch_note: str) -> Progress:
    """Progress that interrupts the training once a line with ``epoch_note`` has been reported."""

    def bar(task: str, done: int, _total: int) -> None:
        if stop and task.startswith("align") and done == 2:
            raise Stopped

    def note(line: str) -> None:
        if epoch_note in line:
            stop.append(line)

    stop: list[str] = []
    return Progress(bar, note)


def test_a_run_leaves_configuration_metrics_and_checkpoints(settings, tmp_path, cache_dir):
    run = train(resolve(None, settings), tmp_path / "run", cache_dir=cache_dir)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "align.safetensors",
        "config.json",
        "language_model",
        "metrics.jsonl",
        "report.safetensors",
    ]
    assert run.config() == resolve(None, settings)
    lines = run.metrics()
    assert [(line["stage"], line["epoch"]) for line in lines] == [("align", 1), ("align", 2), ("report", 1)]
    assert {"loss", "contrastive", "token", "validation_recall@1", "seconds"} <= lines[0].keys()
    assert lines[1]["loss"] < lines[0]["loss"]
    assert run.done("align")
    assert run.done("report")


def test_the_same_seed_gives_the_same_weights_and_another_does_not(settings, aligned, tmp_path, cache_dir):
    def align(name, *more):
        run = train(resolve(None, [*settings, *more]), tmp_path / name, stages=["align"], cache_dir=cache_dir)
        return weights(run, "align")

    first = weights(aligned, "align")
    assert_equal(first, align("b"))
    assert not torch.equal(first["project_ecg.weight"], align("c", "seed=1")["project_ecg.weight"])


def test_an_interrupted_run_resumes_to_the_same_weights(settings, aligned, tmp_path, cache_dir):
    config = resolve(None, settings)
    with pytest.raises(Stopped):
        train(
            config,
            tmp_path / "run",
            stages=["align"],
            cache_dir=cache_dir,
            progress=stop_after("align: epoch 1/2"),
        )
    assert not Run(tmp_path / "run").done("align")
    with pytest.raises(EcgotError, match="interrupted"):
        train(config, tmp_path / "run", stages=["report"], cache_dir=cache_dir)
    resumed = train(config, tmp_path / "run", stages=["align"], resume=True, cache_dir=cache_dir)
    assert_equal(weights(aligned, "align"), weights(resumed, "align"))
    assert [line["epoch"] for line in resumed.metrics()] == [1, 2]


@pytest.mark.parametrize(
    ("cut_off_at", "epoch"), [("save_state", 1), ("save", 1), ("save", 2), ("finish", 1)]
)
def test_wherever_a_run_is_cut_off_it_resumes_to_the_same_weights(
    settings, aligned, tmp_path, cache_dir, monkeypatch, cut_off_at, epoch
):
    config = resolve(None, settings)
    method, calls = getattr(Run, cut_off_at), []

    def cut_off(*arguments):
        calls.append(arguments)
        if len(calls) == epoch:
            raise Stopped
        return method(*arguments)

    monkeypatch.setattr(Run, cut_off_at, cut_off)
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    monkeypatch.undo()
    assert not Run(tmp_path / "run").done("align")
    resumed = train(config, tmp_path / "run", stages=["align"], resume=True, cache_dir=cache_dir)
    assert_equal(weights(aligned, "align"), weights(resumed, "align"))
    assert resumed.done("align")


def test_what_is_saved_is_the_average_of_the_steps(settings, tmp_path, cache_dir, monkeypatch):
    steps: list[dict[str, torch.Tensor]] = []
    averaging = loop.update_average

    def noting(kept, model, decay):
        steps.append({name: tensor.clone() for name, tensor in model.state_dict().items()} | {"decay": decay})
        averaging(kept, model, decay)

    monkeypatch.setattr(loop, "update_average", noting)
    config = resolve(None, [*settings, "align.average=0.6"])
    run = train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    saved = weights(run, "align")
    assert [step["decay"] for step in steps[:2]] == pytest.approx([2 / 11, 3 / 12])
    assert steps[-1]["decay"] <= 0.6
    name = "project_ecg.weight"
    torch.manual_seed(config.seed)
    expected = build_model(config, saved["project_text.0.weight"].shape[1]).state_dict()[name]
    for step in steps:
        expected = step["decay"] * expected + (1 - step["decay"]) * step[name]
    torch.testing.assert_close(saved[name], expected)
    counted = "encoder.bn1.num_batches_tracked"
    assert saved[counted] == steps[-1][counted] == len(steps)
    without = train(
        resolve(None, [*settings, "align.average=0"]),
        tmp_path / "other",
        stages=["align"],
        cache_dir=cache_dir,
    )
    torch.testing.assert_close(weights(without, "align")[name], steps[-1][name], atol=0, rtol=0)


def test_a_run_that_diverges_stops(settings, tmp_path, cache_dir):
    config = resolve(None, [*settings, "align.learning_rate=1e30"])
    with pytest.raises(EcgotError, match=r"align: expected a finite loss, got .*align\.learning_rate"):
        train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)


def test_stage_two_follows_alone_and_needs_stage_one(settings, tmp_path, cache_dir):
    config = resolve(None, settings)
    with pytest.raises(EcgotError, match=r"no config\.json"):
        train(config, tmp_path / "run", stages=["report"], cache_dir=cache_dir)
    assert not (tmp_path / "run").exists()
    train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    before = weights(Run(tmp_path / "run"), "align")
    run = train(config, tmp_path / "run", stages=["report"], cache_dir=cache_dir)
    assert run.done("report")
    assert_equal(before, weights(run, "align"))
    both = train(config, tmp_path / "both", cache_dir=cache_dir)
    assert_equal(weights(both, "report"), weights(run, "report"))


def test_settings_of_stage_two_may_change_until_it_has_begun(settings, tmp_path, cache_dir):
    train(resolve(None, settings), tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    other = resolve(None, [*settings, "report.layers=2"])
    run = train(other, tmp_path / "run", stages=["report"], cache_dir=cache_dir)
    assert run.config() == other
    with pytest.raises(EcgotError, match=r"report\.layers: 2 against 1"):
        train(resolve(None, settings), tmp_path / "run", resume=True, cache_dir=cache_dir)


def test_an_epoch_trained_again_replaces_its_metrics(tmp_path):
    run = Run.create(tmp_path / "run", Config(), resume=False)
    for epoch, loss in ((1, 3.0), (2, 2.0), (2, 1.0)):
        run.log("align", epoch, {"loss": loss})
    assert [(line["epoch"], line["loss"]) for line in run.metrics()] == [(1, 3.0), (2, 1.0)]


def test_another_frozen_text_encoder_under_the_same_name_is_refused(settings, tmp_path, cache_dir, tiny_bert):
    path = tmp_path / "bert"
    shutil.copytree(tiny_bert, path)
    config = resolve(None, [*settings, f"text.name={path}"])
    run = train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    text = TextEncoder(str(path))
    load_alignment(run, text)
    with torch.no_grad():
        next(text.parameters()).add_(1)
    with pytest.raises(EcgotError, match=r"got another under text\.name"):
        load_alignment(run, text)


def test_no_label_reaches_the_alignment(settings, aligned, few, tmp_path, cache_dir):
    config = resolve(None, settings)
    blind = tmp_path / "blind"
    shutil.copytree(few, blind)
    table = pd.read_csv(blind / "ptbxl_database.csv", dtype=str)
    table.assign(scp_codes="{}").to_csv(blind / "ptbxl_database.csv", index=False)
    config = replace(config, data=replace(config.data, root=str(blind)))
    second = train(config, tmp_path / "b", stages=["align"], cache_dir=cache_dir)
    assert_equal(weights(aligned, "align"), weights(second, "align"))


def test_a_trained_text_encoder_is_saved_and_loaded(settings, tmp_path, cache_dir, tiny_bert):
    config = resolve(None, [*settings, "text.train=true"])
    run = train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    text = TextEncoder(str(tiny_bert))
    before = text.fingerprint()
    model = load_alignment(run, text)
    assert text.fingerprint() != before
    assert any(name.startswith("text.") for name in model.state_dict())
    # What is validated is what is saved, text encoder and all.
    validation = with_reports(load_folds(config, (9,), cache_dir, Progress()).in_plain_english())
    source = ReportSource(validation.reports, TextEncoder(str(tiny_bert)), None)
    found = validate(model, validation, source, torch.device("cpu"))
    last = [line for line in run.metrics() if line["stage"] == "align"][-1]
    assert found == pytest.approx({name: last[name] for name in found}, rel=1e-4)


def test_phrases_follow_a_text_encoder_that_is_trained(settings, tmp_path, cache_dir, monkeypatch):
    """Else prompts would be read by another encoder than the phrases were learned with."""
    embed, seen = align_module._pooled, []
    batch = PhraseSource.batch
    monkeypatch.setattr(align_module, "_pooled", lambda *given: seen.append(embed(*given)) or seen[-1])

    def learned(source, rows):
        assert source.pooled is seen[-1]
        return batch(source, rows)

    monkeypatch.setattr(PhraseSource, "batch", learned)
    config = resolve(None, [*settings, "text.train=true"])
    train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    assert len(seen) == config.align.epochs
    assert not torch.allclose(seen[0], seen[1])


def test_a_csv_of_reports_beside_originals_says_what_is_learned(settings, few, tmp_path, cache_dir):
    ids = read_table(few).ecg_id
    csv = tmp_path / "reports.csv"
    csv.write_text("ecg_id,report\n" + "".join(f"{number},translated text\n" for number in ids))
    notes: list[str] = []
    config = resolve(None, [*settings, f"data.reports_csv={csv}"])
    train(
        config, tmp_path / "run", stages=["align"], cache_dir=cache_dir, progress=Progress(note=notes.append)
    )
    assert any("learn from their report column" in note for note in notes)


def test_a_stored_report_is_looked_up_by_row(tiny_bert, dataset):
    from ecgot.models.token_store import embed_texts

    text = TextEncoder(str(tiny_bert)).eval()
    store = embed_texts(text, sorted(set(dataset.reports)), cache_dir=None)
    source = ReportSource(dataset.reports, text, store)
    rows = torch.tensor([5, 0, 77])
    tokens, ids = source.batch(rows, torch.device("cpu"))
    with torch.no_grad():
        direct = text([dataset.reports[row] for row in rows.tolist()])
    torch.testing.assert_close(tokens.pooled, direct.pooled, atol=1e-4, rtol=1e-4)
    same = [dataset.reports[a] == dataset.reports[b] for a in rows.tolist() for b in rows.tolist()]
    assert (ids[:, None] == ids).flatten().tolist() == same


def test_records_without_report_take_no_part(dataset):
    def only(*reports: str):
        table = replace(dataset.table, reports=("",) * (len(dataset) - len(reports)) + reports)
        return with_reports(replace(dataset, table=table))

    assert only("sinus rhythm", "atrial fibrillation").reports == ("sinus rhythm", "atrial fibrillation")
    for too_few in ((), ("sinus rhythm",)):
        with pytest.raises(
            EcgotError, match=f"2 or more records with usable report text, got {len(too_few)}"
        ):
            only(*too_few)


def test_an_existing_run_or_folder_is_not_overwritten(settings, tmp_path, cache_dir):
    config = resolve(None, settings)
    train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    with pytest.raises(EcgotError, match="which holds a run"):
        train(config, tmp_path / "run", cache_dir=cache_dir)
    other = resolve(None, [*settings, "align.width=16"])
    with pytest.raises(EcgotError, match=r"align\.width: 32 against 16"):
        train(other, tmp_path / "run", resume=True, cache_dir=cache_dir)
    with pytest.raises(EcgotError, match="seed: 0 against 1"):
        train(resolve(None, [*settings, "seed=1"]), tmp_path / "run", resume=True, cache_dir=cache_dir)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(EcgotError, match="new or empty folder"):
        train(config, tmp_path / "full", cache_dir=cache_dir)
    with pytest.raises(EcgotError, match="expected one of align, report"):
        train(config, tmp_path / "x", stages=["distil"], cache_dir=cache_dir)


def test_a_bad_configuration_leaves_no_folder(settings, tmp_path, cache_dir):
    for bad in (
        "encoder.name=vgg",
        "text.name=absent/model",
        "report.language_model=absent/model",
        "device=tpu9",
        "align.phrase_min_count=5000",
        *([] if torch.cuda.is_available() else ["cuda_graph=true"]),
    ):
        with pytest.raises(EcgotError):
            train(resolve(None, [*settings, bad]), tmp_path / "run", cache_dir=cache_dir)
        assert not (tmp_path / "run").exists(), bad


def test_checkpoints_of_another_configuration_or_damaged_are_named(settings, tmp_path, cache_dir, tiny_bert):
    run = train(resolve(None, settings), tmp_path / "run", cache_dir=cache_dir)
    text = TextEncoder(str(tiny_bert))
    saved = json.loads((run.folder / "config.json").read_text())

    def load_with(**encoder):
        changed = json.loads(json.dumps(saved))
        for section, values in encoder.items():
            changed[section] |= values
        (run.folder / "config.json").write_text(json.dumps(changed))
        return load_alignment(run, text)

    with pytest.raises(EcgotError, match=r"another configuration .*encoder\.name"):
        load_with(encoder={"name": "resnet1d_small"})
    with pytest.raises(EcgotError, match=r"another configuration .*align\.width"):
        load_with(align={"width": 64})
    load_with()
    path = run.folder / "align.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    for given in (text, None):
        with pytest.raises(EcgotError, match="damaged"):
            load_alignment(run, given)
    path.write_bytes(whole)
    path = run.folder / "report.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(EcgotError, match="damaged"):
        load_reporter(run, 128)
    path.unlink()
    with pytest.raises(EcgotError, match="--stage report"):
        load_reporter(run, 128)
    with pytest.raises(EcgotError, match=r"no config\.json"):
        Run.open(Path("absent"))


def test_epochs_visit_every_row_once():
    for lengths in (None, torch.arange(103)):
        batches = epoch_order(103, 10, seed=0, epoch=1, lengths=lengths)
        assert sorted(torch.cat(batches).tolist()) == list(range(103))
    assert len(torch.cat(epoch_order(101, 10, 0, 0))) == 100  # a batch of one has no contrast
    assert not torch.equal(epoch_order(50, 50, 0, 0)[0], epoch_order(50, 50, 0, 1)[0])
    even = epoch_order(400, 10, 0, 0, lengths=torch.arange(400) % 40)
    spread = torch.stack([(batch % 40).float().std() for batch in even]).mean()
    assert spread < 3  # against 11.5 of batches that ignore the length


@pytest.mark.parametrize("total", [1, 2, 5, 100])
def test_the_rate_rises_and_falls_within_any_number_of_steps(total):
    factors = [rate_factor(step, total) for step in range(total)]
    top = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if total == 100:
        assert (top, max(factors)) == (20, 1.0)
        assert factors[-1] < 0.01


def test_an_optimizer_of_other_parameters_is_refused_and_not_stepped(tmp_path):
    config = resolve(None, ["data.root=x"])
    run = Run.create(tmp_path / "run", config, resume=False)
    schedule = loop.Schedule(epochs=2, steps=1, weight_decay=0.0)

    def training(model: torch.nn.Module) -> loop._Training:
        return loop._Training(run, "align", model, loop.parameter_groups(model, lambda _name: 1e-3), schedule)

    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    first = training(model)
    first.step(model(torch.ones(4, 3)).square().mean())
    first.save_state(1)
    assert training(model).resume() == 1
    state = run.load_state("align")
    moments = state["optimizer"]["state"]
    moments[0], moments[1] = moments[1], moments[0]  # as of modules in another order
    run.save_state("align", state)
    with pytest.raises(EcgotError, match="got an optimizer of other parameters"):
        training(model).resume()
