"""What holds for every op, by walking the registry: twins, errors, opcheck, compile, repetition."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import deepkern
from deepkern.runtime import backends
from deepkern.runtime.contract import DTYPES
from deepkern.testing import compare, ops

ROOT = Path(__file__).parent.parent
OPS = sorted(deepkern.OPS)
FORWARD = [name for name in OPS if not name.endswith("_backward")]
BACKENDS = ["torch", "triton"]
CPU = torch.device("cpu")
# The torch backend is the oracle and is not compared with itself; bench/ compares it with plain
# PyTorch.
CHECKED = [
    (name, backend)
    for name in OPS
    for backend in ("triton", "cpu")
    if backend == "triton" or backends.unsupported_reason(deepkern.OPS[name], "cpu", CPU) is None
]


def small(name: str, generator: torch.Generator, index: int = 0) -> tuple:
    return ops.inputs(name, generator, **ops.sizes(name).small[index])


def call(name: str, args: tuple):
    """The op on a copy of its tensors, and then all it returned or wrote."""
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    got = getattr(torch.ops.deepkern, name)(*args)
    return args if got is None else got


def oracle(name: str, args: tuple):
    args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
    got = getattr(deepkern.reference, name)(*args)
    return args if got is None else got


@pytest.mark.parametrize("name", FORWARD)
def test_twins(name):
    family = inspect.getmodule(deepkern.OPS[name].describe).__name__.split(".")[1]
    assert (ROOT / f"kernels/deepkern/{family}/{name}.py").exists()
    assert (ROOT / f"tests/{family}/test_{name}.py").exists()
    assert hasattr(importlib.import_module(f"deepkern.reference.{family}"), name)
    assert callable(getattr(deepkern, name))
    assert ops.facts(name).SIZES
    assert inspect.getdoc(deepkern.OPS[name]), "no docstring"


@pytest.mark.parametrize("name", OPS)
def test_reference_takes_the_same_arguments(name):
    reference = inspect.signature(getattr(deepkern.reference, name)).parameters
    assert [(p.name, p.default) for p in reference.values()] == list(deepkern.OPS[name].parameters)


@pytest.mark.parametrize(("name", "backend"), CHECKED)
def test_matches_oracle(name, backend, generator):
    if backend == "cpu" and generator.device != CPU:
        pytest.skip("the cpu backend takes CPU tensors")
    for index in range(len(ops.sizes(name).small)):
        args = small(name, generator, index)
        with deepkern.backend(backend):
            got = call(name, args)
        compare.assert_matches(name, got, oracle(name, args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_same_bits_twice(name, backend, generator):
    args = small(name, generator)
    with deepkern.backend(backend):
        first, second = compare.as_tuple(call(name, args)), compare.as_tuple(call(name, args))
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            compare.assert_bitwise(a, b, name)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend, generator, monkeypatch):
    # opcheck compares inputs with torch.allclose, which does not support FP8 on a CPU.
    widened = {torch.float8_e4m3fn: torch.float32}
    allclose = torch.allclose
    monkeypatch.setattr(
        torch,
        "allclose",
        lambda a, b, **kw: allclose(
            a.to(widened.get(a.dtype, a.dtype)), b.to(widened.get(b.dtype, b.dtype)), **kw
        ),
    )
    args = small(name, generator)
    torch.library.opcheck(getattr(torch.ops.deepkern, name).default, args)


@pytest.mark.parametrize("name", OPS)
def test_compile_fullgraph(name, backend, generator):
    """The public function and the op under it, each traced whole."""
    args = small(name, generator)
    for function in (getattr(deepkern, name), getattr(torch.ops.deepkern, name)):
        torch._dynamo.reset()

        def step(*args, function=function):
            return function(*args)

        copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(*copies)
        compare.assert_matches(name, copies if got is None else got, oracle(name, args))


# One broken variant of a tensor per kind of error, in the order in which they are reported.
BREAK = {
    "device": lambda x: x.to("meta"),
    "dtype": lambda x: torch.zeros(x.shape, dtype=torch.complex64, device=x.device),
    "rank": lambda x: x.new_empty(()) if x.dim() else x.new_empty((2, 2)),
    "shape": lambda x: x.new_zeros((*x.shape[:-1], x.shape[-1] + 1)),
    "stride": lambda x: x.new_zeros((*x.shape, 2))[..., 0],
}
ERRORS = [
    (name, argument, kind)
    for name in OPS
    for argument, rule in deepkern.OPS[name].contract.rules.items()
    for kind in BREAK
    if not (kind == "rank" and rule.leading and not rule.dims)  # any rank is accepted
    if not (kind == "stride" and rule.layout == "strided")  # any stride is accepted
]
REQUIRED = [(name, argument) for name in OPS for _, argument in deepkern.OPS[name].required]
WRONG_TYPES = [(name, argument) for name in OPS for argument in deepkern.OPS[name].names]


class Unknown:
    """A value of a type that no argument accepts."""


@pytest.mark.parametrize(("name", "argument", "kind"), ERRORS)
def test_bad_tensor(name, argument, kind, backend, generator):
    described = deepkern.OPS[name]
    position = [p for p, _ in described.parameters].index(argument)
    for size in ops.sizes(name).small:  # the first size at which the argument is given
        args = list(ops.inputs(name, generator, **size))
        if isinstance(args[position], torch.Tensor):
            break
    else:
        pytest.fail(f"no small size of {name} gives {argument}")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    rule = described.contract.rules[argument]
    free = not rule.dims or rule.dims[-1] == "_"
    if kind == "device" and len(tensors) == 1:
        pytest.skip("the only tensor sets the device")
    if kind == "shape" and (free or not _is_bound(described, argument, tensors)):
        pytest.skip("no other argument binds the last dimension")
    args[position] = BREAK[kind](args[position])
    error = TypeError if kind == "dtype" else ValueError
    with pytest.raises(error) as caught:
        getattr(torch.ops.deepkern, name)(*args)
    message = str(caught.value)
    assert message.startswith(f"{name}: ") and "expected" in message and "got" in message, message


@pytest.mark.parametrize(("name", "argument"), REQUIRED)
def test_none_for_a_required_tensor(name, argument, backend, generator):
    """On every backend, through the public function and through torch.ops."""
    described = deepkern.OPS[name]
    args = list(small(name, generator))
    args[described.names.index(argument)] = None
    rule = described.contract.rules[argument].text.removesuffix(" strided")
    expected = f"{name}: {argument}: expected {rule.removesuffix(' contiguous')}, got None"
    for function in (getattr(deepkern, name), getattr(torch.ops.deepkern, name)):
        with pytest.raises(TypeError) as caught:
            function(*args)
        assert str(caught.value) == expected


@pytest.mark.parametrize(("name", "argument"), WRONG_TYPES)
def test_argument_of_a_wrong_type(name, argument, backend, generator):
    described = deepkern.OPS[name]
    args = list(described.positional(small(name, generator)))
    dtype = described.annotations[argument] is torch.dtype
    value, kind = ("bfloat16", "str") if dtype else (Unknown(), "Unknown")
    args[described.names.index(argument)] = value
    with pytest.raises(TypeError) as caught:
        getattr(deepkern, name)(*args)
    message = str(caught.value)
    assert message.startswith(f"{name}: {argument}: expected "), message
    assert message.endswith(f", got {kind}"), message


def _is_bound(described, argument: str, tensors) -> bool:
    """Whether the last dimension of `argument` is also stated by another argument or a number."""
    last = described.contract.rules[argument].dims[-1]
    stem = last.split("/")[0].split("+")[0]
    others = [d for n, r in described.contract.rules.items() if n != argument for d in r.dims]
    return len(tensors) > 1 and (last.isdigit() or any(d.split("/")[0] == stem for d in others))


@pytest.mark.parametrize("name", OPS)
def test_contract_names_known_dtypes(name):
    for rule in deepkern.OPS[name].contract.rules.values():
        assert set(rule.dtypes) <= set(sum(DTYPES.values(), ()))
