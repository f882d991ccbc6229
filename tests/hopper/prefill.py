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


def prefill_of(library: ctypes.CDLL) -> PrefillFunction:
    """The mla_prefill of `library`: the op's arguments, then how to run it."""

    def prefill(q, k, v, cu_q, cu_k, scale, causal=True, *, seed=0, order="random", blocks=3,
                heads_per_group=0) -> tuple[Tensor, Tensor]:  # fmt: skip
        (T, H, Dqk), (Tk, Hk, Dv) = q.shape, v.shape
        assert (Dqk, Dv) == (192, 128) and q.dtype == torch.bfloat16
        out = torch.full((T, H, Dv), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((H, T), torch.nan)
        p = MlaPrefillArguments(
            *(x.data_ptr() for x in (q, k, v, cu_q, cu_k, out, lse)), 0,
            *(x.stride(0) for x in (q, k, v)), *(x.stride(1) for x in (q, k, v)),
            scale * 1.4426950408889634, T, Tk, H, H // Hk, len(cu_q), causal=causal,
        )  # fmt: skip
        library.emulate_plan_mla_prefill(ctypes.byref(p))
        p.heads_per_group = heads_per_group or p.heads_per_group
        tiles = torch.full((p.num_tiles, 4), 2**31 - 1, dtype=torch.int32)
        p.tiles = tiles.data_ptr()
        read = {name: rows_with_gaps(x) for name, x in (("q", q), ("k", k), ("v", v))}
        read |= {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
        message = ctypes.create_string_buffer(4096)
        options = RunOptions(
            seed, ORDERS[order], ctypes.cast(message, ctypes.c_char_p), len(message)
        )
        with only(library, read, {"out": out, "lse": lse, "tiles": tiles}):
            failed = library.emulate_mla_prefill(ctypes.byref(p), blocks, options)
        if failed:
            raise EmulatorFailure(message.value.decode())
        return out, lse

    return prefill


def operands(generator, lengths, key_lengths=None, **size) -> tuple:
    """Arguments of mla_prefill for keys of 192 and values of 128."""
    size = {"H": 2, "Dqk": 192, "Dv": 128} | size
    inputs = ops.inputs("mla_prefill", generator, lengths, key_lengths or lengths, **size)
    return deepkern.OPS["mla_prefill"].positional(inputs)
