"""Decoding as a CUDA graph: the launches of a step are recorded once and replayed.

A decode step has about thirty launches a layer and few rows, so that the host would be the limit.
A graph reads its inputs at fixed addresses and has a fixed number of rows: there is one for each
power of two, and a step with fewer rows has padding rows, which have no slot and see no token.
They change no bit of the others (`batch.py`).  With an indexer a graph scores all `max_pages` pages
at every step.

    graphs = DecodeGraphs(model, pool, max_rows=64, max_pages=64)
    hidden = graphs.run(batch)  # of a batch of generated tokens
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.batch import TokenBatch
from model.cache import CachePool
from model.deepseek import DeepSeek

# The tensors that change from step to step, and their values in a padding row.
PADDING = {
    "tokens": 0,
    "positions": 0,
    "slots": -1,
    "cos": 1,
    "sin": 0,
    "block_table": 0,
    "cache_seqlens": 0,
}

# Takes what to record and returns what replays it, with its result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def capture_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records `function` after a run that loads its kernels."""
    stream = torch.cuda.Stream()  # of the current device
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


class DecodeGraphs:
    """The graphs of one model and pool.

    Args:
        max_rows: rows of a batch at most.
        max_pages: pages of a sequence at most.
        capture: records a function; another one is for tests.
    """

    def __init__(
        self,
        model: DeepSeek,
        pool: CachePool,
        max_rows: int,
        max_pages: int,
        capture: Capture = capture_cuda,
    ) -> None:
        if pool.index_keys is not None and pool.index_keys.dtype != torch.uint8:
            raise ValueError("DecodeGraphs: expected an indexer in FP8, got one in fp32")
        self.model, self.pool, self.capture = model, pool, capture
        self.max_rows, self.max_pages = max_rows, max_pages
        self.cos_sin = model.rotary_table(max_pages * pool.page_size)
        self.graphs: dict[int, tuple[TokenBatch, Callable[[], None], Tensor]] = {}

    def fits(self, batch: TokenBatch) -> bool:
        """Whether all rows are generated tokens, and there are not too many rows and pages."""
        rows, pages = batch.block_table.shape
        small = rows <= self.max_rows and pages <= self.max_pages
        return small and batch.num_prompt == 0 and batch.order is None

    def run(self, batch: TokenBatch) -> Tensor:
        """As `model.run`: [N, hidden]."""
        rows = len(batch.tokens)
        size = 1 << (rows - 1).bit_length()
        if size not in self.graphs:
            inputs = self.empty_batch(size)
            with torch.cuda.device(self.cos_sin.device if self.cos_sin.is_cuda else -1):
                replay, result = self.capture(lambda: self.model.run(inputs, self.pool))
            self.graphs[size] = inputs, replay, result
        inputs, replay, result = self.graphs[size]
        for name, padding in PADDING.items():
            target, source = getattr(inputs, name), getattr(batch, name)
            target[rows:].fill_(padding)
            if name == "block_table":
                source = F.pad(source, (0, self.max_pages - source.shape[1]))
            target[:rows].copy_(source)
        replay()
        return result[:rows]

    def empty_batch(self, rows: int) -> TokenBatch:
        """The inputs of a graph, all of them padding."""
        device, rope = self.cos_sin.device, self.cos_sin.shape[1]
        long = {"dtype": torch.int64, "device": device}
        short = {"dtype": torch.int32, "device": device}
        return TokenBatch(
            tokens=torch.zeros(rows, **long),
            positions=torch.zeros(rows, **long),
            slots=torch.full((rows,), -1, **long),
            cos=torch.ones(rows, 1, rope, device=device),
            sin=torch.zeros(rows, 1, rope, device=device),
            cos_sin=self.cos_sin,
            num_prompt=0,
            block_table=torch.zeros(rows, self.max_pages, **short),
            cache_seqlens=torch.zeros(rows, **short),
            longest=self.max_pages * self.pool.page_size,
            sequences=[],
            steps=[],
            order=None,
        )
