"""Pages from templates: one offline HTML file each, written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from editr2.files import in_place_of

TEMPLATES = Path(__file__).parent / "templates"
"""What pages share: `base.html.j2` is around all of them, `parts.html.j2` has their pieces."""


def write_page(path: Path, template: str, folders: Sequence[Path] = (), **values: Any) -> Path:
    """Returns its path. folders: of templates of the caller's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(**values)
    with in_place_of(path) as part:
        # "replace": a lone surrogate in someone's instruction must not stop it.
        part.write_bytes(page.replace("\0", "\ufffd").encode("utf-8", "replace"))
    return path
