"""Compares expert placement with DeepSeek's EPLB: time, load of the fullest GPU, and the bound.

    python -m bench.studies.placement        about a minute; keeps the result

EPLB is `deepkern.reference.rebalance_experts`: its algorithm in PyTorch, step for step, and about
as fast as the original. Both run in turn in this process. We report wall time and the processor
time of all threads, which other work on the machine disturbs less.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from rich.console import Console
from torch import Tensor

import deepkern

from .. import machine, results
from ..command_line import screen
from ..listing import Listing

# num_replicas, num_groups, num_nodes, num_gpus: DeepSeek-V3's prefill, and two of its decode.
CASES = [(288, 8, 4, 32), (320, 8, 8, 64), (288, 8, 18, 144)]
LAYERS, EXPERTS = 58, 256
# Load of the experts as a function of uniform u: from even to skewed.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "u": lambda u: u,
    "u^3": lambda u: u**3,
    "-ln(u)": lambda u: -(u + 1e-12).log(),
    "exp(N(0, 1))": lambda u: torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)).exp(),
    "1/rank": lambda u: 1 / (1.0 + u.argsort(1)),
}
DRIFT = 0.2  # relative change of the load between two plans, for the moves


def uniform(layers: int, experts: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layers, experts, generator=generator).double()


def fullness(load: Tensor, phy2log: Tensor, num_gpus: int) -> Tensor:
    """[L]: the load of the fullest GPU over the mean load."""
    loads = deepkern.gpu_loads(load, phy2log, num_gpus)
    return loads.amax(1) / loads.mean(1)


def timed(call: Callable, repeats: int) -> dict[str, float]:
    """Wall and processor seconds of `call`, medians and minima."""
    wall, processor = [], []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "wall": statistics.median(wall),
        "wall_least": min(wall),
        "processor": statistics.median(processor),
        "processor_least": min(processor),
    }


def compare(cluster: tuple[int, ...], layers: int, experts: int, repeats: int) -> dict:
    """One cluster, all layers at once: time, balance and moves."""
    load = uniform(layers, experts, seed=0) ** 3
    calls = {"eplb": deepkern.reference.rebalance_experts, "deepkern": deepkern.rebalance_experts}
    record: dict = {"cluster": cluster, "layers": layers, "experts": experts}
    for name, call in calls.items():
        phy2log = call(load, *cluster)[0]  # also warms up
        seconds = timed(
            lambda call=call: call(load, *cluster), 3 if name == "eplb" else 10 * repeats
        )
        full = fullness(load, phy2log, cluster[3])
        record[name] = {"seconds": seconds, "fullest_over_mean": full.mean().item()}
    bound = deepkern.placement_bound(load, *cluster) / (load.sum(1) / cluster[3])
    record["bound"] = bound.mean().item()
    record["moves"] = moves(load, cluster)
    return record


def moves(load: Tensor, cluster: tuple[int, ...]) -> dict:
    """How many slots change their expert when the load drifts, with and without `plan_moves`."""
    num_replicas, num_groups, num_nodes, num_gpus = cluster
    drifted = load * (1 + DRIFT * (2 * uniform(*load.shape, seed=1) - 1))
    old, new = (deepkern.rebalance_experts(x, *cluster)[0] for x in (load, drifted))

    def plan() -> Tensor:
        return deepkern.plan_moves(old, new, num_gpus, num_nodes, num_groups)[3]

    slots, planned = len(load) * num_replicas, len(plan())
    unplanned = int((old != new).sum())
    return {"slots": slots, "unplanned": unplanned, "planned": planned, "seconds": timed(plan, 3)}


def random_loads(cluster: tuple[int, ...], loads: int, experts: int) -> dict:
    """Over `loads` layers of all shapes: how often deepkern's fullest GPU has less or more load."""
    u = uniform(loads, experts, seed=2)
    load = torch.stack(
        [list(SHAPES.values())[i % len(SHAPES)](u[i : i + 1])[0] for i in range(loads)]
    )
    eplb = deepkern.reference.rebalance_experts(load, *cluster)[0]
    ours = deepkern.rebalance_experts(load, *cluster)[0]
    ratio = fullness(load, ours, cluster[3]) / fullness(load, eplb, cluster[3])
    counts = {
        "better": int((ratio < 1 - 1e-9).sum()),
        "equal": int(((ratio - 1).abs() <= 1e-9).sum()),
        "worse": int((ratio > 1 + 1e-9).sum()),
    }
    return {"cluster": cluster, "loads": loads, **counts, "ratio": ratio.tolist()}


def table(cases: list[dict], loads: list[dict]) -> Listing:
    view = Listing("Expert placement compared with EPLB")
    view.add_columns("replicas / GPUs / nodes")
    view.add_columns("ms", "EPLB ms", "ratio", "CPU ms", "EPLB CPU ms", "ratio", "fullest/mean",
                     "EPLB", "bound", "better, equal, worse", "slots moved", "unplanned",
                     numeric=True)  # fmt: skip
    for case, random in zip(cases, loads, strict=True):
        ours, eplb = (case[name]["seconds"] for name in ("deepkern", "eplb"))
        times = []
        for clock in ("wall", "processor"):
            a, b = ours[clock], eplb[clock]
            times += [f"{a * 1e3:.2f}", f"{b * 1e3:.0f}", f"[green]{b / a:.0f}[/]"]
        R, _, nodes, gpus = case["cluster"]
        balance = [case["deepkern"], case["eplb"]]
        view.add_row(
            f"{R} / {gpus} / {nodes}", *times, *(f"{x['fullest_over_mean']:.4f}" for x in balance),
            f"{case['bound']:.4f}", f"{random['better']}, {random['equal']}, {random['worse']}",
            f"{case['moves']['planned']:,}", f"{case['moves']['unplanned']:,}",
        )  # fmt: skip
    return view


def draw(record: dict, file: Path) -> None:
    """Left: the load of the fullest GPU; right: all random loads, deepkern over EPLB."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    cases = record["cases"]
    rows = {
        "EPLB": [c["eplb"]["fullest_over_mean"] for c in cases],
        "deepkern": [c["deepkern"]["fullest_over_mean"] for c in cases],
        "lower bound": [c["bound"] for c in cases],
    }
    for i, (label, values) in enumerate(rows.items()):
        places = [x + 0.27 * (i - 1) for x in range(len(cases))]
        bars = left.bar(places, [v - 1 for v in values], 0.25, bottom=1, label=label,
                        color=("#8a8a8a", "#3b6fb6", "#e8e8e8")[i])  # fmt: skip
        left.bar_label(bars, [f"{v:.3f}" for v in values], fontsize=8)
    names = [
        f"{c['cluster'][0]} replicas, {c['cluster'][3]} GPUs, {c['cluster'][2]} nodes"
        for c in cases
    ]
    times = []
    for name, case in zip(names, cases, strict=True):
        ours, eplb = (case[x]["seconds"]["processor"] * 1e3 for x in ("deepkern", "eplb"))
        times.append(f"{name}\n{ours:.1f} ms of CPU (EPLB {eplb:,.0f})")
    left.set_xticks(range(len(cases)), times, fontsize=8)
    left.set_title(f"Fullest GPU over the mean, {cases[0]['layers']} layers of u³")
    left.legend(loc="upper left")
    for name, random in zip(names, record["random_loads"], strict=True):
        right.plot(sorted(random["ratio"]), label=f"{name}: {random['worse']} worse")
    right.axhline(1, color="black", linewidth=0.8)
    right.set(title="Fullest GPU, deepkern over EPLB", xlabel="random loads, in order")
    right.legend()
    about = record["machine"]
    figure.suptitle(
        f"{about['cpu']}, {about['cores']} cores · torch {about['torch']} · {about['commit']}"
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)


def run(
    folder: Path = results.FOLDER,
    loads: int = 200,
    cases: list[tuple[int, ...]] | None = None,
    layers: int = LAYERS,
    experts: int = EXPERTS,
    repeats: int = 3,
    console: Console | None = None,
) -> int:
    """Compares, prints, writes a JSON file and a picture; 1 if any placement is worse, else 0."""
    cases = CASES if cases is None else cases
    record = {"kind": "placement", "machine": machine.describe(), "shapes": list(SHAPES)}
    record["cases"] = [compare(c, layers, experts, repeats) for c in cases]
    record["random_loads"] = [random_loads(c, loads, experts) for c in cases]
    console = console or screen()
    console.print(table(record["cases"], record["random_loads"]))
    when = record["machine"]["time"].replace(":", "-").removesuffix("+00-00")
    file = folder / f"{when}-cpu-placement.json"
    fresh, picture = file.with_suffix(".tmp.json"), file.with_suffix(".tmp.png")
    try:
        fresh.write_text(json.dumps(record, allow_nan=False) + "\n")
        draw(record, picture)
        os.replace(picture, file.with_suffix(".png"))
        os.replace(fresh, file)
    finally:
        fresh.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    console.print(f"written: {file}, {file.with_suffix('.png').name}", soft_wrap=True)
    return 1 if any(random["worse"] for random in record["random_loads"]) else 0


def main() -> None:
    """Compares rebalance_experts with DeepSeek's EPLB and keeps the result: about a minute."""
    raise typer.Exit(run())


if __name__ == "__main__":
    typer.run(main)
