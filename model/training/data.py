"""Tokens to train on: any folder of text, or the source of Python's standard library.

About 3 % of the files, chosen by the hash of their path, are held out.  Batch n of a run depends on
its seed and n alone, so a run that is continued, on any number of processes, sees the same batches.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.training.recipe import Recipe

SEPARATOR = b"\f"  # before every file of bytes; rare in text, and white space in Python
SKIPPED_DIRS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
SKIPPED_DIRS |= {"encodings", "pydoc_data"}  # generated tables, not source
HELDOUT_BYTES = 96 * 1024


class Corpus(NamedTuple):
    """tokens: uint8 or int32 [N], to train on.  held_out: path -> content of the other files."""

    tokens: Tensor
    held_out: dict[str, bytes]


def stdlib_files() -> dict[str, bytes]:
    """Relative path -> content of the standard library's Python files except tests, sorted."""
    return read_files(Path(sysconfig.get_path("stdlib")), lambda name: name.endswith(".py"))


def read_files(
    root: Path, wanted: Callable[[str], bool], exclude: Path | None = None
) -> dict[str, bytes]:
    """Relative path -> content of the wanted files below `root`, sorted; hidden files omitted.

    exclude: a folder whose files are omitted, too.
    """
    files = {}
    for folder, subfolders, names in os.walk(root):
        if exclude is not None and Path(folder).resolve() == exclude.resolve():
            subfolders.clear()
            continue
        subfolders[:] = sorted(n for n in subfolders if n not in SKIPPED_DIRS and n[0] != ".")
        for name in sorted(names):
            path = Path(folder, name)
            if wanted(name) and name[0] != "." and path.is_file():
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    return dict(sorted(files.items()))


def is_text(content: bytes) -> bool:
    """Whether the bytes are UTF-8 without NUL."""
    try:
        return b"\0" not in content and content.decode() is not None
    except UnicodeDecodeError:
        return False


def folder_files(root: Path, exclude: Path | None = None) -> dict[str, bytes]:
    """Relative path -> content of the text files below `root`, without those below `exclude`.

    Raises ValueError if there is no such folder, or no text in it.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder (expected a folder of text)")
    found = read_files(root, lambda _: True, exclude).items()
    files = {path: content for path, content in found if content and is_text(content)}
    if not files:
        raise ValueError(f"{root}: no text file in it")
    return files


def is_held_out(path: str) -> bool:
    """Whether a file is held out of training: 3 % of the files, by the hash of the path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % 1000 < 30


def read_corpus(
    root: Path | None = None,
    encode: Callable[[str], list[int]] | None = None,
    exclude: Path | None = None,
) -> Corpus:
    """Reads the files of `root`, or of the standard library.

    encode: text -> tokens, with the mark of a start; without it, the tokens are bytes.
    exclude: a folder below `root` that is not read, such as that of the run.
    """
    files = stdlib_files() if root is None else folder_files(root, exclude)
    held_out = {path: text for path, text in files.items() if is_held_out(path)}
    if len(held_out) == len(files):
        held_out = {}
    texts = [text for path, text in files.items() if path not in held_out]
    return Corpus(tokenize(texts, encode), held_out)


def split_end(tokens: Tensor, fraction: float = 0.03) -> tuple[Tensor, Tensor]:
    """The tokens without their end, and the end, at most 96 Ki tokens: held out if no file is."""
    count = min(int(fraction * len(tokens)), HELDOUT_BYTES)
    return tokens[: len(tokens) - count], tokens[len(tokens) - count :]


def tokenize(texts: Iterable[bytes], encode: Callable[[str], list[int]] | None) -> Tensor:
    """The tokens of all texts, in a row: uint8 [N] of bytes, otherwise int32 [N]."""
    if encode is None:
        joined = SEPARATOR + SEPARATOR.join(texts)
        return torch.frombuffer(bytearray(joined), dtype=torch.uint8)
    parts = [
        torch.tensor(encode(text.decode(errors="replace")), dtype=torch.int32) for text in texts
    ]
    return torch.cat(parts)


def heldout_text(files: dict[str, bytes], size: int = HELDOUT_BYTES) -> tuple[bytes, list[str]]:
    """Joins held-out files of 2 to 32 KiB, in the order of their hash, up to `size` bytes.

    Returns the text and the paths of its files.
    """
    fitting = [path for path, text in files.items() if 2048 <= len(text) <= 32768]
    fitting.sort(key=lambda path: hashlib.sha256(path.encode()).digest())
    text, paths = b"", []
    for path in fitting:
        if len(text) < size:
            text += SEPARATOR + files[path]
            paths.append(path)
    return text[:size], paths


def batch_of_step(tokens: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Random windows of the tokens, int64 [batch, window + 1].

    Raises ValueError if there are fewer than window + 2 tokens.
    """
    limit = len(tokens) - recipe.window - 1
    if limit < 1:
        text = f"{len(tokens)} tokens to train on, expected more than window + 1 ="
        raise ValueError(f"{text} {recipe.window + 1}")
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    start = torch.randint(limit, (recipe.batch, 1), generator=generator)
    return tokens[start + torch.arange(recipe.window + 1)].long()
