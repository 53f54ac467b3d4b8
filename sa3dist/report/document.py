"""Render a page as one self-contained HTML file: a template with the styles and scripts of all pages."""

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# Default size of a page with its clips.
MEGABYTES = 20.0
ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = ("uplot/uPlot.iife.min.js", "page.js")


def render(template: str, values: dict[str, Any]) -> str:
    """Render a template of ASSETS with ``values``, which are escaped, and with the styles and scripts of all pages.

    The page's content security policy lists the scripts' digests, so it can run no others and load nothing.
    """
    scripts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    page = (
        _environment()
        .get_template(template)
        .render(
            styles=[Markup((ASSETS / name).read_text(encoding="utf-8")) for name in STYLES],
            scripts=[Markup(script) for script in scripts],
            policy=" ".join(f"'sha256-{digest}'" for digest in digests),
            **values,
        )
    )
    # JSON may contain lone surrogates, which cannot be encoded: join pairs, replace others.
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Space:
    """The remaining size budget of a page, in bytes."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, address: str) -> bool:
        """Whether ``address`` fits; if so, subtract its size."""
        if len(address) > self.left:
            return False
        self.left -= len(address)
        return True


def data_url(kind: str, data: bytes) -> str:
    """``data`` as a data: URL. kind: its MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
