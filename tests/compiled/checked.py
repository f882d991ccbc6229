"""Small PTX kernels that pass every check of the machine, and edits that break one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch

import deepkern
from deepkern.runtime.ptx_library import PtxModule, encode_tensor_map

FLOAT32 = 7  # CU_TENSOR_MAP_DATA_TYPE_FLOAT32
ORDERS = ("random", "earliest", "latest")

HEADER = """.version 8.7
.target {target}
.address_size 64
.visible .entry checked(.param .u64 p_x, .param .u64 p_y, .param .align 64 .b8 p_map[128])
{{
.reg .b16 %h<8>;
.reg .b32 %r<40>, %thread, %warp, %lane, %block, %shared, %slot, %bar, %zero, %one;
.reg .b64 %d<16>, %x, %y, %map, %a;
.reg .f32 %f<16>;
.reg .pred %p<8>, %first, %lane0, %warp0, %warp1, %block0, %block1, %yes, %no;
.shared .align 1024 .b8 memory[8192];
.shared .align 16 .b8 objects[1024];
ld.param.u64 %x, [p_x];
ld.param.u64 %y, [p_y];
mov.b64 %map, p_map;
mov.u32 %thread, %tid.x;
mov.u32 %block, %ctaid.x;
shr.u32 %warp, %thread, 5;
and.b32 %lane, %thread, 31;
mov.u32 %shared, memory;
mov.u32 %bar, objects;
mad.lo.u32 %slot, %thread, 4, %shared;
mad.wide.u32 %a, %thread, 4, %x;
mov.b32 %zero, 0;
mov.b32 %one, 1;
setp.eq.u32 %first, %thread, 0;
setp.eq.u32 %lane0, %lane, 0;
setp.eq.u32 %warp0, %warp, 0;
setp.eq.u32 %warp1, %warp, 1;
setp.eq.u32 %block0, %block, 0;
setp.eq.u32 %block1, %block, 1;
setp.eq.u32 %yes, %zero, 0;
setp.ne.u32 %no, %zero, 0;
"""


@dataclass(frozen=True)
class Check:
    """A kernel, the edit that breaks it, and patterns of the report."""

    name: str
    body: str
    edit: tuple[str, str]  # text of the body, what takes its place
    report: tuple[str, ...]
    target: str = "sm_90"
    grid: int = 1
    block: int = 32
    cluster: int = 1
    map: dict = field(default_factory=dict)
    located: bool = True  # the report names the line, block and warp
    named: bool = True  # the report names the kernel
    orders: tuple[str, ...] = ORDERS  # that have to report it

    def broken(self) -> str:
        assert self.edit[0] in self.body, self.name
        return self.body.replace(*self.edit, 1)

    def run(self, body: str, seed: int, order: str) -> torch.Tensor:
        """y, after the kernel has run."""
        tensor_map = self.map.get("bytes")
        x = torch.arange(256, dtype=torch.float32).view(8, 32)
        y = torch.zeros(64, dtype=torch.int32)
        with deepkern.compiled(self.target, seed=seed, order=order):
            sizes = {"shape": (32, 8), "strides": (128,), "box": (32, 8)} | self.map
            if tensor_map is None:
                tensor_map = encode_tensor_map(x.data_ptr(), FLOAT32, **sizes)
            PtxModule(text(body, self.target)).run_kernel(
                "checked", x, y, tensor_map, grid=(self.grid,), block=(self.block,),
                cluster=(self.cluster,)
            )  # fmt: skip
        return y


def text(body: str, target: str = "sm_90") -> str:
    """The PTX of a kernel; the statement k of the body has the source line k of checked.cu."""
    lines = [HEADER.format(target=target + "a" * (target in ("sm_90", "sm_100", "sm_120")))]
    statements = [s.strip() for s in re.split(r"(?<=[;:])\n|\n", body) if s.strip()]
    for k, statement in enumerate(statements):
        lines.append(statement if statement.endswith(":") else f".loc 1 {k + 1} 3\n{statement}")
    return "\n".join([*lines, "ret;", "}", '.file 1 "checked.cu"', ""])


def distinct(checks: list[Check]) -> list[Check]:
    """One check for each kernel; several break the same one."""
    return list({(c.body, c.target, c.grid, c.block, c.cluster): c for c in checks}.values())


def assert_passes(check: Check, seed: int) -> None:
    for order in ORDERS:
        check.run(check.body, seed, order)


def assert_reported(check: Check, seed: int) -> None:
    """Every order of the check reports the broken kernel, with the place."""
    for order in check.orders:
        with pytest.raises(deepkern.KernelFailure) as caught:
            check.run(check.broken(), seed, order)
        message = str(caught.value)
        patterns = check.report
        if check.located:
            patterns += (
                r"\n  at checked.cu:\d+",
                r"PTX line \d+: ",
                r"block \(\d+, 0, 0\), warp \d",
            )
        for pattern in ("checked: " if check.named else "", *patterns):
            assert re.search(pattern, message), f"{pattern!r} is not in\n{message}"
