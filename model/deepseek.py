"""The DeepSeek-V3, R1, V3.2 and V2 architecture on deepkern's ops, for inference.

    x = embedding(tokens)
    x = x + attention(norm(x));  x = x + mlp_or_experts(norm(x))        for every layer
    logits = head(norm(x))

This file has the layer and the model; `attention.py`, `indexer.py` and `experts.py` have what a
layer consists of, `batch.py` the tokens of a forward pass, `cache.py` the pages, `engine.py` the
scheduling of many requests.  `model/plain.py` defines the same model in plain PyTorch; tests
compare the two.  Module names are those of the Hugging Face checkpoint.

    from model import DeepSeek

    m = DeepSeek.from_pretrained("model/checkpoints/stdlib-bytes", dtype=torch.float32)
    tokens = torch.tensor([[12, *b"def main("]])  # int64 [1, 10]; 12 starts a text
    logits = m(tokens)  # [1, 10, 256]
    continued = m.generate(tokens, max_new_tokens=40)  # int64 [1, 50]

A row's bits depend on its own sequence only, not on the other rows of a pass.  So nothing here
multiplies rows with `F.linear`, whose order of summation depends on their number.

Source: DeepSeek-V3 report (arXiv:2412.19437), section 2, and the released inference code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.attention import LatentAttention
from model.batch import TokenBatch
from model.cache import PAGE, CachePool, LatentCache, LayerCache
from model.checkpoint import Checkpoint
from model.config import Config
from model.experts import MLP, MoE
from model.linear import RMSNorm, Weight
from model.ranks import ALONE, Ranks
from model.rope import rope_cos_sin
from model.weights import Precision, resolve_dtype

if TYPE_CHECKING:
    from model.sampling import Sampling


class Layer(nn.Module):
    """Attention and a dense MLP or experts, each after a norm and added to the residual stream."""

    def __init__(
        self, config: Config, index: int, precision: Precision, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        c = config
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        self.self_attn = LatentAttention(c, precision, ranks)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, precision)
        if c.is_moe(index):
            self.mlp: nn.Module = MoE(c, precision, ranks)
        else:
            self.mlp = MLP(c.hidden_size, c.intermediate_size, precision, ranks)

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: TokenBatch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """The layer's input is x + residual, [N, hidden] each; so is the output.

        The norm that follows adds the two.
        """
        rows, residual = self.input_layernorm(x, residual)
        x = self.self_attn(rows, batch, cache)
        rows, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(rows), residual


class PredictionLayer(Layer):
    """Multi-token prediction: predicts token i+2 from the hidden state at i and token i+1."""

    def __init__(
        self, config: Config, index: int, precision: Precision, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(config, index, precision, ranks)
        c, p = config, precision
        self.embed_tokens = Weight(c.vocab_size, c.hidden_size, p)
        self.enorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.hnorm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        self.eh_proj = Weight(c.hidden_size, 2 * c.hidden_size, p)
        norm = RMSNorm(c.hidden_size, c.rms_norm_eps, p)
        head = Weight(c.vocab_size, c.hidden_size, p)
        self.shared_head = nn.ModuleDict({"norm": norm, "head": head})


class DeepSeek(nn.Module):
    """A DeepSeek-V3, R1 or V2 model for inference.

    `from_pretrained` loads a checkpoint.  `DeepSeek(Config.preset("tiny"))` has random weights.

    ranks: the processes that divide the model, after `connect`; by default there is one.
    """

    def __init__(
        self, config: Config, precision: Precision | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        precision = precision or Precision()
        precision = precision._replace(scale_format=config.activation_scale_format)
        self.config, self.precision, self.ranks, c = config, precision, ranks, config
        layers: list[Layer] = [Layer(c, i, precision, ranks) for i in range(c.num_hidden_layers)]
        for depth in range(c.num_nextn_predict_layers):
            layers.append(PredictionLayer(c, c.num_hidden_layers + depth, precision, ranks))
        self.model = nn.ModuleDict(
            {
                "embed_tokens": Weight(c.vocab_size, c.hidden_size, precision),
                "layers": nn.ModuleList(layers),
                "norm": RMSNorm(c.hidden_size, c.rms_norm_eps, precision),
            }
        )
        self.lm_head = Weight(c.vocab_size, c.hidden_size, precision)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model["embed_tokens"].weight
        self.cos_sin = torch.empty(0, c.qk_rope_head_dim, device=precision.device)  # rotary_table
        if not self.lm_head.weight.is_meta:
            self.to(precision.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str = "cpu",
        fp8: bool = False,
        layers: int | None = None,
        ranks: Ranks = ALONE,
    ) -> DeepSeek:
        """Loads a checkpoint directory in the Hugging Face layout.

        With `fp8` every Linear keeps e4m3 weights and casts its input per token; weights that are
        stored in another dtype are quantized at load.  Without it, weights are dequantized to
        `dtype` at load.

        dtype: a dtype, its name, or "auto", that of the checkpoint.
        layers: the number of decoder layers to load; by default all.
        ranks: the processes that divide the model, such as Ranks(tensor=2, experts=4); all of them
            make the same calls.

        Raises:
            FileNotFoundError: no such directory, or no config.json in it.
            CheckpointError (a ValueError): a tensor is damaged, missing, unknown, or has a wrong
                shape or dtype.  The message names the file and the tensor.
            ValueError: `ranks` does not fit the model or the number of processes.
        """
        checkpoint = Checkpoint.open(path)
        precision = Precision(resolve_dtype(dtype, checkpoint), device, fp8)
        return cls.from_checkpoint(checkpoint, precision, layers, ranks)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        precision: Precision,
        layers: int | None = None,
        ranks: Ranks = ALONE,
    ) -> DeepSeek:
        """Checks all tensors, builds the model on the meta device, and loads module by module."""
        config = checkpoint.check(layers)
        if ranks is not ALONE:
            precision = precision._replace(device=ranks.connect(config, precision.device))
        with torch.device("meta"):
            model = cls(config, precision, ranks)
        with torch.no_grad():
            for name, module in model.named_modules():
                if hasattr(module, "load"):
                    module.load(checkpoint, model.checkpoint_name(name, checkpoint))
        return model.eval()

    def checkpoint_name(self, name: str, checkpoint: Checkpoint) -> str:
        """Name of module `name` in the checkpoint, which omits copies of embedding and head."""
        if name == "lm_head" and self.config.tie_word_embeddings:
            return "model.embed_tokens"
        if f"{name}.weight" not in checkpoint:
            if name.endswith(".embed_tokens"):
                return "model.embed_tokens"
            if name.endswith(".shared_head.head"):
                return self.checkpoint_name("lm_head", checkpoint)
        return name

    def rotary_table(self, length: int) -> Tensor:
        """[cos | sin] of at least `length` positions, fp32; doubled when it is too short."""
        if len(self.cos_sin) < length or self.cos_sin.device != self.device:
            size = max(length, 2 * len(self.cos_sin), 256)
            self.cos_sin = rope_cos_sin(self.config, size).to(self.device)
        return self.cos_sin

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepSeek:
        """Moves the model.  A change of dtype is refused: weights have dtypes of several kinds."""
        dtype = self.precision.dtype
        got = fn(torch.empty(0, dtype=dtype)).dtype
        if got != dtype:
            text = f"DeepSeek: the weights are {dtype} and cannot change to {got}"
            raise TypeError(f"{text}; load them with from_pretrained(dtype={got})")
        # As bytes, the fp32 router of a bf16 model and e4m3 weights keep their dtype.
        return super()._apply(lambda t: fn(t.view(torch.uint8)).view(t.dtype), recurse)

    def new_pool(self, pages: int, page_size: int = PAGE, fp8: bool = False) -> CachePool:
        """Pages for all layers, the latents in FP8 or in the model's dtype."""
        p = self.precision
        fp8_index = p.fp8 or p.dtype != torch.float32
        return CachePool(self.config, pages, p.dtype, self.device, page_size, fp8, fp8_index)

    def new_cache(
        self, batch: int, capacity: int, page: int = PAGE, fp8: bool = False
    ) -> LatentCache:
        """An empty cache for `batch` sequences of up to `capacity` tokens, in pages of `page`."""
        pages = batch * -(-capacity // page)
        return LatentCache(self.new_pool(pages, page, fp8), batch, capacity)

    def run(self, batch: TokenBatch, pool: CachePool) -> Tensor:
        """The hidden states after the final norm of every row, [N, hidden]."""
        x, residual = F.embedding(batch.tokens, self.model["embed_tokens"].weight), None
        caches = pool.layers[: self.config.num_hidden_layers]
        for cache, layer in zip(caches, self.model["layers"], strict=False):
            x, residual = layer(x, residual, batch, cache)
        rows, _ = self.model["norm"](x, residual)
        return rows.real

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab]."""
        return deepkern.gemm_nt(hidden, self.lm_head.weight)

    def run_prediction(
        self, hidden: Tensor, batch: TokenBatch, pool: CachePool, depth: int = 0
    ) -> Tensor:
        """[N, hidden], as from `run` -> the same of prediction layer `depth`, for its head.

        batch: its tokens are those that follow the ones of `hidden`.
        """
        index = self.config.num_hidden_layers + depth
        layer = self.model["layers"][index]
        embedded = F.embedding(batch.tokens, layer.embed_tokens.weight)
        both = torch.cat([layer.enorm(embedded)[0].real, layer.hnorm(hidden)[0].real], -1)
        x = deepkern.gemm_nt(both, layer.eh_proj.weight)
        x, residual = layer(x, None, batch, pool.layers[index])
        return layer.shared_head["norm"](x, residual)[0].real

    def prediction_logits(self, hidden: Tensor, depth: int = 0) -> Tensor:
        """[N, hidden], as from `run_prediction` -> [N, vocab]."""
        layer = self.model["layers"][self.config.num_hidden_layers + depth]
        return deepkern.gemm_nt(hidden, layer.shared_head["head"].weight)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> hidden states after the final norm [B, S, hidden].

        With a cache, the tokens follow those that it holds.  If the call raises, `cache.length` is
        unchanged.
        """
        self.check_tokens(tokens)
        if tokens.numel() == 0:
            shape = *tokens.shape, self.config.hidden_size
            return torch.empty(shape, dtype=self.precision.dtype, device=self.device)
        cache = self.new_cache(*tokens.shape) if cache is None else cache
        cos_sin = self.rotary_table(cache.length + tokens.shape[1])
        batch = cache.next_batch(tokens, cos_sin)
        hidden = batch.in_order(self.run(batch, cache.pool))
        cache.length += tokens.shape[1]
        return hidden.view(*tokens.shape, -1)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises ValueError unless tokens are int64 [B, S]; IndexError for one out of range."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            got = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise ValueError(f"DeepSeek: tokens: expected int64 [B, S], got {got}")

    @torch.no_grad()
    def forward(self, tokens: Tensor, cache: LatentCache | None = None) -> Tensor:
        """int64 [B, S] -> logits [B, S, vocab]; `hidden` says what a cache does."""
        logits = self.logits(self.hidden(tokens, cache).flatten(0, 1))
        return logits.view(*tokens.shape, self.config.vocab_size)

    @torch.no_grad()
    def mtp_logits(self, tokens: Tensor, depth: int = 0) -> Tensor:
        """int64 [B, S] -> logits [B, S - 1, vocab] of prediction layer `depth`.

        Row i predicts token i + 2.
        """
        if not self.config.num_nextn_predict_layers:
            raise ValueError("DeepSeek: mtp_logits: the checkpoint has no prediction layer")
        hidden, following = self.hidden(tokens)[:, :-1], tokens[:, 1:]
        cache = self.new_cache(*following.shape)
        batch = cache.next_batch(following, self.rotary_table(following.shape[1]))
        if batch.order is not None:
            hidden = hidden.flatten(0, 1)[batch.order.argsort()]
        hidden = hidden.reshape(len(batch.tokens), -1)
        state = batch.in_order(self.run_prediction(hidden, batch, cache.pool, depth))
        return self.prediction_logits(state, depth).view(*following.shape, -1)

    def generate(
        self,
        tokens: Tensor | list[list[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> Tensor | list[list[int]]:
        """The prompts with their continuations, greedy unless `sampling` says otherwise.

        tokens: int64 [B, S], or prompts of any lengths.  Prompt k has the seed `sampling.seed` + k
        and ends at an end token of the config.  Returns a list for a list, otherwise int64
        [B, S + n] with n up to max_new_tokens, where the end token fills the rest of sequences that
        ended early.
        """
        from model.engine import generate  # it imports this module

        return generate(self, tokens, max_new_tokens, sampling)
