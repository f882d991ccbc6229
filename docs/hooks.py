"""Hooks of mkdocs: files outside docs/ that a page links to, such as results, join the site."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")


def site_path(source: str, link: str) -> str | None:
    """Where the site has the target of `link` in page `source`; None if it is inside docs/."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(source), link))
    outside = not path.startswith("docs" + os.sep) and (ROOT / path).is_file()
    return f"files/{path}" if outside else None


def on_files(files, config):
    """Adds the files that pages link to."""
    for page in list(files.documentation_pages()):
        for _, link in LINK.findall(page.content_string):
            path = site_path(page.src_uri, link)
            if path and files.get_file_from_path(path) is None:
                origin = ROOT / path.removeprefix("files/")
                files.append(File.generated(config, path, abs_src_path=str(origin)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points links that leave docs/ to the copies in the site."""

    def replaced(match: re.Match) -> str:
        path = site_path(page.file.src_uri, match[2])
        if path is None:
            return match[0]
        return match[1] + os.path.relpath(path, os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(replaced, markdown)
