"""Every module of the package can be the first one that a program imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parent.parent.parent / "kernels"
# Imports torch once, then each module in a process of its own.
SCRIPT = """
import importlib, os, sys, traceback
import torch

failed = 0
for module in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
        except BaseException:
            print(module)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed != 0)
"""


@pytest.mark.proof
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_module_can_be_imported_first():
    files = [f.relative_to(KERNELS).with_suffix("") for f in (KERNELS / "deepkern").rglob("*.py")]
    modules = [".".join(f.parts).removesuffix(".__init__") for f in files]
    modules = sorted(m for m in modules if not m.endswith("__main__"))
    env = {**os.environ, "PYTHONPATH": str(KERNELS)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", SCRIPT, *modules]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
