"""`editr2 benchmark`"""

from __future__ import annotations

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
            "help": "world, mice, edival, gedit, imgedit, or a set of sessions (a path); of "
            "rewards: editscore-bench, tiger-bench, pairs, preferences (or the path of such a file)"
        },
    ),
]


def command(arguments: Arguments) -> int:
    """edit a benchmark's sessions, judge and report; or compare two that are done"""
    if any(word == "--compare" or word.startswith("--compare=") for word in arguments):
        return _compare(list(_repeated(arguments, "--compare")))
    from editr2.benchmarks.settings import BenchmarkConfig

    config, given = settings.schema_config(
        BenchmarkConfig,
        "editr2 benchmark",
        "Edit the sessions of a benchmark with --policy, or take --images, judge them and report. "
        "`--compare A B` compares the folders of two that are done.",
        arguments,
        EXTRA,
        named=True,
        own=(
            "eval.sampler",
        ),  # by an ODE, as editors are used, also where a run evaluated otherwise
    )
    from editr2.benchmarks.rewards import pair_set_of

    if pair_set_of(given["name"]):
        return _judge_reward(config, given["name"], given["policy"])
    from editr2.benchmarks.run import run_benchmark

    print("\n".join(run_benchmark(config, given["name"], given["policy"], given["notes"])))
    return 0


def _judge_reward(config: BenchmarkConfig, name: str, editor: str | None) -> int:
    """Of a set of labelled pairs, which judge a reward and no editor."""
    from editr2.benchmarks import rewards
    from editr2.benchmarks.settings import BenchmarkConfig
    from editr2.errors import ConfigError, shown
    from editr2.run.processes import open_processes

    if editor:
        raise ConfigError(f"--policy: {shown(editor)} (accepted with {name}: none)")
    for field in ("images", "passes", "turns", "samples", "stages"):
        if (value := getattr(config, field)) != getattr(BenchmarkConfig(), field):
            raise ConfigError(f"{field}: {value} (accepted with {name}: none; no image is made)")
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
        processes=open_processes(),
    )
    if said:
        print("\n".join(said))
    return 0


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
    flags = Flags("editr2 benchmark", "Compare the folders of benchmarks, or of runs.")
    flags.add(
        "--compare", path=True, action="append", help="the folders, the first is held against"
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

    print("\n".join(compare(options["compare"], options["out"])))
    return 0
