"""The command line: `python -m bench [run | op | model | inspect | profile | tune | ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from . import results
from .command_line import FOLDER, KEEP, NAMES, SECONDS, known_ops, screen


class Commands(TyperGroup):
    """`python -m bench --keep` is `python -m bench run --keep`; Ctrl-C ends each verb alike."""

    def parse_args(self, ctx, args):
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        try:
            interpret_without_gpu()
            return super().invoke(ctx)
        except KeyboardInterrupt:
            kept = "; ".join(f"{file}{what}" for file, what in results.WRITTEN.items())
            typer.echo(
                f"interrupted; {f'kept {kept}' if kept else 'nothing was written'}", err=True
            )
            raise typer.Exit(130) from None


def interpret_without_gpu() -> None:
    """Without a GPU the Triton kernels are interpreted. deepkern reads this when imported."""
    import torch  # takes seconds: not at the top, so that Ctrl-C ends that, too

    if sys.argv[1:2] not in (["inspect"], ["profile"]) and not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


class ListsProviders(TyperCommand):
    """Its help ends with the providers, one per line; an epilog would have a blank one between."""

    def format_help(self, ctx, formatter):
        from deepkern.testing.providers import NAMES

        super().format_help(ctx, formatter)
        typer.echo("Providers, where they are installed and serve the op:")
        for name, about in NAMES.items():
            typer.echo(f"  {name:23}  {about}")


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False,
                  help="Checks, times and explains the ops and the model.")  # fmt: skip

Option = typer.Option
Target = Annotated[
    list[str] | None, Option(help="a GPU target such as sm_90, repeatable; all by default")
]
Html = Annotated[Path | None, Option(help="write the report to this HTML file")]
Json = Annotated[Path | None, Option(help="write the report to this JSON file")]


@app.command()
def run(
    keep: bool = KEEP,
    seconds: Annotated[float, Option(min=1e-4, help="time each call for about this long")] = 0.15,
    folder: Path = FOLDER,
    backend: Annotated[list[str] | None, Option(help="check these only, repeatable")] = None,
    speed: Annotated[bool, Option(help="time the ops")] = True,
    model: Annotated[bool, Option(help="run the model")] = True,
) -> None:
    """Checks and times every op, runs the model, writes the report: the default, `make run`."""
    from . import job

    raise typer.Exit(
        job.run(backends=backend, speed=speed, model=model, seconds=seconds, keep=keep,
                folder=folder)
    )  # fmt: skip


@app.command(cls=ListsProviders)
def op(
    names: list[str] = NAMES,
    shapes: Annotated[
        list[str] | None,
        Option(
            help="default, small, deepseek-v3, deepgemm, flashmla or M=64,N=7168,K=2048; repeatable"
        ),
    ] = None,
    backend: Annotated[
        list[str] | None, Option(help="cuda, triton, cpu or torch, repeatable")
    ] = None,
    against: Annotated[
        list[str] | None,
        Option(help="a provider of the list below, repeatable; all but compile by default"),
    ] = None,
    seconds: float = SECONDS,
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:
    """Checks and times ops next to PyTorch and other libraries, at named or given shapes."""
    chosen = known_ops(names)
    from . import op as op_bench

    raise typer.Exit(
        op_bench.run(
            chosen, shapes or ["default"], backend or None, against or None, seconds, keep, folder
        )
    )


@app.command()
def model(
    name: Annotated[
        str, Option("--model", help="stdlib-bytes, or v3-8 or v3-256 with random weights")
    ] = "stdlib-bytes",
    against: Annotated[
        list[str] | None,
        Option(help="deepkern next to this provider, such as transformers, 'transformers bf16' or "
               "llama.cpp, in a process each; repeatable"),
    ] = None,
    weights: Annotated[Path | None, Option(help="folder that keeps random weights")] = None,
    llama_python: Annotated[
        Path | None, Option(help="an interpreter with llama-cpp-python and gguf, for llama.cpp")
    ] = None,
    batch: Annotated[list[int] | None, Option(help="repeatable; 1, 8 and 32 by default")] = None,
    rounds: Annotated[int, Option(min=1, help="runs of each provider and batch")] = 3,
    threads: Annotated[int | None, Option(help="of each provider; all cores by default")] = None,
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:  # fmt: skip
    """Runs the model: agreement, continuation, speed, bits per byte. Or times it next to others."""
    from .models import comparison

    if not against and name == comparison.TRAINED:
        from . import job

        raise typer.Exit(job.run([], keep=keep, folder=folder))
    known = (*comparison.MODELS, comparison.TRAINED)
    if name not in known:
        raise typer.BadParameter(f"no model {name!r}; there are {', '.join(known)}")
    try:
        labels = comparison.labels_of(against or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    raise typer.Exit(
        comparison.run(name, weights, labels, llama_python, tuple(batch or (1, 8, 32)),
                       rounds=rounds, threads=threads, keep=keep, folder=folder)
    )  # fmt: skip


@app.command()
def inspect(
    op: Annotated[str | None, typer.Argument(help="one op; all by default")] = None,
    target: Target = None,
    check: Annotated[bool, Option(help="compare with the committed budgets")] = False,
    write_budgets: Annotated[bool, Option(help="rewrite the committed budgets")] = False,
    processes: Annotated[int, Option(help="compile in this many processes")] = 2,
) -> None:
    """Compiles the Triton kernels for every GPU target, without a GPU; reports their resources."""
    from deepkern.runtime.arch import ARCHS

    from . import inspect as inspection

    unknown = [name for name in target or () if name not in ARCHS]
    if unknown:
        raise typer.BadParameter(f"no target {unknown[0]!r}; there are {', '.join(ARCHS)}")
    ops = known_ops([op] if op else None)
    raise typer.Exit(inspection.run(ops, target or list(ARCHS), check, write_budgets, processes))


@app.command()
def profile(
    op: Annotated[
        str | None, typer.Argument(help="one op; all with --write-figures and --check")
    ] = None,
    target: Target = None,
    size: Annotated[
        list[str] | None,
        Option(help="such as M=64 or lengths=8192,4096, repeatable; the committed figures' by "
               "default"),
    ] = None,
    every: Annotated[
        list[str] | None, Option(help="KERNEL=N, repeatable: every N-th cluster of its grids")
    ] = None,
    html: Html = None,
    json: Json = None,
    check: Annotated[bool, Option(help="compare with the committed figures")] = False,
    write_figures: Annotated[bool, Option(help="rewrite the committed figures")] = False,
) -> None:  # fmt: skip
    """Counts what an op's compiled kernels execute, without a GPU; says what bounds their speed."""
    from . import figures

    for name in target or ():
        if name not in figures.TARGETS:
            known = ", ".join(figures.TARGETS)
            raise typer.BadParameter(f"no target {name!r}; there are {known}")
    ops = known_ops([op] if op else None)
    if check or write_figures:
        raise typer.Exit(figures.run(ops, target or list(figures.TARGETS), check, write_figures))
    if op is None:
        raise typer.BadParameter("expected an op")
    raise typer.Exit(figures.report(op, (target or [])[:1], size or [], every or [], html, json))


@app.command()
def tune(
    op: Annotated[str | None, typer.Argument(help="one FP8 GEMM; all by default")] = None,
    size: Annotated[
        list[str] | None,
        Option(help="such as M=64,N=7168,K=2048, repeatable; SIZES.gpu by default"),
    ] = None,
    seconds: float = SECONDS,
    folder: Annotated[Path, Option(help="folder for the tiles")] = (
        Path(__file__).parent.parent / "kernels/deepkern/runtime/configs"
    ),
) -> None:
    """Times every tile of the FP8 GEMMs on this GPU; keeps those faster than the model's choice."""
    from . import tune as tuning

    if op is not None and op not in tuning.OPS:
        raise typer.BadParameter(f"no tiles to tune for {op!r}; there are {', '.join(tuning.OPS)}")
    try:
        sizes = [{k: int(v) for k, v in (x.split("=") for x in s.split(","))} for s in size or ()]
    except ValueError:
        raise typer.BadParameter(f"expected sizes such as M=64,N=7168,K=2048, got {size}") from None
    raise typer.Exit(tuning.run([op] if op else tuning.OPS, sizes, seconds, folder))


@app.command()
def compare(
    old: Annotated[Path, typer.Argument(exists=True, help="a result, or a folder of several runs")],
    new: Annotated[Path, typer.Argument(exists=True, help="a later result, or a folder")],
    threshold: Annotated[float, Option(help="a smaller change is none")] = 0.05,
    across_devices: Annotated[bool, Option(help="compare results of two devices")] = False,
) -> None:
    """Compares results; exit code 1 if an op or the model became slower or wrong.

    On a busy machine alternate several runs of the two checkouts, each into a folder of its own
    (`python -m bench op cast_per_token --folder DIR`), and compare the folders.
    """
    from . import compare as comparison

    raise typer.Exit(comparison.run(old, new, threshold, across_devices))


@app.command()
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, dir_okay=False,
                       help="result files; the newest committed of each device by default"),
    ] = None,
    out: Annotated[Path, Option(help="the HTML file")] = Path("build/report.html"),
    readme: Annotated[bool, Option(help="rewrite the README's tables instead")] = False,
    check: Annotated[bool, Option(help="compare the README's tables; exit 1 if stale")] = False,
) -> None:  # fmt: skip
    """One HTML page of results, predictions and static inspection; or the README's tables."""
    if readme or check:
        from . import readme as tables

        raise typer.Exit(tables.run(check))
    from .pages import report as page

    raise typer.Exit(page.run(results or [], out, screen()))


@app.command()
def cost(
    preset: Annotated[
        str, typer.Argument(help="a preset of model/presets.py")
    ] = "deepseek-v3",
    gpu: Annotated[
        list[str] | None, Option(help="such as H800 or 'RTX 4090', repeatable; all by default")
    ] = None,
    json: Json = None,
    write: Annotated[bool, Option(help="rewrite docs/cost.md and its picture")] = False,
) -> None:  # fmt: skip
    """GPU-hours and dollars to train and serve a model, on GPUs of several kinds, without one."""
    from . import cost_report

    raise typer.Exit(cost_report.run(preset, gpu or [], json, write))


@app.command()
def gpu(
    stage: Annotated[list[str] | None, Option(help="one stage, repeatable; all by default")] = None,
    out: Annotated[Path, Option(help="folder for the results")] = Path("build/gpu"),
    minutes: Annotated[
        float | None, Option(min=0.1, help="start no stage that does not fit into these minutes")
    ] = None,
    dry_run: Annotated[
        bool, Option(help="print the stages, their commands and limits; run nothing")
    ] = False,
) -> None:
    """Builds, tests, times and tunes all on a GPU machine, in stages; goes on where it was."""
    from . import gpu as hardware

    names = [s.name for s in hardware.stages(out)]
    for name in stage or ():
        if name not in names:
            raise typer.BadParameter(f"no stage {name!r}; there are {', '.join(names)}")
    raise typer.Exit(hardware.run(stage or [], out.resolve(), minutes, dry_run))


if __name__ == "__main__":
    app()
