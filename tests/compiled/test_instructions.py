"""Instructions of registers, executed by the machine in batches, against their oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deepkern
from deepkern.runtime.ptx_library import PtxModule
from tests.compiled import instruction_cases, rare_instruction_cases
from tests.compiled.instruction_cases import BITS, Case, inputs

THREADS = 128
BATCH = 24
CASES = instruction_cases.cases() + rare_instruction_cases.cases()
HEADER = """.version 8.7
.target sm_100a
.address_size 64
.visible .entry batch(.param .u64 p_in, .param .u64 p_out)
{
.reg .u32 %thread;
.reg .b64 %in, %out;
ld.param.u64 %in, [p_in];
ld.param.u64 %out, [p_out];
mov.u32 %thread, %tid.x;
mad.wide.u32 %in, %thread, 8, %in;
mad.wide.u32 %out, %thread, 8, %out;
"""


def width(kind: str) -> int:
    return np.iinfo(BITS[kind]).bits


def code_of(case: Case, number: int) -> str:
    """Loads the operands of a case, executes it and stores the result."""
    pitch = 8 * THREADS
    lines = ["{", ".reg .pred %q;"]
    kinds = dict(zip("abc", case.sources, strict=False))
    for k, (letter, kind) in enumerate(kinds.items()):
        bits = width(kind)
        lines.append(f".reg .b{bits} %{letter};")
        lines.append(f"ld.global.b{bits} %{letter}, [%in+{(3 * number + k) * pitch}];")
    bits = width(case.result)
    lines.append(f".reg .b{bits} %d;")
    line = case.line.replace("%d", "%q") if case.result == "pred" else case.line
    lines.append(line + ";")
    if case.result == "pred":
        lines.append("selp.b32 %d, 1, 0, %q;")
    lines += [f"st.global.b{bits} [%out+{number * pitch}], %d;", "}"]
    return "\n".join(lines)


def unsigned(array: np.ndarray) -> np.ndarray:
    return array.view(array.dtype.str.replace("i", "u")).astype(np.uint64)


def same(got: np.ndarray, want: np.ndarray, kind: str) -> np.ndarray:
    """Equal bits; the bits of a NaN in float64 are not defined."""
    equal = got == want
    if kind == "f64":
        nan = [np.isnan(x.view(np.float64)) for x in (got, want)]
        equal |= nan[0] & nan[1]
    return equal


@pytest.mark.parametrize("first", range(0, len(CASES), BATCH), ids=lambda k: CASES[k].name)
def test_instructions_match_their_oracles(first: int, rng: np.random.Generator):
    batch = CASES[first : first + BATCH]
    memory = torch.zeros(len(batch), 3, THREADS, dtype=torch.int64)
    result = torch.zeros(len(batch), THREADS, dtype=torch.int64)
    operands = [[inputs(kind, THREADS, rng) for kind in case.sources] for case in batch]
    for k, arrays in enumerate(operands):
        for j, array in enumerate(arrays):
            memory[k, j] = torch.from_numpy(unsigned(array).view(np.int64))
    code = "\n".join(code_of(case, k) for k, case in enumerate(batch))
    with deepkern.compiled("sm_100"):
        PtxModule(HEADER + code + "\nret;\n}\n").run_kernel(
            "batch", memory, result, block=(THREADS,)
        )
    for case, arrays, row in zip(batch, operands, result.numpy().view(np.uint64), strict=True):
        with np.errstate(all="ignore"):
            want = unsigned(case.oracle(*arrays))
        wrong = np.flatnonzero(~same(row, want, case.result))
        shown = [(hex(row[i]), hex(want[i]), [hex(unsigned(a)[i]) for a in arrays])
                 for i in wrong[:3]]  # fmt: skip
        assert not shown, f"{case.line}: (got, want, operands): {shown}"
