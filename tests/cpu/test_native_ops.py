"""What holds for all native CPU ops: schemas, and the direct call of the public functions."""

from __future__ import annotations

import re

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import deepkern
from deepkern.runtime import native
from deepkern.testing import compare, ops

OPS = sorted(deepkern.OPS)
pytestmark = pytest.mark.skipif(native.missing_reason() is not None, reason="no native ops")


def without_alias_names(schema: object) -> str:
    text = str(schema).partition("::")[2].replace("SymInt", "int")
    return re.sub(r"\(a\d*!\)", "(a!)", text)


@pytest.mark.parametrize("name", OPS)
def test_every_op_is_native_with_the_same_schema(name):
    op = native.native_op(name)
    assert op is not None, f"no CPU kernel of {name}"
    assert without_alias_names(op._schema) == without_alias_names(
        deepkern.OPS[name].overload._schema
    )


class Recorder:
    """Counts the calls of a native op."""

    def __init__(self, op) -> None:
        self.op, self.calls = op, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.op(*args, **kwargs)


@pytest.fixture
def native_cast(monkeypatch) -> Recorder:
    """The native cast_per_token, in the place from which public functions call it directly."""
    launch = deepkern.cast_per_token.op.launcher("cpu")
    recorder = Recorder(launch.native)
    monkeypatch.setattr(launch, "native", recorder)
    return recorder


def test_public_function_calls_the_native_op(native_cast):
    x = torch.randn(3, 200)
    got = deepkern.cast_per_token(x, scale_format="ue8m0")
    assert native_cast.calls == 1
    for a, b in zip(got, deepkern.reference.cast_per_token(x, "ue8m0"), strict=True):
        compare.assert_bitwise(a, b, "cast_per_token")


def test_forced_backend_is_not_bypassed(native_cast, monkeypatch):
    x = torch.randn(3, 200)
    with deepkern.backend("torch"):
        deepkern.cast_per_token(x)
    monkeypatch.setenv("DEEPKERN_BACKEND", "torch")
    deepkern.cast_per_token(x)
    monkeypatch.setenv("DEEPKERN_BACKEND", "cpu")
    assert native_cast.calls == 0
    deepkern.cast_per_token(x)
    assert native_cast.calls == 1


def test_debug_checks_are_not_bypassed(monkeypatch):
    idx = torch.tensor([[7]])
    deepkern.expert_load(idx, 4)  # the next call could go to the native op directly
    deepkern.expert_dispatch(torch.ones(1, 8), idx, 4)
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    with pytest.raises(ValueError, match="topk_idx"):
        deepkern.expert_dispatch(torch.ones(1, 8), idx, 4)


def test_tensor_subclasses_and_modes_take_the_long_way(native_cast):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, scale = deepkern.cast_per_token(torch.empty(3, 200))
    assert q.shape == (3, 200) and scale.shape == (3, 2)
    traced = make_fx(lambda x: deepkern.cast_per_token(x)[1])(torch.randn(2, 5))
    assert torch.ops.deepkern.cast_per_token.default in {n.target for n in traced.graph.nodes}
    assert native_cast.calls <= 1  # make_fx runs the op under it


@pytest.mark.parametrize("name", OPS)
def test_direct_call_raises_the_same_error(name, generator):
    """A call that the native op refuses gets the message of the Python checks."""
    args = list(ops.inputs(name, generator, **ops.sizes(name).small[0]))
    public = getattr(deepkern, name)
    position = next(i for i, _ in deepkern.OPS[name].required)
    with torch.no_grad():
        public(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
        args[position] = torch.zeros(args[position].shape, dtype=torch.complex64)
        with pytest.raises((ValueError, TypeError), match=f"^{name}: ") as direct:
            public(*args)
    with pytest.raises((ValueError, TypeError)) as checked:
        deepkern.OPS[name].check(*deepkern.OPS[name].positional(tuple(args)))
    assert str(direct.value) == str(checked.value)
