"""What a reward gives back, and what becomes of it: one table. A new case is one row.

Each row is the code of a judge as a user would write it. It is asked by the adapter about sessions
of three turns, and then by `editr2 train`, `eval` and `check`: nothing ends with a traceback,
nothing counts as judged that was not.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from editr2.check import preflight
from editr2.cli.main import main
from editr2.config import Config, CreditConfig, RewardConfig, replace_nested
from editr2.errors import ConfigError
from editr2.policies.rules import check_config
from editr2.rewards.adapt import adapt, score_batch
from editr2.rewards.base import (
    FAILED,
    Calls,
    RewardFailure,
    Score,
    Scores,
    check_failures,
    merge_scores,
    weights_of,
)
from editr2.rewards.load import load_reward
from editr2.rewards.table import REWARDS
from editr2.rl.evaluate import evaluate, first_answer
from editr2.run.identity import differences, named, reward_fingerprint
from editr2.run.processes import open_processes
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn
from editr2.training import train
from editr2.worlds.shapes import make_session

TURNS = 3


@dataclass(frozen=True)
class Values:
    """Every turn has these values, by name; turns whose reward does not apply are None."""

    of_turns: list
    names: tuple = ("judge",)


@dataclass(frozen=True)
class Failed:
    """Every turn failed, of every name, with such a reason after `session ..., turn ...: `."""

    reason: str
    timeout: float | None = None
    only: tuple = ()  # of several names


@dataclass(frozen=True)
class Refused:
    """One line before anything runs."""

    message: str


ALL = [None, None, None]
THREE = "names = ('IF', 'CC', 'GA')"
ROWS = {
    # what is a score
    "numbers": ("def judge(session, images): return [0, 0.5, 1]", Values([0, 0.5, 1])),
    "scores": ("def judge(session, images): return [Score(0.5, 'half')] * 3", Values([0.5] * 3)),
    "dicts": (
        "def judge(session, images): return [{'judge': t / 4} for t in range(3)]",
        Values([0, 0.25, 0.5]),
    ),
    "a tuple": ("def judge(session, images): return (0.5,) * 3", Values([0.5] * 3)),
    "an array": (
        "def judge(session, images): return images.mean((1, 2, 3)) / 255",
        Values([0] * 3),
    ),
    "a tensor": (
        "def judge(session, images): return torch.full((3,), 0.5, requires_grad=True)",
        Values([0.5] * 3),
    ),
    "scalars of NumPy": (
        "def judge(session, images): return [np.float16(0.5), np.int8(1), np.array(0.5)]",
        Values([0.5, 1, 0.5]),
    ),
    "tensors without dimensions": (
        "def judge(session, images): return [torch.tensor(0.5)] * 3",
        Values([0.5] * 3),
    ),
    "booleans": (
        "def judge(session, images): return [True, np.bool_(False), torch.tensor(True)]",
        Values([1, 0, 1]),
    ),
    "rounding": ("def judge(session, images): return [1 + 1e-7, -1e-7, 1.0]", Values([1, 0, 1])),
    "a generator": ("def judge(session, images): yield from [0.5] * 3", Values([0.5] * 3)),
    "one number for the session": ("def judge(session, images): return 0.5", Values([0.5] * 3)),
    "does not apply": (
        "def judge(session, images): return [0.5, Score.not_applicable('nothing left'), 1]",
        Values([0.5, None, 1]),
    ),
    # what is not
    "one score of three": (
        "def judge(session, images): return [0.5]",
        Failed("1 entry came back for 3 turns"),
    ),
    "no scores": (
        "def judge(session, images): return []",
        Failed("0 entries came back for 3 turns"),
    ),
    "too many": (
        "def judge(session, images): return [0.5] * 4",
        Failed("4 entries came back for 3 turns"),
    ),
    "without end": (
        "def judge(session, images):\n    while True: yield 0.5",
        Failed("more than 3 entries came back"),
    ),
    "nothing": ("def judge(session, images): pass", Failed(r"None came back .*no return\?")),
    "None a turn": ("def judge(session, images): return [None] * 3", Failed("None came back")),
    "NaN": ("def judge(session, images): return [float('nan')] * 3", Failed("nan is not finite")),
    "infinity": (
        "def judge(session, images): return [{'judge': np.inf}] * 3",
        Failed("inf is not finite"),
    ),
    "seven": (
        "def judge(session, images): return [7.5] * 3",
        Failed(r"7.5 is outside of \[0, 1\]"),
    ),
    "below 0": (
        "def judge(session, images): return [torch.tensor(-0.1)] * 3",
        Failed("outside of"),
    ),
    "a huge integer": ("def judge(session, images): return [10 ** 400] * 3", Failed("outside of")),
    "a score of seven": (
        "def judge(session, images): return [Score(7.5)] * 3",
        Failed(r"ValueError: Score: 7.5 is outside"),
    ),
    "a score of a string": (
        "def judge(session, images): return [Score('high')] * 3",
        Failed("TypeError: Score: 'high'"),
    ),
    "a score without a reason": (
        "def judge(session, images): return [Score(None)] * 3",
        Failed("needs a reason"),
    ),
    "a score that was changed": (
        "def judge(session, images):\n    score = Score(0.5)\n    vars(score)['value'] = 7.5\n    "
        "return [score] * 3",
        Failed("7.5 is outside"),
    ),
    "a message for the terminal": (
        "def judge(session, images): raise OSError('\\x1b[2Jdown')",
        Failed(r"OSError: \\x1b\[2Jdown"),
    ),
    "a failed score": (
        "def judge(session, images): return [Score(None, 'timed\\nout')] * 3",
        Failed("timed out$"),
    ),
    "a string": (
        "def judge(session, images): return 'yes'",
        Failed(r"'yes' \(accepted: a number in \[0, 1\]"),
    ),
    "strings": ("def judge(session, images): return ['0.5'] * 3", Failed("'0.5' .accepted")),
    "complex": ("def judge(session, images): return [1j] * 3", Failed("1j")),
    "a set": ("def judge(session, images): return {0.1, 0.2, 0.3}", Failed("a set")),
    "rows in an array": (
        "def judge(session, images): return np.ones((3, 1))",
        Failed(r"ndarray of shape \[1\]"),
    ),
    "an image": (
        "def judge(session, images): return images",
        Failed(r"ndarray of shape \[24, 24, 3\]"),
    ),
    "another name": (
        "def judge(session, images): return [{'jugde': 0.5}] * 3",
        Failed("a score named 'jugde' came back"),
    ),
    "a name too many": (
        "def judge(session, images): return [{'judge': 0.5, 'x': 1}] * 3",
        Failed("a score named 'x'"),
    ),
    "an empty row": (
        "def judge(session, images): return [{}] * 3",
        Failed("no score of this name came back"),
    ),
    "a name missing": (
        f"class judge:\n    {THREE}\n    def __call__(self, session, images): return [{{'IF': 1, "
        f"'GA': 0.5}}] * 3",
        Failed(r"no score of this name came back \(there were: IF, GA\)", only=("CC",)),
    ),
    "a number for three names": (
        f"class judge:\n    {THREE}\n    def __call__(self, session, images): return [0.5] * 3",
        Failed(r"0.5 came back for 3 rewards \(accepted: a dict of IF, CC, GA\)"),
    ),
    "an object, one row of three": (
        "class judge:\n    names = ('a',)\n    def __call__(self, session, images): return [{'a': "
        "Score(1.0)}]",
        Failed("1 entry came back for 3 turns"),
    ),
    "an object, no rows": (
        "class judge:\n    names = ('a',)\n    def __call__(self, session, images): return []",
        Failed("0 entries came back for 3 turns"),
    ),
    # what goes wrong inside
    "no connection": (
        "def judge(session, images):\n    raise ConnectionError('refused\\nby the server')",
        Failed(r"ConnectionError: refused by the server \(\S+:\d+\)"),
    ),
    "half a generator": (
        "def judge(session, images):\n    yield 0.5\n    raise KeyError('GA')",
        Failed("KeyError: 'GA'"),
    ),
    "exit": ("def judge(session, images): sys.exit(0)", Failed("SystemExit: 0")),
    "no memory": ("def judge(session, images): raise MemoryError", Failed("MemoryError")),
    "cancelled": (
        "def judge(session, images):\n    import asyncio\n    raise asyncio.CancelledError",
        Failed("CancelledError"),
    ),
    "of the base class": (
        "def judge(session, images): raise BaseException('x')",
        Failed("BaseException: x"),
    ),
    "an unreadable exception": (
        "class Odd(Exception):\n    def __str__(self): raise ValueError\n\ndef judge(session, "
        "images): raise Odd",
        Failed("Odd"),
    ),
    "an odd number": (
        "class Odd(float):\n    def __le__(self, other): raise OSError('no')\n    __ge__ = "
        "__le__\n\n"
        "def judge(session, images): return [Odd(0.5)] * 3",
        Failed("OSError: no"),
    ),
    "hangs": (
        "def judge(session, images): time.sleep(2)",
        Failed(r"no answer within 0.02 s", timeout=0.02),
    ),
    "exits on its thread": (
        "def judge(session, images): sys.exit(0)",
        Failed("SystemExit", timeout=60),
    ),
    # TRL's manner
    "keywords": (
        "def judge(*, sessions, images, instructions):\n"
        "    assert len(sessions) == len(images) == len(instructions) and instructions[0][0] == "
        "'paint'\n"
        "    return [[0.5, None, 1]] * len(images)",
        Values([0.5, None, 1]),
    ),
    "keywords, a number a session": (
        "def judge(images, **rest): return [0.5 for _ in images]",
        Values([0.5] * 3),
    ),
    "keywords, None a session": (
        "def judge(instructions): return [None for _ in instructions]",
        Values(ALL),
    ),
    "all keywords": (
        "def judge(**columns): return [0.5 for _ in columns['sessions']]",
        Values([0.5] * 3),
    ),
    "keywords, a tensor": (
        "def judge(sessions, images): return torch.full((len(images),), 0.5)",
        Values([0.5] * 3),
    ),
    "keywords, nothing": (
        "def judge(sessions, images): pass",
        Failed(r"None came back for \d+ session"),
    ),
    "keywords, too few": (
        "def judge(sessions, images): return [0.5] * (len(images) - 1)",
        Failed("came back for . session"),
    ),
    "keywords, turns missing": (
        "def judge(sessions, images): return [[0.5]] * len(images)",
        Failed("1 entry came back for 3 turns"),
    ),
    "keywords, raises": (
        "def judge(sessions, images): raise OSError('down')",
        Failed("OSError: down"),
    ),
    # objects
    "an object": (
        "class Judge:\n    names = ('a', 'b')\n"
        "    def __call__(self, session, images): return [{'a': 0.5, 'b': 1}] * 3\njudge = Judge()",
        Values([(0.5, 1)] * 3, ("a", "b")),
    ),
    "an object with judge": (
        "class Judge:\n    names = ['a']\n"
        "    def judge(self, items): return [[{'a': 0.5}] * len(i.images) for i in items]\njudge "
        "= Judge()",
        Values([0.5] * 3, ("a",)),
    ),
    "judge, None": (
        "class judge:\n    names = 'a'\n    def judge(self, items): return [[None] * 3 for _ in "
        "items]",
        Failed("None came back"),
    ),
    "without names": (
        "class Judge:\n    def __call__(self, session, images): return 0.5\njudge = Judge()",
        Values([0.5] * 3, ("Judge",)),
    ),
    "a module of torch": (
        "class judge(torch.nn.Module):\n    names = ('net',)\n    def forward(self, session, "
        "images): return [0.5] * 3",
        Values([0.5] * 3, ("net",)),
    ),
    "a factory": (
        "def judge(scale=0.5): return lambda session, images: scale",
        Values([0.5] * 3, ("score",)),
    ),
    "a function with names": (
        "def judge(session, images): return [{'a': 0.5, 'b': 1}] * 3\njudge.names = ('a', 'b')",
        Values([(0.5, 1)] * 3, ("a", "b")),
    ),
    "called like the sum": (
        "def reward(session, images): return 0.5\njudge = reward",
        Values([0.5] * 3, ("score",)),
    ),
    # what is refused
    "a constructor that raises": (
        "class judge:\n    names = ('a',)\n    def __init__(self): raise RuntimeError('no "
        "key\\nin JUDGE_KEY')",
        Refused(r"judge\(\) raised RuntimeError: no key in JUDGE_KEY"),
    ),
    "a constructor that exits": (
        "class judge:\n    def __init__(self): sys.exit(0)",
        Refused("SystemExit: 0"),
    ),
    "a constructor that asks": (
        "class judge:\n    def __init__(self, address): pass",
        Refused(r"judge\(\) raised TypeError.*address"),
    ),
    "an import that raises": (
        "import no_such_module_of_ours",
        Refused("importing .* ModuleNotFoundError: No module named"),
    ),
    "an import that exits": ("sys.exit(0)", Refused("importing .* raised SystemExit: 0")),
    "an import that is no Python": ("def judge(:", Refused("importing .* SyntaxError")),
    "no such name": (
        "def jugde(session, images): return 0.5",
        Refused("has no 'judge'; did you mean jugde"),
    ),
    "a number": ("judge = 3", Refused(r": 3 \(accepted: a function of \(session, images\)")),
    "a class that cannot be called": (
        "class judge: names = ('a',)",
        Refused("accepted: a function of"),
    ),
    "three parameters": (
        "def judge(session, images, prompt): return 0.5",
        Refused(r"takes \(session, images, prompt\)"),
    ),
    "columns of TRL's": (
        "def judge(prompts, completions, **rest): return 0.5",
        Refused(r"takes \(prompts, completions"),
    ),
    "async": ("async def judge(session, images): return 0.5", Refused("judge is async")),
    "no names": (
        "class judge:\n    names = ()\n    def __call__(self, session, images): return 0.5",
        Refused("names: ()"),
    ),
    "names twice": (
        "class judge:\n    names = ('IF', 'if')\n    def __call__(self, session, images): return "
        "0.5",
        Refused("names: 'IF' in IF, if"),
    ),
    "a name of ours": (
        "class judge:\n    names = ('Reward',)\n    def __call__(self, session, images): return "
        "0.5",
        Refused("names: 'Reward' .*metrics"),
    ),
    "names that raise": (
        "class judge:\n    @property\n    def names(self): raise OSError('no file')\n"
        "    def __call__(self, session, images): return 0.5",
        Refused("OSError: no file"),
    ),
}
PRELUDE = "import sys, time\nimport numpy as np\nimport torch\nfrom editr2 import Score\n"


def session(name: str, turns: int = TURNS) -> Session:
    return Session(
        name, np.zeros((24, 24, 3), np.uint8), tuple(Turn("paint") for _ in range(turns))
    )


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a row's judge as a module of the working folder and gives what `reward.function` calls
    it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = []

    def write(code: str) -> str:
        made.append(f"judge_of_a_test_{len(made)}")
        (tmp_path / f"{made[-1]}.py").write_text(PRELUDE + code + "\n")
        return f"{made[-1]}:judge"

    yield write
    for name in made:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ROWS)
def test_what_comes_back_never_decides_what_was_expected(name, written):
    code, outcome = ROWS[name]
    config = RewardConfig(written(code), getattr(outcome, "timeout", None))
    if isinstance(outcome, Refused):
        with pytest.raises(
            ConfigError, match=rf"reward\.function: '{config.function}'.*{outcome.message}"
        ) as error:
            load_reward(config)
        assert "\n" not in str(error.value)
        return
    reward = load_reward(config)
    sessions = [session("s0"), session("s1")]
    scores = score_batch(
        reward, [(s, np.zeros((TURNS, 24, 24, 3), np.uint8)) for s in sessions], TURNS + 1
    )
    assert torch.equal(scores.expected, torch.tensor([[True, True, True, False]] * 2))
    assert scores.failed == len(scores.reasons) == (6 if isinstance(outcome, Failed) else 0)
    if isinstance(outcome, Failed):
        assert not scores.present.any() and not scores.values.any() and scores.not_applicable == 0
        who = ", ".join(outcome.only or scores.names)
        assert re.search(
            rf"^rewards? {who}, session s1, turn 2: .*{outcome.reason}", scores.reasons[1, 1]
        )
        assert "\n" not in scores.reasons[1, 1]
        with pytest.raises(
            RewardFailure,
            match=rf"reward {(outcome.only or scores.names)[0]}: 6 of 6 turns .*session s0",
        ):
            check_failures(scores, 0.5)
        return
    assert scores.names == outcome.names
    missing = torch.tensor([value is None for value in outcome.of_turns])  # for every reward
    assert torch.equal(scores.present[0, :TURNS], ~missing) and scores.not_applicable == 2 * int(
        missing.sum()
    )
    assert torch.equal(scores.scored.any(-1), scores.present) and scores.unfailed[:, :TURNS].all()
    expected = torch.tensor([value or 0 for value in outcome.of_turns]).view(TURNS, -1)
    torch.testing.assert_close(scores.values[1, :TURNS], expected.float(), rtol=0, atol=0)
    check_failures(scores, 0.0)


TRACES = {
    "writes into the images": "def judge(session, images):\n    images[:] = 9\n    return 0.5",
    "writes into the "
    "source": "def judge(session, images):\n    session.image[:] = 9\n    return 0.5",
    "writes into the source, all at "
    "once": "def judge(sessions, images):\n    for s in sessions: s.image.fill(9)\n"
    "    return [0.5 for s in sessions]",
    "takes from meta": "def judge(session, images):\n    session.meta['a'].clear()\n    "
    "session.turns[0].meta.clear()\n"
    "    return 0.5",
    "no "
    "gradients": "def judge(session, images):\n    torch.set_grad_enabled(False)\n    return 0.5",
    "no gradients, from its import "
    "on": "torch.set_grad_enabled(False)\ndef judge(session, images): return 0.5",
    "no gradients, from its constructor "
    "on": "class judge:\n    def __init__(self): torch.set_grad_enabled(False)\n"
    "    def __call__(self, session, images): return 0.5",
    "another "
    "dtype": "def judge(session, images):\n    torch.set_default_dtype(torch.float64)\n    return "
    "0.5",
    "another "
    "device": "def judge(session, images):\n    torch.set_default_device('meta')\n    return 0.5",
    "another "
    "folder": "import os\nos.chdir('/')\ndef judge(session, images):\n    os.chdir('/')\n    "
    "return 0.5",
    "and "
    "raises": "def judge(session, images):\n    torch.set_grad_enabled(False)\n    raise OSError",
}
"""What judges do to what they are given and to the process, on their way to a score."""


@pytest.mark.parametrize("name", TRACES)
def test_a_judge_leaves_nothing_behind(name, written, tmp_path):
    image, images, meta = (
        np.ones((24, 24, 3), np.uint8),
        np.ones((1, 24, 24, 3), np.uint8),
        {"a": [1]},
    )
    given = Session("a", image, (Turn("paint", meta={"b": 1}),), meta=meta)
    try:
        reward = load_reward(RewardConfig(written(TRACES[name])))
        scores = score_batch(reward, [(given, images.copy())], 1)
        assert scores.failed == (name == "and raises")
        assert (image == 1).all() and meta == {"a": [1]} and given.turns[0].meta == {"b": 1}
        assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
        assert torch.get_default_device().type == "cpu" and os.getcwd() == str(tmp_path)
    finally:
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def run_of(
    tmp_path, function: str | None = None, timeout: float | None = None, limit: float = 0.5
) -> Config:
    values = {
        "out": str(tmp_path / "run"),
        "reward": {"function": function, "timeout": timeout},
        "rollout": {"sessions": 2, "siblings": 2, "turns": 2, "window": 1, "groups_per_batch": 2},
        "policy": {"intent": False},
        "train": {"iterations": 1, "ema": None, "max_failed_scores": limit},
        "eval": {"sessions": 2, "strips": 1},
    }
    return replace_nested(Config(), values)


ALWAYS = [name for name, (_, outcome) in ROWS.items() if isinstance(outcome, Failed)]


@pytest.mark.parametrize("name", ALWAYS)
def test_a_judge_that_always_fails_stops_the_run_before_anything_is_edited(
    name, written, tmp_path, monkeypatch
):
    """As `editr2 eval` and the evaluation before training ask it."""
    monkeypatch.setattr(
        "editr2.rl.evaluate.rollout_chunk",
        lambda *_, **__: pytest.fail("edited for a judge that is down"),
    )
    code, outcome = ROWS[name]
    config = run_of(tmp_path, written(code), outcome.timeout)
    sessions, pattern = (
        [session("a", 2)] * 9,
        "before any was edited: no score for any turn: reward.*session a, turn 1",
    )
    with pytest.raises(RewardFailure, match=pattern) as error:
        evaluate(None, load_reward(config.reward), sessions, None, config, open_processes())
    assert "\n" not in str(error.value)


REFUSED = [name for name, (_, outcome) in ROWS.items() if isinstance(outcome, Refused)]
FEW = [
    "one score of three",
    "nothing",
    "no connection",
    "exit",
    "a constructor that raises",
    "an import that exits",
]


@pytest.mark.parametrize(
    "command, name",
    [
        *[("train", name) for name in REFUSED],
        *[("eval", name) for name in REFUSED],
        *[
            (command, name)
            for command in ("train", "eval", "check")
            for name in FEW
            if name not in REFUSED
        ],
        *[("check", name) for name in FEW if name in REFUSED],
        *[
            pytest.param("check", name, marks=pytest.mark.exhaustive)
            for name in ROWS
            if name not in FEW and not isinstance(ROWS[name][1], Values)
        ],
    ],
)
def test_every_command_says_it_in_one_line(command, name, written, capsys, tmp_path):
    code, outcome = ROWS[name]
    limit = getattr(outcome, "timeout", None)
    arguments = [
        "--reward.function",
        written(code),
        *(["--reward.timeout", str(limit)] if limit else []),
    ]
    arguments += ["--eval.sessions", "2", "--rollout.turns", "2", "--out", str(tmp_path / "run")]
    assert main([command, *arguments]) == 2
    told = capsys.readouterr()
    start = "" if command == "check" else "error: "
    (line,) = [  # others say what the command is about to do, and that the filter is off
        line
        for line in told.err.splitlines()
        if line.startswith(start) and not line.startswith("credit: ")
    ]
    whose = (
        "reward.function: "
        if command == "check" or name in REFUSED
        else "asked about source images"
    )
    assert line.startswith(start + whose)
    assert not (tmp_path / "run" / "checkpoints").exists()


SOMETIMES = """
class judge:
    names = ("IF", "CC")
    asked = 0
    def __call__(self, session, images):
        self.asked += 1
        if self.asked == 1:
            return [{"IF": 1, "CC": 0.5} for _ in images]  # asked about the source image
        if self.asked % 2:
            none = Score.not_applicable("nothing to do")
            return [{"IF": none, "CC": image.mean() / 255} for image in images]
        return [{"IF": 1, "CC": 0.5}]
"""


@pytest.mark.parametrize("shown", ["failed", "does not apply"])  # by the strips
@pytest.mark.parametrize("rest", ["image.mean() / 255", "Score.not_applicable()"])
def test_what_fails_is_masked_and_what_does_not_apply_leaves_the_turn_to_the_rest(
    written, tmp_path, tiny_unified, capsys, rest, shown
):
    """Every other call judges one turn of two, of which nothing trains. Of the others, IF does not
    apply: they train by CC, if that does."""
    before = {name: p.clone() for name, p in tiny_unified.module.named_parameters()}
    judge = SOMETIMES.replace("image.mean() / 255", rest)
    if shown == "does not apply":
        judge = judge.replace("if self.asked % 2:", "if self.asked % 2 == 0:")
    config = run_of(tmp_path, written(judge), limit=0.8)
    # One sibling of two has scores: its turns are compared with each other.
    credit = {"weights": {"IF": 0.5, "CC": 0.5}, "baseline": "session"}
    config = replace_nested(config, {"credit": credit})
    run = train(config, policy=tiny_unified)
    rows = read_metrics(run / "metrics.jsonl")[0]
    (trained,) = [row for row in rows if row["event"] == "train"]
    trains = rest != "Score.not_applicable()"
    assert (trained["failed_scores"], trained["not_applicable"]) == (4, 4)
    assert (trained["reward"] is not None) == (trained["advantage_abs"] > 0) == trains
    # All the weight is CC's; nothing of IF is a number, which is nothing to warn of.
    assert trained["reward_turn"] == trained["cc_turn"] and trained["if_turn"] == [None, None]
    assert not [name for name in trained.get("non_finite", ()) if "_turn" in name]
    assert re.search(
        "rewards IF, CC, session .*, turn 1: 1 entry came back for 2 turns",
        trained["first_failure"],
    )
    first, second = [row for row in rows if row["event"] == "eval"]
    assert (first["failed_scores"], first["not_applicable"]) == (2, 2)
    # Where nothing trained, only the calls that failed are made again.
    assert not trains or (second["failed_scores"], second["not_applicable"]) == (2, 2)
    same = [torch.equal(p, before[name]) for name, p in tiny_unified.module.named_parameters()]
    assert all(same) != trains
    strips = json.loads((run / "strips" / "before.json").read_text())["sessions"]
    for turn in (turn for strip in strips for turn in strip["turns"]):
        silent = turn.get("does_not_apply")
        assert silent == (None if shown == "failed" else ["IF"] if trains else ["IF", "CC"])
        assert (turn["scores"]["CC"] is not None) == bool(silent and trains)
        assert turn["scores"]["IF"] is None and turn["reward"] == turn["scores"]["CC"]
        assert turn.get("why") == ({"IF": "nothing to do"} if silent else None)
        assert turn["masked"] == (turn["reward"] is None) == (turn["reason"] is not None)
        assert silent is None or trains or turn["reason"] == "no reward with a weight applies"
    page = (run / "report.html").read_text()
    if shown == "does not apply":
        assert "<dt>IF</dt><dd>does not apply</dd>" in page
        assert '<dt>IF</dt><dd dir="auto">nothing to do</dd>' in page
        assert ("<dt>CC</dt><dd>does not apply</dd>" in page) == (not trains)
    start = next(row for row in rows if row["event"] == "start")
    assert start["rewards"] == {"IF": 0.5, "CC": 0.5}
    assert "4 scores failed  a reward does not apply to 4 turns" in capsys.readouterr().err


def test_one_reward_needs_no_weights_and_the_filter_says_that_it_is_off(
    written, tmp_path, tiny_unified, capsys, monkeypatch
):
    config = run_of(
        tmp_path,
        written("def bright(session, images): return images.mean((1, 2, 3)) / 255\njudge = bright"),
    )
    run = train(config, policy=tiny_unified)
    rows = {row["event"]: row for row in read_metrics(run / "metrics.jsonl")[0]}
    assert (
        rows["start"]["rewards"] == {"bright": 1.0}
        and rows["train"]["bright_turn"] == rows["train"]["reward_turn"]
    )
    assert rows["train"]["filtered_turns"] == 0 and rows["train"]["advantage_abs"] > 0
    assert "credit: no reward is named IF (the rewards: bright)" in capsys.readouterr().err
    monkeypatch.setattr(
        "editr2.check.estimate.estimate", lambda *_: SimpleNamespace(peak=0)
    )  # it takes seconds
    monkeypatch.setattr("editr2.check.text.render", lambda *_: [])
    assert "credit: no reward is named IF (the rewards: bright)" in "\n".join(
        preflight(config).lines
    )


@pytest.mark.parametrize(
    "names, weights, expected",
    [
        (("IF", "CC", "GA"), CreditConfig().weights, [0.3, 0.3, 0.4]),
        (("GA", "IF", "CC"), CreditConfig().weights, [0.4, 0.3, 0.3]),
        (("bright",), CreditConfig().weights, [1]),
        (("IF",), CreditConfig().weights, [1]),
        (
            ("bright",),
            {"IF": 0.5, "CC": 0.5, "GA": 0.0},
            [1],
        ),  # as the presets of MT-EditFlow have them
        (("IF", "CC"), {"IF": 0.5, "CC": 0.5, "GA": 0.0}, [0.5, 0.5]),
        (("bright",), {"bright": 0.5}, [0.5]),
        (("a", "b"), {"a": 2.0, "b": 0.0}, [2, 0]),
        (("bright",), {"brigth": 1.0}, None),
        (("a", "b"), CreditConfig().weights, None),
        (("a", "b"), {"a": 1.0}, None),
    ],
)
def test_weights(names, weights, expected):
    if expected is not None:
        assert (
            list(weights_of(names, weights)) == list(names)
            and list(weights_of(names, weights).values()) == expected
        )
        return
    defaults = ", the defaults" if weights == CreditConfig().weights else ""
    with pytest.raises(
        ConfigError, match=rf"credit\.weights: \[.*\]{defaults} \(.*such as \{{\"{names[0]}\": "
    ):
        weights_of(names, weights)


def scores_of(*rows) -> Scores:
    """Of one-turn sessions and the rewards IF and GA; a letter a score: 1, n(ot applicable) or
    f(ailed)."""
    states = {"1": Score(1), "n": Score.not_applicable(), "f": Score(None, "timed out")}
    said = [
        {name: states[letter] for name, letter in zip(("IF", "GA"), row, strict=True)}
        for row in rows
    ]

    class Said:
        names = ("IF", "GA")

        def judge(self, items):
            return [[row] for row in said]

    items = [(session(f"s{i}", 1), np.zeros((1, 24, 24, 3), np.uint8)) for i in range(len(rows))]
    return score_batch(Said(), items, 1)


@pytest.mark.parametrize(
    "rows, failed, stopped",
    [
        (
            ["11", "1f", "1f", "1f"],
            3,
            r"reward GA: 3 of 4 turns .*max_failed_scores: 0.5.*reward GA, session s1, turn 1: "
            r"timed",
        ),
        (["11", "11", "1f", "f1"], 2, None),
        (
            ["1f", "f1", "1f", "f1"],
            4,
            None,
        ),  # no turn is whole, but each reward judged half of them
        (["nn", "nn", "nn"], 0, None),
        (["n1", "nf", "nf"], 2, "reward GA: 2 of 3 turns"),
        (["nf", "1n", "1n"], 1, None),  # one of one says little where there were three turns
        (["1n"] * 20 + ["1f"] * 9, 9, "reward GA: 9 of 9 turns"),
        (["ff"], 1, "reward IF: 1 of 1 turns .*rewards IF, GA, session s0"),
    ],
)
def test_the_breaker_counts_each_reward_over_the_turns_it_applies_to(rows, failed, stopped):
    scores = scores_of(*rows)
    assert scores.failed == failed
    merged = merge_scores([scores, scores])
    assert merged.failed == 2 * failed and merged.not_applicable == 2 * scores.not_applicable
    assert torch.equal(merged.of_state(FAILED)[len(rows) :], scores.of_state(FAILED))
    if stopped is None:
        return check_failures(merged, 0.5)
    with pytest.raises(RewardFailure, match=stopped):
        check_failures(scores, 0.5)
    check_failures(scores, 1.0)  # never stops


def test_a_reward_that_answered_is_not_asked_about_source_images_again():
    asked = []

    def judge(session, images):
        asked.append(session.id)
        random.random(), np.random.rand(), torch.rand(1)
        return [1] * len(images) if len(asked) >= 3 else []

    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    reward, sessions = adapt(judge), [session(f"s{i}") for i in range(9)]
    first_answer(reward, sessions, 1.0, open_processes())
    assert not asked  # 1 never stops, so there is nothing to find out
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    first_answer(reward, sessions, 0.5, open_processes())
    first_answer(reward, sessions, 0.5, open_processes())
    assert asked == ["s0", "s1", "s2"] and drawn() == expected


@pytest.mark.parametrize("timeout", [None, 60])
def test_ctrl_c_in_a_judge_stops_the_run(timeout):
    def judge(session, images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_batch(
            adapt(judge, calls=Calls(timeout=timeout)),
            [(session("a"), np.zeros((TURNS, 24, 24, 3)))],
            TURNS,
        )


def test_a_call_that_hangs_is_left_behind_and_the_next_has_a_thread_of_its_own():
    done, threads = threading.Event(), []

    def judge(session, images):
        threads.append(threading.get_ident())
        if session.id == "slow":
            done.wait(20)
        return [1] * TURNS

    items = [(session(name), np.zeros((TURNS, 24, 24, 3))) for name in ("a", "slow", "b", "c")]
    started = time.perf_counter()
    scores = score_batch(adapt(judge, calls=Calls(timeout=0.2)), items, TURNS)
    assert time.perf_counter() - started < 10
    done.set()
    assert scores.present.all(1).tolist() == [True, False, True, True]
    assert (
        threads[0] == threads[1] != threads[2] == threads[3]
        and threading.get_ident() not in threads
    )


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_timeout_that_is_none_is_refused(timeout, tmp_path):
    with pytest.raises(
        ConfigError, match=r"reward\.timeout: .*accepted: seconds, above 0, at most 86400 or none"
    ):
        train(run_of(tmp_path, timeout=timeout))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"value": 0.5, "applies": False}, "does not apply"),
        ({"value": None, "reason": " "}, "needs a reason"),
        ({"value": None, "reason": ConnectionError()}, "a ConnectionError .accepted: a string"),
        ({"value": [0.5]}, "a list of 1 .accepted: a number"),
        ({"value": 0.5, "votes": 0.5}, "votes: 0.5 .accepted: a tuple"),
        ({"value": 0.5, "votes": [0.5, 2]}, "2 is outside of .0, 1."),
    ],
)
def test_a_score_is_one_of_three(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Score(**arguments)


def test_what_is_said_of_a_score_goes_with_it():
    """Failures stand in `reasons`; a score without words has none."""
    said = [
        {"IF": Score(0.5, "half\n done", votes=(0, 1)), "GA": Score.not_applicable("nothing left")},
        {"IF": Score(None, "timed out"), "GA": Score(1.0)},
        {"IF": Score(1.0, "x" * 5000), "GA": Score.not_applicable()},
    ]

    class Said:
        names = ("IF", "GA")

        def judge(self, items):
            return [said for _ in items]

    scores = score_batch(Said(), [(session("a"), np.zeros((3, 24, 24, 3), np.uint8))] * 2, 3)
    whys = {(0, 0): "half done", (0, 1): "nothing left", (2, 0): "x" * 997 + "..."}
    expected = {(i, t, k): why for i in range(2) for (t, k), why in whys.items()}
    assert scores.whys == expected and set(scores.reasons) == {(0, 1), (1, 1)}
    moved = {(i + 2, t, k): why for (i, t, k), why in expected.items()}
    assert merge_scores([scores, scores]).whys == expected | moved


# A reward by its name in the table: one file and one line of `REWARDS`.
DIM = """
class Dim:
    names = ("dim",)

    def __call__(self, session, images):
        return [1 - float(image.mean() / 255) for image in images]
"""


def test_a_reward_is_a_file_and_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "dim_of_a_test.py").write_text(DIM)
    monkeypatch.setitem(REWARDS, "dim", "dim_of_a_test:Dim")
    assert check_config(Config(reward=RewardConfig(name="dim"))).reward.name == "dim"
    small = ["--eval.sessions", "2", "--rollout.turns", "1", "--credit.weights", '{"dim": 1}']
    assert main(["eval", "--reward.name", "dim", *small]) == 0
    names, numbers = capsys.readouterr().out.splitlines()[1:3]
    assert names.split() == ["turn", "reward", "dim"]
    assert 0 < float(numbers.split()[1]) < 1
    named = ", ".join(REWARDS)
    assert named.startswith("world, pixels, ") and named.endswith(", dim")
    with pytest.raises(ConfigError, match=rf"'dimm' \(accepted: {named}, package\."):
        check_config(Config(reward=RewardConfig(name="dimm")))


def test_check_names_the_setting_that_named_the_judge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "down_of_a_test.py").write_text("def judge(session, images):\n    raise OSError\n")
    for key in ("reward.name", "reward.function"):
        assert main(["check", f"--{key}", "down_of_a_test:judge"]) == 2
        assert capsys.readouterr().err.startswith(f"{key}: no score for session ")


def test_every_reward_of_the_table_judges_the_world():
    """Those that ask nobody; tests/test_named_rewards.py has the others."""
    given = make_session(0, 0)
    images = np.stack([given.image] * len(given.turns))
    for name in ("world", "pixels", "brightness"):
        reward = load_reward(RewardConfig(name=name))
        scores = score_batch(reward, [(given, images)], len(images))
        assert scores.failed == 0 and scores.present.all() and scores.names == reward.names


@pytest.mark.parametrize(
    "given, pattern",
    [
        (
            {"name": "wrld"},
            r"^reward\.name: 'wrld' \(accepted: world, pixels, brightness, edit-r2.*, package\.mod",
        ),
        ({"name": "nowhere:J"}, r"^reward\.name: 'nowhere:J': importing nowhere raised ModuleN"),
        (
            {"name": "editr2.rewards.world:WorldRewad"},
            r"^reward\.name: .*has no 'WorldRewad'; did you mean WorldReward\?$",
        ),
        ({"name": "fractions:Fraction"}, r"^reward\.name: 'fractions:Fraction': Fraction\(\) gave"),
        (
            {"name": "world", "function": "my:judge"},
            r"^reward\.name: 'world' \(accepted with reward\.function 'my:judge': none; each of",
        ),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(given, pattern):
    """As `check_config` or, where that cannot know it, as what loads it says it."""
    with pytest.raises(ConfigError, match=pattern) as error:
        load_reward(check_config(Config(reward=RewardConfig(**given))).reward)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        load_reward(RewardConfig(**given))


def test_the_same_reward_under_another_name_is_the_same():
    """A run that named no reward goes on under `reward.name: world`, but not under another."""
    unnamed, by_name, by_function, other = (
        RewardConfig(),
        RewardConfig(name="world"),
        RewardConfig(function="editr2.rewards.world:WorldReward"),
        RewardConfig(name="brightness"),
    )

    def depends(reward: RewardConfig) -> dict[str, Any]:
        fingerprint = reward_fingerprint(load_reward(reward))
        return named(Config(reward=reward), {"reward": fingerprint})

    saved = depends(unnamed)
    assert differences(saved, depends(by_name)) == {}
    assert differences(saved, depends(by_function)) == {}
    assert list(differences(saved, depends(other))) == ["reward"]
