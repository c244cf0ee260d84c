"""What is wrong with a model's folder, as far as one sees it without reading its weights: said
before the minutes that an editor takes to load.

Files of safetensors are known by their headers: each says how long it is, and what is in it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from editr2.errors import ConfigError, one_line

ONE = "model.safetensors"
INDEX = f"{ONE}.index.json"
OTHERS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_config.json")
"""Of weights that have no header; whoever loads them says what is wrong."""


def check_weights_beside(folder: Path, module: nn.Module, where: str, accepted: str) -> None:
    """Raises `ConfigError` where the weights of a folder are not there, are cut short, or are fewer
    numbers than the model has.

    module: of that folder's config.json, without weights (on the meta device, its tied ones tied).
    where: what the error begins with; accepted: what it ends with.
    """
    try:
        files = _files(folder)
        found = sum(numbers_in(folder / name) for name in files)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{where}: weights: {one_line(error)} ({accepted})") from error
    # Packed numbers are fewer, by a rule of their own.
    packed = getattr(getattr(module, "config", None), "quantization_config", None) is not None
    needed = sum(p.numel() for p in module.parameters())
    if files and found < needed and not packed:
        raise ConfigError(
            f"{where}: weights: {found:,} numbers of the model's {needed:,} ({accepted})"
        )


def numbers_in(file: Path) -> int:
    """Of a safetensors file, by its header. Raises what safetensors does where the file is another
    one or cut short."""
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file.name}: {one_line(error)} (was it cut short?)") from error


def _files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold the weights; none where those are of another
    form."""
    if (folder / ONE).is_file():
        return [ONE]
    if not (folder / INDEX).is_file():
        if any((folder / name).is_file() for name in OTHERS):
            return []
        raise ValueError(f"no {ONE} there")
    try:
        said: Any = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        names = sorted({str(name) for name in said["weight_map"].values()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{INDEX}: {one_line(error, kind=True)} (was it cut short?)") from error
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{name}: not there, and {INDEX} names it")
    return names
