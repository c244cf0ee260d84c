"""The settings of the stages that ask somebody: who is asked, about what, and where answers go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from editr2.config.fields import field_problems, setting
from editr2.config.rules import folder_problem
from editr2.config.settings import CALLS_AT_ONCE, COUNT, SEED, TIMEOUT, TRIES

PRINCIPLES_BY = {"world": "editr2.verifier.exact:world_principles"}
"""Exact rules of principles, by name."""

GOLD_BY = {"world": "editr2.verifier.exact:world_gold"}
"""The same of right verdicts."""


@dataclass(frozen=True)
class JudgeUse:
    """One of several who are asked; the fields are those of `judge`."""

    OPTIONS_OF: ClassVar[str] = "verifier"
    """The reward whose options `options` are."""

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = setting(None, path=True)
    function: str | None = setting(None, what="package.module:name or none")
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = setting(16, COUNT)
    concurrency: int | None = setting(None, CALLS_AT_ONCE)
    timeout: float | None = setting(None, TIMEOUT, what="seconds or none")
    retries: int | None = setting(None, TRIES)

    @property
    def given(self) -> bool:
        """Whether there is anybody."""
        return bool(self.weights or self.function or {"url", "url_env"} & set(self.options))


@dataclass(frozen=True)
class JudgeConfig(JudgeUse):
    """Who writes traces.

    Args:
        name: as files call it; none is the name of its model or folder.
        options: those of the reward `verifier` (docs/rewards.md): url and model of a server, and,
            of a folder, too, traces (how many of an edit), temperature, max_tokens and prompts.
        weights: a folder as transformers has it, or a hub id, asked in this process; in place of a
            server.
        function: `package.module:name` of a function of (edits, n, seed) that returns n texts for
            each edit, or what makes one that has options by name; in place of a server.
        dtype: float32 or bfloat16, of weights.
        rows: traces at once, of weights.
        concurrency: calls at once, of a server; none is 16.
        timeout: seconds that a call may take, of a server; none is 120.
        retries: further tries of a call that failed, of a server; none is 4.
        use: several, a list of these fields each; in place of them here.
    """

    use: tuple[JudgeUse, ...] = setting((), what="a list, each of a judge's fields, or empty")

    @property
    def uses(self) -> tuple[tuple[str, JudgeUse], ...]:
        """Each, behind the setting that it stands in; none where nobody is given."""
        return uses_of("judge", self)


def uses_of(at: str, judge: JudgeConfig) -> tuple[tuple[str, JudgeUse], ...]:
    if judge.use:
        return tuple((f"{at}.use[{n}]", use) for n, use in enumerate(judge.use))
    alone = JudgeUse(**{one.name: getattr(judge, one.name) for one in fields(JudgeUse)})
    return ((at, alone),) if alone != JudgeUse() else ()


@dataclass(frozen=True)
class GoldConfig(JudgeConfig):
    """Who gives the right verdicts; nobody where none of it is given.

    Args:
        name: as files call it; none is the name of its model or folder.
        options: of a stronger judge, as those of judge; what most of its traces say of a principle
            is right.
        weights: a folder as transformers has it, or a hub id, asked in this process; in place of a
            server.
        function: `package.module:name` of a function of (edits, n, seed) that returns n texts for
            each edit, or what makes one that has options by name; in place of a server.
        dtype: float32 or bfloat16, of weights.
        rows: traces at once, of weights.
        concurrency: calls at once, of a server; none is 16.
        timeout: seconds that a call may take, of a server; none is 120.
        retries: further tries of a call that failed, of a server; none is 4.
        use: several, a list of these fields each; in place of them here.
        exact: world (the shapes world's rules), or `package.module:name` of a function of an edit
            that returns 0 or 1 for each of its principles, or None where it cannot say; in place of
            a judge.
    """

    exact: str | None = setting(None, among=lambda: GOLD_BY, reference="package.module:name")


@dataclass(frozen=True)
class DataConfig:
    """What is asked about.

    Args:
        path: a folder with the files of the stage before.
        limit: the first so many of each file; none: all.
    """

    path: str | None = setting(None, path=True)
    limit: int | None = setting(None, COUNT)


@dataclass(frozen=True)
class ChatConfig:
    """Who is asked for principles.

    Args:
        options: those of the reward `verifier` (docs/rewards.md): url and model of a server, and
            prompts in place of ours.
        exact: world (the shapes world's rules), or `package.module:name` of a function of an edit
            that returns its principles; in place of a server.
        concurrency: calls at once, of a server; none is 16.
        timeout: seconds that a call may take; none is 120.
        retries: further tries of a call that failed; none is 4.
    """

    OPTIONS_OF: ClassVar[str] = "verifier"

    options: dict[str, Any] = field(default_factory=dict)
    exact: str | None = setting(None, among=lambda: PRINCIPLES_BY, reference="package.module:name")
    concurrency: int | None = setting(None, CALLS_AT_ONCE)
    timeout: float | None = setting(None, TIMEOUT, what="seconds or none")
    retries: int | None = setting(None, TRIES)


@dataclass(frozen=True)
class PrinciplesConfig:
    """Questions about edits.

    Args:
        out: a folder for principles.jsonl, pairs.jsonl, and judges.jsonl with every answer: a
            second start asks nothing again.
    """

    out: str = setting("runs/principles", path=True, what="a folder", check=folder_problem)
    data: DataConfig = field(default_factory=DataConfig)
    judge: ChatConfig = field(default_factory=ChatConfig)


@dataclass(frozen=True)
class TracesConfig:
    """Traces about edits.

    Args:
        seed: what is sampled follows from it.
        out: a folder for principles.jsonl, traces.jsonl, and judges.jsonl with every answer: a
            second start asks nothing again.
    """

    seed: int = setting(0, SEED)
    out: str = setting("runs/traces", path=True, what="a folder", check=folder_problem)
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    gold: GoldConfig = field(default_factory=GoldConfig)


@dataclass(frozen=True)
class EvalConfig:
    """A verifier, held against people and gold.

    Args:
        seed: what is sampled follows from it.
        out: a folder for eval.json, traces.jsonl, verifier.html, and judges.jsonl with every
            answer: a second start asks nothing again.
        against: the folder of another verifier's evaluation of the same pairs, to be compared with.
    """

    seed: int = setting(0, SEED)
    out: str = setting("runs/verifier-eval", path=True, what="a folder", check=folder_problem)
    against: str | None = setting(None, path=True)
    data: DataConfig = field(default_factory=DataConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


StageConfig = PrinciplesConfig | TracesConfig | EvalConfig


def stage_problems(config: StageConfig) -> Iterator[str]:
    """One line for each rule that is broken."""
    for _, problem in field_problems(config):
        yield problem
    if config.data.path is None:
        yield "data.path: none (accepted: a folder)"
    if isinstance(config, PrinciplesConfig):
        one = config.judge
        if (one.exact is not None) == bool(one.options):
            yield "judge: neither or both of options and exact (accepted: one of them)"
        return
    yield from _judge_problems("judge", config.judge, config.judge.uses)
    if not config.judge.uses:
        yield "judge: nobody (accepted: options.url of a server, weights, or a function)"
    if isinstance(config, TracesConfig):
        gold = uses_of("gold", config.gold)
        yield from _judge_problems("gold", config.gold, gold)
        if len(gold) > 1:
            yield f"gold.use: {len(gold)} judges (accepted: one)"
        if gold and config.gold.exact is not None:
            yield f"gold.exact: {config.gold.exact} (accepted without a judge of gold)"
    elif len(config.judge.uses) > 1:
        yield f"judge.use: {len(config.judge.uses)} judges (accepted: one)"


def _judge_problems(
    at: str, judge: JudgeConfig, uses: Sequence[tuple[str, JudgeUse]]
) -> Iterator[str]:
    if judge.use:
        beside = [one.name for one in fields(JudgeUse) if _set(judge, one.name)]
        if beside:
            yield f"{at}.{beside[0]}: beside {at}.use (accepted: one of them)"
    for key, use in uses:
        if use.weights is not None and use.function is not None:
            yield f"{key}.function: {use.function} (accepted without weights)"
        elif not use.given:
            yield f"{key}: nobody (accepted: options.url of a server, weights, or a function)"
    names = [use.name for _, use in uses if use.name is not None]
    if twice := next((name for name in names if names.count(name) > 1), None):
        yield f"{at}.use: {twice!r} twice (accepted: a name each)"


def _set(judge: JudgeConfig, name: str) -> bool:
    return bool(getattr(judge, name) != getattr(JudgeUse(), name))
