"""deepkern and transformers as providers of `bench.models.comparison`, each in a process.

python -m bench.models.torch_models deepkern fp8 DIR
python -m bench.models.torch_models transformers bf16 DIR
python -m bench.models.torch_models transformers-compiled bf16 DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .process import LanguageModel, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


class Deepkern:
    """The reference model; "fp8" keeps FP8 weights and has bf16 activations and cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from model import DeepSeek

        self.model = DeepSeek.from_pretrained(folder, DTYPES[dtype], fp8=dtype == "fp8")
        self.about: dict[str, Any] = {}

    def start(self, batch: int, capacity: int) -> None:
        self.cache = self.model.new_cache(batch, capacity)

    @torch.no_grad()
    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        last = self.model.hidden(torch.from_numpy(tokens), self.cache)[:, -1]
        return greedy(self.model.logits(last))

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.model(torch.from_numpy(tokens), self.cache)[0].float().numpy()


class Transformers:
    """DeepseekV3ForCausalLM with its defaults and a growing cache."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import transformers

        load = transformers.DeepseekV3ForCausalLM.from_pretrained
        self.model = load(folder, dtype=DTYPES[dtype]).eval()
        self.call, config = self.model.forward, self.model.config
        self.about = {
            "version": transformers.__version__,
            "experts": config._experts_implementation,
            "attention": config._attn_implementation,
        }

    def start(self, batch: int, capacity: int) -> None:
        from transformers import DynamicCache

        self.cache: Any = DynamicCache(config=self.model.config)

    @torch.no_grad()
    def forward(self, tokens: np.ndarray, keep: int) -> Tensor:
        """Logits of the last `keep` tokens."""
        out = self.call(
            torch.from_numpy(tokens),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return greedy(self.forward(tokens, 1)[:, -1])

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.forward(tokens, tokens.shape[1])[0].float().numpy()


class Compiled(Transformers):
    """The same with compiled decode steps, as in its `generate`: the prefill is not compiled.

    The cache has a fixed size, a multiple of 64 tokens, so that all runs have the same shapes.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__(folder, dtype)
        self.compiled = torch.compile(self.model.forward)

    def start(self, batch: int, capacity: int) -> None:
        from transformers import StaticCache

        size = -(-capacity // 64) * 64
        self.cache = StaticCache(config=self.model.config, max_cache_len=size)

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        self.call = self.compiled if tokens.shape[1] == 1 else self.model.forward
        return super().next_tokens(tokens)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        self.call = self.compiled if tokens.shape[1] == 1 else self.model.forward
        return super().logits(tokens)


PROVIDERS: dict[str, Any] = {
    "deepkern": Deepkern,
    "transformers": Transformers,
    "transformers-compiled": Compiled,
}


def greedy(logits: Tensor) -> np.ndarray:
    """[B, vocab] -> int64 [B, 1]."""
    return logits.argmax(-1, keepdim=True).numpy()


def load(name: str, dtype: str, folder: Path) -> LanguageModel:
    model = PROVIDERS[name](folder, dtype)
    model.about["threads"] = torch.get_num_threads()
    return model


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
