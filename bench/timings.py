"""Times ops and the other providers of the same result; no speed without a passed check.

A row is one op at one size: every backend of deepkern that is timed, and the op's providers
(deepkern.testing.providers). Each is checked on the row's inputs, then all are timed in interleaved
rounds. Interpreted Triton is not timed.

The results are compared with the reference. At sizes at which the reference would take too long,
they are compared with "eager", the op's `baseline`, and that with the nearest of them;
`Speed.against` says which.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import deepkern
from deepkern.runtime import backends
from deepkern.testing import compare, providers
from deepkern.testing.costs import Cost, tensor_bytes
from deepkern.testing.ops import cost, facts
from deepkern.testing.providers import Provider
from deepkern.testing.timing import Timing, time_calls

from . import checks, results, rotation, shapes
from .ceilings import Ceilings, time_of

OURS = "deepkern"  # a backend's provider is called "deepkern cpu"
REFERENCE, EAGER, COMPILE = "reference", "eager", "compile"
# FLOPs and bytes up to which a device computes the reference in float64, in some seconds.
REFERENCE_FLOPS = {"cpu": 1e10, "cuda": 2e12}
REFERENCE_BYTES = {"cpu": 1 << 29, "cuda": 4 << 30}
FEWEST = 3  # copies of a slow call's inputs
LONGEST_CALL = 5.0  # seconds that a call may take at the ceilings of the device
IN_MEMORY = 4  # bytes of a row's providers over those of its inputs


@dataclass(frozen=True)
class Speed:
    """One provider in one row; docs/performance.md describes the fields of its record."""

    op: str
    size: str
    shapes: str
    provider: str
    about: str = ""
    ok: bool = True
    error: float | None = None
    tolerance: float | None = None
    against: str = ""  # what the result was compared with: "reference" or a provider
    note: str = ""  # why it has no time, or on a GPU no CUDA graph
    samples: tuple[float, ...] = ()
    least: float | None = None
    median: float | None = None
    spread: float | None = None
    calls: int = 0
    graph: float | None = None
    host: float | None = None
    bytes: int | None = None
    flops: int | None = None
    fp8: bool = False
    gb_per_s: float | None = None
    tflops: float | None = None
    roof_us: float | None = None
    roof_share: float | None = None
    limit: str = ""

    @property
    def ours(self) -> bool:
        return results.is_ours(self.provider)

    @property
    def backend(self) -> str:
        """Of one of ours, such as "cpu"."""
        return self.provider.split()[-1]

    @property
    def microseconds(self) -> float | None:
        """The time that counts: the median on a GPU, the least on a CPU; None if not timed."""
        return self.least if self.host is None else self.median

    def record(self) -> dict:
        return {"kind": "speed", **asdict(self)}


Row = list[Speed]


def timed_backends(op: str, device: torch.device) -> list[str]:
    """The backends to time: on a CPU the one that auto chooses, on a GPU all kernels."""
    registered = deepkern.OPS[op]
    names: tuple[str, ...] = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    if backends.interpreting():
        names = tuple(name for name in names if name != "triton")
    return [
        name for name in names if backends.unsupported_reason(registered, name, device) is None
    ] or ["torch"]


def plan(
    ops: Sequence[str], device: torch.device, named: str = "default"
) -> list[tuple[str, dict]]:
    """(op, size) of every row of a set of shapes; ops without a size in the set are left out."""
    rows = []
    for op in ops:
        with contextlib.suppress(shapes.NoShapes):
            rows += [(op, size) for size in shapes.of(op, named, device)[1]]
    return rows


@dataclass(frozen=True)
class Request:
    """What to time in each row."""

    device: torch.device
    ceilings: Ceilings
    shapes: str = "default"
    seconds: float = 0.3  # for each provider
    backends: tuple[str, ...] | None = None  # by default `timed_backends`
    # Their names; None: all but "compile", whose first call takes up to minutes.
    providers: tuple[str, ...] | None = None


def time_op(op: str, size: dict, request: Request, failed: Collection[str] = ()) -> Row:
    """One row. A backend in `failed` is not timed, because a check at another size failed.

    Backends that serve the op but not these arguments are left out.
    Raises shapes.TooLarge if the row does not fit in memory, or a call would take too long.
    """
    device, registered = request.device, deepkern.OPS[op]
    label = Speed(op, checks.text(size), request.shapes, "")
    with torch.no_grad():
        args = registered.positional(shapes.inputs(op, size, device))
        work = cost_of(op, args)
        refuse_excess(args, work, request)
        names = request.backends or tuple(timed_backends(op, device))
        entries = [
            Entry(label_of(label, f"{OURS} {name}", name in failed), ours(op, args, name), name)
            for name in names
            if backends.unsupported_reason(registered, name, device, args) is None
        ]
        if not entries:
            return []
        entries += theirs(op, args, label, request)
        check(op, args, entries, work, device)
        measure(op, args, entries, request)
    return [finished(entry.speed, entry.timing, work, request) for entry in entries]


def failed_row(op: str, size: dict, request: Request, error: Exception) -> Row:
    """The row of a size at which the inputs or the reference fail."""
    entry = Entry(Speed(op, checks.text(size), request.shapes, OURS), Provider(OURS, "", list))
    entry.raised(error)
    return [entry.speed]


def cost_of(op: str, args: tuple) -> Cost:
    """The cost of a call, before it is made."""
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, args)
    return cost(op, args, deepkern.OPS[op].allocate(*on_meta))


def refuse_excess(args: tuple, work: Cost, request: Request) -> None:
    needed, free = IN_MEMORY * tensor_bytes(args), shapes.free_memory(request.device)
    if needed > free:
        raise shapes.TooLarge(f"needs {shapes.gib(needed)}, {shapes.gib(free)} are free")
    seconds = request.ceilings.roof(work, request.device).microseconds / 1e6
    if seconds > LONGEST_CALL:
        raise shapes.TooLarge(f"a call takes at least {seconds:.0f} s on this device")


def label_of(label: Speed, provider: str, failed: bool = False, about: str = "") -> Speed:
    note = "not timed: its check failed" if failed else ""
    return replace(label, provider=provider, about=about, ok=not failed, note=note)


@dataclass
class Entry:
    """A provider of a row while the row is measured."""

    speed: Speed
    provider: Provider
    backend: str | None = None  # of one of ours
    outputs: tuple | None = None
    timing: Timing | None = None

    @property
    def context(self) -> Callable[[], contextlib.AbstractContextManager]:
        if self.backend is None:
            return contextlib.nullcontext
        return functools.partial(deepkern.backend, self.backend)

    def fail(self, note: str) -> None:
        self.speed = replace(self.speed, ok=False, note=note)

    def raised(self, error: Exception) -> None:
        lines = str(error).splitlines() or [""]
        self.fail(f"{type(error).__name__}: {lines[0]}"[:300])


def finished(speed: Speed, timing: Timing | None, work: Cost, request: Request) -> Speed:
    """`speed` with its row's cost and, if it was timed, its times and the share of the roof."""
    speed = replace(speed, bytes=work.bytes, flops=work.flops, fp8=work.fp8)
    if timing is not None:
        elapsed = time_of(timing, request.device)
        speed = replace(
            speed, samples=timing.samples, least=timing.least, median=timing.median,
            spread=timing.spread, calls=timing.calls, graph=timing.graph, host=timing.host,
            note=f"no CUDA graph: {timing.no_graph}" if timing.no_graph else speed.note,
            gb_per_s=work.bytes / elapsed / 1e3,
            tflops=work.flops / elapsed / 1e6 if work.flops else None,
        )  # fmt: skip
    return with_roof(speed, request.ceilings, request.device)


def with_roof(speed: Speed, rates: Ceilings, device: torch.device) -> Speed:
    """The speed with its share of the roof that follows from `rates`."""
    if speed.bytes is None:
        return speed
    roof = rates.roof(Cost(speed.bytes, speed.flops or 0, speed.fp8), device)
    elapsed = speed.microseconds
    share = roof.microseconds / elapsed if elapsed else None
    return replace(speed, roof_us=roof.microseconds, limit=roof.limit, roof_share=share)


def ours(op: str, args: tuple, backend: str) -> Provider:
    call = functools.partial(getattr(deepkern, op), *args)
    return Provider(f"{OURS} {backend}", "", call)


def theirs(op: str, args: tuple, label: Speed, request: Request) -> list[Entry]:
    """The requested providers; a name that the op does not have here is an entry that failed."""
    names = request.providers
    found = providers.of(op, args, names)
    if names is None:
        found = [provider for provider in found if provider.name != "compile"]
    entries = [Entry(label_of(label, p.name, about=p.about), p) for p in found]
    for name in names or ():
        if name not in [p.name for p in found]:
            entries.append(Entry(label_of(label, name), Provider(name, "", lambda: None)))
            entries[-1].fail("this op has no such provider here: not installed, or not for it")
    return entries


# Checks: on copies of the arguments, because some ops write to them.


def check(op: str, args: tuple, entries: list[Entry], work: Cost, device: torch.device) -> None:
    """Compares the outputs of each entry; marks those that fail."""
    for entry in entries:
        if entry.speed.ok:
            compute(op, args, entry)
    against, want = truth(op, args, entries, work, device)
    compared = [entry for entry in entries if entry.outputs is not None]
    for entry in compared:
        if want is None:
            entry.fail("not timed: there is no result to compare with")
        elif not (against == entry.provider.name == EAGER):
            compare_entry(op, args, entry, against, want)
        entry.outputs = None
    if against == EAGER:
        compare_eager(compared)


def compare_eager(compared: list[Entry]) -> None:
    """Where the others are compared with "eager", it needs one that agrees to be timed."""
    others = [e.speed for e in compared if e.provider.name != EAGER and e.speed.ok]
    for entry in compared:
        if entry.provider.name == EAGER:
            nearest = min(others, key=lambda speed: speed.error or 0.0, default=None)
            if nearest is None:
                entry.fail("not timed: no other result agrees with it")
            else:
                entry.speed = replace(
                    entry.speed, error=nearest.error, tolerance=nearest.tolerance,
                    against=nearest.provider,
                )  # fmt: skip


def compute(op: str, args: tuple, entry: Entry) -> None:
    """The outputs of one provider: what it writes in place it writes to copies."""
    provider = entry.provider
    try:
        with entry.context(), compare.poison():
            if entry.backend is not None:
                entry.outputs = checks.outputs(getattr(deepkern, op), args)
            elif provider.name == EAGER:
                entry.outputs = checks.outputs(facts(op).baseline, args)
            elif provider.name == COMPILE:
                entry.outputs = checks.outputs(providers.compiled_baseline(op), args)
            else:
                entry.outputs = provider.outputs(provider.call())
    except Exception as error:
        entry.raised(error)


def truth(
    op: str, args: tuple, entries: list[Entry], work: Cost, device: torch.device
) -> tuple[str, tuple | None]:
    """("reference" or "eager", the outputs to compare with; None if that fails)."""
    limits = REFERENCE_FLOPS[device.type], REFERENCE_BYTES[device.type]
    if work.flops <= limits[0] and work.bytes <= limits[1]:
        with contextlib.suppress(torch.OutOfMemoryError):
            return REFERENCE, checks.outputs(getattr(deepkern.reference, op), args)
    eager = next((e for e in entries if e.provider.name == EAGER), None)
    if eager is not None:
        return EAGER, eager.outputs
    with contextlib.suppress(Exception):  # such as out of memory
        return EAGER, checks.outputs(facts(op).baseline, args)
    return EAGER, None


def compare_entry(op: str, args: tuple, entry: Entry, against: str, want: tuple) -> None:
    got, provider = entry.outputs, entry.provider
    assert got is not None
    if entry.backend is not None and against == REFERENCE:
        bound = checks.tolerance(op, want)
        result = compare_exactly(op, got, want)
    else:
        bound = provider.tolerance
        result = checks.compare_plain(op, args, got, want, bound, against)
    ok, error, note = result
    if ok and (row := checks.worst_row(got, want)) > checks.ROW_TOLERANCE:
        ok, note = False, f"a row differs by {row:.2g} from {against} > {checks.ROW_TOLERANCE:g}"
    note = "" if ok else f"not timed: {note}"
    entry.speed = replace(
        entry.speed, ok=bool(ok), error=error, tolerance=bound, against=against, note=note
    )


def compare_exactly(op: str, got: tuple, want: tuple) -> tuple[bool | None, float | None, str]:
    """Within the bounds of docs/numerics.md."""
    try:
        return True, compare.assert_matches(op, got, want), ""
    except compare.Mismatch as mismatch:
        return False, checks.largest(got, want), str(mismatch)


# Times.


def measure(op: str, args: tuple, entries: list[Entry], request: Request) -> None:
    """Times the entries that passed, in turns, each with copies of the arguments."""
    together = {e.provider.name: e for e in entries if e.speed.ok and not e.provider.time_alone}
    calls: dict[str, list[Callable[[], object]]] = {name: [] for name in together}
    variants = rotation.variants(args, request.device)
    for variant in variants:
        for name, call in variant_calls(op, variant, together, variant is args).items():
            calls[name].append(call)
    for name, entry in together.items():
        calls[name] = warmed_up(entry, calls[name], request.seconds)
    timings = time_calls(
        {name: given for name, given in calls.items() if given}, request.device, request.seconds,
        contexts={name: entry.context for name, entry in together.items()},
    )  # fmt: skip
    for name, timing in timings.items():
        together[name].timing = timing
    for entry in entries:
        if entry.speed.ok and entry.provider.time_alone:
            entry.timing = entry.provider.time_alone(request.seconds, len(variants))


def warmed_up(entry: Entry, calls: list, seconds: float) -> list:
    """The calls that `seconds` suffice for, at least FEWEST, each of which was made once.

    More copies of the inputs of a slow call would not be used, and take as long to prepare as the
    call; one that takes longer than `seconds` is timed once. The check has prepared the first call.
    Returns [] if a call fails; then the entry fails.
    """
    try:
        with entry.context():
            start = time.perf_counter()
            calls[0]()
            wait()
            elapsed = time.perf_counter() - start
            count = 1 if elapsed > 2 * seconds else max(FEWEST, int(seconds / elapsed))
            for call in calls[1:count]:
                call()
            wait()
    except Exception as error:
        entry.raised(error)
        return []
    return calls[:count]


def wait() -> None:
    """Until a GPU has done its work: an error of the work is then raised here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def variant_calls(
    op: str, args: tuple, entries: dict[str, Entry], first: bool
) -> dict[str, Callable[[], object]]:
    """The call of each entry on `args`; the first ones are those that were checked."""
    if first:
        return {name: entry.provider.call for name, entry in entries.items()}
    found = {name: ours(op, args, e.backend) for name, e in entries.items() if e.backend}
    others = tuple(name for name in entries if name not in found)
    found |= {provider.name: provider for provider in providers.of(op, args, others)}
    return {name: found[name].call for name in entries}
