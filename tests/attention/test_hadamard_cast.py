"""hadamard_cast: against the matrix, and against separate transform and cast in fp32."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.runtime import arch
from deepkern.testing import compare


@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_against_the_matrix(backend, scale_format, generator):
    """Dequantized, in float64, within the rounding error of FP8."""
    N = 256
    x = torch.randn(5, N, generator=generator, device=generator.device).bfloat16()
    exponents = [[(i & j).bit_count() for j in range(N)] for i in range(N)]
    H = (-1.0) ** torch.tensor(exponents, dtype=torch.float64, device=x.device)
    want = (x.double() @ H) * N**-0.5
    q, scale = deepkern.hadamard_cast(x, N**-0.5, scale_format)
    assert q.shape == (5, N) and scale.shape == (5, 2)
    got = q.double() * scale.double().repeat_interleave(128, 1)
    assert ((got - want).abs() <= want.abs() / 16 + scale.double().amax() / 512).all()
    if scale_format == "ue8m0":
        assert (scale.log2() % 1 == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("N", [1, 16, 128, 512, 2048])
def test_same_bits_as_transform_then_cast(backend, dtype, N, generator):
    x = torch.randn(3, 2, N + 5, generator=generator, device=generator.device).to(dtype)
    x = x[..., 3 : 3 + N]
    for scale_format in ("fp32", "ue8m0"):
        q, scale = deepkern.hadamard_cast(x, N**-0.5, scale_format)
        rotated = deepkern.hadamard_transform(x.float(), N**-0.5)
        want_q, want_scale = deepkern.cast_per_token(rotated, scale_format)
        compare.assert_bitwise(q, want_q)
        compare.assert_bitwise(scale, want_scale)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "gfx942"])
def test_targets_without_native_cast(target, generator):
    x = torch.randn(9, 128, generator=generator, device=generator.device)
    with arch.compile_for(arch.ARCHS[target]), deepkern.backend("triton"):
        got = deepkern.hadamard_cast(x, 0.1)
    compare.assert_matches("hadamard_cast", got, deepkern.reference.hadamard_cast(x, 0.1))


def test_special_rows_do_not_affect_others(backend, generator):
    x = torch.randn(40, 128, generator=generator, device=generator.device)
    x[3], x[5, 7], x[6, 0] = 0.0, torch.nan, torch.inf
    q, scale = deepkern.hadamard_cast(x)
    compare.assert_matches("hadamard_cast", (q, scale), deepkern.reference.hadamard_cast(x))
    assert (q[3].float() == 0).all() and scale[3] == torch.tensor(1e-4) / 448
    assert q[5:7].float().isnan().all() and q[7:].float().isfinite().all()
    alone = deepkern.hadamard_cast(x[33:34])
    compare.assert_matches("hadamard_cast", alone, (q[33:34], scale[33:34]))


def test_errors(backend):
    for N in (3, 4096):
        with pytest.raises(ValueError, match="hadamard_cast: x: expected a power of two up to"):
            deepkern.hadamard_cast(torch.zeros(2, N))
    with pytest.raises(ValueError, match="hadamard_cast: scale_format: expected 'fp32' or"):
        deepkern.hadamard_cast(torch.zeros(2, 4), 1.0, "e8m0")
