"""The reference model: DeepSeek-V3/R1 and V2 on deepkern's ops, and in plain PyTorch to compare."""

from __future__ import annotations

from typing import Any

from model.config import Config

__all__ = ["CheckpointError", "Config", "DeepSeek"]


def __getattr__(name: str) -> Any:
    """DeepSeek is imported when asked for, so that `model.plain` and training need no deepkern."""
    if name == "DeepSeek":
        from model.deepseek import DeepSeek

        return DeepSeek
    if name == "CheckpointError":
        from model.checkpoint import CheckpointError

        return CheckpointError
    raise AttributeError(f"module 'model' has no attribute {name!r}")
