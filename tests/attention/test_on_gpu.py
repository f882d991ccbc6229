"""Every attention op gives the same bits when repeated, in CUDA graphs, and in other batches.

On a GPU the sizes are those of V3. On a CPU the same code runs at small sizes, and a call that must
not read a value back to the host replaces the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import deepkern
from deepkern.testing import compare, ops

FP8 = {"cache_dtype": torch.uint8}
SMALL = {"R": 64, "D": 16}  # latent widths for the interpreter
HEADS = {"H": 2, "Dqk": 48, "Dv": 32}
OPTIONS = {"lengths": True, "sink": True}


def random_lengths(max_lengths: Tensor, generator: Generator) -> Tensor:
    """int32 lengths up to the given ones; a fifth of them is 0."""
    fraction = torch.rand(max_lengths.shape, generator=generator, device=max_lengths.device)
    lengths = ((fraction * 1.25 - 0.25) * (max_lengths + 1)).int()
    return lengths.clamp(min=0).minimum(max_lengths)


def random_boundaries(B: int, rows: int, generator: Generator) -> Tensor:
    """int32 [B + 1]: B sequences within the rows, some of them empty."""
    bounds = torch.randint(0, rows + 1, (B + 1,), generator=generator, device=generator.device)
    bounds[1] = bounds[0]
    return bounds.sort().values.int()


def decode(generator, length, B, **size) -> tuple:
    q, cache, table, seqlens, *rest = ops.inputs(
        "mla_decode", generator, (length,), batch=B, **size
    )
    return q, cache, table, random_lengths(seqlens, generator), *rest


def gather(generator, length, B, **size) -> tuple:
    cache, table, offsets, total, *rest = ops.inputs(
        "mla_cache_gather", generator, (length,) * B, **size
    )
    return cache, table, random_boundaries(B, total, generator), total, *rest


def prefill(generator, B, T, Tk, **size) -> tuple:
    q, k, v, _, _, *rest = ops.inputs("mla_prefill", generator, (T,), (Tk,), **size)
    return q, k, v, random_boundaries(B, T, generator), random_boundaries(B, Tk, generator), *rest


def prefill_backward(generator, **size) -> tuple:
    q, k, v, *rest = args = prefill(generator, **size)
    out, lse = deepkern.mla_prefill(*args)
    grad_out = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    grad_lse = torch.randn(lse.shape, generator=generator, device=lse.device)
    return grad_out, q, k, v, out, lse, *rest, grad_lse


def paged_logits(generator, length, B, **size) -> tuple:
    q, cache, weights, seqlens, *rest = ops.inputs(
        "paged_mqa_logits", generator, (length,) * B, **size
    )
    return q, cache, weights, random_lengths(seqlens, generator), *rest


@dataclass(frozen=True)
class Case:
    """An op and sizes. Each `draw` makes arguments of the same shapes with other values."""

    op: str
    large: dict = field(default_factory=dict)  # for a GPU
    small: dict = field(default_factory=dict)  # for the interpreter
    # Arguments and outputs whose first dimension is independent queries or sequences.
    rows: tuple[int, ...] = ()
    results: tuple[int, ...] = (0,)
    maker: Callable | None = None

    def draw(self, size: str, generator: Generator) -> tuple:
        make = self.maker or ops.facts(self.op).inputs
        return deepkern.OPS[self.op].positional(make(generator, **getattr(self, size)))


DECODE = {"rows": (0, 2, 3), "results": (0, 1), "maker": decode}
SPARSE = {"rows": (0, 2, 4), "results": (0, 1)}
PREFILL = {"B": 5, "T": 3000, "Tk": 4000}
SMALL_PREFILL = {"B": 3, "T": 40, "Tk": 50, **HEADS}
MERGED = {"lead": (7,), "S": 40, "H": 128, "D": 512}
SMALL_MERGED = {"lead": (3,), "S": 2, "H": 3, "D": 20}
V32 = {"topk": 2048, "tokens": 30000, **OPTIONS}
CASES = {
    "decode 16": Case("mla_decode", {"length": 9000, "B": 5, "Sq": 2},
                      {"length": 600, "B": 2, "H": 2, **SMALL}, **DECODE),
    "decode 32": Case("mla_decode", {"length": 9000, "B": 5, "H": 32}, **DECODE),
    "decode 128": Case("mla_decode", {"length": 9000, "B": 5, "H": 128}, **DECODE),
    "decode fp8": Case("mla_decode", {"length": 9000, "B": 5, **FP8},
                       {"length": 40, "B": 2, "H": 2, "page": 16, **SMALL, **FP8}, **DECODE),
    "append": Case("mla_cache_append", {"T": 4096}, {"T": 9}, rows=(0, 1, 3, 5)),
    "append fp8": Case("mla_cache_append", {"T": 4096, **FP8}, {"T": 9, **FP8}, rows=(0, 1, 3, 5)),
    "gather": Case("mla_cache_gather", {"length": 3000, "B": 5, **FP8},
                   {"length": 20, "B": 3, "page": 4, **SMALL}, maker=gather),
    "prefill": Case("mla_prefill", {"H": 16, **PREFILL}, SMALL_PREFILL, maker=prefill),
    "prefill all": Case("mla_prefill", {"H": 16, "Hk": 2, "causal": False, **PREFILL},
                        {"Hk": 1, "causal": False, **SMALL_PREFILL}, maker=prefill),
    "prefill back": Case("mla_prefill_backward", {"H": 16, **PREFILL}, SMALL_PREFILL,
                         maker=prefill_backward),
    "prefill back all": Case("mla_prefill_backward",
                             {"H": 16, "Hk": 2, "causal": False, **PREFILL},
                             {"Hk": 1, "causal": False, **SMALL_PREFILL}, maker=prefill_backward),
    "sparse decode": Case("mla_sparse_decode", {"B": 9, "Sq": 2, "H": 128, **V32},
                          {"H": 3, "topk": 40, **SMALL, **OPTIONS}, **SPARSE),
    "sparse decode fp8": Case("mla_sparse_decode", {"B": 9, "H": 16, **V32, **FP8},
                              {"H": 3, "topk": 270, **SMALL, **OPTIONS, **FP8}, **SPARSE),
    "sparse prefill": Case("mla_sparse_prefill",
                           {"S": 300, "Skv": 9000, "H": 128, "topk": 2048, **OPTIONS},
                           {"H": 3, **SMALL, **OPTIONS}, rows=(0, 2, 6), results=(0, 1, 2)),
    "sparse back": Case("mla_sparse_prefill_backward",
                        {"S": 40, "Skv": 4000, "H": 128, "topk": 2048, "grad_lse": True, **OPTIONS},
                        {"H": 3, "grad_lse": True, **SMALL, **OPTIONS}, rows=(0, 1, 2, 4, 5, 6, 9)),
    "logits": Case("mqa_logits", {"S": 2000, "Skv": 9000, "causal": False},
                   {"S": 6, "Skv": 70, "H": 3, "D": 32, "causal": False}, rows=(0, 3, 4, 5)),
    "paged logits": Case("paged_mqa_logits", {"length": 9000, "B": 9, "next_n": 2},
                         {"length": 50, "B": 2, "next_n": 2, "H": 3, "D": 32, "page": 16},
                         rows=(0, 2, 3, 4), maker=paged_logits),
    "topk": Case("topk_indices", {"S": 64, "N": 70000, "k": 2048, "ragged": True},
                 {"S": 3, "N": 50, "k": 8, "ragged": True}, rows=(0, 2)),
    "indexer append": Case("indexer_cache_append", {"T": 4096}, {"T": 9}, rows=(0, 2)),
    "merge": Case("merge_states", MERGED, SMALL_MERGED, rows=(0, 1, 2, 3), results=(0, 1)),
    "merge back": Case("merge_states_backward", MERGED, SMALL_MERGED,
                       rows=(0, 1, 2, 3, 4, 5), results=(0, 1, 2, 3)),
    "hadamard": Case("hadamard_transform", {"M": 9000, "N": 128}, {"M": 40, "N": 128}, rows=(0,)),
    "hadamard long": Case("hadamard_transform", {"M": 99, "N": 32768}, rows=(0,)),
    "hadamard cast": Case("hadamard_cast", {"M": 9000, "N": 128}, {"M": 40, "N": 128}, rows=(0,),
                          results=(0, 1)),
}  # fmt: skip
SIZED = [
    pytest.param(name, size, marks=[pytest.mark.gpu] if size == "large" else [])
    for size in ("small", "large")
    for name, case in CASES.items()
    if getattr(case, size)
]
every_case = pytest.mark.parametrize(("name", "size"), SIZED)


def call(op: str, args: tuple) -> tuple:
    """The outputs, or `args` for an op that writes to them. Without dispatch, so modes apply."""
    got = deepkern.OPS[op].run(*args)
    return compare.as_tuple(args if got is None else got)


def copies(args: tuple) -> tuple:
    return tuple(copied(a) if isinstance(a, Tensor) else a for a in args)


def copied(x: Tensor) -> Tensor:
    """A copy with x's strides; `clone` keeps only strides without gaps."""
    memory = x.new_empty(x.untyped_storage().nbytes() // x.element_size())
    memory.copy_(x.as_strided(memory.shape, (1,), 0))
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def assert_same(got: tuple, want: tuple, name: str) -> None:
    for g, w in zip(got, want, strict=True):
        if isinstance(w, Tensor):
            compare.assert_bitwise(g, w, name)


HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "tolist")


class NoHostReads(TorchDispatchMode):
    """Fails if the host reads a value, which is impossible in a CUDA graph."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in HOST_READS, func
        return func(*args, **(kwargs or {}))


class NoTensorLists(TorchFunctionMode):
    """The same for `tolist`, which is not dispatched on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func.__name__ not in HOST_READS, func
        return func(*args, **(kwargs or {}))


def captured(op: str, args: tuple) -> tuple[tuple, Callable[[], object]]:
    """The outputs, and a function that recomputes them in place from the current `args`."""
    if args[0].is_cuda:
        call(op, args)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(op, args)
        return got, graph.replay
    got = call(op, args)

    def replay():
        with NoHostReads(), NoTensorLists():
            again = call(op, args)
        for old, new in zip(got, again, strict=True):
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new)

    return got, replay


def test_every_attention_op_has_a_case():
    family = {
        n for n in deepkern.OPS if getattr(deepkern, n).__module__.split(".")[1] == "attention"
    }
    assert family == {case.op for case in CASES.values()}


@every_case
def test_bits_when_repeated(name, size, generator):
    case, times = CASES[name], {"small": 2, "large": 100}[size]
    args = case.draw(size, generator)
    with deepkern.backend("triton"):
        first = call(case.op, copies(args))
        for _ in range(times):
            assert_same(call(case.op, copies(args)), first, name)


@every_case
def test_graph_replay_with_other_values(name, size, generator):
    """A captured graph gives the bits of an eager call for other lengths and values."""
    case = CASES[name]
    args = case.draw(size, generator)
    with deepkern.backend("triton"), torch.no_grad():
        got, replay = captured(case.op, args)
        changed = False
        for _ in range({"small": 1, "large": 4}[size]):
            before = [copied(g) for g in got if isinstance(g, Tensor)]
            for old, new in zip(args, case.draw(size, generator), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)
            want = call(case.op, copies(args))
            replay()
            assert_same(got, want, name)
            after = [g for g in got if isinstance(g, Tensor)]
            changed |= any(
                not torch.equal(compare.bits(a), compare.bits(b))
                for a, b in zip(after, before, strict=True)
            )
        assert changed, "all draws gave the same outputs"


def rows_of_item(x: Tensor | None, i: int, count: int) -> Tensor | None:
    """The rows of item i of `count`, each of which has the same number of rows in x."""
    if x is None:
        return None
    per_item = len(x) // count
    return x[i * per_item : (i + 1) * per_item]


@pytest.mark.parametrize(
    ("name", "size"), [p for p in SIZED if CASES[p.values[0]].rows]
)  # fmt: skip
def test_bits_independent_of_batch(name, size, generator):
    """Compares the bytes written by ops that write a cache, the item's rows of other outputs."""
    case = CASES[name]
    args = case.draw(size, generator)
    count = len(args[case.rows[0]])
    with deepkern.backend("triton"):
        in_batch = call(case.op, copies(args))
        for i in {0, count // 2, count - 1}:
            own = tuple(
                rows_of_item(a, i, count) if j in case.rows else a for j, a in enumerate(args)
            )
            alone = call(case.op, copies(own))
            if getattr(torch.ops.deepkern, case.op).default._schema.is_mutable:
                for before, after, together in zip(own, alone, in_batch, strict=True):
                    if isinstance(after, Tensor) and after.shape == together.shape:
                        written = compare.bits(after) != compare.bits(before)
                        compare.assert_bitwise(together[written], after[written], name)
                continue
            for result in case.results:
                want = rows_of_item(in_batch[result], i, count)
                compare.assert_bitwise(want, alone[result], name)


@pytest.mark.parametrize(
    ("name", "size"), [p for p in SIZED if CASES[p.values[0]].op.startswith("mla_prefill")]
)
def test_sequence_bits_independent_of_batch(name, size, generator):
    """For ragged ops, which have no dimension of sequences."""
    case = CASES[name]
    args = case.draw(size, generator)
    backward = case.op.endswith("_backward")
    named = dict(zip(deepkern.OPS[case.op].names, args, strict=True))
    cu_q, cu_k = named["cu_seqlens_q"].tolist(), named["cu_seqlens_k"].tolist()
    with deepkern.backend("triton"):
        in_batch = call(case.op, args)
        for b in range(len(cu_q) - 1):
            rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            own = dict(named)
            by_head = (slice(None), rows)  # of [H, T]
            for argument, part in (("q", rows), ("k", keys), ("v", keys), ("out", rows),
                                   ("grad_out", rows), ("lse", by_head),
                                   ("grad_lse", by_head)):  # fmt: skip
                if argument in own:
                    own[argument] = own[argument][part]
            for argument, part in (("cu_seqlens_q", rows), ("cu_seqlens_k", keys)):
                bounds = [0, part.stop - part.start]
                own[argument] = torch.tensor(bounds, dtype=torch.int32, device=args[0].device)
            alone = call(case.op, tuple(own.values()))
            parts = (rows, keys, keys) if backward else (rows, by_head)
            for result, part, own_result in zip(in_batch, parts, alone, strict=True):
                compare.assert_bitwise(result[part], own_result, name)
