"""What frozen encoders make of an image or of words, kept by content: in memory, and in a folder
over runs (`policy.cache`).

An autoencoder or a text encoder gives the same numbers for the same bytes, so whoever asks again
(training behind the rollout, the next epoch, the next run) gets what was made the first time. What
depends on weights that train is no encode and never kept here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from editr2.errors import ConfigError, one_line
from editr2.policies.tensor_files import tensor_digest, tensors_of, write_tensors

log = logging.getLogger(__name__)

Row = Mapping[str, Tensor]
"""One sample's tensors by name, without the batch dimension."""

FORM = 1
"""Of the files and of how encoders are called; another number finds none of the old files."""
_SUM = "sha256"


def digest_of(*parts: bytes | str | np.ndarray) -> bytes:
    """32 bytes, equal for equal parts in an equal order."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            whole.update(f"{part.dtype} {part.shape}\n".encode())
            whole.update(np.ascontiguousarray(part).data)
        else:
            raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            whole.update(f"{len(raw)}\n".encode())
            whole.update(raw)
    return whole.digest()


def size_of(row: Row) -> int:
    """In bytes."""
    return sum(t.numel() * t.element_size() for t in row.values())


class Kept:
    """Rows by key on the host, the last used ones, at most `limit` in all as `weigh` counts them
    (bytes)."""

    def __init__(self, limit: int, weigh: Callable[[Row], int] = size_of) -> None:
        self.limit, self.weigh = limit, weigh
        self.folder: Folder | None = None
        self._held: OrderedDict[bytes, Row] = OrderedDict()
        self._weight = 0

    def rows(
        self,
        keys: Sequence[bytes],
        make: Callable[[list[int]], Sequence[Row]],
        lasting: Callable[[int], bool],
    ) -> list[Row]:
        """The row of every key, on the host. make: gives those at these positions, of which no two
        have the same key; it is not called where all are known. lasting: whether the row at a
        position is one for the folder."""
        found = {key: self._held[key] for key in keys if key in self._held}
        missing = []
        for i, key in enumerate(keys):
            if key in found:
                continue
            row = self.folder.read(key) if self.folder is not None and lasting(i) else None
            if row is not None:
                found[key] = row
            elif keys.index(key) == i:
                missing.append(i)
        if missing:
            for i, row in zip(missing, make(missing), strict=True):
                # A copy: the row may be a view, which would keep its whole batch.
                found[keys[i]] = host = {
                    name: t.detach().to("cpu", copy=True).contiguous() for name, t in row.items()
                }
                if self.folder is not None and lasting(i):
                    self.folder.write(keys[i], host)
        for key in dict.fromkeys(keys):
            self._keep(key, found[key])
        return [found[key] for key in keys]

    def _keep(self, key: bytes, row: Row) -> None:
        if key not in self._held:
            self._held[key] = row
            self._weight += self.weigh(row)
        self._held.move_to_end(key)
        while self._weight > self.limit and self._held:
            self._weight -= self.weigh(self._held.popitem(last=False)[1])


class Folder:
    """Rows by key in files, one each, which several processes may read and write at once."""

    def __init__(self, path: Path, what: str, made_by: bytes) -> None:
        """what: is encoded, for the reader of the folder. made_by: `fingerprint` of the encoder."""
        self.path = path / f"{what}-{made_by.hex()[:16]}"

    def read(self, key: bytes) -> Row | None:
        """None where there is none. A file that is damaged is one line of the log, and counts as
        none: the row is made again and the file with it, since nothing is lost with it but time."""
        path = self._file(key)
        try:
            with safe_open(path, "pt") as file:
                row = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get(_SUM)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s: damaged: %s; made again", path, one_line(error))
            return None
        if said != _sum_of(row):
            log.warning(
                "%s: damaged: its numbers are not those that were written; made again", path
            )
            return None
        return row

    def write(self, key: bytes, row: Row) -> None:
        """Whole or not at all: it appears under its name when it is complete. Raises `ConfigError`
        where it cannot be written."""
        path = self._file(key)
        new = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_tensors(row, new, {_SUM: _sum_of(row)})
                os.replace(new, path)
            finally:
                new.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"policy.cache: {self.path}: cannot be written: {one_line(error)} (accepted: a "
                f"folder with room)"
            ) from error

    def _file(self, key: bytes) -> Path:
        return self.path / f"{key.hex()}.safetensors"


def _sum_of(row: Row) -> str:
    return str(tensor_digest(sorted(row.items()), whole=True).hexdigest())


def fingerprint(parts: Mapping[str, Any], **settings: object) -> bytes:
    """Of what makes an encode. parts: of a pipeline, by name: modules count by their weights
    (large ones are sampled, `tensor_digest`) and configuration, others (tokenizers, processors) by
    the files that they save. settings: whatever else decides its numbers."""
    said: list[bytes | str] = [json.dumps([FORM, settings], sort_keys=True, default=str)]
    for name, part in sorted(parts.items()):
        said.append(name)
        if isinstance(part, nn.Module):
            config: Any = getattr(part, "config", {})
            config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
            told = {key: value for key, value in config.items() if key not in _NOT_NUMBERS}
            said.append(json.dumps(told, sort_keys=True, default=str))
            said.append(tensor_digest(tensors_of(part)).digest())
        elif hasattr(part, "save_pretrained"):
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(folder)
                for file in sorted(Path(folder).rglob("*")):
                    if file.is_file():
                        said += [file.name, file.read_bytes()]
    return digest_of(*said)


_NOT_NUMBERS = {"_name_or_path", "_diffusers_version", "transformers_version"}
