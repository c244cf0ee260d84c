"""What is compared: every arm is a name, a preset and the fields that it changes, as data.

All arms of a study share the start, the seeds, the held-out sessions and the number of edits an
iteration. The methods are compared under the world's exact scores; the judges, and what the methods
are worth under one that errs, by the recipe that learns fastest here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from editr2.config import Config, EvalConfig, RolloutConfig, preset_config, replace_nested
from editr2.config.fields import setting
from editr2.config.settings import COUNT, SIBLINGS, TIMES
from editr2.errors import ConfigError

TURNS = 3
"""Turns of every held-out session, as in all published work."""


@dataclass(frozen=True)
class Arm:
    """One policy of the comparison.

    Args:
        name: its folder, its key in the rows.
        title: as tables and plots call it.
        isolates: the one thing in which it differs from `beside`, or what it stands for.
        preset: the preset it starts from.
        overrides: fields of `Config` that it changes, nested by section; they win over `Settings`.
        beside: the arm it differs from in what it isolates, and in nothing else.
        trained: false for the start itself, which is only evaluated.
        judge: which verifier its reward is, a folder of `--verifiers`, or `OWN`; None is the world,
            which is exact. Every arm is evaluated by the world.
        asked: options of that reward, in which it differs from the other verifiers.
    """

    name: str
    title: str
    isolates: str
    preset: str = "edit-r2"
    overrides: dict[str, Any] = field(default_factory=dict)
    beside: str | None = None
    trained: bool = True
    judge: str | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def needs_verifiers(self) -> bool:
        return self.judge not in (None, OWN)


OWN = "shipped"
"""The verifier that the package has, the same for every training seed; nobody has to train it."""

_NO_INTENT = {"intent": False}
_UNFILTERED = {"filter": False}

ARMS: tuple[Arm, ...] = (
    Arm(
        "base",
        "start",
        "the shipped weights, raw instructions",
        overrides={"policy": _NO_INTENT},
        trained=False,
    ),
    Arm(
        "base-intent",
        "start + intent",
        "the shipped weights write an intent first",
        beside="base",
        trained=False,
    ),
    Arm(
        "single-turn",
        "single-turn RL",
        "RL on one-turn sessions, three times as many; evaluated on three turns",
        overrides={"policy": _NO_INTENT, "rollout": {"turns": 1}, "credit": _UNFILTERED},
    ),
    Arm(
        "multi-turn",
        "multi-turn RL",
        "rollouts of three turns on the policy's own outputs",
        overrides={"policy": _NO_INTENT, "credit": _UNFILTERED},
        beside="single-turn",
    ),
    Arm(
        "intent",
        "+ intent",
        "an intent is written before turns 2 and 3, its tokens trained too",
        overrides={"credit": _UNFILTERED},
        beside="multi-turn",
    ),
    Arm(
        "edit-r2",
        "+ filter = Edit-R2",
        "turns after a failed instruction do not train",
        beside="intent",
    ),
    Arm(
        "mt-editflow-grpo",
        "MT-EditFlow, GRPO",
        "IF and CC, each normalised in its group (advantage fusion), their mean over turns on "
        "every turn",
        preset="mt-editflow-grpo",
    ),
    Arm(
        "mt-reward-fusion",
        "reward fusion",
        "IF and CC are weighed before they are normalised",
        preset="mt-editflow-grpo",
        overrides={"credit": {"fusion": "reward"}},
        beside="mt-editflow-grpo",
    ),
    Arm(
        "mt-per-turn",
        "per-turn credit",
        "every turn has its own advantage against its own baseline, nothing is broadcast",
        preset="mt-editflow-grpo",
        overrides={"credit": {"aggregate": "per-turn", "baseline": "session_turn"}},
        beside="mt-editflow-grpo",
    ),
    Arm(
        "mt-editflow-nft",
        "MT-EditFlow, NFT",
        "DiffusionNFT on ODE rollouts in place of GRPO on an SDE window",
        preset="mt-editflow-nft",
        # The preset's ten steps would be 2.5 times the rollout of the other arms.
        overrides={"rollout": {"steps": Config().rollout.steps}},
        beside="mt-editflow-grpo",
    ),
)


_FILTER_OFF = {"credit": _UNFILTERED}
_BROADCAST = {"credit": {"aggregate": "mean"}}
_FUSED = {"credit": {"fusion": "advantage"}}


_CREDIT = (
    ("unfiltered", "no filter", "turns after a failed one train, too", _FILTER_OFF),
    ("broadcast", "broadcast", "the mean over turns is every turn's reward", _BROADCAST),
    ("fusion", "advantage fusion", "IF, CC and GA are each normalised, then fused", _FUSED),
)


def _judged(name: str, title: str, isolates: str, judge: str | None, **more: Any) -> Arm:
    return Arm(name, title, isolates, "edit-r2-nft", judge=judge, **more)


def _credited(judge: str | None, says: str, names: Sequence[str], **more: Any) -> Iterator[Arm]:
    beside = judge or "exact"
    for name, title, isolates, change in _CREDIT:
        if name in names:
            full, given = f"{beside}-{name}", f"{title} ({says})"
            yield _judged(full, given, isolates, judge, overrides=change, beside=beside, **more)


_EVERY_CREDIT = tuple(name for name, *_ in _CREDIT)
_DIRECTLY = {"traces": 4}
"""Answers without reasoning that take about as long as one with."""


JUDGED: tuple[Arm, ...] = (
    ARMS[1],
    _judged("exact", "exact scores", "rewarded by the world's exact scores", None),
    _judged(
        "gcpo",
        "verifier, SFT + GCPO",
        "rewarded by a verifier after GCPO",
        "gcpo",
        beside="sft",
    ),
    _judged("sft", "verifier, SFT", "rewarded by a verifier after SFT", "sft", beside="exact"),
    _judged(
        "early",
        "verifier, early",
        "rewarded by a verifier of early in its SFT",
        "early",
        beside="sft",
    ),
    _judged(
        "shipped",
        "shipped verifier",
        "rewarded by the verifier that the package has",
        OWN,
        beside="exact",
    ),
    _judged(
        "direct",
        "direct verdicts",
        "rewarded by that verifier taught to answer without reasoning, the mean of four answers",
        "direct",
        asked=_DIRECTLY,
        beside="shipped",
    ),
    *_credited(None, "exact", _EVERY_CREDIT),
    *_credited(OWN, "shipped", _EVERY_CREDIT),
    *_credited("direct", "direct", _EVERY_CREDIT, asked=_DIRECTLY),
    *_credited("sft", "SFT", ("broadcast",)),
)

STUDIES: dict[str, tuple[Arm, ...]] = {"methods": ARMS, "judges": JUDGED}
"""Each has a page of its own."""

EVERY_ARM: tuple[Arm, ...] = tuple(
    {arm.name: arm for arms in STUDIES.values() for arm in arms}.values()
)

BELIEVED = 100
"""Held-out sessions that a judge scores, too, before and after: what it believes of the editor."""


@dataclass(frozen=True)
class Settings:
    """What all arms of one reproduction share, and all rows of one page.

    Args:
        iterations: of training.
        sessions: held-out sessions.
        groups: three-turn sessions an iteration (an arm with fewer turns gets as many more).
        siblings: rollouts a session.
        sampler: of the evaluation, as `eval.sampler`.
    """

    iterations: int = setting(Config().train.iterations, TIMES)
    sessions: int = setting(500, COUNT)
    groups: int = setting(Config().rollout.sessions, COUNT)
    siblings: int = setting(Config().rollout.siblings, SIBLINGS)
    sampler: Literal["rollout", "ode"] = Config().eval.sampler


def find_arms(names: str | None, study: str = "methods") -> tuple[Arm, ...]:
    """The arms of a comma-separated list, in the order of the study; all of them for none."""
    arms = STUDIES[study]
    if names is None:
        return arms
    known = {arm.name: arm for arm in arms}
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise ConfigError(f"--arms: {name!r} (accepted: {', '.join(known)})")
    return tuple(arm for arm in arms if arm.name in asked)


def study_of(names: Iterable[str]) -> str | None:
    """The first study that has all of these arms, as far as they still exist."""
    wanted = set(names) & {arm.name for arm in EVERY_ARM}
    return next(
        (study for study, arms in STUDIES.items() if wanted <= {arm.name for arm in arms}), None
    )


def verifier_of(arm: Arm, seed: int, verifiers: Path) -> Path:
    """The folder of the verifier that an arm is rewarded by, of a training seed of its own, or the
    package's."""
    if arm.judge == OWN:
        from editr2.rewards.verifier import SHIPPED

        return SHIPPED
    return verifiers / str(arm.judge) / f"seed{seed}"


def arm_config(
    arm: Arm,
    settings: Settings,
    seed: int,
    out: str | Path,
    verifiers: Path = Path("verifiers"),
) -> Config:
    """The checked configuration of one run."""
    turns = arm.overrides.get("rollout", {}).get("turns", TURNS)
    common: dict[str, Any] = {
        "seed": seed,
        "out": str(Path(out)),
        "rollout": {
            "sessions": settings.groups * TURNS // turns,
            "siblings": settings.siblings,
            "turns": turns,
        },
        "train": {"iterations": settings.iterations, "kl_weight": 0.0},
        "eval": {
            "sessions": settings.sessions,
            "turns": TURNS,
            "sampler": settings.sampler,
            "every": 0,
            "strips": 2,
        },
        # The last iteration always writes one.
        "checkpoint": {"every": settings.iterations, "keep": 1},
    }
    if arm.judge is not None:
        options = {
            "weights": str(verifier_of(arm, seed, verifiers)),
            "scores": ["IF", "CC", "GA"],
            "max_tokens": 90,
            "dtype": "bfloat16",
            **arm.asked,
        }
        common["reward"] = {"name": "verifier", "options": options}
        common["eval"]["sessions"] = min(settings.sessions, BELIEVED)
    config: Config = replace_nested(preset_config(arm.preset), common)
    from editr2.policies.rules import check_config

    return check_config(replace_nested(config, arm.overrides))


def start_of(arm: Arm) -> str:
    """The untrained arm that an arm starts from: with an intent or without."""
    return "base-intent" if arm_config(arm, Settings(), 0, "").policy.intent else "base"


def evaluation_sampler(evaluation: EvalConfig, rollout: RolloutConfig) -> str:
    """How an arm is sampled in evaluation: "ode", or the dynamics of its window."""
    ode = evaluation.sampler == "ode" or rollout.window == 0
    return "ode" if ode else rollout.dynamics
