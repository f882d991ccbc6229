"""Compiles csrc/sm90 against csrc/emulator and wraps its kernels as Python functions."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.emulator import CSRC, ORDERS, build, compiler, sources

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # deepkern::Real


class Tile(NamedTuple):
    """A row of csrc/sm90/fp8_gemm_tiles.h."""

    variant: str
    rows: int
    columns: int
    stages: int
    cluster_m: int
    cluster_n: int
    swapped: bool
    b_rows: int

    def __str__(self) -> str:
        words = [f"{self.variant} {self.rows}x{self.columns}"]
        words += ["pairs share b"] * (self.cluster_m > 1) + ["pairs share a"] * (self.cluster_n > 1)
        words += ["swapped"] * self.swapped
        return " ".join([*words, f"scale per {self.b_rows}"])

    @property
    def cluster(self) -> int:
        return self.cluster_m * self.cluster_n

    @property
    def warpgroups(self) -> int:
        return 1 if self.rows == 64 else 2

    @property
    def waves(self) -> int:
        return self.rows // (64 * self.warpgroups)

    @property
    def splits_k(self) -> bool:
        return self.variant == "dense" and self.waves == 1


def tiles() -> tuple[Tile, ...]:
    text = (CSRC / "sm90" / "fp8_gemm_tiles.h").read_text()
    rows = [line[5:-1].split(", ") for line in text.splitlines() if line.startswith("TILE(")]
    return tuple(Tile(r[0], *map(int, r[1:6]), r[6] == "true", int(r[7])) for r in rows)


TILES = tiles()


class Scales(ctypes.Structure):
    """sm90::Scales."""

    _fields_ = [("data", ctypes.c_void_p),
                *((name, ctypes.c_int64)
                  for name in ("group_stride", "row_stride", "block_stride"))]  # fmt: skip

    @classmethod
    def of(cls, scale: Tensor) -> Scales:
        return cls(
            scale.data_ptr(), *(scale.stride() if scale.dim() == 3 else (0, *scale.stride()))
        )


class GemmArguments(ctypes.Structure):
    """sm90::GemmArguments."""

    _fields_ = [
        ("a_scale", Scales), ("b_scale", Scales), ("c", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("c_row_stride", ctypes.c_int64), ("group_bounds", ctypes.c_void_p),
        ("group_index", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "groups", "scale_blocks",
                                            "num_splits", "blocks_per_split", "group_m", "c_type",
                                            "out_type")),
        ("rows_aligned", ctypes.c_bool), ("store_by_tma", ctypes.c_bool),
        ("c_pairs", ctypes.c_bool),
    ]  # fmt: skip


@contextlib.contextmanager
def planted(bug: str, kernel: str, changed: dict[str, str] | None = None) -> Iterator[ctypes.CDLL]:
    """A library with emulator/kernels/`kernel`.cpp alone, compiled with a planted bug.

    `bug` is the name of a hook in csrc/sm90, `changed` replaces sources. At the end the library's
    stacks are freed, so a test may load one library per bug.
    """
    kept = f"emulator/kernels/{kernel}.cpp"
    used = {path: text for path, text in sources().items()
            if path in (kept, "emulator/kernels/harness.h")
            or not path.startswith("emulator/kernels/")}  # fmt: skip
    library = build(used | (changed or {}), f"-DPLANT_{bug}")
    yield library
    library.emulate_free_stacks()


class Allocation(ctypes.Structure):
    """emulator::Allocation."""

    _fields_ = [("tensor", ctypes.c_char_p), ("begin", ctypes.c_void_p),
                ("bytes", ctypes.c_int64), ("writable", ctypes.c_bool)]  # fmt: skip


def pieces(x: Tensor) -> list[tuple[int, int]]:
    """The memory of the elements of `x`, without the gaps between them: (address, bytes)."""
    length, starts, size = 1, [0], x.element_size()
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1 and stride > length:
            starts = [start + i * stride for start in starts for i in range(n)]
        elif n > 1 and stride > 0:
            length += (n - 1) * stride
    return [(x.data_ptr() + start * size, length * size) for start in starts if x.numel()]


@contextlib.contextmanager
def only(
    library: ctypes.CDLL, read: dict[str, Tensor | None], write: dict[str, Tensor]
) -> Iterator[None]:
    """Inside the context kernels may access only these tensors."""
    allowed = [Allocation(name.encode(), begin, count, tensors is write)
               for tensors in (write, read) for name, x in tensors.items() if x is not None
               for begin, count in pieces(x)]  # fmt: skip
    failed = library.emulate_memory((Allocation * len(allowed))(*allowed), len(allowed))
    assert not failed, f"tensors overlap: {sorted([*read, *write])}"
    try:
        yield
    finally:
        library.emulate_any_memory()


class EmulatorFailure(AssertionError):
    """An error that the emulator found in a kernel."""


class RunOptions(ctypes.Structure):
    """RunOptions of csrc/emulator/kernels/harness.h."""

    _fields_ = [("seed", ctypes.c_uint64), ("order", ctypes.c_int),
                ("message", ctypes.c_char_p), ("message_bytes", ctypes.c_int)]  # fmt: skip


def call(library, name: str, *args, read=(), write=(), seed=0, order="random") -> None:
    """Runs a kernel that may access the tensors in `read` and `write` only."""
    allowed = [{f"{kind}[{i}]": x for i, x in enumerate(tensors)}
             for kind, tensors in (("read", read), ("write", write))]  # fmt: skip
    message = ctypes.create_string_buffer(4096)
    buffer = ctypes.cast(message, ctypes.c_char_p)
    options = RunOptions(seed, ORDERS[order], buffer, len(message))
    args = [pointer(x) if isinstance(x, torch.Tensor) else x for x in args]
    with only(library, *allowed):
        failed = getattr(library, name)(*args, options)
    if failed:
        raise EmulatorFailure(message.value.decode())


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@dataclass
class Run:
    """How the emulator runs a GEMM kernel."""

    tile: Tile = TILES[0]
    seed: int = 0
    order: str = "random"
    blocks: int = 4
    by_tma: bool | None = None
    splits: int = 1  # number of splits of K
    out: Tensor | None = None


def gemm_of(library: ctypes.CDLL) -> Callable[..., Tensor]:
    """The FP8 GEMMs of `library`: `gemm(a, a_scale, b, b_scale, ..., tile=TILES[0])`.

    The fifth argument depends on the tile's variant: None, group_index, masked_m or group_offsets.
    """

    def gemm(a, a_scale, b, b_scale, sizes=None, out_dtype=torch.bfloat16, c=None, **how) -> Tensor:
        run = Run(**how)
        variant, G = run.tile.variant, b.shape[0] if b.dim() == 3 else 1
        (M, K), N = a.shape[-2:], b.shape[-2]
        if variant == "k_grouped":
            G, out_dtype = len(sizes) - 1, torch.float32
        shape = (G, M, N) if variant in ("masked", "k_grouped") else (M, N)
        out = torch.full(shape, torch.nan, dtype=out_dtype) if run.out is None else run.out
        aligned = N * out.element_size() % 16 == 0
        blocks = -(-K // 128)
        p = GemmArguments(
            Scales.of(a_scale), Scales.of(b_scale), 0 if c is None else c.data_ptr(),
            out.data_ptr(), 0 if c is None else c.stride(-2),
            0 if sizes is None else sizes.data_ptr(), 0 if sizes is None else sizes.data_ptr(),
            M, N, K, G, a_scale.shape[-1], run.splits, -(-blocks // run.splits), 8,
            0 if c is None else TYPES[c.dtype], TYPES[out_dtype], aligned,
            aligned if run.by_tma is None else run.by_tma,
            N % 2 == 0 and (c is None or c.stride(-2) % 2 == 0),
        )  # fmt: skip
        read = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "sizes": sizes, "c": c}
        message = ctypes.create_string_buffer(4096)
        matrices = []
        for x in (a, b):
            rows = x.flatten(0, -2)
            address = ctypes.c_void_p(rows.data_ptr())
            matrices += [address, ctypes.c_int64(len(rows)), ctypes.c_int64(rows.stride(0))]
        with only(library, read, {"out": out}):
            failed = library.emulate_fp8_gemm(
                *matrices, ctypes.byref(p), TILES.index(run.tile), run.blocks,
                ctypes.c_uint64(run.seed), ORDERS[run.order], message, len(message),
            )  # fmt: skip
        if failed:
            raise EmulatorFailure(message.value.decode())
        return out

    return gemm


@pytest.fixture(scope="session", autouse=True)
def needs_a_compiler() -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler")


@pytest.fixture(scope="session")
def emulated() -> Callable[..., Tensor]:
    """The FP8 GEMMs of csrc/sm90, run in the emulator."""
    return gemm_of(build(sources()))


class MlaArguments(ctypes.Structure):
    """deepkern::MlaArguments of csrc/sm90/launch.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "cache", "table", "cache_seqlens",
                                               "attn_sink", "out", "lse", "max_logits",
                                               "partial_out", "partial_lse")),
        *((name, ctypes.c_int64) for name in (
            "q_row_stride", "table_row_stride", "table_query_stride", "page_stride",
            "token_stride")),
        *((name, ctypes.c_float) for name in ("softmax_scale_log2", "max_logits_scale")),
        *((name, ctypes.c_int) for name in ("batch", "Sq", "H", "queries", "max_tokens",
                                            "num_pages", "page_size", "row_tiles", "num_splits",
                                            "min_split_log2", "max_splits")),
        *((name, ctypes.c_bool) for name in ("causal", "sparse", "by_tma", "fp8")),
        ("tma_page_rows", ctypes.c_int64),
        ("page_reciprocal", ctypes.c_uint32), ("page_shift", ctypes.c_int),
    ]  # fmt: skip


def mla_of(library: ctypes.CDLL) -> Callable[..., tuple[Tensor, Tensor]]:
    """The mla_decode of `library`: the op's arguments, then how to run it.

    `by_tma=False` gathers all pages. By default the launcher decides. `blocks`: number of SMs.
    """

    def mla(q, cache, table, lengths, scale, causal=True, v_head_dim=512, *,
            seed=0, order="random", by_tma=True, blocks=3) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert v_head_dim == 512 and q.dtype == torch.bfloat16
        assert cache.dtype in (torch.bfloat16, torch.uint8)
        (B, Sq, H, _), (pages, page) = q.shape, cache.shape[:2]
        q = q.contiguous()
        out = torch.full((B, Sq, H, 512), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((B, H, Sq), torch.nan)
        p = MlaArguments(
            **addresses(q=q, cache=cache, table=table, cache_seqlens=lengths, out=out,
                        lse=lse),
            q_row_stride=576, table_row_stride=table.stride(0), page_stride=cache.stride(0),
            token_stride=cache.stride(1), softmax_scale_log2=scale * LOG2_E, batch=B, Sq=Sq, H=H,
            queries=1, max_tokens=table.shape[1] * page, num_pages=pages, page_size=page,
            causal=causal, fp8=cache.dtype == torch.uint8,
        )  # fmt: skip
        read = {"q": q, "cache": cache, "table": table, "lengths": lengths}
        run_mla(library, p, read, {"out": out, "lse": lse}, by_tma, blocks, seed, order)
        return out, lse

    return mla


LOG2_E = 1.4426950408889634


def addresses(**tensors: Tensor | None) -> dict[str, int]:
    return {name: 0 if x is None else x.data_ptr() for name, x in tensors.items()}


def run_mla(library, p: MlaArguments, read, write, by_tma, blocks, seed, order) -> None:
    """Runs a kernel of latent attention, after the launcher's choice of splits."""
    library.emulate_cut_mla(ctypes.byref(p))
    p.by_tma &= by_tma
    rows = p.Sq * p.H
    partial_out = torch.full((p.batch, p.num_splits, rows, 512), torch.nan)
    partial_lse = torch.full((p.batch, p.num_splits, rows), torch.nan)
    p.partial_out, p.partial_lse = partial_out.data_ptr(), partial_lse.data_ptr()
    write = {**write, "partial_out": partial_out, "partial_lse": partial_lse}
    message = ctypes.create_string_buffer(4096)
    with only(library, read, write):
        failed = library.emulate_mla_decode(
            ctypes.byref(p), blocks, ctypes.c_uint64(seed), ORDERS[order], message, len(message)
        )
    if failed:
        raise EmulatorFailure(message.value.decode())


def sparse_of(library: ctypes.CDLL) -> Callable[..., tuple[Tensor, ...]]:
    """mla_sparse_decode and mla_sparse_prefill of `library`: q [B, Sq, H, 576], a cache
    [pages, page, 1, _] and indices [B, Sq, topk]; returns out, lse and, if `largest`, max_logits.
    """

    def sparse(q, cache, indices, scale, topk_length=None, attn_sink=None, v_head_dim=512, *,
               largest=False, seed=0, order="random", blocks=3) -> tuple[Tensor, ...]:  # fmt: skip
        assert v_head_dim == 512 and q.dtype == torch.bfloat16
        assert cache.dtype in (torch.bfloat16, torch.uint8)
        (B, Sq, H, _), (pages, page) = q.shape, cache.shape[:2]
        q = q.contiguous()
        out = torch.full((B, Sq, H, 512), torch.nan, dtype=torch.bfloat16)
        write = {"out": out, "lse": torch.full((B, H, Sq), torch.nan)}
        if largest:
            write["max_logits"] = torch.full((B, H, Sq), torch.nan)
        p = MlaArguments(
            **addresses(q=q, cache=cache, table=indices, cache_seqlens=topk_length,
                        attn_sink=attn_sink, **write),
            q_row_stride=576, table_row_stride=indices.stride(0),
            table_query_stride=indices.stride(1), page_stride=cache.stride(0),
            token_stride=cache.stride(1), softmax_scale_log2=scale * LOG2_E, batch=B * Sq, Sq=1,
            H=H, queries=Sq, max_tokens=indices.shape[2], num_pages=pages, page_size=page,
            sparse=True, fp8=cache.dtype == torch.uint8,
        )  # fmt: skip
        read = {"q": q, "cache": cache, "indices": indices, "topk_length": topk_length,
                "attn_sink": attn_sink}  # fmt: skip
        run_mla(library, p, read, write, False, blocks, seed, order)
        return tuple(write.values())

    return sparse


@pytest.fixture(scope="session")
def emulated_mla() -> Callable[..., tuple[Tensor, Tensor]]:
    """mla_decode of csrc/sm90, run in the emulator."""
    return mla_of(build(sources()))


@pytest.fixture(scope="session")
def emulated_sparse() -> Callable[..., tuple[Tensor, ...]]:
    """Sparse attention of csrc/sm90, run in the emulator."""
    return sparse_of(build(sources()))


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    """The kernels of csrc/emulator/kernels."""
    return build(sources())
