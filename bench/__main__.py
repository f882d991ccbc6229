"""The command line: `python -m bench [ops [NAME] | model | inspect [OP] | tune [OP] | ...]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Threads that wait for each other give their core away after some µs instead of ms. On a machine
# with other work a run took ten times as long without this. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402
import typer  # noqa: E402

if "launch" in sys.argv[1:2]:  # Triton must compile for a GPU, which the interpreter does not
    os.environ.pop("TRITON_INTERPRET", None)
elif "inspect" not in sys.argv[1:2] and not torch.cuda.is_available():
    # Decided when deepkern imports Triton: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)


def known_ops(names: list[str] | None) -> list[str]:
    """All ops, or those named; a message and exit 2 if there is none of a name."""
    import deepkern

    for name in names or ():
        if name not in deepkern.OPS:
            raise typer.BadParameter(f"no op {name!r}; there are {', '.join(sorted(deepkern.OPS))}")
    return names or sorted(deepkern.OPS)


_KEEP = typer.Option(False, help="name the results so that git takes a CPU's")
_SECONDS = typer.Option(0.3, help="time each call for about this long")

_NAMES = typer.Argument(None, help="ops; all if left out")
_FOLDER = typer.Option(Path(__file__).parent / "results", help="where results go")
_CONFIGS = typer.Option(
    Path(__file__).parent.parent / "kernels/deepkern/runtime/configs", help="where tiles go"
)
_STAGE = typer.Option([], help="one of them, repeatable; all if left out")
_OUT = typer.Option(Path("gpu-results"), help="where results go")
_SIZE = typer.Option([], help="such as M=64,N=7168,K=2048, repeatable; SIZES.gpu if left out")
_TARGET = typer.Option([], help="a GPU target such as sm_90, repeatable; all if left out")


@app.callback(invoke_without_command=True)
def main(context: typer.Context, keep: bool = _KEEP, seconds: float = _SECONDS) -> None:
    """Checks and times every op here, then runs the model: the main job, `make run`."""
    if context.invoked_subcommand is None:
        from . import job

        raise typer.Exit(job.run(seconds=seconds, keep=keep))


@app.command()
def ops(
    names: list[str] = _NAMES,
    keep: bool = _KEEP,
    seconds: float = _SECONDS,
    folder: Path = _FOLDER,
) -> None:
    """Checks and times ops, without the model."""
    chosen = known_ops(names)
    from . import job

    raise typer.Exit(job.run(chosen, model=False, seconds=seconds, keep=keep, folder=folder))


@app.command()
def model(keep: bool = _KEEP) -> None:
    """Runs the model, without checking ops one by one."""
    from . import job

    raise typer.Exit(job.run([], keep=keep))


@app.command()
def placement() -> None:
    """Compares rebalance_experts with DeepSeek's EPLB and keeps the result: about a minute."""
    from . import placement as comparison

    raise typer.Exit(comparison.run())


@app.command()
def inspect(
    op: str = typer.Argument(None, help="one op; all if left out"),
    target: list[str] = _TARGET,
    check: bool = typer.Option(False, help="compare with the committed budgets"),
    write_budgets: bool = typer.Option(False, help="rewrite the committed budgets"),
    processes: int = typer.Option(2, help="compile in this many processes"),
) -> None:
    """Compiles Triton kernels for every GPU target and says what they need. Takes no GPU."""
    from deepkern.runtime.arch import ARCHS

    from . import inspect as inspection

    unknown = [name for name in target if name not in ARCHS]
    if unknown:
        raise typer.BadParameter(f"no target {unknown[0]!r}; there are {', '.join(ARCHS)}")
    ops = known_ops([op] if op else None)
    raise typer.Exit(inspection.run(ops, target or list(ARCHS), check, write_budgets, processes))


@app.command()
def tune(
    op: str = typer.Argument(None, help="one FP8 product; all if left out"),
    size: list[str] = _SIZE,
    seconds: float = _SECONDS,
    folder: Path = _CONFIGS,
) -> None:
    """Times every tile of the FP8 products on this GPU and keeps what beats the model's choice."""
    from . import tune as tuning

    if op is not None and op not in tuning.OPS:
        raise typer.BadParameter(f"no tiles to tune for {op!r}; there are {', '.join(tuning.OPS)}")
    try:
        sizes = [{k: int(v) for k, v in (x.split("=") for x in s.split(","))} for s in size]
    except ValueError:
        raise typer.BadParameter(f"expected sizes such as M=64,N=7168,K=2048, got {size}") from None
    raise typer.Exit(tuning.run([op] if op else tuning.OPS, sizes, seconds, folder))


@app.command("expert-parallel")
def expert_parallel(keep: bool = _KEEP, folder: Path = _FOLDER) -> None:
    """Measures bytes and time of dispatch and combine between 2, 4 and 8 processes over gloo."""
    from . import expert_parallel as parallel

    raise typer.Exit(parallel.run(keep, folder=folder))


@app.command()
def accumulation(keep: bool = _KEEP, folder: Path = _FOLDER) -> None:
    """Emulates the tensor core's short sums of FP8 products: why they are promoted every 128."""
    from . import accumulation as emulation

    raise typer.Exit(emulation.run(keep, folder=folder))


@app.command()
def launch(
    names: list[str] = _NAMES,
    keep: bool = _KEEP,
    seconds: float = _SECONDS,
    folder: Path = _FOLDER,
) -> None:
    """Times the host's side of a call, without a GPU: of Triton kernels and of the Hopper ones."""
    from . import launch as launching

    raise typer.Exit(launching.run(known_ops(names) if names else None, keep, seconds, folder))


@app.command()
def prove() -> None:
    """Runs the GPU tests of the Hopper kernels; if all pass, auto takes them from then on."""
    from . import prove as proof

    raise typer.Exit(proof.run())


@app.command()
def gpu(
    family: str = typer.Argument(..., help="quant, matmul, attention, experts or hopper"),
    stage: list[str] = _STAGE,
    out: Path = _OUT,
) -> None:
    """Builds, tests, times and tunes a family on a machine with a GPU, in stages of ten minutes."""
    from . import gpu as hardware

    for name, known in ((family, hardware.FAMILIES), *((s, hardware.STAGES) for s in stage)):
        if name not in known:
            raise typer.BadParameter(f"no {name!r}; there are {', '.join(known)}")
    raise typer.Exit(hardware.run(family, stage, out.resolve()))


if __name__ == "__main__":
    app()
