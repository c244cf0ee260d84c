"""The settings of a benchmark: those of an evaluation, and what is done with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from editr2.benchmarks.passes import PASSES
from editr2.benchmarks.table import BENCHMARKS, Benchmark
from editr2.config import Config, EvalConfig
from editr2.config.fields import Bounds, setting
from editr2.config.rules import settings_problems
from editr2.config.settings import COUNT, TURNS
from editr2.errors import ConfigError, shown
from editr2.judge.settings import AgainstConfig, against_problems
from editr2.rewards.table import REWARDS

STAGES = ("generate", "judge", "report")

OWNERS = {
    "metrics.jsonl": "a run",
    "benchmark.json": "a benchmark of an editor",
    "comparisons.jsonl": "a benchmark of a reward",
}
"""What a folder is of, by a file that it has. Their files have the same names."""


def check_folder(out: Path, own: str) -> None:
    """Raises `ConfigError` for a folder that is of another than `own`, one of `OWNERS`."""
    for file, owner in OWNERS.items():
        if file != own and (out / file).is_file():
            raise ConfigError(
                f"--out: {shown(out)}: the folder of {owner} (accepted: another, whose "
                f"{file} is not there)"
            )


def _several_problem(known: tuple[str, ...], given: object) -> str | None:
    if not isinstance(given, tuple | list):
        return None  # its type is another's matter
    for name in given:
        if name not in known:
            return f"{name!r} is none of them"
    return "each once" if len(set(given)) < len(given) else None


def _stages_problem(given: object) -> str | None:
    return _several_problem(STAGES, given)


def _turns_problem(given: object) -> str | None:
    """Sessions are called by their length and number."""
    if isinstance(given, tuple | list) and len(set(given)) < len(given):
        return "each once"
    return None


def _passes_problem(given: object) -> str | None:
    return _several_problem(tuple(PASSES), given)


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """One benchmark of an editor.

    Args:
        seed: images and what a judge samples with follow from it.
        out: the benchmark's folder; one that was stopped goes on there.
        sources: folder of the set's source images, where they are not where its release has them.
        images: a folder of images that were made elsewhere, in place of an editor of ours
            (docs/benchmarks.md has the layouts).
        passes: multipass (each turn edits the output before), singlepass (all instructions so far
            at once, on the source), exact (each turn reads exact earlier images; the world alone);
            empty: the benchmark's own.
        sessions: the first so many sessions of the set (of each length, where it makes its own);
            none: all, of the world 100.
        turns: lengths of sessions, 1,3,5,8, of a benchmark that makes its own.
        samples: images of every session by so many seeds, for the best of n.
        stages: generate, judge, report; empty: all of them.
    """

    out: str = setting("runs/benchmark", path=True, what="a folder")
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(sampler="ode"))
    against: AgainstConfig = field(default_factory=AgainstConfig)
    sources: str | None = setting(None, path=True)
    images: str | None = setting(None, path=True)
    passes: tuple[str, ...] = setting((), check=_passes_problem, what=f"of {', '.join(PASSES)}")
    sessions: int | None = setting(None, COUNT)
    turns: tuple[int, ...] = setting((), TURNS, check=_turns_problem)
    samples: int = setting(1, Bounds(at_least=1, at_most=64))
    stages: tuple[str, ...] = setting((), check=_stages_problem, what=f"of {', '.join(STAGES)}")

    def does(self, stage: Literal["generate", "judge", "report"]) -> bool:
        return not self.stages or stage in self.stages


def named(config: BenchmarkConfig, name: str) -> tuple[str, BenchmarkConfig]:
    """The table's name of what the user calls a benchmark, and the settings: a file or folder of
    sessions is `sessions` with `data.path`."""
    if name not in BENCHMARKS and (name.startswith("hf:") or Path(name).exists()):
        return "sessions", replace(config, data=replace(config.data, path=name))
    return name, config


def with_defaults(config: BenchmarkConfig, kind: Benchmark) -> BenchmarkConfig:
    """What the benchmark says where the user says nothing: the reward, its options below the user's
    own, how images are resized, the passes; and a stock pipeline's own number of steps."""
    from editr2.policies.found import stock_steps

    reward, own = config.reward, kind.reward
    if own and not reward.use and reward.function is None and reward.name in (None, own.name):
        options = {**own.options, **reward.options}
        reward = replace(reward, name=own.name, function=own.function, options=options)
    data = config.data
    if data.resize == "no":
        data = replace(data, resize=kind.resize)
    evaluation = config.eval
    if evaluation.steps is None and config.rollout.steps == Config().rollout.steps:
        evaluation = replace(evaluation, steps=stock_steps(config.policy))
    passes = config.passes or tuple(kind.passes)
    return replace(config, reward=reward, data=data, eval=evaluation, passes=passes)


def benchmark_problems(config: BenchmarkConfig, kind: Benchmark) -> Iterator[str]:
    """One line for each rule that is broken."""
    yield from settings_problems(config, "judge" if config.images else "eval")
    yield from against_problems(config.against)
    reward = config.reward
    if config.does("judge") and not (reward.name or reward.function or reward.use):
        yield f"reward.name: none (accepted with sessions of your own: {', '.join(REWARDS)})"
    if "exact" in config.passes and kind.exact is None:
        yield "passes: exact (accepted with a benchmark that knows exact images: world)"
    if config.turns and not kind.makes_sessions:
        yield f"turns: {list(config.turns)} (accepted with a benchmark that makes its own: world)"
    if kind.makes_sessions:
        if config.data.path is not None:
            yield (
                f"data: {config.data.path} (accepted with a benchmark that makes its own sessions: "
                f"none; `editr2 benchmark {config.data.path}` takes these)"
            )
        if config.sources is not None:
            yield (
                f"sources: {config.sources} (accepted with a benchmark that makes its own "
                f"sessions: none)"
            )
    if config.images and config.samples > 1:
        yield f"samples: {config.samples} (accepted with images that are made elsewhere: 1)"
