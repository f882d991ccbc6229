"""HTML pages of bench: one file each, without a network, from the templates in this folder.

layout.html, layout.css, layout.js   what pages share: colours, tables that sort, tooltips
macros.html                          tables, marks and plots
cells.py, plots.py                   what the macros draw: tables; axes, marks and lines
profile.py, profile.html             the profile of an op: `python -m bench profile OP --html FILE`
report.py, report.html               all results: `python -m bench report`, from
    devices.py                         the newest records of each device
    speeds.py                          rows of providers that were timed together, their ratios
    figures.py                         the figures of a device
    tables.py                          the tables

Templates escape every value. A page has no data in scripts: scripts read the page itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..summary import number

FOLDER = Path(__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """Templates of this folder. They escape, and a missing value is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    return found


def render(template: str, **values: object) -> str:
    """The page of a template that extends layout.html."""
    style, script = (Markup((FOLDER / f"layout.{suffix}").read_text()) for suffix in ("css", "js"))
    return environment().get_template(template).render(style=style, script=script, **values)
