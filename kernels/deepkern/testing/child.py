"""A process that answers requests: one JSON object per line of its stdin, one per line of stdout.

{"do": "...", ...}   -> an object
any error            -> {"error": "why"}
"""

from __future__ import annotations

import json
import subprocess
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT = 1800.0  # seconds of one answer, compiling included


class ChildError(RuntimeError):
    """A process that cannot answer; the message is the reason."""


class Child:
    """The parent's end. The process ends with `close`, a `with` block or this object.

    log: the file that receives its stderr; options: of `subprocess.Popen`. Ctrl-C in a terminal
    reaches the parent alone.
    """

    def __init__(self, command: Sequence[str], log: Path, **options: Any) -> None:
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True, **options,
            )  # fmt: skip
        self.close = weakref.finalize(self, _end, self.process)

    def request(self, **request: Any) -> dict[str, Any]:
        """One answer. Raises ChildError on an error, a crash, or after LIMIT seconds."""
        assert self.process.stdin and self.process.stdout
        timer = threading.Timer(LIMIT, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        answer = json.loads(line) if line else {"error": self._death()}
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer

    def _death(self) -> str:
        code = self.process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'no message'}"

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
