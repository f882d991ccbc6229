"""What every rank runs in tests/compat/test_deep_ep.py: the checks of DeepEP's tests, and more.

Each rank generates the tokens of all ranks and computes from them what it must receive.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import deepkern
import deepkern.compat.deep_ep as deep_ep
from deepkern.testing import compare
from tests.experts.parallel_checks import run_checks
from tests.experts.parallel_failures import raises

FP8 = torch.float8_e4m3fn


def tokens(T: int, E: int, topk: int, hidden: int, rank: int, dtype=torch.bfloat16):
    """x, distinct experts of which some are -1 or out of range, weights."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(T, hidden, generator=generator).to(dtype)
    idx = torch.rand(T, E, generator=generator).argsort(1)[:, :topk]
    none = torch.rand(T, topk, generator=generator) < 0.15
    wrong = torch.tensor([-1, E, 2**62])[torch.arange(topk) % 3]
    return x, torch.where(none, wrong, idx), torch.rand(T, topk, generator=generator)


def all_tokens(world: int, E: int, topk: int, hidden: int):
    return [tokens(0 if r == 1 else 4 + r, E, topk, hidden, r) for r in range(world)]


def cast_back(x):
    q, scale = x
    return q.float() * scale.repeat_interleave(128, -1)[..., : q.shape[-1]]


def check_layout_and_dispatch():
    world, me = dist.get_world_size(), dist.get_rank()
    per_rank, topk, hidden = 5, 4, 200
    E = per_rank * world
    everyone = all_tokens(world, E, topk, hidden)
    x, idx, weights = everyone[me]
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 20, 0)
    assert (buffer.rank, buffer.group_size) == (me, world)

    per_token, rdma, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, E)
    want_in = torch.stack([((idx // per_rank) == r).any(1) for r in range(world)], 1)
    assert rdma is None and torch.equal(in_rank, want_in)
    assert per_token.tolist() == want_in.sum(0).tolist() and per_token.dtype == torch.int32
    assert per_expert.tolist() == [(idx == e).sum().item() for e in range(E)]
    event.current_stream_wait()

    # The rows that this rank receives, token by token.
    rows, sources, local, w = [], [], [], []
    for xr, idxr, wr in everyone:
        for t in range(len(xr)):
            mine = (idxr[t] // per_rank == me) & (idxr[t] >= 0)
            if mine.any():
                rows.append(xr[t])
                sources.append(t)
                local.append(torch.where(mine, idxr[t] - me * per_rank, -1))
                w.append(torch.where(mine, wr[t], 0.0))
    n = len(rows)
    counts = [sum((i == e).sum().item() for i in local) for e in range(per_rank)]

    q = deepkern.cast_per_token(x)
    for given in (x, (q[0], q[1].t().contiguous().t())):
        for with_topk in (False, True):
            extra = {"topk_idx": idx, "topk_weights": weights} if with_topk else {}
            how = {"num_tokens_per_rank": per_token, "is_token_in_rank": in_rank,
                   "num_tokens_per_expert": per_expert, "config": deep_ep.Config(20, 8, 256),
                   "previous_event": buffer.capture(), "async_finish": True}  # fmt: skip
            got = buffer.dispatch(given, **how, **extra)
            recv, recv_idx, recv_weights, per_local, handle, event = got
            event.current_stream_wait()
            data = cast_back(recv) if isinstance(given, tuple) else recv
            assert data.shape == (n, hidden) and per_local == counts
            if isinstance(given, tuple):
                want = [deepkern.cast_per_token(r[None]) for r in rows]
                for i in range(n):
                    compare.assert_bitwise(recv[0][i : i + 1], want[i][0])
                    compare.assert_bitwise(recv[1][i : i + 1], want[i][1])
            elif n:
                compare.assert_bitwise(recv, torch.stack(rows))
            assert handle[3].tolist() == sources and handle[4] is in_rank
            assert handle[0][-1, me] == n
            if with_topk:
                assert recv_idx.dtype == torch.int64 and recv_idx.shape == (n, topk)
                assert recv_idx.tolist() == [i.tolist() for i in local]
                assert torch.equal(recv_weights, torch.stack(w) if n else recv_weights)
                worst = buffer.dispatch(given, **how, **extra, num_worst_tokens=9 * world)
                assert len(as_rows(worst[0])) == 9 * world and worst[3] == []
                assert torch.equal(as_rows(worst[0])[:n].float(), as_rows(recv).float())
                assert (as_rows(worst[0])[n:].float() == 0).all()
                assert torch.equal(worst[1][:n], recv_idx) and (worst[1][n:] == -1).all()
                aligned = buffer.dispatch(given, **how, **extra, expert_alignment=8)[3]
                assert aligned == [-(-c // 8) * 8 for c in counts]
            else:
                assert recv_idx is None and recv_weights is None
                again = buffer.dispatch(given, handle=handle)  # cached
                assert torch.equal(as_rows(again[0]).float(), as_rows(recv).float())
                assert again[1:5] == (None,) * 4

            back = (data.bfloat16(), handle, recv_weights)
            summed, summed_weights, event = buffer.combine(*back)
            event.current_stream_wait()
            times = in_rank.sum(1)[:, None]
            reference = cast_back(given) if isinstance(given, tuple) else x.float()
            # The sum of a token's row over its ranks, exact except for the roundings.
            compare.assert_close(summed, reference.bfloat16().double() * times)
            if with_topk:
                sent = (idx >= 0) & (idx < E)
                assert torch.equal(summed_weights, torch.where(sent, weights, 0.0))
            bias = (torch.ones_like(x), torch.full_like(x, 2.0))
            biased = buffer.combine(*back, bias=bias)[0]
            compare.assert_close(biased, reference.bfloat16().double() * times + 3)


def as_rows(x):
    return x[0] if isinstance(x, tuple) else x


def check_low_latency():
    world, me = dist.get_world_size(), dist.get_rank()
    per_rank, topk, hidden, most = 4, 3, 300, 8 + world
    E = per_rank * world
    everyone = all_tokens(world, E, topk, hidden)
    x, idx, weights = everyone[me]
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, hidden, world, E)
    buffer = deep_ep.Buffer(dist.group.WORLD, 0, size, low_latency_mode=True, num_qps_per_rank=2)
    buffer.clean_low_latency_buffer(most, hidden, E)
    variants = [
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    ]
    for use_fp8, round_scale, use_ue8m0 in variants:
        for with_hook in (False, True):
            stats = torch.full((per_rank,), 5, dtype=torch.int32)
            recv, count, handle, event, hook = buffer.low_latency_dispatch(
                x, idx, most, E, cumulative_local_expert_recv_stats=stats, use_fp8=use_fp8,
                round_scale=round_scale, use_ue8m0=use_ue8m0, return_recv_hook=with_hook,
            )  # fmt: skip
            if with_hook:
                assert (count == 0).all()
            hook()
            event.current_stream_wait()
            sources, ranges, *numbers = handle
            assert numbers == [most, hidden, E] and sources.shape == (per_rank, most * world)
            assert torch.equal(stats, count + 5)
            data = as_rows(recv)
            assert data.shape == (per_rank, most * world, hidden)
            if use_fp8:
                blocks = -(-hidden // 128)
                assert recv[0].dtype == FP8 and recv[1].stride(1) == 1
                scale = recv[1]
                if use_ue8m0:
                    assert scale.dtype == torch.int32 and scale.shape[2] == -(-blocks // 4)
                    exponents = torch.stack([scale >> 8 * i & 255 for i in range(4)], 3)
                    scale = (exponents.flatten(2) << 23).view(torch.float32)[:, :, :blocks]
                assert scale.shape == (per_rank, most * world, blocks)
            for e in range(per_rank):
                expert = me * per_rank + e
                want = [(r, t) for r, (_, i, _) in enumerate(everyone) for t in range(len(i))
                        if (i[t] == expert).any()]  # fmt: skip
                assert count[e] == len(want)
                assert sources[e, : len(want)].tolist() == [t for _, t in want]
                for r in range(world):
                    first, rows = ranges[e, r].item() >> 32, ranges[e, r].item() & (2**32 - 1)
                    assert [q for q, _ in want[first : first + rows]] == [r] * rows
                    assert rows == sum(q == r for q, _ in want)
                for row, (r, t) in enumerate(want):
                    xt = everyone[r][0][t : t + 1]
                    if not use_fp8:
                        compare.assert_bitwise(data[e, row : row + 1], xt)
                        continue
                    q, s = deepkern.cast_per_token(xt, "ue8m0" if round_scale else "fp32")
                    compare.assert_bitwise(data[e, row : row + 1], q)
                    assert torch.equal(scale[e, row : row + 1], s)
                assert (data[e, len(want) :].float() == 0).all()

            y = cast_back((data, scale)).bfloat16() if use_fp8 else data.clone()
            sent = cast_back(deepkern.cast_per_token(x, "ue8m0" if round_scale else "fp32"))
            sent = sent.bfloat16() if use_fp8 else x
            want = (
                sent.double()
                * weights.masked_fill((idx < 0) | (idx >= E), 0).sum(1, keepdim=True).double()
            )
            for e in range(per_rank):
                y[e, count[e] :] = torch.nan  # rows of no token
            out = torch.empty_like(x)
            got, event, hook = buffer.low_latency_combine(
                y, idx, weights, handle, return_recv_hook=with_hook, out=out
            )
            hook()
            assert got is out
            compare.assert_close(out, want)
            buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
            zero = torch.zeros_like(y)
            got, _, _ = buffer.low_latency_combine(zero, idx, weights, handle, zero_copy=True)
            assert torch.equal(got, out)


def check_without_tokens():
    """No rank has a token."""
    world = dist.get_world_size()
    buffer = deep_ep.Buffer(dist.group.WORLD)
    x, idx = torch.zeros(0, 7).bfloat16(), torch.zeros(0, 2).long()
    per_token, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, world)
    got = buffer.dispatch(x, None, per_token, None, in_rank, per_expert, idx, torch.zeros(0, 2))
    assert got[0].shape == (0, 7) and got[3] == [0]
    assert buffer.combine(got[0], got[4])[0].shape == (0, 7)
    (recv, scale), count, handle, _, _ = buffer.low_latency_dispatch(x, idx, 3, world)
    assert recv.shape == (1, 3 * world, 7) and count.tolist() == [0]
    y = torch.zeros(1, 3 * world, 7).bfloat16()
    assert buffer.low_latency_combine(y, idx, torch.zeros(0, 2), handle)[0].shape == (0, 7)


def check_errors():
    world = dist.get_world_size()
    buffer = deep_ep.Buffer(dist.group.WORLD)
    x, idx, w = torch.ones(2, 4).bfloat16(), torch.zeros(2, 1).long(), torch.ones(2, 1)
    raises(TypeError, "Buffer: group", deep_ep.Buffer, None)
    raises(
        NotImplementedError, "enable_shrink", deep_ep.Buffer, dist.group.WORLD, enable_shrink=True
    )
    if world > 1:
        words = f"num_experts: expected a multiple of {world} ranks"
        raises(ValueError, words, buffer.get_dispatch_layout, idx, world + 1)
    raises(TypeError, "Buffer.dispatch: is_token_in_rank", buffer.dispatch, x)
    raises(TypeError, "Buffer.combine: handle", buffer.combine, x, (1, 2))
    raises(
        ValueError, "x: expected at most 1 tokens", buffer.low_latency_dispatch, x, idx, 1, world
    )
    raises(ValueError, "an even number", deep_ep.Buffer.set_num_sms, 3)
    per_token, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, world)
    how = {"is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}
    raises(ValueError, "topk_weights", buffer.dispatch, x, **how, topk_idx=idx)
    raises(ValueError, "expert_alignment", buffer.dispatch, x, **how, expert_alignment=0)
    handle = buffer.dispatch(x, **how)[4]
    rows = x.new_ones(99, 4)
    raises(ValueError, "Buffer.combine: x: expected", buffer.combine, rows, handle)
    words = "Buffer.dispatch: x: expected 2 tokens"
    raises(ValueError, words, buffer.dispatch, x.new_ones(3, 4), handle=handle)
    words = "Buffer.dispatch: is_token_in_rank: expected bool"
    raises(ValueError, words, buffer.dispatch, x, is_token_in_rank=in_rank.int(),
           num_tokens_per_expert=per_expert)  # fmt: skip
    rows = x.new_ones(sum(handle.link.received), 4)
    raises(ValueError, "Buffer.combine: bias: expected shape (2, 4)", buffer.combine, rows, handle,
           bias=x[:1])  # fmt: skip
    (recv, _), _, slots, _, _ = buffer.low_latency_dispatch(x, idx, 2, world)
    words = "Buffer.low_latency_combine: topk_idx: expected shape (2, 1)"
    raises(ValueError, words, buffer.low_latency_combine, recv.bfloat16(), idx[:1], w[:1], slots)
    raises(TypeError, "handle", buffer.low_latency_combine, x[None], idx, w, handle)
    deep_ep.Buffer.set_num_sms(24)
    assert deep_ep.Buffer.get_dispatch_config(3).num_sms == 24
    assert deep_ep.Buffer.get_combine_config(7).get_nvl_buffer_size_hint(14336, 7) == 0
    deep_ep.Buffer.set_num_sms(20)
    with deep_ep.Buffer.capture()(release_handle=True):
        pass
    called = []
    event = deep_ep.EventOverlap(deep_ep.EventHandle())
    event.register_hook_after_wait(lambda: called.append(1))
    event.current_stream_wait(release_handle=True)
    assert called == [1] and event.event is None


def everything(backend):
    return run_checks(globals(), backend)
