"""Copies of a call's arguments in other memory, so that their bytes do not come from a cache."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from deepkern.testing.costs import tensor_bytes

from . import checks

MOST_BYTES = 512 << 20  # of all copies
MOST_COPIES = {"cpu": 32, "cuda": 4}  # on a GPU the L2 cache is overwritten as well
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN_CACHE = 64 << 20  # bytes; larger than most


def variants(args: tuple, device: torch.device) -> list[tuple]:
    """`args`, and copies of them until all together are larger than the last-level cache."""
    each = max(tensor_bytes(args), 1)
    wanted = 1 + math.ceil(last_level_cache(device) / each)
    count = max(1, min(wanted, MOST_COPIES[device.type], MOST_BYTES // each))
    return [args, *(copied(args) for _ in range(count - 1))]


def copied(args: tuple) -> tuple:
    return tuple(checks.copy(x) if isinstance(x, Tensor) else x for x in args)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the GPU's L2 cache or of this CPU's largest one."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [parse(file.read_text()) for file in CACHES.glob("index*/size")]
    return max(sizes, default=UNKNOWN_CACHE)


def parse(text: str) -> int:
    """Bytes of such a text as '32768K'."""
    text = text.strip()
    unit = {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    return int(text.rstrip("KMG")) << unit
