"""The committed budgets of every compiled kernel, and their checks.

`budgets.json` has the resources of each op, kernel, tile config and target under the pinned Triton.
Other versions of Triton allocate registers a little differently. With them we check only that
every kernel compiles, does not spill, and computes tl.dot with matrix instructions.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import triton

from .results import write_text

FILE = Path(__file__).parent / "budgets.json"
PINNED = "3.7.1"  # the Triton version that the budgets were measured with


def key(record: dict) -> tuple[str, str, str, str]:
    """The key of a record's budget."""
    return record["op"], record["kernel"], record["config"], record["target"]


def load(file: Path = FILE) -> dict[tuple, dict]:
    """key -> {registers, shared, matrix}."""
    if not file.exists():
        return {}
    return {
        (op, kernel, config, target): budget
        for op, kernels in json.loads(file.read_text()).items()
        for kernel, configs in kernels.items()
        for config, targets in configs.items()
        for target, budget in targets.items()
    }


def write(budgets: dict[tuple, dict], file: Path = FILE) -> None:
    """Writes all budgets, sorted, one per line."""
    lines, tree = [], {}
    for (op, kernel, config, target), budget in sorted(budgets.items()):
        tree.setdefault(op, {}).setdefault(kernel, {}).setdefault(config, {})[target] = budget
    for op, kernels in tree.items():
        lines.append(f" {json.dumps(op)}: {{")
        for kernel, configs in kernels.items():
            lines.append(f"  {json.dumps(kernel)}: {{")
            for config, targets in configs.items():
                rows = [f"    {json.dumps(t)}: {json.dumps(b)}" for t, b in targets.items()]
                lines.append(f"   {json.dumps(config)}: {{\n" + ",\n".join(rows) + "\n   },")
            lines[-1] = lines[-1].removesuffix(",")
            lines.append("  },")
        lines[-1] = lines[-1].removesuffix(",")
        lines.append(" },")
    if lines:
        lines[-1] = lines[-1].removesuffix(",")
    write_text("{\n" + "\n".join(lines) + "\n}\n", file)


def worst(records: list[dict]) -> dict[tuple, dict]:
    """One record per key with the larger resources: two sizes may differ in alignment only."""
    worst_of: dict[tuple, dict] = {}
    for record in records:
        other = worst_of.setdefault(key(record), record)
        if "error" in record:
            worst_of[key(record)] = record
        elif "error" not in other and record is not other:
            largest = {n: max(record[n], other[n]) for n in ("registers", "shared", "spill_bytes")}
            fewest = record if len(record["matrix"]) < len(other["matrix"]) else other
            worst_of[key(record)] = {**fewest, **largest}
    return worst_of


def merged(
    committed: dict[tuple, dict], records: list[dict], ops: Sequence[str], targets: Sequence[str]
) -> dict[tuple, dict]:
    """`committed`, with the budgets of `ops` on `targets` replaced by those of `records`."""
    kept = {k: b for k, b in committed.items() if k[0] not in ops or k[3] not in targets}
    fresh = {
        k: {"registers": r["registers"], "shared": r["shared"], "matrix": sorted(r["matrix"])}
        for k, r in worst(records).items()
        if "error" not in r
    }
    return {**kept, **fresh}


def problems(
    records: list[dict],
    committed: dict[tuple, dict] | None,
    ops: Sequence[str] = (),
    targets: Sequence[str] = (),
    triton_version: str = triton.__version__,
) -> dict[tuple, list[str]]:
    """The problems by key. Without `committed`, or on another Triton, budgets are not compared."""
    compiled = worst(records)
    wrong = {k: _unconditional(record) for k, record in compiled.items()}
    if committed is not None and triton_version == PINNED:
        for k, record in compiled.items():
            if "error" not in record:
                wrong[k] += _against(record, committed.get(k))
        for k in committed:
            if k not in compiled and k[0] in ops and k[3] in targets:
                wrong[k] = ["has a budget but is no longer compiled at any inspect size"]
    return {k: texts for k, texts in wrong.items() if texts}


def _unconditional(record: dict) -> list[str]:
    if "error" in record:
        return [f"does not compile: {record['error']}"]
    wrong = []
    if record["spill_bytes"]:
        wrong.append(f"spills {record['spill_bytes']} bytes")
    if record["dots"] and not record["matrix"]:
        wrong.append("multiplies without matrix instructions")
    return wrong


def _against(record: dict, budget: dict | None) -> list[str]:
    if budget is None:
        return ["has no budget: run `python -m bench inspect --write-budgets`"]
    wrong = []
    lost = sorted(set(budget["matrix"]) - set(record["matrix"]))
    if lost:
        wrong.append(f"lost its matrix instructions {' '.join(lost)}")
    for name, unit in (("registers", "registers"), ("shared", "bytes of shared memory")):
        if record[name] > budget[name]:
            wrong.append(f"takes {record[name]} {unit}, its budget is {budget[name]}")
    return wrong
