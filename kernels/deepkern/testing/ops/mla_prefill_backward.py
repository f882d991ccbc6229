"""Inputs, sizes, cost and baseline of mla_prefill_backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ..costs import Cost, tensor_bytes
from ..providers import Provider, prepared
from . import Sizes, mla_prefill
from .mla_prefill import causal_mask, sdpa, sequences, visible_pairs

BF16 = torch.bfloat16


def inputs(
    generator: Generator, lengths: tuple[int, ...] | list[int], from_lse: bool = False, **size
) -> tuple:
    """`from_lse`: with a gradient of lse, too."""
    q, k, v, *rest = mla_prefill.inputs(generator, lengths, **size)
    (T, H, _), Dv, device = q.shape, v.shape[2], q.device
    grad_out = torch.randn(T, H, Dv, generator=generator, device=device).to(q.dtype)
    grad_lse = torch.randn(H, T, generator=generator, device=device) if from_lse else None
    out, lse = torch.ops.deepkern.mla_prefill(q, k, v, *rest)
    return grad_out, q, k, v, out, lse, *rest, grad_lse


SIZES = Sizes(
    small=[
        {"lengths": (40, 0, 70), "H": 2, "unused": 2, "from_lse": True},
        {"lengths": (80, 9), "lengths_k": (60, 0), "H": 4, "Hk": 2, "Dqk": 40, "Dv": 24},
        {
            "lengths": (33, 5),
            "lengths_k": (20, 50),
            "H": 4,
            "Hk": 1,
            "Dqk": 24,
            "Dv": 16,
            "dtype": torch.float32,
            "causal": False,
            "unused": 1,
            "from_lse": True,
        },
        {"lengths": (20,), "H": 1, "Dqk": 64, "Dv": 64, "dtype": torch.float16},
        {"lengths": ()},
        {"lengths": (0, 0), "H": 2, "unused": 3},
        {"lengths": (4,), "lengths_k": (0,), "H": 2},
        {"lengths": (0,), "lengths_k": (4,), "H": 2},
        {"lengths": (4,), "H": 0, "Hk": 2},
    ],
    cpu=[{"lengths": (512,), "H": 8}],
    gpu=[
        {"lengths": (2048,) * 4, "H": 128},
        {"lengths": (8192,), "H": 128},
        {"lengths": (16384,), "H": 128},
        {"lengths": (8192,), "H": 128, "causal": False},
        {"lengths": (8192,), "H": 64, "Hk": 8, "Dqk": 128},
    ],
    inspect=[
        {"lengths": (4096,)},
        {"lengths": (4096,), "Dqk": 128},
        {"lengths": (1024,), "dtype": torch.float32},
    ],
)
EXACT = False


def cost(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, **rest) -> Cost:
    """FLOPs of five products, which any implementation needs; ours recomputes two of them."""
    pairs = visible_pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    moved = tensor_bytes(q, k, v, cu_seqlens_q, cu_seqlens_k, rest)
    return Cost(moved, 2 * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2]) * pairs)


def baseline(
    grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal=True,
    grad_lse=None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """SDPA and its backward, sequence by sequence."""
    gradients = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
            outputs, grads = [sdpa(*leaves, softmax_scale, causal)], [grad_out[rows]]
            if grad_lse is not None:
                outputs.append(lse_of(*leaves[:2], softmax_scale, causal))
                grads.append(grad_lse[:, rows])
        grads = torch.autograd.grad(outputs, leaves, grads)
        for whole, part, grad in zip(gradients, (rows, keys, keys), grads, strict=True):
            whole[part] = grad
    return tuple(gradients)


def lse_of(q, k, softmax_scale, causal) -> Tensor:
    """fp32 [H, Lq] of one sequence."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("mhd,nhd->hmn", q.float(), k.float()) * softmax_scale
    return (scores.masked_fill(~causal_mask(q, k), -torch.inf) if causal else scores).logsumexp(-1)


def providers(
    grad_out, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, grad_lse, **rest
) -> list[Provider]:
    if grad_lse is not None:
        return []
    pairs = sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal)

    def backward() -> Callable:
        graphs = []
        for rows, keys in pairs:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q[rows], k[keys], v[keys])]
                graphs.append((sdpa(*leaves, softmax_scale, causal), leaves, grad_out[rows]))
        return lambda: [torch.autograd.grad(*g, retain_graph=True) for g in graphs]

    def outputs(grads: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        whole = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        for (rows, keys), parts in zip(pairs, grads, strict=True):
            for x, part, grad in zip(whole, (rows, keys, keys), parts, strict=True):
                x[part] = grad
        return tuple(whole)

    return [Provider("sdpa", "SDPA's backward alone", prepared(backward), outputs)]
