"""Runs of a toy model: shared by the tests of checkpoints, and a script whose processes are killed.

    python -m tests.model.training_runs FOLDER '[["kills", 20, 1]]'

The script imports everything once and forks, so that a process starts within milliseconds.  It
prints the results of the calls (`main`) as one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model.config import Config
from model.training.optimizer import MOMENT
from model.training.parallel import Layout, Parallel, whole
from model.training.recipe import Recipe
from model.training.run import Run
from model.training.state import restore, save
from model.training.stop import saved_steps

ROOT = Path(__file__).parents[2]
TOKENS = torch.frombuffer(bytearray(b"for i in range(10):\n    print(i)\n" * 99), dtype=torch.uint8)
TOY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 64,
}


def toy_run(
    folder: Path | None, steps: int = 6, parallel: Parallel | None = None, **recipe: Any
) -> Run:
    values = {"steps": steps, "batch": 2, "window": 16, "precision": "fp32", **recipe}
    return Run(Config(**TOY), Recipe(**values), TOKENS, folder, parallel)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    """Copies of parameters, biases and moments; of DTensors, the part of this process."""
    parameters = dict(run.model.named_parameters())
    tensors = {**parameters, **dict(run.model.named_buffers())}
    for name, parameter in parameters.items():
        for key, moment in run.optimizer.state[parameter].items():
            tensors[f"{name}.{key}"] = moment
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {name: tensor.detach().clone() for name, tensor in local.items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_script(folder: Path, *calls: Any) -> list[Any]:
    """The results of the calls (`main`), made by a script that forks."""
    command = [sys.executable, "-m", "tests.model.training_runs", str(folder), json.dumps(calls)]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def losses(run: Run) -> list[dict[str, Any]]:
    """The log without the seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in run.log]


def finish(run: Run) -> None:
    """Takes the remaining steps without saving."""
    for _ in run.steps():
        pass


def fork(function: Callable[..., None], *args: Any) -> int:
    """Starts a process that calls the function and ends; returns its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException as error:
            print(f"{error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return child


def train(folder: Path, steps: int, pipe: int) -> None:
    """Continues the run; writes the number of every saved step to the pipe."""
    run = toy_run(folder, steps, batch=8, window=48)
    restore(run)
    os.write(pipe, f"restored {run.step}\n".encode())
    for row in saved_steps(run):
        os.write(pipe, f"{row['step']}\n".encode())


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Kills the run `count` times at random moments and lets it finish; what was seen.

    lost: steps that were saved before each kill and are not restored after it.  A run that
    finishes before all kills is followed by another one.
    """
    generator, steps, seen = random.Random(seed), max(2 * count, 8), []
    uninterrupted = toy_run(None, steps, batch=8, window=48)
    finish(uninterrupted)
    expected, state = losses(uninterrupted), state_of(uninterrupted)
    runs, saved, lost, killed = [folder / "0"], 0, [], 0
    while True:
        read, write = os.pipe()
        child = fork(train, runs[-1], steps, write)
        os.close(write)
        if killed < count:
            time.sleep(generator.uniform(0.02, 1.0))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(read) as stream:
            lines = stream.read().splitlines()
        if lines:
            restored = int(lines[0].removeprefix("restored "))
            lost.append(max(saved - restored, 0))
            saved = int(lines[-1].split()[-1])
            seen.append(saved)
        if os.WIFSIGNALED(status):
            killed += 1
        elif status:
            raise RuntimeError(f"the run failed with status {status}")
        elif killed < count:
            runs.append(folder / f"{len(runs)}")
            saved = 0
        else:
            break
    equal = []
    for path in runs:
        run = toy_run(path, steps, batch=8, window=48)
        restore(run)
        equal.append(losses(run) == expected and same_state(state_of(run), state))
    return {"seed": seed, "kills": killed, "steps": seen, "lost": lost, "equal": equal}


def sharded_run(folder: str | None, layout: dict[str, int], **recipe: Any) -> Run:
    """The part of this process in a run with a layout, for example {"data": 2, "experts": 2}."""
    path = None if folder is None else Path(folder)
    return toy_run(path, parallel=Parallel(Layout(**layout)), **recipe)


def train_sharded(
    folder: str, layout: dict[str, int], stop: int, **recipe: Any
) -> tuple[bool, int, list[float]]:
    """Restores, trains up to a step and saves: whether it was restored, from where, losses."""
    run = sharded_run(folder, layout, **recipe)
    restored, first = restore(run), run.step
    while run.step < stop:
        run.take_step()
    save(run)
    return restored, first, [row["main"] for row in run.log[first:]]


def resume_sharded(folder: str, layout: dict[str, int], **recipe: Any) -> bool:
    """Whether a run that continues from step 2 has the losses and the state of the first one."""
    first = sharded_run(folder, layout, **recipe)
    while first.step < first.recipe.steps:
        first.take_step()
        if first.step == 2:
            save(first)
    second = sharded_run(folder, layout, **recipe)
    restored = restore(second) and second.step == 2
    finish(second)
    return (
        restored and losses(first) == losses(second) and same_state(*map(state_of, (first, second)))
    )


def save_sharded(folder: str, layout: dict[str, int]) -> None:
    """Saves the initial weights, and moments that are the weights plus one."""
    run = sharded_run(folder, layout, batch=6)
    for parameter in run.model.parameters():
        for key in ("m", "v"):
            run.optimizer.state[parameter][key] = (parameter.detach() + 1).to(MOMENT)
    save(run)


def load_sharded(folder: str, layout: dict[str, int]) -> list[str]:
    """Names of the tensors that do not have the values of `save_sharded` after a restore."""
    run = sharded_run(folder, layout, batch=6)
    sharded, initial = dict(run.model.named_parameters()), {}
    for name, parameter in sharded.items():
        initial[name] = whole(parameter.detach()).clone()
        parameter.detach().zero_()
    restore(run)
    wrong = []
    for name, value in initial.items():
        tensors = {name: (sharded[name], value)}
        for key in ("m", "v"):
            moment = run.optimizer.state[sharded[name]][key]
            tensors[f"{name}.{key}"] = (moment, (value + 1).to(MOMENT))
        wrong += [key for key, (a, b) in tensors.items() if not torch.equal(whole(a.detach()), b)]
    return wrong


def stop_one(folder: str) -> tuple[str, int]:
    """Process 1 gets SIGTERM in its second step: how each process ends, and its steps."""
    run = sharded_run(folder, {"data": 2})
    try:
        for row in saved_steps(run):
            if row["step"] == 1 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as error:
        return str(error), run.step
    return "finished", run.step


def in_processes(
    folder: Path, count: int, function: Callable[..., Any], *args: Any, **options: Any
) -> list[Any]:
    """Calls the function in gloo processes; the JSON results by rank."""
    folder.mkdir(parents=True)

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        result = function(*args, **options)
        (folder / f"{rank}.json").write_text(json.dumps(result))

    children = [fork(work, rank) for rank in range(count)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"{function.__name__}: statuses of the processes: {statuses}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def main(folder: Path, calls: list[tuple[Any, ...]]) -> list[Any]:
    """Each call is ("kills", count, seed) or (processes, function's name, arguments, options)."""
    results = []
    for number, (first, *rest) in enumerate(calls):
        path = folder / f"call-{number}"
        if first == "kills":
            path.mkdir(parents=True)
            results.append(kills(path, *rest))
        else:
            name, args, options = rest
            results.append(in_processes(path, first, globals()[name], *args, **options))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
