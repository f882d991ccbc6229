"""PeerMemory: all ranks in one process, with their buffers in one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepkern.experts.peer_memory import PeerMemory, wrap_int32
from deepkern.runtime.arch import ARCHS
from deepkern.testing import compare, ranks

ROOT = Path(__file__).parent.parent.parent


def group(size: int, words: int, generator, limit: int = 3) -> list[PeerMemory]:
    """The PeerMemory of each rank; the flags are 0, the regions hold garbage."""
    memory = torch.full((size, words), 0x7FC01234, dtype=torch.int32, device=generator.device)
    offsets = [rank * words for rank in range(size)]
    peers = [PeerMemory(memory.view(-1), offsets, words, rank, limit) for rank in range(size)]
    memory[:, : peers[0].flags] = 0
    return peers


def rows_of(counts: list[int], width: int, generator) -> torch.Tensor:
    shape = (sum(counts), width)
    return torch.randint(
        256, shape, dtype=torch.uint8, generator=generator, device=generator.device
    )


def exchange(peers, counts, width, generator) -> None:
    """One call with counts[source][target] rows; all bytes must arrive at their target."""
    size = len(peers)
    rows = [rows_of(counts[r], width, generator) for r in range(size)]
    calls = [p.put(rows[r], counts[r]) for r, p in enumerate(peers)]
    for to, peer in enumerate(peers):
        received = [counts[r][to] for r in range(size)]
        out = torch.full((sum(received), width), 77, dtype=torch.uint8, device=generator.device)
        peer.take(out, received, calls[to])
        parts = [rows[r].split(counts[r])[to] for r in range(size)]
        compare.assert_bitwise(out, torch.cat(parts))
        assert peer.silent() == []


@pytest.mark.parametrize("size", [1, 2, 5], ids=["1_rank", "2_ranks", "5_ranks"])
def test_successive_calls(size, generator):
    peers = group(size, 64 + 2 * size * 400, generator)
    assert peers[0].region_bytes == 1600
    for call in range(5):
        counts = torch.randint(
            0, 100 // (call + 1), (size, size), generator=generator, device=generator.device
        )
        exchange(peers, counts.tolist(), 16 * (call + 1), generator)
    exchange(peers, [[0] * size] * size, 32, generator)
    exchange(peers, [[100 if to == 0 else 0 for to in range(size)]] * size, 16, generator)  # full


def test_several_programs_and_counter_overflow(generator):
    peers = group(2, 64 + 4 * 20_000, generator)
    start = 2**31 - 3
    for p in peers:
        p.call = start
    for r, p in enumerate(peers):  # as if all earlier calls had been taken
        own = p.base[p.offsets[r] :]
        own[: 2 * p.size] = start
    for _ in range(5):
        exchange(peers, [[1200, 7], [3, 1201]], 64, generator)
    assert peers[0].call == wrap_int32(start + 5) < 0


def test_two_pending_calls(generator):
    peers, counts = group(3, 64 + 6 * 200, generator), [[1, 2, 3], [0, 4, 1], [2, 0, 5]]
    rows = [[rows_of(counts[r], 32, generator) for r in range(3)] for _ in range(2)]
    calls = [[p.put(rows[i][r], counts[r]) for r, p in enumerate(peers)] for i in range(2)]
    for to, peer in enumerate(peers):
        received = [counts[r][to] for r in range(3)]
        for i in range(2):
            out = torch.empty((sum(received), 32), dtype=torch.uint8, device=generator.device)
            peer.take(out, received, calls[i][to])
            want = torch.cat([rows[i][r].split(counts[r])[to] for r in range(3)])
            compare.assert_bitwise(out, want)


def test_silent_rank_is_named(generator):
    peers = group(3, 64 + 6 * 200, generator)
    counts = [2, 2, 2]
    for rank in (0, 1):
        peers[rank].put(rows_of(counts, 16, generator), counts)
    out = torch.full((6, 16), 77, dtype=torch.uint8, device=generator.device)
    peers[0].take(out, counts, 1)
    assert peers[0].silent() == [2]
    assert (out[4:] == 77).all()  # not the garbage of the region
    # Rank 0 sends nothing more: it does not set `taken`, and its next put sets no `ready`.
    assert peers[1].base[peers[1].offsets[1] + 3] == 0
    assert peers[0].put(rows_of(counts, 16, generator), counts) == 2
    assert peers[1].base[peers[1].offsets[1]] == 1


def test_third_call_waits_for_the_first(generator):
    peers, counts = group(2, 64 + 4 * 200, generator), [1, 1]
    for _ in range(2):
        for p in peers:
            p.put(rows_of(counts, 16, generator), counts)
    before = peers[0].base.clone()
    peers[0].put(rows_of(counts, 16, generator), counts)
    assert peers[0].silent() == [0, 1]
    assert torch.equal(peers[0].base, before)  # the rows of the first call are intact


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.proof) for t in ARCHS]
)
def test_compiles(target):
    """No spills, 16-byte accesses, flags at system scope."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    env.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_peer_memory.py")
    command = [sys.executable, str(script), target]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout.splitlines()[-1])
    names = {f"peer_memory_{role}_kernel" for role in ("wait", "copy", "signal")}
    assert {record["kernel"] for record in records} == names
    for record in records:
        assert record["spill_bytes"] == 0 and record["registers"] <= 64, record
        if record["ptx"] is None:
            continue
        if record["kernel"] == "peer_memory_copy_kernel":
            assert "st.global.v4" in record["ptx"] and "ld.global.v4" in record["ptx"]
        else:
            waits = record["kernel"] == "peer_memory_wait_kernel"
            order = "acquire" if waits else "release"
            assert f"atom.global.sys.{order}" in record["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_on_one_gpu(world, monkeypatch):
    """The checks of expert parallelism on ranks that use the same GPU."""
    from tests.experts import parallel_checks

    monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    outcomes = ranks.run(world, parallel_checks.over_peer_memory, timeout=300)
    assert all(outcomes)
