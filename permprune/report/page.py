"""Self-contained HTML pages: what those of runs and of sweeps share."""

from __future__ import annotations

import base64
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from permprune.report.words import count, fine_percent

Shown = tuple[str, str, str]
"""A picture on a page: its title, what there is to see, and the SVG as a data URI."""


def fill(template: str, **values: Any) -> str:
    """The page that a template makes of these values, all of which are escaped."""
    return _environment().get_template(template).render(values)


def shown(title: str, text: str, svg: bytes) -> Shown:
    return title, text, f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def _unbroken(text: str) -> str:
    """The same with hyphens before digits, as in "top-1", at which no line ends."""
    return re.sub(r"-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)


@cache
def _environment() -> Environment:
    loader = PackageLoader("permprune.report", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=fine_percent, unbroken=_unbroken)
    environment.globals.update(count=count)
    return environment
