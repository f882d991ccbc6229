"""Weights of a `TrainableDeepSeek`: initial values, and the names and shapes of a checkpoint.

    initialize(model, seed=1)
    load_weights(model, Checkpoint.open("DIR"))
    tensors = checkpoint_tensors(model)  # name -> fp32

A checkpoint stores gate, up and down matrices of every expert as tensors of their own, and copies
of embedding and head in the prediction layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

import deepkern
from model.checkpoint import Checkpoint, CheckpointError
from model.training.modules import TrainableDeepSeek

EMBEDDING_STD = 0.5
HEAD_STD = 0.02


def initialize(model: TrainableDeepSeek, seed: int) -> None:
    """Normal weights of deviation 1/sqrt(inputs), smaller for outputs added to the residual.

    The values of a parameter depend on its name and the seed alone.
    """
    c = model.config
    depth = 2 * c.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = parameter.shape[-1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj", "w2")):
            std *= depth**-0.5
        if name in ("embed_tokens", "lm_head"):
            std = EMBEDDING_STD if name == "embed_tokens" else HEAD_STD
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def stored_views(model: TrainableDeepSeek) -> Iterator[tuple[str, Tensor]]:
    """Name in a checkpoint -> the values of the model, as views."""
    c = model.config
    yield "model.embed_tokens.weight", model.embed_tokens
    for index, layer in enumerate([*model.layers, *model.prediction]):
        prefix = f"model.layers.{index}"
        for name, value in layer.named_parameters():
            yield from _layer_views(f"{prefix}.{name}", value)
        bias = getattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias", None)
        if bias is not None:
            yield f"{prefix}.mlp.gate.e_score_correction_bias", bias
        if index >= c.num_hidden_layers:
            head = model.embed_tokens if c.tie_word_embeddings else model.lm_head
            yield f"{prefix}.embed_tokens.weight", model.embed_tokens
            yield f"{prefix}.shared_head.head.weight", head
    yield "model.norm.weight", model.norm.weight
    if not c.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head


def _layer_views(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    parent, _, last = name.rpartition(".")
    if last == "w13":
        for expert, (gate, up) in enumerate(value):
            yield f"{parent}.{expert}.gate_proj.weight", gate
            yield f"{parent}.{expert}.up_proj.weight", up
    elif last == "w2":
        for expert, down in enumerate(value):
            yield f"{parent}.{expert}.down_proj.weight", down
    elif last == "gate_up_proj":
        yield f"{parent}.gate_proj.weight", value[0]
        yield f"{parent}.up_proj.weight", value[1]
    elif last == "down_proj":
        yield f"{name}.weight", value
    elif name.endswith(".norm.weight"):  # of a prediction layer
        yield f"{parent.removesuffix('.norm')}.shared_head.norm.weight", value
    else:
        yield name, value


@torch.no_grad()
def load_weights(model: TrainableDeepSeek, checkpoint: Checkpoint) -> None:
    """Copies the weights of a checkpoint, dequantized; its config must be the model's.

    Raises CheckpointError for a tensor that is missing or has another shape.
    """
    for name, value in stored_views(model):
        if name not in checkpoint:
            if name.endswith((".embed_tokens.weight", ".shared_head.head.weight")):
                continue  # copies that some checkpoints omit
            raise CheckpointError(f"{checkpoint.source}: tensor {name} is missing")
        stored, scale = checkpoint.read(name)
        real = stored
        if scale is not None:
            real = deepkern.cast_back(stored, scale, checkpoint.block, torch.float32)
        if real.shape != value.shape:
            text = f"tensor {name} has shape {list(real.shape)}, expected {list(value.shape)}"
            raise CheckpointError(f"{checkpoint.source}: {text}")
        value.copy_(real)


def checkpoint_tensors(model: TrainableDeepSeek) -> dict[str, Tensor]:
    """Name in a checkpoint -> fp32 values."""
    return {name: value.detach() for name, value in stored_views(model)}
