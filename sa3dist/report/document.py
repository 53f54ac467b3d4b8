"""A page as one HTML file: a template with the style, the scripts and the charts that all pages share."""

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

ASSETS = Path(__file__).parent / "assets"
STYLES = ("uplot/uPlot.min.css", "page.css")
SCRIPTS = ("uplot/uPlot.iife.min.js", "page.js")


def render(template: str, values: dict[str, Any]) -> str:
    """A template of ASSETS with ``values``, which are escaped, and with the styles and scripts of all pages.

    The page may load nothing from elsewhere and run no other script: its policy names the digests of these.
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
    # Halves of characters, which JSON can hold, would not be written: those of a pair are joined.
    return page.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Space:
    """How many bytes a page may still take."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, address: str) -> bool:
        """Whether ``address`` fits; it is then counted."""
        if len(address) > self.left:
            return False
        self.left -= len(address)
        return True


def data_url(kind: str, data: bytes) -> str:
    """``data`` as an address that holds it; kind: its MIME type."""
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
