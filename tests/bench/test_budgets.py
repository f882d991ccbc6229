"""Static inspection: the reading of compiled kernels, and the check of their budgets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

import deepkern
from bench import assembly, budgets, inspect
from deepkern.runtime.arch import ARCHS

ROOT = Path(__file__).parent.parent.parent
OPS = sorted(deepkern.OPS)
COMMON = ("sm_90", "gfx942")  # one target of each assembler; `make proof` has the others
RECORD = {
    "op": "fp8_gemm_nt",
    "kernel": "kernel",
    "config": "BLOCK_M=128 warps=8",
    "target": "sm_90",
    "size": 0,
    "registers": 168,
    "spill_bytes": 0,
    "shared": 131072,
    "matrix": {"QGMMA": 4},
    "dots": 1,
}
BUDGET = {budgets.key(RECORD): {"registers": 168, "shared": 131072, "matrix": ["QGMMA"]}}
WHERE = (["fp8_gemm_nt"], ["sm_90"])


def problems_of(*records: dict, version: str = budgets.PINNED) -> str:
    problems = budgets.problems(list(records), BUDGET, *WHERE, triton_version=version)
    return "; ".join(text for texts in problems.values() for text in texts)


def test_within_budget():
    assert problems_of(RECORD) == ""
    assert problems_of({**RECORD, "registers": 100, "shared": 0}) == "", "less is allowed"


@pytest.mark.parametrize("version", [budgets.PINNED, "3.6.0"], ids=["pinned", "other"])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 16}, "spills 16 bytes"),
        ({"matrix": {}}, "multiplies without matrix instructions"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
    ],
    ids=["spill", "no matrix instructions", "error"],
)
def test_problems_on_every_triton(change, problem, version):
    assert problem in problems_of({**RECORD, **change}, version=version)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"registers": 169}, "takes 169 registers, its budget is 168"),
        ({"shared": 131073}, "takes 131073 bytes of shared memory, its budget is 131072"),
        ({"matrix": {"HGMMA": 4}}, "lost its matrix instructions QGMMA"),
        ({"config": "BLOCK_M=64 warps=4"}, "has no budget"),
    ],
    ids=["registers", "shared", "matrix instructions", "new config"],
)
def test_problems_on_the_pinned_triton(change, problem):
    assert problem in problems_of({**RECORD, **change})
    assert problems_of({**RECORD, **change}, version="3.6.0") == ""


def test_a_budget_without_a_kernel():
    assert "no longer compiled" in problems_of()
    other = {**RECORD, "target": "sm_80"}
    problems = budgets.problems([other], BUDGET, ["fp8_gemm_nt"], ["sm_80"])
    assert all(key[3] == "sm_80" for key in problems), "only inspected targets are checked"


def test_worst_of_two_records_with_one_key():
    small, large = {**RECORD, "registers": 100}, {**RECORD, "spill_bytes": 8}
    for pair in ((small, large), (large, small)):
        (worst,) = budgets.worst(list(pair)).values()
        assert worst["registers"] == 168 and worst["spill_bytes"] == 8
    assert "error" in budgets.worst([RECORD, {**RECORD, "error": "no"}])[budgets.key(RECORD)]
    assert "error" in budgets.worst([{**RECORD, "error": "no"}, RECORD])[budgets.key(RECORD)]


def test_budgets_round_trip(tmp_path):
    file = tmp_path / "budgets.json"
    other = {("a", "k", "c", "sm_80"): {"registers": 1, "shared": 2, "matrix": []}}
    budgets.write({**BUDGET, **other}, file)
    assert budgets.load(file) == {**BUDGET, **other}
    rewritten = budgets.merged(budgets.load(file), [{**RECORD, "registers": 99}], *WHERE)
    assert rewritten[budgets.key(RECORD)]["registers"] == 99
    assert rewritten[("a", "k", "c", "sm_80")] == other[("a", "k", "c", "sm_80")]


def test_every_op_has_budgets():
    committed = budgets.load()
    assert {key[0] for key in committed} == set(OPS)
    assert {key[3] for key in committed} == set(ARCHS)


def expected_matrix(target: str) -> str:
    """The prefix of the matrix instructions of bf16 products."""
    return {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}.get(
        target, "HMMA"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [t if t in COMMON else pytest.param(t, marks=pytest.mark.proof) for t in ARCHS],
)
def test_reads_spills_and_matrix_instructions(target):
    """A matmul, the same with too few registers, and one without tl.dot."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("spilling.py")
    command = [sys.executable, str(script), target]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    good, spilling, plain = json.loads(done.stdout.splitlines()[-1])
    assert good["spill_bytes"] == 0 and spilling["spill_bytes"] > 0
    assert all(name.startswith(expected_matrix(target)) for name in good["matrix"])
    assert good["matrix"] and good["dots"] == 1
    assert plain["matrix"] == {} and plain["dots"] == 0
    assert good["threads"] == 8 * ARCHS[target].warp_size and good["blocks"] >= 1
    assert 0 < good["registers"] <= 512 and good["shared"] > 0


ANSWERS = """
import json, sys
for line in sys.stdin:
    print(json.dumps([{"target": line.split()[1]}]), flush=True)
"""


def test_a_compiler_crash_is_reported(monkeypatch):
    """The first process dies without an answer; the next one answers."""
    scripts = ["input(); raise SystemExit(3)", ANSWERS]

    def start(worker):
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", scripts.pop(0)]
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    monkeypatch.setattr(inspect.Worker, "start", start)
    records = inspect.compile_all(["cast_per_token"], ["sm_90", "sm_80", "sm_89"], processes=1)
    assert "died with exit code 3" in records[0]["error"]
    assert records[1:] == [{"target": "sm_80"}, {"target": "sm_89"}]


SASS = """
 Function matmul:
  REG:72 STACK:1592 SHARED:0 LOCAL:0 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   STL.128 [R1+0x10], R4 ;                /* 0x0 */
        /*0020*/              @!P0 STL [R1], R4 ;                         /* 0x0 */
        /*0030*/             @!UP1 LDL.LU.64 R4, [R1] ;                   /* 0x0 */
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ; /* 0x0 */
        /*0050*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8] ; /* 0x0 */
        /*0060*/                   UTMALDG.2D [UR8], [UR4] ;              /* 0x0 */
        /*0070*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;    /* 0x0 */
        /*0080*/                   LDG.E.128 R4, [R2.64] ;                /* 0x0 */
        /*0090*/                   FFMA R4, R4, R5, R6 ;                  /* 0x0 */
        /*00a0*/              @!P1 BRA 0x20 ;                             /* 0x0 */
        /*00b0*/                   LDL.128 R4, [R1+0x10] ;                /* 0x0 */
        /*00c0*/                   BRA 0xc0;                              /* 0x0 */
"""


def test_reads_sass():
    record = assembly.read_sass(SASS)
    assert record["registers"] == 72
    assert record["spill_bytes"] == 4 + 8  # in the loop, 0x20 to 0xa0
    assert record["matrix"] == {"HGMMA": 1, "QGMMA": 1}
    assert record["tma"] == 1 and record["async_copy"] == 1 and record["instructions"] == 13


GCN = """
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tbuffer_load_dwordx4 v1, s[0:3], 0 offen lds
\tscratch_store_dword off, v1, s32
    .private_segment_fixed_size: 228
    .vgpr_count:     512
    .vgpr_spill_count: 56
"""


def test_reads_amd_assembly():
    record = assembly.read_gcn(GCN)
    assert record["registers"] == 512 and record["spill_bytes"] == 228
    assert record["matrix"] == {"v_mfma_f32_32x32x8_bf16": 2} and record["async_copy"] == 1


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "blocks", "limit"),
    [
        ("sm_90", 168, 163872, 256, 1, "registers"),  # 168 registers x 256 threads: one block
        ("sm_90", 32, 0, 128, 16, "registers"),
        ("sm_90", 16, 100 << 10, 128, 2, "shared"),
        ("sm_89", 16, 0, 1024, 1, "threads"),
        ("sm_80", 16, 0, 32, 32, "blocks"),
        ("gfx942", 512, 0, 64, 4, "registers"),  # one wavefront on each of four SIMDs
        ("gfx942", 64, 40 << 10, 256, 1, "shared"),
    ],
)
def test_occupancy(target, registers, shared, threads, blocks, limit):
    limits = assembly.blocks(ARCHS[target], registers, shared, threads)
    assert min(limits.values()) == blocks and limits[limit] == blocks


def assert_within(ops: list[str], targets: list[str]) -> None:
    records = inspect.compile_all(ops, targets)
    assert {r["op"] for r in records} == set(ops), "an op has no inspect sizes"
    problems = budgets.problems(records, budgets.load(), ops, targets)
    assert not problems, "\n".join(inspect.problem_lines(problems))


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_budgets_hold_on_two_targets(generator):
    """sm_90 and one other target; `python -m bench inspect` compares all of them."""
    if triton.__version__ != budgets.PINNED:
        print(f"triton {triton.__version__}: sizes are not compared, only {budgets.PINNED}'s are")
    others = [target for target in ARCHS if target != "sm_90"]
    other = others[torch.randint(len(others), (), generator=generator)]
    print(f"sm_90 and {other}")
    assert_within(OPS, ["sm_90", other])
