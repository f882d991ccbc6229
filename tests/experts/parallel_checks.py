"""Run by the ranks of test_expert_parallel.py: results against one process."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import deepkern
from deepkern import ExpertParallel, ExpertParallelError
from deepkern.testing import compare
from deepkern.testing.routing import indices
from tests.experts import parallel_failures
from tests.experts.parallel_failures import raises

FP8 = torch.float8_e4m3fn
FIELDS = ("x", "idx", "weights", "scale")


@dataclass
class Tokens:
    """Tokens of one rank, or of all."""

    x: Tensor
    idx: Tensor
    weights: Tensor
    scale: Tensor | None = None


def tokens_of_all(counts, E, topk, K, dtype=torch.bfloat16, seed=0, choose=None) -> list[Tokens]:
    """The tokens of every rank; each rank generates all of them."""
    ranks = []
    for rank, T in enumerate(counts):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        x = torch.randn(T, K, generator=generator)
        idx = indices(generator, T, E, topk) if choose is None else choose(T, generator)
        weights = torch.rand(T, topk, generator=generator)  # positive, as routing gives them
        scale = torch.rand(T, -(-K // 128), generator=generator) if dtype == FP8 else None
        ranks.append(Tokens(x.to(dtype), idx, weights, scale))
    return ranks


def concatenate(ranks: list[Tokens]) -> Tokens:
    def join(parts):
        if parts[0] is None:
            return None
        bits = [p.view(torch.uint8) if p.dtype == FP8 else p for p in parts]
        return torch.cat(bits).view(parts[0].dtype)

    return Tokens(*(join([getattr(r, f) for r in ranks]) for f in FIELDS))


def experts(rows: Tensor, scale: Tensor | None, expert: Tensor) -> Tensor:
    """A stand-in for the experts: expert e multiplies by e + 1.5. FP8 rows become bf16."""
    if scale is not None:
        K = rows.shape[1]
        rows = (rows.float() * scale.repeat_interleave(128, 1)[:, :K]).bfloat16()
    factor = torch.where(expert < 0, 0, expert + 1.5)[:, None]
    return (rows.float() * factor).to(rows.dtype)


def layer(ep: ExpertParallel, mine: Tokens, alignment: int = 1, async_op: bool = False):
    """Dispatch, experts, combine; returns (out, rows, scale, group_index, counts)."""
    got = ep.dispatch(mine.x, mine.idx, mine.weights, mine.scale, alignment, async_op=async_op)
    rows, scale, group, counts, handle = got.wait() if async_op else got
    expert = torch.where(group < 0, -1, group + ep.local_experts.start)
    out = ep.combine(experts(rows, scale, expert), handle, async_op=async_op)
    return (out.wait() if async_op else out), rows, scale, group, counts


def single(everyone: Tokens, E: int, alignment: int = 1, exact: bool = False):
    """`layer` in one process for the tokens of all ranks; sums in float64 if `exact`."""
    rows, scale, group, counts, handle = deepkern.expert_dispatch(
        everyone.x, everyone.idx, E, everyone.scale, alignment
    )
    y = experts(rows, scale, group)
    y = y.double() if exact else y
    combine = deepkern.reference.expert_combine if exact else deepkern.expert_combine
    return combine(y, everyone.weights, handle), rows, scale, group, counts


def assert_as_single(ep: ExpertParallel, ranks: list[Tokens], E: int, alignment: int = 1, **how):
    """Rows are equal bit for bit, sums within the tolerance (bit for bit on one rank)."""
    me = dist.get_rank()
    out, rows, scale, group, counts = layer(ep, ranks[me], alignment, **how)
    everyone = concatenate(ranks)
    want_out, want_rows, want_scale, want_group, want_counts = single(everyone, E, alignment, True)

    own = ep.local_experts
    padded = -(-want_counts // alignment) * alignment
    first, last = int(padded[: own.start].sum()), int(padded[: own.stop].sum())
    n = last - first
    assert len(rows) >= n and (alignment > 1 or len(rows) == n), (rows.shape, n)
    want = torch.where(want_group[first:last] < 0, -1, want_group[first:last] - own.start)
    assert torch.equal(group[:n], want) and (group[n:] == -1).all()
    assert torch.equal(counts, want_counts[own.start : own.stop])
    compare.assert_bitwise(rows[:n], want_rows[first:last])
    if want_scale is not None:
        compare.assert_bitwise(scale[:n], want_scale[first:last])

    before = sum(len(r.x) for r in ranks[:me])
    want_out = want_out[before : before + len(ranks[me].x)]
    compare.assert_close(out, want_out)
    if dist.get_world_size() == 1:
        compare.assert_bitwise(out, single(everyone, E, alignment)[0])
    return out


def uneven(world: int) -> list[int]:
    """Tokens of each rank; rank 1 has none."""
    return [0 if rank == 1 else 3 + 7 * (world - rank) for rank in range(world)]


def check_dtypes_and_widths():
    world = dist.get_world_size()
    ep = ExpertParallel(None, 2 * world, timeout=30)
    for K, dtype in ((1, torch.float32), (100, FP8), (3584, torch.bfloat16), (7168, FP8)):
        ranks = tokens_of_all(uneven(world), 2 * world, 4, K, dtype, seed=K)
        assert_as_single(ep, ranks, 2 * world)
    ranks = tokens_of_all(uneven(world), 2 * world, 3, 7168, torch.float16)
    assert_as_single(ep, ranks, 2 * world, alignment=8)


def check_experts_that_do_not_divide():
    world = dist.get_world_size()
    for E in (1, world + 1, 3 * world - 1):  # with E = 1 only one rank has an expert
        ep = ExpertParallel(None, E, timeout=30)
        sizes = [None] * world
        dist.all_gather_object(sizes, (ep.local_experts.start, ep.local_experts.stop))
        assert sizes[0][0] == 0 and sizes[-1][1] == E
        assert all(a[1] == b[0] for a, b in zip(sizes, sizes[1:], strict=False))
        assert {b - a for a, b in sizes} <= {E // world, E // world + 1}
        assert_as_single(ep, tokens_of_all(uneven(world), E, 2, 20), E)


def check_loads():
    """No tokens; all tokens to one expert, to every expert, to no expert; topk 1 and 0; K = 0."""
    world, E = dist.get_world_size(), 2 * dist.get_world_size() + 1
    ep = ExpertParallel(None, E, timeout=30)

    def all_to(expert):
        return lambda T, _: torch.full((T, 2), expert)

    def all_experts(T, generator):
        return torch.rand(T, E, generator=generator).argsort(1)

    assert_as_single(ep, tokens_of_all([0] * world, E, 4, 16), E)
    assert_as_single(ep, tokens_of_all(uneven(world), E, 2, 16, choose=all_to(E - 1)), E)
    assert_as_single(ep, tokens_of_all(uneven(world), E, E, 16, choose=all_experts), E)
    out = assert_as_single(ep, tokens_of_all(uneven(world), E, 2, 16, choose=all_to(-1)), E)
    assert (out == 0).all()
    assert_as_single(ep, tokens_of_all(uneven(world), E, 1, 16), E)
    assert_as_single(ep, tokens_of_all(uneven(world), E, 0, 16), E)
    assert_as_single(ep, tokens_of_all(uneven(world), E, 2, 0), E)


def check_hostile_indices_and_nan_weights():
    world, E = dist.get_world_size(), dist.get_world_size()
    ep = ExpertParallel(None, E, timeout=30)
    for dtype in (torch.int64, torch.int32):
        hostile = [-1, E, -(2**31), 2**31 - 1] + [-(2**63), 2**32] * (dtype == torch.int64)

        def choose(T, generator, hostile=hostile, dtype=dtype):
            pick = torch.tensor(hostile + list(range(E)), dtype=dtype)
            return pick[torch.randint(len(pick), (T, 3), generator=generator)]

        ranks = tokens_of_all([9] * world, E, 3, 8, torch.float32, choose=choose)
        for r in ranks:
            r.weights[(r.idx < 0) | (r.idx >= E)] = torch.nan
        out = assert_as_single(ep, ranks, E)
        assert not out.isnan().any()


def check_token_is_sent_once_per_rank():
    world = dist.get_world_size()
    ep = ExpertParallel(None, 4 * world, timeout=30)

    def choose(T, _):  # four experts of rank 0 and one of the last
        return torch.tensor([[0, 1, 4 * world - 1, 2, 3]]).expand(T, 5).contiguous()

    mine = tokens_of_all([6] * world, 4 * world, 5, 8, choose=choose)[dist.get_rank()]
    *_, handle = ep.dispatch(mine.x, mine.idx, mine.weights)
    sent = [0] * world
    sent[0] = sent[-1] = 6
    assert handle.links[0].sent == sent
    ranks = handle.links[0].rows  # ascending: rank 0's row, then the last one's
    assert (ranks >= 0).sum(1).eq(len(set((0, world - 1)))).all()


def check_same_bits_twice_and_async():
    world = dist.get_world_size()
    ep = ExpertParallel(None, 3 * world, timeout=30)
    ranks = tokens_of_all(uneven(world), 3 * world, 4, 300, seed=5)
    mine = ranks[dist.get_rank()]
    first = layer(ep, mine)
    for async_op in (False, True):
        for a, b in zip(first, layer(ep, mine, async_op=async_op), strict=True):
            assert a is b is None or torch.equal(a, b)
    # Two pending calls, waited for in order; a handle may be used twice.
    pending = [ep.dispatch(mine.x, mine.idx, mine.weights, async_op=True) for _ in range(2)]
    got = [p.wait() for p in pending]
    assert torch.equal(got[0][0], got[1][0]) and pending[0].wait() is got[0]
    back = [ep.combine(g[0], g[4], async_op=True) for g in got]
    once = [p.wait() for p in back]
    again = ep.combine(got[0][0], got[0][4])
    assert torch.equal(once[0], once[1]) and torch.equal(once[0], again)


def gradients(function, tokens: Tokens, towards: Tensor):
    x = tokens.x.clone().requires_grad_()
    weights = tokens.weights.clone().requires_grad_()
    out = function(Tokens(x, tokens.idx, weights))
    return torch.autograd.grad(out, (x, weights), towards)


def check_gradients():
    world, me = dist.get_world_size(), dist.get_rank()
    E = 2 * world
    ranks = tokens_of_all(uneven(world), E, 3, 70, torch.float32, seed=2)
    everyone = concatenate(ranks)
    towards = torch.randn(everyone.x.shape, generator=torch.Generator().manual_seed(1))
    before = sum(len(r.x) for r in ranks[:me])
    part = slice(before, before + len(ranks[me].x))
    want = gradients(lambda t: single(t, E)[0], everyone, towards)
    meshes = [None] + [2] * (world % 2 == 0)
    for ranks_per_node in meshes:
        ep = ExpertParallel(None, E, ranks_per_node, timeout=30)
        for async_op in (False, True):
            got = gradients(
                lambda t, ep=ep, a=async_op: layer(ep, t, async_op=a)[0], ranks[me], towards[part]
            )
            for g, w in zip(got, want, strict=True):
                compare.assert_close(g, w[part])

    # With FP8 rows only the weights have a gradient.
    fp8 = tokens_of_all(uneven(world), E, 3, 70, FP8, seed=2)[me]
    weights = fp8.weights.requires_grad_()
    out, rows, *_ = layer(ExpertParallel(None, E, timeout=30), fp8)
    assert not rows.requires_grad and out.requires_grad
    out.float().sum().backward()
    assert weights.grad.shape == weights.shape and weights.grad.isfinite().all()


def check_two_hops_equal_one():
    world, me = dist.get_world_size(), dist.get_rank()
    E = 3 * world + 1
    shapes = [(n, world // n) for n in range(1, world + 1) if world % n == 0]
    for dtype in (torch.float32, FP8):
        ranks = tokens_of_all(uneven(world), E, 5, 40, dtype, seed=3)
        for r in ranks:  # small integers are exact in bf16, so the order of sums has no effect
            r.x = r.x.float().round().clamp(-1, 1).to(dtype)
            r.weights = r.weights.round()
            if r.scale is not None:
                r.scale = torch.ones_like(r.scale)
        one = layer(ExpertParallel(None, E, timeout=30), ranks[me])
        for nodes, ranks_per_node in shapes:
            mesh = init_device_mesh("cpu", (nodes, ranks_per_node))
            for ep in (
                ExpertParallel(None, E, ranks_per_node, timeout=30),
                ExpertParallel(mesh, E, timeout=30),
            ):
                two = layer(ep, ranks[me])
                assert torch.equal(one[0], two[0])  # the sums
                assert torch.equal(one[3], two[3]) and torch.equal(one[4], two[4])
                rows = [torch.cat([t[3][:, None], t[1].float()], 1).tolist() for t in (one, two)]
                assert sorted(rows[0]) == sorted(rows[1])
    real = tokens_of_all(uneven(world), E, 5, 40, seed=4)
    for _, ranks_per_node in shapes:
        ep = ExpertParallel(None, E, ranks_per_node, timeout=30)
        want = single(concatenate(real), E, exact=True)[0]
        before = sum(len(r.x) for r in real[:me])
        compare.assert_close(layer(ep, real[me])[0], want[before : before + len(real[me].x)])


def check_token_crosses_to_a_node_once():
    world, me = dist.get_world_size(), dist.get_rank()
    if world % 2:
        return
    ep = ExpertParallel(None, world, world // 2, timeout=30)

    def choose(T, _):  # one expert on each rank
        return torch.arange(world).expand(T, world).contiguous()

    mine = tokens_of_all([5] * world, world, world, 8, choose=choose)[me]
    *_, handle = ep.dispatch(mine.x, mine.idx, mine.weights)
    assert handle.links[0].sent == [5, 5]  # not 5 · world / 2 to the other node
    assert handle.links[1].sent == [10] * (world // 2)


def check_meshes():
    world = dist.get_world_size()
    ranks = tokens_of_all(uneven(world), world, 2, 8)
    mesh = init_device_mesh("cpu", (world,))
    assert_as_single(ExpertParallel(mesh, world, timeout=30), ranks, world)
    half = dist.new_group(list(range(world // 2, world)))  # a group of some ranks
    if dist.get_rank() >= world // 2:
        ep = ExpertParallel(half, 4, timeout=30)
        mine = ranks[dist.get_rank()]
        got = layer(ep, mine)[0]
        assert got.shape == mine.x.shape
    else:
        raises(TypeError, "group: expected a ProcessGroup", ExpertParallel, half, 4)


def assert_as_gloo(ep: ExpertParallel, device: str) -> None:
    """Rows, sums and gradients of `ep` equal those over gloo, bit for bit."""
    world, me = dist.get_world_size(), dist.get_rank()
    gloo = ExpertParallel(None, 2 * world, timeout=60)
    for K, dtype in ((1, torch.float32), (100, FP8), (7168, FP8), (7168, torch.bfloat16)):
        for repetition in range(3):
            mine = tokens_of_all(uneven(world), 2 * world, 4, K, dtype, seed=repetition)[me]
            parts = [getattr(mine, field) for field in FIELDS]
            moved = Tokens(*(None if part is None else part.to(device) for part in parts))
            for a, b in zip(layer(ep, moved), layer(gloo, moved), strict=True):
                assert a is b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    real = tokens_of_all(uneven(world), 2 * world, 4, 64, torch.float32)[me]
    real = Tokens(real.x.to(device), real.idx.to(device), real.weights.to(device))
    towards = torch.ones_like(real.x)
    got = gradients(lambda t: layer(ep, t)[0], real, towards)
    for a, b in zip(got, gradients(lambda t: layer(gloo, t)[0], real, towards), strict=True):
        assert torch.equal(a, b)


def over_nccl() -> bool:
    """Each rank has its own GPU."""
    torch.cuda.set_device(dist.get_rank())
    group = dist.new_group(backend="nccl")
    ep = ExpertParallel(group, 2 * dist.get_world_size(), timeout=60)
    assert_as_gloo(ep, f"cuda:{dist.get_rank()}")
    return True


def over_peer_memory() -> bool:
    """All ranks use GPU 0."""
    world = dist.get_world_size()
    torch.cuda.set_device(0)
    assert_as_gloo(ExpertParallel(None, 2 * world, timeout=60, peer_buffer=64 << 20), "cuda")
    small = ExpertParallel(None, 2 * world, timeout=10, peer_buffer=4096)
    x = torch.zeros(500, 64, device="cuda")
    idx, w = torch.zeros(500, 1, device="cuda").long(), torch.ones(500, 1, device="cuda")
    raises(ExpertParallelError, "has room for", small.dispatch, x, idx, w)
    return True


def everything(backend: str) -> dict[str, str | float]:
    return run_checks(globals() | vars(parallel_failures), backend)


def run_checks(module: dict, backend: str) -> dict[str, str | float]:
    """Runs the `check_` functions of a module; returns the seconds of each, or its traceback."""
    found = {}
    for name, check in list(module.items()):
        if name.startswith("check_"):
            start = time.monotonic()
            try:
                with compare.poison(), deepkern.backend(backend):
                    check()
                found[name] = time.monotonic() - start
            except Exception:
                found[name] = traceback.format_exc()
                break  # the ranks may be out of step
    return found


def assert_passed(outcomes: list[dict], names: list[str]) -> None:
    """Every rank ran all checks; otherwise shows the traceback of the cause.

    If a rank fails, others lose it and fail as well: the earliest failed check is the cause.
    """
    failures = [
        (names.index(name), f"rank {rank}, {name}:\n{text}")
        for rank, outcome in enumerate(outcomes)
        for name, text in outcome.items()
        if isinstance(text, str)
    ]
    assert not failures, min(failures)[1]
    assert all(list(outcome) == names for outcome in outcomes)
