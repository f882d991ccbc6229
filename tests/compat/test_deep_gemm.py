"""compat.deep_gemm: every function against float64 on the same inputs, in DeepGEMM's layouts."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import deepkern
import deepkern.compat.deep_gemm as deep_gemm
from deepkern.testing import compare

F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn


def normal(generator, *shape, dtype=BF16):
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def per_token(x, use_ue8m0=False):
    with deepkern.backend("torch"):
        q, scale = deep_gemm.per_token_cast_to_fp8(x.flatten(0, -2), use_ue8m0)
    return q.view(x.shape), scale.view(*x.shape[:-1], scale.shape[-1])


def per_block(x, use_ue8m0=False):
    """Casts one matrix, or a batch matrix by matrix: DeepGEMM's cast accepts one only."""
    if x.dim() == 3:
        q, scale = zip(*(per_block(matrix, use_ue8m0) for matrix in x), strict=True)
        return torch.stack(q), torch.stack(scale)
    with deepkern.backend("torch"):
        return deep_gemm.per_block_cast_to_fp8(x, use_ue8m0)


def widen(operand):
    """The values of (data, scale) in float64; the scale is per 1x128 or per 128x128."""
    q, scale = operand
    if scale.shape[-2] != q.shape[-2]:
        scale = scale.repeat_interleave(128, -2)[..., : q.shape[-2], :]
    return q.double() * scale.repeat_interleave(128, -1)[..., : q.shape[-1]].double()


def to_layout(operand, letter, row_major):
    """The operand, or its contiguous transpose if `letter` is not `row_major`."""
    return operand if letter == row_major else tuple(x.mT.contiguous() for x in operand)


def strided_output(shape, dtype, device):
    """An output with a row pitch, filled with NaN."""
    *lead, rows, columns = shape
    return torch.full((*lead, rows + 1, columns + 5), torch.nan, dtype=dtype, device=device)[
        ..., 1:, 3 : 3 + columns
    ]


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize(("dtype", "added"), [(BF16, "none"), (F32, "d"), (BF16, "d"), (F32, "c")])
def test_gemm(backend, generator, layout, dtype, added):
    M, N, K = 70, 140, 200
    x, w = normal(generator, M, K), normal(generator, N, K)
    a, b = per_token(x), per_block(w)
    d = strided_output((M, N), dtype, x.device)
    c, addend = None, torch.zeros(())
    if added != "none":
        addend = normal(generator, M, N, dtype=dtype) * 32
        c = d.copy_(addend) if added == "d" else addend.clone()
    gemm = getattr(deep_gemm, f"fp8_gemm_{layout}")
    assert gemm(to_layout(a, layout[0], "n"), to_layout(b, layout[1], "t"), d, c=c) is None
    compare.assert_close(d, widen(a) @ widen(b).T + addend.double(), op="fp8_gemm_nt")
    assert deep_gemm.calc_diff(d, x.double() @ w.double().T + addend.double()) < 1e-3
    assert d._base[0].isnan().all() and d._base[:, :3].isnan().all()
    if added == "c":
        compare.assert_bitwise(c, addend)


def test_scale_layouts_give_the_same_bits(backend, generator):
    M, N, K = 37, 130, 700
    a, b = (per_token(normal(generator, rows, K), use_ue8m0=True) for rows in (M, N))
    want = torch.empty(M, N, dtype=F32, device=generator.device)
    deep_gemm.fp8_gemm_nt(a, b, want, recipe=(1, 1, 128))
    compare.assert_close(want, widen(a) @ widen(b).T, op="fp8_gemm_nt")
    layouts = (
        deep_gemm.get_mn_major_tma_aligned_tensor,
        deep_gemm.get_mn_major_tma_aligned_packed_ue8m0_tensor,
        lambda sf: deep_gemm.transform_sf_into_required_layout(sf, len(sf), K, (1, 128)),
    )
    for layout in layouts:
        got = torch.empty_like(want)
        deep_gemm.fp8_gemm_nt((a[0], layout(a[1])), (b[0], layout(b[1])), got, None, [1, 1, 128])
        compare.assert_bitwise(got, want)
    got = torch.empty_like(want)
    packed = [(q.mT.contiguous(), layouts[1](sf).mT) for q, sf in (a, b)]
    deep_gemm.fp8_gemm_tn(*packed, got, recipe_a=(1, 128), recipe_b=(1, 128))
    compare.assert_bitwise(got, want)


def contiguous_groups(generator, rows, alignment):
    """Groups of `rows`, padded to the alignment, and 3 rows more: index per row, end per group."""
    index, ends = [], []
    for group, n in enumerate(rows):
        ends.append(len(index) + n)
        index += [group] * n + [-1] * (-n % alignment)
    index += [-1] * 3
    return (torch.tensor(x, dtype=torch.int32, device=generator.device) for x in (index, ends))


@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_m_grouped_contiguous(backend, generator, layout, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")  # the index computed from `ends` passes the check too
    N, K, alignment = 136, 200, 32
    index, ends = contiguous_groups(generator, (33, 0, 64, 5), alignment)
    used, x, w = index >= 0, normal(generator, len(index), K), normal(generator, 4, N, K)
    a, b = per_token(x), per_block(w)
    a[0].view(torch.uint8)[~used] = 0x7F  # NaN in padding has no effect
    d = strided_output((len(index), N), BF16, x.device)
    b_operand = to_layout(b, layout[1], "t")
    gemm = getattr(deep_gemm, f"m_grouped_fp8_gemm_{layout}_contiguous")
    gemm(a, b_operand, d, index)
    want = torch.einsum("mk,mnk->mn", widen(a)[used], widen(b)[index[used]])
    compare.assert_close(d[used], want, op="fp8_gemm_nt")
    assert deep_gemm.calc_diff(d[used], torch.einsum("mk,mnk->mn", x[used], w[index[used]])) < 1e-3
    assert (d[~used] == 0).all()

    by_ends = torch.empty_like(d)
    try:
        deep_gemm.set_mk_alignment_for_contiguous_layout(alignment)
        gemm(a, b_operand, by_ends, grouped_layout=ends, use_psum_layout=True)
    finally:
        deep_gemm.set_mk_alignment_for_contiguous_layout(128)
    compare.assert_bitwise(by_ends, d)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_m_grouped_masked(backend, generator, dtype):
    G, M, N, K = 3, 40, 136, 200
    x, w = normal(generator, G, M, K), normal(generator, G, N, K)
    a, b = per_token(x), per_block(w)
    masked_m = torch.tensor([0, 40, 17], dtype=torch.int32, device=x.device)
    used = torch.arange(M, device=x.device) < masked_m[:, None]
    a[1][~used] = torch.nan
    column_major = a[0], deep_gemm.get_mn_major_tma_aligned_tensor(a[1])
    d = strided_output((G, M, N), dtype, x.device)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(column_major, b, d, masked_m, 20)
    compare.assert_close(d[used], (widen(a) @ widen(b).mT)[used], op="fp8_gemm_nt")
    assert deep_gemm.calc_diff(d[used], (x.double() @ w.double().mT)[used]) < 1e-3
    assert (d[~used] == 0).all()


def k_groups(x, ks, layout):
    """x [K, rows] cast group by group with one scale per 128x1, and its values in float64."""
    q, scales, values = [], [], []
    for group in x.split(ks):
        blocks = torch.nn.functional.pad(group.float(), (0, 0, 0, -len(group) % 128))
        amax = blocks.view(-(-len(group) // 128), 128, x.shape[1]).abs().amax(1)
        scale = amax.clamp(min=1e-4) / 448
        row_scale = scale.repeat_interleave(128, 0)[: len(group)]
        q.append((group.float() / row_scale).to(FP8))
        scales.append(scale)
        values.append(q[-1].double() * row_scale.double())
    scale = torch.cat(scales)
    if layout == "tn":
        return (torch.cat(q), scale), values
    return (torch.cat([part.T.flatten() for part in q]), scale.T), values


def run_k_grouped(generator, layout, ks, M, N, added):
    K, device = sum(ks), generator.device
    (a, a_groups), (b, b_groups) = (
        k_groups(normal(generator, K, rows), ks, layout) for rows in (M, N)
    )
    want = torch.stack([x.T @ y for x, y in zip(a_groups, b_groups, strict=True)])
    d = strided_output((len(ks), M, N), F32, device)
    c = None
    if added != "none":
        addend = normal(generator, len(ks), M, N, dtype=F32) * 32
        want += addend.double()
        c = d.copy_(addend) if added == "d" else addend
    lengths = torch.tensor(ks, dtype=torch.int32, device=device)
    gemm = getattr(deep_gemm, f"k_grouped_fp8_gemm_{layout}_contiguous")
    gemm(a, b, d, ks, lengths, c)
    compare.assert_close(d, want, op="fp8_gemm_nt")


@pytest.mark.parametrize("layout", ["tn", "nt"])
@pytest.mark.parametrize(
    ("ks", "added"),
    [((256, 0, 128), "d"), ((130, 0, 48, 1), "c"), ((0, 128), "none"), ((0, 0), "d")],
)
def test_k_grouped(backend, generator, layout, ks, added):
    run_k_grouped(generator, layout, list(ks), 40, 70, added)


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from(["tn", "nt"]),
    ks=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    M=st.integers(1, 20),
    N=st.integers(1, 20),
    added=st.sampled_from(["none", "d", "c"]),
    seed=st.integers(0, 2**31),
)
def test_k_grouped_of_any_lengths(layout, ks, M, N, added, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with deepkern.backend("torch"):
        run_k_grouped(torch.Generator(device).manual_seed(seed), layout, ks, M, N, added)


def test_k_grouped_of_cast_per_channel(backend, generator):
    """cast_per_channel returns more rows of scales than there are blocks."""
    ks = [100, 156]
    offsets = torch.tensor([0, 100, 256], dtype=torch.int32, device=generator.device)
    x, y = normal(generator, 256, 24), normal(generator, 256, 16)
    a, b = (deepkern.cast_per_channel(t, group_offsets=offsets) for t in (x, y))
    d = torch.empty(2, 24, 16, device=generator.device)
    deep_gemm.k_grouped_fp8_gemm_tn_contiguous(a, b, d, ks, offsets.diff())
    groups = zip(x.double().split(ks), y.double().split(ks), strict=True)
    want = torch.stack([s.T @ t for s, t in groups])
    assert deep_gemm.calc_diff(d, want) < 1e-3


def test_empty(backend, generator):
    a, b = per_token(normal(generator, 5, 0)), per_block(normal(generator, 7, 0))
    start = normal(generator, 5, 7)
    for c, want in ((None, torch.zeros_like(start)), (start, start)):
        d = torch.empty_like(start)
        deep_gemm.fp8_gemm_nt(a, b, d, c=c)
        compare.assert_bitwise(d, want)
    d = start.clone()
    deep_gemm.fp8_gemm_nt(a, b, d, c=d)
    compare.assert_bitwise(d, start)
    a, b = per_token(normal(generator, 0, 128)), per_block(normal(generator, 2, 7, 128))
    d, rows = start[:0], torch.empty(0, dtype=torch.int32, device=start.device)
    deep_gemm.fp8_gemm_nt(a, (b[0][0], b[1][0]), d)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, rows)
    masked = tuple(x.expand(2, *x.shape) for x in a)
    deep_gemm.m_grouped_fp8_gemm_nt_masked(masked, b, d.expand(2, 0, 7), rows.new_zeros(2), 1)
    flat = (a[0].flatten(), a[1])
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
        flat, flat, start.new_empty((0, 0, 0), dtype=F32), [], rows
    )


def test_no_device_to_host_copy():
    """Fake tensors, which have no values, are accepted."""
    with FakeTensorMode(), deepkern.backend("torch"):
        a = torch.empty(96, 256, dtype=FP8), torch.empty(96, 2)
        packed = a[0], torch.empty(96, 1, dtype=torch.int32)
        b = torch.empty(3, 40, 256, dtype=FP8), torch.empty(3, 1, 2)
        d, three = torch.empty(96, 40), torch.empty(3, dtype=torch.int32)
        deep_gemm.fp8_gemm_nt(packed, (b[0][0], b[1][0]), d, c=d)
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, torch.empty(96, dtype=torch.int32))
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, three, use_psum_layout=True)
        a3 = tuple(x.view(3, 32, -1) for x in a)
        deep_gemm.m_grouped_fp8_gemm_nt_masked(a3, b, d.view(3, 32, 40), three, 5)
        x = torch.empty(256, 40, dtype=FP8), torch.empty(3, 40)
        out = torch.empty(3, 40, 40)
        deep_gemm.k_grouped_fp8_gemm_tn_contiguous(x, x, out, [128, 0, 128], three, out)
        flat = x[0].flatten(), x[1].T
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat, flat, out, [128, 0, 128], three, out)
    # A read would raise.
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(()).item()


def test_older_names(backend, generator):
    index, _ = contiguous_groups(generator, (9, 3), 16)
    a, b = per_token(normal(generator, 35, 128)), per_block(normal(generator, 2, 24, 128))
    d, want = (normal(generator, 35, 24) for _ in range(2))
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, want, index)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices=index)
    compare.assert_bitwise(d, want)
    deep_gemm.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(a, b, d.zero_(), index)
    compare.assert_bitwise(d, want)

    one = b[0][0], b[1][0]
    deep_gemm.fp8_gemm_nt(a, one, want)
    deep_gemm.gemm_fp8_fp8_bf16_nt(a, one, d)
    compare.assert_bitwise(d, want)

    a = tuple(x[:32].view(2, 16, -1) for x in a)
    d, want, masked_m = d[:32].view(2, 16, 24), want[:32].view(2, 16, 24), index[:2] + 5
    deep_gemm.m_grouped_fp8_gemm_nt_masked(a, b, want, masked_m, 5)
    for older in ("fp8_m_grouped_gemm_nt_masked", "m_grouped_gemm_fp8_fp8_bf16_nt_masked"):
        getattr(deep_gemm, older)(a, b, d.zero_(), masked_m, 5)
        compare.assert_bitwise(d, want)

    x = per_token(normal(generator, 128, 128))
    d, want = (normal(generator, 1, 128, 128, dtype=F32) for _ in range(2))
    k, flat = torch.tensor([128], dtype=torch.int32, device=d.device), (x[0].flatten(), x[1])
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat, flat, want, [128], k)
    deep_gemm.k_grouped_fp8_gemm_nt_contiguous(flat, flat, d, ks=[128], ks_tensor=k)
    compare.assert_bitwise(d, want)


FP8_GEMM = "a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims='{}', "
GROUPED = "recipe=None, recipe_a=None, recipe_b=None, compiled_dims='nk', disable_ue8m0_cast=False"
K_GROUPED = (
    "a, b, d, ks_cpu, grouped_layout, c=None, recipe=(1, 1, 128), compiled_dims='mn', "
    "use_psum_layout=False"
)
PSUM = "use_psum_layout=False, ensure_zero_padding=True"
SIGNATURES = {
    "fp8_gemm_nt": FP8_GEMM.format("nk") + "disable_ue8m0_cast=False",
    "fp8_gemm_nn": FP8_GEMM.format("nk") + "disable_ue8m0_cast=False",
    "fp8_gemm_tn": FP8_GEMM.format("mn") + "disable_ue8m0_cast=False",
    "fp8_gemm_tt": FP8_GEMM.format("mn") + "disable_ue8m0_cast=False",
    "m_grouped_fp8_gemm_nt_contiguous": (
        f"a, b, d, grouped_layout, {GROUPED}, {PSUM}, expected_m_for_psum_layout=None"
    ),
    "m_grouped_fp8_gemm_nn_contiguous": f"a, b, d, grouped_layout, {GROUPED}, {PSUM}",
    "m_grouped_fp8_gemm_nt_masked": f"a, b, d, masked_m, expected_m, {GROUPED}",
    "k_grouped_fp8_gemm_nt_contiguous": K_GROUPED,
    "k_grouped_fp8_gemm_tn_contiguous": K_GROUPED,
    "transform_sf_into_required_layout": (
        "sf, mn, k, recipe, num_groups=None, is_sfa=None, disable_ue8m0_cast=False, "
        "psum_layout=None"
    ),
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "sf, psum_layout=None",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m=None",
    "per_token_cast_to_fp8": "x, use_ue8m0, gran_k=128, use_packed_ue8m0=False",
    "per_channel_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_block_cast_to_fp8": "x, use_ue8m0, gran_k=128",
    "per_custom_dims_cast_to_fp8": "x, dims, use_ue8m0",
    "ceil_div": "x, y",
    "align": "x, y",
    "calc_diff": "x, y",
    "gemm_fp8_fp8_bf16_nt": "lhs, rhs, out",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous": "lhs, rhs, out, m_indices",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked": "lhs, rhs, out, masked_m, expected_m",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
    got = ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters
    )
    assert got == SIGNATURES[name]


def test_alignment():
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    assert deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout(1000) == 32
    for older in ("get_m_alignment_for_contiguous_layout", "get_k_alignment_for_contiguous_layout"):
        assert getattr(deep_gemm.utils, older)() == 128
    with pytest.raises(ValueError, match="new_value: expected at least 1, got 0"):
        deep_gemm.set_mk_alignment_for_contiguous_layout(0)


def test_settings_are_stored():
    assert deep_gemm.get_num_sms() > 0 and deep_gemm.get_tc_util() == 100
    assert deep_gemm.get_pdl() is False
    deep_gemm.set_num_sms(20)
    deep_gemm.set_tc_util(60)
    deep_gemm.set_pdl(True)
    got = deep_gemm.get_num_sms(), deep_gemm.get_tc_util(), deep_gemm.get_pdl()
    deep_gemm.set_num_sms(0)
    deep_gemm.set_tc_util(0)
    deep_gemm.set_pdl(False)
    assert got == (20, 60, True)


def fp8(*shape):
    return torch.zeros(shape).to(FP8)


def dense(**changes):
    args = {
        "a": (fp8(4, 300), torch.ones(4, 3)),
        "b": (fp8(200, 300), torch.ones(2, 3)),
        "d": torch.empty(4, 200),
    }
    deep_gemm.fp8_gemm_nt(**(args | changes))


def k_grouped(layout="tn", **changes):
    args = {
        "a": (fp8(300, 4), torch.ones(4, 4)),
        "b": (fp8(300, 8), torch.ones(4, 8)),
        "d": torch.empty(2, 4, 8),
        "ks_cpu": [140, 160],
        "grouped_layout": torch.tensor([140, 160], dtype=torch.int32),
    }
    getattr(deep_gemm, f"k_grouped_fp8_gemm_{layout}_contiguous")(**(args | changes))


ERRORS = [
    (dense, {"recipe": (1, 1, 32)}, "recipe: expected None or (1, 128, 128) or (1, 1, 128), got "),
    (dense, {"recipe_b": (32, 32)}, "recipe_b: expected None or (1, 128) or (128, 128), got (32, "),
    (dense, {"a": torch.zeros(4, 300)}, "a: expected a pair (FP8 data, scale), got Tensor"),
    (dense, {"a": (fp8(4, 300), torch.ones(4))}, "a[1]: expected rank 2 or 3, got rank 1"),
    (dense, {"b": (fp8(200, 300).float(), torch.ones(2, 3))}, "b[0]: expected dtype float8_e4m3fn"),
    (dense, {"b": (fp8(200, 299), torch.ones(2, 3))}, "b[0]: expected K = 300"),
    (dense, {"a": (fp8(4, 300), torch.ones(4, 2))}, "a_scale: expected K/128 = 3"),
    (
        dense,
        {"a": (fp8(4, 300), torch.ones(4, 2).int())},
        "a[1]: expected [..., 1] for 300 columns, got shape (4, 2)",
    ),
    (dense, {"d": torch.empty(4, 200).double()}, "d: expected dtype bfloat16 or float16 or float"),
    (dense, {"d": torch.empty(5, 200)}, "d: expected M = 4"),
    (dense, {"d": torch.empty(2, 4, 200)}, "d: expected rank 2"),
    (dense, {"c": torch.empty(1, 200)}, "c: expected M = 4"),
    (k_grouped, {"recipe": (1, 128, 128)}, "recipe: expected (1, 1, 128), got (1, 128, 128)"),
    (k_grouped, {"use_psum_layout": True}, "use_psum_layout: expected False, got True"),
    (k_grouped, {"ks_cpu": None}, "ks_cpu: expected the length of each group, got None"),
    (k_grouped, {"ks_cpu": [300]}, "ks_cpu: expected 2 lengths, got [300]"),
    (k_grouped, {"ks_cpu": [140, 140]}, "a[0]: expected 280 x 4 values for ks_cpu = [140, 140]"),
    (
        k_grouped,
        {"a": (fp8(300, 4), torch.ones(3, 4)), "b": (fp8(300, 8), torch.ones(3, 8))},
        "a[1]: expected 4 along K for ks_cpu = [140, 160], got 3",
    ),
    (k_grouped, {"d": torch.empty(2, 4, 8).bfloat16()}, "d: expected dtype float32"),
    (k_grouped, {"a": (fp8(300, 4), torch.ones(1, 4).int())}, "a[1]: expected dtype float32"),
    (k_grouped, {"layout": "nt"}, "b[1]: expected N = 8 in fp32 [N, S] strided, got shape (4, 8)"),
]


@pytest.mark.parametrize(("call", "changes", "message"), ERRORS)
def test_errors(call, changes, message):
    with deepkern.backend("torch"), pytest.raises((TypeError, ValueError)) as caught:
        call(**changes)
    text = str(caught.value)
    assert message in text
    assert text.startswith(("fp8_gemm_nt: ", "k_grouped_fp8_gemm_"))
