"""Image files of others to pixels: what is refused before it is decoded, and colours brought to
sRGB.

An encoded image is judged by its header first (format, frames, bits a sample, number of pixels,
size), so that what cannot be used costs no memory. docs/data.md is the user's page.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps
from PIL import ImageFile as PillowFile

from editr2.errors import DataError, one_line, shown
from editr2.sessions.buckets import Size, Sizes, is_one, listed, nearest, written

Pixels = npt.NDArray[np.uint8]
RESIZES = ("no", "crop", "stretch")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "JPEG2000", "GIF", "BMP", "TIFF", "PPM")
"""By Pillow's names; an MPO is a phone's JPEG. Of the others Pillow would, for one, run Ghostscript
on EPS."""
MOST_PIXELS = 1 << 26
"""Of one image, 67 million: above most cameras, and 0.3 GiB while it is decoded and brought to a
policy's size."""
MOST_BYTES = 1 << 29
"""Of one encoded image, which is read whole; `MOST_PIXELS` without compression are 0.25 GiB."""
SRGB_LEVELS = 1
"""A profile that moves no colour by more, of 255, is sRGB: what remains is the rounding of its
curves."""
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")


@dataclass(frozen=True)
class ImageFile:
    """Pixels that stay in their file: called, it decodes them, uint8 [H, W, 3].

    size, resize: as in `load_sessions`. where: the file, line and field that name the image, for
    messages. checksum: of the pixels, where they were decoded before (`editr2.sessions.pixel_sum`).
    Raises DataError for whatever is wrong with the file.
    """

    path: Path
    size: Sizes | None = None
    resize: str = "no"
    where: str = ""
    checksum: str | None = field(default=None, compare=False)

    def __call__(self) -> Pixels:
        try:
            return read_image(self.path, self.size, self.resize)
        except DataError as error:
            if not self.where:
                raise
            raise DataError(f"{self.where}: {error}") from error


def locate(folder: Path, name: str, *, contained: bool) -> Path:
    """The file that a set in `folder` calls `name`. contained: a relative name must not lead out of
    the folder, which is what a set of others gets; links are followed, they are not the set's.
    Raises DataError."""
    if url := re.search(r"(?:^|/)((?:data:|[A-Za-z][A-Za-z0-9+.-]*://)[^,;]{0,24})", name):
        raise DataError(
            f"a URL, {shown(url[1])}... (accepted: the path of a file; nothing is downloaded or "
            f"unpacked)"
        )
    if contained and not os.path.isabs(name) and inside(folder, name) is None:
        raise DataError(
            f"{shown(name)} leads out of {shown(folder)} (accepted: a path inside of it)"
        )
    return folder / name


def inside(folder: Path, name: str) -> Path | None:
    """`folder/name` if it lies in the folder, whatever `..` the name has; else None."""
    root, path = os.path.abspath(folder), os.path.abspath(folder / name)
    return (
        Path(os.path.normpath(folder / name)) if path.startswith(os.path.join(root, "")) else None
    )


def read_image(path: Path, size: Sizes | None = None, resize: str = "no") -> Pixels:
    """`decode_image` of a file; DataError says what is wrong with it."""
    try:
        _check_file(path)
        return decode_image(path.read_bytes(), size, resize)
    except (
        FileNotFoundError,
        NotADirectoryError,
        ValueError,
    ) as error:  # ValueError: a name with a null character
        raise DataError(f"{shown(path)}: no such file") from error
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{shown(path)}: {error}") from error


def size_in_file(path: Path) -> Size:
    """(height, width) that `read_image` gives, by the file's header. Raises DataError."""
    try:
        _check_file(path)
        with Image.open(path) as opened:
            return _seen_size(opened)
    except Exception as error:  # as in `decode_image`
        raise DataError(f"{shown(path)}: not a readable image: {one_line(error)}") from error


def _check_file(path: Path) -> None:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # also keeps out pipes, which would block
        raise DataError("not a file")
    if found.st_size > MOST_BYTES:
        raise DataError(f"{found.st_size:,} bytes (accepted: up to {MOST_BYTES:,})")


def decode_image(data: bytes, size: Sizes | None = None, resize: str = "no") -> Pixels:
    """An encoded image to uint8 [H, W, 3], brought to `size` as `load_sessions` says. Raises
    DataError."""
    if not data:
        raise DataError("empty file (accepted: an image)")
    # Pillow's decoders raise whatever their parsing runs into (OSError, SyntaxError, ValueError,
    # struct.error, IndexError, …); for a file that a user gave, all of it means the same.
    try:
        with _strict(), Image.open(io.BytesIO(data)) as opened:
            _check_header(opened, data, size, resize)
            image = _upright(opened)
            image = (
                _in_srgb(image, opened.info["icc_profile"])
                if "icc_profile" in opened.info
                else image
            )
            if image.has_transparency_data:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            image = image if image.mode == "RGB" else image.convert("RGB")
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"several times more pixels than any image may have (accepted: {_fewer_pixels()})"
        ) from error
    except Exception as error:
        # Pillow names the buffer's address in "cannot identify image file <_io.BytesIO object at
        # 0x…>".
        why = one_line(error).split(" <_io.BytesIO")[0]
        raise DataError(f"not a readable image: {why}") from error
    return np.array(image if size is None else _fitted(image, size, resize))


@contextmanager
def _strict() -> Iterator[None]:
    """Pillow as it comes, whatever a reward's module has told it: a part of an image is not an
    image. Its warning about many pixels is left out, as `MOST_PIXELS` is below what it warns of."""
    lenient = PillowFile.LOAD_TRUNCATED_IMAGES
    PillowFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        PillowFile.LOAD_TRUNCATED_IMAGES = lenient


def _fewer_pixels() -> str:
    return f"up to {MOST_PIXELS:,}; scale the image down first"


def _check_header(image: Image.Image, data: bytes, size: Sizes | None, resize: str) -> None:
    """Raises DataError for what need not be decoded."""
    if image.format not in FORMATS:
        raise DataError(f"format {image.format} (accepted: {', '.join(FORMATS)})")
    height, width = _seen_size(image)
    if height * width > MOST_PIXELS:
        raise DataError(
            f"{height}×{width}, {height * width:,} pixels (accepted: {_fewer_pixels()})"
        )
    frames = (
        1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    )  # an MPO's others are depth or gain maps
    if frames > 1:
        raise DataError(f"animated, {frames} frames (accepted: a still image)")
    accepted = f"(accepted: 8-bit {', '.join(_MODES)})"
    if image.mode not in _MODES:
        raise DataError(f"pixel format {image.mode} {accepted}")
    # Pillow has no deep format of several channels: it drops the low bits without a word.
    if (bits := _bits(image, data)) > 8:
        raise DataError(f"{bits} bits a channel {accepted}")
    # Where a PNG says only behind its pixels how it is turned, `_fitted` has the last word.
    if size is not None and resize == "no":
        if sorted((height, width)) not in [sorted(each) for each in listed(size)]:
            raise DataError(_another_size(height, width, size))


def _seen_size(image: Image.Image) -> Size:
    """(height, width) by the header alone, turned as EXIF says."""
    # Pillow turns a TIFF's size itself, and would decode a PNG to look for EXIF behind its pixels.
    told = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
    return (
        image.size
        if told and image.getexif().get(0x0112) in (5, 6, 7, 8)
        else (image.height, image.width)
    )


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel, as the file's own header has them."""
    if image.format == "PNG":
        return data[24]  # of IHDR, which is first
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,)))  # type: ignore[attr-defined]
    if image.format == "PPM":
        (_, _, _, options) = image.tile[0]  # type: ignore[attr-defined]
        return (
            int(options[1]).bit_length() if isinstance(options, tuple) else 8
        )  # options: pixel format, largest value
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51") + 40  # start of the codestream, and its sizes
        count = int.from_bytes(data[start : start + 2], "big")
        return max((data[start + 2 + 3 * i] & 0x7F) + 1 for i in range(count))
    if image.format == "AVIF":
        flags = [
            found[1][0] >> 5 & 3 for found in re.finditer(rb"av1C\x81.(.)", data, re.S)
        ]  # high, twelve
        return max((8 + 2 * (deep >> 1) + 2 * (deep == 3) for deep in flags), default=8)
    return 8


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; itself (`exif_transpose` copies) where there is nothing to turn."""
    image.load()
    return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in sRGB, transparency as it is. profile: None where the file's is torn. Raises
    DataError."""
    grey, transform = _to_srgb(profile or b"")
    if grey and image.mode not in ("1", "L", "LA"):
        raise DataError(
            "a grey image's colour profile on colours (accepted: an RGB profile, or none)"
        )
    if transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    converted = ImageCms.applyTransform(image.convert("L" if grey else "RGB"), transform)
    assert converted is not None  # which it only is when done in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes) -> tuple[bool, Any]:
    """(whether the profile is of grey, the transform of 8-bit pixels; None where it would change
    nothing)."""
    accepted = "(accepted: an ICC profile of RGB or grey, or none)"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if space not in ("RGB", "GRAY"):
            raise DataError(f"colour profile of {shown(space)} {accepted}")
        mode = "L" if space == "GRAY" else "RGB"
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        before = colours if mode == "RGB" else np.arange(256, dtype=np.uint8)[None]
        after = np.asarray(ImageCms.applyTransform(Image.fromarray(before), transform)).astype(int)
    except (OSError, ImageCms.PyCMSError, ValueError) as error:
        raise DataError(f"colour profile cannot be read: {one_line(error)} {accepted}") from error
    moved = np.abs(after - before.reshape(1, after.shape[1], -1)).max()
    return mode == "L", None if moved <= SRGB_LEVELS else transform


def _another_size(height: int, width: int, size: Sizes) -> str:
    which = "it" if is_one(size) else "the nearest"
    accepted = f"{written(size)}; --data.resize crop or stretch brings others to {which}"
    return f"{height}×{width} pixels, height × width (accepted: {accepted})"


def _fitted(image: Image.Image, sizes: Sizes, resize: str) -> Image.Image:
    height, width = nearest(sizes, image.height, image.width)
    if image.size == (width, height):
        return image
    if resize == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    if resize == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    raise DataError(_another_size(image.height, image.width, sizes))
