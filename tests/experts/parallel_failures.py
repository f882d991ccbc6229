"""Run by the ranks of test_expert_parallel.py: bad arguments, lost ranks, ranks out of step."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from deepkern import ExpertParallel, ExpertParallelError


def raises(error, words: str, function, *args, **kwargs) -> str:
    try:
        function(*args, **kwargs)
    except error as caught:
        assert words in str(caught), f"{words!r} is not in {str(caught)!r}"
        return str(caught)
    raise AssertionError(f"no {error.__name__} with {words!r}")


def check_bad_arguments():
    """Raise before anything is sent, so the ranks stay in step."""
    raises(ValueError, "num_experts: expected at least 1, got 0", ExpertParallel, None, 0)
    raises(ValueError, "timeout: expected more than 0", ExpertParallel, None, 1, timeout=0)
    if not torch.cuda.is_available():
        raises(ValueError, "peer_buffer: expected 0", ExpertParallel, None, 1, peer_buffer=1 << 20)
    raises(ValueError, "ranks_per_node: expected a divisor", ExpertParallel, None, 1, 64)
    raises(TypeError, "group: expected a ProcessGroup", ExpertParallel, "world", 1)
    ep = ExpertParallel(None, 4, timeout=30)
    x, idx, w = torch.ones(3, 8), torch.zeros(3, 2).long(), torch.ones(3, 2)
    name = "ExpertParallel.dispatch: "
    raises(TypeError, name + "x: expected real|fp8 [T, K], got None", ep.dispatch, None, idx, w)
    raises(TypeError, name + "x: expected dtype", ep.dispatch, x.long(), idx, w)
    raises(ValueError, name + "topk_weights: expected topk = 2", ep.dispatch, x, idx, w[:, :1])
    raises(ValueError, name + "topk_idx: expected T = 3", ep.dispatch, x, idx[:2], w[:2])
    raises(ValueError, name + "alignment", ep.dispatch, x, idx, w, alignment=0)
    os.environ["DEEPKERN_DEBUG"] = "1"
    raises(ValueError, "values in [-1, 4), got 4", ep.dispatch, x, idx + 4, w)
    del os.environ["DEEPKERN_DEBUG"]
    rows, *_, handle = ep.dispatch(x, idx, w)
    name = "ExpertParallel.combine: "
    raises(TypeError, name + "handle", ep.combine, rows, None)
    raises(TypeError, name + "handle", ExpertParallel(None, 4, timeout=30).combine, rows, handle)
    raises(
        ValueError, name + "y: expected the dispatch's", ep.combine, rows.new_ones(99, 8), handle
    )
    raises(TypeError, name + "y: expected dtype", ep.combine, rows.long(), handle)
    ep.combine(rows, handle)


def out_of_step(**how) -> None:
    """Every rank raises at once and names the rank and the value that differ."""
    me, world = dist.get_rank(), dist.get_world_size()
    odd = world - 1
    x, idx, w = torch.ones(3, 8), torch.zeros(3, 2).long(), torch.ones(3, 2)

    def disagree(words: str, call, odd_call) -> None:
        message = raises(ExpertParallelError, words, odd_call if me == odd else call)
        assert f"rank {odd} " in message and "group 'default_pg'" in message, message

    def make(E=4):
        return ExpertParallel(None, E, timeout=30)

    ep = make()
    disagree("K must be the same", lambda: ep.dispatch(x, idx, w),
             lambda: ep.dispatch(torch.ones(3, 9), idx, w))  # fmt: skip
    raises(ExpertParallelError, "after an earlier failure", ep.dispatch, x, idx, w)
    four, five = make(4), make(5)
    disagree("num experts must be the same", lambda: four.dispatch(x, idx, w),
             lambda: five.dispatch(x, idx, w))  # fmt: skip
    ep = make()
    disagree("dtype must be the same", lambda: ep.dispatch(x, idx, w),
             lambda: ep.dispatch(x.bfloat16(), idx, w))  # fmt: skip
    ep = make()
    disagree("gradients of must be the same", lambda: ep.dispatch(x, idx, w),
             lambda: ep.dispatch(x, idx, w.clone().requires_grad_()))  # fmt: skip
    ep = make()
    rows, *_, handle = ep.dispatch(x, idx, w)
    disagree("has combine", lambda: ep.dispatch(x, idx, w) if me != odd else None,
             lambda: raises_other(ep, rows, handle))  # fmt: skip
    ep = make()
    first, second = [ep.dispatch(x, idx, w) for _ in range(2)]
    disagree("number of the dispatch", lambda: ep.combine(first[0], first[4]),
             lambda: ep.combine(second[0], second[4]))  # fmt: skip


def raises_other(ep, rows, handle):
    """Calls combine on one rank while the others call dispatch."""
    ep.combine(rows, handle)


def check_out_of_step():
    if dist.get_world_size() > 1:
        out_of_step()


def silent_rank(how: str, timeout: float) -> tuple[str, float]:
    """Rank 1 is killed, sleeps or skips a call: (message, seconds) of the other ranks."""
    me, victim = dist.get_rank(), 1
    ep = ExpertParallel(None, 4, timeout=timeout)
    x, idx, w = torch.ones(5, 8), torch.arange(10).view(5, 2) % 4, torch.ones(5, 2)
    rows, *_, handle = ep.dispatch(x, idx, w)
    if me == victim:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(timeout + 1)
        return "", 0.0
    start = time.monotonic()
    call, *args = (ep.combine, rows, handle) if how == "combine" else (ep.dispatch, x, idx, w)
    message = raises(ExpertParallelError, "default_pg", call, *args)
    return message, time.monotonic() - start


def killed_between_headers_and_rows(timeout: float) -> tuple[str, float]:
    """Rank 1 dies between the headers and the rows."""
    me = dist.get_rank()
    ep = ExpertParallel(None, 4, timeout=timeout)
    x, idx, w = torch.ones(5, 8), torch.arange(10).view(5, 2) % 4, torch.ones(5, 2)
    ep.dispatch(x, idx, w)
    if me == 1:
        exchange = ep.hops[0].exchange
        exchange.start = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    message = raises(ExpertParallelError, "waiting for rows", ep.dispatch, x, idx, w)
    return message, time.monotonic() - start


def killed_on_a_node(timeout: float) -> tuple[str, float]:
    """Rank 1 of two nodes is killed: (message, seconds), also of ranks that it sends nothing to."""
    ep = ExpertParallel(None, 4, ranks_per_node=2, timeout=timeout)
    x, idx, w = torch.ones(5, 8), torch.arange(20).view(5, 4) % 4, torch.ones(5, 4)
    ep.dispatch(x, idx, w)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    message = raises(ExpertParallelError, "(ranks ", ep.dispatch, x, idx, w)
    seconds = time.monotonic() - start
    time.sleep(max(0.0, timeout + 1 - seconds))
    return message, seconds


def process_that_ends() -> None:
    """A job of two ranks. The second makes no call; the first raises and ends."""
    import multiprocessing
    import tempfile
    from datetime import timedelta

    with tempfile.TemporaryDirectory() as folder:
        idle = multiprocessing.get_context("fork").Process(target=idle_rank, args=(folder,))
        idle.start()
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=0, world_size=2,
            timeout=timedelta(minutes=10),
        )  # fmt: skip
        ep = ExpertParallel(None, 4, timeout=2)
        x, idx, w = torch.ones(5, 8), torch.zeros(5, 2).long(), torch.ones(5, 2)
        print(raises(ExpertParallelError, "headers", ep.dispatch, x, idx, w), flush=True)
        idle.kill()
        idle.join()


def idle_rank(folder: str) -> None:
    from datetime import timedelta

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=1, world_size=2,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    time.sleep(60)


if __name__ == "__main__":
    process_that_ends()
