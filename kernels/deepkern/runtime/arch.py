"""The supported GPU targets, their numbers, and the target of a launch.

The numbers are the vendor's public ones for the product named. Tile choice and the roofs in bench/
use them; results do not depend on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch


class UnknownGpuError(RuntimeError):
    """A GPU that is not in `ARCHS`."""


@dataclass(frozen=True)
class Arch:
    """One GPU target. Rates are dense TFLOPS, bandwidth in GB/s, memories in bytes."""

    name: str  # "sm_90", "gfx942", ...
    part: str  # the product with the numbers below
    backend: str  # triton's name: "cuda" or "hip"
    target: int | str  # triton's arch: 90 or "gfx942"
    warp_size: int  # threads in a warp or wavefront
    num_sms: int  # SMs or compute units
    smem: int  # shared memory that one block can use
    l2: int
    bandwidth: int
    bf16_tflops: int
    fp8_tflops: int  # 0: no FP8 arithmetic
    fp8_type: str  # the hardware's e4m3 type: "e4m3fn", "e4m3fnuz" or "" (none)
    tma: bool = False
    wgmma: bool = False

    @property
    def native_fp8(self) -> bool:
        """Whether the hardware has e4m3fn, the FP8 type of the checkpoints."""
        return self.fp8_type == "e4m3fn"

    @property
    def native_fp8_cast(self) -> bool:
        """Whether Triton casts float32 to e4m3 with one rounding.

        On sm_89 it goes through a truncated float16, which gets 0.4 % of the codes wrong.
        """
        return self.native_fp8 and self.name != "sm_89"

    @property
    def input_precision(self) -> str:
        """How `tl.dot` multiplies fp32: in full precision as far as the target supports it."""
        return "tf32x3" if self.backend == "cuda" else "ieee"


_KB, _MB = 1 << 10, 1 << 20
ARCHS = {
    a.name: a
    for a in (
        Arch("sm_80", "A100 SXM 80GB", "cuda", 80, 32, 108, 163 * _KB, 40 * _MB, 2039, 312, 0, ""),
        Arch("sm_89", "L40S", "cuda", 89, 32, 142, 99 * _KB, 96 * _MB, 864, 362, 733, "e4m3fn"),
        Arch("sm_90", "H200 SXM", "cuda", 90, 32, 132, 227 * _KB, 50 * _MB, 4800, 989, 1979,
             "e4m3fn", tma=True, wgmma=True),
        Arch("sm_100", "B200", "cuda", 100, 32, 148, 227 * _KB, 126 * _MB, 8000, 2250, 4500,
             "e4m3fn", tma=True),
        Arch("sm_120", "RTX 5090", "cuda", 120, 32, 170, 99 * _KB, 96 * _MB, 1792, 209, 419,
             "e4m3fn", tma=True),
        Arch("gfx942", "MI300X", "hip", "gfx942", 64, 304, 64 * _KB, 4 * _MB, 5300, 1307, 2615,
             "e4m3fnuz"),
        Arch("gfx950", "MI355X", "hip", "gfx950", 64, 256, 160 * _KB, 4 * _MB, 8000, 2500, 5000,
             "e4m3fn"),
    )
}  # fmt: skip

_compiling_for: list[Arch] = []


@contextlib.contextmanager
def compile_for(target: Arch) -> Iterator[None]:
    """Launches inside the block are for `target`, on any device (for static inspection)."""
    _compiling_for.append(target)
    try:
        yield
    finally:
        _compiling_for.pop()


def compiling_for() -> Arch | None:
    """The target set by `compile_for`, if any."""
    return _compiling_for[-1] if _compiling_for else None


def of(device: torch.device) -> Arch:
    """The target of `device`; of CPU tensors that which DEEPKERN_COMPILED names, else sm_90."""
    if _compiling_for:
        return _compiling_for[-1]
    if device.type == "cuda":
        return _of_gpu(device.index or 0)
    return ARCHS.get(os.environ.get("DEEPKERN_COMPILED", ""), ARCHS["sm_90"])


@functools.cache
def _of_gpu(index: int) -> Arch:
    if torch.version.hip:
        name = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    else:
        major, minor = torch.cuda.get_device_capability(index)
        # sm_86 and sm_87 run sm_80's kernels, sm_103 sm_100's, sm_121 sm_120's.
        name = {(8, 6): "sm_80", (8, 7): "sm_80", (10, 3): "sm_100", (12, 1): "sm_120"}.get(
            (major, minor), f"sm_{major}{minor}"
        )
        if (major, minor) == (8, 6):  # A10, RTX 30: instructions of an A100, less shared memory
            return dataclasses.replace(ARCHS["sm_80"], part="A10", smem=99 * _KB)
    if name not in ARCHS:
        raise UnknownGpuError(f"unsupported GPU {name}; supported: {', '.join(ARCHS)}")
    return ARCHS[name]


def unknown_gpu_reason(device: torch.device) -> str | None:
    """Why `device` is not a supported target, or None if it is."""
    try:
        of(device)
    except UnknownGpuError as error:
        return str(error)
    return None
