"""The machine of a run: hardware, versions and commit."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

import deepkern
from deepkern.runtime import arch, backends

from . import results

ROOT = Path(__file__).parent.parent
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


def device() -> torch.device:
    """The device on which ops are checked and timed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict:
    """CPU, GPU, versions, commit and the backends of this machine."""
    return {
        "schema": results.SCHEMA,
        "command": command(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": [flag for flag in _ISA if flag in _cpu_info("flags", "Features").split()],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu(),
        "driver": _driver(),
        "clocks": None,  # bench.ceilings, under load
        "ceilings": None,  # bench.ceilings, in runs that measure them
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "deepkern": deepkern.__version__,
        "commit": _commit(),
        "interpreted_triton": backends.interpreting(),
        "backends": {name: _served(name) for name in backends.BACKENDS},
    }


def command() -> str:
    """The command of this process as one types it, such as "python -m bench op fp8_gemm_nt"."""
    program = Path(sys.argv[0])
    if program.resolve().is_relative_to(ROOT / "bench"):
        module = program.resolve().relative_to(ROOT).with_suffix("")
        words = ["python", "-m", ".".join(module.parts).removesuffix(".__main__")]
    else:
        words = [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def served(op, name: str) -> bool:
    """Whether backend `name` can serve `op` on this machine's device."""
    return backends.unsupported_reason(op, name, device()) is None


def _served(name: str) -> str:
    """'9 of 9 ops', or the reason if there are none."""
    reasons = [backends.unsupported_reason(op, name, device()) for op in deepkern.OPS.values()]
    count = reasons.count(None)
    return f"{count} of {len(reasons)} ops" if count else next(filter(None, reasons), "no ops")


def _cpu_info(*keys: str) -> str:
    """The first line of /proc/cpuinfo under one of `keys`; empty without such a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.split(":", 1)[1].strip() for x in lines if x.split("\t")[0].strip() in keys), "")


def _cpu() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "target": arch.of(torch.device("cuda", 0)).name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30),
        "runtime": torch.version.hip or torch.version.cuda,
    }


_THROTTLING = (
    "sw_power_cap", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown",
)  # fmt: skip


def clocks() -> dict | None:
    """The GPU's present clocks in MHz, and why they are throttled; None if they are not known."""
    names = [f"clocks_throttle_reasons.{reason}" for reason in _THROTTLING]
    got = _nvidia_smi("clocks.sm", "clocks.mem", *names)
    if got is None or not (got[0].isdigit() and got[1].isdigit()):
        return None
    active = [r for r, text in zip(_THROTTLING, got[2:], strict=True) if text == "Active"]
    return {"sm_mhz": int(got[0]), "memory_mhz": int(got[1]), "throttled": active}


def _driver() -> str | None:
    got = _nvidia_smi("driver_version")
    return got[0] if got else None


def _nvidia_smi(*fields: str) -> list[str] | None:
    """The fields' values of this process's first NVIDIA GPU; None without one."""
    if not torch.cuda.is_available() or torch.version.hip:
        return None
    gpu = str(torch.cuda.get_device_properties(0).uuid)
    words = ["nvidia-smi", f"--id=GPU-{gpu}", f"--query-gpu={','.join(fields)}"]
    words += ["--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return values if len(values) == len(fields) else None


def _commit() -> str | None:
    """The commit of this checkout, with + if files differ from it; DEEPKERN_COMMIT overrides it."""
    if given := os.environ.get("DEEPKERN_COMMIT"):
        return given

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
