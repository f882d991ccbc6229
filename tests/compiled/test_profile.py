"""Counts of small kernels against numbers computed by hand; the profile command and its figures."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import pytest
import torch
import triton
from typer.testing import CliRunner

import deepkern
from bench import figures, profile
from bench.__main__ import app
from deepkern.runtime.profile import Launch
from deepkern.runtime.ptx_library import PtxModule

OPS = sorted(deepkern.OPS)
QUICK = ("cast_per_token", "expert_combine", "fp8_gemm_nt", "mla_decode")  # compared in each tier
pinned = pytest.mark.skipif(
    triton.__version__ != figures.PINNED, reason="the figures are of another Triton"
)


def ptx(body: str) -> str:
    """A kernel `run(data, stride)` with the lane's byte offset `tid * stride` in %r3 and %rd2."""
    return f"""
.version 8.0
.target sm_80
.address_size 64
.visible .entry run(.param .u64 data, .param .u32 stride)
{{
    .reg .b32 %r<20>;
    .reg .b64 %rd<8>;
    .reg .pred %p<2>;
    .shared .align 16 .b8 buffer[8192];
    ld.param.u64 %rd1, [data];
    ld.param.u32 %r1, [stride];
    mov.u32 %r2, %tid.x;
    mul.lo.s32 %r3, %r2, %r1;
    cvt.u64.u32 %rd2, %r3;
    add.s64 %rd3, %rd1, %rd2;
    mov.u32 %r4, buffer;
    add.s32 %r5, %r4, %r3;
    mov.b32 %r6, 0;
{body}
    ret;
}}
"""


def count(body: str, stride: int = 4, threads: int = 32, grid: int = 1, every: int = 1) -> Launch:
    data = torch.zeros(2048, dtype=torch.int32)
    with deepkern.compiled("sm_80"), deepkern.profiled(every) as launches:
        PtxModule(ptx(body)).run_kernel(
            "run", data, ctypes.c_int32(stride), grid=(grid,), block=(threads,)
        )
    (launch,) = launches
    return launch


@pytest.mark.parametrize(
    ("instruction", "stride", "moved", "sectors"),
    [
        ("ld.global.b32 %r7, [%rd3];", 4, 128, 4),
        ("ld.global.b32 %r7, [%rd3];", 32, 128, 32),
        ("ld.global.b32 %r7, [%rd3];", 8, 128, 8),
        ("ld.global.b32 %r7, [%rd3];", 0, 128, 1),
        ("ld.global.v4.b32 {%r7, %r8, %r9, %r10}, [%rd3];", 16, 512, 16),
        ("ld.global.b8 %r7, [%rd3];", 1, 32, 1),
        ("st.global.b32 [%rd3], %r6;", 64, 128, 32),
    ],
    ids=[
        "coalesced",
        "a sector each",
        "every other word",
        "one word",
        "16 bytes",
        "bytes",
        "store",
    ],
)
def test_sectors_of_a_global_access(instruction, stride, moved, sectors):
    launch = count(instruction, stride)
    assert launch.total("bytes", "global") == moved
    assert launch.total("sectors", "global") == sectors
    written = instruction.startswith("st")
    assert (launch.sectors_written if written else launch.sectors_read) == sectors


def test_sectors_of_a_launch_are_distinct():
    launch = count("ld.global.b32 %r7, [%rd3];\n ld.global.b32 %r8, [%rd3];", grid=5)
    assert launch.total("sectors") == 5 * 2 * 4
    assert (launch.sectors_read, launch.sectors_written) == (4, 0)


@pytest.mark.parametrize(
    ("instruction", "stride", "passes", "least"),
    [
        ("st.shared.b32 [%r5], %r6;", 4, 1, 1),
        ("st.shared.b32 [%r5], %r6;", 128, 32, 1),
        ("st.shared.b32 [%r5], %r6;", 8, 2, 1),
        ("st.shared.b32 [%r5], %r6;", 132, 1, 1),
        ("st.shared.b32 [%r5], %r6;", 0, 1, 1),
        ("st.shared.v4.b32 [%r5], {%r6, %r6, %r6, %r6};", 16, 4, 4),
        ("st.shared.v4.b32 [%r5], {%r6, %r6, %r6, %r6};", 128, 32, 4),
        ("st.shared.v2.b32 [%r5], {%r6, %r6};", 8, 2, 2),
    ],
    ids=["in order", "one bank", "two words a bank", "padded", "one word", "16 bytes",
         "16 bytes, one bank", "8 bytes"],
)  # fmt: skip
def test_passes_over_shared_memory(instruction, stride, passes, least):
    launch = count(instruction, stride)
    assert launch.total("wavefronts") == passes
    assert launch.total("least_wavefronts") == least


def test_flops_of_an_mma():
    mma = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r7, %r8, %r9, %r10}, "
        "{%r6, %r6, %r6, %r6}, {%r6, %r6}, {%r6, %r6, %r6, %r6};"
    )
    launch = count(mma, threads=64)
    assert launch.total("flops") == 2 * 2 * 16 * 8 * 16
    assert launch.total("issued", "tensor_core") == 2


def test_lanes_of_a_predicated_instruction():
    launch = count("setp.lt.u32 %p1, %r2, 40;\n @%p1 add.f32 %r7, %r6, %r6;", threads=96)
    (add,) = (s for s in launch.statements if s.kind == "float")
    assert (add.issued, add.warps, add.lanes) == (3, 2, 40)


def test_a_barrier_counts_once_for_each_warp(seed):
    with deepkern.compiled("sm_80", seed=seed):
        launch = count("bar.sync 0;\n bar.sync 0;", threads=256, grid=3)
    assert launch.total("issued", "barrier") == 2 * 8 * 3
    assert launch.uniform


def test_a_part_of_the_blocks():
    whole, part = (count("ld.global.b32 %r7, [%rd3];", grid=10, every=n) for n in (1, 3))
    assert (part.blocks, part.blocks_run, part.scale) == (10, 4, 2.5)
    for field in ("issued", "lanes", "bytes", "sectors"):
        assert part.total(field) * part.scale == whole.total(field)


def test_nothing_is_counted_outside():
    data = torch.zeros(2048, dtype=torch.int32)
    with deepkern.compiled("sm_80"):
        with deepkern.profiled() as launches:
            pass
        PtxModule(ptx("")).run_kernel("run", data, ctypes.c_int32(4))
    assert launches == []
    with pytest.raises(ValueError, match="every: expected 1 or more"), deepkern.profiled(0):
        pass


@pytest.mark.parametrize("op", ["fp8_gemm_nt", "mla_decode", "expert_dispatch"])
def test_counts_do_not_depend_on_the_schedule(op, seed):
    def run(order: str, number: int) -> list[Launch]:
        generator = torch.Generator().manual_seed(seed)
        args = deepkern.OPS[op].positional(profile.facts(op).inputs(generator, **figures.SIZES[op]))
        with (
            deepkern.backend("triton"),
            deepkern.compiled("sm_90", seed=number, order=order, check_races=False),
            deepkern.profiled() as launches,
        ):
            deepkern.OPS[op].launcher("triton")(*args)
        return launches

    first = run("earliest", seed)
    assert first
    for order in ("latest", "random"):
        assert run(order, seed + 1) == first, order


@pinned
@pytest.mark.parametrize("op", QUICK)
def test_figures_on_sm_90(op):
    assert figures.problems(figures.measure(op, "sm_90"), figures.load().get((op, "sm_90"))) == []


@pinned
@pytest.mark.proof
@pytest.mark.parametrize("target", figures.TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_figures(op, target):
    assert figures.problems(figures.measure(op, target), figures.load().get((op, target))) == []


def report_of(op: str, tmp_path, *words: str) -> dict:
    html, out = tmp_path / "report.html", tmp_path / "report.json"
    result = CliRunner().invoke(
        app, ["profile", op, *words, "--html", str(html), "--json", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "of the roof" in result.output
    page = html.read_text()
    assert page.startswith("<!doctype html>")
    assert "://" not in page, "one file without further files"
    return json.loads(out.read_text())


def test_the_command(tmp_path):
    sizes = ("--size", "M=64", "--size", "N=128", "--size", "K=256", "--target", "sm_90")
    report = report_of("fp8_gemm_nt", tmp_path, *sizes)
    (launch,) = report["launches"]
    assert report["useful_flops"] == 2 * 64 * 128 * 256
    assert launch["totals"]["flops"] >= report["useful_flops"]
    assert launch["binding"] == max(launch["seconds"], key=launch["seconds"].get)
    assert 0 < report["predicted"] <= report["bound"] <= 1
    assert sum(x["issued"] for x in launch["lines"]) == launch["totals"]["issued"]
    assert any("tl.dot" in x["text"] and x["flops"] for x in launch["lines"]), "the source line"


def test_lines_of_a_kernel_that_another_copy_compiled():
    """Triton caches by source: the cached kernel may name a file that does not exist anymore."""
    module = "matmul/block_scaled_gemm.py"
    own = Path(deepkern.__file__).parent / module
    assert profile.current_file(f"/deleted/copy/kernels/deepkern/{module}") == str(own)
    assert profile.current_file("/home/user/deepkern/theirs.py") == "/home/user/deepkern/theirs.py"
    assert profile.current_file("/home/user/kernel.py") == "/home/user/kernel.py"


@pytest.mark.proof
@pytest.mark.parametrize("op", OPS)
def test_the_command_runs_for_every_op(op, tmp_path):
    report = report_of(op, tmp_path)
    assert report["launches"]
    assert 0 < report["predicted"] <= report["bound"] <= 1
