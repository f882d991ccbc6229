"""The tables of README.md that committed results generate: `python -m bench report --readme`.

A table is between two comments, of which the first one names its kind and its result:

    <!-- ops from bench/results/2026-11-30T12-00-00-cpu-kept.jsonl -->
    <!-- end -->

The command replaces what is between them. To show another run, change the name and run the command.
A result counts if it is committed, if its commit had no changed files and if its checks passed.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from . import machine, results, sides
from .command_line import screen
from .families import family_of
from .results import Run
from .summary import number

README = machine.ROOT / "README.md"
TABLE = re.compile(r"(<!-- (\w+) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
OPENING = re.compile(r"<!-- \w+ from ")
TITLES = {
    "quant": "Casts", "matmul": "Matrix products", "attention": "Latent attention",
    "experts": "Experts",
}  # fmt: skip


class Unfit(ValueError):
    """A result from which README.md cannot be generated; the message names it and the reason."""


def run(check: bool, readme: Path = README, console: Console | None = None) -> int:
    """Rewrites the tables; 1 if a result is unfit, or with `check` if a table differs from it."""
    console = console or screen()
    text = readme.read_text(encoding="utf-8")
    try:
        fresh = generated(text, readme.parent)
    except (Unfit, results.Invalid, results.OldSchema) as error:
        console.print(f"{readme.name}: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    if check and fresh != text:
        console.print(f"{readme.name} differs from its results: python -m bench report --readme")
        return 1
    if not check:
        results.write_text(fresh, readme)
    count = len(TABLE.findall(text))
    console.print(
        f"{readme.name}: {count} generated tables {'are current' if check else 'written'}"
    )
    return 0


def generated(text: str, root: Path) -> str:
    """`text` with each table from its result; raises `Unfit`, `Invalid` or `OldSchema`."""
    if len(TABLE.findall(text)) != len(OPENING.findall(text)):
        raise Unfit("a table has no <!-- end -->")

    def table(match: re.Match) -> str:
        opening, kind, name, end = match.groups()
        if kind not in KINDS:
            raise Unfit(f"no table {kind!r}; there are {', '.join(KINDS)}")
        make, schemas = KINDS[kind]
        found = fit(root / name, name, schemas)
        return f"{opening}\n{paragraph(provenance(found, name))}\n\n{make(found)}\n\n{end}"

    return TABLE.sub(table, text)


def fit(file: Path, name: str, schemas: tuple[int, ...]) -> Run:
    """The run in `file`, if README.md may show it."""
    if not file.is_file():
        raise Unfit(f"{name}: no such file")
    if not results.is_committed(file):
        raise Unfit(f"{name}: commit it first")
    found = results.load(file, schemas)
    commit = found.machine["commit"]
    if not commit or commit.endswith("+"):
        raise Unfit(f"{name}: made at commit {commit}, which is not the whole source")
    return found


def provenance(found: Run, name: str) -> str:
    """Device, versions, commit and command of a run, and its file."""
    about = found.machine
    gpu, command = about["gpu"], about.get("command")
    where = f"driver {about.get('driver')}" if gpu else f"threads: {about['threads']}"
    isa = "" if gpu else f", {about['torch_isa']}"
    return (
        f"{found.device}, {where}{isa}; deepkern {about['deepkern']} at commit {about['commit']}, "
        f"torch {about['torch']}, triton {about['triton']}, Python {about['python']}"
        f"{f'; `{command}`' if command else ''} ([result]({name})):"
    )


def ops(found: Run) -> str:
    """One row per op and size, with the fastest backend; by family."""
    time = "median" if found.machine["gpu"] else "least"
    lines: dict[str, list[list[str]]] = {family: [] for family in TITLES}
    for (op, size), row in sides.rows(found).items():
        lines[family_of(op)].append(
            [f"`{op}`", size, *op_cells(row.records, time, found.file.name)]
        )
    header = ("op", "size", "backend", "µs", "rate", "of the roof", "eager / ours",
              "fastest other / ours")  # fmt: skip
    about = paragraph(
        f"µs: the {time} of all rounds. `eager`, the op in plain PyTorch, was timed in turn with "
        "it, and so were torch's fused functions where there are any; (once): it takes so long "
        "that it was timed once. A share of the roof above 100 %: other work slowed the ceiling's "
        "measurement."
    )
    tables = [f"**{TITLES[family]}**\n\n{markdown(header, rows, 3)}"
              for family, rows in lines.items() if rows]  # fmt: skip
    return "\n\n".join([about, *tables])


def op_cells(row: dict[str, dict], time: str, name: str) -> list[str]:
    """Backend, time, rate, share of the roof and ratio; only the reason if nothing was timed."""
    ours = [record for name, record in row.items() if results.is_ours(name)]
    for record in ours:
        if record["ok"] is False:
            raise Unfit(f"{name}: {record['op']} {record['size']}: {record['note']}")
    timed = [record for record in ours if record["samples"]]
    if not timed:
        return ["", "", "", "", "", ours[0]["note"] if ours else ""]
    best = min(timed, key=lambda record: record[time])
    bound = best["limit"] or ("compute" if best["flops"] else "memory")
    rate = products(best["tflops"]) if bound == "compute" else f"{number(best['gb_per_s'])} GB/s"
    roof = f"{100 * best['roof_share']:.0f} %, {bound}" if best["roof_share"] else ""
    eager = row.get("eager", {"samples": []})
    ratio = f"{number(eager[time] / best[time])}x" if eager["samples"] else ""
    ratio += " (once)" if len(eager["samples"]) == 1 else ""
    backend = best["provider"].removeprefix("deepkern ")
    return [backend, number(best[time]), rate, roof, ratio, fastest_other(row, best, time)]


def fastest_other(row: dict[str, dict], best: dict, time: str) -> str:
    """Such as "1.7x, linear_bf16": the fastest provider that is neither deepkern nor eager."""
    others = [r for name, r in row.items() if r["samples"] and name != "eager"
              and not results.is_ours(name)]  # fmt: skip
    if not others:
        return ""
    other = min(others, key=lambda record: record[time])
    return f"{number(other[time] / best[time])}x, `{other['provider']}`"


def products(tflops: float) -> str:
    """A rate of FLOPs; a CPU's in GFLOPS."""
    return f"{number(tflops)} TFLOPS" if tflops >= 1 else f"{number(1e3 * tflops)} GFLOPS"


def model(found: Run) -> str:
    """The model's figures: bits, tokens per second, requests in a batch, drafts."""
    failed = [r["name"] for r in found.of("model") if r["ok"] is False]
    if failed:
        raise Unfit(f"{found.file.name}: check failed: {', '.join(failed)}")
    values = {r["name"]: r["value"] for r in found.of("model")}

    def value(name: str) -> float:
        if name not in values:
            raise Unfit(f"{found.file.name}: no record {name!r}")
        return values[name]

    def row(title: str, *names: str, digits: str = ",.0f") -> list[str]:
        return [title, *(format(value(name), digits) if name else "" for name in names)]

    bits = [f"held-out bits per byte, {name}" for name in ("plain fp32", "bf16", "fp8")]
    single = [
        row("held-out bits per byte, first 8 KiB of `heldout.txt`", *bits, digits=".4f"),
        row("prefill, tokens/s", "", "prefill, bf16", "prefill, fp8"),
        row("decode, tokens/s", "", "decode, bf16", "decode, fp8"),
    ]
    batches = sorted(int(n.removeprefix("engine, batch ")) for n in values if "engine, batch " in n)
    many = [
        row("the engine", *(f"engine, batch {n}" for n in batches)),
        row("transformers on the same weights", *(f"transformers, batch {n}" for n in batches)),
    ]
    title = f"one sequence{'' if found.machine['gpu'] else ', one thread'}"
    return "\n\n".join((
        markdown((title, "plain PyTorch, fp32", "bf16", "FP8"), single, 1),
        markdown(("requests in a batch, decode in bf16, tokens/s", *map(str, batches)), many, 1),
        paragraph(model_text(found, value, batches[-1])),
    ))  # fmt: skip


def model_text(found: Run, value: Callable[[str], float], largest: int) -> str:
    """The figures that need no table."""
    same = [f"{r['name'].capitalize()}, {r['note']}." for r in found.of("model")
            if r["ok"] and "same tokens" in r["name"]]  # fmt: skip
    difference = f"{value('largest logit difference to plain PyTorch, fp32'):.1e}"
    return (
        f"{' '.join(same)} Scheduling and sampling take "
        f"{100 * value('scheduling and sampling'):.1f} % of a step of {largest} requests. "
        f"{100 * value('drafts accepted'):.0f} % of the prediction layer's drafts are accepted; "
        f"greedy decoding with them is {value('speculative decoding'):.2f} times as fast. The "
        f"largest logit difference to plain PyTorch is {difference.replace('e-0', 'e-')} in fp32."
    )


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first `left` columns are left-aligned, the others right-aligned."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


# Kind -> its table, and the schemas whose records have what it shows.
KINDS: dict[str, tuple[Callable[[Run], str], tuple[int, ...]]] = {
    "ops": (ops, (results.SCHEMA,)),
    "model": (model, (1, results.SCHEMA)),
}
