"""How much faster the engine generates for 8 and 32 requests at once than for one.

    python -m bench.studies.engine FOLDER [--dtype fp8] [--threads 2] [--keep]

FOLDER is a checkpoint, such as `v3-8/fp8` in the folder that `python -m bench model --model v3-8
--weights` keeps. The prompts are random tokens and differ in length. The fastest step counts. The
tokens of a request must be the same in every batch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import typer
from rich.console import Console

from .. import machine, results
from ..command_line import FOLDER, KEEP, bar, screen
from ..listing import Listing
from ..models.generation import BATCHES, PROMPT_BYTES, throughput

CHECKPOINT = typer.Argument(..., metavar="FOLDER", help="a checkpoint", exists=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def prompts(vocab_size: int) -> list[list[int]]:
    """One for each request of the largest batch."""
    generator = torch.Generator().manual_seed(0)
    sizes = [PROMPT_BYTES + 7 * (i % 5) for i in range(max(BATCHES))]
    return [torch.randint(vocab_size, (size,), generator=generator).tolist() for size in sizes]


def measure(checkpoint: Path, dtype: str, console: Console) -> list[dict]:
    """A record for each batch size: tokens/s, the host's share of the steps, same tokens."""
    from model import DeepSeek

    model = DeepSeek.from_pretrained(checkpoint, dtype=DTYPES[dtype], fp8=dtype == "fp8")
    records: list[dict] = []
    requests, alone = prompts(model.config.vocab_size), None
    with bar(console, "generating", len(BATCHES)) as step:
        for batch in BATCHES:
            rate, tokens, share = throughput(model, requests[:batch])
            alone = alone or tokens[0]
            records.append({"kind": "engine", "dtype": dtype, "requests": batch, "rate": rate,
                            "host_share": share, "same": tokens[0] == alone})  # fmt: skip
            step(f"{batch} requests")
    for record in records:
        record["gain"] = record["rate"] / records[0]["rate"]
    return records


def table(records: list[dict], title: str) -> Listing:
    view = Listing(title)
    view.add_columns("requests", "tokens/s", "to one request", "scheduling and sampling",
                     numeric=True)  # fmt: skip
    view.add_columns("same tokens")
    for r in records:
        view.add_row(f"{r['requests']}", f"{r['rate']:,.1f}", f"{r['gain']:.1f}x",
                     f"{r['host_share']:.1%}", "yes" if r["same"] else "no")  # fmt: skip
    return view


def main(
    checkpoint: Path = CHECKPOINT,
    dtype: str = typer.Option("fp8", help="fp32, bf16, or fp8 weights with bf16"),
    threads: int = typer.Option(os.cpu_count() or 1, min=1, help="of the products"),
    keep: bool = KEEP,
    folder: Path = FOLDER,
) -> None:
    """Times the engine on a checkpoint; 1 if a batch changes a request's tokens."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}, got {dtype!r}")
    torch.set_num_threads(threads)
    console, about = screen(), machine.describe()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    records = measure(checkpoint, dtype, console)
    console.print(table(records, f"{checkpoint}, {dtype}; {threads} threads; {about['cpu']}"))
    file = results.path(about, keep, folder)
    file = file.with_stem(f"{file.stem}-engine-{checkpoint.absolute().parent.name}")
    results.write([{"kind": "machine", **about, "config": config}, *records], file)
    console.print(f"written: {file}", soft_wrap=True)
    raise typer.Exit(0 if all(r["same"] for r in records) else 1)


if __name__ == "__main__":
    typer.run(main)
