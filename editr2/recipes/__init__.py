"""Recipes that ship with the package: whole configurations for real editors, each with what
`editr2 check` printed of it in its header. `--config NAME` takes one, `editr2 recipes` lists them.

They run as they are, on the eight pictures in `photos/`.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from editr2.config.yaml import load_yaml
from editr2.errors import ConfigError

FOLDER = Path(__file__).parent
PHOTOS = FOLDER / "photos"
"""Eight small pictures with three turns each, which every recipe runs on."""
_VERDICT = re.compile(r"^#\s+verdict: fits (\S+): ([\d.]+) GiB of ([\d.]+) GiB$", re.M)
_HOURS = re.compile(r"^#\s+run\s+([\d.]+ \w+) in all$", re.M)
_CHECK = re.compile(r"^#\s+(editr2 check .*)$", re.M)


@dataclass(frozen=True)
class Recipe:
    """A file of this folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """Its settings, by section."""
        return load_yaml(self.path)[0]

    @property
    def title(self) -> str:
        """The first sentence of its header."""
        head = self.text.partition("\n#\n")[0]
        sentence = " ".join(line.lstrip("# ") for line in head.splitlines())
        return sentence.partition(". ")[0].rstrip(".")

    @property
    def model(self) -> str:
        return str(self.values["policy"]["model"])

    @property
    def method(self) -> str:
        """Its loss, and what its rollouts are sampled by where that is chosen."""
        sampler = self.values["rollout"].get("dynamics")
        loss = str(self.values["train"]["loss"])
        return f"{loss}, {sampler}" if sampler else loss

    @property
    def devices(self) -> str:
        """What the header's check is for: `8 x h100`."""
        words = shlex.split(self._found(_CHECK)[1])
        said = dict(pairwise(words))
        return f"{said.get('--processes', 1)} x {said['--gpu']}"

    @property
    def memory(self) -> str:
        """Of each device, as that check estimated: `46.5 of 79.6 GiB`."""
        _, needed, there = self._found(_VERDICT).groups()
        return f"{needed} of {there} GiB"

    @property
    def time(self) -> str:
        """Of the whole run, as that check estimated: `6.1 h`."""
        return self._found(_HOURS)[1]

    def _found(self, what: re.Pattern[str]) -> re.Match[str]:
        found = what.search(self.text)
        if found is None:
            raise ValueError(f"{self.path}: no line {what.pattern} (python recipe_estimates.py)")
        return found


def recipes() -> dict[str, Recipe]:
    """Every recipe, by its name."""
    return {path.stem: Recipe(path) for path in sorted(FOLDER.glob("*.yaml"))}


def find_recipe(name: str) -> Recipe:
    """Raises `ConfigError` for a name that is none."""
    known = recipes()
    if name not in known:
        raise ConfigError(f"recipe: {name!r} (accepted: {', '.join(known)})")
    return known[name]


def config_file(text: str) -> str:
    """The file that `--config` names: itself where it is there, else the recipe of that name.
    Raises `ConfigError` for what is neither, where it was not meant as a file or stands where
    recipes once stood."""
    known = recipes()
    if text in known and not Path(text).is_file():
        return str(known[text].path)
    if Path(text).exists():
        return text
    if Path(text).stem in known:
        raise ConfigError(
            f"--config: {text}: no such file (did you mean the recipe {Path(text).stem}?)"
        )
    if not Path(text).suffix and Path(text).name == text:
        raise ConfigError(
            f"--config: {text!r} (accepted: a YAML file, or a recipe: {', '.join(known)})"
        )
    return text


def copy_recipe(recipe: Recipe, to: Path) -> list[Path]:
    """Writes a recipe, with its pictures beside it, so that it runs as it is; the commands in its
    header name the copy. Returns what was written.

    Raises `ConfigError` where one of them is there already; then nothing is written.
    """
    photos = to.parent / PHOTOS.name
    for path in (to, photos):
        if path.exists() or path.is_symlink():
            raise ConfigError(
                f"--to: {path} is there already (accepted: a new file, beside no {PHOTOS.name}/)"
            )
    to.parent.mkdir(parents=True, exist_ok=True)
    copy_photos(photos)
    text = re.sub(
        rf"^(#\s+.*editr2 (?:check|train --config)) {re.escape(recipe.name)}\b",
        lambda found: f"{found[1]} {shlex.quote(str(to))}",
        recipe.text,
        flags=re.M,
    )
    with to.open("x", encoding="utf-8") as file:
        file.write(text)
    return [to, photos]


def copy_photos(to: Path) -> None:
    """Writes the pictures and their sessions into a new folder."""
    shutil.copytree(PHOTOS, to, ignore=shutil.ignore_patterns("__pycache__"))
