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
from model.training.parallel import assign, whole

EMBEDDING_STD = 0.5
HEAD_STD = 0.02


def initialize(model: TrainableDeepSeek, seed: int) -> None:
    """Normal weights of deviation 1/sqrt(inputs), smaller for outputs added to the residual.

    The values of a parameter depend on its name and the seed alone, and not on the layout.
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
        assign(parameter, torch.randn(parameter.shape, generator=generator) * std)


def stored_parameters(model: TrainableDeepSeek) -> Iterator[tuple[str, Tensor]]:
    """Name with the prefix of its layer in a checkpoint -> parameter or selection bias."""
    yield "model.embed_tokens.weight", model.embed_tokens
    for index, layer in enumerate([*model.layers, *model.prediction]):
        prefix = f"model.layers.{index}"
        for name, value in layer.named_parameters():
            yield f"{prefix}.{name}", value
        bias = getattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias", None)
        if bias is not None:
            yield f"{prefix}.mlp.gate.e_score_correction_bias", bias
    yield "model.norm.weight", model.norm.weight
    if not model.config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head


def stored_views(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names in a checkpoint -> views of the whole value of a parameter."""
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
    elif name.startswith("model.layers.") and name.endswith(".norm.weight"):  # a prediction layer's
        yield f"{parent.removesuffix('.norm')}.shared_head.norm.weight", value
    else:
        yield name, value


@torch.no_grad()
def load_weights(model: TrainableDeepSeek, checkpoint: Checkpoint) -> None:
    """Copies the weights of a checkpoint, dequantized; its config must be the model's.

    The copies of embedding and head in the prediction layers are not read.

    Raises CheckpointError for a tensor that is missing or has another shape.
    """
    for parameter_name, parameter in stored_parameters(model):
        values = torch.empty(parameter.shape)
        for name, value in stored_views(parameter_name, values):
            if name not in checkpoint:
                raise CheckpointError(f"{checkpoint.source}: tensor {name} is missing")
            stored, scale = checkpoint.read(name)
            real = stored
            if scale is not None:
                real = deepkern.cast_back(stored, scale, checkpoint.block, torch.float32)
            if real.shape != value.shape:
                text = f"tensor {name} has shape {list(real.shape)}, expected {list(value.shape)}"
                raise CheckpointError(f"{checkpoint.source}: {text}")
            value.copy_(real)
        assign(parameter, values)


@torch.no_grad()
def checkpoint_tensors(model: TrainableDeepSeek) -> dict[str, Tensor]:
    """Name in a checkpoint -> fp32 values.

    With several processes all of them call it, and all but the main one get an empty dict.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in stored_parameters(model):
        with model.parallel.naming_lost_ranks(f"exchange of {name}"):
            values = whole(parameter).detach().cpu()
        if model.parallel.is_main:
            tensors.update(stored_views(name, values))
    if model.parallel.is_main:
        embedding = tensors["model.embed_tokens.weight"]
        head = tensors.get("lm_head.weight", embedding)
        for index in range(len(model.prediction)):
            prefix = f"model.layers.{len(model.layers) + index}"
            tensors[f"{prefix}.embed_tokens.weight"] = embedding
            tensors[f"{prefix}.shared_head.head.weight"] = head
    return tensors
