"""What a run's numbers depend on, and where they were made.

A checkpoint and the first row of `metrics.jsonl` hold both. What numbers depend on has a name and a
fingerprint each,

    sessions   the training set: ids, instructions, modes, meta and pixels; of the endless world
               settings and version
    heldout    the same of the evaluation's sessions
    weights    the weights that training starts from and adapters lie over
    questions  the texts that intents are asked for with, where a user's stand in place of ours
    reward     the judge's name, its source with that of its helpers (`sources`), and the settings
               that its constructor was given
    eval_reward  the same of the judges that evaluation alone asks

beside the settings under their dotted names: a run goes on only where all of them are what they
were, or where the user insists by name (`--resume-anyway`). Versions, command, commit, host and
date may differ; they are recorded and told.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from editr2.config import Config, PolicyConfig
from editr2.config.fields import is_mapping, leaves, respelt_leaves
from editr2.config.rules import option_defaults
from editr2.errors import CheckpointError, ConfigError, one_line
from editr2.policies.configured import policy_class
from editr2.policies.lora_files import lora_sources
from editr2.policies.recorded import over_its_base
from editr2.policies.tensor_files import BLOCK, tensor_digest, tensors_of
from editr2.run.hub import INDEX, cached
from editr2.run.sources import installed, sources
from editr2.sessions import Session
from editr2.sessions.session import pixel_sum, reference_sums
from editr2.sessions.source import SessionSource
from editr2.worlds import shapes

MAY_CHANGE = {
    "out",
    "train.iterations",
    "checkpoint.every",
    "checkpoint.keep",
    "reward.concurrency",
    "reward.timeout",
    "reward.retries",
    "reward.cache",
    "policy.cache",
    "train.stop_after",
    "eval.drift.structure",
    "eval.drift.saturation",
    "eval.drift.sharpness",
    "policy.shard",
    "policy.shard_group",
    "tracking",
    "tracking_options",
}
"""Settings that a resumed run may have others of: no number of an iteration follows from them, or
(where weights lie) by rounding alone, as from the number of processes."""
AUTO = {"policy.branches": "apart", "policy.compile": "off"}
"""What auto is where it is recorded: a run settles it before it compares, but for models that have
no use for it, and it is the default that older runs know nothing of."""
STANDS_FOR = {
    "sessions": ("data.path",),
    "heldout": ("data.heldout",),
    "weights": ("policy.weights", "policy.lora_weights"),
    "reward": ("reward.name", "reward.function"),
    "questions": ("policy.questions",),
}
"""Fingerprints of what settings lead to: where both sides know one, another path or name may lead
there."""
FINGERPRINTS = (*STANDS_FOR, "eval_reward", "start")
PACKAGES = (
    "editr2",
    "torch",
    "numpy",
    "accelerate",
    "diffusers",
    "transformers",
    "peft",
    "tokenizers",
)
WHOLE = 16 << 20
"""Bytes up to which a file of weights is read whole; larger ones are sampled."""
SAMPLES = 256
"""Of another file than safetensors, BLOCK bytes each; of that format every tensor gives one."""
_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class Identity:
    """depends: fingerprints by name (see above), and `start`, the trainable weights of a policy
    that was given ready made. made: versions, command, commit, host, date, processes and device.
    resumed: the same, with what was insisted on, of every process that went on with the run, this
    one last."""

    depends: dict[str, str]
    made: dict[str, Any]
    resumed: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def identify(
    source: SessionSource, weights: dict[str, str], reward: Any, apart: Any = None
) -> dict[str, str]:
    """`Identity.depends`. weights: of `loaded_weights` or `given_weights`. apart: the judges of
    `eval.reward`, if there are any."""
    endless = f"endless shapes world {shapes.VERSION}, seed {source.seed}, {source.turns} turns"
    if source.told:
        endless += f", with {', '.join(source.told)}"
    return {
        "sessions": endless if source.sessions is None else sessions_fingerprint(source.sessions),
        "heldout": sessions_fingerprint(source.heldout),
        **weights,
        "reward": reward_fingerprint(reward),
        **({} if apart is None else {"eval_reward": reward_fingerprint(apart)}),
    }


# ----------------------------------------------------------------------------------------- sessions


def sessions_fingerprint(sessions: Sequence[Session]) -> str:
    """By content. Pixels that were read to be checked and not kept are not read again."""
    digest = hashlib.sha256()
    for s in sessions:
        turns = [[t.instruction, t.intent, t.task, t.meta] for t in s.turns]
        parts = [s.id, s.mode, turns, s.meta, pixel_sum(s), *reference_sums(s)]
        said = json.dumps(parts, sort_keys=True, default=_described)
        digest.update(said.encode("utf-8", "surrogatepass") + b"\n")
    return f"{len(sessions)} sessions {_short(digest)}"


# ------------------------------------------------------------------------------------------ weights


OVER = " over "
"""Between a policy's weights and those that they stand on."""


def loaded_weights(policy: PolicyConfig) -> dict[str, str]:
    """Of the weights that `load_policy` reads, by their files; of a hub id by the commit that the
    cache holds."""
    kind = policy_class(policy.model)
    base, adapters = over_its_base(policy)
    places = [*([] if adapters is None else [str(adapters)]), *kind.sources(base)]
    index = getattr(kind, "index", INDEX)
    texts = [
        folder_fingerprint(Path(source)) if Path(source).is_dir() else hub_revision(source, index)
        for source in places
    ]
    if files := lora_sources(base):
        texts.insert(0, files_fingerprint({file.suffix: file for file in files}))
    return {
        "weights": OVER.join(texts) or kind.default_weights,
        **kind.fingerprints(policy),
    }


def folder_fingerprint(folder: Path) -> str:
    """Of everything below a folder that a loader may read: names, sizes, and contents, sampled
    where they are large.

    40 GB of weights take a few thousand reads of 4 KiB: one inside of every tensor, so that a
    change to any one of them is seen unless it leaves that block alone."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        # policy.json names its base by a path, and that one is told apart by its own content.
        if hidden or file.suffix not in _READ or file.name == "policy.json" or not file.is_file():
            continue
        found[name] = file
    return files_fingerprint(found)


def files_fingerprint(files: Mapping[str, Path]) -> str:
    """Of files by what they are called here, as `folder_fingerprint`."""
    digest, size = hashlib.sha256(), 0
    for name, file in files.items():
        bytes_ = file.stat().st_size
        digest.update(f"{name} {bytes_}\n".encode())
        size += bytes_
        with open(file, "rb") as stream:
            for start, length in (
                [(0, bytes_)] if bytes_ <= WHOLE else _samples(stream, bytes_, file.suffix)
            ):
                stream.seek(start)
                digest.update(stream.read(length))
    return f"{size} bytes {_short(digest)}"


_READ = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".json",
    ".txt",
    ".model",
    ".jinja",
}


def _samples(stream: Any, size: int, suffix: str) -> list[tuple[int, int]]:
    """(start, length) of what is read of a large file: a safetensors header and a block of every
    tensor, or blocks at equal distances."""
    if suffix == ".safetensors":
        length = int.from_bytes(stream.read(8), "little")
        if length < size:
            try:
                header = json.loads(stream.read(length))
                tensors = [
                    (v["data_offsets"][0], v["data_offsets"][1])
                    for k, v in header.items()
                    if k[0] != "_"
                ]
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                tensors = []  # the loader is the one to say so
            if tensors:
                blocks = [
                    (8 + length + max(a, (a + b - BLOCK) // 2), min(BLOCK, b - a))
                    for a, b in sorted(tensors)
                ]
                return [(0, 8 + length), *blocks]
    return [(size * i // SAMPLES, BLOCK) for i in range(SAMPLES)] + [(size - BLOCK, BLOCK)]


UNKNOWN = "unknown revision"


def hub_revision(name: str, file: str = INDEX) -> str:
    """`owner/name@commit`, as the local cache has it. file: of the model, by which one sees that it
    is there."""
    found = cached(name, file)
    return f"{name}@{UNKNOWN if found is None else found.parent.name}"


def given_weights(policy: Any) -> dict[str, str]:
    """Of a policy that was handed over ready made, by its tensors: `weights` are the frozen ones
    and the buffers of all its parts, `start` those that train (which only a run without checkpoint
    depends on)."""
    parts = dict(_modules(policy))
    frozen = [
        (f"{k}.{n}", t) for k, m in parts.items() for n, t in tensors_of(m) if not t.requires_grad
    ]
    trained = [(n, t) for n, t in policy.module.named_parameters() if t.requires_grad]
    name = type(policy).__qualname__
    return {
        "weights": f"{name} {_short(tensor_digest(frozen))}",
        "start": f"{name} {_short(tensor_digest(trained))}",
    }


def _modules(policy: Any) -> Iterator[tuple[str, nn.Module]]:
    yield "module", policy.module
    parts = {
        **getattr(policy, "__dict__", {}),
        **getattr(getattr(policy, "pipe", None), "components", {}),
    }
    yield from ((name, part) for name, part in sorted(parts.items()) if isinstance(part, nn.Module))


# ------------------------------------------------------------------------------------------- reward


def reward_fingerprint(reward: Any) -> str:
    """Qualified name, source and settings, as far as they can be had.

    Settings are what the constructor takes and the object keeps under the same name (or that behind
    an underscore), so counters and caches are none. A judge whose answers change without any of
    this says so by its `version`. Raises `ConfigError` where its own code raises.
    """
    if members := getattr(reward, "members", ()):  # of a run's panel
        return " + ".join(map(reward_fingerprint, members))
    if type(reward).__module__.startswith("editr2."):
        reward = getattr(reward, "given", reward)  # what we put around a user's own
    try:
        said = json.dumps(_described(reward), sort_keys=True).encode("utf-8", "surrogatepass")
    except Exception as error:  # of a user's own property or descriptor
        raise ConfigError(
            f"reward: {_name(type(reward))}: its settings cannot be read: {one_line(error)}"
        ) from error
    return (
        f"{_name(reward if inspect.isroutine(reward) else type(reward))} "
        f"{_short(hashlib.sha256(said))}"
    )


def _name(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{getattr(thing, '__module__', '?')}:{name}"


def _described(value: Any, depth: int = 0) -> Any:
    """A value as JSON that is equal in another process wherever the value means the same."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth > 6:  # deep enough for any settings; objects may refer to themselves
        return _name(type(value))
    if isinstance(value, (list, tuple)):
        return [_described(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _described(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_described(item, depth + 1), sort_keys=True) for item in value)
    if isinstance(value, enum.Enum):
        return [_name(type(value)), value.name]
    if isinstance(value, np.generic):
        return _described(value.item(), depth + 1)
    if isinstance(value, (Path, torch.dtype, torch.device, re.Pattern)):
        return str(value)
    if isinstance(value, np.ndarray):
        return [
            str(value.dtype),
            list(value.shape),
            _short(hashlib.sha256(np.ascontiguousarray(value).tobytes())),
        ]
    if isinstance(value, Tensor):
        return _short(tensor_digest([("", value)]))
    if isinstance(value, functools.partial):
        return [_described(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [_described(value.__func__, depth + 1), _described(value.__self__, depth + 1)]
    if inspect.isfunction(value):
        held = [value.__defaults__, value.__kwdefaults__, inspect.getclosurevars(value).nonlocals]
        around = [_described(item, depth + 1) for item in held]
        return {"name": _name(value), "source": sources(value), "settings": around}
    if inspect.isroutine(value) or inspect.isclass(value):
        return {"name": _name(value), "source": sources(value)}
    if isinstance(value, nn.Module):
        weights = _short(tensor_digest(tensors_of(value)))
        return {"name": _name(type(value)), "source": sources(type(value)), "weights": weights}
    if depth and installed(type(value)):  # a client, a pool, ...: what it holds is nobody's setting
        return _name(type(value))
    settings = {name: _described(item, depth + 1) for name, item in _settings(value)}
    version = _described(getattr(value, "version", None), depth + 1)
    return {
        "name": _name(type(value)),
        "source": sources(type(value)),
        "settings": settings,
        "version": version,
    }


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        names = list(inspect.signature(type(value)).parameters)
    except (TypeError, ValueError):  # a class of an extension module
        names = []
    held = getattr(value, "__dict__", {})
    for name in names:
        kept = held.get(name, held.get(f"_{name}", _ABSENT))
        if kept is not _ABSENT:
            yield name, kept


# -------------------------------------------------------------------------------- where it was made


def provenance(processes: int, device: str) -> dict[str, Any]:
    """`Identity.made` of this process."""
    return {
        "versions": dict(_versions()),
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "host": platform.node(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processes": processes,
        "device": device,
    }


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


@functools.cache
def _commit() -> str | None:
    """The commit of editr2's own sources, where they are a git checkout, else of the folder that
    the run was started in; `+changes` where tracked files differ from it. None: neither is, or
    there is no git."""
    for folder in (Path(__file__).parent, Path.cwd()):
        command = [
            "git",
            "-C",
            str(folder),
            "describe",
            "--always",
            "--abbrev=40",
            "--exclude=*",
            "--dirty=+changes",
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return done.stdout.strip()
    return None


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`torch 2.9.0 then, 2.10.0 now` for everything that may differ and does; the date always
    does."""
    before, after = (
        dict(_flat({**made, **dict(made.get("versions", {}))})) for made in (saved, now)
    )
    names = [
        n for n in dict.fromkeys([*before, *after]) if n != "date" and not n.startswith("versions.")
    ]
    different = [name for name in names if before.get(name) != after.get(name)]
    return [
        f"{name} {before.get(name, 'unknown')} then, {after.get(name, 'unknown')} now"
        for name in different
    ]


# --------------------------------------------------------------------------------------- comparison


def named(config: Config | Mapping[str, Any], depends: Mapping[str, str] | None) -> dict[str, Any]:
    """Settings under their dotted names, and fingerprints."""
    plain = (
        config
        if isinstance(config, Mapping)
        else json.loads(json.dumps(dataclasses.asdict(config)))
    )
    for section, name in (("reward", "use"), ("eval", "reward")):
        if uses := plain.get(section, {}).get(name):
            # How often and how long they are called is nobody's number, as of one reward.
            kept = [
                {k: v for k, v in use.items() if f"reward.{k}" not in MAY_CHANGE} for use in uses
            ]
            plain = {**plain, section: {**plain[section], name: kept}}
    plain = {**plain, "tracking_options": {}}  # nobody's number
    return {**respelt_leaves(Config, dict(_flat(plain))), **(depends or {})}


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, apart_from: Iterable[str] = ()
) -> dict[str, tuple[str, str]]:
    """What differs between two results of `named`, as (saved, given).

    A setting that only one of them knows has its default in the other (editr2 gained or lost it
    since), and so has an option of the loss that is given. A fingerprint that only one of them has
    is not compared; one that both have stands in for its path.
    """
    options = option_defaults(now.get("train.loss", Config().train.loss))
    defaults = {**named(Config(), None), **dict(_flat(options, "train.loss_options."))}
    both = {name for name in FINGERPRINTS if name in saved and name in now}
    led = {setting for name in both for setting in STANDS_FOR.get(name, ())}
    skipped = {*MAY_CHANGE, *apart_from, *led}
    found = {}
    for name in dict.fromkeys([*saved, *now]):
        if name in skipped or (name in FINGERPRINTS and name not in both):
            continue
        old, new = (values.get(name, defaults.get(name, _ABSENT)) for values in (saved, now))
        old, new = (AUTO.get(name, v) if v == "auto" else v for v in (old, new))
        if old != new:
            shown = [
                "absent" if value is _ABSENT else _text(value, name in both) for value in (old, new)
            ]
            found[name] = (shown[0], shown[1])
    return found


def check_insisted(insisted: Iterable[str]) -> None:
    """Raises `ConfigError` for a name that stands for nothing a run depends on."""
    settings = named(Config(), None)
    sections = {name.rpartition(".")[0] for name in settings} - {""}
    known = {*FINGERPRINTS, *settings, *sections}
    open_ = tuple(f"{key}." for key, slot in leaves(Config) if is_mapping(slot.hint))
    for name in insisted:
        below = name.startswith(open_) and name not in open_  # a run alone knows which there are
        if name not in known and not below:
            accepted = (
                f"{', '.join(STANDS_FOR)}, or a setting such as train.lr or a section of them"
            )
            raise ConfigError(f"--resume-anyway: {name!r} (accepted: {accepted})")


def settle(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    insisted: Iterable[str],
    where: object,
    *,
    apart_from: Iterable[str] = (),
) -> dict[str, tuple[str, str]]:
    """The `differences` that the user insists on: by name, by that of a section, or by those of all
    that is another within a mapping. Raises `CheckpointError` naming all others."""
    found, allowed = differences(saved, now, apart_from=apart_from), set(insisted)
    kept = {}
    for name, values in found.items():
        within = _other_keys(name, saved.get(name), now.get(name))
        sections = {name[:i] for i, c in enumerate(name) if c == "."}
        if {name, *sections} & allowed or (within and within <= allowed):
            kept[name] = values
    if refused := {name: values for name, values in found.items() if name not in kept}:
        listed = "; ".join(
            f"{name}: {old} saved, {new} given" for name, (old, new) in refused.items()
        )
        raise CheckpointError(
            f"{where}: differs from what is given: {listed} (accepted: the same, another --out "
            f"for a new run, or --resume-anyway {','.join(refused)} to go on all the same)"
        )
    return kept


def _other_keys(name: str, old: Any, new: Any) -> set[str]:
    """Dotted names of what differs between two mappings; none of other values."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return set()
    keys = {**old, **new}
    return {f"{name}.{key}" for key in keys if old.get(key, _ABSENT) != new.get(key, _ABSENT)}


def _text(value: Any, fingerprint: bool) -> str:
    return str(value) if fingerprint else repr(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if (
            isinstance(value, Mapping) and value and key != "weights"
        ):  # credit.weights is one setting
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])
