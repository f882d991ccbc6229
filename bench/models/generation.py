"""How fast the committed checkpoint generates: alone, many requests at once, with drafts.

The prompts are pieces of the held-out text of different lengths. Every number of requests runs on
the same engine settings; the tokens of all runs must be the same, as the engine promises.
transformers runs the same weights on prompts of one length, if it is installed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PROMPT_BYTES = 48  # of the shortest prompt
NEW_TOKENS = 48
DRAFTED_TOKENS = 192
BATCHES = (1, 8, 32)
REPEATS = 2  # of speculative decoding


def measure(model: Any, path: Path, text: bytes, record: Callable[..., dict]) -> list[dict]:
    """The records of an engine on `model`, and of transformers on the same weights in bf16."""
    prompts = [piece(text, k, PROMPT_BYTES + 7 * (k % 5)) for k in range(max(BATCHES))]
    records, outputs, rates = [], {}, {}
    for batch in BATCHES:
        rates[batch], outputs[batch], share = throughput(model, prompts[:batch])
        note = f"{batch} requests, the fastest of {NEW_TOKENS - 1} steps, 1 thread"
        records.append(record(f"engine, batch {batch}", rates[batch], "tokens/s", None, note))
    same = outputs[1] == outputs[max(BATCHES)][:1] and outputs[8] == outputs[max(BATCHES)][:8]
    gain = rates[max(BATCHES)] / rates[1]
    records += [
        record("batches of 1, 8 and 32 give the same tokens", float(same), "", same, "bit for bit"),
        record("engine, 32 requests to 1", gain, "x", None, "tokens/s of all requests together"),
        record("scheduling and sampling", share, "fraction", None, "of a step of 32 requests"),
    ]
    if model.config.num_nextn_predict_layers:
        records += speculation(model, prompts[0], record)
    rates = transformers_speed(path, text)
    if not rates:
        records.append(record("transformers", "not installed, not compared", "text", None))
    for batch, rate in rates.items():
        note = f"bf16, {batch} prompts of {PROMPT_BYTES} tokens, the fastest step, 1 thread"
        records.append(record(f"transformers, batch {batch}", rate, "tokens/s", None, note))
    return records


def piece(text: bytes, number: int, size: int) -> list[int]:
    """A prompt: `size` bytes of the text, elsewhere for each number."""
    start = 512 * number % max(1, len(text) - size)
    return list(text[start : start + size])


def throughput(model: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]], float]:
    """Tokens a second of the fastest step, all tokens, and the host's share of all steps."""
    from model.engine import Engine
    from model.sampling import Sampling

    engine = Engine(model, reuse_prompts=False)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    requests = [engine.submit(prompt, sampling) for prompt in prompts]
    while any(not request.samples for request in requests):  # prompts are not counted
        engine.step()
    in_model, steps = count_seconds(model, ("run", "logits")), []
    while engine.has_work:
        start = time.perf_counter()
        updates = engine.step()
        if len(updates) == len(prompts):
            steps.append(time.perf_counter() - start)
    for name in ("run", "logits"):
        delattr(model, name)
    share = 1 - in_model[0] / sum(steps)
    return len(prompts) / min(steps), [request.tokens for request in requests], share


def count_seconds(model: Any, names: tuple[str, ...]) -> list[float]:
    """Wraps methods of an instance; the list's one value grows by the seconds inside them."""
    total = [0.0]

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args)
            finally:
                total[0] += time.perf_counter() - start

        return timed

    for name in names:
        object.__setattr__(model, name, wrap(getattr(model, name)))
    return total


def speculation(model: Any, prompt: list[int], record: Callable[..., dict]) -> list[dict]:
    """One request with a draft per step and without."""
    from model.engine import Engine
    from model.sampling import Sampling

    sampling = Sampling(max_new_tokens=DRAFTED_TOKENS, ignore_eos=True)
    seconds, tokens, stats = {}, {}, None
    for drafts in (0, 1):
        best = None
        for _ in range(REPEATS):
            engine = Engine(model, draft_tokens=drafts)
            start = time.perf_counter()
            tokens[drafts] = engine.generate([prompt], sampling)[0].tokens
            spent = time.perf_counter() - start
            best = spent if best is None else min(best, spent)
        seconds[drafts], stats = best, engine.stats()
    same, rate = tokens[0] == tokens[1], stats.accepted / stats.drafted
    note = f"{stats.accepted} of {stats.drafted} drafts of the prediction layer"
    steps = f"{DRAFTED_TOKENS} tokens in {stats.steps} steps; decoding without drafts is 1x"
    return [
        record("drafts accepted", rate, "fraction", None, note),
        record("speculative decoding", seconds[0] / seconds[1], "x", None, steps),
        record("speculation gives the same tokens", float(same), "", same, "greedy, bit for bit"),
    ]


@torch.no_grad()
def transformers_speed(path: Path, text: bytes) -> dict[int, float]:
    """Tokens a second of transformers' greedy decoding by batch; empty without the package."""
    try:
        import transformers
    except ImportError:
        return {}
    from model.checkpoint import Checkpoint
    from model.convert import Format, convert

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        convert(Checkpoint.open(path), Path(folder) / "bf16", Format.bf16)
        load = transformers.DeepseekV3ForCausalLM.from_pretrained
        model = load(Path(folder) / "bf16", dtype=torch.bfloat16).eval()
    rates = {}
    for batch in BATCHES:
        prompt = torch.tensor([piece(text, k, PROMPT_BYTES) for k in range(batch)])
        out = model(prompt, use_cache=True, logits_to_keep=1)
        tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        best = None
        for _ in range(NEW_TOKENS // 2):
            start = time.perf_counter()
            out = model(tokens, past_key_values=cache, use_cache=True)
            tokens, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            spent = time.perf_counter() - start
            best = spent if best is None else min(best, spent)
        rates[batch] = batch / best
    return rates
