"""An op, described once.

    @op(x="real [..., K]")
    def cast_per_token(x: Tensor, scale_format: str = "fp32") -> tuple[Tensor, Tensor]:
        '''What users read.'''
        check_choice(...)            # rules that the tensor contract cannot state
        return x.new_empty(...), x.new_empty(...)

    @cast_per_token.backend("triton")
    def launch(x, scale_format):
        q, scale = cast_per_token.allocate(x, scale_format)
        kernel[grid](...)
        return q, scale

The signature is the schema of `torch.ops.deepkern.cast_per_token`; the body, which checks and
allocates the outputs, is the fake kernel and what every launcher starts from. The `torch` backend
is `deepkern.reference.cast_per_token`, and `cpu` and `cuda` are the op of the same name in
`deepkern._C`: found by name, never registered by hand.

A call goes: torch.ops.deepkern.X -> Op.run (picks the backend) -> launcher -> kernel.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable

import torch
from torch import Tensor

from . import backends
from .contract import Contract

LIBRARY = torch.library.Library("deepkern", "DEF")
OPS: dict[str, Op] = {}
_WRONG_TYPE = re.compile(
    r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
)


class Op:
    """A described op; calling it is the public function, autograd included."""

    def __init__(self, describe: Callable, rules: dict[str, str], mutates: tuple[str, ...]):
        functools.update_wrapper(self, describe)
        self.name = describe.__name__
        self.contract = Contract(self.name, **rules)
        parameters = inspect.signature(describe).parameters.values()
        self.parameters = tuple((p.name, p.default) for p in parameters)
        self.names = tuple(name for name, _ in self.parameters)
        self.tensors = tuple((i, n) for i, (n, _) in enumerate(self.parameters) if n in rules)
        self.launchers: dict[str, Callable] = {}
        # By backend: (*args), not yet checked -> why it does not serve these arguments, or None.
        self.declines: dict[str, Callable] = {}
        self.autograd: type[torch.autograd.Function] | None = None
        self.tile: Callable | None = None  # (*args) -> the tile a launch would use, for explain()
        self.check_contents: Callable | None = None  # run under DEEPKERN_DEBUG=1
        # (i, *arguments): output i is None where all of these are; the op itself returns it empty.
        self.optional_output: tuple | None = None
        schema = torch.library.infer_schema(describe, mutates_args=mutates)
        LIBRARY.define(self.name + schema, tags=(torch.Tag.needs_exact_strides,))
        LIBRARY.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"deepkern::{self.name}", self.allocate, lib=LIBRARY)
        self.overload = getattr(torch.ops.deepkern, self.name).default
        OPS[self.name] = self

    def __call__(self, *args, **kwargs):
        if self.autograd is None or not torch.is_grad_enabled():
            try:
                outputs = self.overload(*args, **kwargs)
            except RuntimeError as error:
                raise self.refusal(error) from None
        else:
            outputs = self.autograd.apply(*self.positional(args, kwargs))
        if self.optional_output is None:
            return outputs
        (i, *names), given = (
            self.optional_output,
            dict(zip(self.names, args, strict=False)) | kwargs,
        )
        if any(given.get(name) is not None for name in names):
            return outputs
        return (*outputs[:i], None, *outputs[i + 1 :])

    def refusal(self, error: RuntimeError) -> Exception:
        """torch's complaint about an argument of the wrong type as a TypeError in our own words."""
        wrong = _WRONG_TYPE.search(str(error))
        if wrong:
            return TypeError("{}: {}: expected {}, got {}".format(self.name, *wrong.group(2, 1, 3)))
        first_line = str(error).split("\n")[0]
        if f"deepkern::{self.name}" in first_line:
            return TypeError(f"{self.name}: {first_line}")
        return error

    def backend(self, name: str) -> Callable[[Callable], Callable]:
        """Decorates the launcher of one backend; it gets every argument, by position."""

        def register(launch: Callable) -> Callable:
            self.launchers[name] = launch
            return launch

        return register

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
            raise TypeError(f"{self.name}: {problem}; it takes {[n for n, _ in self.parameters]}")
        return (*args, *rest)

    def check(self, *args) -> None:
        """Checks the tensor arguments against the contract; all arguments, by position."""
        self.contract.check({name: args[i] for i, name in self.tensors})

    def allocate(self, *args, **kwargs):
        """Checks the arguments and returns the outputs, not yet written."""
        args = self.positional(args, kwargs)
        self.check(*args)
        return self.__wrapped__(*args)

    def run(self, *args, **kwargs):
        """The op's one implementation: picks the backend, then calls its launcher."""
        args = self.positional(args, kwargs)
        device = self.device(args)
        launch = self.launcher(backends.choose(self, device, args))
        if self.check_contents is not None and os.environ.get("DEEPKERN_DEBUG") == "1":
            self.check(*args)
            self.check_contents(*args)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*args)
        return launch(*args)

    def launcher(self, backend: str) -> Callable:
        """The function that runs this op on `backend`; it checks its arguments itself."""
        launch = self.launchers.get(backend)
        if launch is None:
            launch = self.launchers[backend] = self._checked(backends.find(self.name, backend))
        return launch

    def _checked(self, launch: Callable) -> Callable:
        """For backends that allocate for themselves: `allocate` is called for its checks only."""

        def checked(*args):
            outputs = self.allocate(*args)
            got = launch(*args)
            if self.optional_output is None:
                return got
            return tuple(o if g is None else g for g, o in zip(got, outputs, strict=True))

        return checked

    def device(self, args: tuple) -> torch.device:
        for i, _ in self.tensors:
            if isinstance(args[i], Tensor):
                return args[i].device
        raise TypeError(f"{self.name}: expected a Tensor, got none")


def op(mutates: tuple[str, ...] = (), **rules: str) -> Callable[[Callable], Op]:
    """Turns a description into an op: `rules` are the tensor contract (see contract.py)."""
    return lambda describe: Op(describe, rules, mutates)
