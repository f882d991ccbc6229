"""The `@op` decorator: one function states an op's schema, checks, fake kernel and documentation.

    @op(x="real [..., K]")
    def cast_per_token(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
        '''What users read.'''
        check_choice(...)            # rules that the tensor contract cannot state
        # Fake kernel: allocates the outputs; the launcher of a backend computes them.
        return x.new_empty(...), x.new_empty(...)

    @cast_per_token.op.register_launcher("triton")
    def _launch_triton(x, scale_format):
        q, scale = cast_per_token.op.allocate(x, scale_format)
        cast_per_token_kernel[grid](...)
        return q, scale

`cast_per_token` is then the public function, with the signature, annotations and docstring above.
`cast_per_token.op`, also `OPS["cast_per_token"]`, is the `Op`: schema, contract and launchers.
The function body never computes. It is the fake kernel of `torch.ops.deepkern.cast_per_token`, and
every launcher starts by calling it through `allocate`.

The `torch` backend is `deepkern.reference.cast_per_token`. The `cpu` and `cuda` backends are the
op of the same name in `deepkern._C`. Both are looked up by name and need no registration.

A call runs: public function -> torch.ops.deepkern.X -> Op.run (picks the backend) -> launcher ->
kernel.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from . import backends, compiled
from .contract import Contract, check_no_transform

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
F = TypeVar("F", bound=Callable[..., Any])

LIBRARY = torch.library.Library("deepkern", "DEF")
OPS: dict[str, Op] = {}
_PLAIN = (Tensor, torch.nn.Parameter)  # not a subclass with its own dispatch


class LazyOps(type(torch.ops.deepkern)):  # type: ignore[misc]
    """`torch.ops.deepkern`, which loads all ops when one that is not defined yet is looked up."""

    load: Callable[[], object]
    defining = False  # torch.library looks up an op before it defines it

    def __getattr__(self, op_name: str) -> object:
        try:
            return super().__getattr__(op_name)
        except AttributeError:
            if op_name.startswith("__") or LazyOps.defining:
                raise
        LazyOps.load()
        return super().__getattr__(op_name)


def install_lazy_ops(load: Callable[[], object]) -> None:
    """Makes `torch.ops.deepkern` call `load`, which defines all ops, at first use."""
    LazyOps.load = staticmethod(load)
    torch.ops.deepkern = LazyOps("deepkern")


class OpFunction(Protocol[P, R_co]):
    """The public function of an op: the decorated signature, and the `Op` behind it."""

    __name__: str
    op: Op

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class Op:
    """What the package knows about one op. The public function holds it as `.op`."""

    def __init__(
        self,
        describe: Callable,
        rules: dict[str, str],
        mutates: tuple[str, ...],
        optional_output: tuple[str, ...],
    ):
        self.name = describe.__name__
        self.describe = describe
        self.annotations = typing.get_type_hints(describe)
        parameters = inspect.signature(describe).parameters.values()
        self.parameters = tuple((p.name, p.default) for p in parameters)
        self.names = tuple(name for name, _ in self.parameters)
        optional = {name for name in rules if _is_optional(self.annotations[name])}
        self.contract = Contract(self.name, optional=optional, **rules)
        self.tensors = tuple((i, n) for i, n in enumerate(self.names) if n in rules)
        self.required = tuple((i, n) for i, n in self.tensors if n not in optional)
        self.launchers: dict[str, Callable] = {}  # by backend
        self.limits: dict[str, Callable] = {}  # by backend; see register_limits
        self.autograd: type[torch.autograd.Function] | None = None
        self.choose_tile: Callable | None = None
        self.debug_check: Callable | None = None
        # The public function returns None for this output if all of these arguments are None.
        self.optional_output = optional_output
        self._define(mutates)
        OPS[self.name] = self

    def _define(self, mutates: tuple[str, ...]) -> None:
        """Registers the schema, the implementation and the fake kernel with torch.library."""
        signature = inspect.signature(self.describe, eval_str=True)
        returns, self.optional_index = _schema_returns(signature.return_annotation)

        def prototype(*args): ...

        prototype.__signature__ = signature.replace(return_annotation=returns)  # type: ignore
        schema = torch.library.infer_schema(prototype, mutates_args=mutates)
        LazyOps.defining = True
        try:
            LIBRARY.define(self.name + schema, tags=(torch.Tag.needs_exact_strides,))
            LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"deepkern::{self.name}", self.allocate, lib=LIBRARY)
        finally:
            LazyOps.defining = False
        self.overload = getattr(torch.ops.deepkern, self.name).default

    # Registration, used as decorators.

    def register_launcher(self, backend: str) -> Callable[[F], F]:
        """The launcher of one backend. It receives every argument, by position."""

        def register(launch: F) -> F:
            self.launchers[backend] = launch
            return launch

        return register

    def register_limits(self, backend: str) -> Callable[[F], F]:
        """(*args), unchecked -> why `backend` does not support these arguments, or None."""

        def register(unsupported_reason: F) -> F:
            self.limits[backend] = unsupported_reason
            return unsupported_reason

        return register

    def register_tile(self, choose_tile: F) -> F:
        """(*args) -> the tile that the Triton launcher uses; `explain` prints it."""
        self.choose_tile = choose_tile
        return choose_tile

    def register_debug_check(self, check: F) -> F:
        """(*args) -> None; reads device contents and raises. Runs under DEEPKERN_DEBUG=1."""
        self.debug_check = check
        return check

    def register_autograd(self, function: type[torch.autograd.Function]):
        """The autograd.Function that the public function applies when gradients are enabled."""
        self.autograd = function
        return function

    # The call path.

    def call(self, args: tuple, kwargs: dict):
        """What the public function does: autograd, clear type errors, optional outputs."""
        try:
            if self.autograd is not None and torch.is_grad_enabled():
                check_no_transform(self.name)
                outputs = self.autograd.apply(*self.positional(args, kwargs))
            else:
                outputs = self.call_native(args, kwargs)
                if outputs is NotImplemented:
                    outputs = self.overload(*args, **kwargs)
        except (RuntimeError, AttributeError):
            self.check_types(args, kwargs)
            raise
        if not self.optional_output:
            return outputs
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if any(given.get(name) is not None for name in self.optional_output):
            return outputs
        i = self.optional_index
        return (*outputs[:i], None, *outputs[i + 1 :])

    def call_native(self, args: tuple, kwargs: dict):
        """The native CPU op, called directly; NotImplemented if `run` must serve the call.

        On a CPU, choosing a backend and checking arguments in Python takes longer than most kernels
        take for one token. The native op rejects what the contract rejects; `run` then repeats
        the checks and raises the full message.
        """
        if torch.compiler.is_compiling():
            return NotImplemented
        native_op = getattr(self.launchers.get("cpu"), "native", None)  # after the first call
        if native_op is None or not backends.auto_or_cpu() or _len_torch_dispatch_stack():
            return NotImplemented
        for x in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(x, Tensor) and (type(x) not in _PLAIN or not x.is_cpu):
                return NotImplemented
        try:
            return native_op(*args, **kwargs)
        except (RuntimeError, TypeError):
            return NotImplemented

    def run(self, *args, **kwargs):
        """The implementation of torch.ops.deepkern.X: picks the backend, calls its launcher."""
        args = self.positional(args, kwargs)
        for i, name in self.required:
            if args[i] is None:  # the dispatcher accepts None for a Tensor
                self.contract.missing(name)
        device = self.device(args)
        backend = backends.choose(self, device, args)
        launch = self.launcher(backend)
        if self.debug_check is not None and os.environ.get("DEEPKERN_DEBUG") == "1":
            self.check(*args)
            self.debug_check(*args)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*args)
        if backend == "triton" and device.type == "cpu":
            return compiled.run(launch, args)
        return launch(*args)

    def launcher(self, backend: str) -> Callable:
        """The function that runs this op on `backend`. It checks its arguments itself."""
        launch = self.launchers.get(backend)
        if launch is None:
            launch = self.launchers[backend] = self._checked(
                backends.find_launcher(self.name, backend)
            )
        return launch

    def _checked(self, launch: Callable) -> Callable:
        """Wraps a launcher that allocates its own outputs: `allocate` is called for its checks."""

        def checked(*args):
            outputs = self.allocate(*args)
            results = launch(*args)
            if not self.optional_output:
                return results
            return tuple(o if r is None else r for r, o in zip(results, outputs, strict=True))

        if "cpu" not in self.limits:
            checked.native = launch  # type: ignore[attr-defined]  # see call_native
        return checked

    def allocate(self, *args, **kwargs):
        """Checks the arguments and returns the outputs, uninitialized."""
        args = self.positional(args, kwargs)
        self.check(*args)
        return self.describe(*args)

    # Arguments.

    def positional(self, args: tuple, kwargs: dict | None = None) -> tuple:
        """All arguments in the schema's order, defaults filled in."""
        if len(args) == len(self.parameters) and not kwargs:
            return args
        kwargs = dict(kwargs or {})
        rest = [kwargs.pop(name, default) for name, default in self.parameters[len(args) :]]
        missing = [n for (n, _), v in zip(self.parameters[len(args) :], rest, strict=False)
                   if v is inspect.Parameter.empty]  # fmt: skip
        if missing or kwargs or len(args) > len(self.parameters):
            problem = (
                f"missing {missing}" if missing else f"unexpected {sorted(kwargs) or 'arguments'}"
            )
            raise TypeError(f"{self.name}: {problem}; it takes {[*self.names]}")
        return (*args, *rest)

    def check(self, *args) -> None:
        """Checks the tensor arguments against the contract; all arguments, by position."""
        self.contract.check({name: args[i] for i, name in self.tensors})

    def check_types(self, args: tuple, kwargs: dict) -> None:
        """Raises TypeError for the first argument whose type does not match its annotation."""
        for name, value in zip(self.names, self.positional(args, kwargs), strict=True):
            annotation = self.annotations[name]
            if value is None and name in self.contract.rules and not _is_optional(annotation):
                self.contract.missing(name)
            if not _matches(value, annotation):
                expected = _type_name(annotation)
                raise TypeError(
                    f"{self.name}: {name}: expected {expected}, got {type(value).__name__}"
                )

    def device(self, args: tuple) -> torch.device:
        """The device of the first tensor argument."""
        for i, _ in self.tensors:
            if isinstance(args[i], Tensor):
                return args[i].device
        raise TypeError(f"{self.name}: expected a Tensor, got none")


def op(
    mutates: tuple[str, ...] = (), optional_output: tuple[str, ...] = (), **rules: str
) -> Callable[[Callable[P, R_co]], OpFunction[P, R_co]]:
    """Turns a description into an op and returns its public function.

    Args:
        mutates: names of the arguments that the op writes.
        optional_output: arguments; if all of them are None, the output that is annotated
            `Tensor | None` is None (torch.ops.deepkern.X returns an empty tensor there).
        rules: the tensor contract by argument name (see contract.py).
    """

    def define(describe: Callable[P, R_co]) -> OpFunction[P, R_co]:
        described = Op(describe, rules, mutates, optional_output)

        @functools.wraps(describe)
        def public(*args, **kwargs):
            return described.call(args, kwargs)

        public.op = described
        return typing.cast("OpFunction[P, R_co]", public)

    return define


def _is_optional(annotation: object) -> bool:
    return type(None) in typing.get_args(annotation)


def _schema_returns(annotation: object) -> tuple[object, int]:
    """The return annotation with `Tensor | None` as `Tensor`, and the index of that output.

    Op schemas have no optional outputs: the op returns an empty tensor in its place.
    """
    outputs = typing.get_args(annotation)
    optional = [i for i, output in enumerate(outputs) if _is_optional(output)]
    if not optional:
        return annotation, -1
    plain = tuple(Tensor if i in optional else output for i, output in enumerate(outputs))
    return tuple[plain], optional[0]  # type: ignore[valid-type]


_SCALARS = {
    int: (int, torch.SymInt),
    float: (float, int, torch.SymFloat, torch.SymInt),
    bool: (bool, torch.SymBool),
}


def _matches(value: object, annotation: object) -> bool:
    """Whether `value` has a type that the dispatcher accepts for `annotation`."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, choice) for choice in typing.get_args(annotation))
    if origin is not None:  # Sequence[int] and the like
        (item, *_) = typing.get_args(annotation)
        return isinstance(value, (list, tuple)) and all(_matches(v, item) for v in value)
    if annotation in _SCALARS:
        return isinstance(value, _SCALARS[annotation])
    return isinstance(value, annotation)


def _type_name(annotation: object) -> str:
    if _is_optional(annotation):
        names = [_type_name(a) for a in typing.get_args(annotation) if a is not type(None)]
        return " or ".join([*names, "None"])
    if annotation is torch.dtype:
        return "torch.dtype"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)
