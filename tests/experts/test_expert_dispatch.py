"""expert_dispatch: against a Python loop, with hostile indices; order, padding, bits, gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern import reference
from deepkern.experts.rows import expert_dispatch_scan_kernel, place_rows
from deepkern.testing import compare, ops
from deepkern.testing.routing import indices

FP8 = torch.float8_e4m3fn
HOSTILE = [-1, -2, -(2**31), -(2**63), 2**63 - 1, 2**32, 2**32 + 1, 100]


def loop(topk_idx: list[list[int]], topk: int, E: int, alignment: int):
    """(token of each row or None, expert of each row or -1, counts, handle), by Python loops."""
    of_expert = [
        [(t, j) for t, row in enumerate(topk_idx) for j in range(topk) if row[j] == e]
        for e in range(E)
    ]
    token, group, handle = [], [], [[-1] * topk for _ in topk_idx]
    for e, assignments in enumerate(of_expert):
        for t, j in assignments:
            handle[t][j] = len(token)
            token.append(t)
            group.append(e)
        while len(token) % alignment:
            token.append(None)
            group.append(-1)
    return token, group, [len(a) for a in of_expert], handle


def assert_matches_loop(
    got,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    E: int,
    alignment: int,
    num_assigned: int | None = None,
) -> None:
    out, scale, group_index, counts, handle = got
    token, group, want_counts, want_handle = loop(
        topk_idx.tolist(), topk_idx.shape[1], E, alignment
    )
    rows, N = out.shape[0], topk_idx.numel()
    if num_assigned is not None:
        N = min(N, num_assigned)
    assert rows % alignment == 0 and rows <= N + min(E, N) * (alignment - 1)
    if num_assigned is None or num_assigned >= sum(want_counts):
        assert rows >= len(token)
    token, group = token[:rows], group[:rows]
    want_handle = [[row if row < rows else -1 for row in of_token] for of_token in want_handle]
    assert counts.tolist() == want_counts and handle.tolist() == want_handle
    assert group_index.tolist() == group + [-1] * (rows - len(group))
    want = torch.zeros_like(out)
    for row, t in enumerate(token):
        if t is not None:
            want[row] = x[t]
    compare.assert_bitwise(out, want)
    assert scale is None
    dtypes = [group_index.dtype, counts.dtype, handle.dtype]
    assert dtypes == [torch.int32] * 3


@pytest.mark.parametrize("name", ["torch", "triton"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_against_a_loop(name, data):
    E, topk = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 4))
    expert = st.integers(0, E - 1) | st.sampled_from(HOSTILE)
    rows = data.draw(st.lists(st.lists(expert, min_size=topk, max_size=topk), max_size=9))
    alignment = data.draw(st.integers(1, 5))
    num_assigned = data.draw(st.none() | st.integers(0, 12))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    topk_idx = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), topk)
    x = torch.arange(1.0, 1 + 3 * len(rows), device=device).view(-1, 3)
    with deepkern.backend(name):
        got = deepkern.expert_dispatch(x, topk_idx, E, None, alignment, num_assigned=num_assigned)
    assert_matches_loop(got, x, topk_idx, E, alignment, num_assigned)


@pytest.mark.parametrize("alignment", [1, 2, 128])
def test_several_chunks(backend, alignment, generator):
    """More assignments than one program counts, and more experts than one step."""
    topk_idx = indices(generator, T=70, E=20, topk=8)
    x = torch.randn(70, 2, generator=generator, device=generator.device)
    got = deepkern.expert_dispatch(x, topk_idx, 20, alignment=alignment)
    assert_matches_loop(got, x, topk_idx, 20, alignment)


@pytest.mark.parametrize("alignment", [1, 3])
def test_more_experts_than_a_step(backend, alignment, generator):
    """One program adds up the tokens of 1024 experts per step; 2500 take three."""
    topk_idx = indices(generator, T=40, E=2500, topk=8)
    topk_idx[0, :5] = torch.tensor([0, 1023, 1024, 2047, 2048], device=generator.device)
    topk_idx[1, :3] = torch.tensor([2499, 2500, 1024], device=generator.device)
    x = torch.randn(40, 2, generator=generator, device=generator.device)
    got = deepkern.expert_dispatch(x, topk_idx, 2500, alignment=alignment)
    assert_matches_loop(got, x, topk_idx, 2500, alignment)


@pytest.mark.parametrize("E", [5, 1500])
def test_row_ranges(E, generator):
    """The bounds for a grouped product: rows - first row, last row + 1; zeros without tokens."""
    topk_idx = indices(generator, T=50, E=E, topk=4)
    rows, device = topk_idx.numel(), topk_idx.device
    int32 = {"dtype": torch.int32, "device": device}
    group_index, counts = torch.empty(rows, **int32), torch.empty(E, **int32)
    handle, bounds = torch.empty(topk_idx.shape, **int32), torch.empty(2, E, **int32)
    place_rows(topk_idx, 1, group_index, counts, handle, bounds)
    end = counts.cumsum(0)
    want = torch.stack([rows - (end - counts), end]).where(counts > 0, 0).int()
    assert torch.equal(bounds, want)


def test_scan_of_more_chunks_than_a_step(generator):
    counts = torch.randint(99, (300, 21), generator=generator, device=generator.device).int()
    earlier, tokens_per_expert = counts.clone(), counts.new_empty(21)
    expert_dispatch_scan_kernel[(2,)](earlier, tokens_per_expert, 300, 21, CHUNKS=128, EXPERTS=16)
    assert torch.equal(earlier, counts.cumsum(0).int() - counts)
    assert torch.equal(tokens_per_expert, counts.sum(0).int())


@pytest.mark.parametrize("alignment", [1, 4])
def test_all_to_one_expert(backend, alignment, generator):
    x = torch.randn(70, 5, generator=generator, device=generator.device)
    topk_idx = torch.full((70, 4), 6, device=generator.device)
    got = deepkern.expert_dispatch(x, topk_idx, 8, alignment=alignment)
    assert_matches_loop(got, x, topk_idx, 8, alignment)
    assert got[3].tolist() == [0] * 6 + [280, 0]
    assert torch.equal(got[0][:280], x.repeat_interleave(4, 0))


def test_row_bound_is_reached(backend, device):
    """3 experts with 5, 1 and 1 tokens and an alignment of 4 need all rows."""
    topk_idx = torch.tensor([[0], [0], [0], [0], [0], [1], [2]], device=device)
    out, _, group_index, _, _ = deepkern.expert_dispatch(
        torch.ones(7, 1, device=device), topk_idx, 3, alignment=4
    )
    assert out.shape[0] == 16
    assert group_index.tolist() == [0] * 5 + [-1] * 3 + [1, -1, -1, -1, 2, -1, -1, -1]


@pytest.mark.parametrize(
    ("T", "topk"), [(0, 3), (4, 0), (0, 0)], ids=["no_tokens", "no_slots", "neither"]
)
def test_empty(backend, T, topk, device):
    x, topk_idx = torch.zeros(T, 7, device=device), torch.zeros(T, topk, device=device).long()
    out, scale, group_index, counts, handle = deepkern.expert_dispatch(x, topk_idx, 6, None, 4)
    assert out.shape == (0, 7) and scale is None and group_index.shape == (0,)
    assert counts.tolist() == [0] * 6 and handle.shape == (T, topk)


def test_no_valid_index(backend, device):
    x = torch.full((5, 300), torch.nan, device=device)
    topk_idx = torch.full((5, 2), -1, device=device)
    out, _, group_index, counts, handle = deepkern.expert_dispatch(x, topk_idx, 3)
    assert (out == 0).all() and (group_index == -1).all() and (handle == -1).all()
    assert counts.tolist() == [0, 0, 0]


def test_all_fp8_codes_and_scales(backend, generator):
    x = torch.arange(256, device=generator.device).to(torch.uint8).repeat(2)[None, :400]
    x = torch.cat([x, x.flip(1), x.roll(7, 1)]).contiguous().view(FP8)  # includes NaN codes
    scale = torch.rand(4, 3, generator=generator, device=generator.device).t()  # column-major
    topk_idx = torch.tensor([[2, 0], [0, -1], [2, 2]], device=generator.device)
    out, out_scale, group_index, _, handle = deepkern.expert_dispatch(x, topk_idx, 3, scale, 2)
    token = torch.tensor([0, 1, 0, 2, 2], device=generator.device)
    rows = torch.tensor([0, 1, 2, 3, 4], device=generator.device)
    assert group_index.tolist() == [0, 0, 2, 2, 2, -1, -1, -1]
    assert handle.tolist() == [[2, 0], [1, -1], [3, 4]]
    assert torch.equal(out.view(torch.uint8)[rows], x.view(torch.uint8)[token])
    assert torch.equal(out_scale[rows], scale[token])
    assert (out.view(torch.uint8)[5:] == 0).all() and (out_scale[5:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("K", [1, 100, 3584, 7168])
def test_hidden_sizes(kernel_backend, K, dtype, generator):
    args = ops.inputs("expert_dispatch", generator, T=5, E=4, topk=3, K=K, dtype=dtype)
    want = reference.expert_dispatch(*args)
    compare.assert_matches("expert_dispatch", deepkern.expert_dispatch(*args), want)


@pytest.mark.parametrize("alignment", [1, 4])
def test_every_token_to_every_expert(backend, alignment, generator):
    """topk = E: each expert gets all tokens, in order."""
    x = torch.randn(11, 6, generator=generator, device=generator.device)
    topk_idx = torch.rand(11, 7, generator=generator, device=generator.device).argsort(1)
    got = deepkern.expert_dispatch(x, topk_idx, 7, alignment=alignment)
    assert_matches_loop(got, x, topk_idx, 7, alignment)
    assert got[3].tolist() == [11] * 7 and torch.equal(got[0][:11], x)


@pytest.mark.parametrize("cast", ["fp32", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("K", [1, 100, 3584, 7168])
def test_cast(backend, K, dtype, cast, generator):
    """The bits of cast_per_token, then dispatch; with blocks of zeros, inf and NaN."""
    x = torch.randn(5, K, generator=generator, device=generator.device).to(dtype)
    x[1], x[2, :1], x[3, -1:] = 0.0, torch.inf, torch.nan
    topk_idx = indices(generator, 5, 4, 3, none=0.3)
    got = deepkern.expert_dispatch(x, topk_idx, 4, None, 2, cast)
    q, scale = reference.cast_per_token(x, cast)
    want = reference.expert_dispatch(q, topk_idx, 4, scale, 2)
    compare.assert_matches("expert_dispatch", got, want)


def test_cast_of_strided_rows(backend, generator):
    x = torch.randn(9, 300, generator=generator, device=generator.device)[::2, 5:205]
    topk_idx = indices(generator, 5, 4, 3)
    got = deepkern.expert_dispatch(x, topk_idx, 4, cast="fp32")
    want = deepkern.expert_dispatch(x.contiguous(), topk_idx, 4, cast="fp32")
    compare.assert_matches("expert_dispatch", got, want)


def test_nan_payload_is_copied(backend, device):
    bits = torch.tensor([0x7F81, -0x7F, 0x7FC0, -0x8000], dtype=torch.int16, device=device)
    x = bits.view(torch.bfloat16)[None]
    out, *_ = deepkern.expert_dispatch(x, torch.zeros(1, 1, device=device).long(), 1)
    assert torch.equal(out.view(torch.int16)[0], bits)


def test_strided_arguments_and_int32(backend, generator):
    device = generator.device
    x = torch.randn(9, 40, generator=generator, device=device)[::2, 5:17]
    wide = indices(generator, 5, 4, 9, none=0.3).clamp(-5, 2**31 - 1)
    want = deepkern.reference.expert_dispatch(x.clone(), wide[:, 2:5].clone(), 4)
    for dtype in (torch.int64, torch.int32):
        got = deepkern.expert_dispatch(x, wide.to(dtype)[:, 2:5], 4)
        compare.assert_matches("expert_dispatch", got, want)


def test_op_returns_empty_scale(backend, device):
    x, topk_idx = torch.ones(2, 4, device=device), torch.zeros(2, 1, device=device).long()
    scale = torch.ops.deepkern.expert_dispatch(x, topk_idx, 1)[1]
    assert scale.numel() == 0 and scale.dtype == torch.float32
    assert deepkern.expert_dispatch(x, topk_idx, 1)[1] is None
    assert deepkern.reference.expert_dispatch(x, topk_idx, 1)[1] is None


@pytest.mark.parametrize("order", ["reverse", "random:3"])
def test_any_order_of_programs(order, generator, monkeypatch):
    """The interpreter also raises if a program reads what another one writes."""
    monkeypatch.setenv("DEEPKERN_INTERPRETER_ORDER", order)
    args = ops.inputs("expert_dispatch", generator, T=90, E=20, topk=4, K=3, alignment=3)
    with deepkern.backend("triton"):
        got = deepkern.expert_dispatch(*args)
    compare.assert_matches("expert_dispatch", got, deepkern.reference.expert_dispatch(*args))


# With expert_combine


@pytest.mark.parametrize("alignment", [1, 3])
def test_round_trip(backend, alignment, generator):
    """Identity experts and weights that sum to 1 exactly give the tokens back."""
    x = torch.randn(21, 130, generator=generator, device=generator.device).bfloat16()
    topk_idx = indices(generator, 21, 6, 4, none=0.0)
    rows, _, _, _, handle = deepkern.expert_dispatch(x, topk_idx, 6, alignment=alignment)
    weights = torch.full((21, 4), 0.25, device=x.device)
    assert torch.equal(deepkern.expert_combine(rows, weights, handle), x)


def test_permuted_tokens(backend, generator):
    x = torch.randn(30, 9, generator=generator, device=generator.device)
    topk_idx, weights = indices(generator, 30, 7, 3), x[:, :3].contiguous()
    order = torch.randperm(30, generator=generator, device=generator.device)

    def layer(x, topk_idx, weights):
        rows, _, group_index, counts, handle = deepkern.expert_dispatch(x, topk_idx, 7)
        factor = torch.where(group_index < 0, 0, group_index + 1)[:, None]
        return deepkern.expert_combine(rows * factor, weights, handle), counts

    out, counts = layer(x, topk_idx, weights)
    got, got_counts = layer(x[order], topk_idx[order], weights[order])
    assert torch.equal(counts, got_counts)
    compare.assert_bitwise(got, out[order])


def test_gradient(backend, generator):
    x = torch.randn(12, 140, generator=generator, device=generator.device, requires_grad=True)
    topk_idx = indices(generator, 12, 5, 3, none=0.2)
    out, scale, *integers = deepkern.expert_dispatch(x, topk_idx, 5, None, 2)
    assert out.requires_grad and scale is None and not any(i.requires_grad for i in integers)
    towards = torch.randn(out.shape, generator=generator, device=out.device)
    (got,) = torch.autograd.grad(out, x, towards)
    token = loop(topk_idx.tolist(), 3, 5, 2)[0]
    want = torch.zeros(12, 140, dtype=torch.float64, device=x.device)
    for row, t in enumerate(token):
        if t is not None:
            want[t] += towards[row]
    compare.assert_close(got, want)


def test_fp8_has_no_gradient(backend, device):
    x = torch.ones(2, 4, device=device).to(FP8)
    scale = torch.ones(2, 1, device=device, requires_grad=True)
    out = deepkern.expert_dispatch(x, torch.zeros(2, 1, device=device).long(), 1, scale)
    assert not out[0].requires_grad and not out[1].requires_grad
    x = torch.ones(2, 4, device=device, requires_grad=True)
    out = deepkern.expert_dispatch(x, torch.zeros(2, 1, device=device).long(), 1, cast="fp32")
    assert not out[0].requires_grad and not out[1].requires_grad


def test_compiles_with_its_gradient(generator):
    x = torch.randn(6, 8, generator=generator, device=generator.device, requires_grad=True)
    weights = torch.rand(6, 2, generator=generator, device=x.device, requires_grad=True)
    topk_idx = indices(generator, 6, 4, 2)

    def loss(x, weights):
        rows, _, _, _, handle = deepkern.expert_dispatch(x, topk_idx, 4)
        return deepkern.expert_combine(rows.square(), weights, handle).sum()

    want = torch.autograd.grad(loss(x, weights), (x, weights))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, weights), (x, weights))
    for g, w in zip(got, want, strict=True):
        compare.assert_close(g, w)


# Errors


@pytest.mark.parametrize(("argument", "value"), [("num_experts", 0), ("alignment", 0)])
def test_bad_numbers(backend, argument, value, device):
    args = {
        "x": torch.ones(2, 4, device=device),
        "topk_idx": torch.zeros(2, 1, device=device).long(),
    }
    args |= {"num_experts": 3, argument: value}
    with pytest.raises(ValueError, match=f"^expert_dispatch: {argument}: expected .* got {value}"):
        deepkern.expert_dispatch(**args)


@pytest.mark.parametrize(
    ("dtype", "scaled"),
    [(FP8, False), (FP8, True), (torch.float32, True)],
    ids=["fp8", "fp8_scaled", "fp32_scaled"],
)
def test_cast_of_fp8_raises(backend, dtype, scaled, device):
    x, scale = torch.ones(2, 4, device=device).to(dtype), torch.ones(2, 1, device=device)
    topk_idx = torch.zeros(2, 1, device=device).long()
    with pytest.raises(ValueError, match="expert_dispatch: cast: expected None with FP8 rows"):
        deepkern.expert_dispatch(x, topk_idx, 3, scale if scaled else None, 1, "fp32")
    with pytest.raises(ValueError, match="expert_dispatch: cast: expected 'fp32' or 'ue8m0', got"):
        deepkern.expert_dispatch(torch.ones(2, 4, device=device), topk_idx, 3, cast="fp8")


def test_rows_exceed_int32(device):
    x = torch.empty(2**20, 0, device=device)
    topk_idx = torch.empty(2**20, 1, dtype=torch.int32, device=device)
    for num_assigned in (None, 1):
        with pytest.raises(
            ValueError, match="expert_dispatch: topk_idx: expected fewer than 2\\^31"
        ):
            deepkern.expert_dispatch(x, topk_idx, 2**20, None, 2**12, num_assigned=num_assigned)


def test_assignments_exceed_int32(device):
    """Raises even if few rows are needed: a kernel's int32 index would overflow."""
    one = torch.zeros(1, 1, dtype=torch.int32, device=device)
    many, x = one.expand(2**31, 1), torch.empty(1, 0, device=device).expand(2**31, 0)
    y, weights = torch.empty(1, 0, device=device), torch.ones(1, 1, device=device).expand(2**31, 1)
    calls = {
        "expert_dispatch: topk_idx": lambda: deepkern.expert_dispatch(x, many, 2, num_assigned=1),
        "expert_dispatch_backward: handle": lambda: deepkern.expert_dispatch_backward(y, many),
        "expert_combine: handle": lambda: deepkern.expert_combine(y, weights, many),
        "expert_combine_backward: handle": lambda: deepkern.expert_combine_backward(
            x, y, weights, many
        ),
        "expert_load: topk_idx": lambda: deepkern.expert_load(many, 2),
    }
    for name, call in calls.items():
        with (
            deepkern.backend("triton"),
            pytest.raises(ValueError, match=f"^{name}: expected fewer"),
        ):
            call()


def test_debug_check(backend, device, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    x, topk_idx = torch.ones(2, 4, device=device), torch.tensor([[0, -1], [2, 3]], device=device)
    deepkern.expert_dispatch(x, topk_idx, 4)
    with pytest.raises(ValueError, match=r"expert_dispatch: topk_idx: .* got 3 at \(1, 1\)"):
        deepkern.expert_dispatch(x, topk_idx, 3)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("expert_dispatch").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("expert_dispatch", generator, **size)
    compare.assert_matches(
        "expert_dispatch",
        deepkern.expert_dispatch(*args),
        deepkern.reference.expert_dispatch(*args),
    )


@pytest.mark.gpu
def test_cuda_graph(generator):
    """Captured once, replayed with other indices."""
    x = torch.randn(300, 256, generator=generator, device=generator.device)
    topk_idx, weights = indices(generator, 300, 20, 4), torch.rand(300, 4, device=x.device)

    def layer():
        out = deepkern.expert_dispatch(x, topk_idx, 20, None, 2)
        cast = deepkern.expert_dispatch(x, topk_idx, 20, None, 2, "ue8m0")
        return *out, *cast, deepkern.expert_combine(out[0], weights, out[4], x)

    with deepkern.backend("triton"), torch.no_grad():
        layer()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = layer()
        topk_idx.copy_(indices(generator, 300, 20, 4))
        graph.replay()
        for g, w in zip(got, layer(), strict=True):
            if g is not None:
                compare.assert_bitwise(g, w)
