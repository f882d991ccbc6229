"""ExpertParallel over gloo: against one process, uneven and empty ranks, errors instead of hangs.

The ranks run the functions of parallel_checks.py and parallel_failures.py. One group of processes
runs all of them, because starting processes takes longer than the checks.
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
        pytest.param(8, "torch", marks=pytest.mark.proof),
    ],
    ids=["1_torch", "2_triton", "2_torch", "3_torch", "4_torch", "8_torch"],
)
def test_ranks(world, backend):
    """The ranks are on the CPU, where Triton kernels need the interpreter."""
    if backend == "triton" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton is not interpreted here")
    checks.assert_passed(ranks.run(world, checks.everything, backend, timeout=240), NAMES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "timeout"),
    [("killed", 12.0), ("asleep", 2.0), ("combine", 2.0)],
    ids=["killed", "asleep", "skips_combine"],
)
def test_silent_rank(how, timeout):
    """A rank is killed, sleeps, or skips combine: the others name it in time."""
    killed = how == "killed"
    words = "waiting for the headers of the other ranks: no answer from rank 1 within"
    outcomes = ranks.run(
        3, failures.silent_rank, how, timeout, timeout=60, may_die=[1] if killed else []
    )
    for message, seconds in (outcomes[0], outcomes[2]):
        assert words in message and "(ranks 0, 1, 2)" in message
        # gloo notices a closed connection at once; the rest is the wait for notes.
        assert seconds < (8.0 if killed else timeout + 1.0)


@pytest.mark.slow
def test_rank_killed_between_headers_and_rows():
    outcomes = ranks.run(3, failures.killed_between_headers_and_rows, 12.0, timeout=60, may_die=[1])
    for message, seconds in (outcomes[0], outcomes[2]):
        assert "no answer from rank 1 " in message and seconds < 8.0


@pytest.mark.slow
def test_rank_killed_on_a_node():
    """Every rank raises in time, also ranks that are in no group with the killed one."""
    outcomes = ranks.run(4, failures.killed_on_a_node, 3.0, timeout=60, may_die=[1])
    for rank, group in ((0, "node 0"), (2, "node 1"), (3, "local rank 1 of each node")):
        message, seconds = outcomes[rank]
        assert f"group '{group}'" in message and seconds < 6.0  # at most one wait per hop


def test_process_ends_after_the_error():
    """No thread of gloo keeps the process alive until the timeout of the group."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.experts.parallel_failures"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no answer from rank 1 within 2 s" in done.stdout
    assert time.monotonic() - start < 60  # the timeout of the group is ten minutes


@pytest.mark.gpu
def test_nccl():
    """One rank per GPU, at most four."""
    assert all(ranks.run(min(4, torch.cuda.device_count()), checks.over_nccl, timeout=240))
