"""The first screen: what it says of agreeing and differing ops, of ratios and of failures."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench import families, summary


def check(op: str, backend: str, ok: bool | None = True, size: str = "M=1") -> dict:
    return {"kind": "check", "op": op, "backend": backend, "size": size, "ok": ok, "note": "far"}


def speed(op: str, provider: str, least: float | None, size: str = "M=1", ok: bool = True) -> dict:
    return {"kind": "speed", "op": op, "size": size, "provider": provider, "least": least,
            "ok": ok, "note": "" if ok else "diff 0.1"}  # fmt: skip


def shown(view) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(view)
    return output.getvalue()


def line(view, start: str) -> str:
    (found,) = (x for x in shown(view).splitlines() if x.startswith(start))
    return found


def test_a_family_that_agrees_is_counted():
    checks = [check("swiglu", "cpu", size=f"M={M}") for M in (1, 2)]
    checks += [check("cast_back", "cpu"), check("cast_back", "triton"), check("gemm_nt", "triton")]
    view = summary.agreement(checks)
    assert "2 ops at 3 sizes" in line(view, "quant") and "1 ops at 1 sizes" in line(view, "quant")
    assert "1 ops at 1 sizes" in line(view, "matmul")


def test_a_wrong_op_is_named():
    view = summary.agreement([check("swiglu", "cpu"), check("cast_back", "cpu", ok=False)])
    assert "wrong: cast_back" in line(view, "quant")


def test_ratios_are_of_rows_that_both_have():
    speeds = [
        speed("swiglu", "deepkern cpu", 10.0),
        speed("swiglu", "eager", 25.0),
        speed("cast_back", "deepkern cpu", 10.0),
        speed("cast_back", "eager", 5.0),
        speed("fp8_gemm_nt", "deepkern cpu", 10.0),
        speed("fp8_gemm_nt", "eager", 100.0),
        speed("fp8_gemm_nt", "linear_bf16", 17.0),
        speed("gemm_nt", "deepkern cpu", 10.0),  # its baseline failed
        speed("gemm_nt", "eager", None, ok=False),
        speed("mla_decode", "deepkern cpu", None, ok=False),
        speed("mla_decode", "eager", 5.0),
    ]
    assert summary.ratios(speeds) == {
        ("swiglu", "M=1", "deepkern cpu"): 2.5,
        ("cast_back", "M=1", "deepkern cpu"): 0.5,
        ("fp8_gemm_nt", "M=1", "deepkern cpu"): 1.7,
    }
    row = line(summary.speed(speeds), "quant")
    for text in ("0.5x", "1.5x", "2.5x", "cast_back M=1", "swiglu M=1"):
        assert text in row
    assert "attention" not in shown(summary.speed(speeds))


def test_every_failure_is_listed():
    records = [
        {"kind": "check", "ok": False, "op": "a", "backend": "triton", "size": "M=1", "note": "x"},
        {"kind": "check", "ok": None, "op": "b", "backend": "cpu"},
        {"kind": "model", "ok": False, "name": "logits", "note": "far off"},
        {"kind": "speed", "ok": True, "op": "c", "provider": "deepkern cpu"},
        {"kind": "speed", "ok": False, "op": "c", "provider": "deepkern cpu", "note": "wrong"},
        {"kind": "speed", "ok": False, "op": "c", "provider": "vllm", "note": "ImportError"},
    ]
    listed = ["a triton M=1 x", "logits far off", "c deepkern cpu wrong"]
    assert summary.failures(records) == listed
    output = io.StringIO()
    summary.verdict(Console(file=output, width=100), records)
    assert "3 disagreements" in output.getvalue() and "not checked: b on cpu" in output.getvalue()


def model_record(name: str, value, unit: str, ok: bool | None = None, note: str = "") -> dict:
    return {"kind": "model", "name": name, "value": value, "unit": unit, "ok": ok, "note": note}


def test_the_model_has_its_text_checks_and_speeds():
    records = [
        model_record("continuation", "[red]return x", "text"),
        model_record("largest logit difference", 2.5e-05, "", True, "at most 0.0001"),
        model_record("held-out bits per byte, fp8", 1.9, "bits", False, "at most +0.02"),
        model_record("engine, batch 1", 213.4, "tokens/s"),
        model_record("engine, batch 32", 2788.0, "tokens/s"),
        model_record("transformers, batch 32", 88.4, "tokens/s"),
        model_record("transformers", "not installed, not compared", "text"),
    ]
    text = shown(summary.model(records))
    assert "[red]return x" in text and "not installed" in text
    assert "2.5e-05" in text and "1.9 bits" in text and "at most +0.02" in text
    assert line(summary.model(records), "engine").split() == ["engine", "213", "2,788"]
    assert "88.4" in line(summary.model(records[:6]), "transformers")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_hold_their_ops(family):
    ops = families.ops_of(family)
    assert ops and all(families.family_of(op) == family for op in ops)
