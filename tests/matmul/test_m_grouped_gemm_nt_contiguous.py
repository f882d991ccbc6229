"""m_grouped_gemm_nt_contiguous: any index, layouts, batch invariance, equal to gemm_nt."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.testing import compare, ops
from deepkern.testing.random_inputs import values

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
REAL = [BF16, F16, F32]
OP = "m_grouped_gemm_nt_contiguous"
product = deepkern.m_grouped_gemm_nt_contiguous


def make(generator, M, N, K, G, **kwargs) -> tuple:
    return ops.inputs(OP, generator, M=M, N=N, K=K, G=G, **kwargs)


def with_index(args, index) -> tuple:
    """The arguments with group_index replaced by `index`."""
    index = torch.as_tensor(index, dtype=torch.int32, device=args[0].device)
    return (*args[:2], index, *args[3:])


def check(args) -> torch.Tensor:
    with compare.poison():
        got = product(*args)
    compare.assert_matches(OP, got, deepkern.reference.m_grouped_gemm_nt_contiguous(*args))
    return got


GROUPS = {
    "no groups": [-1] * 50,
    "one group": [2] * 50,
    "padding between groups": [0, 0, -1] * 6 + [1] * 10 + [-1] * 10 + [3] * 12,
    "last group empty": [0] * 25 + [1] * 25,
    "first groups empty": [3] * 50,
    "one row per group": [*range(4), *[-1] * 46],
    "unsorted": [3, 0, 2, 1, -1] * 10,
    "out of range": [4, -2, 2**31 - 1, -(2**31), 1] * 10,
    "descending": [3] * 20 + [2] * 10 + [1] * 10 + [0] * 10,
}


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_group_index(backend, generator, groups):
    args = with_index(make(generator, 50, 70, 72, G=4, out_dtype=F32), groups)
    got = check(args)
    skipped = torch.tensor([not 0 <= g < 4 for g in groups])
    assert not got[skipped.to(got.device)].any()


@settings(max_examples=6, deadline=None)
@given(
    groups=st.lists(st.integers(-2, 6), max_size=60),
    G=st.integers(0, 5),
    N=st.integers(0, 100),
    K=st.integers(0, 150),
    dtype=st.sampled_from(REAL),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_groups(groups, G, N, K, dtype, transposed, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    args = make(generator, len(groups), N, K, G, dtype=dtype, transposed=transposed)
    with deepkern.backend("triton"):
        check(with_index(args, groups))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_row_bits_independent_of_batch(backend, generator, dtype):
    """For a single row, gemm_nt with its group, and the first rows of the batch."""
    a, b, index, _ = make(generator, 37, 40, 72, G=3, dtype=dtype)
    got = product(a, b, index, F32)
    for row in (0, 17, 36):
        only = slice(row, row + 1)
        alone = product(a[only], b, index[only], F32)
        compare.assert_bitwise(alone, got[only], f"row {row}")
        if index[row] >= 0:
            single = deepkern.gemm_nt(a[only], b[int(index[row])], F32)
            compare.assert_bitwise(single, got[only], f"row {row} without groups")
    compare.assert_bitwise(product(a[:5], b, index[:5], F32), got[:5], "5 rows")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REAL)
def test_row_bits_independent_of_batch_on_gpu(generator, dtype):
    a, b, *_ = make(generator, 257, 4096, 2048, G=4, dtype=dtype)
    index = torch.full((257,), 2, dtype=torch.int32, device=a.device)
    with deepkern.backend("triton"):
        whole = product(a, b, index, F32)
        compare.assert_bitwise(deepkern.gemm_nt(a, b[2], F32), whole, "without groups")
        for M in range(1, 258):
            part = product(a[:M], b, index[:M], F32)
            compare.assert_bitwise(part, whole[:M], f"{M} rows")


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_absorbed_projections(backend, generator, dtype):
    """Rows sorted by head, and the weight of the heads [H, nope + v, R] read in both directions."""
    T, H, nope, R = 3, 4, 16, 48
    w = values(generator, H, nope + 24, R, dtype=dtype)
    q = values(generator, H * T, nope, dtype=dtype)
    head = torch.arange(H, dtype=torch.int32, device=q.device).repeat_interleave(T)
    absorbed = check((q, w[:, :nope].mT, head, F32))
    want = torch.einsum("htn,hnr->htr", q.view(H, T, nope).double(), w[:, :nope].double())
    compare.assert_close(absorbed, want.reshape(H * T, R).float())
    check((values(generator, H * T, R, dtype=dtype), w[:, nope:], head, F32))


def test_strided_index_and_operands(backend, generator):
    a, b, index, _ = make(generator, 60, 40, 90, G=4)
    strided = a[::2, 5:75], b[::2, 3:, 5:75], index[::2], F32
    got = check(strided)
    compact = tuple(x.contiguous() if isinstance(x, torch.Tensor) else x for x in strided)
    compare.assert_bitwise(product(*compact), got)


def test_more_groups_than_rows(kernel_backend, generator):
    check(make(generator, 5, 40, 64, G=300, out_dtype=F32))


def test_debug_check_of_group_index(backend, generator, monkeypatch):
    monkeypatch.setenv("DEEPKERN_DEBUG", "1")
    args = with_index(make(generator, 3, 8, 64, G=3), [0, 3, 1])
    with pytest.raises(ValueError) as caught:
        product(*args)
    assert str(caught.value) == f"{OP}: group_index: expected values from -1 to 2, got [3]"


def test_operands_of_different_dtypes(backend, generator):
    a, b, index, _ = make(generator, 3, 8, 64, G=3)
    with pytest.raises(TypeError, match=rf"{OP}: b: expected dtype torch.bfloat16 .*, got"):
        product(a, b.float(), index)
