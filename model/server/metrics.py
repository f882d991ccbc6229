"""Counters and histograms of the server in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping

from model.server.worker import EngineWorker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)

# Fields of EngineStats -> type and help.
ENGINE = {
    "steps": ("counter", "Forward passes"),
    "prompt_tokens": ("counter", "Prompt tokens that were computed"),
    "cached_prompt_tokens": ("counter", "Prompt tokens whose cache was reused"),
    "generated_tokens": ("counter", "Generated tokens"),
    "preemptions": ("counter", "Requests that gave up their pages"),
    "drafted": ("counter", "Tokens that were drafted"),
    "accepted": ("counter", "Drafted tokens that were accepted"),
    "running": ("gauge", "Requests that are generating"),
    "waiting": ("gauge", "Requests that wait for pages"),
    "pages_used": ("gauge", "Pages of the cache in use"),
    "pages_total": ("gauge", "Pages of the cache"),
}


class Histogram:
    """Counts of observed seconds by their upper bounds."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterable[str]:
        count = 0
        for bound, number in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            count += number
            yield f'{name}_bucket{{le="{bound}"}} {count}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {count}"


class Metrics:
    """What the routes count."""

    def __init__(self) -> None:
        self.responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, worker: EngineWorker) -> str:
        """All metrics, those of the worker and its engine too."""
        lines: list[str] = []

        def add(name: str, kind: str, help: str, samples: Mapping[str, float]) -> None:
            lines.extend((f"# HELP {name} {help}.", f"# TYPE {name} {kind}"))
            lines.extend(f"{name}{labels} {value}" for labels, value in samples.items())

        for field, (kind, help) in ENGINE.items():
            name = f"deepkern_{field}" + ("_total" if kind == "counter" else "")
            add(name, kind, help, {"": getattr(worker.stats, field)})
        add("deepkern_requests_open", "gauge", "Requests that have not ended", {"": worker.open})
        finished = {f'{{reason="{reason}"}}': n for reason, n in sorted(worker.finished.items())}
        add("deepkern_requests_finished_total", "counter", "Requests by their end", finished)
        responses = {
            f'{{route="{route}",status="{status}"}}': n
            for (route, status), n in sorted(self.responses.items())
        }
        add("deepkern_http_responses_total", "counter", "Responses", responses)
        for name, histogram, help in (
            ("deepkern_first_token_seconds", self.first_token, "Time to the first token of a call"),
            ("deepkern_call_seconds", self.duration, "Time to the end of a call"),
        ):
            add(name, "histogram", help, {})
            lines.extend(histogram.lines(name))
        return "\n".join(lines) + "\n"
