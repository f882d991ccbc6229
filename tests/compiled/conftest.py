"""Runs the tests of this folder in a process where `@triton.jit` defines compiled kernels.

The other tests interpret: TRITON_INTERPRET=1 decides for a whole process, when Triton is imported.
So a test of this folder is handed over to a second pytest (worker.py), which is started once for
each pytest process (for each of xdist's) and has collected the same files. Its reports come back,
as xdist's do; fixtures, parameters, marks and output work as in any test. A crash of the machine
fails the test that ran, and the next one gets a new worker.

`TRITON_INTERPRET=0 pytest tests/compiled` runs the tests in one process, for a debugger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepkern.runtime import native

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_WORKER = pytest.StashKey["Worker"]()


class Worker:
    """A pytest process that runs tests by their ids."""

    def __init__(self, config: pytest.Config):
        answers, write_end = os.pipe()
        path = [str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        env |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
        for name in [n for n in env if n.startswith(("PYTEST_", "DEEPKERN_COMPILED"))]:
            del env[name]
        command = [sys.executable, str(HERE / "worker.py"), str(write_end), str(config.rootpath)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, cwd=config.rootpath, env=env,
            pass_fds=[write_end], text=True,
        )  # fmt: skip
        os.close(write_end)
        self.answers = os.fdopen(answers)

    def run(self, test: str, following: str | None) -> list[dict]:
        """The reports of one test; `following` is the one after it, whose fixtures are kept."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([test, following]) + "\n")
        self.process.stdin.flush()
        answer = self.answers.readline()
        if not answer:
            code = self.process.wait()
            raise ChildProcessError(f"{test}: the worker of tests/compiled ended with code {code}")
        reports = json.loads(answer)
        if isinstance(reports, str):
            raise ChildProcessError(reports)
        return reports

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.answers.close()


def _is_ours(item: pytest.Item | None) -> bool:
    return item is not None and item.path.is_relative_to(HERE)


def pytest_collection_modifyitems(items):
    reason = native.load("_ptx")[1]
    for item in items if reason is not None else []:
        if _is_ours(item):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    if not _is_ours(item) or os.environ.get("TRITON_INTERPRET") == "0":
        return None
    hook, config = item.ihook, item.config
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, nextitem):
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    if not _is_ours(nextitem):
        _stop_worker(config)
    return True


def _reports(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    config = item.config
    worker = config.stash.get(_WORKER, None)
    if worker is None:
        worker = config.stash[_WORKER] = Worker(config)
    following = nextitem.nodeid if nextitem is not None and _is_ours(nextitem) else None
    try:
        reports = worker.run(item.nodeid, following)
    except (ChildProcessError, BrokenPipeError, pytest.fail.Exception) as error:  # or a timeout
        _stop_worker(config)
        failed = pytest.TestReport(
            item.nodeid, item.location, {}, "failed", str(error), "call", start=0.0, stop=0.0
        )
        return [failed]
    except BaseException:  # Ctrl-C
        _stop_worker(config)
        raise
    restore = config.hook.pytest_report_from_serializable
    return [restore(config=config, data=data) for data in reports]


def _stop_worker(config: pytest.Config) -> None:
    worker = config.stash.get(_WORKER, None)
    if worker is not None:
        del config.stash[_WORKER]
        worker.stop()


def pytest_unconfigure(config):
    _stop_worker(config)
