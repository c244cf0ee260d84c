"""`editr2 judge`"""

from __future__ import annotations

from typing import Any

from editr2.cli import settings
from editr2.cli.flags import Arguments
from editr2.config.fields import Bounds
from editr2.errors import ConfigError

EXTRA: list[tuple[str, dict[str, Any]]] = [
    (
        "--outputs",
        {
            "path": True,
            "required": True,
            "action": "append",
            "help": "a folder as `editr2 rollout` writes it; again for siblings of its sessions",
        },
    ),
    (
        "--repeats",
        {
            "type": int,
            "default": 1,
            "bounds": Bounds(at_least=1, at_most=100),
            "help": "ask so often, with other seeds: the judge's own noise",
        },
    ),
    ("--labels", {"path": True, "help": "a file of what people said (docs/rewards.md)"}),
    (
        "--price-per-call",
        {
            "type": float,
            "default": None,
            "bounds": Bounds(at_least=0),
            "help": "in any currency, to say what it costs",
        },
    ),
]

EXAMPLES = [
    (
        "--data examples/shapes --outputs runs/edited --reward.name pixels",
        "what `editr2 rollout` wrote, by a reward that needs no server",
    ),
    (
        "--data examples/shapes --outputs runs/a --outputs runs/b --repeats 3",
        "siblings of each session; and the judge's own noise",
    ),
]

COMMON = ("out", "data.path", "reward.name", "reward.options", "against.name", "against.options")


def command(arguments: Arguments) -> int:
    """try a reward on outputs, before training"""
    from editr2.judge.settings import JudgeConfig, judge_problems

    config, given = settings.schema_config(
        JudgeConfig,
        "editr2 judge",
        "Score outputs of sessions (--data, --outputs) with the reward of --reward.* and say what "
        "the scores are worth; --against.* is another reward to compare with.",
        arguments,
        EXTRA,
        examples=EXAMPLES,
        common=COMMON,
    )
    for problem in judge_problems(config):
        raise ConfigError(problem)
    from editr2.judge.whole import judge

    print("\n".join(judge(config, **given)))
    return 0
