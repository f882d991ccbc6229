"""The documents name only what exists: links, anchors, commands, figures, public names."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

import deepkern

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
# `command`, "    command" and fenced code
CODE = re.compile(r"```.*?```|`[^`\n]+`|^(?: {4}|\t).*$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"```.*?```", re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
COMMAND = re.compile(r"python3? -m ([\w.]+)(?: ([a-z][\w-]*))?")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", FENCED.sub("", text), re.MULTILINE):
        plain = re.sub(r"\]\([^)]*\)|[\[`*]", "", heading).lower()
        slug = base = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        n = 0
        while slug in found:
            n += 1
            slug = f"{base}-{n}"
        found.add(slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_resolve(page):
    """Every relative link names a file, and its anchor a heading of that file."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(f"{link}: no such heading")
    assert not broken, "\n".join(broken)


def bench_commands() -> set[str]:
    """The subcommands of `python -m bench`."""
    source = (ROOT / "bench/__main__.py").read_text(encoding="utf-8")
    found = re.findall(r'@app\.command\((?:"([\w-]+)")?.*?\)\ndef (\w+)', source)
    return {name or function.replace("_", "-") for name, function in found}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist(page):
    """Every `python -m X` in code names a module, and of bench a subcommand."""
    commands = bench_commands()
    missing = []
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        for module, word in COMMAND.findall(code):
            try:
                spec = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                spec = None
            if spec is None:
                missing.append(module)
            elif module == "bench" and word and word not in commands:
                missing.append(f"bench {word}")
    assert not missing, missing


def test_figures_are_current():
    """`python docs/figures.py` would write what docs/figures contains."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    drawn = {f"{name}.svg": draw().svg() for name, draw in figures.FIGURES.items()}
    files = {p.name: p.read_text(encoding="utf-8") for p in figures.FOLDER.iterdir()}
    assert sorted(files) == sorted(drawn)
    assert [name for name in drawn if files[name] != drawn[name]] == []


def test_pages_in_navigation():
    """mkdocs.yml lists every page of docs."""
    listed = set(re.findall(r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert listed == pages


def test_api_pages_are_complete():
    """Every public function and class is on one API page, under the module that defines it."""
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/api").iterdir())
    entries = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    public = {n: getattr(deepkern, n) for n in deepkern.__all__ if n not in ("OPS", "ROUTING")}
    public = {n: value for n, value in public.items() if callable(value)}
    compat = {e for e in entries if e.startswith("deepkern.compat.")}
    ours = [e for e in entries if e not in compat or e.rpartition(".")[2] in public]
    assert sorted(e.rpartition(".")[2] for e in ours) == sorted(public)
    wrong = [e for e in ours if public[e.rpartition(".")[2]].__module__ != e.rpartition(".")[0]]
    assert not wrong


@pytest.mark.parametrize("name", ["docs/index.md", "docs/quant.md"])
def test_examples_run(name, capsys):
    """The Python examples of a page run."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, name, "exec"), {})


def test_no_missing_papers():
    """No source cites a document that the repository does not contain."""
    cited = re.compile(r"\b(?:design|goals|facts|style)\.md\b")
    folders = ("kernels", "csrc", "model", "bench", "tests", "docs")
    sources = [p for f in folders for s in ("py", "md", "h", "cuh", "cu", "cpp")
               for p in (ROOT / f).rglob(f"*.{s}")]  # fmt: skip
    sources = [p for p in (*sources, *ROOT.glob("*.md")) if p != Path(__file__)]
    assert [str(p) for p in sources if cited.search(p.read_text(encoding="utf-8"))] == []


def test_site_builds(tmp_path):
    """The site builds without a warning, where mkdocs is installed (`make docs` installs it)."""
    pytest.importorskip("mkdocstrings", reason="mkdocs is not installed: run make docs")
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
