"""Pages from templates: one offline HTML file each, written whole or not at all."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from editr2.files import in_place_of

TEMPLATES = Path(__file__).parent / "templates"
"""What pages share: `base.html.j2` is around all of them, `parts.html.j2` has their pieces."""
VENDOR = Path(__file__).parent / "vendor"


@functools.cache
def scripts() -> Mapping[str, Markup]:
    """What may run on a page, and nothing else: the charts' library with its licence, `charts.js`
    and `page.js`."""
    licence = (VENDOR / "uplot.LICENSE").read_text("utf-8").replace("*/", "* /")
    library = (VENDOR / "uplot.min.js").read_text("utf-8")
    found = {
        "library": f"/*\n{licence}\n*/\n{library}",
        "charts": (TEMPLATES / "charts.js").read_text("utf-8"),
        "page": (TEMPLATES / "page.js").read_text("utf-8"),
    }
    return {name: Markup(text) for name, text in found.items()}


@functools.cache
def script_hashes() -> str:
    """For the page's policy: a script of any other text, whatever an instruction contains, does not
    run."""
    digests = [hashlib.sha256(text.encode()).digest() for text in scripts().values()]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


@functools.cache
def _environment(folders: tuple[Path, ...]) -> jinja2.Environment:
    """Templates are read once: a page is written anew at every checkpoint."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES, VENDOR]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(scripts=scripts(), script_hashes=script_hashes())
    return environment


def write_page(path: Path, template: str, folders: Sequence[Path] = (), **values: Any) -> Path:
    """Returns its path. folders: of templates of the caller's own."""
    page = _environment(tuple(folders)).get_template(template).render(**values)
    with in_place_of(path) as part:
        # "replace": a lone surrogate in someone's instruction must not stop it.
        part.write_bytes(page.replace("\0", "\ufffd").encode("utf-8", "replace"))
    return path
