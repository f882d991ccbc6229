"""Argument checks that several functions of experts/ need.

Errors read "function: argument: expected X, got Y", as those of `runtime/contract.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..runtime.contract import check_that

INT = (int, np.integer, torch.SymInt)


def check_type(function: str, argument: str, value: object, types: tuple, expected: str) -> None:
    """Raises TypeError unless `value` is an instance of one of `types`."""
    if not isinstance(value, types):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{function}: {argument}: expected {expected}, got {got}")


def check_ints(function: str, **values: object) -> None:
    """Raises TypeError unless every value is an int; a bool is not one."""
    for argument, value in values.items():
        if isinstance(value, bool):
            raise TypeError(f"{function}: {argument}: expected an int, got bool")
        check_type(function, argument, value, INT, "an int")


def check_assignments(op: str, argument: str, slots: Tensor) -> int:
    """The number of slots [T, topk]. Kernels count them in int32."""
    count = slots.numel()
    check_that(op, argument, count < 2**31, "fewer than 2^31 assignments", count)
    return count


def check_indices(op: str, argument: str, index: Tensor, size: int) -> None:
    """Raises ValueError unless all of `index` [T, topk] is in [-1, size). Waits for the device."""
    wrong = ((index < -1) | (index >= size)).nonzero().tolist()
    got = f"{index[tuple(wrong[0])].item()} at {tuple(wrong[0])}" if wrong else None
    check_that(op, argument, not wrong, f"values in [-1, {size})", got)


def checked_load(function: str, load: Tensor | np.ndarray) -> np.ndarray:
    """`load` as float64 [L, E] on the host; raises unless it is finite and at least 0."""
    check_type(function, "load", load, (Tensor, np.ndarray), "a Tensor or an array")
    dtype = load.dtype
    if isinstance(load, Tensor):
        is_number = not (load.is_complex() or dtype == torch.bool)
        load = load.detach().to("cpu", torch.float64 if is_number else dtype).numpy()
    if not (np.issubdtype(load.dtype, np.floating) or np.issubdtype(load.dtype, np.integer)):
        raise TypeError(f"{function}: load: expected real or integer numbers, got {dtype}")
    check_that(function, "load", load.ndim == 2, "rank 2 (real [L, E])", f"rank {load.ndim}")
    load = np.ascontiguousarray(load, np.float64)
    wrong = np.argwhere(~((load >= 0) & (load < np.inf)))
    got = f"{load[tuple(wrong[0])]} at {tuple(map(int, wrong[0]))}" if len(wrong) else None
    check_that(function, "load", not len(wrong), "finite values of at least 0", got)
    return load


def check_divisors(function: str, *rules: tuple[str, int, int]) -> None:
    """Raises ValueError unless each (argument, value, whole) has a positive divisor of `whole`."""
    for argument, value, whole in rules:
        divides = value >= 1 and whole % value == 0
        check_that(function, argument, divides, f"a divisor of {whole}", value)


def check_cluster(
    function: str, E: int, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> None:
    """The rules of `rebalance_experts` for E experts, which are EPLB's."""
    numbers = {
        "num_replicas": num_replicas,
        "num_groups": num_groups,
        "num_nodes": num_nodes,
        "num_gpus": num_gpus,
    }
    check_ints(function, **numbers)
    for argument, value in numbers.items():
        check_that(function, argument, 1 <= value < 2**31, "1 to 2^31 - 1", value)
    check_that(function, "load", E >= 1, "at least one expert", f"shape [L, {E}]")
    expected = f"at least the {E} experts"
    check_that(function, "num_replicas", num_replicas >= E, expected, num_replicas)
    expected = f"a multiple of num_gpus = {num_gpus}"
    check_that(function, "num_replicas", num_replicas % num_gpus == 0, expected, num_replicas)
    if num_groups % num_nodes == 0:
        expected = f"a divisor of the {E} experts"
        check_that(function, "num_groups", E % num_groups == 0, expected, num_groups)
        expected = f"a multiple of num_nodes = {num_nodes}"
        check_that(function, "num_gpus", num_gpus % num_nodes == 0, expected, num_gpus)
