"""Convert DeepGEMM's arguments to those of deepkern's GEMMs: checks, layouts, groups."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.contract import Contract, check_choice, check_that
from .deep_gemm_utils import get_mk_alignment_for_contiguous_layout, unpack

Operand = tuple[Tensor, Tensor]  # FP8 data, scale

RECIPES = {
    "recipe": (None, (1, 128, 128), (1, 1, 128)),
    "recipe_a": (None, (1, 128)),
    "recipe_b": (None, (1, 128), (128, 128)),
}


def older_names(**names: str) -> Callable[[Callable], Callable]:
    """Decorator that accepts keywords of earlier releases: older_names(older="newer")."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            return function(*args, **{names.get(k, k): v for k, v in kwargs.items()})

        return call

    return decorate


def rows_of_k(
    function: str, a: Operand, b: Operand, dims: tuple[str, str], recipes: tuple,
    **others: tuple[Tensor | None, str],
) -> list[Tensor]:  # fmt: skip
    """[a, a_scale, b, b_scale] as deepkern's GEMMs take them: rows of K, scales in fp32.

    Args:
        function: the calling function, for errors.
        a, b: pairs of FP8 data and scale.
        dims: the shapes of a's and b's data, such as ("[M, K]", "[K, N]"); the operand is
            transposed if its last dimension is not K.
        recipes: the caller's (recipe, recipe_a, recipe_b).
        others: further tensors to check, each with its rule (see contract.py).
    """
    for (name, choices), recipe in zip(RECIPES.items(), recipes, strict=True):
        check_recipe(function, name, recipe, choices)
    pairs = pair(function, "a", a), pair(function, "b", b)
    rules = {"a[0]": (pairs[0][0], f"fp8 {dims[0]} strided"),
             "b[0]": (pairs[1][0], f"fp8 {dims[1]} strided")}  # fmt: skip
    check(function, rules | others)
    operands = []
    for name, (data, scale), dim in zip("ab", pairs, dims, strict=True):
        if not dim.endswith("K]"):
            data, scale = data.mT, scale.mT
        operands += [data, unpack(function, f"{name}[1]", scale, data.shape[-1])]
    return operands


def check(function: str, tensors: dict[str, tuple[Tensor | None, str]]) -> None:
    """Raise TypeError or ValueError for the first tensor that violates its rule."""
    rules = tuple((name, rule) for name, (_, rule) in tensors.items())
    contract(function, rules).check({name: tensor for name, (tensor, _) in tensors.items()})


@functools.cache
def contract(function: str, rules: tuple[tuple[str, str], ...]) -> Contract:
    return Contract(function, optional=("c",), **dict(rules))


def pair(function: str, argument: str, value: Operand) -> Operand:
    """`value` if it is a pair of data and scale; else a TypeError."""
    if not isinstance(value, (tuple, list)) or [isinstance(x, Tensor) for x in value] != [True] * 2:
        got = type(value).__name__
        raise TypeError(f"{function}: {argument}: expected a pair (FP8 data, scale), got {got}")
    rank = value[1].dim()
    check_that(function, f"{argument}[1]", rank >= 2, "rank 2 or 3", f"rank {rank}")
    return value


def check_recipe(function: str, name: str, recipe: Sequence[int] | None, choices: tuple) -> None:
    """Raise ValueError unless `recipe`, a tuple or a list, is one of `choices`."""
    check_choice(function, name, None if recipe is None else tuple(recipe), choices)


def group_of_rows(ends: Tensor, M: int) -> Tensor:
    """int32 [M], the group of each row; group g is [align(ends[g - 1]), ends[g]), -1 elsewhere."""
    alignment = get_mk_alignment_for_contiguous_layout()
    starts = (F.pad(ends, (1, 0)) + alignment - 1) // alignment * alignment  # [G + 1]
    row = torch.arange(M, dtype=torch.int32, device=ends.device)
    group = torch.searchsorted(ends, row, right=True)  # G after the last group
    return torch.where((row >= starts[group]) & (group < len(ends)), group, -1).int()


def concatenate_groups(data: Tensor, rows: int, ks: Sequence[int]) -> Tensor:
    """[rows, sum(ks)] from `data`, the concatenation of flattened matrices [rows, k]."""
    parts = data.flatten().split([rows * k for k in ks])
    matrices = [part.view(rows, k) for part, k in zip(parts, ks, strict=True)]
    return torch.cat(matrices, 1) if matrices else data.new_empty((rows, 0))
