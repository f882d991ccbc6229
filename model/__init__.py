"""The reference model: DeepSeek-V3, R1 and V2 on deepkern's ops.

    from model import DeepSeek

    m = DeepSeek.from_pretrained("model/checkpoints/stdlib-bytes", dtype=torch.float32)
    logits = m(tokens)  # int64 [B, S] -> fp32 [B, S, vocab]

deepseek.py   the architecture, top to bottom
plain.py      the same model in plain PyTorch: the definition, the oracle, and what training uses
config.py     config.json; presets.py has the published ones
tensors.py    names and shapes of a checkpoint's tensors
checkpoint.py reading and writing of checkpoint directories; convert.py is FP8 <-> bf16, a command
sampling.py   logits -> tokens; tokenizer.py, chat_template.py and text.py: tokens <-> text
generate.py   a prompt, chat.py a conversation, serve.py an HTTP server (server/); commands
train.py, evaluate.py   training and bits per byte, commands; export.py writes what was trained
"""

from __future__ import annotations

from typing import Any

from model.config import Config

__all__ = ["CheckpointError", "Config", "DeepSeek"]


def __getattr__(name: str) -> Any:
    """Imports DeepSeek on first use, so `model.config` needs neither torch nor deepkern."""
    if name == "DeepSeek":
        from model.deepseek import DeepSeek

        return DeepSeek
    if name == "CheckpointError":
        from model.checkpoint import CheckpointError

        return CheckpointError
    raise AttributeError(f"module 'model' has no attribute {name!r}")
