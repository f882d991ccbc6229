"""llama.cpp as a provider of `bench.models.comparison`, in the interpreter of llama-cpp-python.

    python -m bench.models.llama_cpp FILE.gguf THREADS

It calls the C interface: the high-level class requires a tokenizer and has one sequence only.
Cache and flash attention are llama.cpp's defaults (an fp16 cache).
"""

from __future__ import annotations

import sys
from typing import Any

import llama_cpp
import numpy as np

from bench.models.process import serve


class Llama:
    """A GGUF model.  A context holds the cache of one batch size; it is kept for the next run."""

    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.threads = threads
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise RuntimeError(f"{file}: llama.cpp cannot load it")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.contexts: dict[tuple[int, int], Any] = {}
        self.batches: dict[tuple[int, int], Any] = {}
        self.about = {
            "version": llama_cpp.__version__,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
            "threads": threads,
        }

    def start(self, batch: int, capacity: int) -> None:
        if (batch, capacity) not in self.contexts:
            self.contexts[batch, capacity] = self.new_context(batch, capacity)
        self.context = self.contexts[batch, capacity]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0

    def new_context(self, batch: int, capacity: int) -> Any:
        params = llama_cpp.llama_context_default_params()
        padded = -(-capacity // 256) * 256  # llama.cpp pads the cache of a sequence to 256
        params.n_ctx, params.n_batch, params.n_seq_max = batch * padded, batch * capacity, batch
        params.n_threads = params.n_threads_batch = self.threads
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp has no context for {batch} x {capacity} tokens")
        return context

    def batch_of(self, count: int, length: int) -> Any:
        """An input of `count` sequences of `length` tokens, sequence by sequence."""
        if (count, length) not in self.batches:
            batch = llama_cpp.llama_batch_init(count * length, 0, 1)
            batch.n_tokens = count * length
            for i in range(count * length):
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, i // length
            self.batches[count, length] = batch
        return self.batches[count, length]

    def append(self, tokens: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Runs int64 [B, S]; fp32 [.., vocab], the logits where outputs [B, S] is set."""
        count, length = tokens.shape
        batch = self.batch_of(count, length)
        shape = (count, length)
        np.ctypeslib.as_array(batch.token, shape)[:] = tokens
        np.ctypeslib.as_array(batch.pos, shape)[:] = self.length + np.arange(length)
        np.ctypeslib.as_array(batch.logits, shape)[:] = outputs
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returns {code}")
        self.length += length
        logits = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (int(outputs.sum()), self.vocab_size))

    def next_tokens(self, tokens: np.ndarray) -> np.ndarray:
        outputs = np.zeros(tokens.shape, dtype=np.int8)
        outputs[:, -1] = 1
        return self.append(tokens, outputs).argmax(-1)[:, None]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self.append(tokens, np.ones(tokens.shape, dtype=np.int8)).copy()


if __name__ == "__main__":
    serve(lambda: Llama(sys.argv[1], int(sys.argv[2])))
