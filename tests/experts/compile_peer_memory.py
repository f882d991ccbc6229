"""Compiles the kernels of peer_memory.py for one target, without TRITON_INTERPRET.

    python compile_peer_memory.py sm_90

Prints a JSON list with a record per kernel.
"""

import json
import sys

import torch

from bench import assembly
from bench.compiling import compiling
from deepkern.experts.peer_memory import PeerMemory
from deepkern.runtime.arch import ARCHS

if __name__ == "__main__":
    target = ARCHS[sys.argv[1]]
    words = 64 + 2 * 8 * 4096
    memory = torch.zeros(8 * words, dtype=torch.int32)
    peer = PeerMemory(memory, [rank * words for rank in range(8)], words, 0, 10)
    rows = torch.zeros((8, 256), dtype=torch.uint8)
    with compiling(target) as compiled:
        peer.take(rows, [1] * 8, peer.put(rows, [1] * 8))
    records = {}
    for kernel in compiled:
        name = kernel.src.fn.__name__
        ptx = kernel.asm.get("ptx")
        records.setdefault(name, {"kernel": name, "ptx": ptx, **assembly.read(kernel, target)})
    print(json.dumps(list(records.values())))
