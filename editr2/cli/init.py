"""`editr2 init`"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editr2.cli.flags import SOME, Arguments, Flags, documented
from editr2.config.rules import folder_problem
from editr2.errors import ConfigError, UserError
from editr2.policies.models import DEFAULT, MODELS
from editr2.rewards.table import REWARDS

if TYPE_CHECKING:
    from editr2.recipes.mapped import Mapped
    from editr2.recipes.projects import Source
    from editr2.recipes.start import Choices

FILE, DATA, ITS_WORLD = "train.yaml", "data", "world"
LOOKED_AT = 32
"""Sessions of a set that are read, with their images."""
CHOICES = ("model", "data", "judge", "url", "gpus", "gpu", "from", "example")


def command(arguments: Arguments) -> int:
    """write a configuration to begin with; from another trainer's"""
    flags = Flags(
        "editr2 init",
        "Write DIR/train.yaml: a configuration with a comment for every setting. Overwrites "
        "nothing. On a terminal and without any of the flags below it asks. With --from the "
        "settings are those of a Flow-Factory YAML, or of a configuration of flow_grpo or "
        "DiffusionNFT (FILE.py:NAME, which is read and never run).",
        [
            ("first", "the shipped small model, on a CPU, without a download"),
            ("mine --model kontext --data my_set", "an editor on sessions of your own"),
            ("two --model qwen-edit --gpus 2 --example", "with a few sessions to try it on"),
            ("theirs --from config/grpo.py:counting_flux_kontext", "flow_grpo's settings"),
        ],
    )
    flags.add("dir", path=True, check=folder_problem, what="a folder", help="the folder to write")
    models: dict[str, Any] = {"among": lambda: MODELS, "reference": "package.module:Class"}
    judges: dict[str, Any] = {"among": lambda: REWARDS, "reference": "package.module:Class"}
    flags.add("--model", **models, help="the editor, as policy.model; none: unified")
    flags.add(
        "--data",
        help="world, a folder with sessions.jsonl, or hf:owner/name:split; none: an example, "
        "of unified the world",
    )
    flags.add("--judge", **judges, help="as reward.name; none: pixels, of unified world")
    flags.add("--url", help="of a served judge; none: http://127.0.0.1:8000/v1")
    flags.add("--gpus", type=int | None, bounds=SOME, help="how many GPUs; none: 1")
    flags.add("--gpu", help="which, as editr2 check has them, or cpu; none: h100, of unified cpu")
    flags.add("--from", path=True, help="another trainer's configuration: FILE, or FILE.py:NAME")
    flags.add("--example", action="store_true", help="write a few sessions to train on, too")
    given = flags.parse(arguments)
    folder = Path(given["dir"])
    if not any(given[name] for name in CHOICES) and sys.stdin.isatty() and sys.stdout.isatty():
        given |= asked()
    print("\n".join(written(folder, given)))
    return 0


def asked() -> dict[str, Any]:
    """What a user answers; an empty line is the answer in brackets."""
    answers: dict[str, Any] = {}
    for name, question, default in (
        ("model", f"editor ({', '.join(MODELS)})", DEFAULT),
        ("data", "sessions (world, a folder, hf:owner/name:split, or example)", ""),
        ("judge", f"judge ({', '.join(REWARDS)})", ""),
        ("gpus", "how many GPUs", "1"),
        ("gpu", "which (cpu: none)", ""),
    ):
        try:
            answer = input(f"{question} [{default or 'as the editor needs'}]: ").strip()
        except EOFError:
            answer = ""
        answers[name] = answer or default or None
    if not str(answers["gpus"]).isdigit() or int(answers["gpus"]) < 1:
        raise ConfigError(f"--gpus: {answers['gpus']!r} (accepted: a whole number, at least 1)")
    answers["gpus"] = int(answers["gpus"])
    if answers["data"] == "example":
        answers |= {"data": None, "example": True}
    return answers


def written(folder: Path, given: dict[str, Any]) -> list[str]:
    """Writes the folder, and returns what to say of it."""
    from editr2.config.settings import Config
    from editr2.recipes.commented import commented

    source = _source(given["from"])
    model = given["model"] or (source.model or _stock() if source else DEFAULT)
    example = given["example"] or (given["data"] is None and model != DEFAULT)
    if given["example"] and given["data"] is not None:
        raise ConfigError(f"--example: given beside --data {given['data']} (accepted: one of them)")
    choices = _choices(folder, given, source, model, example)
    file, data = folder / FILE, folder / DATA
    for path in (file, *([data] if example else [])):
        if path.exists() or path.is_symlink():
            raise ConfigError(f"{path} is there already (accepted: a folder without it)")
    settings, found = _settings(folder, choices, source)
    steps = _steps(file, choices)
    told = {key: text for key, (_, text, _) in documented(Config).items()}
    head = [*_head(choices, source), "", *(f"  {step}" for step in steps)]
    if found is not None:
        head += ["", *found.lines()]
    text = commented(settings, told, head, found.origin if found else None)
    folder.mkdir(parents=True, exist_ok=True)
    if example:
        _example(data, model)
    with file.open("x", encoding="utf-8") as out:
        out.write(text)
    lines = [f"settings: {file}", *([f"sessions: {data}"] if example else [])]
    if found is not None:
        lines += found.lines()
    lines += _lacking(folder, settings)
    return [*lines, "next:", *(f"  {step}" for step in steps)]


def _source(text: str | None) -> Source | None:
    if text is None:
        return None
    from editr2.recipes.projects import read_source

    return read_source(text)


def _stock() -> str:
    from editr2.recipes.projects import STOCK

    return STOCK


def _choices(
    folder: Path, given: dict[str, Any], source: Source | None, model: str, example: bool
) -> Choices:
    from editr2.recipes.start import Choices

    judge, options = given["judge"], {}
    known = [reward for reward in source.rewards if reward.name] if source else []
    if judge is None and known:
        judge, options = known[0].name, dict(known[0].options)
    return Choices(
        model=model,
        data=DATA if example else _data(folder, given["data"]),
        judge=judge,
        url=given["url"],
        gpus=given["gpus"] or (source.gpus if source else None) or 1,
        gpu=given["gpu"] or ("cpu" if model == DEFAULT else "h100"),
        options=options,
    )


def _data(folder: Path, text: str | None) -> str | None:
    """As `data.path` in the file has it. Raises `ConfigError` for a folder without sessions."""
    if text in (None, ITS_WORLD):
        return None
    if text.startswith("hf:"):
        return text
    path = Path(os.path.expanduser(text))
    if not path.exists():
        raise ConfigError(
            f"--data: {text}: not there (accepted: world, a folder with sessions.jsonl, or "
            f"hf:owner/name:split)"
        )
    found = path.is_file() or any(
        (path / name).exists() for name in ("sessions.jsonl", "dataset_info.json", "state.json")
    )
    if not found and not (path / "dataset_dict.json").exists():
        raise ConfigError(
            f"--data: {text}: no sessions.jsonl in the folder (accepted: one that has; `editr2 "
            f"data make` builds sessions from images, `editr2 data import` from public sets)"
        )
    return text if path.is_absolute() else os.path.relpath(path, folder)


def _settings(
    folder: Path, choices: Choices, source: Source | None
) -> tuple[dict[str, Any], Mapped | None]:
    """Settings that pass every check, and what was said of another trainer's."""
    from editr2.recipes.start import OF_THE_MACHINE, checked, mended, starting

    out = f"runs/{folder.resolve().name or 'train'}"
    begin = starting(choices, out)
    if source is None:
        checked(begin)
        return begin, None
    found = source.mapped(choices.model, choices.gpus)
    kept = ("out", "policy.model", "data.path", "reward.name", "reward.options", "credit.weights")
    base = {key: value for key, value in begin.items() if key in (*kept, *OF_THE_MACHINE)}
    settings, refused = mended({**base, **found.settings})
    found.nowhere += [line for line in refused if line.partition(":")[0] in found.settings]
    judge = settings["reward.name"]
    others = [r.theirs for r in source.rewards if r.name != judge]
    if others:
        found.nowhere.append(
            f"rewards {', '.join(others)}: {judge} judges here (--judge names another)"
        )
    if source.model is None:
        found.nowhere.append(f"its model: {choices.model} is trained here (--model names another)")
    if source.gpus is None:
        found.differs.append(f"how many GPUs it was for is not said: {choices.gpus} (--gpus)")
    return settings, found


def _example(to: Path, model: str) -> None:
    """A few sessions that the model can edit."""
    if model != DEFAULT:
        from editr2.recipes import copy_photos

        copy_photos(to)
        return
    from editr2.sessions import save_sessions
    from editr2.worlds.shapes import make_session

    save_sessions([make_session(0, i) for i in range(16)], to)


def _lacking(folder: Path, settings: dict[str, Any]) -> list[str]:
    """What the judge has nothing to judge by, of the first sessions of a folder: a note, since they
    may be annotated yet."""
    data = settings.get("data.path")
    if data is None or data.startswith("hf:"):
        return []
    from editr2.annotate.fields import REWARDS as OF_OBJECTS
    from editr2.config import RewardConfig
    from editr2.rewards.load import load_reward
    from editr2.sessions import load_sessions

    name = settings["reward.name"]
    reward = RewardConfig(name=name, options=settings.get("reward.options", {}))
    try:
        sessions = load_sessions(folder / data, limit=LOOKED_AT)
        which = "sessions" if len(sessions) < LOOKED_AT else "sessions at its start"
        said = load_reward(reward).lacking(sessions, which)
    except UserError:  # `editr2 check` says what; all is written, and no note is worth an error
        return []
    more = " (`editr2 data annotate` adds it)" if name in OF_OBJECTS.split(", ") else ""
    return [f"note: {line}{more}" for line in said]


def _head(choices: Choices, source: Source | None) -> list[str]:
    lines = [
        "Written by `editr2 init`. Paths of what is read are relative to this file, `out` to the",
        "folder that the command runs in; every setting that is not here is at its default",
        "(`editr2 train --help` lists them).",
    ]
    if source is not None:
        lines = [f"From {source.title} of {source.project.name}.", *lines]
    return lines


def _steps(file: Path, choices: Choices) -> list[str]:
    """The commands behind it, from the folder that `init` ran in: `out` is relative to that."""
    several, named = choices.gpus > 1, shlex.quote(str(file))
    check = f"editr2 check {named} --gpu {choices.gpu}"
    check += f" --processes {choices.gpus}" if several else ""
    start = (
        f"torchrun --standalone --nproc_per_node {choices.gpus} -m editr2" if several else "editr2"
    )
    return [check, f"{start} train --config {named}"]
