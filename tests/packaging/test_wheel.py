"""The wheel works outside the checkout, and a missing compiler leaves a package that works."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
pytestmark = pytest.mark.slow


def run(command: list, cwd: Path, **env: str) -> str:
    """Runs a command without the checkout on its path; its output, or a failure that shows it."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**keep, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(tmp_path: Path, **env: str) -> tuple[Path, str]:
    """A wheel of a copy of the checkout's package, and what the build printed."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    (source / "build").mkdir()
    dist = tmp_path / "dist"
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", dist, source]
    printed = run(command, tmp_path, **env)
    (wheel,) = dist.glob("*.whl")
    return wheel, printed


def install(wheel: Path, tmp_path: Path) -> Path:
    site = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], tmp_path)
    return site


def test_wheel_works_outside_the_checkout(tmp_path):
    wheel, _ = build(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"deepkern"}
    assert not [n for n in names if n.endswith((".cpp", ".h", ".pyc"))]
    site = install(wheel, tmp_path)
    script = (
        "import torch, deepkern\n"
        "from deepkern.runtime import native\n"
        "x = torch.randn(4, 200)\n"
        "with deepkern.backend('cpu'): q, s = deepkern.cast_per_token(x)\n"
        "with deepkern.backend('torch'): q2, s2 = deepkern.cast_per_token(x)\n"
        "assert torch.equal(s, s2) and torch.equal(q.view(torch.uint8), q2.view(torch.uint8))\n"
        "print(deepkern.__file__, native._load('_C')[0].__file__, native.host().__file__)\n"
    )
    files = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(site)).split()
    assert len(files) == 3 and all(f.startswith(str(site)) for f in files), files


def test_without_a_compiler(tmp_path):
    wheel, printed = build(tmp_path, CXX="no-such-compiler")
    assert "no C++ compiler (no-such-compiler is not on PATH)" in printed
    assert wheel.name.endswith("py3-none-any.whl")
    site = install(wheel, tmp_path)
    script = (
        "import torch, deepkern\n"
        "print(deepkern.explain('cast_per_token', torch.ones(1, 128)))\n"
        "with deepkern.backend('cpu'):\n"
        "    try: deepkern.cast_per_token(torch.ones(1, 128))\n"
        "    except deepkern.BackendError as error: print(error)\n"
    )
    printed = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(site))
    assert "cast_per_token: torch on" in printed and "install g++" in printed


def test_a_missing_compiler_can_be_an_error(tmp_path):
    with pytest.raises(AssertionError, match="no C\\+\\+ compiler"):
        build(tmp_path, CXX="no-such-compiler", DEEPKERN_REQUIRE_NATIVE="1")
