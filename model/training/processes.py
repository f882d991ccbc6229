"""Calls that every process of a run makes together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@functools.lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")


def process_group() -> dist.ProcessGroup | None:
    """All processes, in a gloo group; `Parallel` sets its timeout.  None for a single process."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    return world if dist.get_backend(world) == "gloo" else _gloo_group(world)


def on_each(function: Callable[[], T]) -> list[T]:
    """Calls a function on every process: the results by process; an error of one raises on all.

    A process that is lost is an error of the collective, which `Parallel.naming_lost_ranks` names.
    """
    group = process_group()
    if group is None:
        return [function()]
    try:
        outcome: tuple[Any, Exception | None] = (function(), None)
    except Exception as error:
        outcome = (None, error)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome, group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def on_first(function: Callable[[], T]) -> T:
    """Calls a function on process 0; its result or its error is that of every process."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    return on_each(lambda: function() if first else None)[0]  # type: ignore[return-value]
