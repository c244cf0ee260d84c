"""Files of tensors and of settings: read strictly, since others may have written them, and written
for all to read."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from editr2.errors import CheckpointError, ConfigError, UserError, one_line

Shape = tuple[int, ...]

BLOCK = 4 << 10
"""Numbers of a large tensor, or bytes of a large file, that stand for a tensor where contents are
sampled."""


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Around libraries that read files of others: what they raise becomes a `ConfigError` that
    starts with `where`.

    They raise anything (tokenizers a plain `Exception`, model classes whatever a setting's wrong
    type leads to), so every exception counts but ours, which say more, and a lack of memory, which
    is no fault of the files.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error


@contextmanager
def writing(where: object) -> Iterator[None]:
    """Around what writes tensors: a full disk and what cannot be stored become a
    `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: cannot be written: {one_line(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises `CheckpointError` for any other."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no JSON: {one_line(error)} (was it cut short?)") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{path}: a {type(said).__name__} (accepted: a JSON object)")
    return said


def read_header(path: Path) -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes by name, and the metadata, of a safetensors file; no tensor is read.

    Raises `CheckpointError` for another file, one cut short, and tensors of whole numbers."""
    shapes: dict[str, Shape] = {}
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                tensor = file.get_slice(key)
                shapes[key] = tuple(tensor.get_shape())
                if "F" not in (kind := tensor.get_dtype()):
                    raise CheckpointError(
                        f"{path}: {key}: {kind} (accepted: floating point, such as F32 or BF16)"
                    )
            return shapes, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: no safetensors file: {one_line(error)} (was it cut short?)"
        ) from error


def check_shapes(
    path: Path, found: Mapping[str, Shape], needed: Mapping[str, Shape], whose: str
) -> None:
    """Raises `CheckpointError` naming the first key that is unknown, missing or of another shape.

    whose: what needs the tensors, for the message.
    """
    if not found:
        raise CheckpointError(f"{path}: no tensors (accepted: the {len(needed)} of {whose})")
    if odd := sorted(set(found) - set(needed)):
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        raise CheckpointError(
            f"{path}: {odd[0]}: unknown to {whose}{more}; was it written for another model?"
        )
    if gone := sorted(set(needed) - set(found)):
        more = f" (and {len(gone) - 1} more)" if gone[1:] else ""
        raise CheckpointError(
            f"{path}: {gone[0]}: missing{more} (accepted: all {len(needed)} tensors of {whose})"
        )
    for key, shape in found.items():
        if shape != tuple(needed[key]):
            raise CheckpointError(
                f"{path}: {key}: {list(shape)} (accepted: {list(needed[key])}, of {whose})"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a file's tensors on the CPU. Raises `CheckpointError` where it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: no safetensors file: {one_line(error)} (was it cut short?)"
        ) from error


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file with the modes that any new file has (see `ordinary_modes`)."""
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    ordinary_modes([path])


def ordinary_modes(paths: Iterable[Path]) -> None:
    """Gives files, and those below folders, the modes that `open` gives a new one (0644 under the
    usual umask).

    safetensors writes to a temporary file, which nobody else may read, and renames it: mode 0600.
    """
    mask = os.umask(0o022)  # the one way to ask for it is to set it
    os.umask(mask)
    for path in paths:
        for file in path.rglob("*") if path.is_dir() else (path,):
            if (
                file.is_file()
                and not file.is_symlink()
                and stat.S_IMODE(file.stat().st_mode) != 0o666 & ~mask
            ):
                file.chmod(0o666 & ~mask)


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def tensor_digest(named: Iterable[tuple[str, Tensor]], *, whole: bool = False) -> Any:
    """A sha256 of names, dtypes, shapes and contents. Of a tensor above 1 MiB a block of its middle
    is read, unless `whole`; one without data has no content."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            if not whole and flat.numel() * flat.element_size() > 1 << 20:
                middle = flat.numel() // 2
                flat = flat[middle : middle + BLOCK]
            digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest
