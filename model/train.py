"""Trains a DeepSeek model by the V3 recipe, on text or on from a checkpoint.

    python -m model.train                                   # the tiny model, on Python's library
    python -m model.train --data DIR --steps 500            # on a folder of text
    python -m model.train --out DIR --resume                # continues the run in DIR
    python -m model.train --checkpoint DIR --data DIR --learning-rate 1e-5 --window 2048
    torchrun --nproc-per-node 4 -m model.train --experts 4  # on several processes

Tokens are bytes, or with --checkpoint those of its tokenizer.  About 3 % of the files, chosen by
the hash of their path, are held out.  Two runs of one recipe have the same losses to the bit on the
same machine, also if one of them is stopped and resumed.

The folder of a run, OUT, has `run.json`, its options; `log.jsonl`, one row per step; `loss.png` and
`load.png`; `checkpoints/`, from which --resume continues; and at the end `model/`, a Hugging Face
directory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from model.checkpoint import Checkpoint
from model.config import Config
from model.convert import Format, convert, copy_other_files
from model.evaluate import nats_per_token
from model.export import export, write_log
from model.tokenizer import load_tokenizer
from model.training.data import Corpus, heldout_text, read_corpus, split_end, tokenize
from model.training.exchange import checkpoint_tensors, load_weights
from model.training.layout import Layout
from model.training.lost_ranks import ParallelError
from model.training.parallel import Parallel
from model.training.processes import on_each, on_first
from model.training.recipe import Recipe
from model.training.report import TensorBoard, plot_load, plot_loss, with_progress
from model.training.run import Run
from model.training.state import restore
from model.training.stop import saved_steps

BYTES = 256  # vocabulary of a model of bytes
STDLIB = "the `.py` files of Python's standard library without tests, `encodings` and `pydoc_data`"
RUNS = Path(__file__).parents[1] / "runs"  # git-ignored
OPTIONS = "run.json"  # in the folder of a run: what it was started with
END = ["the end of the text"]  # what is held out if no file is
SCORED_TOKENS = 16 * 1024  # of the held-out text, during the training
PLOT_SECONDS = 30.0


class Precision(str, Enum):
    fp32, bf16, fp8 = "fp32", "bf16", "fp8"


class Optimizer(str, Enum):
    adamw, muon = "adamw", "muon"


class Schedule(str, Enum):
    cosine, report = "cosine", "report"


def run_folder(out: Path | None, resume: bool) -> Path:
    """The folder of a run: `out`, or a new one under runs/ named by the time.

    Raises typer.BadParameter if a new run would write to a folder that is not empty, or if there is
    no run to resume.
    """
    if resume and (out is None or not (out / OPTIONS).is_file()):
        raise typer.BadParameter(f"{out}: no run to resume; name its folder with --out")
    if out is None:
        out = RUNS / time.strftime("%Y-%m-%dT%H-%M-%S")
    if out.exists() and not resume and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; --resume continues the run in it")
    return out


class Options(NamedTuple):
    """What a run is started with: absolute paths, the recipe, and how it runs.

    A run that is resumed keeps them.
    """

    data: str | None
    checkpoint: str | None
    config: str | None
    recipe: Recipe
    to: str | None = None
    evaluate_every: int = 200
    save_every: int = 1
    threads: int = 1

    def save(self, folder: Path) -> None:
        """Writes run.json, all or nothing."""
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f".{OPTIONS}.new"
        values = {**self._asdict(), "recipe": asdict(self.recipe)}
        fresh.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(fresh, folder / OPTIONS)

    @classmethod
    def load(cls, folder: Path) -> Options:
        """Reads run.json; raises ValueError if it is damaged."""
        file = folder / OPTIONS
        try:
            values = json.loads(file.read_text())
            return cls(**{**values, "recipe": Recipe.from_dict(values["recipe"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: not the options of a run: {error}") from error


class Heldout(NamedTuple):
    """Text that is not trained on, its tokens, and the paths of its files."""

    text: bytes
    tokens: Tensor
    paths: list[str]


class Source:
    """What a run starts from: the text, the config, and the weights of a checkpoint or none.

    Raises ValueError or FileNotFoundError if one of them cannot be used.
    """

    def __init__(self, options: Options) -> None:
        if options.checkpoint and options.config:
            raise ValueError("--config and --checkpoint: expected one of them")
        self.data = Path(options.data) if options.data else None
        self.name = self.data.name if self.data else STDLIB
        self.checkpoint = Checkpoint.open(options.checkpoint) if options.checkpoint else None
        self.encode: Callable[[str], list[int]] | None = None
        if self.checkpoint is not None:
            self.config = self.checkpoint.check()
        elif options.config:
            self.config = Config.load(options.config)
        else:
            window = options.recipe.window
            self.config = Config.preset("tiny", max_position_embeddings=window)
        if self.config.vocab_size != BYTES:
            if not options.checkpoint:
                text = f"{options.config}: vocab_size {self.config.vocab_size} needs a tokenizer"
                raise ValueError(f"{text}; name a --checkpoint that has one")
            self.encode = load_tokenizer(options.checkpoint).encode
        longest = self.config.max_position_embeddings
        if options.recipe.window > longest:
            text = f"expected at most max_position_embeddings = {longest}"
            raise ValueError(f"--window: {text}, got {options.recipe.window}")

    def start(self, recipe: Recipe, folder: Path, parallel: Parallel) -> tuple[Heldout, Run]:
        """Reads the text and makes the run, with the weights of the checkpoint."""
        corpus = read_corpus(self.data, self.encode, folder)
        tokens, held_out = corpus.tokens, self.held_out(corpus)
        if not held_out.paths:
            tokens, end = split_end(tokens)
            text = bytes(end.tolist()) if self.encode is None else b""
            held_out = Heldout(text, end, END)
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= self.config.vocab_size:
            text = f"token {largest}, expected less than vocab_size = {self.config.vocab_size}"
            raise ValueError(f"{self.name}: {text}; the tokenizer does not fit the model")
        run = Run(self.config, recipe, tokens, folder, parallel)
        checksums = on_each(lambda: run.tokens_checksum)
        for rank, checksum in enumerate(checksums):
            if checksum != checksums[0]:
                raise ValueError(f"{self.name}: rank {rank} reads another text than rank 0")
        if self.checkpoint is not None:
            load_weights(run.model, self.checkpoint)
        if run.is_main:
            size = sum(p.numel() for p in run.model.parameters())
            print(f"{folder}: {size:,} parameters, {len(tokens):,} tokens", flush=True)
        return held_out, run

    def held_out(self, corpus: Corpus) -> Heldout:
        """The held-out files; without paths if none of them has a fitting size."""
        text, paths = heldout_text(corpus.held_out)
        return Heldout(text, tokenize([text], self.encode) if paths else corpus.tokens[:0], paths)


def layout_of(tensor: int, context: int, experts: int) -> Layout:
    """The layout of the processes of torchrun; the data ranks are those that remain."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    data, rest = divmod(processes, tensor * context)
    if rest:
        text = f"expected a divisor of the {processes} processes, got {tensor * context}"
        raise ValueError(f"--tensor * --context: {text}")
    return Layout(data=data, context=context, tensor=tensor, experts=experts)


def train(run: Run, scored: Tensor, evaluate_every: int, save_every: int) -> None:
    """Takes the remaining steps, with checkpoints, pictures and scores of the held-out tokens."""
    board, drawn = TensorBoard(run), time.monotonic()

    def score_if_due() -> None:
        done = any("held_out" in row for row in run.log[-1:])
        if run.step and run.step % evaluate_every == 0 and len(scored) and not done:
            board.add(score(run, scored))

    try:
        score_if_due()  # a run may have been killed between a step and its score
        for row in with_progress(run, saved_steps(run, save_every)):
            board.add(row)
            score_if_due()
            if time.monotonic() - drawn > PLOT_SECONDS:
                draw(run)
                drawn = time.monotonic()
    finally:
        board.close()
        draw(run)


def score(run: Run, scored: Tensor) -> dict[str, Any]:
    """Adds the loss on the held-out tokens, nats per token, to the log; returns the row."""
    value = nats_per_token(run.predict, scored, run.recipe.window)
    tokens = run.step * run.recipe.tokens_per_step
    return run.record({"step": run.step, "tokens": tokens, "held_out": value})


def scored_tokens(tokens: Tensor, window: int) -> Tensor:
    """The first held-out tokens, whole windows of them; none if there are fewer than one."""
    windows = (min(len(tokens), SCORED_TOKENS) - 1) // window
    return tokens[: windows * window + 1] if windows > 0 else tokens[:0]


def draw(run: Run) -> None:
    """Replaces the pictures of the run."""
    if run.is_main:
        plot_loss(run.log, run.folder / "loss.png", unit_of(run.model.config))
        plot_load(run.log, run.folder / "load.png")


def unit_of(config: Config) -> str:
    return "bits per byte" if config.vocab_size == BYTES else "nats per token"


def write_model(
    run: Run, source: Source, held_out: Heldout, to: Format | None, threads: int
) -> None:
    """Writes OUT/model.  Every process calls it, the main one writes."""
    tensors, config, out = checkpoint_tensors(run.model), run.model.config, run.folder / "model"
    if not run.is_main:
        return
    if to is None:
        stored = source.config.quantization_config
        to = Format.fp8 if stored or source.checkpoint is None else Format.bf16
    if source.checkpoint is None and to is Format.fp8 and len(held_out.text) > 1:
        notes = record_of(run, held_out.paths, source.name, threads)
        metrics = export(config, tensors, out, held_out.text, notes, run.log, run.recipe.window)
        print({name: value for name, value in metrics.items() if name.startswith("held_out_bits")})
    else:

        def add_files(folder: Path) -> None:
            if source.checkpoint is not None:
                copy_other_files(Path(source.checkpoint.source), folder)
            write_log(folder, run.log, unit_of(config))

        convert(Checkpoint.from_tensors(config, tensors), out, to, add_files=add_files)
    print(f"{out}: the trained model; python -m model.generate --checkpoint {out} runs it")


def counted(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun if number == 1 else noun + plural}"


def record_of(run: Run, paths: list[str], source: str, threads: int) -> dict[str, Any]:
    """What the README of the trained model says of the run."""
    steps = [row for row in run.log if "seconds" in row]
    device = run.parallel.device
    place = f"a {os.cpu_count()}-core CPU" if device.type == "cpu" else str(device)
    processes = run.parallel.layout.processes
    by_file = "about 3 % of the files, chosen by the hash of their path, held out"
    return {
        "name": "stdlib-bytes" if source == STDLIB else source,
        "source": source,
        "held_out_kind": by_file if paths != END else f"{END[0]} held out",
        "recipe": asdict(run.recipe),
        "training_bytes": len(run.tokens),
        "held_out_files": paths,
        "steps": run.step,
        "skipped": sum("skipped" in row for row in steps),
        "tokens_seen": run.step * run.recipe.tokens_per_step,
        "training_minutes": round(sum(row["seconds"] for row in steps) / 60, 1),
        "hardware": f"{counted(processes, 'process')} of {counted(threads, 'thread')} on {place}",
    }


def run_with(options: Options, folder: Path, parallel: Parallel) -> None:
    """Takes the steps that remain of a run and writes its model."""
    torch.set_num_threads(options.threads)
    source = Source(options)
    held_out, run = source.start(options.recipe, folder, parallel)
    if run.is_main:
        options.save(folder)
    restore(run)
    scored = scored_tokens(held_out.tokens, options.recipe.window)
    train(run, scored, options.evaluate_every, options.save_every)
    to = Format(options.to) if options.to else None
    write_model(run, source, held_out, to, options.threads)


def refuse_options(context: typer.Context) -> None:
    """With --resume, raises typer.BadParameter for an option that the run already has."""
    kept = {"out", "resume", "tensor", "context", "experts"}
    for name in context.params.keys() - kept:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"--resume keeps the options of the run; {option} was given")


def main(
    command: typer.Context,
    data: Annotated[
        Path | None, typer.Option(help="a folder of text; by default Python's standard library")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; a new one in runs/")] = None,
    resume: Annotated[
        bool, typer.Option(help="continue the run in OUT with the recipe that it was started with")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="start from this Hugging Face directory")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="a config.json of a model of bytes; tiny by default")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = Recipe.steps,
    batch: Annotated[int, typer.Option(min=1, help="sequences per step")] = Recipe.batch,
    window: Annotated[int, typer.Option(min=1, help="tokens per sequence")] = Recipe.window,
    learning_rate: Annotated[
        float | None, typer.Option(help="the highest; by default 3e-3, with --checkpoint 1e-5")
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="fraction of the run with a rising learning rate")
    ] = Recipe.warmup,
    optimizer: Optimizer = Optimizer.adamw,
    schedule: Annotated[Schedule, typer.Option(help="report: DeepSeek-V3's")] = Schedule.cosine,
    precision: Annotated[Precision, typer.Option(help="of the products")] = Precision.fp8,
    recompute: Annotated[
        bool, typer.Option(help="run norms and up-projections again in the backward pass")
    ] = Recipe.recompute,
    spike: Annotated[
        float, typer.Option(help="skip a step with a loss this much above its mean, in nats")
    ] = Recipe.spike,
    seed: int = Recipe.seed,
    evaluate_every: Annotated[int, typer.Option(min=1, help="steps between scores")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 1,
    to: Annotated[
        Format | None,
        typer.Option(help="format of the result; by default that of --checkpoint, or fp8"),
    ] = None,
    tensor: Annotated[int, typer.Option(min=1, help="processes that divide the heads")] = 1,
    context: Annotated[int, typer.Option(min=1, help="processes that divide a sequence")] = 1,
    experts: Annotated[int, typer.Option(min=1, help="processes that divide the experts")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process")] = 1,
) -> None:
    """Trains and writes OUT/model, a Hugging Face directory."""
    if resume:
        refuse_options(command)
    if learning_rate is None:
        learning_rate = Recipe.learning_rate if checkpoint is None else 1e-5
    try:
        parallel = Parallel(layout_of(tensor, context, experts))
        recipe = Recipe(
            steps=steps, batch=batch, window=window, learning_rate=learning_rate, warmup=warmup,
            optimizer=optimizer.value, schedule=schedule.value, precision=precision.value,
            recompute=recompute, spike=spike, seed=seed,
        )  # fmt: skip
        paths = (str(path.resolve()) if path else None for path in (data, checkpoint, config))
        chosen = to.value if to else None
        options = Options(*paths, recipe, chosen, evaluate_every, save_every, threads)
        with parallel.naming_lost_ranks("run"):
            folder = on_first(lambda: run_folder(out, resume))
            run_with(Options.load(folder) if resume else options, folder, parallel)
    except (ValueError, OSError, FloatingPointError, ParallelError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
