"""Where the families of baselines enter what they have."""

from __future__ import annotations

from collections.abc import Callable

BASELINES: dict[str, Callable] = {}
OTHERS: dict[str, Callable[[tuple], dict[str, Callable[[], object]]]] = {}


def baseline(function: Callable) -> Callable:
    """The plain PyTorch way of the op of that name: it takes its arguments, gives its outputs."""
    BASELINES[function.__name__] = function
    return function


def others(op: str) -> Callable[[Callable], Callable]:
    """Decorates what gives, for the arguments of `op`, further calls to time beside it, by name.

    They are not checked: prepare outside the call (see `prepared`) what its user has prepared, and
    leave out what is not installed. One that cannot run raises, and the report says so.
    """

    def enter(function: Callable) -> Callable:
        OTHERS[op] = function
        return function

    return enter


def prepared(prepare: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call whose preparation is made when it is called first, which is not timed."""
    made: list[Callable[[], object]] = []

    def call() -> object:
        if not made:
            made.append(prepare())
        return made[0]()

    return call
