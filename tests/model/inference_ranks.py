"""Run by the ranks of test_ranks.py: logits and requests of a checkpoint in several layouts."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import deepkern
import model.batch
from deepkern.runtime import native
from model.deepseek import DeepSeek
from model.engine import Engine
from model.ranks import Ranks
from model.sampling import Sampling
from tests.model.test_engine import check_schedules, outcome
from tests.model.training_ranks import small_config

Layout = dict[str, Any]  # arguments of `Ranks`; none: one process
PROMPTS = [list(range(7, 24)), [3], [50, *range(60, 99)]]


def load(folder: str, layout: Layout, dtype: str = "float32", fp8: bool = False) -> DeepSeek:
    model.batch.PREFILL_BLOCK = 16  # prompts of a few tokens span several blocks of keys
    options = {"ranks": Ranks(**{"timeout": 60.0, **layout})} if layout else {}
    return DeepSeek.from_pretrained(folder, dtype, fp8=fp8, **options)


def greedy_and_sampled(count: int) -> list[Sampling]:
    each = {"temperature": 0.8, "max_new_tokens": count, "ignore_eos": True}
    return [Sampling(**{**each, "temperature": 0.0}), *(Sampling(**each, seed=s) for s in (1, 2))]


def run_case(folder: str, layout: Layout, dtype: str, fp8: bool, count: int) -> dict[str, Any]:
    """Logits of all layers, and the outcomes of requests in one batch with drafts and alone.

    count: new tokens of each request.
    """
    model = load(folder, layout, dtype, fp8)
    tokens = torch.tensor([PROMPTS[0] * 2, PROMPTS[2][:34]])
    engine = Engine(model, page=8, num_pages=30, max_batch_tokens=16, draft_tokens=1)
    samplings = greedy_and_sampled(count)
    together = engine.generate(PROMPTS, samplings)
    alone = Engine(model, page=64, num_pages=2, reuse_prompts=False)
    pairs = zip(PROMPTS, samplings, strict=True)
    return {
        "logits": model(tokens).float().numpy(),
        "mtp": model.mtp_logits(tokens).float().numpy(),
        "together": [outcome(request) for request in together],
        "drafted": engine.stats().drafted,
        "alone": [outcome(alone.generate([p], s)[0]) for p, s in pairs],
    }


def run_cases(cases: list[tuple]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    with deepkern.backend("torch" if native.missing_reason() else "cpu"):
        return [run_case(*case) for case in cases]


def run_all(cases: list[tuple], layout: Layout, counts: list[int]) -> tuple[list, list]:
    return run_cases(cases), sums(layout, counts)


def rank_rows(rank: int, count: int) -> torch.Tensor:
    """bf16 [count, 512], the part of a sum of one rank."""
    generator = torch.Generator().manual_seed(100 * count + rank)
    return torch.randn(count, 512, generator=generator).bfloat16()


def sums(layout: Layout, counts: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """`Ranks.sum` of `rank_rows` over the tensor ranks and over all."""
    ranks = Ranks(**layout)
    ranks.connect(small_config(), "cpu")
    results = []
    for count in counts:
        x = rank_rows(ranks.rank, count)
        both = [ranks.sum(x, size).float().numpy() for size in (ranks.tensor, ranks.processes)]
        results.append(tuple(both))
    return results


def schedules(folder: str, layout: Layout, seed: int) -> int:
    """Random schedules against each request alone."""
    torch.set_num_threads(1)
    with deepkern.backend("torch" if native.missing_reason() else "cpu"):
        return check_schedules(load(folder, layout), random.Random(seed), 2)


def lost_rank(folder: str, layout: Layout, how: str) -> tuple[str, float]:
    """Rank 1 is killed or sleeps while all generate: (message, seconds) of the other ranks."""
    torch.set_num_threads(1)
    model = load(folder, layout)
    engine = Engine(model, num_pages=4)
    requests = [engine.submit(prompt) for prompt in PROMPTS]
    engine.step()
    if dist.get_rank() == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(layout["timeout"] + 1)
        return "", 0.0
    start = time.monotonic()
    try:
        while any(request.finish_reason is None for request in requests):
            engine.step()
    except deepkern.ExpertParallelError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("no error")
