"""Runs the steps, each in processes of its own that may crash, hang or be killed without the others.

What came to an end at this commit is not run again, so that a second call goes on where the first stopped,
from the files in OUT.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from benchmarks.first_contact import journal, summary
from benchmarks.first_contact.steps import KERNEL_TESTS, REHEARSED_TESTS, Step
from benchmarks.output import ROOT, commit

PYTHON = sys.executable
TICK = 0.2  # seconds between looks at a process
REWRITE = 5.0  # seconds between summaries while a step runs
LOG_BYTES = 2**19  # of what one process says: OUT's files stay small
LEAST = 3.0  # seconds under which no process is worth starting
WHEELS = ROOT / "wheels"
# Several processes compile at a time: torch's own compilers would take every core for each of them.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "8"}
RESTARTS = 24  # of pytest's workers


@dataclass
class Call:
    """One call of the command: where it writes, until when, and what its processes inherit."""

    out: Path
    end: float
    steps: Mapping[str, Step]
    rehearse: bool = False
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    commit: str = field(default_factory=commit)

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def tell(self, event: str, step: str, item: str = "", **details: object) -> None:
        """Note an event and say it."""
        journal.tell(self.out, self.commit, event, step, item, **details)
        said = ", ".join(f"{key}: {each}" for key, each in details.items())
        print(f"{step} {item}: {event} {said}".replace(" :", ":").rstrip(), flush=True)


def run(call: Call, names: Sequence[str]) -> None:
    """Run the steps in order, and again those that were cut off if there is time left."""
    journal.create(call.out)
    if call.rehearse:
        call.tell("note", "rehearsal", why="tiny sizes on a CPU: no time here says anything of a GPU")
    with tempfile.TemporaryDirectory() as site:
        install_wheels(call, Path(site))
        for name in (*names, *names):
            told = journal.ended(journal.events(call.out, call.commit), name)
            if "" in told or call.left() < LEAST:
                continue
            run_step(call, name)
            summary.write(call.out, call.commit, call.steps)
    summary.write(call.out, call.commit, call.steps)


def end_with_a_signal() -> None:
    """Let SIGTERM end this process as an exit does, by which the steps' processes end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def install_wheels(call: Call, site: Path) -> None:
    """Put what lies in ``wheels/`` where every process finds it; without a network there is no other way."""
    wheels = sorted(str(path) for path in WHEELS.glob("*.whl"))
    if not wheels:
        call.tell("note", "wheels", why="none in wheels/: peers that are not installed are left out")
        return
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    done = subprocess.run([*command, "--target", str(site), *wheels], capture_output=True, text=True)
    names = " ".join(Path(wheel).name for wheel in wheels)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        call.tell("note", "wheels", why=f"{names} not installed: {reason}")
        return
    known = call.environment.get("PYTHONPATH")
    call.environment["PYTHONPATH"] = os.pathsep.join([str(site)] + ([known] if known else []))
    call.tell("note", "wheels", why=f"installed {names}")


# --- a step -------------------------------------------------------------------------------------------------


def run_step(call: Call, name: str) -> None:
    """Run a step within its limit and the call's; its end, if it came to one, is noted."""
    step = call.steps[name]
    start = time.perf_counter()
    call.tell("started", name)
    end = min(start + step.seconds, call.end)
    with _warming(call, step):
        state, why = _run_tests(call, name, end) if not step.module else _run_items(call, name, end)
    seconds = f"{time.perf_counter() - start:.1f}"
    call.tell(state, name, seconds=seconds, **({"why": why} if why else {}))


def _run_items(call: Call, name: str, end: float) -> tuple[str, str]:
    """Run a step's items in as many processes as it wants; how that ended, and why if it failed."""
    step = call.steps[name]
    processes = {share: _start_items(call, name, share) for share in range(step.workers)}
    try:
        while processes:
            _wait(call, list(processes.values()), end)
            if time.perf_counter() >= end:
                return "cut off", ""
            for share, process in list(processes.items()):
                if process.code() is None:
                    continue
                process.kill()  # what it started may outlive it and keep the GPU
                del processes[share]
                if process.code() and _blame(call, name, process):
                    processes[share] = _start_items(call, name, share)
        return "done", ""
    finally:
        for process in processes.values():
            process.kill()


def _start_items(call: Call, name: str, share: int, warm: bool = False) -> "Process":
    step = call.steps[name]
    command = [PYTHON, "-m", "benchmarks.first_contact.items", str(call.out), name, "--module", step.module]
    command += ["--share", f"{share}/{step.workers}", *(["--warm"] if warm else [])]
    return Process(call, f"{name} {share}", command + (["--rehearse"] if call.rehearse else []))


def _blame(call: Call, name: str, process: "Process") -> bool:
    """Note which item a process died of; False where it was none, so that another would die the same way."""
    told = journal.events(call.out, call.commit)
    mine = {each["item"] for each in told if each.get("process") == str(process.popen.pid)}
    items = mine & journal.open_items(told, name).keys()
    why = f"exit code {process.code()}: {process.fatal or process.last}"
    for item in items:
        call.tell("crashed", name, item, why=why)
    lost = bool(mine) and not items  # it told itself that the GPU is lost
    if not (items or lost):
        call.tell("note", name, why=f"a process died before its first item, {why}")
    return bool(items) or lost


@contextlib.contextmanager
def _warming(call: Call, step: Step) -> Iterator[None]:
    """Run other steps' items beside this one, unseen, so that they are compiled when they are timed."""
    names = [name for name, each in call.steps.items() if each.module in step.warm]
    told = journal.events(call.out, call.commit)
    names = [name for name in names if "" not in journal.ended(told, name)]
    processes = [_start_items(call, name, 0, warm=True) for name in names]
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def _run_tests(call: Call, name: str, end: float) -> tuple[str, str]:
    """Run the kernels' tests that are not known yet; how that ended, and why if it failed."""
    known = {row["test"] for row in journal.rows(call.out, journal.TESTS, call.commit)}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(known))
        file.flush()
        command = [PYTHON, "-m", "pytest", "-q", "-p", "benchmarks.first_contact.each_test"]
        command += ["-p", "no:cacheprovider", "--contact-out", str(call.out), "--contact-known", file.name]
        command += ["-n", str(call.steps[name].workers), "--dist", "load", "--maxschedchunk", "2"]
        command += ["--max-worker-restart", str(RESTARTS), "--tb", "short"]
        process = Process(call, name, [*command, *(REHEARSED_TESTS if call.rehearse else KERNEL_TESTS)])
        try:
            _wait(call, [process], end)
        finally:
            process.kill()
    if process.code() in (0, 1, 5):  # 5: none was left to run
        return "done", ""
    if time.perf_counter() >= end:
        return "cut off", ""
    return "failed", f"pytest ended with {process.code()}: {process.last}"


def _wait(call: Call, processes: Sequence["Process"], end: float) -> None:
    """Until one has ended or the time is over; meanwhile the summary stays up to date."""
    rewrite = time.perf_counter() + REWRITE
    while time.perf_counter() < end and all(process.code() is None for process in processes):
        time.sleep(TICK)
        if time.perf_counter() >= rewrite:
            summary.write(call.out, call.commit, call.steps)
            rewrite = time.perf_counter() + REWRITE


# --- a process ----------------------------------------------------------------------------------------------


class Process:
    """A process with a group of its own, whose words go into the log line by line, up to a limit."""

    def __init__(self, call: Call, name: str, command: Sequence[str]) -> None:
        self.name, self.log = name, call.out / journal.LOG
        self.last, self.fatal = "", ""  # lines: the last, and the one in which Python says why it ends
        environment = call.environment | ENVIRONMENT | {"ECGOT_COMMIT": call.commit}
        self.popen = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # and no session of its own, in which it would outlive a caller that is killed
        )
        assert self.popen.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(self.popen.stdout,), daemon=True)
        self.reader.start()

    def _read(self, said: IO[bytes]) -> None:
        written = 0
        with self.log.open("ab", buffering=0) as log:
            for line in said:
                text = line.decode(errors="replace").strip()
                self.last = text[:300] or self.last
                if text.startswith(("Timeout (", "Fatal Python error:")):
                    self.fatal = text[:300]
                if text and written < LOG_BYTES:
                    written += log.write(f"[{self.name}] {text}\n".encode()) or 0

    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self.popen.poll()

    def kill(self) -> None:
        """End it and whatever it started: none of it may keep the GPU."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.reader.join(timeout=5)
