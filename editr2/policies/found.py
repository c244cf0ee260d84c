"""`--policy PATH|ID`: from what a user has to the settings that edit with it.

That is a run's folder, a policy in it, an export, a folder that `policy.weights` takes, or a
pipeline on diffusers by its folder or hub id. How it edits is taken from where it stands: the
settings of its run (`editr2.policies.recorded`), or what a stock pipeline does where its caller
says nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from editr2.config import Config, PolicyConfig, replace_nested
from editr2.config.fields import plain
from editr2.errors import ConfigError, shown
from editr2.files import runs_near
from editr2.policies.adapters import DESCRIPTION, LORA_FILE
from editr2.policies.configured import policy_class
from editr2.policies.models import MODELS
from editr2.policies.pipelines import PipelineModel
from editr2.policies.recorded import (
    EXPORT,
    KEPT,
    OF_ADAPTERS,
    PEFT,
    RUN,
    Settings,
    over_its_base,
    read_settings,
    settings_file,
)
from editr2.policies.tensor_files import read_json, reading
from editr2.run.hub import HUB_ID, INDEX, check_model, fetch_index

OF_WEIGHTS = OF_ADAPTERS | {"model", "weights"}
"""Settings that `--policy` is in place of."""
CHECKPOINT = "manifest.json"


@dataclass(frozen=True)
class Editor:
    """settings: by section and field, for `replace_nested`. note: what was taken, and from where,
    in a line for the terminal."""

    settings: Settings
    note: str


def editor_of(text: str, model: str | None = None) -> Editor:
    """The editor that a user names. model: `policy.model` where the user says that, too.

    Raises a `UserError`, one line, where it is not there, nothing says what it is, or what says so
    cannot be read.
    """
    folder, title = Path(text).expanduser(), f"--policy: {shown(text)}"
    if folder.is_dir():
        return _of_folder(folder, model, title)
    if folder.exists():
        raise ConfigError(f"{title}: a file (accepted: a folder, or a hub id)")
    if not HUB_ID.fullmatch(text):
        raise ConfigError(
            f"{title}: not there (accepted: the folder of a run, an export, a saved policy or a "
            f"diffusers pipeline, or a hub id)"
        )
    known = [name for name in MODELS if text in _published(name)]
    index = getattr(policy_class(known[0]), "index", INDEX) if known else INDEX
    check_model(text, "--policy", index)
    if not known and model is None:
        with reading(f"{title}: no folder, and no pipeline on the hub{runs_near(folder)}"):
            found = fetch_index(text)
        known = [_owner(found.parent, title)]
    policy = PolicyConfig(model=model or known[0], weights=text)
    return _stock(policy, title)


def stock_steps(config: PolicyConfig) -> int | None:
    """The denoising steps that the stock pipeline of these weights takes where its caller says
    nothing; None for a model that is no published pipeline. No weights are read."""
    stock = policy_class(config.model).stock(config)
    return None if stock is None else stock.steps


def _of_folder(folder: Path, model: str | None, title: str) -> Editor:
    folder, which = _kept(folder, title)
    file = settings_file(folder)
    recorded = {} if file is None else read_settings(file)
    said = recorded.get("policy", {})
    model = model or said.get("model") or _owner(folder, title)
    kind = policy_class(model)
    policy = replace_nested(Config(), {"policy": {**said, "model": model}}).policy
    policy = kind.settings_for(policy, folder)
    over_its_base(policy)  # what is not there is said now
    if file is None and kind.is_stock(folder):
        return _stock(policy, title)
    values = plain(policy)
    recorded["policy"] = {name: values[name] for name in {**said, **dict.fromkeys(OF_WEIGHTS)}}
    how = "its settings are not beside it, so they are the defaults"
    if file is not None:
        how = f"with the settings of {shown(file)}"
    return Editor(recorded, f"{title}: {which}{model}, {how}")


def _stock(policy: PolicyConfig, title: str) -> Editor:
    """As the pipeline samples where its caller says nothing."""
    values = plain(policy)
    settings: Settings = {"policy": {name: values[name] for name in OF_WEIGHTS}}
    kind = policy_class(policy.model)
    stock = kind.stock(policy)
    if stock is None:
        return Editor(settings, f"{title}: {policy.model}")
    settings["policy"] |= stock.settings
    settings["eval"] = {"sampler": "ode", "steps": stock.steps}
    said = {
        name: f"{value:g}" if isinstance(value, float) else plain(value)
        for name, value in stock.settings.items()
    }
    more = "".join(f", {name} {value}" for name, value in said.items())
    what = f"{stock.steps} steps without noise{more}, at policy.resolution"
    return Editor(settings, f"{title}: {policy.model}, as its stock pipeline by default: {what}")


def _kept(folder: Path, title: str) -> tuple[Path, str]:
    """The folder of a policy: of a run, that of its best evaluation or of its end. And which it
    is, for the note."""
    if (folder / CHECKPOINT).is_file() or next(folder.glob(f"step_*/{CHECKPOINT}"), None):
        raise ConfigError(
            f"{title}: a checkpoint, which has only what trains (accepted: the folder of its run, "
            f"or what `editr2 export` makes of that)"
        )
    if not (folder / RUN).is_file():
        return folder, ""
    there = [name for name in KEPT if (folder / name).is_dir()]
    if not there:
        if (folder / "checkpoints").is_dir():
            raise ConfigError(
                f"{title}: a run without {' or '.join(f'{name}/' for name in KEPT)} yet (accepted: "
                f"one that has ended or kept its best weights, or what `editr2 export` makes of it)"
            )
        return folder, ""
    taken, *others = there
    facts = [_best(folder / taken), *(f"not its {name}/" for name in others)]
    said = "; ".join(filter(None, facts))
    return folder / taken, f"{taken}/ {f'({said}) ' if said else ''}of the run, "


def _best(folder: Path) -> str:
    """Of which evaluation a run's best weights are."""
    try:
        said = json.loads((folder / "best.json").read_text(encoding="utf-8"))
        return f"{said['metric']} {said['value']:.4g} at iteration {said['iteration']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _owner(folder: Path, title: str) -> str:
    """The model whose weights are in a folder that no settings stand beside. Raises `ConfigError`,
    which says what was looked for."""
    kinds = {name: policy_class(name) for name in MODELS}
    for name, kind in kinds.items():
        if kind.owns(folder):
            return name
    looks: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        looks.setdefault(kind.holds, []).append(name)
    kept = " or ".join(f"{name}/" for name in KEPT)
    accepted = "; ".join(
        [
            f"{RUN} beside {kept}, of a run",
            f"{EXPORT}, of an export",
            *(f"{files}, of {', '.join(names)}" for files, names in looks.items() if files),
        ]
    )
    raise ConfigError(
        f"{title}: {_seen(folder)} (accepted: a folder with {accepted}; or --policy.model, whose "
        f"weights it has{runs_near(folder)})"
    )


def _seen(folder: Path) -> str:
    """What there is in a folder that no editor takes."""
    over = f"over an editor it is --policy EDITOR --policy.lora_weights {shown(folder)}"
    if (folder / DESCRIPTION).is_file():
        return f"{DESCRIPTION}: model: {read_json(folder / DESCRIPTION).get('model')!r}"
    if (folder / INDEX).is_file():
        said = read_json(folder / INDEX).get("_class_name")
        kinds = [policy_class(name) for name in MODELS]
        known = [kind.pipeline for kind in kinds if issubclass(kind, PipelineModel)]
        return f"{INDEX}: _class_name: {said!r}, none of {', '.join(known)}"
    if (folder / LORA_FILE).is_file():
        return f"{LORA_FILE} without {DESCRIPTION}, which says what it lies over; {over}"
    if (folder / PEFT).is_file():
        return f"{PEFT} without {EXPORT}, which says what it lies over; {over}"
    return "no editor in it"


def _published(model: str) -> frozenset[str]:
    """Hub ids that name a model without a look at the hub."""
    return frozenset(getattr(policy_class(model), "published", ()))
