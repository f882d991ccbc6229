"""The DeepSeek-V3 model on deepkern's ops.

    x = embedding(tokens)
    x = x + attention(norm(x));  x = x + mlp_or_experts(norm(x))        for every layer
    logits = head(norm(x))

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2, and the released inference code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import LatentAttention
from model.cache import LatentCache, Step
from model.checkpoint import Checkpoint
from model.config import Config
from model.layers import MLP, MoE, Precision, RMSNorm, Rows, Weight
from model.rope import rope_table


class Layer(nn.Module):
    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__()
        c, self.fp8 = config, precision.fp8
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = LatentAttention(c, precision)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        if c.is_moe(index):
            self.mlp: nn.Module = MoE(c, precision)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, precision)

    def forward(self, x: Tensor, step: Step, cache: Tensor, table: Tensor) -> Tensor:
        """[B·S, hidden] -> the same; `cache` is this layer's."""
        x = x + self.self_attn(self.input_layernorm(x), step, cache, table)
        inner = self.post_attention_layernorm(x)
        return x + self.mlp(inner if isinstance(self.mlp, MoE) else Rows.of(inner, self.fp8))


class PredictionLayer(Layer):
    """Multi-token prediction: from the hidden state at i and token i+1, predicts token i+2."""

    def __init__(self, config: Config, index: int, precision: Precision) -> None:
        super().__init__(config, index, precision)
        c, p = config, precision
        self.embed_tokens = Weight(c.vocab_size, c.hidden_size, p)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.eh_proj = Weight(c.hidden_size, 2 * c.hidden_size, p)
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        head = Weight(c.vocab_size, c.hidden_size, p)
        self.shared_head = nn.ModuleDict({"norm": norm, "head": head})


class DeepSeek(nn.Module):
    """A model for inference; build one with `from_pretrained`."""

    def __init__(self, config: Config, precision: Precision | None = None) -> None:
        super().__init__()
        precision = precision or Precision()
        self.config, self.precision, c = config, precision, config
        layers: list[Layer] = [Layer(c, i, precision) for i in range(c.num_hidden_layers)]
        for depth in range(c.num_nextn_predict_layers):
            layers.append(PredictionLayer(c, c.num_hidden_layers + depth, precision))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Weight(c.vocab_size, c.hidden_size, precision),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps, precision),
            }
        )
        self.lm_head = Weight(c.vocab_size, c.hidden_size, precision)
        self.table = torch.empty(0, c.qk_rope_head_dim)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        fp8: bool = False,
    ) -> DeepSeek:
        """Loads a directory in the Hugging Face layout.

        With `fp8` every Linear keeps e4m3 weights and casts its input per token; weights that are
        stored otherwise are quantised at load.  Without it, weights are dequantised to `dtype`.

        Raises:
            FileNotFoundError: no such directory, or no config.json in it.
            CheckpointError (a ValueError): naming the file and the tensor that is damaged, missing,
                misshapen or unknown.
        """
        return cls.from_checkpoint(Checkpoint.open(path), Precision(dtype, device, fp8))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, precision: Precision) -> DeepSeek:
        config = checkpoint.check()
        with torch.device("meta"):
            model = cls(config, precision)
        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "load"):
                    module.load(checkpoint, model.source(name, checkpoint))
        model.table = rope_table(config, 0).to(precision.device)
        return model.eval()

    def source(self, name: str, checkpoint: Checkpoint) -> str:
        """Where the checkpoint has module `name`: tied and left-out copies are read elsewhere."""
        if name == "lm_head" and self.config.tie_word_embeddings:
            return "model.embed_tokens"
        if f"{name}.weight" not in checkpoint:
            if name.endswith(".embed_tokens"):
                return "model.embed_tokens"
            if name.endswith(".shared_head.head"):
                return self.source("lm_head", checkpoint)
        return name

    def angles(self, length: int) -> Tensor:
        """[cos | sin] of at least `length` positions, fp32; made once and doubled when outgrown."""
        if len(self.table) < length:
            size = max(length, 2 * len(self.table), 256)
            self.table = rope_table(self.config, size).to(self.precision.device)
        return self.table

    def new_cache(self, batch: int, capacity: int, page: int = 64) -> LatentCache:
        return LatentCache(
            self.config, batch, capacity, self.precision.dtype, self.precision.device, page
        )

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            got = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise ValueError(f"DeepSeek: tokens: expected int64 [B, S], got {got}")
        return F.embedding(tokens, weight).flatten(0, 1)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [B, S, hidden].

        With a cache, the tokens follow those already in it.
        """
        x = self.embed(tokens, self.model["embed_tokens"].weight)
        cache = self.new_cache(*tokens.shape) if cache is None else cache
        step = cache.reserve(tokens.shape[1])
        table = self.angles(cache.length)
        for index, pages in enumerate(cache.layers):
            x = self.model["layers"][index](x, step, pages, table)
        return self.model["norm"](x).view(*tokens.shape, self.config.hidden_size)

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> logits [B, S, vocab]."""
        return F.linear(self.hidden(tokens, cache), self.lm_head.weight)

    @torch.no_grad()
    def mtp_logits(self, tokens: Tensor, depth: int = 0) -> Tensor:
        """Logits [B, S - 1, vocab] of the first prediction layer: row i is about token i + 2."""
        if not self.config.num_nextn_predict_layers:
            raise ValueError("DeepSeek: mtp_logits: the checkpoint has no prediction layer")
        layer = self.model["layers"][self.config.num_hidden_layers + depth]
        hidden = self.hidden(tokens)[:, :-1].flatten(0, 1)
        batch, count = tokens.shape[0], tokens.shape[1] - 1
        embedded = self.embed(tokens[:, 1:], layer.embed_tokens.weight)
        both = torch.cat([layer.enorm(embedded), layer.hnorm(hidden)], -1)
        p = self.precision
        cache = LatentCache(self.config, batch, count, p.dtype, p.device, layers=1)
        step, table = cache.reserve(count), self.angles(count)
        x = layer(F.linear(both, layer.eh_proj.weight), step, cache.layers[0], table)
        x = F.linear(layer.shared_head["norm"](x), layer.shared_head["head"].weight)
        return x.view(batch, count, self.config.vocab_size)

    @torch.no_grad()
    def stream(self, tokens: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        """Greedy continuation, one int64 [B] at a time: one prefill, then cached decoding."""
        if tokens.shape[-1] == 0:
            raise ValueError("DeepSeek: generate: the prompt is empty")
        cache = self.new_cache(tokens.shape[0], tokens.shape[1] + max_new_tokens)
        for _ in range(max_new_tokens):
            last = self.hidden(tokens, cache)[:, -1]
            token = F.linear(last, self.lm_head.weight).argmax(-1)
            yield token
            tokens = token[:, None]

    def generate(self, tokens: Tensor, max_new_tokens: int) -> Tensor:
        """int64 [B, S] -> [B, S + max_new_tokens]: the prompt and its greedy continuation."""
        new = list(self.stream(tokens, max_new_tokens))
        return torch.cat([tokens, *(token[:, None] for token in new)], 1)
