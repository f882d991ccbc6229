"""Small models with random weights; no norm is one and no bias is zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint, write_checkpoint
from model.config import Config
from model.deepseek import DeepSeek, Precision
from model.plain import PlainModel
from tests.models import randomize

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def small_config(**changes: Any) -> Config:
    """One dense layer and two with experts, as in V3; no size is a multiple of 128."""
    values = {
        "vocab_size": 101,
        "hidden_size": 72,
        "intermediate_size": 130,
        "moe_intermediate_size": 40,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 3,
        "q_lora_rank": 24,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "max_position_embeddings": 128,
    }
    return Config(**{**values, **changes})


def plain_model(config: Config) -> PlainModel:
    model = PlainModel(config)
    randomize(model)
    return model.eval()


@pytest.fixture
def make_config() -> Callable[..., Config]:
    return small_config


@pytest.fixture
def make_plain() -> Callable[[Config], PlainModel]:
    return plain_model


@pytest.fixture
def fill() -> Callable[[torch.nn.Module], None]:
    return randomize


@pytest.fixture
def deepkern_model() -> Callable[..., DeepSeek]:
    """Builds the deepkern model with the weights of a plain model."""

    def build(plain: PlainModel, *precision: Any, **options: Any) -> DeepSeek:
        checkpoint = Checkpoint.from_tensors(plain.config, plain.state_dict())
        return DeepSeek.from_checkpoint(checkpoint, Precision(*precision, **options))

    return build


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Writes a plain model as a checkpoint directory."""

    def save(plain: PlainModel, name: str = "checkpoint", shard_bytes: int = 5 << 30) -> Path:
        folder = tmp_path / name
        write_checkpoint(folder, plain.config, plain.state_dict(), shard_bytes)
        return folder

    return save


@pytest.fixture
def yarn() -> dict[str, Any]:
    return dict(YARN)
