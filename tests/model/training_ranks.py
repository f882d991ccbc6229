"""Run by the ranks of test_training_parallel.py: steps of a small model in several layouts."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch

from model.config import Config
from model.training.exchange import checkpoint_tensors
from model.training.layout import Layout
from model.training.lost_ranks import ParallelError
from model.training.parallel import Parallel
from model.training.recipe import Recipe
from model.training.run import Run

STEPS = 3


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
    values = {"steps": STEPS, "batch": 4, "window": 16, "precision": "fp32", "warmup": 0.0}
    return Recipe(**{**values, "balance_weight": 0.01, "bias_rate": 0.01, **changes})


def train(layout: dict[str, int], config: dict[str, Any], recipe: dict[str, Any]) -> tuple:
    """The log, the logits of some tokens and the weights of a run; no weights but on rank 0."""
    tokens = torch.randint(101, (4096,), generator=torch.Generator().manual_seed(0)).int()
    parallel = Parallel(Layout(**layout), timeout=60)
    run = Run(small_config(**config), small_recipe(**recipe), tokens, None, parallel)
    list(run.steps())
    logits = run.predict(tokens[:32].view(2, 16).long())
    weights = {name: value.numpy() for name, value in checkpoint_tensors(run.model).items()}
    return run.log, logits.float().numpy(), weights


def train_all(cases: list[tuple]) -> list[tuple]:
    return [train(*case) for case in cases]


def lose_rank_1(layout: dict[str, int], how: str, timeout: float) -> tuple[str, float]:
    """Rank 1 fails within the second step; the message of another rank, and its seconds."""
    tokens = torch.randint(101, (4096,), generator=torch.Generator().manual_seed(0)).int()
    run = Run(small_config(), small_recipe(), tokens, None, Parallel(Layout(**layout), timeout))
    run.take_step()

    def fail(*_: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "asleep":
            time.sleep(1.5 * timeout)
        else:
            raise MemoryError("no memory for a test")

    if run.rank == 1:
        run.model.layers[1].self_attn.register_forward_hook(fail)
    start = time.monotonic()
    try:
        run.take_step()
    except (ParallelError, MemoryError) as error:
        return str(error), time.monotonic() - start
    raise AssertionError("the step ended without rank 1")
