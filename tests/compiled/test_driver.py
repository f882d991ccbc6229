"""libcuda over the PTX machine: what it refuses and with which error; Triton's launcher over it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import deepkern
from deepkern.runtime import ptx_library
from deepkern.runtime.compiled import TARGETS
from deepkern.runtime.ptx_library import PtxModule, encode_tensor_map

ROOT = Path(__file__).parents[2]
WITH_CLUSTERS = ("sm_90", "sm_100", "sm_120")


def ptx(target: str = "sm_90", version: str = "8.7", directives: str = "") -> str:
    """A kernel that does nothing."""
    return f"""//
// nothing
//
.version {version}
.target {target}
.address_size 64
.visible .entry nothing()
{directives}
{{
    ret;
}}
"""


def failure(call, *args, **kwargs) -> str:
    """The message of the KernelFailure that a call raises."""
    with pytest.raises(deepkern.KernelFailure) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# Modules.


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_90a"])
def test_ptx_for_the_device_or_an_older_one_loads(target):
    with deepkern.compiled("sm_90"):
        PtxModule(ptx(target)).run_kernel("nothing")


@pytest.mark.parametrize(
    ("device", "target"),
    [
        ("sm_80", "sm_89"),
        ("sm_80", "sm_90a"),
        ("sm_89", "sm_90"),
        ("sm_90", "sm_100"),
        ("sm_100", "sm_90a"),
        ("sm_120", "sm_100a"),
        ("sm_120", "sm_100f"),
    ],
    ids=lambda value: value,
)
def test_ptx_for_another_device_is_refused(device, target):
    with deepkern.compiled(device):
        message = failure(PtxModule, ptx(target))
    assert "CUDA_ERROR_INVALID_PTX" in message
    assert f"PTX for {target}, but the device is {device}" in message


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "CUDA_ERROR_INVALID_IMAGE: not PTX"),
        ("int main() {}", "CUDA_ERROR_INVALID_IMAGE: not PTX"),
        (".version eight\n.target sm_90", "CUDA_ERROR_INVALID_IMAGE: not PTX"),
        (".version 8.7\n.entry x() {}", "CUDA_ERROR_INVALID_IMAGE: not PTX"),
        ("\x7fELF...", "CUDA_ERROR_INVALID_IMAGE: a cubin"),
        (ptx(version="42.0"), "CUDA_ERROR_UNSUPPORTED_PTX_VERSION: PTX 42.0"),
    ],
    ids=["empty", "C", "no version number", "no target", "cubin", "version"],
)
def test_text_that_is_not_ptx_is_refused(text, error):
    with deepkern.compiled("sm_90"):
        assert error in failure(PtxModule, text)


def test_unknown_kernel_is_refused():
    with deepkern.compiled("sm_90"):
        message = failure(PtxModule(ptx()).run_kernel, "other")
    assert "CUDA_ERROR_NOT_FOUND: no kernel other" in message


def test_kernel_of_another_device_is_refused():
    with deepkern.compiled("sm_90"):
        module = PtxModule(ptx("sm_80"))
    with deepkern.compiled("sm_100"):
        message = failure(module.run_kernel, "nothing")
    assert "CUDA_ERROR_INVALID_CONTEXT" in message and "was loaded for sm_90" in message


# Launches.


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        ((0, 1, 1), "no dimension may be 0"),
        ((1, 0, 1), "no dimension may be 0"),
        ((2**31, 1, 1), "at most (2147483647, 65535, 65535)"),
        ((1, 65536, 1), "at most (2147483647, 65535, 65535)"),
        ((1, 1, 65536), "at most (2147483647, 65535, 65535)"),
    ],
    ids=["zero x", "zero y", "x", "y", "z"],
)
def test_bad_grid_is_refused(grid, reason):
    with deepkern.compiled("sm_90"):
        message = failure(PtxModule(ptx()).run_kernel, "nothing", grid=grid)
    assert "CUDA_ERROR_INVALID_VALUE: grid" in message and reason in message


@pytest.mark.parametrize(
    ("directives", "block", "reason"),
    [
        ("", (0, 1, 1), "no dimension may be 0"),
        ("", (1025, 1, 1), "at most (1024, 1024, 64)"),
        ("", (1, 1, 65), "at most (1024, 1024, 64)"),
        ("", (512, 2, 2), "2048 threads, at most 1024"),
        (".maxntid 128", (160, 1, 1), "160 threads, at most 128 (.maxntid)"),
        (".reqntid 128", (64, 1, 1), "the kernel requires (128, 1, 1) (.reqntid)"),
        (".reqntid 128", (64, 2, 1), "the kernel requires (128, 1, 1) (.reqntid)"),
    ],
    ids=["zero", "x", "z", "threads", "maxntid", "fewer than reqntid", "other than reqntid"],
)
def test_bad_block_is_refused(directives, block, reason):
    with deepkern.compiled("sm_90"):
        module = PtxModule(ptx(directives=directives))
        message = failure(module.run_kernel, "nothing", block=block)
    assert "CUDA_ERROR_INVALID_VALUE: block" in message and reason in message


SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376}


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_up_to_the_targets_limit(target):
    with deepkern.compiled(target):
        module = PtxModule(ptx("sm_80"))
        module.run_kernel("nothing", shared=SHARED[target])
        message = failure(module.run_kernel, "nothing", shared=SHARED[target] + 1)
    assert "CUDA_ERROR_INVALID_VALUE" in message and f"at most {SHARED[target]}" in message


@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_cluster_on_a_target_without_clusters_is_refused(target):
    with deepkern.compiled(target):
        message = failure(PtxModule(ptx("sm_80")).run_kernel, "nothing", grid=(2,), cluster=(2,))
    assert "CUDA_ERROR_NOT_SUPPORTED" in message and f"{target} has no clusters" in message


@pytest.mark.parametrize(
    ("target", "directives", "grid", "cluster", "reason"),
    [
        ("sm_90", "", (3,), (2,), "cluster (2, 1, 1) does not divide grid (3, 1, 1)"),
        ("sm_90", "", (4, 3), (2, 2), "does not divide"),
        ("sm_90", "", (32,), (32,), "at most 16 blocks on sm_90"),
        ("sm_120", "", (16,), (16,), "at most 8 blocks on sm_120"),
        ("sm_90", ".reqnctapercluster 4", (8,), (2,), "the kernel requires (4, 1, 1)"),
        ("sm_90", ".reqnctapercluster 4", (6,), (1,), "(4, 1, 1) does not divide"),
    ],
    ids=["x", "y", "32", "16 on sm_120", "other than declared", "declared"],
)
def test_bad_cluster_is_refused(target, directives, grid, cluster, reason):
    with deepkern.compiled(target):
        module = PtxModule(ptx(target, directives=directives))
        message = failure(module.run_kernel, "nothing", grid=grid, cluster=cluster)
    assert "CUDA_ERROR_INVALID_CLUSTER_SIZE: cluster" in message and reason in message


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("sizes", ctypes.c_uint32 * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
    ]


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint64), ("value", ctypes.c_uint32 * 16)]


def launch_ex(grid: int, shared: int = 0, attributes: dict | None = None) -> tuple[int, str]:
    """cuLaunchKernelEx of a new module without function attributes: the CUresult and the reason."""
    cuda = ptx_library.library()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuModuleLoadData(ctypes.byref(module), ptx().encode()) == 0
    assert cuda.cuModuleGetFunction(ctypes.byref(function), module, b"nothing") == 0
    attributes = attributes or {}
    array = (LaunchAttribute * max(len(attributes), 1))()
    for entry, (number, value) in zip(array, attributes.items(), strict=False):
        entry.number, entry.value = number, (ctypes.c_uint32 * 16)(*value)
    sizes = (ctypes.c_uint32 * 7)(grid, 1, 1, 32, 1, 1, shared)
    config = LaunchConfig(sizes, None, ctypes.addressof(array), len(attributes))
    code = cuda.cuLaunchKernelEx(ctypes.byref(config), function, None, None)
    assert cuda.cuModuleUnload(module) == 0
    return code, ptx_library.message()


CLUSTER, COOPERATIVE, ACCESS_POLICY = 4, 2, 1


def test_more_than_48_kib_need_the_attribute():
    with deepkern.compiled("sm_90"):
        assert launch_ex(1, shared=49152)[0] == 0
        code, message = launch_ex(1, shared=49153)
    assert code == 1 and "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES is 49152" in message


def test_cluster_of_16_needs_the_attribute():
    with deepkern.compiled("sm_90"):
        assert launch_ex(8, attributes={CLUSTER: (8, 1, 1)})[0] == 0
        code, message = launch_ex(16, attributes={CLUSTER: (16, 1, 1)})
    assert code == 912 and "CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED" in message


def test_cooperative_grid_must_fit_the_device():
    with deepkern.compiled("sm_90"):
        most = 132 * 32
        assert launch_ex(most, attributes={COOPERATIVE: (1,)})[0] == 0
        code, message = launch_ex(most + 1, attributes={COOPERATIVE: (1,)})
    assert code == 720 and f"holds at most {most}" in message


def test_unknown_launch_attribute_is_refused():
    with deepkern.compiled("sm_90"):
        code, message = launch_ex(1, attributes={ACCESS_POLICY: (1,)})
    assert code == 801 and "launch attribute 1" in message


def test_unknown_handles_are_refused():
    cuda = ptx_library.library()
    assert cuda.cuModuleUnload(ctypes.c_void_p(64)) == 400
    assert cuda.cuFuncSetCacheConfig(ctypes.c_void_p(64), 1) == 400
    assert cuda.cuLaunchKernelEx(None, ctypes.c_void_p(64), None, None) == 400
    assert cuda.cuDeviceGet(ctypes.byref(ctypes.c_int()), 1) == 101


def test_dynamic_shared_memory_attribute_has_a_limit():
    cuda = ptx_library.library()
    with deepkern.compiled("sm_120"):
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        cuda.cuModuleLoadData(ctypes.byref(module), ptx("sm_80").encode())
        cuda.cuModuleGetFunction(ctypes.byref(function), module, b"nothing")
        assert cuda.cuFuncSetAttribute(function, 8, 101376) == 0
        assert cuda.cuFuncSetAttribute(function, 8, 101377) == 1
        assert "at most 101376 on sm_120" in ptx_library.message()


@pytest.mark.parametrize(("attribute", "value"), [(16, 132), (75, 9), (10, 32), (97, 232448)])
def test_device_attributes(attribute, value):
    result = ctypes.c_int()
    with deepkern.compiled("sm_90"):
        ptx_library.library().cuDeviceGetAttribute(ctypes.byref(result), attribute, 0)
    assert result.value == value


def test_pointer_to_no_tensor_is_refused():
    query, result = ptx_library.library().cuPointerGetAttribute, ctypes.c_uint64()
    x = torch.zeros(8, 16)[:, 3:5]
    begin, end = x.data_ptr(), x.data_ptr() + (7 * 16 + 2) * 4

    def code(address: int) -> int:
        return query(ctypes.byref(result), 3, ctypes.c_uint64(address))

    assert code(begin) == 1 and "is in no tensor" in ptx_library.message()
    with deepkern.reachable(x=x):
        codes = [code(a) for a in (begin - 1, begin, end - 1, end)]
    assert codes == [1, 0, 0, 1]
    assert code(begin) == 1


# Tensor maps.

U8, F32, U4, U4_16, U6_16 = 0, 7, 13, 14, 15
MAP = {"address": 4096, "data_type": U8, "shape": [256, 100], "strides": [256], "box": [128, 64],
       "swizzle": 3}  # fmt: skip
CUBE = {**MAP, "shape": [64, 8, 8], "strides": [64, 512], "box": [32, 8, 8], "swizzle": 1}


@pytest.mark.parametrize("target", WITH_CLUSTERS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"shape": [1], "strides": [], "box": [16]},
        {"shape": [2**32, 1]},
        {"strides": [2**40 - 16]},
        {"box": [256, 256], "swizzle": 0},
        {"data_type": F32, "box": [32, 1], "fill": 1},
        {"element_strides": [9, 8]},
        {**CUBE, "interleave": 2},
        {**CUBE, "interleave": 1, "box": [3, 8, 8]},
        {"data_type": U4_16, "box": [128, 64]},
    ],
    ids=lambda change: ",".join(change) or "unchanged",
)
def test_tensor_map_is_encoded(target, change):
    with deepkern.compiled(target):
        assert len(encode_tensor_map(**{**MAP, **change})) == 128


BAD_MAPS = {
    "address": ({"address": 4104}, "globalAddress 4104: a multiple of 16"),
    "address of an interleaved one": ({**CUBE, "interleave": 2, "address": 4112}, "multiple of 32"),
    "address of 4 bits": ({"data_type": U4_16, "address": 4112}, "a multiple of 32"),
    "type": ({"data_type": 16}, "tensorDataType 16"),
    "rank 0": ({"shape": [], "strides": [], "box": []}, "tensorRank 0"),
    "rank 6": ({"shape": [16] * 6, "strides": [16] * 5, "box": [16] * 6}, "tensorRank 6"),
    "rank of an interleaved one": ({"interleave": 1}, "at least 3"),
    "empty": ({"shape": [256, 0]}, "globalDim[1] = 0"),
    "too large": ({"shape": [2**32 + 1, 1]}, "globalDim[0]"),
    "columns of 4 bits": ({"data_type": U4_16, "shape": [192, 4]}, "a multiple of 128"),
    "odd columns of 4 bits": ({"data_type": U4, "shape": [129, 4]}, "a multiple of 2"),
    "stride": ({"strides": [264]}, "globalStrides[0] = 264: a multiple of 16"),
    "stride of an interleaved one": ({**CUBE, "interleave": 2, "strides": [48, 512]}, "of 32"),
    "large stride": ({"strides": [2**40]}, "less than 2^40"),
    "empty box": ({"box": [128, 0]}, "boxDim[1] = 0: 1 to 256"),
    "large box": ({"box": [128, 257]}, "boxDim[1] = 257: 1 to 256"),
    "bytes of a row": ({"box": [24, 4]}, "no multiple of 16"),
    "box of 4 bits": ({"data_type": U4_16, "box": [64, 4]}, "128 for this tensorDataType"),
    "swizzle of 32": ({"box": [48, 4], "swizzle": 1}, "exceed the swizzle of 32"),
    "swizzle of 64": ({"box": [80, 4], "swizzle": 2}, "exceed the swizzle of 64"),
    "swizzle of 128": ({"box": [144, 4]}, "exceed the swizzle of 128"),
    "swizzle of float32": ({"data_type": F32, "box": [64, 4]}, "exceed the swizzle of 128"),
    "unknown swizzle": ({"swizzle": 7}, "swizzle 7"),
    "interleave": ({**CUBE, "interleave": 2, "swizzle": 3}, "needs swizzle 32B"),
    "unknown interleave": ({"interleave": 3}, "interleave 3"),
    "interleave of 6 bits": ({**CUBE, "data_type": U6_16, "interleave": 1}, "interleave NONE"),
    "swizzle of 4 bits": ({"data_type": U4_16, "swizzle": 2}, "does not go with"),
    "element stride 0": ({"element_strides": [1, 0]}, "elementStrides[1] = 0: 1 to 8"),
    "element stride 9": ({"element_strides": [1, 9]}, "elementStrides[1] = 9: 1 to 8"),
    "promotion": ({"promotion": 4}, "l2Promotion 4"),
    "fill": ({"fill": 2}, "oobFill 2"),
    "NaN in integers": ({"fill": 1}, "oobFill NaN needs a floating-point"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_bad_tensor_map_is_refused(name):
    change, reason = BAD_MAPS[name]
    with deepkern.compiled("sm_90"):
        message = failure(encode_tensor_map, **{**MAP, **change})
    assert message.startswith("cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE: ")
    assert reason in message


@pytest.mark.parametrize("target", ["sm_80", "sm_89"])
def test_tensor_map_on_a_target_without_them_is_refused(target):
    with deepkern.compiled(target):
        message = failure(encode_tensor_map, **MAP)
    assert f"CUDA_ERROR_NOT_SUPPORTED: {target} has no tensor maps" in message


def test_im2col_is_refused():
    assert ptx_library.library().cuTensorMapEncodeIm2col(*[None] * 15) == 801
    assert "no im2col" in ptx_library.message()


# Triton.


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out + i, tl.load(x + i, mask=mask) + tl.load(y + i, mask=mask), mask=mask)


@triton.jit
def multiply_kernel(pair, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(pair.a + i) * tl.load(pair.b + i))


@triton.jit
def copy_kernel(source, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + i, source.load([1, 2]))


@triton.jit
def describe_kernel(x, out, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [M, N], [N, 1], [ROWS, COLUMNS])
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + i, source.load([1, 2]))


@triton.jit
def gather_kernel(addresses, out, BLOCK: tl.constexpr):
    source = tl.load(addresses).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(source + i))


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@pytest.mark.parametrize("target", TARGETS)
def test_users_kernel(target, generator):
    x, y = torch.randn(2, 1000, generator=generator)
    out = torch.empty_like(x)
    with deepkern.compiled(target):
        add_kernel[(8,)](x, y, out, 1000, BLOCK=128)
    assert torch.equal(out, x + y)


def test_launch_across_the_end_of_a_tensor_fails(generator):
    x, y = torch.randn(2, 1000, generator=generator)
    with deepkern.compiled("sm_90"):
        message = failure(add_kernel[(8,)], x, y, torch.empty(999), 1000, BLOCK=128)
    assert "add_kernel" in message and "out float32 [999]" in message


def test_unaligned_arguments_are_specialized_so(generator):
    x, y = torch.randn(2, 1001, generator=generator)
    out = torch.empty(1000)
    with deepkern.compiled("sm_90"):
        add_kernel[(8,)](x[1:], y[:1000], out, 1000, BLOCK=128)
    assert torch.equal(out, x[1:] + y[:1000])


def test_tensors_in_a_tuple(generator):
    a, b, out = torch.randn(256, generator=generator), torch.full((257,), 2.0), torch.empty(256)
    with deepkern.compiled("sm_90"):
        multiply_kernel[(1,)](Pair(a, b[1:]), out, BLOCK=256)
    assert torch.equal(out, 2 * a)


@pytest.mark.parametrize("target", TARGETS)
def test_descriptor_argument(target, generator):
    x, out = torch.randn(40, 64, generator=generator), torch.empty(16, 32)
    with deepkern.compiled(target):
        copy_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 32]), out, ROWS=16, COLUMNS=32)
    assert torch.equal(out, x[1:17, 2:34])


def test_bad_descriptor_argument_is_refused():
    x = torch.zeros(40, 64)
    descriptor = TensorDescriptor(x, [40, 64], [64, 1], [16, 32])
    descriptor.strides = [66, 1]  # TensorDescriptor checks them when it is made
    with deepkern.compiled("sm_90"):
        message = failure(copy_kernel[(1,)], descriptor, torch.empty(16, 32), ROWS=16, COLUMNS=32)
    assert "cuTensorMapEncodeTiled: CUDA_ERROR_INVALID_VALUE: globalStrides[0] = 264" in message


@pytest.mark.parametrize("target", TARGETS)
def test_descriptor_made_by_the_kernel(target, generator):
    x, out = torch.randn(40, 64, generator=generator), torch.empty(16, 32)
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    with deepkern.compiled(target):
        describe_kernel[(1,)](x, out, 40, 64, ROWS=16, COLUMNS=32)
    assert torch.equal(out, x[1:17, 2:34])


def test_address_in_memory_must_be_declared(generator):
    x, out = torch.randn(128, generator=generator), torch.empty(128)
    addresses = torch.tensor([x.data_ptr()])
    with deepkern.compiled("sm_90"):
        failure(gather_kernel[(1,)], addresses, out, BLOCK=128)
        with deepkern.reachable(peer=x):
            gather_kernel[(1,)](addresses, out, BLOCK=128)
    assert torch.equal(out, x)


def test_autotuning_takes_the_first_configuration(generator):
    x, out = torch.randn(1000, generator=generator), torch.empty(1000)
    with deepkern.compiled("sm_90"):
        tuned_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, out, 1000)
    assert torch.equal(out, x) and tuned_kernel.best_config.kwargs == {"BLOCK": 64}


def test_timing_is_refused():
    with deepkern.compiled("sm_90"), pytest.raises(NotImplementedError, match="nothing is timed"):
        triton.testing.do_bench(lambda: None)


def test_refusal_of_a_launch_names_the_cuda_error():
    x = torch.zeros(128)
    with deepkern.compiled("sm_90"):
        message = failure(add_kernel[(1, 65536)], x, x, x, 128, BLOCK=128)
    assert message.startswith("cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE: grid (1, 65536, 1)")


def test_error_of_a_hook_is_no_kernel_failure():
    def refuse(metadata):
        raise RuntimeError("hook")

    x = torch.zeros(128)
    triton.knobs.runtime.launch_enter_hook = refuse
    try:
        with deepkern.compiled("sm_90"), pytest.raises(RuntimeError, match="^hook$") as caught:
            add_kernel[(1,)](x, x, x, 128, BLOCK=128)
    finally:
        triton.knobs.runtime.launch_enter_hook = None
    assert not isinstance(caught.value, deepkern.KernelFailure)


@pytest.mark.parametrize("target", WITH_CLUSTERS)
def test_launch_with_clusters(target, generator):
    x, y = torch.randn(2, 1024, generator=generator)
    out = torch.empty_like(x)
    with deepkern.compiled(target):
        add_kernel[(4,)](x, y, out, 1024, BLOCK=256, num_ctas=2)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("option", ["launch_pdl", "launch_cooperative_grid"])
def test_launch_option(option, generator):
    x, y = torch.randn(2, 1000, generator=generator)
    out = torch.empty_like(x)
    with deepkern.compiled("sm_90"):
        add_kernel[(8,)](x, y, out, 1000, BLOCK=128, **{option: True})
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("target", TARGETS)
def test_op_runs_on_the_machine(target, generator):
    x = torch.randn(4, 256, generator=generator)
    with deepkern.compiled(target), deepkern.backend("triton"):
        assert deepkern.explain("cast_per_token", x).where == target
        q, scale = deepkern.cast_per_token(x)
    want, want_scale = deepkern.reference.cast_per_token(x, "fp32")
    assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scale, want_scale)


def test_blocks_nest():
    def target() -> tuple[int, int]:
        shared = ctypes.c_int()
        ptx_library.library().cuDeviceGetAttribute(ctypes.byref(shared), 97, 0)
        return triton.runtime.driver.active.get_current_target().arch, shared.value

    with deepkern.compiled("sm_90"):
        assert target() == (90, SHARED["sm_90"])
        with deepkern.compiled("sm_120", seed=3):
            assert target() == (120, SHARED["sm_120"])
        assert target() == (90, SHARED["sm_90"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "sm_70"}, "target: expected one of"),
        ({"target": "gfx942"}, "target: expected one of"),
        ({"order": "backwards"}, "order: expected one of"),
        ({"resident_blocks": 0}, "resident_blocks: expected 1 or more"),
        ({"seed": -1}, "seed: expected 0 or more"),
    ],
    ids=["sm_70", "gfx942", "order", "resident blocks", "seed"],
)
def test_bad_settings_raise(arguments, message):
    with pytest.raises(ValueError, match=message), deepkern.compiled(**arguments):
        pass


# The environment variable, which each call of an op reads.


def cast() -> str:
    """Where the cast of a few values ran, after a comparison with the reference."""
    x = torch.randn(4, 256)
    with deepkern.backend("triton"):
        where = deepkern.explain("cast_per_token", x).where
        q, _ = deepkern.cast_per_token(x)
    want = deepkern.reference.cast_per_token(x, "fp32")[0]
    assert torch.equal(q.view(torch.uint8), want.view(torch.uint8))
    return where


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("DEEPKERN_COMPILED", "sm_120")
    assert cast() == "sm_120"


def test_bad_environment(monkeypatch):
    with pytest.raises(deepkern.BackendError, match="with deepkern.compiled"):
        cast()
    monkeypatch.setenv("DEEPKERN_COMPILED", "sm_70")
    with pytest.raises(ValueError, match="DEEPKERN_COMPILED: expected one of"):
        cast()


# Other processes.


def run(script: str, **env: str) -> subprocess.CompletedProcess:
    keep = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script], env={**keep, "PYTHONPATH": path, **env}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


INTERPRETING = """
import torch, deepkern
try:
    with deepkern.compiled("sm_90"): pass
except RuntimeError as error: print(error)
with deepkern.backend("triton"): deepkern.cast_per_token(torch.randn(4, 256))
"""


@pytest.mark.slow
def test_interpreting_process_is_refused():
    """With the context manager, and with the environment variable."""
    done = run(INTERPRETING, DEEPKERN_COMPILED="sm_90", TRITON_INTERPRET="1")
    assert "start Python without TRITON_INTERPRET" in done.stdout
    assert done.returncode != 0 and "without TRITON_INTERPRET" in done.stderr


DECOY = """
import ctypes, os, torch
ctypes.CDLL(os.environ["DECOY"], mode=ctypes.RTLD_GLOBAL)
import deepkern
from deepkern.runtime import ptx_library
with deepkern.compiled("sm_90"):
    import triton
    print(triton.runtime.driver.active.utils.get_device_properties(0)["multiprocessor_count"])
    module = ptx_library.PtxModule(os.environ["PTX"])
    module.run_kernel("nothing")
"""


@pytest.mark.slow
def test_another_libcuda_of_the_process_is_not_called(tmp_path):
    """A libcuda whose functions fail, loaded before and visible to all."""
    names = ["cuDeviceGet", "cuDeviceGetAttribute", "cuGetErrorString", "cuLaunchKernelEx",
             "cuCtxGetCurrent", "cuModuleLoadData", "cuModuleGetFunction"]  # fmt: skip
    source = "#include <stdlib.h>\n" + "".join(f"int {n}() {{ abort(); }}\n" for n in names)
    (tmp_path / "decoy.c").write_text(source)
    decoy = tmp_path / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", decoy, "decoy.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = run(DECOY, DECOY=str(decoy), PTX=ptx())
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "132" in done.stdout
