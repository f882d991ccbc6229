"""Inputs, sizes, cost and baseline of merge_states_backward."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..costs import each_tensor_once
from . import merge_states

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    lead: tuple[int, ...],
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype = BF16,
    empty: bool = True,
) -> tuple:
    device = generator.device
    grad_out = torch.randn(*lead, S, H, D, generator=generator, device=device).to(dtype)
    grad_lse = torch.randn(*lead, H, S, generator=generator, device=device)
    return grad_out, grad_lse, *merge_states.inputs(generator, lead, S, H, D, dtype, empty)


SIZES = merge_states.SIZES
EXACT = False
cost = each_tensor_once


def baseline(grad_out, grad_lse, out_a, lse_a, out_b, lse_b) -> tuple[Tensor, ...]:
    """Autograd through sigmoid and logaddexp."""
    no_key = [(lse == -torch.inf) for lse in (lse_a, lse_b)]
    outs = [out.float().masked_fill(empty.mT[..., None], 0)
            for out, empty in zip((out_a, out_b), no_key, strict=True)]  # fmt: skip
    # Autograd has no gradient at -inf. exp(-1e4) is 0 as well.
    leaves = [outs[0], lse_a.clamp(min=-1e4), outs[1], lse_b.clamp(min=-1e4)]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in leaves]
        a, log_a, b, log_b = leaves
        weight = (log_a - log_b).sigmoid().mT[..., None]
        results = weight * a + (1 - weight) * b, torch.logaddexp(log_a, log_b)
        grads = torch.autograd.grad(results, leaves, (grad_out.float(), grad_lse))
    neither = no_key[0] & no_key[1]
    grad_outs = [g.masked_fill(neither.mT[..., None], 0).to(out_a.dtype) for g in grads[::2]]
    grad_lses = [g.masked_fill(neither, 0) for g in grads[1::2]]
    return grad_outs[0], grad_lses[0], grad_outs[1], grad_lses[1]
