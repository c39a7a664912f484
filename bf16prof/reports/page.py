"""One HTML page from a template: self-contained, escaped, with the data that it shows.

It works under `Content-Security-Policy: default-src 'none'` with inline script and style, and says
so itself in a meta tag.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from bf16prof.reports.plots import finite
from bf16prof.reports.units import inert


def page(template: str, data: Mapping[str, Any], **context: Any) -> str:
    """The page of a template in `templates/`, with the style and the script of all pages. `data` is
    what its button downloads."""
    import jinja2

    loader = jinja2.FunctionLoader(_text)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inert"] = inert
    environment.filters["capfirst"] = lambda text: text[:1].upper() + text[1:]
    parts = {"data": finite(data), "css": _text("report.css"), "js": _text("report.js")}
    return environment.get_template(template).render(**parts, **context)


def _text(name: str) -> str:
    return (resources.files("bf16prof.reports") / "templates" / name).read_text(encoding="utf-8")
