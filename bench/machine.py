"""The machine of a run: hardware, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch
import triton

import deepkern
from deepkern.runtime import arch, backends

ROOT = Path(__file__).parent.parent
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve")


def device() -> torch.device:
    """The device on which ops are checked and timed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict:
    """CPU, GPU, versions, commit and the backends of this machine."""
    return {
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
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "deepkern": deepkern.__version__,
        "commit": _commit(),
        "interpreted_triton": backends.interpreting(),
        "backends": {name: _served(name) for name in backends.BACKENDS},
    }


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


def _commit() -> str | None:
    """The commit of this checkout, with + if files differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
