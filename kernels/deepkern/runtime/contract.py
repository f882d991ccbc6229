"""The tensor contract of an op: dtype, shape and stride rules as text, checked before a launch.

`Contract("fp8_gemm_nt", a="fp8 [M, K]", a_scale="fp32 [M, K/128] strided", ...)` reads like the
table in the docs. A dtype is a key of `DTYPES`, or several joined by `|`. A dimension is one of

- a number;
- a name: its first use binds it, later uses must be equal;
- `K/128`: ceil(K / 128);
- `G+1`;
- `_`: any size;
- a leading `...`: any leading dimensions, equal in all arguments that have `...`.

The last dimension must be contiguous, unless the text ends in `strided` (any strides) or
`contiguous` (the whole tensor).

The checks run in the order device, dtype, rank, shape, stride, each over all arguments. The error
that is raised is therefore the most basic one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
REMEMBERED = 4096  # signatures that one contract remembers as passed
DTYPES = {
    "fp8": (FP8,),
    "real": (torch.bfloat16, torch.float16, torch.float32),
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "int32": (torch.int32,),
    "int64": (torch.int64,),
    "uint8": (torch.uint8,),
}
_PATTERN = re.compile(
    r"(?P<dtypes>[\w|]+) \[(?P<dims>[^\]]*)\](?: (?P<layout>strided|contiguous))?"
)


@dataclass(frozen=True)
class TensorRule:
    """The rule of one argument, parsed."""

    text: str
    dtypes: tuple[torch.dtype, ...]
    dims: tuple[str, ...]  # without a leading "..."
    leading: bool  # whether the shape may start with any dimensions
    layout: str  # "" (last dimension contiguous), "strided" or "contiguous"

    @classmethod
    def parse(cls, text: str) -> TensorRule:
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read the tensor rule {text!r}")
        dims = tuple(d.strip() for d in match["dims"].split(",") if d.strip())
        leading = bool(dims) and dims[0] == "..."
        dtypes = sum((DTYPES[name] for name in match["dtypes"].split("|")), ())
        return cls(text, dtypes, dims[1:] if leading else dims, leading, match["layout"] or "")


class Contract:
    """The tensor rules of one op, by argument name."""

    def __init__(self, op: str, optional: Collection[str] = (), **rules: str):
        """`optional`: the arguments that may be None."""
        self.op = op
        self.optional = frozenset(optional)
        self.rules = {name: TensorRule.parse(text) for name, text in rules.items()}
        self._passed: set[tuple] = set()  # signatures that passed all checks

    @property
    def num_remembered(self) -> int:
        return len(self._passed)

    def check(self, tensors: dict[str, Tensor | None]) -> None:
        """Raises ValueError or TypeError: "op: argument: expected X, got Y"."""
        signature = _signature(tensors)
        if signature is None:
            self._check(tensors)
        elif signature not in self._passed:
            self._check(tensors)
            if len(self._passed) >= REMEMBERED:
                self._passed.clear()
            self._passed.add(signature)

    def _check(self, tensors: dict[str, Tensor | None]) -> None:
        for name, tensor in tensors.items():
            if tensor is None and name not in self.optional:
                self.missing(name)
        present = [(n, t, self.rules[n]) for n, t in tensors.items() if t is not None]
        if not present:
            return
        for name, tensor, _ in present:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"{self.op}: {name}: expected a Tensor, got {type(tensor).__name__}"
                )
        first, device = present[0][0], present[0][1].device
        for name, tensor, _ in present:
            if tensor.device != device:
                self._fail(ValueError, name, f"device {device} (that of {first})", tensor.device)
        for name, tensor, rule in present:
            if tensor.dtype not in rule.dtypes:
                expected = " or ".join(str(d).removeprefix("torch.") for d in rule.dtypes)
                self._fail(TypeError, name, f"dtype {expected}", tensor.dtype)
        for name, tensor, rule in present:
            rank = len(rule.dims)
            if tensor.dim() < rank or (tensor.dim() > rank and not rule.leading):
                expected = f"rank {rank}{' or more' if rule.leading else ''} ({rule.text})"
                self._fail(ValueError, name, expected, f"rank {tensor.dim()} {_shape(tensor)}")
        self._check_shapes(present)
        for name, tensor, rule in present:
            self._check_stride(name, tensor, rule)

    def missing(self, name: str) -> None:
        """Raises TypeError: argument `name` is required and is None."""
        rule = self.rules[name].text.removesuffix(" strided").removesuffix(" contiguous")
        raise TypeError(f"{self.op}: {name}: expected {rule}, got None")

    def _check_shapes(self, present) -> None:
        sizes: dict[str, object] = {}
        for name, tensor, rule in present:
            lead = tensor.dim() - len(rule.dims)
            if rule.leading and sizes.setdefault("...", tensor.shape[:lead]) != tensor.shape[:lead]:
                expected = f"leading dimensions {tuple(sizes['...'])}"
                self._fail(ValueError, name, expected, _shape(tensor))
            for dim, size in zip(rule.dims, tensor.shape[lead:], strict=True):
                if dim == "_":
                    continue
                want = _size(dim, sizes, size)
                if want != size:
                    expected = f"{dim} = {want} in {rule.text}"
                    self._fail(ValueError, name, expected, f"shape {_shape(tensor)}")

    def _check_stride(self, name: str, tensor: Tensor, rule: TensorRule) -> None:
        if rule.layout == "contiguous" and not tensor.is_contiguous():
            self._fail(ValueError, name, "a contiguous tensor", f"strides {tensor.stride()}")
        # The stride of a dimension of length 1, or of an empty tensor, has no effect.
        has_stride = tensor.dim() and tensor.numel() and tensor.shape[-1] > 1
        if rule.layout == "" and has_stride and tensor.stride(-1) != 1:
            expected = "last dimension contiguous (stride 1)"
            self._fail(ValueError, name, expected, f"strides {tensor.stride()}")

    def _fail(self, error: type[Exception], name: str, expected: object, got: object) -> None:
        raise error(f"{self.op}: {name}: expected {expected}, got {got}")


def _signature(tensors: dict[str, Tensor | None]) -> tuple | None:
    """All that a check asks of the tensors; None if they are not to be remembered.

    Such are fake tensors and other subclasses, whose sizes may be symbols, and tensors under
    torch.compile, where a look into what is remembered would become a guard.
    """
    if torch.compiler.is_compiling():
        return None
    signature: list = [*tensors]
    for t in tensors.values():
        if type(t) in (Tensor, torch.nn.Parameter):
            signature += (t.shape, t.stride(), t.dtype, t.device)
        elif t is None:
            signature.append(None)
        else:
            return None
    return tuple(signature)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _size(dim: str, sizes: dict[str, object], size: int) -> int:
    """The size that `dim` requires; an unbound name is bound to `size`."""
    if dim.isdigit():
        return int(dim)
    if "/" in dim:
        name, block = dim.split("/")
        return -(-sizes[name] // int(block))
    if "+" in dim:
        name, more = dim.split("+")
        return sizes[name] + int(more)
    return sizes.setdefault(dim, size)


def check_choice(op: str, name: str, value: object, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        expected = " or ".join(repr(c) for c in choices)
        raise ValueError(f"{op}: {name}: expected {expected}, got {value!r}")


def check_no_transform(op: str) -> None:
    """Raises RuntimeError under torch.func.grad, vmap and the like, which no gradient here has."""
    if torch._C._are_functorch_transforms_active():
        text = f"{op}: torch.func transforms (grad, vmap, jacrev) are not supported"
        raise RuntimeError(f"{text}; use torch.autograd")


def check_that(op: str, name: str, holds: bool, expected: str, got: object) -> None:
    """Raises ValueError unless `holds`: for rules that the contract text cannot state."""
    if not holds:
        raise ValueError(f"{op}: {name}: expected {expected}, got {got}")
