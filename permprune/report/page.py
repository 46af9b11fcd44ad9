"""Self-contained HTML pages and model cards: the parts that their templates share."""

from __future__ import annotations

import base64
import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib.figure import Figure

from permprune.report.style import save
from permprune.report.words import count, duration, fine_percent, number, percent, with_error


def fill(template: str, **values: Any) -> str:
    """Render a template with these values; in HTML all of them are escaped."""
    return _environment().get_template(template).render(values)


def data_uri(picture: Figure) -> str:
    """Return a picture as a data URI with its SVG."""
    return f"data:image/svg+xml;base64,{base64.b64encode(save(picture)).decode('ascii')}"


def _unbroken(text: str) -> str:
    """Replace hyphens before digits, as in "top-1", by non-breaking ones."""
    return re.sub(r"-(?=\d)", "\N{NON-BREAKING HYPHEN}", text)


def _code(text: str) -> str:
    """The text as inline code of Markdown, also in a table."""
    return f"`{' '.join(text.replace('`', ' ').split())}`".replace("|", "\\|")


def _plain(text: str) -> str:
    """The text without anything that Markdown or HTML would take for markup, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


@cache
def _environment() -> Environment:
    loader = PackageLoader("permprune.report", "")
    environment = Environment(
        loader=loader,
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=fine_percent, unbroken=_unbroken, code=_code, plain=_plain)
    texts = {"count": count, "duration": duration, "number": number, "whole_percent": percent, "with_error": with_error}
    environment.globals.update(texts)
    return environment
