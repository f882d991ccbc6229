"""Bytes and time of the all-to-all between 2, 4 and 8 processes, over gloo on this machine.

    python -m bench.studies.expert_parallel [--keep] [--folder DIR]

DeepSeek-V3's shapes (256 experts, 8 of them a token, in 4 of 8 groups; 7168 values a token; FP8
with scales to the experts, bf16 back), over 2, 4 and 8 processes. Three ways to send: one row per
expert; one row per rank, as `ExpertParallel` does; and two hops, with the processes as two nodes.
All three use `ExpertParallel`; the first passes each token once per expert, as tokens of topk 1.

The bytes are exact for any network. The times are those of processes on the cores of one machine
over loopback: they compare the three ways with each other and nothing else.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import typer
from rich.console import Console

import deepkern
from deepkern.testing import ranks

from .. import machine, results
from ..command_line import FOLDER, KEEP, bar, screen
from ..listing import Listing

WORLDS = (2, 4, 8)
TOKENS = (32, 512)  # on each rank: decoding, and a chunk of a prompt
WAYS = ("a row per expert", "a row per rank", "two nodes")
E, TOPK, K = 256, 8, 7168


@dataclass
class Exchanged:
    """The cost of one way to send; bytes are those of the rank that sends most."""

    ranks: int
    tokens: int  # on each rank
    way: str
    dispatch_bytes: int  # to other ranks
    combine_bytes: int
    across_bytes: int  # of dispatch and combine, between the two halves of the ranks
    dispatch_ms: float  # median over the repetitions of the slowest rank's time
    combine_ms: float

    def record(self) -> dict:
        return {"kind": "expert_parallel", "E": E, "topk": TOPK, "K": K, **asdict(self)}


def measure(tokens: int, way: str, repeat: int) -> tuple[list[int], list[float], list[float]]:
    """Runs on each rank: bytes sent, and the seconds of dispatch and combine in each repetition."""
    world, me = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(me)
    logits = torch.randn(tokens, E, generator=generator)
    weights, idx = deepkern.route_topk(logits, None, TOPK, 8, 4, scale=2.5)
    x, scale = deepkern.cast_per_token(torch.randn(tokens, K, generator=generator))
    if way == "a row per expert":
        x = x.view(torch.uint8).repeat_interleave(TOPK, 0).view(x.dtype)
        scale = scale.repeat_interleave(TOPK, 0)
        idx, weights = idx.view(-1, 1), weights.view(-1, 1)
    ep = deepkern.ExpertParallel(None, E, world // 2 if way == "two nodes" else None)
    dispatch_seconds, combine_seconds = [], []
    for _ in range(repeat + 1):  # the first connects and allocates; it is dropped
        dist.barrier()
        start = time.perf_counter()
        rows, *_, handle = ep.dispatch(x, idx, weights, scale)
        dispatch_seconds.append(time.perf_counter() - start)
        y = rows.bfloat16()
        dist.barrier()
        start = time.perf_counter()
        ep.combine(y, handle)
        combine_seconds.append(time.perf_counter() - start)
    return sent_bytes(handle, world, idx.shape[1]), dispatch_seconds[1:], combine_seconds[1:]


def sent_bytes(handle, world: int, topk: int) -> list[int]:
    """Bytes to other ranks in dispatch and combine, and in both between the halves of the ranks."""
    row, row_back = K + 4 * (K // 128) + 8 * topk, 2 * K
    others = across = others_back = across_back = 0
    for link in handle.links:
        mine = link.exchange.ranks[link.exchange.rank]
        for rank, sent, received in zip(link.exchange.ranks, link.sent, link.received, strict=True):
            others += sent * (rank != mine)
            others_back += received * (rank != mine)
            far = rank // (world // 2) != mine // (world // 2)
            across, across_back = across + sent * far, across_back + received * far
    return [others * row, others_back * row_back, across * row + across_back * row_back]


def exchanged(world: int, tokens: int, way: str, repeat: int) -> Exchanged:
    outcomes = ranks.run(world, measure, tokens, way, repeat, timeout=300)
    most = [max(sizes) for sizes in zip(*(o[0] for o in outcomes), strict=True)]
    times = [
        statistics.median(max(of_ranks) for of_ranks in zip(*(o[i] for o in outcomes), strict=True))
        for i in (1, 2)
    ]
    return Exchanged(world, tokens, way, *most, *(round(1e3 * t, 3) for t in times))


def everything(worlds, tokens, repeat: int) -> Iterator[Exchanged]:
    for world in worlds:
        for T in tokens:
            for way in WAYS:
                yield exchanged(world, T, way, repeat)


def table(measured: list[Exchanged]) -> Listing:
    out = Listing("All-to-all over gloo, one machine")
    for name in ("ranks", "tokens a rank", "way", "dispatch MB", "combine MB", "between halves MB",
                 "dispatch ms", "combine ms"):  # fmt: skip
        out.add_columns(name, numeric=name != "way")
    for e in measured:
        sizes = (e.dispatch_bytes, e.combine_bytes, e.across_bytes)
        out.add_row(str(e.ranks), str(e.tokens), e.way, *(f"{s / 1e6:.2f}" for s in sizes),
                    f"{e.dispatch_ms:.1f}", f"{e.combine_ms:.1f}")  # fmt: skip
    return out


def run(
    keep: bool = False,
    worlds: tuple[int, ...] = WORLDS,
    tokens: tuple[int, ...] = TOKENS,
    repeat: int = 10,
    folder: Path = results.FOLDER,
    console: Console | None = None,
) -> int:
    """Measures, prints, and writes the figures."""
    console, about, measured = console or screen(), machine.describe(), []
    about["load"] = os.getloadavg()[0]
    with bar(console, "sending", len(worlds) * len(tokens) * len(WAYS)) as step:
        for e in everything(worlds, tokens, repeat):
            measured.append(e)
            step(f"{e.ranks} ranks, {e.tokens} tokens, {e.way}")
    console.print(table(measured))
    console.print(f"load of the machine at the start: {about['load']:.1f}")
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-expert-parallel")
    results.write([{"kind": "machine", **about}, *(e.record() for e in measured)], file)
    console.print(f"written: {file}", soft_wrap=True)
    return 0


def main(
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:
    """Measures bytes and time of dispatch and combine between 2, 4 and 8 processes over gloo."""
    raise typer.Exit(run(keep, folder=folder))


if __name__ == "__main__":
    typer.run(main)
