"""The emulator's primitives one by one, and what it refuses."""

from __future__ import annotations

import ctypes

import pytest
import torch

from bench.emulator import build, sources
from deepkern.testing import compare

from .conftest import EmulatorFailure


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return build(sources())


def call(function, *args) -> None:
    message = ctypes.create_string_buffer(4096)
    if function(*args, message, len(message)):
        raise EmulatorFailure(message.value.decode())


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize("b_by_row", [True, False])
def test_bf16_products(kernels, b_by_row, a_in_registers, generator):
    """Both ways B may lie, and both places A may come from."""
    a, b = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    want = a.double() @ b.double().T
    lying = b if b_by_row else b.T.contiguous()
    for seed in range(6):
        out = torch.full((64, 64), torch.nan)
        how = ctypes.c_bool(b_by_row), ctypes.c_bool(a_in_registers), ctypes.c_uint64(seed)
        call(kernels.emulate_bf16_product, *(pointer(x) for x in (a, lying, out)), *how)
        compare.assert_close(out, want)


def test_store_matrix(kernels):
    out = torch.full((256,), -1, dtype=torch.int16)
    call(kernels.emulate_store_matrix, pointer(out), ctypes.c_uint64(3))
    assert out.tolist() == list(range(256))


def test_bulk_load_and_shuffles(kernels):
    given, out = torch.arange(32.0) + 1, torch.full((34,), torch.nan)
    call(kernels.emulate_bulk_load_and_shuffles, pointer(given), pointer(out), ctypes.c_uint64(4))
    assert out.tolist() == [*given.tolist(), given.sum().item(), 6.0]


REFUSED = (
    "a block asks for 232449 bytes of shared memory, there are 232448",
    "more registers at launch than there are",
    "barrier_arrive: no barrier was initialised at offset 0",
    "barrier_init: count 0",
    "256 lanes|32 lanes wait for barrier at offset 0, parity 0 (1 of 1 arrivals",
    "32 lanes wait for named barrier 3",
    "named barrier 16: there are 0 to 15",
    "named barrier 2: ",
    "store_shared: 4 bytes at offset 4093 are not in the 4096 bytes of shared memory",
    "31 lanes wait for warp_sync by all lanes",
    "cluster_wait: no cluster_arrive before",
    "wrote behind its shared memory",
    "barrier_init: initialised twice",
    "a kernel's own exception",
)


@pytest.mark.parametrize("misuse", range(len(REFUSED)))
def test_refuses(kernels, misuse):
    with pytest.raises(EmulatorFailure) as caught:
        call(kernels.emulate_misuse, misuse)
    assert any(part in str(caught.value) for part in REFUSED[misuse].split("|"))
