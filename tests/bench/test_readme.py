"""README.md's tables equal their results; which results are unfit for it."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from bench import readme
from tests.bench.result_files import EAGER, GPU, MACHINE, SPEED, failed, rate, speed, written

NAME = "bench/results/run.jsonl"
MODEL = [
    *(rate(f"held-out bits per byte, {x}", 1.25, "bits") for x in ("plain fp32", "bf16", "fp8")),
    *(rate(f"{x}, {y}", 5281.9) for x in ("prefill", "decode") for y in ("bf16", "fp8")),
    *(rate(f"{x}, batch {n}", 100.0 * n) for x in ("engine", "transformers") for n in (1, 8)),
    rate("scheduling and sampling", 0.092, "fraction"), rate("drafts accepted", 0.88, "fraction"),
    rate("speculative decoding", 1.1, "x"),
    {**rate("batches of 1 and 8 give the same tokens", 1.0, ""), "ok": True, "note": "bit for bit"},
    rate("largest logit difference to plain PyTorch, fp32", 2.9e-5, ""),
]  # fmt: skip


def run(folder: Path, check: bool) -> tuple[int, str]:
    output = io.StringIO()
    code = readme.run(check, folder / "README.md", Console(file=output, width=300))
    return code, output.getvalue()


def page(folder: Path, kind: str, *records: dict, machine: dict = MACHINE) -> Path:
    """A README.md with an empty table, and its result."""
    written(folder / NAME, *records, machine=machine)
    file = folder / "README.md"
    file.write_text(f"Before\n\n<!-- {kind} from {NAME} -->\n<!-- end -->\n\nAfter\n")
    return file


def test_readme_equals_its_results():
    """`python -m bench report --readme` would change nothing."""
    output = io.StringIO()
    assert readme.run(True, console=Console(file=output, width=300)) == 0, output.getvalue()
    assert readme.TABLE.search(readme.README.read_text(encoding="utf-8"))


def test_ops(tmp_path):
    """One row per op and size, the fastest backend; by family, with provenance."""
    more = {"op": "cast_per_token", "size": "M=4", "limit": "memory", "roof_share": None}
    file = page(
        tmp_path, "ops",
        SPEED, {**EAGER, "least": 25.0}, {**EAGER, "provider": "linear_bf16", "least": 17.0},
        {**EAGER, "provider": "linear_fp32", "least": 18.0},
        {**SPEED, "provider": "deepkern torch", "least": 90.0},
        {**SPEED, "op": "gemm_nt", "limit": "compute", "tflops": 0.0168},
        {**SPEED, "size": "M=9999"},
        {**speed("deepkern cpu", [1234.5]), **more}, {**speed("eager", [5.0]), **more},
        {**speed("deepkern cpu", [1.0]), "op": "mla_decode", "samples": [], "note": "too large"},
    )  # fmt: skip
    assert run(tmp_path, True)[0] == 1, "the table is empty"
    assert run(tmp_path, False)[0] == 0
    text = file.read_text()
    assert (
        "| `fp8_gemm_nt` | M=64 | cpu | 10 | 0.1 GB/s | 50 %, memory | 2.5x | 1.7x, `linear_bf16` |"
        in text
    )
    assert "| `cast_per_token` | M=4 | cpu | 1,234 | 0.1 GB/s |  | 0.00405x (once) |  |" in text
    assert "| `gemm_nt` | M=64 | cpu | 10 | 16.8 GFLOPS | 50 %, compute |  |  |" in text
    assert "| `mla_decode` | M=64 |  |  |  |  |  | too large |" in text
    assert "| `fp8_gemm_nt` | M=9999 | cpu | 10 |" in text
    assert text.index("**Casts**") < text.index("**Matrix products**")
    assert text.index("**Matrix products**") < text.index("**Latent attention**")
    assert text.startswith("Before\n") and text.endswith("<!-- end -->\n\nAfter\n")
    text = " ".join(text.split())
    assert "µs: the least of all rounds" in text
    for fact in ("AMD EPYC, 2 cores, threads: 2", "commit 0123456789ab", "torch 2.13.0+cpu",
                 "`python -m bench op fp8_gemm_nt`", f"([result]({NAME}))"):  # fmt: skip
        assert fact in text
    assert run(tmp_path, True)[0] == 0, "generated twice, the same bytes"


def test_a_gpu_has_medians(tmp_path):
    fast = {**SPEED, "provider": "deepkern cuda", "limit": "compute", "tflops": 1234.5}
    page(tmp_path, "ops", fast, EAGER, machine={**GPU, "torch_isa": "AVX2", "driver": "580.1"})
    assert run(tmp_path, False)[0] == 0
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "| cuda | 10.5 | 1,234 TFLOPS | 50 %, compute | 1x |" in text
    assert "NVIDIA H200, driver 580.1; deepkern" in text


def test_model(tmp_path):
    file = page(tmp_path, "model", *MODEL)
    assert run(tmp_path, False)[0] == 0
    text = file.read_text()
    assert "| prefill, tokens/s |  | 5,282 | 5,282 |" in text
    assert "| the engine | 100 | 800 |" in text and "88 % of the prediction" in text
    assert "Batches of 1 and 8 give the same tokens, bit for bit." in text
    page(tmp_path, "model", *MODEL[1:])
    code, text = run(tmp_path, False)
    assert code == 1 and "no record 'held-out bits per byte, plain fp32'" in text


@pytest.mark.parametrize("commit", [None, "0123456789ab+"])
def test_a_changed_source_is_unfit(tmp_path, commit):
    file = page(tmp_path, "ops", SPEED, machine={**MACHINE, "commit": commit})
    before = file.read_text()
    code, text = run(tmp_path, False)
    assert code == 1 and f"commit {commit}" in text and file.read_text() == before


def test_unfit_results(tmp_path):
    """Absent, uncommitted, of an old schema, failed; and a table that is not closed."""
    file = page(tmp_path, "ops", failed("deepkern cpu", "diff 0.1 > 2e-05"))
    assert "diff 0.1 > 2e-05" in run(tmp_path, False)[1]
    page(tmp_path, "model", {**MODEL[0], "ok": False}, *MODEL[1:])
    assert "check failed: held-out bits per byte" in run(tmp_path, False)[1]
    page(tmp_path, "ops", machine={k: v for k, v in MACHINE.items() if k != "schema"})
    assert "schema 1, expected 2" in run(tmp_path, False)[1]
    page(tmp_path, "speeds", SPEED)
    assert "no table 'speeds'" in run(tmp_path, False)[1]
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    commit = [
        "git",
        "-C",
        str(tmp_path),
        *identity,
        "commit",
        "--quiet",
        "--allow-empty",
        "-m",
        "x",
    ]
    subprocess.run(commit, check=True)
    page(tmp_path, "ops", SPEED)
    assert "run.jsonl: commit it first" in run(tmp_path, False)[1]
    (tmp_path / NAME).unlink()
    assert "run.jsonl: no such file" in run(tmp_path, False)[1]
    file.write_text(f"<!-- ops from {NAME} -->\n")
    assert "no <!-- end -->" in run(tmp_path, False)[1]
