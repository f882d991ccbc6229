"""The tensor contract: its syntax, what it refuses, and in which order."""

from __future__ import annotations

import pytest
import torch

from deepkern.runtime.contract import Contract, check_choice, check_that

RULES = {
    "a": "real [M, K]",
    "scale": "fp32 [M, K/128] strided",
    "index": "int32 [G+1]",
    "x": "fp8 [..., G]",
}
OPTIONAL = ("index", "x")
CONTRACT = Contract("demo", optional=OPTIONAL, **RULES)


def good() -> dict[str, torch.Tensor]:
    return {
        "a": torch.zeros(3, 300),
        "scale": torch.zeros(3, 3),
        "index": torch.zeros(5, dtype=torch.int32),
        "x": torch.zeros(2, 7, 4).to(torch.float8_e4m3fn),
    }


def test_accepts_what_it_states():
    contract = Contract("demo", optional=("offsets",), a="real [M, K]", offsets="int32 [M+1]")
    contract.check({"a": torch.zeros(3, 5), "offsets": torch.zeros(4, dtype=torch.int32)})
    contract.check({"a": torch.zeros(3, 5), "offsets": None})
    column_major = torch.zeros(3, 3).t()
    CONTRACT.check({"a": torch.zeros(3, 300), "scale": column_major, "index": None, "x": None})


@pytest.mark.parametrize(
    ("argument", "value", "error", "words"),
    [
        ("scale", torch.zeros(3, 3, device="meta"), ValueError, "device cpu"),
        (
            "a",
            torch.zeros(3, 300, dtype=torch.float64),
            TypeError,
            "bfloat16 or float16 or float32",
        ),
        ("a", torch.zeros(300), ValueError, "rank 2"),
        ("scale", torch.zeros(3, 4), ValueError, "K/128 = 3"),
        ("scale", torch.zeros(4, 3), ValueError, "M = 3"),
        ("a", torch.zeros(300, 3).t(), ValueError, "stride 1"),
        ("a", [1.0], TypeError, "Tensor"),
    ],
)
def test_refuses(argument, value, error, words):
    tensors = {**good(), "index": None, "x": None, argument: value}
    with pytest.raises(error) as caught:
        CONTRACT.check(tensors)
    message = str(caught.value)
    assert message.startswith(f"demo: {argument}: expected ") and words in message


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.zeros(3, 300, dtype=torch.float64)},
        {"a": torch.zeros(3, 600)[:, ::2]},
        {"a": torch.zeros(2, 300)},
        {"a": torch.zeros(3, 300, device="meta")},
        {"a": torch.zeros(3, 300).tolist()},
        {"x": None, "index": torch.zeros(5)},
    ],
)
def test_remembered_check_does_not_hide_an_error(change):
    """Passed checks are remembered, failed ones are not."""
    contract = Contract("demo", optional=OPTIONAL, **RULES)
    for _ in range(2):
        contract.check(good() | {"index": None})
        with pytest.raises((TypeError, ValueError), match="demo: "):
            contract.check(good() | {"index": None} | change)


def test_number_of_remembered_checks_is_limited(monkeypatch):
    monkeypatch.setattr("deepkern.runtime.contract.REMEMBERED", 3)
    contract = Contract("demo", a="real [M]")
    for n in range(10):
        contract.check({"a": torch.zeros(n)})
        assert contract.num_remembered <= 3


@pytest.mark.parametrize("argument", ["a", "scale"])
def test_required_argument_is_none(argument):
    expected = f"demo: {argument}: expected {RULES[argument].removesuffix(' strided')}, got None"
    with pytest.raises(TypeError) as caught:
        CONTRACT.check({**good(), argument: None})
    assert str(caught.value) == expected


def test_the_most_basic_error_comes_first():
    """Devices of all arguments are checked before any dtype, dtypes before ranks, and so on."""
    tensors = {
        **good(),
        "a": torch.zeros(3, dtype=torch.int64),
        "scale": torch.zeros(1, device="meta"),
    }
    with pytest.raises(ValueError, match="scale: expected device"):
        CONTRACT.check(tensors)
    tensors["scale"] = torch.zeros(1)
    with pytest.raises(TypeError, match="a: expected dtype"):
        CONTRACT.check(tensors)


def test_unreadable_rule():
    with pytest.raises(ValueError, match="cannot read"):
        Contract("demo", a="real M, K")


def test_helpers_name_op_argument_expected_and_got():
    with pytest.raises(ValueError, match="demo: mode: expected 'a' or 'b', got 'c'"):
        check_choice("demo", "mode", "c", ("a", "b"))
    with pytest.raises(ValueError, match="demo: topk: expected at most 8, got 9"):
        check_that("demo", "topk", False, "at most 8", 9)
    check_choice("demo", "mode", "a", ("a", "b"))
    check_that("demo", "topk", True, "at most 8", 8)
