"""The benchmarks that have a name: what their sessions are, what judges them, what they report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from editr2.config import RewardUse
from editr2.config.plugins import resolve
from editr2.errors import ConfigError

if TYPE_CHECKING:  # they import numpy, which the names of benchmarks do not need
    from editr2.benchmarks.passes import Exact
    from editr2.sessions import Session


@dataclass(frozen=True)
class Source:
    """What a user says of a set. path: its file or folder (`--data`); None where none is needed.
    images: the folder of its source images where they are not where the release has them
    (`--sources`). turns: lengths of sessions, of a benchmark that makes its own. sessions: how many
    of each length it makes."""

    path: Path | None
    images: Path | None = None
    turns: tuple[int, ...] = ()
    sessions: int = 100

    def given(self, accepted: str) -> Path:
        """`path`, of a set that has to be named. Raises `ConfigError`, which says what is accepted,
        where it is not."""
        if self.path is None:
            raise ConfigError(f"--data: none (accepted: {accepted})")
        return self.path

    def without_images(self) -> None:
        """Raises `ConfigError` where `images` are given to a set that names its own."""
        if self.images is not None:
            raise ConfigError(
                f"--sources: {self.images} (accepted: nothing, as the set names its images)"
            )


@dataclass(frozen=True)
class Reference:
    """A figure of others. name: of the editor. measure: the key of `measures` that it is (such as
    "O_of_means@3"). value: in the benchmark's scale. source: the paper or page. judge, prompts: the
    judge's model (a part of its name, lower case), and the hash of the prompts (`facts` of the
    reward), with which alone it may be compared; `released` rules are always demanded."""

    name: str
    measure: str
    value: float
    source: str
    judge: str
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """An entry of the table.

    title: as its paper has it. read: its sessions, one at a time, images left in their files;
    raises `DataError` with file and line. reward: what judges where the user names no other; its
    options are under the user's. passes: which are done unless the user says. scale: of the numbers
    shown (EdiVal's are per cent, GEdit's out of 10). measures: the function of `measures` that says
    what is reported (`measures.KINDS`). headline: keys of it, shown first. layouts: of generated
    images made elsewhere (`layouts.LAYOUTS`), tried in this order. resize: `data.resize` where the
    user leaves it at no. makes_sessions: of lengths that are asked for. exact: as `passes.Exact`.
    references: figures of others. about: one line on source and licence.
    """

    title: str
    read: Callable[[Source], Iterator[Session]]
    reward: RewardUse | None
    headline: Sequence[str]
    passes: Sequence[str] = ("multipass",)
    scale: float = 1.0
    measures: str = "turns"
    layouts: Sequence[str] = ("edival", "outputs")
    resize: Literal["no", "crop", "stretch"] = "no"
    makes_sessions: bool = False
    exact: Exact | None = None
    references: Sequence[Reference] = field(default=())
    about: str = ""


BENCHMARKS: dict[str, str] = {
    "world": "editr2.benchmarks.sets.world:WORLD",
    "mice": "editr2.benchmarks.sets.mice:MICE",
    "edival": "editr2.benchmarks.sets.edival:EDIVAL",
    "gedit": "editr2.benchmarks.sets.gedit:GEDIT",
    "gedit-cn": "editr2.benchmarks.sets.gedit:GEDIT_CN",
    "imgedit": "editr2.benchmarks.sets.imgedit:IMGEDIT",
    "sessions": "editr2.benchmarks.sets.own:SESSIONS",
}
"""Name -> `module:NAME` of a `Benchmark`; nothing is imported before it is asked for. `sessions` is
any set that `--data` takes."""


PAIR_SETS: dict[str, str] = {
    "editscore-bench": "editr2.benchmarks.pairs.editscore:EDITSCORE",
    "tiger-bench": "editr2.benchmarks.pairs.tiger:TIGER",
    "pairs": "editr2.benchmarks.pairs.files:PAIRS_FILE",
    "preferences": "editr2.benchmarks.pairs.files:PREFERENCES",
}
"""Name -> `module:NAME` of a `PairSet`: labelled pairs, of which a reward is judged."""


def find(name: str) -> Benchmark:
    """The entry of that name. Raises `ConfigError` for one that is not there."""
    entry = resolve("benchmark", name, BENCHMARKS, what="NAME")
    if not isinstance(entry, Benchmark):
        raise ConfigError(
            f"benchmark: {name!r} is a {type(entry).__name__} (accepted: a Benchmark)"
        )
    return entry
