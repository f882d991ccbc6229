"""Wraps csrc/sm90/mla_prefill.cuh in the emulator as a Python function."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

import deepkern
from bench.emulator import ORDERS
from deepkern.testing import ops

from .conftest import EmulatorFailure, RunOptions, only

PrefillFunction = Callable[..., tuple[Tensor, Tensor]]


class MlaPrefillArguments(ctypes.Structure):
    """deepkern::MlaPrefillArguments of csrc/sm90/launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k",
                                               "out", "lse", "tiles")),
        *((name, ctypes.c_int64) for name in ("q_row_stride", "k_row_stride", "v_row_stride")),
        *((name, ctypes.c_int) for name in ("q_head_stride", "k_head_stride", "v_head_stride")),
        ("softmax_scale_log2", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("T", "Tk", "H", "heads_per_key", "num_boundaries",
                                            "num_tiles", "heads_per_group")),
        ("causal", ctypes.c_bool),
    ]  # fmt: skip


def rows_with_gaps(x: Tensor) -> Tensor:
    """x [rows, heads, dim] with the memory between its heads, which its tensor map covers."""
    columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return x.as_strided((x.shape[0], columns), (x.stride(0), 1))


class MlaPrefillBackwardArguments(ctypes.Structure):
    """deepkern::MlaPrefillBackwardArguments of csrc/sm90/launch.h."""

    _fields_ = [
        ("forward", MlaPrefillArguments),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_lse", "grad_q", "grad_k",
                                               "grad_v", "delta", "key_tiles")),
        *((name, ctypes.c_int64) for name in ("grad_out_row_stride", "out_row_stride")),
        *((name, ctypes.c_int) for name in ("grad_out_head_stride", "out_head_stride")),
        ("softmax_scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("num_key_tiles", "key_heads_per_group")),
    ]  # fmt: skip


def forward_arguments(q, k, v, cu_q, cu_k, out, lse, scale, causal) -> MlaPrefillArguments:
    (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
    assert (Dqk, Dv) == (192, 128) and q.dtype == torch.bfloat16
    return MlaPrefillArguments(
        *(x.data_ptr() for x in (q, k, v, cu_q, cu_k, out, lse)), 0,
        *(x.stride(0) for x in (q, k, v)), *(x.stride(1) for x in (q, k, v)),
        scale * 1.4426950408889634, T, Tk, H, H // Hk, len(cu_q), causal=causal,
    )  # fmt: skip


def readable(boundaries: tuple[Tensor, Tensor], **tensors: Tensor) -> dict[str, Tensor]:
    """What a kernel may read: operands with the gaps between their heads, and boundaries."""
    read = {name: rows_with_gaps(x) for name, x in tensors.items()}
    return read | dict(zip(("cu_seqlens_q", "cu_seqlens_k"), boundaries, strict=True))


def run(function, *args, seed: int, order: str) -> None:
    message = ctypes.create_string_buffer(4096)
    buffer = ctypes.cast(message, ctypes.c_char_p)
    if function(*args, RunOptions(seed, ORDERS[order], buffer, len(message))):
        raise EmulatorFailure(message.value.decode())


def prefill_of(library: ctypes.CDLL) -> PrefillFunction:
    """The mla_prefill of `library`: the op's arguments, then how to run it."""

    def prefill(q, k, v, cu_q, cu_k, scale, causal=True, *, seed=0, order="random", blocks=3,
                heads_per_group=0) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.full((*q.shape[:2], 128), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
        p = forward_arguments(q, k, v, cu_q, cu_k, out, lse, scale, causal)
        library.emulate_plan_mla_prefill(ctypes.byref(p))
        p.heads_per_group = heads_per_group or p.heads_per_group
        tiles = torch.full((p.num_tiles, 4), 2**31 - 1, dtype=torch.int32)
        p.tiles = tiles.data_ptr()
        read = readable((cu_q, cu_k), q=q, k=k, v=v)
        with only(library, read, {"out": out, "lse": lse, "tiles": tiles}):
            run(library.emulate_mla_prefill, ctypes.byref(p), blocks, seed=seed, order=order)
        return out, lse

    return prefill


def backward_of(library: ctypes.CDLL) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The mla_prefill_backward of `library`: the op's arguments, then how to run it."""

    def backward(grad_out, q, k, v, out, lse, cu_q, cu_k, scale, causal=True, grad_lse=None, *,
                 seed=0, order="random", blocks=3, heads_per_group=0):  # fmt: skip
        grads = {f"grad_{name}": torch.full(x.shape, torch.nan, dtype=torch.bfloat16)
                 for name, x in (("q", q), ("k", k), ("v", v))}  # fmt: skip
        delta = torch.full(lse.shape, torch.nan)
        p = MlaPrefillBackwardArguments(
            forward_arguments(q, k, v, cu_q, cu_k, out, lse, scale, causal), grad_out.data_ptr(),
            0 if grad_lse is None else grad_lse.data_ptr(),
            *(x.data_ptr() for x in grads.values()), delta.data_ptr(), 0,
            grad_out.stride(0), out.stride(0), grad_out.stride(1), out.stride(1), scale,
        )  # fmt: skip
        library.emulate_plan_mla_prefill_backward(ctypes.byref(p))
        if heads_per_group:
            p.forward.heads_per_group = p.key_heads_per_group = heads_per_group
        sizes = {"tiles": p.forward.num_tiles, "key_tiles": p.num_key_tiles}
        tables = {name: torch.full((n, 4), 2**31 - 1, dtype=torch.int32)
                  for name, n in sizes.items()}  # fmt: skip
        p.forward.tiles, p.key_tiles = (x.data_ptr() for x in tables.values())
        read = readable((cu_q, cu_k), q=q, k=k, v=v, grad_out=grad_out, out=out)
        read |= {"lse": lse, "grad_lse": grad_lse}
        with only(library, read, {**grads, "delta": delta, **tables}):
            function = library.emulate_mla_prefill_backward
            run(function, ctypes.byref(p), blocks, seed=seed, order=order)
        return tuple(grads.values())

    return backward


def operands(generator, lengths, key_lengths=None, **size) -> tuple:
    """Arguments of mla_prefill for keys of 192 and values of 128."""
    size = {"H": 2, "Dqk": 192, "Dv": 128} | size
    inputs = ops.inputs("mla_prefill", generator, lengths, key_lengths or lengths, **size)
    return deepkern.OPS["mla_prefill"].positional(inputs)


def backward_operands(generator, lengths, key_lengths=None, with_lse=False, **size) -> tuple:
    """Arguments of mla_prefill_backward. Rows of no sequence are NaN in q, k, v and grad_out."""
    q, k, v, *rest = operands(generator, lengths, key_lengths, **size)
    out, lse = deepkern.reference.mla_prefill(q, k, v, *rest)
    grad_out = torch.randn(out.shape, generator=generator).bfloat16()
    grad_out[q[:, 0, 0].isnan()] = torch.nan
    grad_lse = torch.randn(lse.shape, generator=generator) if with_lse else None
    return grad_out, q, k, v, out.bfloat16(), lse.float(), *rest, grad_lse
