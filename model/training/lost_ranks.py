"""Errors that name the ranks that ended, failed or do not answer.

    lost_ranks = LostRanks(timeout=600, wait=360)
    with lost_ranks.named("step 7"):
        ...  # collectives; ParallelError: "step 7: no answer from rank 3 within 600 s (...)"

A rank that fails leaves a note in the store of the job.  One whose collective failed then waits for
the notes of the others: if a rank ended, only those that exchange data with it notice at once, and
the others when the limit of their collective is over.  So `wait` has to be longer than that limit.
The wait ends early if a note says that a rank failed by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from deepkern import ExpertParallelError

NOTE = "deepkern/training/failed"  # key of a note, before the rank
WAITED = "waited: "  # begins a note on a failed collective
# gloo has no class of its own; its messages begin with the path of its source.
GLOO = re.compile(r"gloo/|Operation timed out!")
LATE = 5.0  # seconds for other notes, once a rank is known that failed by itself
QUOTED = 4  # notes in a message


class ParallelError(RuntimeError):
    """Another rank failed or did not answer in time; the message names it."""


class LostRanks:
    """Names lost ranks in the errors of this process.

    timeout: seconds in which all ranks end; stated in the message.
    wait: seconds of it for the notes of the other ranks.
    """

    def __init__(self, timeout: float, wait: float) -> None:
        self.timeout, self.wait = timeout, wait
        self.left_note = False

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
        """Turns the error of a collective into a ParallelError; other errors pass.

        what: begins the message.
        """
        if self.left_note:  # on an error from which the run recovered
            _store().delete_key(f"{NOTE}{dist.get_rank()}")
            self.left_note = False
        try:
            yield
        except ParallelError:
            raise
        except Exception as error:
            line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            if not is_of_collective(error):
                self._leave_note(line)
                raise
            raise ParallelError(f"{what}: {self._cause(line)} (here: {line})") from error

    def _leave_note(self, text: str) -> None:
        """Stores why this rank failed."""
        self.left_note = True
        _store().set(f"{NOTE}{dist.get_rank()}", text)

    def _cause(self, line: str) -> str:
        """The ranks that failed by themselves with their errors, or those without a note."""
        try:
            self._leave_note(WAITED + line)
            notes = self._wait_for_notes()
        except RuntimeError:
            return "no answer from the store of the job, which is usually on rank 0"
        causes = [f"rank {rank} failed with {text}" for rank, text in failures(notes).items()]
        if causes:
            return "; ".join(causes[:QUOTED])
        silent = [str(rank) for rank in range(dist.get_world_size()) if rank not in notes]
        if silent:
            return f"no answer from rank {', '.join(silent)} within {self.timeout:g} s"
        texts = [f"rank {rank} with {text.removeprefix(WAITED)}" for rank, text in notes.items()]
        return f"all ranks gave up within {self.timeout:g} s: {'; '.join(texts[:QUOTED])}"

    def _wait_for_notes(self) -> dict[int, str]:
        """Rank -> note, of all ranks or of those that left one in time."""
        store, ranks = _store(), range(dist.get_world_size())
        end = time.monotonic() + self.wait
        while True:
            keys = {rank: f"{NOTE}{rank}" for rank in ranks if store.check([f"{NOTE}{rank}"])}
            notes = {rank: store.get(key).decode() for rank, key in keys.items()}
            if len(notes) == len(ranks) or time.monotonic() > end:
                return notes
            if failures(notes):
                end = min(end, time.monotonic() + LATE)
            time.sleep(0.05)


def is_of_collective(error: Exception) -> bool:
    """Whether a collective failed, which is the fault of another rank."""
    if isinstance(error, (dist.DistError, ExpertParallelError)):
        return True
    return type(error) is RuntimeError and GLOO.search(str(error)) is not None


def failures(notes: dict[int, str]) -> dict[int, str]:
    """The notes of the ranks that failed by themselves."""
    return {rank: text for rank, text in notes.items() if not text.startswith(WAITED)}


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
