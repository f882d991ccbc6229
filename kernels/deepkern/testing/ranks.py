"""Runs functions on several ranks: processes of this machine in a gloo group.

`run(4, check, 7)` calls check(7) in four processes with one default `torch.distributed` group and
returns their results. The processes fork from a server that has imported torch and deepkern once,
so that a rank starts in a fraction of a second. A rank that exceeds the timeout is killed, which
is an error.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist


class RankError(AssertionError):
    """Some ranks raised, died or exceeded the timeout."""


def run(
    world: int,
    function: Callable,
    *args,
    timeout: float = 120.0,
    group_timeout: float = 60.0,
    may_die: Sequence[int] = (),
) -> list:
    """Calls `function(*args)`, an importable function, on `world` ranks.

    Args:
        timeout: seconds after which all ranks are killed.
        group_timeout: the group's own timeout.
        may_die: ranks that may exit without a result; their result is then None.

    Returns:
        The result of each rank.

    Raises:
        RankError: with the tracebacks of the ranks that raised.
    """
    context = multiprocessing.get_context("forkserver")
    # The first poisoned tensor imports the last module, which takes seconds.
    context.set_forkserver_preload(["torch", "deepkern", "torch._inductor.config"])
    outcomes, errors = [None] * world, []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        running = {}
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            job = rank, world, store, group_timeout, theirs, function, args
            process = context.Process(target=_rank, args=job, daemon=True)
            process.start()
            theirs.close()
            running[ours] = rank, process
        deadline = time.monotonic() + timeout
        while running:
            ready = wait(list(running), max(0.0, deadline - time.monotonic()))
            for ours in ready:
                rank, process = running.pop(ours)
                try:
                    good, outcomes[rank] = ours.recv()
                    if not good:
                        errors.append(f"rank {rank}:\n{outcomes[rank]}")
                except EOFError:
                    if rank not in may_die:
                        errors.append(f"rank {rank} ended without a word")
                process.join(max(1.0, deadline - time.monotonic()))
                if process.is_alive():
                    process.kill()
                    errors.append(f"rank {rank} did not end")
            if not ready:
                for rank, process in running.values():
                    process.kill()
                    errors.append(f"rank {rank} was not done after {timeout:g} s")
                break
    if errors:
        raise RankError("\n".join(errors))
    return outcomes


def _rank(rank, world, store, group_timeout, results, function, args) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
            timeout=timedelta(seconds=group_timeout),
        )  # fmt: skip
        outcome = True, function(*args)
    except BaseException:
        outcome = False, traceback.format_exc()
    results.send(outcome)
    results.close()
    os._exit(0)  # without the destructors of a group that may have lost ranks
