"""First contact with a GPU, rehearsed without one: what a step's death leaves, the verdict, and the whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.first_contact import (
    counters,
    goals,
    items,
    journal,
    runner,
    sanitizers,
    streaming,
    summary,
    truth,
)
from benchmarks.first_contact.goals import Goal
from benchmarks.first_contact.items import Item
from benchmarks.first_contact.steps import KERNEL_TESTS, REHEARSED, STEPS, Step
from ecgot.kernels.ot import reference
from tests.benchmarks import faulty_items

ROOT = Path(__file__).parents[2]
COMMIT = "0000000"
FAULTY = {"faulty": Step("tests.benchmarks.faulty_items", 60)}


def call(out, steps=FAULTY, seconds=60.0) -> runner.Call:
    out.mkdir(exist_ok=True)
    return runner.Call(out, time.perf_counter() + seconds, steps, commit=COMMIT)


def ends(out, step) -> dict[str, str]:
    told = journal.events(out, COMMIT)
    return {item: end["event"] for item, end in journal.ended(told, step).items()}


def started(out) -> Counter[str]:
    told = journal.events(out, COMMIT)
    return Counter(each["item"] for each in told if each["event"] == "started" and each["item"])


# --- steps that go wrong ------------------------------------------------------------------------------------


def test_an_item_that_dies_takes_no_other_with_it(tmp_path):
    runner.run(call(tmp_path), ["faulty"])
    assert ends(tmp_path, "faulty") == {
        "raises": "failed",
        "dies": "crashed",
        "hangs": "crashed",
        "takes long": "done",
        "good": "done",
        "": "done",
    }
    cases = [row["case"] for row in journal.rows(tmp_path, journal.MEASURED, COMMIT)]
    assert cases == ["before it raised", "before it died", "before it hung", "takes long", "good"]
    text = (tmp_path / journal.SUMMARY).read_text()
    assert "- faulty raises: failed, RuntimeError: out of something\n" in text
    assert "- faulty dies: crashed, exit code -6: Fatal Python error: Aborted" in text
    assert "- faulty hangs: crashed, exit code 1: Timeout (0:00:00.5" in text
    assert "- faulty: done" in text
    assert started(tmp_path) == dict.fromkeys(("raises", "dies", "hangs", "takes long", "good"), 1)
    runner.run(call(tmp_path), ["faulty"])
    assert started(tmp_path)["dies"] == 1


def test_a_call_that_is_ended_leaves_no_process_and_the_next_goes_on(tmp_path):
    """A process that outlived it would keep the GPU from whoever comes next."""
    (tmp_path / "slow").touch()
    journal.create(tmp_path)
    for item in ("raises", "dies", "hangs"):
        journal.tell(tmp_path, COMMIT, "done", "faulty", item)
    code = f"from tests.benchmarks import test_first_contact as t; t.run_forever({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not started(tmp_path)["takes long"]:
        assert process.poll() is None
        time.sleep(0.2)
    (child,) = (int(each["process"]) for each in journal.events(tmp_path, COMMIT) if each.get("process"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    (tmp_path / "slow").unlink()
    runner.run(call(tmp_path), ["faulty"])
    assert started(tmp_path) == {"takes long": 2, "good": 1}
    assert ends(tmp_path, "faulty")["good"] == "done"


def run_forever(out):
    runner.end_with_a_signal()
    runner.run(call(Path(out), seconds=600.0), ["faulty"])


def test_a_step_is_cut_off_at_its_limit_and_nothing_starts_after_the_end(tmp_path):
    (tmp_path / "slow").touch()
    steps = {"cut": Step("tests.benchmarks.faulty_items", 0.5), "late": FAULTY["faulty"]}
    ending = call(tmp_path, steps, seconds=runner.LEAST + 0.3)
    runner.run(ending, ["cut", "late"])
    assert not ends(tmp_path, "cut")
    events = [(each["step"], each["event"]) for each in journal.events(tmp_path, COMMIT) if not each["item"]]
    assert events == [("wheels", "note"), ("cut", "started"), ("cut", "cut off")]
    text = (tmp_path / journal.SUMMARY).read_text()
    assert "- cut: cut off" in text
    assert "- late: not reached" in text


def test_an_item_that_never_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv("ECGOT_COMMIT", COMMIT)
    journal.create(tmp_path)
    for _ in range(items.TRIES):  # in calls that were killed outright
        journal.tell(tmp_path, COMMIT, "started", "faulty", "dies", process=1)
    found = [item for item in faulty_items.items(None, tmp_path) if item.name in ("dies", "good")]
    assert items.run(found, "faulty", tmp_path) == 0
    assert ends(tmp_path, "faulty") == {"dies": "given up", "good": "done"}


def test_another_commit_is_measured_anew(tmp_path, monkeypatch):
    journal.create(tmp_path)
    *_, good = faulty_items.items(None, tmp_path)
    for version in ("1111111", COMMIT, COMMIT):
        monkeypatch.setenv("ECGOT_COMMIT", version)
        items.run([good], "faulty", tmp_path)
    for version in ("1111111", COMMIT):
        assert [row["item"] for row in journal.rows(tmp_path, journal.MEASURED, version)] == ["good"]


def test_what_only_warms_up_tells_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("ECGOT_COMMIT", COMMIT)
    journal.create(tmp_path)
    ran = []
    items.run([Item("good", lambda: ran.append(1) or [{"case": "good"}])], "faulty", tmp_path, warm=True)
    assert ran
    assert not journal.events(tmp_path, COMMIT)
    assert not journal.rows(tmp_path, journal.MEASURED, COMMIT)


def test_a_module_that_does_not_load_ends_its_step(tmp_path):
    runner.run(call(tmp_path, {"missing": Step("tests.benchmarks.no_such_items", 60)}), ["missing"])
    notes = [each["why"] for each in journal.events(tmp_path, COMMIT) if each["event"] == "note"]
    assert any("a process died before its first item" in why and "no_such_items" in why for why in notes)


def test_a_cut_line_is_left_out_and_the_next_one_whole(tmp_path):
    journal.create(tmp_path)
    row = {"step": "s", "item": "i", "ecgot commit": COMMIT}
    journal.append(tmp_path, journal.MEASURED, row | {"case": "first"})
    for name in (journal.MEASURED, journal.EVENTS):
        with (tmp_path / name).open("a") as file:
            file.write('{"event": "sta')
    journal.append(tmp_path, journal.MEASURED, row | {"case": "second, of two"})
    journal.tell(tmp_path, COMMIT, "done", "s")
    cases = [row["case"] for row in journal.rows(tmp_path, journal.MEASURED, COMMIT)]
    assert cases == ["first", "second, of two"]
    assert [each["event"] for each in journal.events(tmp_path, COMMIT)] == ["done"]


def test_a_folder_of_another_format_is_refused(tmp_path):
    (tmp_path / journal.TESTS).write_text("test,outcome\n")
    with pytest.raises(
        SystemExit, match=r"tests.csv: expected the columns test,outcome,seconds,.*, got test,"
    ):
        journal.create(tmp_path)


# --- the tests' own step ------------------------------------------------------------------------------------

TESTS = """
import os, pytest
@pytest.mark.parametrize("case", [0, 1, 2])
def test_many(case):
    assert case != 1, "one is wrong"
def test_lost():
    os._exit(1)
def test_skipped():
    pytest.skip("not here")
@pytest.fixture
def broken():
    raise ValueError("no fixture")
def test_set_up(broken):
    pass
"""


def test_each_test_is_a_row_as_it_ends(tmp_path):
    journal.create(tmp_path)
    known = tmp_path / "known.txt"
    path = tmp_path / "test_made.py"
    path.write_text(TESTS)
    known.write_text("test_made.py::test_many[2]")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.first_contact.each_test", "-n", "1"]
    command += ["-p", "no:cacheprovider", "--contact-out", str(tmp_path), "--contact-known", str(known)]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), "-c", os.devnull, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "ECGOT_COMMIT": COMMIT},
        capture_output=True,
        text=True,
    )
    rows = journal.rows(tmp_path, journal.TESTS, COMMIT)
    found = {row["test"].partition("::")[2]: row["outcome"] for row in rows}
    assert found == {
        "test_many[0]": "passed",
        "test_many[1]": "failed",
        "test_lost": "failed",
        "test_skipped": "skipped",
        "test_set_up": "failed",
    }, done.stdout
    messages = {row["test"].partition("::")[2]: row["message"] for row in rows}
    assert "one is wrong" in messages["test_many[1]"]
    assert "crashed" in messages["test_lost"]
    assert "not here" in messages["test_skipped"]
    assert "no fixture" in messages["test_set_up"]


def test_the_kernels_tests_want_no_package_that_a_bare_machine_lacks(tmp_path):
    """They collect where the data set's, the texts' and the peers' packages cannot be imported."""
    missing = "wfdb", "nltk", "rouge_score", "ot", "geomloss", "flash_sinkhorn"
    for name in missing:
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--collect-only",
        "-p",
        "no:cacheprovider",
        *KERNEL_TESTS,
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "tests/kernels/ot/test_sinkhorn.py: " in done.stdout


# --- the verdict --------------------------------------------------------------------------------------------


def measured(item, provider, median=None, **columns):
    row = dict.fromkeys(journal.COLUMNS[journal.MEASURED], "")
    return row | {"item": item, "provider": provider, "median_ms": str(median or "")} | columns


def test_a_goal_is_met_or_missed_by_a_factor():
    rows = [
        measured("solver forward ecgot", "ecgot", 0.3),
        measured("solver forward ecgot_graph", "ecgot_graph", 0.1),
        measured("solver forward 4 warps", "ecgot_graph, 4 warps", 0.05),
        measured("solver forward torch_graph", "torch_graph", 0.4),
        measured("inference ecgot", "ecgot", 2.0),
        measured("inference torch", "torch", 3.0),
        measured("inference conv2d_graph", "conv2d_graph", 1.0, refused="result error 1 > 0"),
        measured("training ecgot", "ecgot", refused="result error 1.0e+00 > 5.0e-02"),
    ]
    outcomes = {each.name: goals.outcome(each, rows) for each in goals.GOALS}
    solver = outcomes["solver, forward"]
    assert solver.met
    assert solver.measured == "0.1 ms (ecgot_graph), at most 0.15; 4.0 times better than torch_graph"
    stock = outcomes["encoder, inference over stock torch"]
    assert stock.met is False
    assert stock.measured.startswith("1.50 times: 2 ms (ecgot), torch 3 ms; at least 3")
    assert outcomes["encoder, inference over the best graph"].measured.endswith("no peer was measured")
    training = outcomes["encoder, training step over stock torch"]
    assert training.met is None
    assert training.measured == "not measured: result error 1.0e+00 > 5.0e-02"
    bound = Goal("memory", "pairs gradient", limit=1000.0, column="peak_mb")
    assert not goals.outcome(bound, [measured("pairs gradient ecgot", "ecgot", 1, peak_mb="1200")]).met


def test_the_summary_begins_with_what_is_wrong(tmp_path):
    journal.create(tmp_path)
    stamped = {"ecgot commit": COMMIT, "device": "a GPU", "step": "small"}
    for item, refused in (("on chip D=1", "value error 1.0e+00 > 1.0e-05"), ("on chip D=3", "")):
        row = {"item": item, "case": f"{item} float32", "provider": "ecgot", "errors": "value 1.0"}
        journal.append(tmp_path, journal.MEASURED, stamped | row | {"refused": refused})
    journal.append(
        tmp_path, journal.MEASURED, stamped | {"provider": "ecgot", "refused": "ncu is not installed"}
    )
    for test, outcome in (("t.py::a", "passed"), ("t.py::b", "failed"), ("t.py::b", "passed")):
        row = {"test": test, "outcome": outcome, "message": "it broke" * (outcome == "failed")}
        journal.append(tmp_path, journal.TESTS, stamped | row)
    journal.tell(tmp_path, COMMIT, "crashed", "small", "pairs D=1", why="exit code -11")
    lines = summary.text(tmp_path, COMMIT, STEPS).splitlines()
    assert lines[0] == f"# First contact: a GPU, {COMMIT}"
    assert lines[2:7] == [
        "- Kernels: WRONG in 1 of 2 comparisons with fp64: on chip D=1 (1).",
        "- Failed or crashed: pairs D=1.",
        "- Tests: 1 failed, 1 passed; not all of them ran.",
        "- Failed tests: t.py (1)",
        f"- Goals: 0 met, 0 missed, {len(goals.GOALS)} not measured.",
    ]
    assert "- t.py::b: it broke" in lines
    assert "- small pairs D=1: crashed, exit code -11" in lines
    assert "- networks: not reached" in lines


# --- what tools say -----------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","","us","%"
"0","7","_sinkhorn_fwd_kernel","143.2","61.50"
"""


def test_the_profilers_numbers_are_read():
    found = [(each["metric"], each["value"], each["unit"]) for each in counters.metrics(NCU)]
    assert found == [("gpu__time_duration.sum", "143.2", "us"), (counters.COMPUTE, "61.50", "%")]
    assert not list(counters.metrics("==ERROR== The user does not have permission"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", {"note": "nothing found"}),
        (
            "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors",
            {"refused": "2 found: Invalid __global__ read of size 4 bytes"},
        ),
        (
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            {"note": "nothing found"},
        ),
        ("Device not supported\n", {"refused": "no verdict: Device not supported"}),
    ],
)
def test_a_sanitizers_last_lines_are_read(said, expected):
    assert sanitizers.verdict(said) == expected


def test_flash_sinkhorn_is_tuned_over_few_tiles():
    tiles = [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k} for m in (128, 64, 32) for n in (128, 64) for k in (32, 16)
    ]
    likely = [(each["BLOCK_M"], each["BLOCK_N"]) for each in tiles if streaming.likely(each)]
    assert likely == [(128, 128), (128, 64), (64, 128)]


# --- the truth ----------------------------------------------------------------------------------------------


def test_the_fp64_loop_is_that_of_the_oracle():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, count, 5, generator=generator, dtype=torch.float64) for count in (9, 7))
    for cost in ("sqeuclidean", "cosine"):
        value, f, g = truth.solve(truth.cost_matrix(x, y, cost), 0.5, 400)
        expected = reference.sinkhorn(x, y, eps=0.5, cost=cost)
        torch.testing.assert_close(value, torch.stack([each.value for each in expected]))
        sums = f[..., :, None] + g[..., None, :]
        torch.testing.assert_close(sums, torch.stack([each.f[:, None] + each.g for each in expected]))


def test_the_streamed_truth_is_the_dense_one(monkeypatch):
    monkeypatch.setattr(truth, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(count, 5, generator=generator, dtype=torch.float64) for count in (11, 9))
    found = truth.streamed(x, y, eps=1.0, tol=1e-6)
    expected = truth.value_and_gradients(x[None], y[None], 1.0, 1000, "sqeuclidean")
    torch.testing.assert_close(found.value, expected[0][0])
    torch.testing.assert_close(found.grad_x, expected[1][0], atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(found.grad_y, expected[2][0], atol=1e-7, rtol=1e-6)
    for iterations, enough in ((found.iterations - 1, False), (found.iterations, True)):
        _, f, g = truth.solve(truth.cost_matrix(x, y, "sqeuclidean"), 1.0, iterations)
        assert (truth.marginal_error(x, y, f, g, 1.0) <= 1e-6) is enough


# --- the whole ----------------------------------------------------------------------------------------------


def rehearse(out, *steps) -> str:
    command = [sys.executable, "-m", "benchmarks.first_contact", str(out), *steps, "--rehearse"]
    environment = {name: each for name, each in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(out, steps):
    """Every step came to its end, nothing of ours was wrong, and OUT may be brought home."""
    told = [json.loads(line) for line in (out / journal.EVENTS).read_text().splitlines()]
    (commit,) = {each["commit"] for each in told}
    for step in steps:
        ends = journal.ended(told, step)
        assert ends.pop("")["event"] == "done"
        assert {end["event"] for end in ends.values()} <= {"done"}, ends
    rows = journal.rows(out, journal.MEASURED, commit)
    assert not [row for row in rows if " error " in row["refused"]]
    assert all(row["device"] and row["torch"] for row in rows)
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(path.stat().st_size < 2**24 for path in files)
    text = (out / journal.SUMMARY).read_text()
    assert re.search(r"- Kernels: RIGHT in \d+ comparisons with fp64.\n", text)
    assert "not reached" not in "".join(
        line for line in text.splitlines() if line[2:].startswith(tuple(steps))
    )
    return rows


def test_two_steps_are_rehearsed_and_not_run_again(tmp_path):
    steps = "small", "counters"
    rehearse(tmp_path, *steps)
    rows = check(tmp_path, steps)
    assert {row["item"] for row in rows} >= {
        "versions",
        "on chip D=1",
        "streaming D=3",
        "convolution C=3",
        "solver",
    }
    assert "started" not in rehearse(tmp_path, *steps)
    assert check(tmp_path, steps) == rows


@pytest.mark.slow
def test_the_whole_is_rehearsed(tmp_path):
    rehearse(tmp_path)
    rows = check(tmp_path, REHEARSED)
    timed = {row["item"] for row in rows if row["median_ms"]}
    assert timed >= {
        "peaks",
        *(f"solver {what} {who}" for what in ("forward", "gradient") for who in ("ecgot", "torch_graph")),
        *(f"pairs {what} {who}" for what in ("forward", "gradient") for who in ("ecgot", "torch_graph")),
        *(f"streaming {what} {who}" for what in ("forward", "gradient") for who in ("ecgot", "torch_graph")),
        *(f"{what} {who}" for what in ("inference", "training") for who in ("ecgot_graph", "conv2d_graph")),
    }
    text = (tmp_path / journal.SUMMARY).read_text()
    assert re.search(r"- Tests: \d+ passed.\n", text)
    assert re.search(r"- (MET|MISSED): solver, forward: .* ms \(ecgot", text)
    assert re.search(r"- \?: streaming, forward over flash-sinkhorn: .*no peer was measured", text)


def test_no_gpu_and_unknown_steps_are_refused(tmp_path, capsys, monkeypatch):
    from benchmarks.first_contact.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "out"), "peak"])
    assert "STEP: expected one of small, tests" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_training_step_can_be_measured():
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "benchmarks/test_training_step.py", "-k", "1.0-ecgot"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
