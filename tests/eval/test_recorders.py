"""Reports in the words of a recorder: what is learned, told, kept and refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks.reports_by_recorder import table
from ecgot.data.ptbxl import read_table
from ecgot.errors import EcgotError
from ecgot.eval.evaluate import evaluate
from ecgot.eval.report_metrics import shuffled
from ecgot.inference.export import export
from ecgot.inference.reader import EcgReader
from ecgot.models.reporter import Reporter
from ecgot.runs.config import resolve
from ecgot.runs.run import Run
from ecgot.train.stages import train
from tests.conftest import small_settings

RECORDERS = ("CS-12", "AT-6")
LEARN = ("report.epochs=12", "report.batch_size=8", "report.learning_rate=5e-3", "report.max_tokens=24")


@pytest.fixture(scope="module")
def recorded(few, tmp_path_factory):
    """The records of ``few`` by two recorders, each of which ends its reports by words of its own, a third
    with too few to be known, and by none."""
    folder = tmp_path_factory.mktemp("recorded") / "data"
    folder.mkdir()
    for source in few.iterdir():
        if source.name != "ptbxl_database.csv":
            (folder / source.name).symlink_to(source)
    table = pd.read_csv(few / "ptbxl_database.csv", dtype=str, keep_default_na=False)
    names = np.array([*RECORDERS, ""], dtype=object)[np.arange(len(table)) % 3]
    names[:2] = "rare"
    ending = {"CS-12": "read by the program", "AT-6": "confirmed", "": "", "rare": ""}
    table["device"] = names
    table["report"] = [f"sinus rhythm. {ending[name]}" for name in names]
    table.to_csv(folder / "ptbxl_database.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def run(recorded, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    settings = [*small_settings(recorded, tiny_bert), "align.epochs=1", *LEARN]
    return train(resolve(None, settings), tmp_path_factory.mktemp("recorders") / "run", cache_dir=cache_dir)


def test_reports_take_the_words_of_the_recorder(run, recorded, tmp_path):
    assert json.loads((run.folder / "recorders.json").read_text()) == ["AT-6", "CS-12"]  # the rare one is not
    record = next((recorded / "records100").rglob("*.hea")).with_suffix("")
    exported = tmp_path / "exported"
    export(run, exported)
    assert ": AT-6, CS-12)" in (exported / "README.md").read_text()
    for reader in (EcgReader(run), *map(EcgReader.from_pretrained, (exported, str(exported)))):
        assert reader.recorders == ("AT-6", "CS-12")
        assert reader(record).written  # of an unknown one
        assert "confirmed" in (reader(record, recorder="AT-6").written or "")
        assert "program" in (reader(record, recorder="CS-12 ").written or "")
        with pytest.raises(EcgotError, match=r"recorder: expected one of 'AT-6', 'CS-12', got 'rare'$"):
            reader(record, recorder="rare")
        assert reader(record, recorder="AT-6").to_dict()["recorder"] == "AT-6"
        assert reader(record).recorder is None


def test_evaluation_tells_recorders_and_does_not(run, recorded, cache_dir):
    found = evaluate(run, recorded, num_beams=1, resamples=5, cache_dir=cache_dir)
    systems = {name: values["rouge_l"]["value"] for name, values in found.reports.items()}
    assert systems["generated"] > 0.9
    assert systems["generated_recorder_unknown"] < systems["generated"] - 0.05
    # All of a recorder say the same here.
    assert systems["shuffled"] == pytest.approx(systems["generated"], abs=0.03)
    assert systems["same_codes_and_recorder"] > systems["same_codes"]
    assert "generated_recorder_unknown" in found.dialect["recorders"]
    named, unknown = table(recorded, [run.folder]).splitlines()[2:]
    counts = [int(line.split(" | ")[2]) for line in (named, unknown)]
    assert sum(counts) == found.references
    recorders = read_table(recorded, folds=(9,)).recorders
    assert counts[0] == sum(map(bool, recorders))
    assert float(named.split(" | ")[5]) > 0.9


def test_a_model_without_recorders_is_told_none(recorded, tiny_bert, cache_dir, tmp_path):
    settings = [*small_settings(recorded, tiny_bert), "align.epochs=1", "report.by_recorder=false"]
    run = train(resolve(None, settings), tmp_path / "run", cache_dir=cache_dir)
    assert not (run.folder / "recorders.json").exists()
    found = evaluate(run, recorded, num_beams=1, resamples=5, cache_dir=cache_dir)
    assert "generated_recorder_unknown" not in found.reports
    assert "recorders" not in found.dialect
    record = next((recorded / "records100").rglob("*.hea")).with_suffix("")
    with pytest.raises(EcgotError, match=r"recorder: expected none, .* got 'AT-6'"):
        EcgReader(run)(record, recorder="AT-6")


class Stopped(Exception):
    pass


def test_an_interrupted_stage_keeps_its_names_and_a_new_one_forgets_them(
    run, recorded, cache_dir, tmp_path, monkeypatch
):
    folder, database = tmp_path / "run", recorded / "ptbxl_database.csv"
    shutil.copytree(run.folder, folder)
    (folder / "report.safetensors").unlink()

    def go_on(*settings: str) -> Run:
        config = resolve(None, ["report.epochs=2", *settings], base=run.config())
        return train(config, folder, stages=["report"], cache_dir=cache_dir)

    def cut_off(*_arguments):
        raise Stopped

    monkeypatch.setattr(Run, "finish", cut_off)
    with pytest.raises(Stopped):
        go_on()
    monkeypatch.undo()
    names = (folder / "recorders.json").read_text(encoding="utf-8")
    (folder / "recorders.json").write_text("[]", encoding="utf-8")
    with pytest.raises(EcgotError, match=r"state of stage report in .* fits the configured model"):
        go_on()
    (folder / "recorders.json").write_text(names, encoding="utf-8")
    # The table is edited: the weights still stand for the first names.
    before = database.read_text(encoding="utf-8")
    database.write_text(before.replace("CS-12", "CS-13"), encoding="utf-8")
    try:
        assert go_on().recorders == ("AT-6", "CS-12")
    finally:
        database.write_text(before, encoding="utf-8")
    assert Run(folder).done("report")
    (folder / "report.safetensors").unlink()
    assert go_on("report.by_recorder=false").recorders == ()
    record = next((recorded / "records100").rglob("*.hea")).with_suffix("")
    assert EcgReader(Run.open(folder))(record).report is not None


def test_some_recorders_are_hidden_in_training(recorded, run, cache_dir, tmp_path, monkeypatch):
    told: list[str] = []
    forward = Reporter.forward

    def noting(self, tokens, mask, reports, *, recorders=None):
        if self.training:
            told.extend(recorders)
        return forward(self, tokens, mask, reports, recorders=recorders)

    monkeypatch.setattr(Reporter, "forward", noting)
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "report.safetensors").unlink()
    settings = ["report.epochs=8"]
    train(resolve(None, settings, base=run.config()), folder, stages=["report"], cache_dir=cache_dir)
    known = read_table(recorded, folds=range(1, 9)).recorders
    share = sum(map(bool, told)) / (8 * sum(map(bool, known)))
    assert 0.7 < share < 0.9


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", "[", "[" * 100_000, '["AT-6", "AT-6"]', '["", "a"]', '["AT-6 ", "a"]', '["one"]', "[]"],
)
def test_damaged_names_are_one_line(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "recorders.json").write_text(text)
    for use in (EcgReader, lambda damaged: export(damaged, tmp_path / "exported")):
        with pytest.raises(EcgotError, match=r"recorders\.json|recorder_embedding") as caught:
            use(Run.open(folder))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_a_shuffled_control_keeps_the_recorder():
    patients = np.array([1, 1, 2, 3, 4, 5, 6, 7, 8])
    recorders = ["a", "a", "a", "a", "b", "b", "", "", "c"]
    rows, other = shuffled(patients, recorders)
    assert sorted(rows) == sorted(other) == list(range(8))  # nobody else has recorder c
    assert (patients[rows] != patients[other]).all()
    assert [recorders[row] for row in rows] == [recorders[row] for row in other]
    with pytest.raises(ValueError, match=r"recorders: expected 2, .* got 1"):
        shuffled(np.array([1, 1]), ["a"])
    rows, other = shuffled(np.array([1, 1]), ["a", "a"])
    assert len(rows) == len(other) == 0
