"""Tokens per second of V3-shaped models on this CPU: deepkern, transformers and llama.cpp.

    python -m bench model --model v3-8 [--against transformers] [--llama-python PATH] [--keep]

All providers have the same weights: an FP8 checkpoint, its dequantized copy in bf16, and that copy
in llama.cpp's Q8_0.  Each provider is a process.  Before it is timed, its logits over a prefill and
decode steps are compared with those of `model.plain` in fp32; a provider that fails has no speed,
and the exit code is 1.  The processes then run in turn, so that other work on the machine disturbs
all of them.  Prefill and one decode step have the least time of all rounds, and the median.

transformers has its default experts and attention.  Its bf16 is slow on a CPU without AVX-512 BF16,
so read its fp32 rows, too.  torch.compile takes minutes; --against names the ones to run.
llama.cpp needs an interpreter with `pip install llama-cpp-python gguf`, given by --llama-python.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import deepkern
from deepkern.testing.child import Child, ChildError
from model.checkpoint import (
    Checkpoint,
    dequantize_blocks,
    expected_tensors,
    replace_directory,
    write_checkpoint,
)
from model.config import FP8_QUANTIZATION, Config
from model.plain import PlainModel
from model.tensors import is_quantized

from .. import machine, results
from ..command_line import bar, screen
from ..listing import Listing
from . import checkpoint

# DeepSeek-V3's head sizes in a model that fits into the memory of a small machine.  The weights
# that one token reads, 60 to 110 MB in FP8, are more than the last-level cache of most CPUs.
V3: dict = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict] = {
    "v3-8": {"num_hidden_layers": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
             "moe_intermediate_size": 512, "n_group": 1, "topk_group": 1},
    "v3-256": {"num_hidden_layers": 4, "n_routed_experts": 256, "num_experts_per_tok": 8,
               "moe_intermediate_size": 256, "n_group": 8, "topk_group": 4},
}  # fmt: skip
TRAINED = "stdlib-bytes"  # the committed checkpoint
DECODED = 8  # tokens of the check that are decoded one by one


class Limit(NamedTuple):
    """Of the logits: the median over tokens of |x - reference| / |reference|, and equal argmax.

    A median, because another expert is chosen where two scores are nearly equal.
    """

    error: float
    same_token: float


LIMITS = {
    "fp32": Limit(1e-3, 0.98),
    "bf16": Limit(0.02, 0.9),
    "fp8": Limit(0.08, 0.6),
    "q8_0": Limit(0.03, 0.8),
}


@dataclass
class Provider:
    """A name, the number format of its weights, and the command of its process."""

    name: str
    dtype: str
    command: list[str]
    error: float = float("nan")
    same_token: float = float("nan")
    reason: str = ""  # why it has no speed
    about: dict = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def wrong(self) -> bool:
        """Whether its logits were compared and differ."""
        limit = LIMITS[self.dtype]
        return self.error > limit.error or self.same_token < limit.same_token

    def record(self) -> dict:
        names = "error", "same_token", "reason", "about"
        return {"provider": self.name, "dtype": self.dtype} | {n: getattr(self, n) for n in names}


@dataclass
class Times:
    """Seconds of every prefill and every decode step of a provider at one batch size."""

    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


# Weights.  A folder has three copies of a model: `fp8`, `bf16` and `q8_0.gguf`.


def random_tensors(config: Config) -> dict[str, Tensor]:
    """An FP8 checkpoint of random weights, with norms of one.

    As in a trained model, a layer adds little to its input: embeddings have deviation 1, and the
    matrices that add to the residual stream are divided by sqrt(2 * layers).  Otherwise the
    rounding of one layer would choose other experts in the next.  The scales are powers of two,
    so that the weights are exact in bf16.
    """
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in expected_tensors(config).items():
        if len(shape) == 1:
            value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator)
            if "embed_tokens" not in name:
                value *= shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value *= (2 * config.num_hidden_layers) ** -0.5
        if is_quantized(name):
            tensors[name], scale = deepkern.cast_per_block(value, "ue8m0")
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = value if name.endswith("bias") else value.bfloat16()
    return tensors


def write_random(config: Config, folder: Path) -> None:
    with replace_directory(folder) as fresh:
        stored = Config(**{**vars(config), "quantization_config": FP8_QUANTIZATION})
        write_checkpoint(fresh, stored, random_tensors(config))


def write_bf16(source: Path, folder: Path) -> None:
    """The dequantized copy of an FP8 checkpoint, without prediction layers."""
    checkpoint = Checkpoint.open(source)
    changes = {"quantization_config": None, "num_nextn_predict_layers": 0}
    config = Config(**{**vars(checkpoint.check()), **changes})
    tensors = {}
    for name in expected_tensors(config):
        value, scale = checkpoint.read(name)
        if scale is not None:
            value = dequantize_blocks(value, scale, checkpoint.block)
        tensors[name] = value if name.endswith("bias") else value.bfloat16()
    with replace_directory(folder) as fresh:
        write_checkpoint(fresh, config, tensors)


def prepare(model: str, folder: Path, config: Config | None = None) -> tuple[Path, Path]:
    """The FP8 and the bf16 checkpoint of a model, written once."""
    fp8, bf16 = folder / model / "fp8", folder / model / "bf16"
    if model == TRAINED:
        fp8 = checkpoint.CHECKPOINT
    elif not fp8.is_dir():
        write_random(config or Config(**V3, **MODELS[model]), fp8)
    if not bf16.is_dir():
        write_bf16(fp8, bf16)
    return fp8, bf16


def prompts(model: str, batch: int, length: int, vocab: int) -> list[list[int]]:
    """[batch, length] tokens: of the held-out text, or random."""
    if model == TRAINED:
        text = (checkpoint.CHECKPOINT / checkpoint.HELD_OUT).read_bytes()
        return [list(text[i * length : (i + 1) * length]) for i in range(batch)]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab, (batch, length), generator=generator).tolist()


# Providers.

TORCH = (
    ("deepkern", "fp8"),
    ("deepkern", "bf16"),
    ("deepkern", "fp32"),
    ("transformers", "bf16"),
    ("transformers", "fp32"),
    ("transformers-compiled", "bf16"),
)
LABELS = [*(f"{name} {dtype}" for name, dtype in TORCH), "llama.cpp q8_0"]


def labels_of(against: Sequence[str]) -> list[str]:
    """The labels that names such as "transformers" or "transformers bf16" choose; all by default.

    deepkern is always among them. Raises ValueError for an unknown name.
    """
    for name in against:
        if not any(label == name or label.startswith(f"{name} ") for label in LABELS):
            raise ValueError(f"no provider {name!r}; there are {', '.join(LABELS)}")
    chosen = [
        label
        for label in LABELS
        if not against or any(f"{label} ".startswith(f"{name} ") for name in against)
    ]
    deepkern_too = any(label.startswith("deepkern ") for label in chosen)
    return chosen if deepkern_too else [x for x in LABELS if x.startswith("deepkern ")] + chosen


def torch_providers(fp8: Path, bf16: Path) -> list[Provider]:
    """deepkern and transformers.  The bf16 checkpoint serves all but deepkern's FP8."""
    script = [sys.executable, "-m", "bench.models.torch_models"]
    return [
        Provider(name, dtype, [*script, name, dtype, str(fp8 if dtype == "fp8" else bf16)])
        for name, dtype in TORCH
    ]


def llama_provider(python: Path, bf16: Path, threads: int) -> Provider:
    """llama.cpp; its GGUF file is written by its interpreter, which has the gguf package."""
    file = bf16.with_name("q8_0.gguf")
    provider = Provider("llama.cpp", "q8_0", [])
    if not file.is_file():
        command = [str(python), "-m", "bench.models.gguf_export", str(bf16), str(file)]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            provider.reason = f"no GGUF file: {lines[-1] if lines else done.returncode}"
    provider.command = [str(python), "-m", "bench.models.llama_cpp", str(file), str(threads)]
    return provider


def environment(threads: int) -> dict[str, str]:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env.pop("TRITON_INTERPRET", None)
    paths = [str(machine.ROOT / "kernels"), str(machine.ROOT), env.get("PYTHONPATH", "")]
    return env | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@torch.no_grad()
def reference_logits(folder: Path, tokens: list[list[int]]) -> np.ndarray:
    """fp32 [S, vocab] of the model in plain PyTorch."""
    return PlainModel.from_pretrained(folder)(torch.tensor(tokens))[0].numpy()


def compare(logits: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The two measures of Limit; NaN counts as wrong."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return float("inf"), 0.0
    error = np.linalg.norm(logits - reference, axis=1) / np.linalg.norm(reference, axis=1)
    same = logits.argmax(1) == reference.argmax(1)
    return float(np.median(error)), float(same.mean())


def check(
    provider: Provider, process: Child, tokens: list[list[int]], reference: np.ndarray
) -> None:
    """Loads the provider and compares its logits; a failure is its `reason`."""
    file = process.log.with_suffix(".npy")
    provider.about = process.request(do="load")
    split = max(len(tokens[0]) - DECODED, 1)
    process.request(do="logits", tokens=tokens, split=split, file=str(file))
    provider.error, provider.same_token = compare(np.load(file), reference)
    if provider.wrong:
        limit = LIMITS[provider.dtype]
        provider.reason = (
            f"wrong logits: error {provider.error:.2g}, limit {limit.error:g}; "
            f"same token {provider.same_token:.0%}, limit {limit.same_token:.0%}"
        )


Running = dict[str, tuple[Provider, Child]]


@contextlib.contextmanager
def start(
    providers: list[Provider], threads: int, tokens: list[list[int]], reference: np.ndarray,
    folder: Path, console: Console,
) -> Iterator[Running]:  # fmt: skip
    """The processes of the providers that agree with the reference, by label."""
    running: Running = {}
    with contextlib.ExitStack() as stack, bar(console, "checking", len(providers)) as step:
        for i, provider in enumerate(providers):
            if not provider.reason:
                log = folder / f"{i}.log"
                process = Child(provider.command, log, env=environment(threads), cwd=machine.ROOT)
                stack.enter_context(process)
                try:
                    check(provider, process, tokens, reference)
                except ChildError as error:
                    provider.reason = str(error)
                if provider.reason:
                    process.close()
                else:
                    running[provider.label] = provider, process
            step(provider.label)
        yield running


def time_in_turn(
    running: Running, tokens: list[list[int]], new: int, rounds: int
) -> dict[str, Times]:
    """Times every provider `rounds` times, in turn, after a run that warms up.

    A provider that fails is left out and has a `reason`.
    """
    times = {label: Times() for label in running}
    for number in range(rounds + 1):
        # Every other round runs backwards: no provider always follows the same other.
        for label in list(running)[:: 1 if number % 2 else -1]:
            provider, process = running[label]
            try:
                answer = process.request(do="time", tokens=tokens, new=new)
            except ChildError as error:
                provider.reason = f"batch {len(tokens)}: {error}"
                del running[label], times[label]
                continue
            if number:
                times[label].prefill.append(answer["prefill"])
                times[label].steps += answer["steps"]
    return times


# Results.


def row(provider: Provider, times: Times, model: str, batch: int, prompt: int) -> dict:
    def summary(seconds: list[float], tokens: int) -> dict:
        least, median = min(seconds), statistics.median(seconds)
        return {"least": least, "median": median, "tokens_per_second": tokens / least,
                "median_tokens_per_second": tokens / median}  # fmt: skip

    return {
        "kind": "cpu_model", "model": model, "provider": provider.name, "dtype": provider.dtype,
        "batch": batch, "prompt": prompt,
        "prefill": summary(times.prefill, batch * prompt), "decode": summary(times.steps, batch),
    }  # fmt: skip


def add_ratios(rows: list[dict]) -> None:
    """Tokens per second relative to transformers in bf16 at the same batch size."""
    base = {r["batch"]: r for r in rows if (r["provider"], r["dtype"]) == ("transformers", "bf16")}
    for r in rows:
        for part in ("prefill", "decode"):
            if r["batch"] in base:
                r[part]["ratio"] = base[r["batch"]][part]["least"] / r[part]["least"]


def table(rows: list[dict], providers: list[Provider], title: str) -> Listing:
    by_name = {(p.name, p.dtype): p for p in providers}
    view = Listing(title)
    view.add_columns("provider", "weights")
    view.add_columns("logit error", "same token", "batch", "prefill tok/s", "median", "ratio",
                     "decode tok/s", "median", "ratio", numeric=True)  # fmt: skip
    for r in rows:
        p, parts = by_name[r["provider"], r["dtype"]], []
        for part in (r["prefill"], r["decode"]):
            ratio = f"[bold]{part['ratio']:.2f}[/]" if "ratio" in part else ""
            parts += [f"{part['tokens_per_second']:,.1f}",
                      f"{part['median_tokens_per_second']:,.1f}", ratio]  # fmt: skip
        view.add_row(p.name, p.dtype, f"{p.error:.1e}", f"{p.same_token:.0%}", f"{r['batch']}",
                     *parts)  # fmt: skip
    return view


def measure(
    running: Running, tokens: list[list[int]], batches: tuple[int, ...], new: int, rounds: int,
    model: str, console: Console,
) -> list[dict]:  # fmt: skip
    """One row for every running provider and batch size; tokens [B, prompt]."""
    rows = []
    with bar(console, "timing", len(batches)) as step:
        for batch in batches:
            for label, times in time_in_turn(running, tokens[:batch], new, rounds).items():
                rows.append(row(running[label][0], times, model, batch, len(tokens[0])))
            step(f"batch {batch}")
    add_ratios(rows)
    return rows


def run(
    model: str = "v3-8",
    weights: Path | None = None,
    providers: list[str] | None = None,
    llama_python: Path | None = None,
    batches: tuple[int, ...] = (1, 8, 32),
    prompt: int = 128,
    new: int = 32,
    rounds: int = 3,
    threads: int | None = None,
    keep: bool = False,
    folder: Path = results.FOLDER,
    console: Console | None = None,
    config: Config | None = None,
    extra: tuple[Provider, ...] = (),
) -> int:
    """Checks, times, prints and writes a record.

    config: sizes of a model that is not in MODELS.  extra: more providers, for the tests.
    Returns 1 if a provider's logits are wrong or deepkern does not run, else 0.
    """
    console, about = console or screen(), machine.describe()
    about |= {"threads": threads or about["cores"], "load_average": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as temporary:
        fp8, bf16 = prepare(model, weights or Path(temporary), config)
        chosen = torch_providers(fp8, bf16)
        if llama_python:
            chosen.append(llama_provider(llama_python, bf16, about["threads"]))
        chosen = [p for p in chosen if not providers or p.label in providers] + list(extra)
        shape = Config.load(bf16)
        tokens = prompts(model, max(batches), prompt + DECODED, shape.vocab_size)
        reference = reference_logits(bf16, tokens[:1])
        with start(
            chosen, about["threads"], tokens[:1], reference, Path(temporary), console
        ) as running:
            inputs = [t[:prompt] for t in tokens]
            rows = measure(running, inputs, batches, new, rounds, model, console)
    count = sum(int(np.prod(s)) for s in expected_tensors(shape).values())
    about |= {"model": model, "config": shape.to_dict(), "parameters": count}
    report(chosen, rows, about, console)
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-cpu-model-{model}")
    head = {"kind": "machine", **about, "rounds": rounds, "new": new}
    results.write([head, *({"kind": "provider", **p.record()} for p in chosen), *rows], file)
    console.print(f"written: {file}", soft_wrap=True)
    return 1 if any(p.wrong or (p.reason and p.name == "deepkern") for p in chosen) else 0


def report(chosen: list[Provider], rows: list[dict], about: dict, console: Console) -> None:
    """Prints the table, and why a provider is not in it."""
    title = (
        f"{about['model']}, {about['parameters'] / 1e6:,.0f}M parameters; {about['threads']} "
        f"threads; {about['cpu']}; load average {about['load_average']:.1f} at the start"
    )
    console.print(table(rows, chosen, title))
    for p in chosen:
        if p.reason:
            console.print(f"no speed for {p.label}: {p.reason}", markup=False, soft_wrap=True)
