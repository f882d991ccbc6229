"""What every rank runs in tests/compat/test_elastic_buffer.py.

Each rank generates the tokens of all ranks and computes from them what it must receive.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

import deepkern
import deepkern.compat.deep_ep as deep_ep
from deepkern.testing import compare
from tests.compat.deep_ep_checks import all_tokens, cast_back
from tests.experts.parallel_checks import run_checks
from tests.experts.parallel_failures import raises

PER_RANK, TOPK, HIDDEN, LIMIT = 5, 4, 200, 16


def received_by(rank: int, everyone: list):
    """[(source rank, token, local experts or -1 [TOPK], weights or 0 [TOPK])] in order."""
    found = []
    for source, (x, idx, weights) in enumerate(everyone):
        for t in range(len(x)):
            local = idx[t] // PER_RANK == rank
            local &= (idx[t] >= 0) & (idx[t] < PER_RANK * len(everyone))
            if local.any():
                expert = torch.where(local, idx[t] - rank * PER_RANK, -1)
                found.append((source, t, expert, torch.where(local, weights[t], 0.0)))
    return found


def make_buffer(**options):
    return deep_ep.ElasticBuffer(
        dist.group.WORLD, num_max_tokens_per_rank=LIMIT, hidden=HIDDEN, num_topk=TOPK, **options
    )


def check_dispatch():
    world, me = dist.get_world_size(), dist.get_rank()
    E = PER_RANK * world
    everyone = all_tokens(world, E, TOPK, HIDDEN)
    x, idx, weights = everyone[me]
    buffer = make_buffer()
    want = received_by(me, everyone)
    stats = torch.full((PER_RANK,), 3, dtype=torch.int32)
    recv, recv_idx, recv_weights, handle, event = buffer.dispatch(
        x, idx, weights, stats, num_experts=E, expert_alignment=8, previous_event=buffer.capture()
    )
    event.current_stream_wait()
    assert len(recv) == len(want) == handle.num_recv_tokens
    for row, (source, t, expert, weight) in enumerate(want):
        compare.assert_bitwise(recv[row], everyone[source][0][t])
        assert torch.equal(recv_idx[row], expert) and torch.equal(recv_weights[row], weight)
        assert handle.recv_src_metadata[row].tolist() == [source * LIMIT + t, row]
    counts = [sum((e == expert).sum().item() for _, _, e, _ in want) for expert in range(PER_RANK)]
    aligned = [-(-count // 8) * 8 for count in counts]
    assert handle.num_recv_tokens_per_expert_list == aligned
    ends = torch.tensor(aligned).cumsum(0)
    assert torch.equal(handle.psum_num_recv_tokens_per_expert, ends.int())
    sources = torch.tensor([source for source, *_ in want])
    per_rank = torch.bincount(sources.long(), minlength=world).cumsum(0)
    assert torch.equal(handle.psum_num_recv_tokens_per_scaleup_rank, per_rank.int())
    assert stats.tolist() == [count + 3 for count in counts]
    assert torch.equal(handle.topk_idx, idx) and handle.topk_idx is not idx


def check_fp8_and_cached_dispatch():
    world, me = dist.get_world_size(), dist.get_rank()
    E = PER_RANK * world
    everyone = all_tokens(world, E, TOPK, HIDDEN)
    x, idx, weights = everyone[me]
    pair = deepkern.cast_per_token(x)
    buffer = make_buffer()
    recv, recv_idx, recv_weights, handle, _ = buffer.dispatch(
        pair, idx, num_experts=E, use_tma_aligned_col_major_sf=True, do_handle_copy=False
    )
    assert recv_weights is None and handle.topk_idx is idx
    assert recv[1].stride(0) == 1 or len(recv[1]) <= 1
    for row, (source, t, _, _) in enumerate(received_by(me, everyone)):
        q, scale = deepkern.cast_per_token(everyone[source][0][t : t + 1])
        compare.assert_bitwise(recv[0][row : row + 1], q)
        compare.assert_bitwise(recv[1][row : row + 1].contiguous(), scale)
    again, again_idx, again_weights, same, _ = buffer.dispatch(
        x, handle=handle, topk_weights=weights
    )
    assert same is handle and torch.equal(again_idx, recv_idx)
    for row, (source, t, _, weight) in enumerate(received_by(me, everyone)):
        compare.assert_bitwise(again[row], everyone[source][0][t])
        assert torch.equal(again_weights[row], weight)


def check_combine():
    world, me = dist.get_world_size(), dist.get_rank()
    E = PER_RANK * world
    x, idx, weights = all_tokens(world, E, TOPK, HIDDEN)[me]
    valid = (idx >= 0) & (idx < E)
    ranks = torch.where(valid, idx // PER_RANK, world)
    times = torch.nn.functional.one_hot(ranks, world + 1).amax(1)[:, :-1].sum(1)[:, None]
    buffer = make_buffer()
    recv, _, recv_weights, handle, _ = buffer.dispatch(x, idx, weights, num_experts=E)
    out, out_weights, event = buffer.combine(recv, handle, recv_weights)
    event.current_stream_wait()
    compare.assert_close(out, x.double() * times)  # each token's row, once per rank
    assert torch.equal(out_weights, torch.where(valid, weights, 0.0))
    bias = (torch.ones_like(x), torch.full_like(x, 2.0))
    out, none, _ = buffer.combine(recv, handle, bias=bias)
    assert none is None
    compare.assert_close(out, x.double() * times + 3)


def check_expanded_layout():
    world, me = dist.get_world_size(), dist.get_rank()
    E, alignment = PER_RANK * world, 4
    everyone = all_tokens(world, E, TOPK, HIDDEN)
    x, idx, weights = everyone[me]
    valid = (idx >= 0) & (idx < E)
    pair = deepkern.cast_per_token(x)
    want = received_by(me, everyone)
    for multiple in (True, False):
        buffer = make_buffer(allow_multiple_reduction=multiple)
        (q, scale), none, row_weights, handle, _ = buffer.dispatch(
            pair, idx, weights, num_experts=E, expert_alignment=alignment, do_expand=True,
            do_zero_padding=True,
        )  # fmt: skip
        assert none is None and row_weights.shape == (len(q),)
        assert len(q) == len(scale) == handle.num_expanded_tokens
        used = torch.zeros(len(q), dtype=torch.bool)
        start = 0
        for expert in range(PER_RANK):
            count = handle.num_unaligned_recv_tokens_per_expert[expert].item()
            end = handle.psum_num_recv_tokens_per_expert[expert].item()
            assert end - start == count
            sent = [(s, t, w[e == expert]) for s, t, e, w in want if (e == expert).any()]
            assert len(sent) == count
            for row, (source, t, weight) in enumerate(sent, start):
                token, token_scale = deepkern.cast_per_token(everyone[source][0][t : t + 1])
                compare.assert_bitwise(q[row : row + 1], token)
                compare.assert_bitwise(scale[row : row + 1], token_scale)
                assert row_weights[row] == weight[0]
            used[start:end] = True
            start = -(-end // alignment) * alignment
        assert start == len(q)
        assert not q[~used].float().any() and not row_weights[~used].any()
        for row, (_, _, experts, _) in enumerate(want):
            slots = handle.recv_src_metadata[row, 2:]
            assert torch.equal(slots >= 0, experts >= 0)

        y = (cast_back((q, scale)) * row_weights[:, None]).bfloat16()
        y[~used] = torch.nan  # padding rows are not read
        out, out_weights, _ = buffer.combine(y, handle, row_weights)
        rounded = (cast_back(pair)[:, None] * weights[..., None]).bfloat16().double()
        compare.assert_close(out, (rounded * valid[..., None]).sum(1))
        assert torch.equal(out_weights, torch.where(valid, weights, 0.0))
        again = buffer.dispatch(pair, handle=handle, topk_weights=weights)
        compare.assert_bitwise(again[0][0], q)
        assert torch.equal(again[2], row_weights)


def check_without_tokens():
    """No rank has a token."""
    world = dist.get_world_size()
    buffer = deep_ep.ElasticBuffer(dist.group.WORLD)
    x, idx, weights = torch.zeros(0, 7).bfloat16(), torch.zeros(0, 2).long(), torch.zeros(0, 2)
    for do_expand in (False, True):
        recv, _, recv_weights, handle, _ = buffer.dispatch(
            x, idx, weights, num_experts=2 * world, do_expand=do_expand
        )
        assert recv.shape == (0, 7) and handle.num_recv_tokens_per_expert_list == [0, 0]
        assert buffer.combine(recv, handle, recv_weights)[0].shape == (0, 7)


def check_sizes_and_domains():
    world, me = dist.get_world_size(), dist.get_rank()
    buffer = deep_ep.ElasticBuffer(dist.group.WORLD, num_bytes=1 << 21)
    assert (buffer.rank_idx, buffer.num_ranks, buffer.num_bytes) == (me, world, 1 << 21)
    assert deep_ep.ElasticBuffer.get_buffer_size_hint(dist.group.WORLD, 8, 7) == 0
    assert buffer.get_logical_domain_size() == (1, world)
    assert deep_ep.get_logical_domain_size(dist.group.WORLD) == (1, world)
    assert buffer.get_theoretical_num_sms(8, 2) == buffer.get_theoretical_num_qps(0) == 0
    buffer.barrier(with_cpu_sync=True)
    raises(AttributeError, "ElasticBuffer.pp_send: deepkern does not have", lambda: buffer.pp_send)
    assert not hasattr(buffer, "engram_write")
    buffer.destroy()


def check_errors():
    world = dist.get_world_size()
    x, idx, w = torch.ones(2, 4).bfloat16(), torch.zeros(2, 1).long(), torch.ones(2, 1)
    raises(TypeError, "ElasticBuffer: group", deep_ep.ElasticBuffer, None)
    words = "ElasticBuffer: num_cpu_bytes: expected 0, got 8"
    raises(ValueError, words, deep_ep.ElasticBuffer, dist.group.WORLD, 8, 8)
    buffer = deep_ep.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=2)
    dispatch, name = buffer.dispatch, "ElasticBuffer.dispatch: "
    raises(TypeError, name + "topk_idx: expected a Tensor without a handle, got None", dispatch, x)
    raises(TypeError, name + "num_experts: expected an int without a handle", dispatch, x, idx)
    raises(ValueError, name + "num_max_tokens_per_rank: expected at least 2, got 1", dispatch, x,
           idx, num_experts=world, num_max_tokens_per_rank=1)  # fmt: skip
    raises(ValueError, name + "expert_alignment", dispatch, x, idx, num_experts=world,
           expert_alignment=0)  # fmt: skip
    raises(TypeError, name + "handle: expected an EPHandle", dispatch, x, handle=(1, 2))
    handle = dispatch(x, idx, num_experts=world)[3]
    raises(ValueError, name + "topk_idx: expected None with a handle", dispatch, x, idx,
           handle=handle)  # fmt: skip
    raises(ValueError, name + "expert_alignment: expected 1, as in", dispatch, x, handle=handle,
           expert_alignment=4)  # fmt: skip
    raises(ValueError, name + "x: expected 2 tokens", dispatch, x[:1], handle=handle)
    raises(TypeError, "ElasticBuffer.combine: handle", buffer.combine, x, None)
    rows = x.new_ones(99, 4)
    raises(ValueError, "ElasticBuffer.combine: x: expected", buffer.combine, rows, handle)
    rows = x.new_ones(handle.num_recv_tokens, 4)
    words = "ElasticBuffer.combine: topk_weights: expected shape"
    raises(ValueError, words, buffer.combine, rows, handle, w.new_ones(99, 1))


def everything(backend):
    return run_checks(globals(), backend)
