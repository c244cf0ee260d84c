"""The reward `verifier` in the run's own process, and what the world's sessions carry for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from editr2.config import Config, EvalConfig, RewardConfig, RewardUse
from editr2.errors import ConfigError
from editr2.rewards import verifier
from editr2.rewards.ask import Asker
from editr2.rewards.base import Item
from editr2.rewards.load import load_eval_reward, load_reward
from editr2.rewards.record import NAME, Record
from editr2.rewards.verifier import Verifier, VerifierOptions
from editr2.rl.judging import pool_of
from editr2.run.identity import identify, sessions_fingerprint
from editr2.sessions import Session, Turn
from editr2.sessions.source import open_sessions
from editr2.verifier.model import Reader
from editr2.worlds import shapes

ROOT = Path(__file__).parent.parent
MOST = 24


@pytest.fixture(scope="module")
def folder(beside: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verifier of the world's words with random weights."""
    path: Path = beside("tiny_verifier").write_world(tmp_path_factory.mktemp("reward") / "judge")
    return path


@pytest.fixture(scope="module")
def drawn() -> list[Session]:
    """Sessions of the world as a run draws them for this reward."""
    c = Config()
    source = open_sessions(c.data, c.rollout, c.eval, seed=5, size=None, wants=("principles",))
    return [source[i] for i in range(4)]


def items(sessions: list[Session], siblings: int = 2) -> list[Item]:
    """Rollouts whose outputs are the source with some noise."""
    made = []
    for session in sessions:
        for _ in range(siblings):
            noise = np.random.default_rng(len(made)).integers(
                0, 40, (len(session.turns), 24, 24, 3)
            )
            images = np.clip(session.image + noise, 0, 255).astype(np.uint8)
            made.append(Item(session, images, rollout=len(made), seed=1000 + len(made)))
    return made


def reward(folder: Path, record: Record | None = None, **options: Any) -> Verifier:
    chosen = {"weights": str(folder), "max_tokens": MOST, "rows": 8} | options
    return Verifier(VerifierOptions(**chosen), record=record)


def values(said: Any) -> list[Any]:
    return [[(one["score"].value, one["score"].reason) for one in rows] for rows in said]


@pytest.fixture
def batches() -> Iterator[list[dict[int, tuple[float, ...]]]]:
    """Of every batch that was sampled, the log-probs by seed."""
    found: list[Any] = []
    real = Reader.sample

    def sample(self: Reader, prompts: Any, seeds: Any, **how: Any) -> Any:
        written = real(self, prompts, seeds, **how)
        found.append({k: (one.ids, one.log_prob) for k, one in zip(seeds, written, strict=True)})
        found[-1]["shape"] = (len(prompts), how["length"])
        return written

    with mock.patch.object(Reader, "sample", sample):
        yield found


def test_who_else_is_judged_changes_no_bit(
    folder: Path, drawn: list[Session], batches: list[Any]
) -> None:
    whole = items(drawn)
    together = values(reward(folder).judge(whole))
    shapes_ = {one.pop("shape") for one in batches}
    assert shapes_ == {(8, 64)} and len(batches) == 3  # 4 sessions x 2 siblings x 3 turns
    bits = {seed: row for one in batches for seed, row in one.items()}
    assert len({row for row in bits.values()}) > 12
    batches.clear()
    judge = reward(folder)
    apart = [values(judge.judge(some))[0] for some in ([item] for item in reversed(whole))]
    assert apart[::-1] == together
    for one in batches:
        assert one.pop("shape") == (8, 64)
        assert all(bits[seed] == row for seed, row in one.items())
    read = [value for rows in together for value, _ in rows]
    assert None in read and len(set(read)) > 4  # some cannot be read, and none is made up


def test_it_is_asked_what_a_server_is_asked(
    folder: Path, drawn: list[Session], beside: Any
) -> None:
    fake = beside("drawn_judge").FakeClient("nothing")
    options = VerifierOptions(url="http://nowhere", prompts=str(folder), traces=2)
    Verifier(options, asker=Asker(fake, options.asking)).judge(items(drawn[:1], 1))
    asked: list[Any] = []
    real = Reader.question

    def question(self: Reader, images: Any, text: str, of: str) -> Any:
        asked.append((text, [image.tobytes() for image in images]))
        return real(self, images, text, of)

    with mock.patch.object(Reader, "question", question):
        reward(folder, traces=2).judge(items(drawn[:1], 1))
    assert len(asked) == 3 and asked == [
        (one["text"], [image.tobytes() for image in one["images"]]) for one in fake.asked
    ]
    assert asked[0][0].startswith(drawn[0].turns[0].instruction + "\n1. ")


def test_answers_are_on_the_record(folder: Path, drawn: list[Session], tmp_path: Path) -> None:
    some = items(drawn[:2])
    said = values(reward(folder, Record(tmp_path), traces=2).judge(some))
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert len(rows) == 24 and rows[0].items() >= {"name": "score", "turn": 1, "vote": 1}.items()
    assert {row["rollout"] for row in rows} == {0, 1, 2, 3}
    with mock.patch("editr2.verifier.local.load_reader", side_effect=AssertionError):
        again = reward(folder, Record(tmp_path), traces=2)
        assert values(again.judge(some)) == said
    # A run that was killed between two lines of a batch samples what is missing, and that alone.
    torn = tmp_path / "torn"
    torn.mkdir()
    lines = (tmp_path / NAME).read_text().splitlines(keepends=True)
    (torn / NAME).write_text("".join(lines[:13]))
    assert values(reward(folder, Record(torn), traces=2).judge(some)) == said
    assert sorted(map(_answer, (torn / NAME).read_text().splitlines())) == sorted(
        map(_answer, lines)
    )
    # Other weights, another dtype and other words are other questions.
    other = reward(folder, Record(tmp_path), traces=2, dtype="bfloat16")
    other.judge(some[:1])
    assert len((tmp_path / NAME).read_text().splitlines()) > 24


def _answer(line: str) -> str:
    row = json.loads(line)
    return f"{row['key']} {row['answer']}"


@pytest.mark.parametrize(
    ("breaks", "why"),
    [
        ({"instruction": "paint the unicorn"}, "'unicorn': unknown to the verifier's vocabulary"),
        ({"max_tokens": 16, "likely": False}, "cut off"),
        (
            {"raises": torch.OutOfMemoryError("no room")},
            "sampling raised OutOfMemoryError: no room",
        ),
        ({"meta": {"principles": []}}, "principles: a list of 0"),
        ({"meta": {}, "principles": "given"}, "no meta.principles"),
        ({"meta": {}}, "principles: the question: "),  # its words are not the world's
    ],
)
def test_what_failed_is_no_number(
    folder: Path, drawn: list[Session], breaks: dict[str, Any], why: str
) -> None:
    turn = drawn[0].turns[0]
    turn = Turn(breaks.get("instruction", turn.instruction), meta=breaks.get("meta", turn.meta))
    session = replace(drawn[0], turns=(turn, *drawn[0].turns[1:]))
    options = {key: breaks[key] for key in ("max_tokens", "principles") if key in breaks}
    judge = reward(folder, **options)
    judge.probe()
    if "likely" in breaks:  # no end mark is ever drawn
        head = judge.local.load().module.get_output_embeddings().weight
        head.data[2, 0] = -9
    raising = breaks.get("raises")
    with mock.patch.object(Reader, "sample", side_effect=raising) if raising else mock.MagicMock():
        ((row, *_),) = judge.judge(items([session], 1))
    assert row["score"].failed and why in row["score"].reason


def test_a_verifier_of_its_own_dtype_and_place(folder: Path, drawn: list[Session]) -> None:
    judge = reward(folder, dtype="bfloat16", traces=3)
    judge.take()
    said = values(judge.judge(items(drawn[:1], 1)))
    judge.lend()
    weights = list(judge.local.load().module.parameters())
    assert {p.dtype for p in weights} == {torch.bfloat16} and not any(
        p.requires_grad for p in weights
    )
    assert any(value is not None for row in said for value, _ in row)
    assert judge.facts["votes"] == "3 at temperature 1" and "in process" in judge.facts["judge"]
    greedy = reward(folder, temperature=0.0, traces=3)
    assert greedy.facts["votes"] == "1 at temperature 0" and greedy.judge(items(drawn[:1], 1))
    assert "with judge replaced" in judge.facts["prompts"] and not judge.calls_a_turn
    assert judge.version != reward(folder).version


def test_loading_and_sampling_draw_nothing_of_the_run(folder: Path, drawn: list[Session]) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    reward(folder).judge(items(drawn[:1], 1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_rollouts_is_one_call(folder: Path, drawn: list[Session]) -> None:
    options = {"weights": str(folder), "max_tokens": MOST, "rows": 8}
    real, calls = Verifier.judge, []

    def judge(self: Verifier, asked: Any) -> Any:
        calls.append(len(asked))
        return real(self, asked)

    with mock.patch.object(Verifier, "judge", judge):
        pool = pool_of(load_reward(RewardConfig(name="verifier", options=options)))
    judging = pool.judging(purpose="train")
    assert not judging.by_turn
    judging.rollouts(items(drawn[:2]))
    judging.rollouts([one._replace(rollout=one.rollout + 4) for one in items(drawn[2:])])
    assert judging.scores(3).values.shape == (8, 3, 1) and calls == [8]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "{folder}", "url": "http://x"}, "reward.options.weights: beside a url"),
        ({"weights": "./nowhere"}, "reward.options.weights: ./nowhere: no such folder (accepted"),
        ({"weights": "runs/sft/none"}, "reward.options.weights: runs/sft/none: no such folder"),
        ({"weights": "{folder}", "model": "m"}, "reward.options.model: of a server alone"),
        ({"weights": "{folder}", "max_side": 64}, "reward.options.max_side: of a server alone"),
        ({"weights": "{folder}", "device": "gpu"}, "reward.options.device: gpu (accepted: cpu,"),
        ({"weights": "{folder}", "dtype": "fp8"}, "reward.options.dtype: 'fp8' (accepted"),
        ({"weights": "{folder}", "rows": 0}, "reward.options.rows: 0 (accepted: a whole number, 1"),
        ({"weights": "{folder}", "prompts": "/none"}, "reward.options.prompts: /none: none there"),
        ({}, "reward.options.url, url_env: neither (accepted"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, options: dict[str, Any], says: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(verifier, "SHIPPED", folder / "none")
    given = {k: v.format(folder=folder) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(ConfigError) as raised:
        load_reward(RewardConfig(name="verifier", options=given))
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_that_is_none_is_found_before_anything_is_judged(tmp_path: Path) -> None:
    panel = load_reward(RewardConfig(name="verifier", options={"weights": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"^reward.options.weights: .*accepted: a folder"):
        panel.probe()


def test_without_either_it_is_the_one_that_ships(
    folder: Path, drawn: list[Session], monkeypatch: Any
) -> None:
    monkeypatch.setattr(verifier, "SHIPPED", folder)
    options = {"max_tokens": MOST, "rows": 8}
    panel = load_reward(RewardConfig(name="verifier", options=options))
    shipped = panel.members[0].given
    assert shipped.local.weights == str(folder)
    assert values(shipped.judge(items(drawn[:1]))) == values(reward(folder).judge(items(drawn[:1])))
    served = {"url": "http://127.0.0.1:9/v1", **options}
    assert load_reward(RewardConfig(name="verifier", options=served)).members[0].given.local is None


# ------------------------------------------------------------------------------- what is carried


def test_sessions_carry_what_a_reward_wants(folder: Path) -> None:
    options = {"weights": str(folder)}
    wanting = load_reward(RewardConfig(name="verifier", options=options))
    asking = load_reward(RewardConfig(name="verifier", options=options | {"principles": "ask"}))
    use = RewardUse(name="verifier", options=options)
    apart = load_eval_reward(EvalConfig(reward=(use,)))
    plain = load_reward(RewardConfig())
    assert wanting.wants == {"principles"} == apart.wants and not asking.wants | plain.wants

    c = Config()
    open_ = lambda wants: open_sessions(  # noqa: E731
        c.data, c.rollout, c.eval, seed=3, size=None, wants=wants
    )
    told, bare, other = open_(wanting.wants), open_(()), open_({"something"})
    for with_, without in ((told[7], bare[7]), (told.heldout[2], bare.heldout[2])):
        assert without.turns == _drawn(without).turns
        for a, b in zip(with_.turns, without.turns, strict=True):
            assert {k: v for k, v in a.meta.items() if k != "principles"} == b.meta
            assert {one["kind"] for one in a.meta["principles"]} == {"follow", "keep", "quality"}
        assert np.array_equal(with_.image, without.image)
    depends = [identify(source, {}, plain) for source in (told, bare, other)]
    assert depends[1] == depends[2] and depends[1]["sessions"].endswith("seed 3, 3 turns")
    assert depends[0]["sessions"] == depends[1]["sessions"] + ", with principles"
    assert depends[0]["heldout"] != depends[1]["heldout"] == sessions_fingerprint(bare.heldout)


def _drawn(session: Session) -> Session:
    """By the world itself."""
    split, seed, index, _ = session.id.split("-")
    return shapes.make_session(int(seed), int(index), split=split)


# ---------------------------------------------------------------------------------- whole runs

SMALL = {
    "train.iterations": 3,
    "train.max_failed_scores": 1,
    "checkpoint.every": 1,
    "rollout.sessions": 2,
    "rollout.siblings": 2,
    "rollout.groups_per_batch": 1,
    "rollout.turns": 2,
    "eval.sessions": 2,
    "eval.strips": 1,
    "reward.name": "verifier",
    "reward.options.max_tokens": MOST,
    "reward.options.rows": 4,
}


def started(out: Path, folder: Path, processes: int = 1, **changes: Any) -> subprocess.Popen[bytes]:
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    given = {**SMALL, "out": out, "reward.options.weights": folder, **changes}
    return subprocess.Popen(
        [sys.executable, "-m", *(torchrun if processes > 1 else []), "editr2", "train"]
        + [word for name, value in given.items() for word in (f"--{name}", str(value))],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )


def ended(run: subprocess.Popen[bytes]) -> None:
    assert run.wait(400) == 0


def answers(out: Path, **where: Any) -> dict[str, str]:
    """By what was asked."""
    rows = [json.loads(line) for file in out.glob("judges*.jsonl") for line in file.open()]
    return {row["key"]: row["answer"]["text"] for row in rows if where.items() <= row.items()}


@pytest.mark.exhaustive
def test_a_run_that_was_killed_judges_as_one_that_was_not(folder: Path, tmp_path: Path) -> None:
    ended(started(tmp_path / "whole", folder))
    weights = "policy/model.safetensors"
    for lines in (9, 27):  # in the first evaluation's batches, and in training
        out = tmp_path / str(lines)
        run, record = started(out, folder), out / NAME
        while run.poll() is None and not (
            record.exists() and record.read_bytes().count(b"\n") >= lines
        ):
            time.sleep(0.02)
        assert run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait(20)
        assert not (out / weights).exists()
        ended(started(out, folder))
        assert answers(out) == answers(tmp_path / "whole")
        assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


@pytest.mark.exhaustive
def test_two_processes_judge_as_one(folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        ended(started(tmp_path / str(processes), folder, processes))
    one, two = tmp_path / "1", tmp_path / "2"
    assert (two / "judges.1.jsonl").stat().st_size
    for where in ({"purpose": "eval", "iteration": 0}, {"purpose": "train", "iteration": 0}):
        assert answers(one, **where) == answers(two, **where) != {}
