"""What holds for every op, by walking the registry: twins, errors, opcheck, compile, repetition."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

import deepkern
from deepkern.runtime import backends, native
from deepkern.runtime.contract import DTYPES
from deepkern.testing import compare, ops

ROOT = Path(__file__).parent.parent
OPS = sorted(deepkern.OPS)
FORWARD = [name for name in OPS if not name.endswith("_backward")]
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
    """At every small size; a second call at the first one gives the same bits."""
    if backend == "cpu" and generator.device != CPU:
        pytest.skip("the cpu backend takes CPU tensors")
    for index in range(len(ops.sizes(name).small)):
        args = small(name, generator, index)
        with deepkern.backend(backend):
            got = call(name, args)
            if index == 0:
                assert_same_bits(name, call(name, args), got)
        compare.assert_matches(name, got, oracle(name, args))


def assert_same_bits(name: str, got, want) -> None:
    for a, b in zip(compare.as_tuple(got), compare.as_tuple(want), strict=True):
        if isinstance(a, torch.Tensor):
            compare.assert_bitwise(a, b, name)


@pytest.mark.parametrize("name", OPS)
def test_reference_gives_the_same_bits_twice(name, generator):
    args = small(name, generator)
    with deepkern.backend("torch"):
        assert_same_bits(name, call(name, args), call(name, args))


# Arguments are checked and traced before an instruction set is chosen, so `cpu` stands for all.
every_backend = pytest.mark.parametrize("backend", ["torch", "triton", "cpu"], indirect=True)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, backend, generator, monkeypatch):
    """On `triton` and `cpu` the checks that depend on the backend: those of a call's results."""
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
    checks = {} if backend == "torch" else {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(getattr(torch.ops.deepkern, name).default, args, **checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_compile_fullgraph(name, generator):
    """The public function and the op under it, each traced whole; then on every backend."""
    args = small(name, generator)
    want = oracle(name, args)
    for function in (getattr(deepkern, name), getattr(torch.ops.deepkern, name)):
        torch._dynamo.reset()

        def step(*args, function=function):
            return function(*args)

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for backend in backends_here(generator.device):
            copies = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            with deepkern.backend(backend):
                got = compiled(*copies)
            compare.assert_matches(name, copies if got is None else got, want)


def backends_here(device: torch.device) -> list[str]:
    """The backends that have every op on the device."""
    native_ops = device == CPU and native.missing_reason() is None
    return ["torch", "triton", *(["cpu"] if native_ops else [])]


# One broken variant of a tensor per kind of error, in the order in which they are reported.
BREAK = {
    "device": lambda x: x.to("meta"),
    "dtype": lambda x: torch.zeros(x.shape, dtype=torch.complex64, device=x.device),
    "rank": lambda x: x.new_empty(()) if x.dim() else x.new_empty((2, 2)),
    "shape": lambda x: x.new_zeros((*x.shape[:-1], x.shape[-1] + 1)),
    "stride": lambda x: x.new_zeros((*x.shape, 2))[..., 0],
}


class Unknown:
    """A value of a type that no argument accepts."""


def unexpected(call, error: type[Exception], pattern: str) -> str:
    """What is wrong with the error that a call must raise; empty if nothing is."""
    try:
        call()
    except Exception as raised:
        if not isinstance(raised, error):
            return f"{type(raised).__name__} instead of {error.__name__}: {raised}"
        matches = re.fullmatch(pattern, str(raised), re.DOTALL)
        return "" if matches else f"unexpected message: {raised}"
    return f"no {error.__name__}"


def broken_tensors(name: str, generator: torch.Generator):
    """(argument, kind of error, arguments): one argument is broken, the others are good."""
    described = deepkern.OPS[name]
    sizes = [ops.inputs(name, generator, **size) for size in ops.sizes(name).small]
    for argument, rule in described.contract.rules.items():
        position = described.names.index(argument)
        # The first size at which the argument is given.
        args = next((a for a in sizes if isinstance(a[position], torch.Tensor)), None)
        assert args is not None, f"no small size of {name} gives {argument}"
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        any_rank = rule.leading and not rule.dims
        any_width = not rule.dims or rule.dims[-1] == "_"
        kinds = {
            "device": len(tensors) > 1,  # the only tensor sets the device
            "dtype": True,
            "rank": not any_rank,
            "shape": not any_width and _is_bound(described, argument, tensors),
            "stride": rule.layout != "strided",
        }
        for kind in (kind for kind in BREAK if kinds[kind]):
            broken = BREAK[kind](args[position])
            yield argument, kind, (*args[:position], broken, *args[position + 1 :])


@every_backend
@pytest.mark.parametrize("name", OPS)
def test_bad_tensor(name, backend, generator):
    """Each tensor argument with each kind of error."""
    op, problems = getattr(torch.ops.deepkern, name), []
    for argument, kind, args in broken_tensors(name, generator):
        error = TypeError if kind == "dtype" else ValueError
        call = functools.partial(op, *args)
        problem = unexpected(call, error, f"{name}: .*expected .*got .*")
        if problem:
            problems.append(f"{argument}, {kind}: {problem}")
    assert not problems, "\n".join(problems)


@every_backend
@pytest.mark.parametrize("name", OPS)
def test_none_for_a_required_tensor(name, backend, generator):
    """On every backend, through the public function and through torch.ops."""
    described, problems = deepkern.OPS[name], []
    good = small(name, generator)
    for _, argument in described.required:
        args = list(good)
        args[described.names.index(argument)] = None
        rule = described.contract.rules[argument].text.removesuffix(" strided")
        expected = f"{name}: {argument}: expected {rule.removesuffix(' contiguous')}, got None"
        for function in (getattr(deepkern, name), getattr(torch.ops.deepkern, name)):
            call = functools.partial(function, *args)
            problem = unexpected(call, TypeError, re.escape(expected))
            if problem:
                problems.append(f"{argument}, {function}: {problem}")
    assert not problems, "\n".join(problems)


@every_backend
@pytest.mark.parametrize("name", OPS)
def test_argument_of_a_wrong_type(name, backend, generator):
    described, problems = deepkern.OPS[name], []
    good = described.positional(small(name, generator))
    for position, argument in enumerate(described.names):
        dtype = described.annotations[argument] is torch.dtype
        value, kind = ("bfloat16", "str") if dtype else (Unknown(), "Unknown")
        args = (*good[:position], value, *good[position + 1 :])
        call = functools.partial(getattr(deepkern, name), *args)
        problem = unexpected(call, TypeError, f"{name}: {argument}: expected .*, got {kind}")
        if problem:
            problems.append(f"{argument}: {problem}")
    assert not problems, "\n".join(problems)


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
