"""ExpertParallel over gloo: against one process, uneven and empty ranks, errors in place of hangs.

What runs on each rank is in parallel_checks.py and parallel_failures.py; a group of processes runs
all of it, since making processes takes longer than what they do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from deepkern.testing import ranks
from tests.experts import parallel_checks as checks
from tests.experts import parallel_failures as failures

NAMES = [n for module in (checks, failures) for n in vars(module) if n.startswith("check_")]


@pytest.mark.parametrize(
    ("world", "backend"),
    [
        (1, "torch"),
        pytest.param(2, "triton", marks=pytest.mark.slow),
        (2, "torch"),
        (3, "torch"),
        (4, "torch"),
        pytest.param(8, "torch", marks=pytest.mark.slow),
    ],
)
def test_ranks(world, backend):
    """Ranks are on the CPU, where there is a Triton only if it is interpreted."""
    if backend == "triton" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton is not interpreted here")
    checks.assert_passed(ranks.run(world, checks.everything, backend, timeout=240), NAMES)


@pytest.mark.parametrize(
    ("how", "timeout", "words"),
    [
        ("killed", 12.0, "waiting for the headers of the other ranks: no word from rank 1 within"),
        ("still", 2.0, "waiting for the headers of the other ranks: no word from rank 1 within"),
        ("combine", 2.0, "waiting for the headers of the other ranks: no word from rank 1 within"),
    ],
)
def test_silent_rank(how, timeout, words):
    """A rank is killed, stands still, or does not come to combine: the others say so in time."""
    killed = how == "killed"
    outcomes = ranks.run(
        3, failures.silent_rank, how, timeout, timeout=60, may_die=[1] if killed else []
    )
    for message, seconds in (outcomes[0], outcomes[2]):
        assert words in message and "(ranks 0, 1, 2)" in message
        # gloo notices a closed connection at once; what remains is the wait for the others' notes.
        assert seconds < (8.0 if killed else timeout + 1.0)


def test_rank_killed_between_headers_and_rows():
    outcomes = ranks.run(3, failures.killed_on_the_way, 12.0, timeout=60, may_die=[1])
    for message, seconds in (outcomes[0], outcomes[2]):
        assert "no word from rank 1 " in message and seconds < 8.0


@pytest.mark.slow
def test_rank_killed_among_nodes():
    """Every rank hears of it in time, those too that share no group with the one that died."""
    outcomes = ranks.run(4, failures.killed_among_nodes, 3.0, timeout=60, may_die=[1])
    for rank, group in ((0, "node 0"), (2, "node 1"), (3, "place 1 of each node")):
        message, seconds = outcomes[rank]
        assert f"group '{group}'" in message and seconds < 6.0  # a wait for each hop at most


def test_a_process_ends_after_the_error():
    """Not only does the call return: no thread of gloo keeps the process until the group's end."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.experts.parallel_failures"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no word from rank 1 within 2 s" in done.stdout
    assert time.monotonic() - start < 60  # the group's timeout is ten minutes


@pytest.mark.gpu
def test_nccl():
    """A rank for each GPU, on one GPU a rank alone."""
    assert all(ranks.run(min(4, torch.cuda.device_count()), checks.over_nccl, timeout=240))
