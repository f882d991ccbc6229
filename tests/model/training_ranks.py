"""Run by the ranks of test_training_parallel.py: training of a small model in several layouts."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import Config
from model.training.exchange import checkpoint_tensors, initialize, load_weights
from model.training.layout import Layout
from model.training.lost_ranks import LostRanks, ParallelError
from model.training.modules import TrainableDeepSeek
from model.training.parallel import Parallel, whole
from model.training.recipe import Recipe
from model.training.run import Run
from model.training.state import restore, save
from model.training.stop import saved_steps

TOKENS = torch.randint(101, (4096,), generator=torch.Generator().manual_seed(0)).int()
NO_Q_LORA = {
    "model_type": "deepseek_v2", "q_lora_rank": None, "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "rope_interleave": False, "tie_word_embeddings": True,
}  # fmt: skip


def small_config(**changes: Any) -> Config:
    """One dense layer, one with experts and one that predicts the second next token."""
    values = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64,
        "moe_intermediate_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "num_attention_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "max_position_embeddings": 128,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
    return Config(**{**values, **changes})


def small_recipe(**changes: Any) -> Recipe:
    values = {"steps": 3, "batch": 4, "window": 16, "precision": "fp32", "warmup": 0.0}
    return Recipe(**{**values, "balance_weight": 0.01, "bias_rate": 0.01, **changes})


@dataclass(frozen=True)
class Case:
    """A run.  skewed: a selection bias leads all tokens to the first half of the experts."""

    layout: dict[str, int]
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    skewed: bool = False


@dataclass(frozen=True)
class Outcome:
    """log: without times.  before, after: logits of some tokens.  weights: of the main rank."""

    log: list[dict[str, Any]]
    before: np.ndarray
    after: np.ndarray
    weights: dict[str, np.ndarray]


def train(case: Case) -> Outcome:
    run = make_run(case.layout, case.config, case.recipe)
    if case.skewed:
        for moe in run.model.experts:
            moe.gate.e_score_correction_bias[:4] = 10.0
    tokens = TOKENS[:32].view(2, 16).long()
    before = run.predict(tokens)
    for _ in run.steps():
        if case.skewed:
            assert all((moe.load[4:] == 0).all() for moe in run.model.experts)
    after = run.predict(tokens)
    if run.parallel.layout.processes > 1:
        assert_equal_on_all_ranks(run.model)
    weights = {name: value.numpy() for name, value in checkpoint_tensors(run.model).items()}
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in run.log]
    return Outcome(log, before.float().numpy(), after.float().numpy(), weights)


def make_run(
    layout: dict[str, int],
    config: dict,
    recipe: dict,
    timeout: float = 100.0,
    folder: Path | None = None,
) -> Run:
    parallel = Parallel(Layout(**layout), timeout)
    return Run(small_config(**config), small_recipe(**recipe), TOKENS, folder, parallel)


def assert_equal_on_all_ranks(model: TrainableDeepSeek) -> None:
    """Each rank gathers the same bits, also of weights of which the tensor ranks have copies."""
    names, digests = [], []
    for name, parameter in model.named_parameters():
        names.append(name)
        digests.append(hashlib.sha256(whole(parameter).detach().numpy().tobytes()).digest())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    for name, *values in zip(names, *everyone, strict=True):
        assert len(set(values)) == 1, name


def train_all(cases: list[Case]) -> list[Outcome]:
    return [train(case) for case in cases]


def load_and_export(layout: dict[str, int]) -> int:
    """Weights of one process -> weights of a layout -> the same tensors; their number."""
    config, parallel = small_config(), Parallel(Layout(**layout), 100)
    one = TrainableDeepSeek(config)
    initialize(one, 7)
    for moe in one.experts:
        moe.gate.e_score_correction_bias.copy_(torch.arange(8))
    expected = checkpoint_tensors(one)
    model = TrainableDeepSeek(config, parallel=parallel)
    parallel.shard(model)
    load_weights(model, Checkpoint.from_tensors(config, expected))
    got = checkpoint_tensors(model)
    assert got.keys() == (expected.keys() if parallel.is_main else set())
    for name, value in got.items():
        assert_same_bits(value, expected[name])
    return len(got)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and torch.equal(a, b)


def lose_rank_1(
    layout: dict[str, int], how: str, timeout: float, call: str = "step", folder: Path | None = None
) -> tuple[str, float]:
    """Rank 1 fails within a call after the first step; error of each rank, and after what time."""
    run = make_run(layout, {}, {}, timeout, folder)
    run.take_step()

    def fail(*_: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "asleep":
            time.sleep(1.5 * timeout)
        elif how == "wrong_shape":
            torch.ones(2, 3) @ torch.ones(2, 3)
        else:
            raise MemoryError("no memory for a test")

    calls = {
        "step": run.take_step,
        "predict": lambda: run.predict(TOKENS[:32].view(2, 16).long()),
        "save": lambda: save(run),
        "restore": lambda: restore(run),
        "weights": lambda: checkpoint_tensors(run.model),
        "signals": lambda: next(saved_steps(run)),
    }
    if call == "restore":
        save(run)
    if run.rank == 1:
        if call == "signals":
            calls[call] = lambda: (run.take_step(), fail())
        elif call == "weights":
            calls[call] = fail
        else:
            run.model.layers[1].self_attn.register_forward_hook(fail)
            run.model.register_state_dict_pre_hook(fail)
    start = time.monotonic()
    try:
        calls[call]()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    raise AssertionError("the call ended without rank 1")


def lose_rank_1_after_full_disk() -> str:
    """Both ranks recover from an error, then rank 1 ends in a call; the error of rank 0."""
    lost_ranks = LostRanks(timeout=2, wait=1)
    with suppress(OSError), lost_ranks.named("save of step 1"):
        raise OSError("no space left")
    try:
        with lost_ranks.named("step 2"):
            if dist.get_rank() == 1:
                os._exit(1)
            dist.all_reduce(torch.ones(1))
    except ParallelError as error:
        return str(error)
    raise AssertionError("the call ended without rank 1")
