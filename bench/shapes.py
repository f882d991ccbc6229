"""Named sets of sizes of ops: `default`, `small`, `deepseek-v3`, `deepgemm` and `flashmla`.

A size is keyword arguments for an op's `inputs` (deepkern.testing.ops). `of` also takes an explicit
one such as "M=64,N=7168,K=2048". Sizes that do not fit in memory, or would take too long, are left
out with a reason: `excess`, before anything is allocated, and `too_long`.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepkern.testing import gemms
from deepkern.testing.caches import FP8
from deepkern.testing.ops import Sizes, facts
from deepkern.testing.routing import V3 as ROUTING
from deepkern.testing.routing import V3_LAYER

NAMES = ("default", "small", "deepseek-v3", "deepgemm", "flashmla")
GIVEN = "given"  # the name of a set with explicit sizes
ROWS = (1, 16, 64, 128, 4096)  # tokens of a call
LAYERS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
TEMPORARIES = 4  # bytes of a call's inputs and temporaries over those of its largest tensor


class NoShapes(LookupError):
    """A set has no size for an op."""


def of(op: str, shapes: str, device: torch.device) -> tuple[str, list[dict]]:
    """(the set's name or "given", sizes) of `op`.

    Raises NoShapes if the set has none for this op, ValueError for other text.
    """
    if "=" in shapes:
        return GIVEN, [parse_size(op, words(shapes))]
    if shapes not in NAMES:
        raise ValueError(f"no shapes {shapes!r}; there are {', '.join(NAMES)}, or M=64,N=128,K=256")
    if shapes in ("default", "small"):
        return shapes, own(facts(op).SIZES, shapes, device)
    found = SETS[shapes].get(op, [])
    if not found:
        raise NoShapes(f"{op} has no shapes {shapes!r}")
    return shapes, found


def words(text: str) -> list[str]:
    """["M=64", "lengths=8192,4096"] of "M=64,lengths=8192,4096"."""
    return [word for word in re.split(r"[,\s]+(?=[A-Za-z_]\w*=)", text.strip()) if word]


def parse_size(op: str, words: list[str]) -> dict:
    """Keyword arguments of the op's `inputs` from words such as M=64, H=16, lengths=8192,4096."""
    size: dict = {}
    parameters = inspect.signature(facts(op).inputs).parameters
    names = [name for name, p in parameters.items() if p.kind != p.VAR_KEYWORD][1:]
    for word in words:
        name, found, text = word.partition("=")
        if not found or (name not in names and len(names) == len(parameters) - 1):
            raise ValueError(f"{word!r}: expected NAME=VALUE with a NAME of {', '.join(names)}")
        value = _value(text)
        if isinstance(value, int) and not isinstance(value, bool) and value < 0:
            raise ValueError(f"{word!r}: expected a size of at least 0")
        wants_tuple = name in names and "tuple" in str(parameters[name].annotation)
        size[name] = (value,) if wants_tuple and not isinstance(value, tuple) else value
    missing = [name for name in names if parameters[name].default is inspect.Parameter.empty
               and parameters[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
               and name not in size]  # fmt: skip
    if missing:
        raise ValueError(f"{op} needs {', '.join(f'{name}=' for name in missing)} as well")
    return size


def _value(text: str):
    if text in ("True", "False"):
        return text == "True"
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    if isinstance(getattr(torch, text, None), torch.dtype):
        return getattr(torch, text)
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise ValueError(f"expected a number, a dtype or True or False, got {text!r}") from None


def own(sizes: Sizes, name: str, device: torch.device) -> list[dict]:
    """The sizes in the op's facts: those to time, or the small ones that are not empty."""
    if name == "default":
        return sizes.gpu if device.type == "cuda" else sizes.cpu
    return [size for size in sizes.small if not is_empty(size)]


def is_empty(size: dict) -> bool:
    """Whether a dimension or all sequences of a size are 0."""
    optional = ("D", "lead", "skipped", "none", "unused", "width")
    return any(
        value in (0, ()) or (isinstance(value, tuple) and not any(value))
        for name, value in size.items()
        if name not in optional and not isinstance(value, (bool, float))
    )


def experts(*pairs: tuple[int, int]) -> list[dict]:
    return gemms.v3_expert_sizes(pairs)


def contiguous(sizes: list[dict]) -> list[dict]:
    """M-grouped products without padding: M counts the rows of all groups."""
    return [{**size, "M": size["G"] * size["M"], "skipped": 0} for size in sizes]


def masked(sizes: list[dict], max_m: int = 4096) -> list[dict]:
    return [{**size, "M": max_m, "expected_m": size["M"]} for size in sizes]


def layers(rows: tuple[int, ...]) -> list[dict]:
    return [{"M": M, "N": N, "K": K} for (N, K), M in itertools.product(LAYERS, rows)]


def tokens(**size) -> list[dict]:
    return [{"T": T, **size} for T in ROWS]


def rows(**size) -> list[dict]:
    return [{"M": M, **size} for M in ROWS]


# A decode step has 1 query per sequence; 16 and 128 heads are those of 8 GPUs and of one.
DECODE = [
    {"lengths": (4096,), "batch": B, "H": H, **cache}
    for H, B, cache in itertools.product((16, 128), (1, 16, 64, 128), ({}, FP8))
]
SPARSE = {"topk": 2048, "tokens": 32768}
V3 = {
    "fp8_gemm_nt": layers(ROWS),
    "gemm_nt": [{"M": M, "N": N, "K": 7168} for N in (2112, 256, 129280) for M in ROWS[:4]],
    "m_grouped_fp8_gemm_nt_contiguous": contiguous(experts((8, 16), (8, 4096), (32, 1024))),
    "m_grouped_gemm_nt_contiguous": contiguous(experts((8, 16), (8, 1024))),
    "m_grouped_fp8_gemm_nt_masked": masked(experts((8, 16), (32, 64)), 128),
    "k_grouped_fp8_gemm_nt": [
        {"M": M, "N": N, "K": 8 * 4096, "G": 8} for M, N in ((4096, 7168), (7168, 2048))
    ],
    "cast_per_token": [size for K in (7168, 1536, 512, 16384, 2048) for size in rows(K=K)],
    "cast_per_block": [{"N": N, "K": K} for N, K in LAYERS],
    "cast_per_channel": [{"M": 4096, "K": K, "transpose": True} for K in (7168, 2048)],
    "cast_back": [{"N": N, "K": K, "block": (128, 128)} for N, K in LAYERS],
    "rmsnorm_cast": [*rows(K=7168, residual=True), *rows(K=1536), *rows(K=512)],
    "swiglu": [*rows(I=2048), *rows(I=18432)],
    "swiglu_cast": [*rows(I=2048), *rows(I=18432), *rows(I=2048, weighted=True)],
    "swiglu_cast_backward": rows(I=2048, fp8=True, weighted=True),
    "mla_decode": DECODE,
    "mla_cache_append": [*tokens(), *tokens(**FP8)],
    "mla_cache_gather": [{"lengths": (4096,) * B, **cache} for B in (1, 16) for cache in ({}, FP8)],
    "mla_prefill": [{"lengths": (S,), "H": 128} for S in (512, 2048, 4096)],
    "mla_prefill_backward": [{"lengths": (S,), "H": 128} for S in (512, 2048, 4096)],
    "mla_sparse_decode": [{"B": B, "H": 128, **SPARSE, **FP8} for B in ROWS[:4]],
    "mla_sparse_prefill": [{"S": S, "Skv": 32768, "H": 128, "topk": 2048} for S in (128, 4096)],
    "mla_sparse_prefill_backward": [{"S": 128, "Skv": 32768, "H": 128, "topk": 2048}],
    "merge_states": [{"lead": (B,), "S": 1, "H": 128, "D": 512, "empty": False} for B in ROWS[:4]],
    "merge_states_backward": [
        {"lead": (B,), "S": 1, "H": 128, "D": 512, "empty": False} for B in ROWS[:4]
    ],
    "mqa_logits": [{"S": S, "Skv": 32768} for S in (64, 4096)],
    "paged_mqa_logits": [{"lengths": (32768,) * B} for B in (1, 16, 64, 128)],
    "topk_indices": [{"S": S, "N": 32768, "k": 2048} for S in ROWS],
    "hadamard_transform": [{"M": 64 * M, "N": 128} for M in ROWS],
    "hadamard_cast": [{"M": 64 * M, "N": 128} for M in ROWS],
    "indexer_cache_append": tokens(),
    "route_topk": tokens(E=256, **ROUTING),
    "route_topk_backward": tokens(E=256, scale=2.5),
    "expert_load": tokens(E=256, topk=8),
    "expert_dispatch": tokens(E=256, topk=8, K=7168, none=0.0, cast="fp32"),
    "expert_dispatch_backward": tokens(topk=8, K=7168, none=0.0),
    "expert_combine": tokens(topk=8, K=7168, none=0.0),
    "expert_combine_backward": tokens(topk=8, K=7168, none=0.0),
    "moe_forward": tokens(**V3_LAYER),
    "moe_forward_backward": [{"T": 4096, **V3_LAYER, "E": 32}],
    "sequence_balance_loss": [{"B": 1, "S": 4096, "E": 256, "topk": 8}],
    "sequence_balance_loss_backward": [{"B": 1, "S": 4096, "E": 256, "topk": 8}],
    "update_expert_bias": [{"E": 256}],
}
# tests/generators.py of DeepGEMM; its masked products have room for 4096 rows in each group.
DEEPGEMM = {
    "fp8_gemm_nt": layers((128, 4096)),
    "gemm_nt": layers((128, 4096)),
    "m_grouped_fp8_gemm_nt_contiguous": contiguous(experts((4, 8192), (8, 4096))),
    "m_grouped_gemm_nt_contiguous": contiguous(experts((4, 8192), (8, 4096))),
    "m_grouped_fp8_gemm_nt_masked": masked(experts((1, 1024), (2, 512), (4, 256))),
    "k_grouped_fp8_gemm_nt": [
        {"M": M, "N": N, "K": G * K, "G": G, "equal": True}
        for M, N in ((4096, 7168), (7168, 2048))
        for G, K in ((4, 8192), (8, 4096))
    ],
    "mqa_logits": [{"S": S, "Skv": Skv} for S in (2048, 4096) for Skv in (4096, 8192)],
    "paged_mqa_logits": [
        {"lengths": (8192,) * 64, "next_n": n, "page": 64} for n in (1, 2)
    ],
}  # fmt: skip
# The README and the tests of FlashMLA.
FLASHMLA = {
    "mla_decode": [
        {"lengths": (S,), "batch": 128, "H": 128, "Sq": Sq}
        for S, Sq in itertools.product((4096, 8192, 16384), (1, 2))
    ],
    "mla_sparse_decode": [
        {"B": B, "Sq": 2, "H": H, **SPARSE, **FP8} for B in (2, 64, 128) for H in (64, 128)
    ],
    "mla_sparse_prefill": [
        {"S": 4096, "Skv": Skv, "H": 128, "topk": 2048} for Skv in (8192, 32768, 65536, 131072)
    ],
    "mla_prefill": [
        {"lengths": (S,), "H": 128, "causal": causal}
        for S, causal in itertools.product((8192, 16384), (True, False))
    ],
    "mla_prefill_backward": [{"lengths": (S,), "H": 128} for S in (4096, 8192)],
}  # fmt: skip
SETS: dict[str, dict[str, list[dict]]] = {
    "deepseek-v3": V3, "deepgemm": DEEPGEMM, "flashmla": FLASHMLA,
}  # fmt: skip


class TooLarge(Exception):
    """A tensor that does not fit; the message says how large it is."""


class MemoryLimit(TorchDispatchMode):
    """Raises TooLarge in place of creating a tensor that, with its like, exceeds free memory.

    Only tensors created from a shape are checked. Those computed from others are as large, and
    TEMPORARIES leaves room for them.
    """

    def __init__(self, free: Callable[[], int]) -> None:
        super().__init__()
        self.free = free

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shape = next((x for x in args if isinstance(x, (list, tuple))), None)
        if shape is not None and not any(isinstance(x, torch.Tensor) for x in tree_leaves(args)):
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            needed = TEMPORARIES * math.prod(shape) * dtype.itemsize
            if needed > 64 << 20 and needed > (free := self.free()):
                raise TooLarge(f"needs {gib(needed)}, {gib(free)} are free")
        return function(*args, **kwargs)


def gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


def free_memory(device: torch.device) -> int:
    """Free bytes of the GPU or the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not on every system
        return 1 << 62
    return int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) << 10  # type: ignore[index]


def inputs(op: str, size: dict, device: torch.device) -> tuple:
    """Random inputs of one size. Raises TooLarge instead of using up the memory."""
    with MemoryLimit(lambda: free_memory(device)):
        return facts(op).inputs(torch.Generator(device).manual_seed(1), **size)
