"""The tables of benchmarks/results/README.md come from the evaluations beside it."""

import json
from pathlib import Path

import pytest

from benchmarks.results import collect, main, rebuilt

ROOT = Path(__file__).parents[2]


def evaluation(macro: float) -> dict:
    ranking = {"macro": macro, "low": macro - 0.01, "high": macro + 0.01}
    return {"score": "phrase", "zero_shot": {"superclass": ranking}, "probe": {}}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, macro in ((0, 0.90), (1, 0.94)):
        folder = tmp_path / "made" / "recipe" / f"ot-seed{seed}"
        folder.mkdir(parents=True)
        (folder / "evaluation.json").write_text(json.dumps(evaluation(macro)))
        (folder / "align.safetensors").write_text("weights")
    return tmp_path / "made"


def test_the_committed_tables_are_those_of_the_committed_evaluations():
    main(["check", str(ROOT / "benchmarks/results/runs"), str(ROOT / "benchmarks/results/README.md")])


def test_a_table_has_a_row_a_seed_and_their_mean(runs):
    text = "before\n<!-- table zero-shot recipe/ot-* -->\nstale\n<!-- end -->\nafter\n"
    made = rebuilt(text, runs)
    assert "stale" not in made
    assert "| zero-shot, phrase score, ot | 0 | 0.900 [0.890, 0.910] | - | - | - |" in made
    assert "| zero-shot, phrase score, ot | mean | **0.920** | - | - | - |" in made
    assert made.startswith("before\n")
    assert made.endswith("after\n")
    assert rebuilt(made, runs) == made


def test_a_changed_evaluation_is_noticed(runs, tmp_path):
    results = tmp_path / "README.md"
    results.write_text("<!-- table zero-shot recipe/ot-* -->\n<!-- end -->\n")
    main(["write", str(runs), str(results)])
    main(["check", str(runs), str(results)])
    (runs / "recipe/ot-seed1/evaluation.json").write_text(json.dumps(evaluation(0.95)))
    with pytest.raises(SystemExit, match="are not those of"):
        main(["check", str(runs), str(results)])


def test_a_system_that_an_older_evaluation_lacks_is_left_out(runs):
    metric = {"bleu_4": {"value": 0.5, "low": None, "high": None}}
    for seed, systems in ((0, ["generated"]), (1, ["generated", "same_codes"])):
        path = runs / f"recipe/ot-seed{seed}/evaluation.json"
        path.write_text(json.dumps({"reports": dict.fromkeys(systems, metric)}))
    made = rebuilt("<!-- table reports recipe/ot-* -->\n<!-- end -->", runs)
    assert made.count("| generated, ot |") == 3  # and their mean
    assert made.count("| same codes, ot | 1 | 0.500 |") == 1


def test_a_missing_run_is_named(runs):
    with pytest.raises(SystemExit, match=r"recipe/none-\*"):
        rebuilt("<!-- table zero-shot recipe/none-* -->\n<!-- end -->", runs)


def test_evaluations_alone_are_collected(runs, tmp_path):
    (runs / "recipe/ot-seed0/evaluation.json").write_text('{"settings": {"data": "/home/someone/ptbxl"}}')
    collect(runs, tmp_path / "kept")
    text = (tmp_path / "kept/recipe/ot-seed0/evaluation.json").read_text()
    assert json.loads(text) == {"settings": {"data": "ptbxl"}}
    kept = [path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert kept == ["evaluation.json", "evaluation.json"]
