"""The kernels compile for every target without a GPU; failures, spills and the work in loops are seen."""

import functools
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ecgot.kernels.dispatch import HAS_TRITON
from ecgot.kernels.resources import __main__ as command
from ecgot.kernels.resources import cases
from ecgot.kernels.resources.machine_code import (
    Work,
    count,
    inner_work,
    parse_amdgcn,
    parse_sass,
    spilled_bytes,
    stores_anything,
)
from ecgot.kernels.resources.outcome import Outcome, launch_refusal

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

# Iterations over a tile that fits into registers, with and without exponentials; over one that does not fit;
# and a kernel that does not compile.
KERNELS = """
import triton
import triton.language as tl

from ecgot.kernels.compilation import CompileCase

@triton.jit
def held(x_ptr, steps, N: tl.constexpr, M: tl.constexpr, EXPONENTIALS: tl.constexpr):
    at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tile = tl.load(x_ptr + at)
    total = tl.zeros((N, M), dtype=tl.float32)
    for _ in range(steps):
        total = total * tile + 1.5
        tile = tile * 0.5 + tl.sum(total, axis=0)[None, :]
        if EXPONENTIALS:
            tile = tl.exp2(tile)
    tl.store(x_ptr + at, total)

@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined)

def compile_cases(hip):
    signature = {"x_ptr": "*fp32", "steps": "i32"} | dict.fromkeys(("N", "M", "EXPONENTIALS"), "constexpr")
    for name, rows, exponentials in (
        ("plain", 16, False), ("exponentials", 16, True), ("spilling", 256 if hip else 64, False)
    ):
        constants = {"N": rows, "M": 256, "EXPONENTIALS": exponentials}
        yield CompileCase(name, held, signature, constants, {"num_warps": 4})
    yield CompileCase("16", broken, {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16}, {"num_warps": 4})
"""

# Two loops: matrix products; then an iteration with a wait inside, and, behind the kernel, the copy of a
# shuffle that jumps back into the iteration. The words to the right are the encoding.
SASS = """
	code for sm_90a
		Function : _kernel
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000e220000000800 */
        /*0010*/                   STL.64 [R1+0x8], R2 ;                    /* 0x0000000002007387 */
        /*0020*/                   HMMA.1688.F32.TF32 R4, R4, R8, R4 ;      /* 0x0000000004047231 */
        /*0030*/                   FFMA R4, R4, R5, R6 ;                    /* 0x0000000504047223 */
        /*0040*/              @!P0 BRA 0x20 ;                               /* 0xfffffffc00048947 */
        /*0050*/                   FFMA R4, R4, R5, R6 ;                    /* 0x0000000504047223 */
        /*0060*/                   STL [R1], R4 ;                           /* 0x0000000002007387 */
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;   /* 0x0000000304000075 */
        /*0080*/              @!P1 BRA 0x70 ;                               /* 0xfffffffc00f89947 */
        /*0090*/                   FFMA.FTZ R4, R4, R5, R6 ;                /* 0x0000000504047223 */
        /*00a0*/                   FFMA2 R8, R8.F32x2.HI_LO, R10.F32x2.HI_LO, R12.F32x2.HI_LO ;
        /*00b0*/               @P2 MUFU.EX2 R7, R4 ;                        /* 0x0000000400077308 */
        /*00c0*/                   MUFU.LG2 R7, R7 ;                        /* 0x0000000700077308 */
        /*00d0*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;            /* 0x00000000ff097435 */
        /*00e0*/                   BRA.DIV ~URZ, 0x160 ;                    /* 0x000000727f007947 */
        /*00f0*/                   SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;       /* 0x0e001f0004057f89 */
        /*0100*/                   LDL.LU R4, [R1] ;                        /* 0x0000000001047983 */
        /*0110*/               @P3 BRA P6, 0x60 ;                           /* 0xfffffff400103947 */
        /*0120*/                   STL [R3+0x10], R4 ;                      /* 0x0000100403007387 */
        /*0130*/                   STG.E.64 desc[UR6][R2.64], R4 ;          /* 0x0000000402007986 */
        /*0140*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0150*/                   BRA 0x150;                               /* 0xfffffffc00fc7947 */
        /*0160*/                   FFMA R4, R4, R5, R6 ;                    /* 0x0000000504047223 */
        /*0170*/                   CALL.REL.NOINC 0x190 ;                   /* 0x0000000000187944 */
        /*0180*/                   BRA 0x100 ;                              /* 0xfffffff800d47947 */
        /*0190*/                   RET.REL.NODEC R2 0x0 ;                   /* 0xfffffff002b87950 */
		..........
"""

AMDGCN = """
	.text
_kernel:                                ; @_kernel
; %bb.0:
	s_load_dwordx2 s[0:1], s[0:1], 0x0
	v_mov_b32_e32 v0, 0                 ; v_fma_f32 in a comment does not count
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
.Ltmp1:
	.loc	1 10 5                          ; kernel.py:10:5
	v_mfma_f32_32x32x2_f32 a[0:15], v1, v2, a[0:15]
	v_fmac_f32_e32 v1, v2, v3
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	s_branch .LBB0_4
.LBB0_3:
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[0:1] op_sel_hi:[1,1,0]
	v_fma_f32 v1, v2, v3, v4
	v_exp_f32_e32 v2, v1
	v_exp_f32_e32 v3, v1
	v_log_f32_e32 v3, v3
	v_div_fmas_f32 v3, v3, v4, v5
.LBB0_4:
	v_mul_f32_e32 v1, v1, v2
	s_cbranch_vccnz .LBB0_3
	global_store_dword v0, v1, s[0:1]
	s_endpgm
	.section	.rodata,"a",@progbits
	.amdhsa_kernel _kernel
		.amdhsa_next_free_vgpr 8
	.end_amdhsa_kernel
	.amdgpu_metadata
---
amdhsa.kernels:
  - .agpr_count:     16
    .vgpr_count:     24
    .vgpr_spill_count: 3
...
"""


@functools.cache
def listed(target: str, everything: bool = False) -> list[cases.Case]:
    """All kernels' cases, which several tests look at."""
    return list(cases.cases(target, everything))


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code where Triton compiles, whatever this process does."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=pytest.mark.slow if target in ("sm_80", "sm_100") else [])
        for target in cases.TARGETS
    ],
)
def test_one_case_of_each_kernel_compiles(target: str) -> None:
    code = f"""
import dataclasses, json
from ecgot.kernels.resources.cases import cases
from ecgot.kernels.resources.outcome import check
last = {{case.kernel: case for case in cases({target!r})}}  # the largest tiles come first
print(json.dumps([dataclasses.asdict(check(case, {target!r})) for case in last.values()]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes
    for outcome in outcomes:
        assert outcome["error"] is None
        assert 0 < outcome["registers"] <= (255 if target.startswith("sm_") else 512)
        assert outcome["stack_accesses"] in (None, 0)
        assert outcome["spilled_bytes"] == 0 or target in ("sm_80", "sm_100")  # nobody tunes for them yet
        assert outcome["programs"] >= 1
        work = [outcome[name] for name in ("exponentials", "multiply_adds", "matrix_products")]
        assert outcome["instructions"] is None or outcome["instructions"] > sum(work[:2])
        assert work == [None] * 3 or sum(work) > 0  # a kernel without a loop has no inner work


def test_machine_code_is_what_the_launcher_would_compile() -> None:
    """Triton's own launcher, which is told of a GPU that is not there, looks at typical arguments."""
    code = """
import importlib
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from ecgot.kernels.resources.cases import TARGETS, cases
from ecgot.kernels.resources.outcome import compiled

class Driver:
    def __init__(self, gpu):
        self.target = GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return self.target

DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}

def argument(name, kind, case):
    if kind == "constexpr":
        return dict(case.constants)[name]
    if kind in DTYPES:
        return torch.empty(64, dtype=DTYPES[kind], device="meta")
    return 0.5 if kind == "fp32" else 48 if name in case.divisible else 7

for target, code in (("sm_90", "ptx"), ("gfx942", "amdgcn")):
    driver.set_active(Driver(TARGETS[target]))
    for kernel in ("_softmin_kernel", "_conv1d_dgrad_kernel"):
        case = list(cases(target, kernel=kernel))[-1]
        function = getattr(importlib.import_module(case.module), kernel)
        function.device_caches.clear()
        arguments = {name: argument(name, kind, case) for name, kind in case.signature}
        launched = function.warmup(grid=(1,), **arguments, **dict(case.options))
        assert launched.asm[code] == compiled(case, target).asm[code], case
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_an_iteration_of_the_balanced_solver_is_multiply_adds_alone() -> None:
    code = """
import dataclasses, json
from ecgot.kernels.resources.cases import cases
from ecgot.kernels.resources.outcome import check
tiles = {(128, 128), (256, 64), (32, 32)}
chosen = {}
for case in cases("sm_90", everything=True, kernel="sinkhorn_fwd"):
    constants = dict(case.constants)
    tile = constants["BLOCK_N"], constants["BLOCK_M"]
    if constants["BALANCED"] and constants["COST"] == 0 and tile in tiles:
        chosen.setdefault(tile, case)  # fp32, no pairs
print(json.dumps([dataclasses.asdict(check(case, "sm_90")) for case in chosen.values()]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert outcome["exponentials"] == 0, outcome
        assert outcome["matrix_products"] == 0, outcome
        assert outcome["stack_accesses"] == 0, outcome
        assert outcome["multiply_adds"] > 0, outcome


def test_the_inner_loop_of_nvidia_code_is_the_one_that_iterates() -> None:
    instructions = parse_sass(SASS)
    assert len(instructions) == 26
    assert inner_work(instructions) == Work(12, shuffles=1, exponentials=1, multiply_adds=3, stack_accesses=2)
    assert count(instructions) == Work(
        26, shuffles=1, exponentials=1, multiply_adds=6, matrix_products=1, stack_accesses=4
    )


def test_the_inner_loop_of_amd_code_is_the_one_that_iterates() -> None:
    instructions = parse_amdgcn(AMDGCN)
    assert len(instructions) == 16
    assert inner_work(instructions) == Work(8, exponentials=2, multiply_adds=3)
    assert count(instructions) == Work(16, exponentials=2, multiply_adds=4, matrix_products=1)


def test_barriers_and_shuffles_are_counted() -> None:
    opcodes = ("BAR.SYNC.DEFER_BLOCKING", "SHFL.BFLY", "WARPSYNC", "BAR.SYNC", "REDUX.SUM", "MEMBAR")
    listing = "\n".join(f"        /*{16 * at:04x}*/ {opcode} R0, R1 ;" for at, opcode in enumerate(opcodes))
    assert count(parse_sass(listing)) == Work(6, barriers=2, shuffles=2)
    opcodes = (
        "s_barrier",
        "ds_bpermute_b32 v0",
        "v_add_f32_dpp v0",
        "v_permlane32_swap_b32 v0",
        "ds_read_b32 v0",
    )
    assert count(parse_amdgcn("".join(f"\t{each}\n" for each in opcodes))) == Work(5, barriers=1, shuffles=3)


def test_without_another_loop_it_is_the_one_with_matrix_products() -> None:
    without = SASS.replace("BRA P6, 0x60", "NOP")
    assert inner_work(parse_sass(without)) == Work(3, multiply_adds=1, matrix_products=1)


def test_code_without_a_loop_that_computes_has_no_inner_loop() -> None:
    assert inner_work([]) is None
    assert inner_work(parse_sass(SASS.replace("BRA P6, 0x60", "NOP").replace("BRA 0x20", "NOP"))) is None


def test_spills_are_the_stores_at_fixed_places_of_the_stack() -> None:
    assert spilled_bytes(parse_sass(SASS)) == 8 + 4


def test_code_that_stores_nothing_is_seen() -> None:
    assert stores_anything(parse_sass(SASS))
    assert not stores_anything(parse_sass(SASS.replace("STG.E.64", "LDG.E.64")))
    assert stores_anything(parse_amdgcn(AMDGCN))
    assert not stores_anything(parse_amdgcn(AMDGCN.replace("global_store", "global_load")))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict]:
    """Outcomes of KERNELS by target and case, from one run of the command for all targets."""
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "some_kernels.py").write_text(KERNELS)
    code = """
import sys
from ecgot.kernels.resources import __main__ as command
from ecgot.kernels.resources import cases
cases.MODULES = ("some_kernels",)
sys.exit(command.main(["--all", "--json"]))
"""
    # In this process's place: the workers must import the module, too.
    done = run(code, PYTHONPATH=os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 1, done.stdout + done.stderr
    return {(outcome["target"], outcome["case"]): outcome for outcome in json.loads(done.stdout)}


@pytest.mark.parametrize("target", cases.TARGETS)
def test_a_kernel_that_spills_is_reported(outcomes: dict, target: str) -> None:
    assert outcomes[target, "held spilling"]["spilled_bytes"] > 0
    assert outcomes[target, "held spilling"]["error"] is None


@pytest.mark.parametrize("target", cases.TARGETS)
def test_exponentials_and_multiply_adds_are_counted(outcomes: dict, target: str) -> None:
    without, with_them = outcomes[target, "held plain"], outcomes[target, "held exponentials"]
    elements = 16 * 256 // (4 * cases.TARGETS[target].warp_size)
    assert without["error"] is with_them["error"] is None
    assert without["spilled_bytes"] == with_them["spilled_bytes"] == 0
    assert without["exponentials"] == without["matrix_products"] == 0
    # Compilers unroll: one iteration of the code may be several of the source.
    for found in (without["multiply_adds"] / 2, with_them["exponentials"]):
        assert found >= elements
        assert found % elements == 0


def test_a_kernel_that_does_not_compile_is_reported(outcomes: dict) -> None:
    assert len(outcomes) == 4 * len(cases.TARGETS)
    for target in cases.TARGETS:
        found = Outcome(**outcomes[target, "broken 16"])
        assert found.error is not None
        assert command._line(found).split()[:4] == ["FAILED", target, "broken", "16:"]


class InProcess:
    """A pool of no processes."""

    def __init__(self, *_arguments: object, **_options: object) -> None:
        self.map = map

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_error: object) -> None: ...


@pytest.mark.parametrize(
    ("found", "spills", "code", "summary"),
    [
        ({}, "any", 0, "0 failed, 0 spilling, 0 in inner loops"),
        ({"error": "no"}, "none", 1, "1 failed, 0 spilling, 0 in inner loops"),
        ({"spilled_bytes": 4}, "any", 1, "0 failed, 1 spilling, 0 in inner loops"),
        ({"spilled_bytes": 4}, "inner", 0, "0 failed, 1 spilling, 0 in inner loops"),
        ({"spilled_bytes": 4, "stack_accesses": 1}, "inner", 1, "0 failed, 1 spilling, 1 in inner loops"),
        ({"spilled_bytes": 4, "stack_accesses": 1}, "none", 0, "0 failed, 1 spilling, 1 in inner loops"),
    ],
)
def test_the_exit_code_says_what_was_found(
    found: dict,
    spills: str,
    code: int,
    summary: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def check(case: str, target: str) -> Outcome:
        return Outcome(case, target, **{"error": None, **(found if case == "one" else {})})

    monkeypatch.setattr(command, "_unusable", lambda targets: None)
    monkeypatch.setattr(command, "cases", lambda *options: ["one", "other"])
    monkeypatch.setattr(command, "check", check)
    monkeypatch.setattr(command, "ProcessPoolExecutor", InProcess)
    assert command.main(["--targets", "sm_90", "--spills", spills]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [command._line(check(case, "sm_90")) for case in ("one", "other")]
    assert last == f"sm_90: 2 compilations, {summary}"


def test_interpreted_kernels_arerefused() -> None:
    code = """
import os, sys
from ecgot.kernels.resources.__main__ import main
codes = [main([])]
os.environ["TRITON_INTERPRET"] = "true"  # Triton takes both
sys.exit(main([]) if codes == [2] else 1)
"""
    done = run(code, TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" TRITON_INTERPRET"] * 2


def test_an_unknown_target_isrefused(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--targets", "sm_10"]) == 2
    assert "sm_10" in capsys.readouterr().err


def test_an_unknown_option_isrefused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--what"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "resources: unrecognized arguments: --what\n"


def test_a_kernel_that_is_not_there_isrefused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "_unusable", lambda targets: None)  # it may refuse to run interpreted
    assert command.main(["--kernel", "nothing"]) == 2
    assert (
        capsys.readouterr().err == "resources: --kernel: expected a part of a kernel's name, got 'nothing'\n"
    )


def test_kernels_can_be_chosen_by_name() -> None:
    assert {case.kernel for case in cases.cases("sm_90", kernel="sinkhorn_fwd")} == {"_sinkhorn_fwd_kernel"}


def test_what_is_unknown_is_a_dash_and_a_spill_is_marked() -> None:
    unknown = command._line(Outcome("kernel", "sm_90", None))
    assert " ".join(unknown.split()) == (
        "ok sm_90 registers - spilled - shared - warps - programs - instructions - x warps - barriers - "
        "shuffles - exp - multiply-add - matrix - stack - kernel"
    )
    assert command._line(Outcome("kernel", "sm_90", None, spilled_bytes=4)).startswith("SPILLS")


def test_too_much_memory_is_a_failure() -> None:
    def refused(**needed: int) -> str | None:
        return launch_refusal(SimpleNamespace(**{"shared": 0, "tmem_size": 0} | needed), "sm_100")

    assert refused() is None
    assert "shared memory" in str(refused(shared=228 * 1024))
    assert "528 columns of tensor memory" in str(refused(tmem_size=528))


def test_a_missing_triton_isrefused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "HAS_TRITON", False)
    assert command.main([]) == 2
    assert capsys.readouterr().err == "resources: triton is not installed\n"


def test_a_full_check_holds_every_tile_that_fits() -> None:
    from ecgot.kernels.ot import triton_onchip, triton_tiles

    tiles = {
        (dict(c.constants)["BLOCK_N"], dict(c.constants)["BLOCK_M"])
        for c in listed("sm_90", everything=True)
        if c.kernel == "_sinkhorn_fwd_kernel"
    }
    wanted = {
        (triton_tiles.block_size(n), triton_tiles.block_size(m))
        for n in range(1, 600, 3)
        for m in range(1, 600, 3)
        if triton_onchip.fits(n, m)
    }
    assert tiles == wanted


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_default_part_holds_every_tile_and_every_pair_of_values(target: str) -> None:
    part, full = (_tiles_and_pairs(target, everything) for everything in (False, True))
    assert part == full


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "programs"),
    [  # NVIDIA's occupancy calculator; the AMDGPU backend's table of waves by registers
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 4, 255, 0, 2),
        ("sm_90", 4, 168, 0, 3),
        ("sm_90", 4, 128, 100 * 1024, 2),
        ("sm_90", 1, 16, 0, 32),
        ("sm_80", 4, 64, 162 * 1024, 1),
        ("gfx942", 4, 512, 0, 1),
        ("gfx942", 4, 128, 0, 4),
        ("gfx942", 4, 64, 20 * 1024, 3),
    ],
)
def test_programs_share_a_multiprocessor(
    target: str, warps: int, registers: int, shared: int, programs: int
) -> None:
    assert cases.TARGETS[target].resident(warps, registers, shared) == programs


def test_the_default_part_holds_every_cost_and_the_largest_tiles() -> None:
    solver = [dict(c.constants) for c in listed("sm_90") if c.kernel == "_sinkhorn_fwd_kernel"]
    assert {(128, 128), (256, 64)} <= {(c["BLOCK_N"], c["BLOCK_M"]) for c in solver}
    assert {c["COST"] for c in solver} == set(range(5))
    assert {(c["PAIRS"], c["BALANCED"]) for c in solver} == {
        (p, b) for p in (False, True) for b in (False, True)
    }


def test_the_precision_is_that_of_the_target() -> None:
    found = {
        (target, dict(case.signature)["x_ptr"], dict(case.constants)["PRECISION"])
        for target in ("sm_90", "gfx942")
        for case in listed(target)
        if case.kernel == "_conv1d_fwd_kernel"
    }
    halves = {(target, half, "ieee") for target in ("sm_90", "gfx942") for half in ("*fp16", "*bf16")}
    assert found == halves | {("sm_90", "*fp32", "tf32x3"), ("gfx942", "*fp32", "ieee")}


def _tiles_and_pairs(target: str, everything: bool) -> set[tuple]:
    """Every tile of every kernel, and every pair of its other values."""
    found: set[tuple] = set()
    for case in listed(target, everything):
        values = dict(case.constants) | {"dtype": dict(case.signature).get("x_ptr")}
        blocks = [name for name in values if name.startswith("BLOCK_")]
        found.add((case.kernel, *(values.pop(name) for name in blocks)))
        values.pop("PRECISION", None)  # follows from target and dtype
        found.update((case.kernel, *pair) for pair in itertools.combinations(values.items(), 2))
    return found
