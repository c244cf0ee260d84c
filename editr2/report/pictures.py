"""Image files as data URIs."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from editr2.report.data import plural

PNG_BYTES = 96 * 1024
"""Up to here an image stays PNG. A photograph of 512 px takes some 400 kB as PNG and 80 as JPEG."""
FEW_BYTES = 8 * 1024
"""The same of a run's page, where 48 sessions of three turns hold more than 300 images: what is
larger becomes WebP, some 0.12 bytes a pixel of a photograph."""

THUMBNAIL_BYTES = 6 * 1024
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What reading an image raises: OSError for what Pillow cannot identify, SyntaxError for broken
chunks."""


@dataclass(frozen=True)
class Picture:
    src: str
    width: int
    """Width to show, in CSS pixels."""
    pixelated: bool


@dataclass
class Pictures:
    """Turns image files below `folder` into data URIs, and remembers what it could not read."""

    folder: Path
    max_pixels: int
    unreadable: dict[str, str] = field(default_factory=dict)
    """File name → kind of error."""
    reduced: int = 0
    bytes: int = 0
    """Of all data URIs that it gave."""

    def __call__(self, name: str | None) -> Picture | None:
        if not name:
            return None
        try:
            path = (self.folder / name).resolve()
            if not path.is_relative_to(self.folder.resolve()):
                raise ValueError("outside the folder of strips")
            return self._read(path)
        except UNREADABLE as error:
            self.unreadable[name] = type(error).__name__
            return None

    def _read(self, path: Path) -> Picture:
        stat = path.stat()
        picture, reduced = _read(path, stat.st_mtime_ns, stat.st_size, self.max_pixels)
        self.reduced += reduced
        self.bytes += len(picture.src)
        return picture

    def notes(self) -> list[str]:
        notes = unreadable_notes(self.unreadable)
        if self.reduced:
            notes.append(
                f"{self.reduced} large {plural('image', self.reduced)}: scaled to "
                f"{self.max_pixels} px or stored as WebP for this page; the originals are in "
                "strips/."
            )
        return notes


@functools.lru_cache(maxsize=4096)
def _read(path: Path, changed: int, size: int, max_pixels: int) -> tuple[Picture, bool]:
    """Of a file as it is now, and whether it was reduced: a page that is written anew at every
    checkpoint does not encode what it had."""
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        shown, side = image.size, max(image.size)
        large = len(data) > FEW_BYTES and side > 96
        if side > max_pixels or image.format != "PNG" or large:
            data, kind = _few_bytes(image, max_pixels)
    return _picture(data, kind, shown), side > max_pixels or kind != "png"


def _few_bytes(image: Image.Image, max_pixels: int) -> tuple[bytes, str]:
    """At most `max_pixels` on the long side, as PNG where that is small (a drawing), else WebP."""
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((max_pixels, max_pixels), Image.Resampling.LANCZOS)
    for kind, options in (("PNG", {}), ("WEBP", {"quality": 82, "method": 3})):
        out = io.BytesIO()
        image.save(out, kind, **options)
        if len(out.getvalue()) <= FEW_BYTES:
            break
    return out.getvalue(), kind.lower()


def unreadable_notes(unreadable: Mapping[str, str]) -> list[str]:
    """unreadable: kind of error by file name."""
    if not unreadable:
        return []
    count = len(unreadable)
    named = [f"{name} ({kind})" for name, kind in unreadable.items()]
    some = ", ".join(named[:3] + ["…"] * (count > 3))
    return [f"{count} {plural('image', count)} could not be read: {some}."]


def picture_of(pixels: np.ndarray, max_pixels: int) -> Picture:
    """Of uint8 [H, W, 3], at most `max_pixels` on the long side."""
    image = Image.fromarray(pixels)
    return _picture(*_smaller(image, max_pixels), image.size)


def thumbnail(path: Path, side: int) -> Picture:
    """Of an image file, for pages of hundreds: shown as large as it is, at most `side` px, and some
    4 kB at 160 px. Raises what Pillow raises of a file that is none (`UNREADABLE`)."""
    with Image.open(path) as image:
        image.load()
        size = image.size
        return _picture(*_smaller(image, side, png_bytes=THUMBNAIL_BYTES, quality=80), size, side)


def _picture(data: bytes, kind: str, size: tuple[int, int], most: int | None = None) -> Picture:
    """size: (width, height) before it was made smaller. most: px of the long side on the page."""
    # A whole number of screen pixels for each image pixel keeps small worlds even: 24 px → 192 px.
    side = max(size)
    small = side <= 96
    if small:
        width = size[0] * max(1, (most or 192) // side)
    elif most:
        width = max(1, round(size[0] * min(1.0, most / side)))
    else:
        width = min(size[0], 320)
    return Picture(
        f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii"), width, small
    )


def _smaller(
    image: Image.Image, max_pixels: int, *, png_bytes: int = PNG_BYTES, quality: int = 90
) -> tuple[bytes, str]:
    """At most `max_pixels` on the long side, as PNG unless that is large and the image opaque: then
    JPEG."""
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    image.thumbnail((max_pixels, max_pixels), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG")
    if len(out.getvalue()) <= png_bytes or image.mode == "RGBA":
        return out.getvalue(), "png"
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    return out.getvalue(), "jpeg"
