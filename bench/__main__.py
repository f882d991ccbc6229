"""The command line: `python -m bench [ops | model | inspect | profile | tune | ... | cost]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import typer

from .command_line import FOLDER, KEEP, NAMES, SECONDS, known_ops

# Without a GPU the Triton kernels are interpreted. deepkern reads this when it imports Triton.
if sys.argv[1:2] not in (["inspect"], ["profile"]) and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)

_CONFIGS = typer.Option(
    Path(__file__).parent.parent / "kernels/deepkern/runtime/configs", help="folder for the tiles"
)
_STAGE = typer.Option([], help="one stage, repeatable; all by default")
_OUT = typer.Option(Path("gpu-results"), help="folder for the results")
_SIZE = typer.Option([], help="such as M=64,N=7168,K=2048, repeatable; SIZES.gpu by default")
_TARGET = typer.Option([], help="a GPU target such as sm_90, repeatable; all by default")
_ONE_SIZE = typer.Option(
    [], help="such as M=64 or lengths=8192,4096, repeatable; the committed figures' by default"
)
_EVERY = typer.Option([], help="KERNEL=N, repeatable: run every N-th cluster of its grids only")
_HTML = typer.Option(None, help="write the report to this HTML file")
_JSON = typer.Option(None, help="write the report to this JSON file")
_GPU = typer.Option([], help="such as H800 or 'RTX 4090', repeatable; all by default")
_DRY_RUN = typer.Option(False, help="print the stages, their commands and limits; run nothing")


@app.callback(invoke_without_command=True)
def main(context: typer.Context, keep: bool = KEEP, seconds: float = SECONDS) -> None:
    """Checks and times every op, then runs the model: the main job, `make run`."""
    if context.invoked_subcommand is None:
        from . import job

        raise typer.Exit(job.run(seconds=seconds, keep=keep))


@app.command()
def ops(
    names: list[str] = NAMES,
    keep: bool = KEEP,
    seconds: float = SECONDS,
    folder: Path = FOLDER,
) -> None:
    """Checks and times ops, without the model."""
    chosen = known_ops(names)
    from . import job

    raise typer.Exit(job.run(chosen, model=False, seconds=seconds, keep=keep, folder=folder))


@app.command()
def model(keep: bool = KEEP) -> None:
    """Runs the model, without checking ops one by one."""
    from . import job

    raise typer.Exit(job.run([], keep=keep))


@app.command()
def inspect(
    op: str = typer.Argument(None, help="one op; all by default"),
    target: list[str] = _TARGET,
    check: bool = typer.Option(False, help="compare with the committed budgets"),
    write_budgets: bool = typer.Option(False, help="rewrite the committed budgets"),
    processes: int = typer.Option(2, help="compile in this many processes"),
) -> None:
    """Compiles the Triton kernels for every GPU target, without a GPU; reports their resources."""
    from deepkern.runtime.arch import ARCHS

    from . import inspect as inspection

    unknown = [name for name in target if name not in ARCHS]
    if unknown:
        raise typer.BadParameter(f"no target {unknown[0]!r}; there are {', '.join(ARCHS)}")
    ops = known_ops([op] if op else None)
    raise typer.Exit(inspection.run(ops, target or list(ARCHS), check, write_budgets, processes))


@app.command()
def profile(
    op: str = typer.Argument(None, help="one op; all with --write-figures and --check"),
    target: list[str] = _TARGET,
    size: list[str] = _ONE_SIZE,
    every: list[str] = _EVERY,
    html: Path = _HTML,
    json: Path = _JSON,
    check: bool = typer.Option(False, help="compare with the committed figures"),
    write_figures: bool = typer.Option(False, help="rewrite the committed figures"),
) -> None:
    """Counts what an op's compiled kernels execute, without a GPU; says what bounds their speed."""
    from . import figures

    for name in target:
        if name not in figures.TARGETS:
            known = ", ".join(figures.TARGETS)
            raise typer.BadParameter(f"no target {name!r}; there are {known}")
    ops = known_ops([op] if op else None)
    if check or write_figures:
        raise typer.Exit(figures.run(ops, target or list(figures.TARGETS), check, write_figures))
    if op is None:
        raise typer.BadParameter("expected an op")
    raise typer.Exit(figures.report(op, target[:1], size, every, html, json))


@app.command()
def tune(
    op: str = typer.Argument(None, help="one FP8 GEMM; all by default"),
    size: list[str] = _SIZE,
    seconds: float = SECONDS,
    folder: Path = _CONFIGS,
) -> None:
    """Times every tile of the FP8 GEMMs on this GPU; keeps those faster than the model's choice."""
    from . import tune as tuning

    if op is not None and op not in tuning.OPS:
        raise typer.BadParameter(f"no tiles to tune for {op!r}; there are {', '.join(tuning.OPS)}")
    try:
        sizes = [{k: int(v) for k, v in (x.split("=") for x in s.split(","))} for s in size]
    except ValueError:
        raise typer.BadParameter(f"expected sizes such as M=64,N=7168,K=2048, got {size}") from None
    raise typer.Exit(tuning.run([op] if op else tuning.OPS, sizes, seconds, folder))


@app.command()
def verify() -> None:
    """Runs the GPU tests of the Hopper kernels; if all pass, `auto` uses these kernels."""
    from . import verify as verification

    raise typer.Exit(verification.run())


@app.command()
def gpu(
    family: str = typer.Argument(..., help="quant, matmul, attention, experts or hopper"),
    stage: list[str] = _STAGE,
    out: Path = _OUT,
    dry_run: bool = _DRY_RUN,
) -> None:
    """Builds, tests, times and tunes a family on a GPU machine, in stages of ten minutes."""
    from . import gpu as hardware

    for name, names in ((family, hardware.FAMILIES), *((s, hardware.STAGES) for s in stage)):
        if name not in names:
            raise typer.BadParameter(f"no {name!r}; there are {', '.join(names)}")
    raise typer.Exit(hardware.run(family, stage, out.resolve(), dry_run))


@app.command()
def cost(
    preset: str = typer.Argument("deepseek-v3", help="a preset of model/presets.py"),
    gpu: list[str] = _GPU,
    json: Path = _JSON,
    write: bool = typer.Option(False, help="rewrite docs/cost.md and its picture"),
) -> None:
    """GPU-hours and dollars to train and serve a model, on GPUs of several kinds, without one."""
    from . import cost_report

    raise typer.Exit(cost_report.run(preset, gpu, json, write))


if __name__ == "__main__":
    app()
