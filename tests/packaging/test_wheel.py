"""The wheel works outside the checkout, and a missing compiler leaves a package that works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deepkern.runtime import native

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
pytestmark = pytest.mark.slow


def run(command: list, cwd: Path, **env: str) -> str:
    """Runs a command without the checkout on its path; its output, or a failure that shows it."""
    leave = ("PYTHONPATH", "TRITON_INTERPRET", "CXX", "CXXFLAGS", "DEEPKERN_REQUIRE_NATIVE")
    keep = {k: v for k, v in os.environ.items() if k not in leave}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env={**keep, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(tmp_path: Path, built: bool = False, **env: str) -> tuple[Path, str]:
    """A wheel of a copy of the checkout, and what the build printed.

    built: with the C++ parts of the checkout, in the place where a build compiles them to.
    """
    source = tmp_path / "source"
    # What git tracks and the in-place build, which must not find its way into the wheel; a copy,
    # because a build writes into its source.
    unwanted = (".*", "*.egg-info", "build", "dist", "__pycache__", "checkpoints", "results")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*unwanted))
    (source / "kernels/deepkern/runtime/configs/sm_0.json").write_text("{}")  # tuned tiles
    (source / "setup.cfg").write_text("[build]\nbuild_lib = build/lib\n")
    for part in (ROOT / "kernels/deepkern").glob("*.so") if built else ():
        target = source / "build/lib/deepkern" / part.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(part, target)  # newer than all sources: up to date
    dist = tmp_path / "dist"
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", dist, source]
    printed = run(command, tmp_path, **env)
    (wheel,) = dist.glob("*.whl")
    return wheel, printed


def install(wheel: Path, tmp_path: Path) -> Path:
    site = tmp_path / "site"
    run([*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], tmp_path)
    return site


@pytest.mark.skipif(native.missing_reason() is not None, reason=f"{native.missing_reason()}")
def test_wheel_works_outside_the_checkout(tmp_path):
    """With the C++ parts that `make setup` compiled from the same sources."""
    wheel, printed = build(tmp_path, built=True, DEEPKERN_BUILD_CUDA="0")
    assert "csrc/ops.cpp" not in printed, "compiled again"
    # _host serves this Python alone, so the wheel does; without it, _C makes the same tag.
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"deepkern-0.1.0-{python}-{python}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"deepkern"}
    kinds = {Path(n).suffix for n in names if ".dist-info" not in n}
    assert kinds <= {".py", ".so", ".json", ".typed"}, names
    assert "deepkern/runtime/configs/sm_0.json" in names
    for name in names:
        if name.endswith(".so"):
            content = zipfile.ZipFile(wheel).read(name)
            for place in (str(ROOT), str(tmp_path), sys.prefix):
                assert place.encode() not in content, f"{name} names {place}"
    site = install(wheel, tmp_path)
    script = (
        "import torch, deepkern\n"
        "from deepkern.runtime import native\n"
        "x = torch.randn(4, 200)\n"
        "with deepkern.backend('cpu'): q, s = deepkern.cast_per_token(x)\n"
        "with deepkern.backend('torch'): q2, s2 = deepkern.cast_per_token(x)\n"
        "assert torch.equal(s, s2) and torch.equal(q.view(torch.uint8), q2.view(torch.uint8))\n"
        "modules = [deepkern, *(native.load(n)[0] for n in ('_C', '_host', '_ptx'))]\n"
        "print(*[m.__file__ for m in modules if m])\n"
    )
    files = run([sys.executable, "-c", script], tmp_path, PYTHONPATH=str(site)).split()
    assert all(f.startswith(str(site)) for f in files), files
    assert len(files) == 1 + len([n for n in names if n.endswith(".so")]), files


def test_without_a_compiler(tmp_path):
    wheel, printed = build(tmp_path, CXX="no-such-compiler")
    assert "no C++ compiler (no-such-compiler not found)" in printed
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
