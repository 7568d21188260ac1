"""The one page style of all reports: jinja2 templates, each beside the code that fills it, over `page.html`.

A page is one file that needs no network and no server: pictures are embedded.
"""

import base64
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, **values: Any) -> str:
    """Return a page as text that can be written as UTF-8: half a character in a model's answer becomes `?`.

    Args:
        template: path of a template in this package that extends `page.html`.
        values: what it shows; texts are escaped, nothing may be missing.
    """
    return _TEMPLATES.get_template(template).render(values).encode("utf-8", "replace").decode("utf-8")


def format_percent(share: float | None) -> str:
    """Return a share that is in per cent as a reader sees it; the filter `percent` of templates."""
    return "-" if share is None else f"{share:.1f} %"


_TEMPLATES.filters["percent"] = format_percent


def embedded(content: bytes, kind: str) -> str:
    """Return the `src` of an embedded picture; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
