"""`python -m bench inspect`: compiles every kernel for every GPU target, without a GPU.

This runs `bench.compiling` in several processes, prints a table, and compares with the committed
budgets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from . import budgets
from .command_line import bar, screen
from .listing import Listing

ROOT = Path(__file__).parent.parent


class Worker:
    """A `python -m bench.compiling` process, restarted if a compiler crashes it."""

    def __init__(self):
        self.process: subprocess.Popen | None = None

    def inspect(self, op: str, target: str) -> list[dict]:
        if self.process is None or self.process.poll() is not None:
            self.process = self.start()
        self.process.stdin.write(f"{op} {target}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        error = f"the compiling process died with exit code {code}"
        return [
            {"op": op, "target": target, "size": 0, "kernel": "?", "config": "", "error": error}
        ]

    def start(self) -> subprocess.Popen:
        paths = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        env.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        env.pop("TRITON_INTERPRET", None)  # interpreted kernels do not compile
        command = [sys.executable, "-m", "bench.compiling"]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdin=pipe, stdout=pipe,
                                stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def compile_all(
    ops: Sequence[str],
    targets: Sequence[str],
    processes: int = 2,
    done: Callable[[str, str], object] = lambda op, target: None,
) -> list[dict]:
    """Records of every kernel of `ops` on `targets`, in that order; see bench/assembly.py."""
    jobs = [(op, target) for op in ops for target in targets]
    thread = threading.local()
    workers: list[Worker] = []

    def start_worker():
        thread.worker = Worker()
        workers.append(thread.worker)

    records = {}
    with ThreadPoolExecutor(processes, initializer=start_worker) as pool:
        running = {pool.submit(lambda job: thread.worker.inspect(*job), job): job for job in jobs}
        try:
            for future in as_completed(running):
                records[running[future]] = future.result()
                done(*running[future])
        finally:  # after Ctrl-C, too: then jobs are left, and processes compile
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()
    return [record for job in jobs for record in records[job]]


def table(records: list[dict]) -> Listing:
    """One row for every kernel, tile config and target that compiles."""
    view = Listing("Kernels as compiled: op, kernel, tile config")
    view.add_columns("target")
    view.add_columns("regs", "spill B", "shared KiB", "blocks/SM", "TMA", "async", numeric=True)
    view.add_columns("matrix instructions")
    compiled = [r for r in budgets.worst(records).values() if "error" not in r]
    for record in sorted(compiled, key=lambda r: (r["op"], r["kernel"], r["config"])):
        heading = f"{record['op']} {record['kernel']} {record['config']}"
        view.add_row(record["target"], *_cells(record), heading=heading)
    return view


def _cells(record: dict) -> list[str]:
    matrix = escape(" ".join(f"{name} {n}" for name, n in record["matrix"].items()))
    if record["dots"] and not matrix:
        matrix = "[red]none"
    spill = f"[red]{record['spill_bytes']}" if record["spill_bytes"] else "0"
    shared = f"{record['shared'] / 1024:.1f}"
    blocks = f"{record['blocks']} ({record['limit']})"
    tma, copies = (str(record[name] or "") for name in ("tma", "async_copy"))
    return [str(record["registers"]), spill, shared, blocks, tma, copies, matrix]


def problem_lines(problems: dict[tuple, list[str]]) -> list[str]:
    """The problems as text; targets with the same problem of a kernel have one line."""
    targets: dict[tuple, list[str]] = {}
    for (op, kernel, config, target), texts in problems.items():
        for text in texts:
            targets.setdefault((f"{op} {kernel} [{config}]", text), []).append(target)
    return [f"{kernel} on {' '.join(names)}: {text}" for (kernel, text), names in targets.items()]


def run(
    ops: Sequence[str],
    targets: Sequence[str],
    check: bool = False,
    write: bool = False,
    processes: int = 2,
    console: Console | None = None,
) -> int:
    """Compiles and prints; with `check` or `write` compares or rewrites the budgets."""
    console = console or screen()
    with bar(console, "compiling", len(ops) * len(targets)) as step:
        records = compile_all(ops, targets, processes, lambda op, target: step(f"{op} {target}"))
    committed = budgets.load()
    problems = budgets.problems(records, committed if check else None, ops, targets)
    console.print(table(records))
    for line in problem_lines(problems):
        console.print(line, style="red", markup=False, soft_wrap=True)
    kernels = len({(r["op"], r["kernel"]) for r in records if "error" not in r})
    variants = len(budgets.worst(records))
    console.print(f"{kernels} kernels in {variants} variants over {len(targets)} targets, "
                  f"{len(problems)} with problems")  # fmt: skip
    if write:
        budgets.write(budgets.merged(committed, records, ops, targets))
        console.print(f"budgets written to {budgets.FILE}")
    return 1 if problems else 0
