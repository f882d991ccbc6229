"""The GPUs of the cost report: peak rates from `deepkern.runtime.arch`, memory, links and prices.

Links are GB/s in one direction per GPU: NVLink, Infinity Fabric or PCIe within a node of 8, and the
network card between nodes. Sources of the rates: the vendors' data sheets of H100 and H200, A100,
MI300X and the Ada white paper (dense, FP32 accumulation); for H800 the DeepSeek-V3 report
(arXiv:2412.19437), section 3.1 and 3.2.2. Prices are assumptions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from deepkern.runtime.arch import ARCHS, Arch

NODE = 8  # GPUs


@dataclass(frozen=True)
class Gpu:
    """One product. `price`: dollars per hour."""

    name: str
    arch: Arch
    memory: float  # GB
    link: float  # GB/s within a node
    network: float  # GB/s between nodes
    price: float
    price_source: str
    note: str = ""

    @property
    def fp8_tensor_cores(self) -> bool:
        return self.arch.fp8_tflops > 0


def _hopper(part: str, bandwidth: int) -> Arch:
    return replace(ARCHS["sm_90"], part=part, bandwidth=bandwidth)


_ADA = replace(ARCHS["sm_89"], part="RTX 4090", num_sms=128, l2=72 << 20, bandwidth=1008,
               bf16_tflops=165, fp8_tflops=330)  # fmt: skip
# Its FP8 is e4m3fnuz. The kernels compute checkpoints in e4m3fn at the bf16 rate there.
_MI300X = replace(ARCHS["gfx942"], fp8_tflops=0)
_LISTED = "assumed; listed at this price in May 2026 ({})"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H800", _hopper("H800 SXM", 3350), 80, 200, 50, 2.00, "the V3 report's assumption",
            "NVLink has 400 GB/s in both directions together, an H100's 900"),
        Gpu("H200", ARCHS["sm_90"], 141, 450, 50, 3.50, _LISTED.format("mercatus-ai.com")),
        Gpu("A100", ARCHS["sm_80"], 80, 300, 25, 1.20, _LISTED.format("mercatus-ai.com"),
            "no FP8 tensor cores"),
        Gpu("RTX 4090", _ADA, 24, 16, 6.25, 0.69, _LISTED.format("RunPod"),
            "no NVLink; PCIe 4 through host memory: half of 32 GB/s; a 400 Gb/s card per node"),
        Gpu("MI300X", _MI300X, 192, 448, 50, 1.85, _LISTED.format("Vultr"),
            "FP8 tensor cores read e4m3fnuz, not the e4m3fn of the checkpoints"),
    )
}  # fmt: skip
# Not in the tables: what the H800's links cost it.
H100 = Gpu("H100", _hopper("H100 SXM", 3350), 80, 450, 50, 2.00, "as H800")


def named(name: str) -> Gpu:
    """The GPU of this name, in any case; raises ValueError with the known names."""
    for known, gpu in GPUS.items():
        if known.lower().replace(" ", "") == name.lower().replace(" ", "").replace("-", ""):
            return gpu
    raise ValueError(f"no GPU {name!r}; there are {', '.join(GPUS)}")
