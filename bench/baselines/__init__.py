"""What a PyTorch user would write for each op: the baseline that it is timed against.

`BASELINES[op]` takes the op's arguments and gives its outputs (None for one that the usual way does
not make). They double as an independent check of the reference, which is written differently.
Further calls to time beside an op (`OTHERS`) need give nothing. A module per family.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import (  # noqa: F401  (each enters its baselines)
    attention,
    experts,
    indexer,
    matmul,
    quant,
    sparse_attention,
)
from .registry import BASELINES, OTHERS


def calls(op: str, args: tuple) -> dict[str, Callable[[], object]]:
    """What to time beside `op` on `args`, by its description."""
    found = {}
    if op in BASELINES:
        plain = BASELINES[op]
        found[plain.__doc__.splitlines()[0].rstrip(".")] = lambda: plain(*args)
    if op in OTHERS:
        try:
            found |= OTHERS[op](args)
        except Exception as error:
            found["further baselines"] = _raising(error)
    return found


def _raising(error: Exception) -> Callable[[], object]:
    """A call that says why there is none."""

    def call():
        raise error

    return call


def readable(op: str, args: tuple, x: Tensor) -> Tensor:
    """An output as numbers that may be compared with a tolerance.

    FP8 caches are unpacked. For chosen experts, their biased scores stand, and for chosen places
    their values, sorted, because torch.topk may choose either of two equal ones.
    """
    if op == "mla_cache_append" and x.dtype == torch.uint8:
        return attention.unpack(x, args[0].shape[-1])
    if op == "route_topk" and x.dtype == torch.int64:
        s = experts.scores(args[0], args[5])
        return (s if args[1] is None else s + args[1].float()).gather(1, x)
    if op == "indexer_cache_append" and x.dtype == torch.uint8:
        return indexer.unpack(x)
    if op == "topk_indices":
        logits = torch.nn.functional.pad(args[0].float(), (0, 1), value=-torch.inf)  # for -1
        return logits.gather(1, x.long() % logits.shape[1]).sort(1).values
    return x
