"""Errors that name the ranks that ended, failed or do not answer.

    with naming_lost_ranks("step 7", timeout=600, wait=360):
        ...  # collectives; ParallelError: "step 7: no answer from rank 3 within 600 s (...)"

A rank that fails leaves a note in the store of the job.  One whose collective failed then waits for
the notes of the others: if a rank ended, only those that exchange data with it notice at once, and
the others when the limit of their collective is over.  So `wait` has to be longer than that limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from deepkern import ExpertParallelError

NOTE, WAITED = "deepkern/training/failed", "waited"  # key and text of a note


class ParallelError(RuntimeError):
    """Another rank failed or did not answer in time; the message names it."""


@contextmanager
def naming_lost_ranks(what: str, timeout: float, wait: float) -> Iterator[None]:
    """Turns the error of a collective into a ParallelError; other errors pass.

    what: begins the message.
    timeout: seconds in which all ranks end; stated in the message.
    wait: seconds of it for the notes of the other ranks.
    """
    try:
        yield
    except Exception as error:
        line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        is_gloo = type(error) is RuntimeError  # gloo has no class of its own
        if not (is_gloo or isinstance(error, (dist.DistError, ExpertParallelError))):
            leave_note(line)
            raise
        raise ParallelError(f"{what}: {_cause(timeout, wait)} (here: {line})") from error


def leave_note(text: str) -> dist.Store:
    """Stores why this rank failed; returns the store."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{NOTE}{dist.get_rank()}", text)
    return store


def _cause(timeout: float, wait: float) -> str:
    """The ranks without a note, and the errors of those that failed by themselves."""
    ranks = range(dist.get_world_size())
    try:
        store = leave_note(WAITED)
        until = time.monotonic() + wait
        while silent := [r for r in ranks if not store.check([f"{NOTE}{r}"])]:
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        notes = {r: store.get(f"{NOTE}{r}").decode() for r in ranks if r not in silent}
    except RuntimeError:
        return "no answer from the store of the job, which is usually on rank 0"
    causes = [f"rank {rank} failed with {note}" for rank, note in notes.items() if note != WAITED]
    if silent:
        names = ", ".join(map(str, silent))
        causes.append(f"no answer from rank {names} within {timeout:g} s")
    return "; ".join(causes) or f"all ranks gave up within {timeout:g} s"
