"""The providers that ops are compared with, and how a row reports those that cannot run."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

import deepkern
from bench import checks, report, summary, timings
from bench.ceilings import Ceilings
from bench.timings import Request
from deepkern.compat import deep_gemm, flash_mla
from deepkern.testing import compare, gemms, ops, providers, vllm_cpu
from deepkern.testing.providers import Provider, prepared

F32, CPU = torch.float32, torch.device("cpu")
OP, SIZE = "cast_per_token", {"M": 4, "K": 128}
CONTIGUOUS, MASKED = "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked"
K_GROUPED = "k_grouped_fp8_gemm_nt"
REQUEST = Request(CPU, Ceilings(10.0, {"fp32": 0.1}), seconds=0.001)
COMPARED = [  # (op, size, the providers on a CPU, without "eager" and "compile")
    ("fp8_gemm_nt", {"M": 33, "N": 140, "K": 300, "c": F32}, {"linear_bf16", "linear_fp32"}),
    ("fp8_gemm_nt", {"M": 33, "N": 140, "K": 300, "b_rows": 1}, {"linear_bf16", "linear_fp32"}),
    (CONTIGUOUS, {"M": 90, "N": 144, "K": 256, "G": 5}, {"grouped_mm"}),
    (MASKED, {"G": 3, "M": 40, "N": 144, "K": 256}, {"grouped_mm", "bmm"}),
    (K_GROUPED, {"M": 40, "N": 48, "K": 512, "G": 4, "equal": True, "c": True}, {"grouped_mm"}),
    (K_GROUPED, {"M": 40, "N": 48, "K": 512, "G": 4}, {"grouped_mm"}),
    ("m_grouped_gemm_nt_contiguous", {"M": 90, "N": 144, "K": 256, "G": 5}, {"grouped_mm"}),
    ("mla_decode", {"lengths": (70, 0, 9), "Sq": 2, "H": 3}, {"sdpa", "sdpa_fp32"}),
    ("mla_decode", {"lengths": (64,), "H": 3}, {"sdpa", "sdpa_fp32"}),
    ("mla_prefill", {"lengths": (40, 0, 9), "H": 2}, {"sdpa_padded"}),
    ("mla_prefill_backward", {"lengths": (40, 0, 9), "H": 2}, {"sdpa"}),
    ("moe_forward", {"T": 6, "E": 4, "topk": 3, "K": 256, "I": 128}, {"grouped_mm"}),
]


def cpu_inputs(op, **size) -> tuple:
    given = ops.inputs(op, torch.Generator().manual_seed(3), **size)
    return deepkern.OPS[op].positional(given)


@pytest.mark.parametrize(("op", "size", "names"), COMPARED)
def test_providers_agree_with_the_reference(op, size, names):
    args = cpu_inputs(op, **size)
    want = checks.outputs(getattr(deepkern.reference, op), args)
    found = [p for p in providers.of(op, args) if p.name != "compile" and p.time_alone is None]
    assert {p.name for p in found} == {"eager", *names}
    for p in found:
        got = p.outputs(p.call())
        ok, error, note = checks.compare_plain(op, args, got, want, p.tolerance)
        assert ok, f"{p.name}: {note}"
        assert p.about and error is not None


def test_compile_agrees():
    (compiled,) = providers.of(OP, cpu_inputs(OP, M=5, K=256), ("compile",))
    want = deepkern.reference.cast_per_token(*cpu_inputs(OP, M=5, K=256))
    for got, w in zip(compiled.outputs(compiled.call()), want, strict=True):
        assert compare.diff(got, w) < compiled.tolerance


def test_in_place_baselines_give_their_arguments():
    args = cpu_inputs("mla_cache_append", T=11)
    eager = providers.eager("mla_cache_append", checks_copy(args))
    want = checks.outputs(deepkern.reference.mla_cache_append, args)
    assert checks.compare_plain("mla_cache_append", args, eager.outputs(eager.call()), want)[0]


def checks_copy(args: tuple) -> tuple:
    return tuple(checks.copy(x) if isinstance(x, torch.Tensor) else x for x in args)


def outputs_of(op: str, package: str, module, monkeypatch, **size) -> tuple[tuple, tuple]:
    """(outputs of the provider of `package`, replaced by `module`; the op's arguments)."""
    monkeypatch.setattr(providers, "is_installed", lambda name: name == package)
    monkeypatch.setitem(sys.modules, package, module)
    args = cpu_inputs(op, **size)
    found = ops.facts(op).providers(**ops.by_name(op, args))
    (p,) = [p for p in found if p.name == package]
    return p.outputs(p.call()), args


@pytest.mark.parametrize(
    ("op", "size"),
    [
        (CONTIGUOUS, {"M": 300, "N": 144, "K": 256, "G": 4}),
        (MASKED, {"G": 3, "M": 40, "N": 144, "K": 256}),
        (K_GROUPED, {"M": 40, "N": 48, "K": 512, "G": 4, "c": True}),
        ("mqa_logits", {"S": 6, "Skv": 70, "H": 3, "D": 32}),
        ("paged_mqa_logits", {"lengths": (37, 0, 90), "next_n": 2, "H": 3, "D": 32, "page": 64}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_of_deep_gemm(op, size, monkeypatch):
    """Made to deepkern.compat.deep_gemm, which has DeepGEMM's signatures."""
    got, args = outputs_of(op, "deep_gemm", deep_gemm, monkeypatch, **size)
    want = checks.outputs(getattr(deepkern, op), args)
    assert checks.compare_plain(op, args, got, want, 0.0)[:2] == (True, 0.0)


def test_calls_of_deep_gemm_with_c():
    args = cpu_inputs("fp8_gemm_nt", M=33, N=140, K=300, c=F32)
    got = ops.facts("fp8_gemm_nt").deep_gemm(deep_gemm, *args)()
    compare.assert_bitwise(got, deepkern.fp8_gemm_nt(*args))


def test_calls_of_flash_mla():
    """Made to deepkern.compat.flash_mla, which has FlashMLA's signatures."""
    facts = ops.facts("mla_decode")
    args = cpu_inputs("mla_decode", lengths=(70, 0), H=3)
    call = facts.flash_mla(flash_mla, **ops.by_name("mla_decode", args))
    for got, want in zip(facts.flash_mla_outputs(call()), deepkern.mla_decode(*args), strict=True):
        compare.assert_bitwise(got, want)
    for op, size in (
        ("mla_sparse_decode", {"H": 3, "cache_dtype": torch.uint8, "sink": True}),
        ("mla_sparse_prefill", {"H": 3, "lengths": True}),
    ):
        args = cpu_inputs(op, **size)
        got = ops.facts(op).flash_mla(flash_mla, **ops.by_name(op, args))()
        compare.assert_bitwise(got[0], getattr(deepkern, op)(*args)[0])


def test_rows_aligned_for_deep_gemm():
    group_index = torch.tensor([-1, 0, 0, 2, -1, 2, 2], dtype=torch.int32)
    row, at, index = gemms.aligned_rows(group_index, 3)
    assert row.tolist() == [1, 2, 3, 5, 6] and at.tolist() == [0, 1, 128, 129, 130]
    assert len(index) == 256 and index[at].tolist() == [0, 0, 2, 2, 2]
    assert (index == -1).sum() == 251
    out = gemms.original_rows(torch.arange(1.0, 6.0)[:, None], group_index, 3)
    assert out.flatten().tolist() == [0, 1, 2, 3, 0, 4, 5]


@pytest.mark.parametrize("b_rows", [128, 1], ids=["128x128", "1x128"])
@pytest.mark.parametrize("K", [128, 640, 7168], ids="K={}".format)
def test_layout_of_scales_for_scaled_mm(monkeypatch, b_rows, K):
    """Sizes and strides that torch's ScaledBlas.cpp checks; no CPU serves the call."""
    got = []
    monkeypatch.setattr(torch.nn.functional, "scaled_mm", lambda *args, **_: got.extend(args))
    a, a_scale, b, b_scale, out_dtype, _ = cpu_inputs(
        "fp8_gemm_nt", M=40, N=256, K=K, b_rows=b_rows
    )
    ops.facts("fp8_gemm_nt").scaled_mm(a, a_scale, b, b_scale, out_dtype)()
    blocks, padded = K // 128, -(-K // 512) * 4
    shape, strides = ((padded, 2), (1, padded)) if b_rows == 128 else ((256, blocks), (1, 256))
    assert got[1].shape == (K, 256) and got[1].stride() == (1, K)
    assert got[2].shape == (40, blocks) and got[2].stride(0) == 1
    assert blocks == 1 or got[2].stride(1) == 40
    assert got[4].shape == shape and got[4].stride(0) == 1
    assert got[4].shape[1] == 1 or got[4].stride() == strides


class FakeQuantizer:
    """Transformer Engine's Float8BlockQuantizer: the sizes of the tensors that it makes (2.3)."""

    def __init__(self, dtype, *, rowwise: bool, columnwise: bool, block_scaling_dim: int) -> None:
        assert rowwise and not columnwise
        self.dimensions = block_scaling_dim

    def make_empty(self, shape, *, dtype, device):
        blocks, outer = -(-shape[1] // 128), -(-shape[0] // 128)
        sizes = (outer, blocks) if self.dimensions == 2 else (blocks, shape[0])
        return types.SimpleNamespace(
            _rowwise_data=torch.empty(shape, dtype=torch.uint8),
            _rowwise_scale_inv=torch.empty(sizes[0], -(-sizes[1] // 4) * 4),
            dimensions=self.dimensions,
        )


@pytest.mark.parametrize("workspace", [True, False], ids=["workspace", "no workspace"])
@pytest.mark.parametrize("b_rows", [128, 1], ids=["128x128", "1x128"])
def test_operands_of_transformer_engine(workspace, b_rows, monkeypatch):
    """Its product, computed from the fake's bytes and scales, is the reference's."""

    def product(A, B, out_dtype):
        x, w = (
            ops.facts("cast_back").baseline(
                t._rowwise_data.view(torch.float8_e4m3fn),
                t._rowwise_scale_inv[:, :2] if t.dimensions == 2
                else t._rowwise_scale_inv.t()[: len(t._rowwise_data)],
                (128 if t.dimensions == 2 else 1, 128), torch.float64,
            )
            for t in (B, A)
        )  # fmt: skip
        return (x @ w.t()).to(out_dtype), None

    extensions = types.ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_gemm = (
        (lambda A, B, workspace, out_dtype: product(A, B, out_dtype)) if workspace else product
    )
    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.Float8BlockQuantizer = FakeQuantizer
    binding = types.SimpleNamespace(DType=types.SimpleNamespace(kFloat8E4M3="e4m3"))
    for name, module in (("transformer_engine", types.ModuleType("transformer_engine")),
                         ("transformer_engine.pytorch", pytorch),
                         ("transformer_engine.pytorch.cpp_extensions", extensions),
                         ("transformer_engine_torch", binding)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    args = cpu_inputs("fp8_gemm_nt", M=33, N=140, K=200, b_rows=b_rows)
    got = ops.facts("fp8_gemm_nt").transformer_engine(pytorch, *args[:5])()
    compare.assert_close(got, deepkern.reference.fp8_gemm_nt(*args))


def test_past_the_limit_of_recompilations_compiled_code_raises():
    """As FlexAttention is compiled; by default torch would run it uncompiled and say nothing."""
    providers.allow_recompilations()
    config = torch._dynamo.config
    assert config.recompile_limit >= providers.MOST_SIZES

    def double(x):
        return x * 2

    with config.patch(recompile_limit=2):
        options = {"backend": "eager", "dynamic": False}
        strict = torch.compile(double, fullgraph=True, **options)
        for size in (1, 2):
            strict(torch.ones(size))
        with pytest.raises(Exception, match="(?i)fullgraph=True"):
            strict(torch.ones(3))
    torch._dynamo.reset()


@pytest.mark.gpu
def test_flex_attention_compiles_every_size(device):
    """More sizes than torch's default limit of recompilations."""
    for length in range(64, 64 * 11, 64):
        args = ops.inputs(
            "mla_decode", torch.Generator(device).manual_seed(3), lengths=(length,), H=16
        )
        (flex,) = [
            p
            for p in ops.facts("mla_decode").providers(**ops.by_name("mla_decode", args))
            if p.name == "flex_attention"
        ]
        want = deepkern.reference.mla_decode(*args)
        assert compare.diff(flex.outputs(flex.call())[0], want[0]) < flex.tolerance


@pytest.mark.gpu
def test_scaled_mm_agrees(device):
    args = ops.inputs("fp8_gemm_nt", torch.Generator(device).manual_seed(3), M=64, N=256, K=1024)
    call = ops.facts("fp8_gemm_nt").scaled_mm(*args[:5])
    compare.assert_close(call(), deepkern.reference.fp8_gemm_nt(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("op", sorted(deepkern.OPS))
def test_providers_of_a_gpu_agree(device, op):
    """Installed libraries too; one that does not run at this size has a reason."""
    row = timings.time_op(op, ops.sizes(op).small[0], Request(device, REQUEST.ceilings))
    for speed in row:
        assert speed.ok or speed.error is None, f"{speed.provider}: {speed.note}"


# Rows with planted providers.


def plant(monkeypatch, *planted: Provider) -> None:
    monkeypatch.setattr(ops.facts(OP), "providers", lambda **rest: [*planted], raising=False)


def row(**options) -> dict[str, timings.Speed]:
    request = Request(CPU, REQUEST.ceilings, seconds=0.001, backends=("torch",), **options)
    return {speed.provider: speed for speed in timings.time_op(OP, SIZE, request)}


def right(**options):
    """What cast_per_token of the row's inputs returns."""
    generator = torch.Generator().manual_seed(1)
    return deepkern.reference.cast_per_token(*ops.inputs(OP, generator, **SIZE))


def test_a_wrong_provider_has_no_time(monkeypatch):
    q, scale = right()
    with_nan = scale.clone()
    with_nan[0] = torch.nan
    plant(
        monkeypatch,
        Provider("exact", "", lambda: (q, scale)),
        Provider("wrong", "", lambda: (q, scale * 1.02)),
        Provider("nan", "", lambda: (q, with_nan)),
        Provider("loose", "", lambda: (q, scale * 1.02), tolerance=1e-2),
        Provider("partial", "", lambda: scale, lambda scale: (None, scale)),
        Provider("empty", "", lambda: None, lambda result: (None, None)),
    )
    got = row()
    assert [name for name, speed in got.items() if not speed.samples] == ["wrong", "nan", "empty"]
    wrong = got["wrong"]
    assert wrong.ok is False and wrong.least is wrong.gb_per_s is wrong.roof_share is None
    assert wrong.error == pytest.approx(2e-4, rel=0.1) and wrong.tolerance == 2e-5
    assert wrong.note.startswith("not timed: diff to reference 0.000196 > 2e-05")
    assert "NaN or inf at other positions" in got["nan"].note
    assert "nothing to compare" in got["empty"].note
    output = io.StringIO()
    Console(file=output, width=250).print(report.timed([list(got.values())]))
    lines = output.getvalue().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("wrong ")]
    assert lines[at].split() == ["wrong", "2e-04"] and "diff to reference" in lines[at + 1]
    assert summary.failures(speed.record() for speed in got.values()) == []


def test_a_provider_that_fails_is_reported(monkeypatch):
    def fail():
        raise NotImplementedError("not on this device\nand more")

    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("one call only")
        return right()

    plant(monkeypatch, Provider("fails", "", prepared(fail)), Provider("later", "", fails_later))
    got = row()
    assert got["fails"].note == "NotImplementedError: not on this device"
    assert got["later"].note == "ValueError: one call only"
    assert got["eager"].samples and got["deepkern torch"].samples


def test_a_missing_library_is_reported(monkeypatch):
    def fail(**arguments):
        raise ImportError("no such library")

    monkeypatch.setattr(ops.facts(OP), "providers", fail, raising=False)
    got = row()
    assert got["further providers"].note == "ImportError: no such library"
    assert got["eager"].samples


def test_a_provider_that_is_not_there_is_reported():
    got = row(providers=("eager", "deep_gemm"))
    assert list(got) == ["deepkern torch", "eager", "deep_gemm"]
    assert got["deep_gemm"].ok is False and "no such provider" in got["deep_gemm"].note


def test_one_that_times_itself(monkeypatch):
    plant(
        monkeypatch,
        Provider(
            "alone",
            "",
            right,
            time_alone=lambda seconds, copies: timings.Timing((7.0, 5.0), copies),
        ),
        Provider("wrong", "", lambda: (right()[0], right()[1] * 2), time_alone=None),
    )
    got = row()
    assert got["alone"].samples == (7.0, 5.0) and got["alone"].least == 5.0
    assert got["alone"].calls == 32, "as many copies as the others rotate"
    assert got["wrong"].samples == ()


def test_no_vllm_without_its_library(monkeypatch, tmp_path):
    monkeypatch.delenv(vllm_cpu.VARIABLE, raising=False)
    args = ops.by_name("mla_decode", cpu_inputs("mla_decode", lengths=(64,), H=2))
    if vllm_cpu.library() is None:
        assert vllm_cpu.mla_decode(**args) == []
    monkeypatch.setenv(vllm_cpu.VARIABLE, str(tmp_path / "no.so"))
    (vllm,) = vllm_cpu.mla_decode(**args)
    with pytest.raises(RuntimeError, match=r"exit code 1: .*no\.so"):
        vllm.call()


def test_names_of_providers_are_listed():
    """`--against` refuses other names."""
    folder = Path(ops.__file__).parent
    texts = [file.read_text() for file in (*folder.glob("*.py"), Path(providers.__file__))]
    given = {
        name for text in texts for name in re.findall(r'(?:Provider|library)\(\s*"(\w+)"', text)
    }
    assert {"eager", "deep_gemm", "sdpa"} <= given
    assert given | {"linear_bf16", "linear_fp16"} == set(providers.NAMES)
