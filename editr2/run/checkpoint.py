"""Checkpoints that survive being killed: complete, checked, and free of pickle.

A checkpoint is a folder `step_000010`. It is written under a hidden name beside its place, flushed,
sealed by a manifest of sizes and SHA-256 sums, and renamed: at any moment the folder either is not
there or is whole. A folder that does not match its manifest is never used. Inside:

    <group>.safetensors     one file for each group of tensors, such as policy and ema
    optimizer.safetensors   the optimiser's tensors, numbered; their places stand in state.json
    rng.safetensors         the random generators' tensors, likewise
    state.json              iteration, versions, the groups' names, the caller's state, the
                            structure of optimiser and generators
    manifest.json           written last

While a checkpoint of the same iteration is being replaced, the old one is called
`step_000010.replaced` and counts.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from editr2.errors import CheckpointError, one_line
from editr2.policies.tensor_files import ordinary_modes
from editr2.run.generators import capture_rng

__all__ = [
    "Checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "replace_folder",
    "save_checkpoint",
]

FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
_RESERVED = ("optimizer", "rng")
_TENSORS = ".safetensors"
_REQUIRED = (_STATE, *(name + _TENSORS for name in _RESERVED))
_FIELDS: dict[str, tuple[type, ...]] = {
    "iteration": (int,),
    "versions": (dict,),
    "state": (dict,),
    "optimizer": (dict,),
    "rng": (dict, list),
}
"""What state.json holds, and of which types."""
_TEMPORARY = ".tmp-step_"
_REPLACED = ".replaced"
_STEP = re.compile(r"step_(\d{6,})(\.replaced)?")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors raises its own type with the text of Rust's error: "... No space left on device (os
# error 28) ..."
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given, all tensors on the CPU. `rng` goes to `restore_rng`."""

    path: Path
    iteration: int
    tensors: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    rng: Any
    versions: dict[str, str]


def save_checkpoint(
    root: str | os.PathLike[str],
    iteration: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    optimizer: Mapping[str, Any],
    state: Mapping[str, Any],
    rng: Any = None,
    keep: int = 2,
) -> Path:
    """Write `root/step_<iteration>` and return its path. When it returns, the checkpoint is on the
    disk.

    tensors: groups by name, each a state dict; any dtype, device and layout that is dense. Bits are
        kept. Tied tensors are written once for each name.
    optimizer: a torch optimiser's state dict, or {}.
    state: JSON values with string keys; tuples come back as lists.
    rng: None for this process's generators (`capture_rng()`), or e.g. a list of those of every
        rank.
    keep: how many checkpoints to leave, this one included. Those of a later iteration are removed
        with a warning: the run was taken back past them, and resuming from them would undo that.

    Raises CheckpointError if the disk is full or not writable, or for content that cannot be stored
    exactly. Nothing saved earlier is touched before the new one is in place.
    """
    if iteration < 0 or keep < 1:
        raise ValueError(f"iteration {iteration}, keep {keep} (accepted: iteration ≥ 0, keep ≥ 1)")
    root = Path(root)
    final = root / f"step_{iteration:06d}"
    files = {name: _group(name, group) for name, group in tensors.items()}
    files["optimizer"], files["rng"] = {}, {}
    document = {
        "format": FORMAT,
        "iteration": iteration,
        "versions": _versions(),
        "groups": sorted(tensors),
        "state": _json(state, "state"),
        "optimizer": _encode(optimizer, files["optimizer"], set(), "optimizer"),
        "rng": _encode(capture_rng() if rng is None else rng, files["rng"], set(), "rng"),
    }
    text = json.dumps(document, indent=1)
    needed = sum(
        t.numel() * t.element_size() for group in files.values() for t in group.values()
    ) + len(text)
    needed += 4096 * (len(files) + 3) + 256 * sum(
        map(len, files.values())
    )  # block rounding; safetensors headers
    temporary = root / f"{_TEMPORARY}{iteration:06d}-{os.getpid()}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        if shutil.disk_usage(root).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        _write_folder(temporary, files, text)
        if final.exists():
            os.rename(final, root / (final.name + _REPLACED))
        os.rename(temporary, final)
        _sync(root)
    except (OSError, SafetensorError) as error:
        raise _write_error(error, final, needed) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(root, iteration, keep)
    return final


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder in place of the one that is called so: under a hidden name beside it, brought
    to the disk, and renamed. While the two are exchanged the old one is called `NAME.replaced`; a
    process that is killed there leaves that one, and `final` is not there.

    write: makes the folder that it is given. Raises CheckpointError where the disk is full or not
    writable; the one that was there is left as it was.
    """
    temporary = final.with_name(f".tmp-{final.name}")
    replaced = final.with_name(final.name + _REPLACED)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        ordinary_modes([temporary])
        for path in sorted(temporary.rglob("*"), reverse=True):
            _sync(path)
        _sync(temporary)
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.rename(final, replaced)
        os.rename(temporary, final)
        _sync(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def latest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The newest whole checkpoint under `root`; None if there is no checkpoint.

    Each damaged one that is passed over is named in a warning. If all are damaged, CheckpointError:
    starting anew over them is for the user to decide.
    """
    problems = []
    for path in _steps(Path(root)):
        try:
            _verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; falling back to {path.name}", stacklevel=2)
        return path
    if problems:
        raise CheckpointError(f"no usable checkpoint: {'; '.join(problems)}")
    return None


def recorded_settings(root: str | os.PathLike[str]) -> tuple[dict[str, Any], str] | None:
    """The settings of the newest checkpoint under `root` whose description can be read, by section
    and name, and the device of the process that wrote it; None where there is none. Nothing is
    verified: whoever goes on from a checkpoint loads it, which does."""
    for path in _steps(Path(root)):
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))["state"]
            settings = dict(state["config"])
            made = state.get("identity", {}).get("made", {})
            return settings, str(made.get("device", "another device"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint folder, tensors to the CPU. Restores nothing by itself: see `restore_rng`.

    Raises CheckpointError if a file is missing or differs from the manifest in any byte, and for
    contents that no `save_checkpoint` wrote, whatever the manifest says.
    """
    path = Path(path)
    names = _verify(path)
    document = _document(path, names)
    try:
        files = {
            name.removesuffix(_TENSORS): load_file(path / name)
            for name in names
            if name.endswith(_TENSORS)
        }
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error, kind=True)}") from error
    decoded = {}
    for name in _RESERVED:
        try:
            decoded[name] = _decode(document[name], files.pop(name))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            what = one_line(error, kind=True)
            raise CheckpointError(
                f"{path}: damaged: {name} in {_STATE} cannot be decoded: {what}"
            ) from error
    if not isinstance(decoded["optimizer"], dict):
        raise CheckpointError(f"{path}: damaged: optimizer in {_STATE} is not a state dict")
    state, versions = document["state"], document["versions"]
    return Checkpoint(
        path, document["iteration"], files, decoded["optimizer"], state, decoded["rng"], versions
    )


def _group(name: str, group: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense CPU tensors that share no memory, which is what safetensors can write."""
    if name in _RESERVED or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        reserved = ", ".join(_RESERVED)
        raise CheckpointError(
            f"tensors: group name {name!r} (accepted: letters, digits, _ and -; not {reserved})"
        )
    result: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in group.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"tensors: {name}.{key} is a {type(tensor).__name__} (accepted: a tensor)"
            )
        result[key] = _own(tensor, storages, f"{name}.{key}")
    return result


def _own(tensor: Tensor, storages: set[int], where: str) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(
            f"tensors: {where}: {tensor.layout} on {tensor.device} (accepted: dense, with data)"
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    storage = tensor.untyped_storage()
    # A view would make safetensors refuse its neighbours; a tied tensor would be refused outright.
    if storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size():
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def _encode(value: Any, tensors: dict[str, Tensor], storages: set[int], where: str) -> Any:
    """A nested value as JSON that `_decode` turns back exactly. Tensors go to `tensors`, under
    running numbers."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = _own(value, storages, where)
        return {"tensor": key}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, tensors, storages, f"{where}[{n}]") for n, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise CheckpointError(f"{where}: key {key!r} (accepted: strings and integers)")
        return {
            "dict": [
                [key, _encode(item, tensors, storages, f"{where}.{key}")]
                for key, item in value.items()
            ]
        }
    if isinstance(value, np.generic):
        return _encode(value.item(), tensors, storages, where)
    raise CheckpointError(
        f"{where}: a {type(value).__name__} (accepted: tensors, numbers, strings, dicts, lists)"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {key: _decode(item, tensors) for key, item in content}


def _json(value: Any, where: str) -> Any:
    """The value as JSON would give it back: tuples as lists."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [_json(item, f"{where}[{n}]") for n, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: key {key!r} (accepted: strings)")
        return {key: _json(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where}: a {type(value).__name__} (accepted: JSON values)")


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("editr2")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        own = "not installed"
    return {"editr2": own, "torch": torch.__version__, "python": platform.python_version()}


def _write_folder(folder: Path, files: Mapping[str, dict[str, Tensor]], state: str) -> None:
    folder.mkdir()
    for name, group in files.items():
        save_file(group, folder / f"{name}.safetensors")
    (folder / _STATE).write_text(state, encoding="utf-8")
    ordinary_modes([folder])
    entries = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _checksum(path)}
    (folder / _MANIFEST).write_text(
        json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8"
    )
    _sync(folder / _MANIFEST)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _verify(path: Path, *, contents: bool = True) -> list[str]:
    """The names of a checkpoint's files; CheckpointError unless it is whole. Without `contents`,
    only sizes count."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        form, entries = manifest["format"], dict(manifest["files"])
        if form != FORMAT:
            raise CheckpointError(f"{path}: checkpoint format {form!r} (accepted: {FORMAT})")
        # An entry that was taken out must not take its weights along in silence.
        written = {file.name for file in path.iterdir() if file.name.endswith(_TENSORS)}
        if unlisted := sorted({*_REQUIRED, *written} - set(entries)):
            raise CheckpointError(f"{path}: damaged: {_MANIFEST} does not list {unlisted[0]}")
        if odd := [name for name in entries if Path(name).name != name]:
            raise CheckpointError(
                f"{path}: damaged: {_MANIFEST} lists {odd[0]!r} (accepted: files of the folder)"
            )
        for name, entry in entries.items():
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{path}: damaged: {name} has {size} bytes, {entry['bytes']} were written"
                )
            if contents and _checksum(path / name) != entry["sha256"]:
                raise CheckpointError(f"{path}: damaged: {name} does not match its checksum")
    except FileNotFoundError as error:
        missing = f"{Path(error.filename).name} is missing" if path.is_dir() else "no such folder"
        raise CheckpointError(f"{path}: not a whole checkpoint: {missing}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged: {_MANIFEST} cannot be read") from error
    if contents:
        _document(path, list(entries))
    return list(entries)


def _document(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """state.json, its fields of the right types and its iteration and groups those of the
    folder."""
    try:
        document = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: damaged: {_STATE} cannot be read: {one_line(error, kind=True)}"
        ) from error
    for field, kinds in _FIELDS.items():
        value = document.get(field) if isinstance(document, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool):
            accepted = " or ".join(kind.__name__ for kind in kinds)
            raise CheckpointError(
                f"{path}: damaged: {field} in {_STATE} is a {type(value).__name__} (accepted: "
                f"{accepted})"
            )
    named = _STEP.fullmatch(path.name)
    if document["iteration"] != (int(named[1]) if named else abs(document["iteration"])):
        accepted = f"{int(named[1])}, as the folder is called" if named else "at least 0"
        raise CheckpointError(
            f"{path}: damaged: iteration in {_STATE} is {document['iteration']} (accepted: "
            f"{accepted})"
        )
    groups = {name.removesuffix(_TENSORS) for name in names if name.endswith(_TENSORS)} - set(
        _RESERVED
    )
    said = document.get("groups", sorted(groups))  # editr2 0.1 did not say
    if not isinstance(said, list) or sorted(map(str, said)) != sorted(groups):
        given = f"groups in {_STATE} are {said}, those in {_MANIFEST} {sorted(groups)}"
        raise CheckpointError(f"{path}: damaged: {given} (accepted: the same)")
    return document


def _steps(root: Path) -> list[Path]:
    """Checkpoint folders, newest first. Names decide; contents are not looked at."""
    found = []
    for path in root.iterdir() if root.is_dir() else ():
        match = _STEP.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _iteration(path: Path) -> int:
    return int(path.name.removesuffix(_REPLACED).removeprefix("step_"))


def _remove_leftovers(root: Path) -> None:
    for path in root.iterdir():
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path)
        elif (
            path.name.endswith(_REPLACED)
            and path.with_name(path.name.removesuffix(_REPLACED)).exists()
        ):
            _discard(path)


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill halfway leaves a leftover and not a damaged checkpoint."""
    hidden = path.with_name(f"{_TEMPORARY}{path.name.removeprefix('step_')}-removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _prune(root: Path, iteration: int, keep: int) -> None:
    kept = 0
    try:
        for path in _steps(root):
            if _iteration(path) > iteration:
                warnings.warn(
                    f"{path}: removed: the run was taken back to iteration {iteration}",
                    stacklevel=3,
                )
                _discard(path)
            elif kept >= keep or (path.name.endswith(_REPLACED) and _iteration(path) == iteration):
                _discard(path)
            elif _is_whole(path):
                kept += 1  # damaged ones do not count: they must not push a good one out
    except OSError as error:  # the new checkpoint is in place; old ones too many do no harm
        warnings.warn(
            f"{root}: an old checkpoint cannot be removed: {error.strerror}", stacklevel=3
        )


def _is_whole(path: Path) -> bool:
    try:
        _verify(path, contents=False)
    except CheckpointError:
        return False
    return True


def _write_error(error: OSError | SafetensorError, final: Path, needed: int) -> CheckpointError:
    match = _OS_ERROR.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
    reason = os.strerror(code) if code else str(error)
    if code not in _FULL:
        return CheckpointError(f"{final}: cannot be written: {reason}")
    free = shutil.disk_usage(final.parent).free
    return CheckpointError(
        f"{final}: not saved: {reason}; it needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB "
        f"are free"
        " (earlier checkpoints are intact)"
    )
