"""`editr2 benchmark`"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from editr2.cli import settings
from editr2.cli.flags import Arguments, Flags
from editr2.config.rules import folder_problem

if TYPE_CHECKING:
    from editr2.benchmarks.settings import BenchmarkConfig

EXTRA: list[tuple[str, dict[str, Any]]] = [
    (
        "name",
        {
            "help": "world (needs nothing), mice, edival, gedit, gedit-cn, imgedit, or a set of "
            "sessions (a path, hf:owner/name:split), of which an editor is judged; or of which a "
            "reward is: editscore-bench, tiger-bench, pairs, preferences, or the path of such a "
            "file (docs/rewards.md)"
        },
    ),
]

EXAMPLES = [
    ("world --sessions 20", "to begin with: the shipped editor, exact verifiers, no download"),
    ("world --turns 3,5,8 --policy runs/demo --out runs/trained", "an editor that you trained"),
    ("--compare runs/start runs/trained --out runs/compared", "two that are done, paired"),
    (
        "edival --data EdiVal --policy.model kontext --reward.options.url http://127.0.0.1:8000/v1",
        "a public benchmark, a stock editor, a judge behind a server",
    ),
]

COMMON = (
    "out",
    "data.path",
    "sessions",
    "turns",
    "passes",
    "samples",
    "stages",
    "images",
    "sources",
    "policy.model",
    "reward.name",
    "reward.options",
    "eval.steps",
)

OF_EDITORS = ("images", "passes", "turns", "samples", "stages")
"""Settings that sets of labelled pairs have no use for."""


def command(arguments: Arguments) -> int:
    """score an editor or a reward on a benchmark; compare two"""
    if any(word == "--compare" or word.startswith("--compare=") for word in arguments):
        return _compare(list(_repeated(arguments, "--compare")))
    from editr2.benchmarks.settings import BenchmarkConfig

    config, given = settings.schema_config(
        BenchmarkConfig,
        "editr2 benchmark",
        "Edit the sessions of a benchmark with --policy, or take --images, judge them and report "
        "(docs/benchmarks.md). `--compare A B` compares the folders of two that are done "
        "(`--compare --help`). Of the settings those of policy, sampler and judge count, none of "
        "training.",
        arguments,
        EXTRA,
        named=True,
        own=("eval.sampler",),  # by an ODE, as editors are used, whatever a run evaluated by
        examples=EXAMPLES,
        common=COMMON,
    )
    from editr2.benchmarks.rewards import pair_set_of
    from editr2.errors import ConfigError

    name = given["name"]
    if pair_set_of(name):
        return _judge_reward(config, name, given["policy"])
    _check_name(name)
    if config.images and given["policy"]:
        raise ConfigError(
            f"--policy: {given['policy']} beside --images {config.images} (accepted: one of the "
            f"two: an editor, or images that are made already)"
        )
    from editr2.benchmarks.run import run_benchmark

    print("\n".join(run_benchmark(config, name, given["policy"], given["notes"])))
    return 0


def _check_name(name: str) -> None:
    """Raises `ConfigError` for what is neither in a table, nor a path, nor a reference."""
    from pathlib import Path

    from editr2.benchmarks.rewards import PAIR_SETS
    from editr2.benchmarks.table import BENCHMARKS
    from editr2.config.fields import is_reference
    from editr2.errors import ConfigError

    known = [*BENCHMARKS, *PAIR_SETS]
    if name in known or is_reference(name) or Path(name).exists():
        return
    near = difflib.get_close_matches(name, known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"benchmark: {name!r} (accepted: {', '.join(BENCHMARKS)}; of rewards {', '.join(PAIR_SETS)}"
        f"; a path that is there; hf:owner/name:split; package.module:NAME{meant})"
    )


def _judge_reward(config: BenchmarkConfig, name: str, policy: str | None) -> int:
    """Of a set of labelled pairs, which judge a reward and no editor."""
    from editr2.benchmarks import rewards
    from editr2.errors import ConfigError

    default = type(config)()
    given = {"policy": (policy, None)} | {
        key: (getattr(config, key), getattr(default, key)) for key in OF_EDITORS
    }
    for key, (value, usual) in given.items():
        if value != usual:
            raise ConfigError(
                f"{key}: {_shown(value)} (accepted with {name}, which judges a reward and no "
                f"editor: nothing)"
            )
    if config.against.given:
        raise ConfigError(
            f"against: a second reward (accepted with {name}: one; judge the other in a folder of "
            f"its own)"
        )
    said = rewards.run_rewards(
        config,
        name,
        config.out,
        data=config.data.path,
        sources=config.sources,
        limit=config.sessions,
    )
    if said:
        print("\n".join(said))
    return 0


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _repeated(words: Arguments, name: str) -> Iterator[str]:
    """`--compare A B` as `--compare A --compare B`."""
    inside = False
    for word in words:
        if word.startswith("--"):
            inside = word == name
            if not inside:
                yield word
        elif inside:
            yield from (name, word)
        else:
            yield word


def _compare(arguments: Arguments) -> int:
    flags = Flags(
        "editr2 benchmark --compare FOLDER FOLDER",
        "Compare the folders of benchmarks, or of runs (of one run alone: before and after its "
        "training). Nothing is edited or judged, so there is no NAME.",
    )
    flags.add(
        "--compare",
        path=True,
        action="append",
        help="the folders; all others are held against the first",
    )
    flags.add(
        "--out",
        path=True,
        check=folder_problem,
        what="a folder",
        default="runs/comparison",
        help="folder for compare.html and the tables",
    )
    options = flags.parse(arguments)
    from editr2.benchmarks.compare import compare

    print("\n".join(compare(options["compare"] or (), options["out"])))
    return 0
