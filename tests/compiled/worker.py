"""The pytest process that runs the tests of this folder; conftest.py starts it.

    python worker.py DESCRIPTOR ROOT

It reads lines `[test id, id of the test after it]` (JSON) and writes for each a line with the
serialized reports to the file descriptor.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

HERE = Path(__file__).parent


class Loop:
    """A plugin that runs the requested tests, in the place of all."""

    def __init__(self, descriptor: int):
        self.answers = os.fdopen(descriptor, "w")
        self.requests = os.fdopen(os.dup(0))  # pytest's capture replaces stdin

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self.requests:
            test, following = json.loads(line)
            if test not in items:
                self.answer(f"{test}: an error while tests/compiled was collected: pytest {HERE}")
                continue
            reports = runtestprotocol(items[test], nextitem=items.get(following), log=False)
            serialize = session.config.hook.pytest_report_to_serializable
            self.answer([serialize(config=session.config, report=report) for report in reports])
        return True

    def answer(self, reports: list[dict] | str) -> None:
        """Sends the reports of a test, or why there are none."""
        self.answers.write(json.dumps(reports, default=str) + "\n")
        self.answers.flush()


def main() -> int:
    descriptor, root = int(sys.argv[1]), sys.argv[2]
    arguments = ["-p", "no:cacheprovider"]
    arguments += [f"--rootdir={root}", str(HERE)]
    return pytest.main(arguments, plugins=[Loop(descriptor)])


if __name__ == "__main__":
    sys.exit(main())
