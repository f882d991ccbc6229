"""Plain PyTorch attention over the tokens that each query names, for the sparse ops' baselines."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .providers import is_installed

OPTIONS = {"lengths": True, "sink": True}


def token_mask(indices: Tensor, num_tokens: int, topk_length: Tensor | None) -> Tensor:
    """Which `indices` [..., topk] name a token: those in range and before `topk_length`."""
    mask = (indices >= 0) & (indices < num_tokens)
    if topk_length is not None:
        position = torch.arange(indices.shape[-1], device=indices.device)
        mask &= position < topk_length[:, None, None]
    return mask


def count_tokens(indices: Tensor, num_tokens: int, topk_length: Tensor | None) -> int:
    """How many tokens all queries together read."""
    return int(token_mask(indices, num_tokens, topk_length).sum())


def attend(
    q: Tensor, tokens: Tensor, mask: Tensor, softmax_scale: float, R: int, sink: Tensor | None
) -> Tensor:
    """SDPA of q [N, H, W] over each query's own tokens [N, topk, W], masked by [N, topk].

    A sink is one more token: its score is 0 plus the sink, its value is 0.
    """
    tokens = tokens.masked_fill(~mask[..., None], 0)  # 0 * NaN would be NaN
    H = q.shape[1]
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
    bias = bias.masked_fill(~mask, -math.inf)[:, None].expand(-1, H, -1)
    if sink is not None:
        tokens = F.pad(tokens, (0, 0, 0, 1))
        bias = torch.cat([bias, sink.to(q.dtype)[None, :, None].expand(len(q), -1, 1)], -1)
    # All heads attend to the same tokens, so they are passed as the rows of one head.
    out = F.scaled_dot_product_attention(
        q[:, None], tokens[:, None], tokens[:, None, :, :R], bias[:, None], scale=softmax_scale
    )
    return out[:, 0].masked_fill(~mask.any(-1)[:, None, None], 0)


def softmax_attention(q, kv, row, mask, softmax_scale, R, sink=None) -> tuple[Tensor, Tensor]:
    """out [N, H, R] and lse [N, H] over rows [N, topk] of kv; constant where the mask is empty."""
    empty = ~mask.any(-1)[:, None]  # [N, 1]
    tokens = F.pad(kv, (0, 0, 0, 0, 0, 1))[row, 0]  # one more row, in case kv has none
    tokens = tokens.masked_fill(~mask[..., None], 0)
    scores = (q @ tokens.mT).float() * softmax_scale
    scores = scores.masked_fill(~(mask | empty)[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    log_sum = lse if sink is None else torch.logaddexp(lse, sink)
    weights = (scores - log_sum[..., None]).exp().to(q.dtype)
    out = (weights @ tokens[..., :R]).masked_fill(empty[..., None], 0)
    return out, lse.masked_fill(empty, -math.inf)


def flash_mla_serves(q: Tensor, R: int) -> bool:
    """Whether FlashMLA is installed and its sparse kernels take these shapes."""
    shapes = q.shape[-1] == 576 and R == 512 and q.shape[-2] in (64, 128)
    return is_installed("flash_mla") and q.is_cuda and shapes
