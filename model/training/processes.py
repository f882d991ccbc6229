"""Calls that every process of a run makes together, with a timeout that names a missing process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # for every process to arrive and to write its part of a checkpoint


@functools.lru_cache(maxsize=1)
def _gloo_group(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def process_group() -> dist.ProcessGroup | None:
    """All processes, with the timeout of this module; None for a single process."""
    return _gloo_group(dist.group.WORLD) if dist.is_initialized() else None


def on_each(function: Callable[[], T]) -> list[T]:
    """Calls a function on every process: the results by process; an error of one raises on all.

    Raises RuntimeError that names the process if one does not arrive in time.
    """
    group = process_group()
    if group is None:
        return [function()]
    dist.monitored_barrier(group, TIMEOUT, wait_all_ranks=True)
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
