"""The indexer of DeepSeek-V3.2: which cached tokens a token attends to.

    score[i, j] = Σ over heads h of weight[i, h] · relu(q[i, h] · k[j])         j up to i

Its heads are small and share one key per token.  The `index_topk` tokens of highest score are
selected.  As in the released code, queries and keys are rotated by a Hadamard transform and
compared in FP8; a model in fp32 compares them as they are.  The rotary pairs of the indexer are
(i, i + rope/2) of the first `rope` values, unlike those of the attention.

Source: DeepSeek-V3.2-Exp report and its released inference code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepkern
from model.batch import TokenBatch
from model.checkpoint import Checkpoint
from model.config import INDEX_NORM_EPS, Config
from model.linear import Linear, Rows, Weight
from model.rope import apply_rope, interleave_pairs, split_pairs
from model.weights import Precision, frozen, load_real


class KeyNorm(nn.Module):
    """LayerNorm over the last dimension, with a bias."""

    def __init__(self, size: int, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.weight = frozen(torch.ones(size, dtype=precision.dtype))
        self.bias = frozen(torch.zeros(size, dtype=precision.dtype))

    def load(self, checkpoint: Checkpoint, name: str) -> None:
        self.weight = frozen(load_real(checkpoint, f"{name}.weight", self.precision))
        self.bias = frozen(load_real(checkpoint, f"{name}.bias", self.precision))

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D], in fp32, rounded once."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, INDEX_NORM_EPS).to(x.dtype)


class Indexer(nn.Module):
    """Selects the slots of the cached tokens that each new token attends to."""

    def __init__(self, config: Config, precision: Precision) -> None:
        super().__init__()
        self.config, c = config, config
        self.heads, self.width = c.index_n_heads, c.index_head_dim
        self.wq_b = Linear(c.q_lora_rank, self.heads * self.width, precision)
        self.wk = Linear(c.hidden_size, self.width, precision)
        self.k_norm = KeyNorm(self.width, precision)
        self.weights_proj = Weight(self.heads, c.hidden_size, precision)

    def forward(self, x: Rows, q_latent: Rows, batch: TokenBatch, cache: Tensor) -> Tensor:
        """x [N, hidden], q_latent [N, q_lora_rank] -> slots int32 [N, topk], -1 where there are
        fewer tokens.

        Writes the keys of the new tokens to the cache, as in `CachePool.index_keys`.
        """
        q = self.rotate(self.wq_b(q_latent).unflatten(1, (self.heads, self.width)), batch)
        k = self.rotate(self.k_norm(self.wk(x))[:, None], batch)[:, 0]
        weights = deepkern.gemm_nt(x.real, self.weights_proj.weight).float()
        weights = weights * (self.heads * self.width) ** -0.5
        score = self.fp8_scores if cache.dtype == torch.uint8 else self.real_scores
        scores = score(q, k, weights, batch, cache)
        chosen = deepkern.topk_indices(scores, self.config.index_topk, batch.cache_seqlens)
        return batch.slots_of(chosen, cache.shape[1])

    def rotate(self, x: Tensor, batch: TokenBatch) -> Tensor:
        """x [N, heads, D]: rotates the first `rope` values."""
        rope = self.config.qk_rope_head_dim
        rotated = apply_rope(interleave_pairs(x[..., :rope]), batch.cos, batch.sin)
        return torch.cat([split_pairs(rotated), x[..., rope:]], -1)

    def fp8_scores(
        self, q: Tensor, k: Tensor, weights: Tensor, batch: TokenBatch, cache: Tensor
    ) -> Tensor:
        """q [N, heads, D], k [N, D], weights [N, heads] -> fp32 [N, longest sequence]."""
        unit, fmt = self.width**-0.5, self.config.activation_scale_format
        deepkern.indexer_cache_append(deepkern.hadamard_transform(k, unit), cache, batch.slots, fmt)
        codes, scale = deepkern.hadamard_cast(q, unit, fmt)
        return deepkern.paged_mqa_logits(
            codes[:, None],
            cache,
            weights * scale.squeeze(-1),
            batch.cache_seqlens,
            batch.block_table,
            batch.longest,
        )

    def real_scores(
        self, q: Tensor, k: Tensor, weights: Tensor, batch: TokenBatch, cache: Tensor
    ) -> Tensor:
        """As `fp8_scores`, in the dtype of the model."""
        keys = cache.flatten(0, 2)  # [slots, D]
        keys[batch.slots] = k
        scores = torch.full((len(q), batch.longest), -torch.inf, device=q.device)
        for rows, length in batch.sequences:
            pages = batch.block_table[rows.start].long()
            known = cache[pages].flatten(0, 2)[:length]
            products = deepkern.gemm_nt(q[rows].flatten(0, 1), known).relu()
            products = products.unflatten(0, (-1, self.heads))
            total = torch.zeros(products.shape[0], length, device=q.device)
            for head in range(self.heads):  # one order for any number of rows
                total += products[:, head] * weights[rows, head, None]
            scores[rows, :length] = total
        return scores
