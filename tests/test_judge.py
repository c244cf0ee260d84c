"""`editr2 judge`: what it says of a reward follows from what the reward answered, nothing is asked
twice, and what is wrong is said before anything is asked."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.cli.main import main
from editr2.judge.agreement import kendall, pair_accuracy, spearman
from editr2.judge.trial import Calls, CountingRecord
from editr2.rewards.record import request_key
from editr2.sessions import Session, Turn, save_sessions

TURNS = 2

EVIL = '<script>alert("x")</script>'

JUDGE = '''
import os
import threading

import numpy as np

from editr2 import Score

LOCK = threading.Lock()


class Light:
    """IF: the mean brightness; CC does not apply to turn 2 of dark images; below 0.1 IF fails."""

    names = ("IF", "CC")
    concurrency, by_turn, batch = 4, True, 1

    def __init__(self, noise=0.0, log="asked", fails=0.1):
        self.noise, self.log, self.fails = noise, log, fails

    @property
    def facts(self):
        return {"judge": "a light meter"}

    def judge(self, items):
        return [[self.turn(item, t) for t in item.asked] for item in items]

    def turn(self, item, t):
        with LOCK, open(self.log, "a") as file:
            file.write(f"{item.session.id} {t}\\n")
        light = item.images[t].mean() / 255
        noise = np.random.default_rng([item.seed, t]).uniform(-1, 1) * self.noise
        cc = Score.not_applicable("too dark") if t and light < 0.5 else 1 - light
        if light < self.fails:
            return {"IF": Score(None, "it is <night>"), "CC": cc}
        votes = (light - 0.1, light + 0.1) if 0.2 < light < 0.8 else ()
        value = min(1.0, max(0.0, light + noise))
        return {"IF": Score(value, f"turn {t + 1} is lit <b>well</b>", votes=votes), "CC": cc}


def dark(session, images):
    return [1 - image.mean() / 255 for image in images]


def down(session, images):
    open("asked", "a").write("x\\n")
    raise ConnectionError("refused")
'''

LEVELS = {
    "bright": {"a": (0.8, 0.6), "b": (0.4, 0.6), "c": (1.0, 0.2)},
    "dim": {"a": (0.6, 0.0), "b": (0.2, 0.4), "c": (0.4, 0.4)},
}
"""Session -> sibling -> the brightness of each turn."""


def level(value: float) -> np.ndarray:
    return np.full((8, 8, 3), round(value * 255), np.uint8)


def write_outputs(folder: Path, levels: dict[str, tuple[float, ...]]) -> None:
    (folder / "images").mkdir(parents=True)
    lines = []
    for name, values in levels.items():
        turns = []
        for t, value in enumerate(values):
            file = f"images/{len(lines)}_t{t + 1}.png"
            Image.fromarray(level(value)).save(folder / file)
            turns.append({"instruction": f"edit {t}", "intent": None, "image": file})
        lines.append(json.dumps({"id": name, "turns": turns}) + "\n")
    (folder / "outputs.jsonl").write_text("".join(lines))


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A working folder with sessions, three folders of outputs and a judge."""
    monkeypatch.chdir(tmp_path)
    turns = tuple(Turn(f"edit {t}") for t in range(TURNS))
    save_sessions([Session(name, level(0.5), turns, "cu") for name in LEVELS], tmp_path / "data")
    for sibling in "abc":
        write_outputs(tmp_path / sibling, {name: of[sibling] for name, of in LEVELS.items()})
    name = f"judge_{abs(hash(tmp_path)):x}"  # modules are imported once a process
    (tmp_path / f"{name}.py").write_text(JUDGE)
    return name


def run(there: str, *more: str, outputs: str = "abc", judge: str = "Light") -> int:
    folders = [word for folder in outputs for word in ("--outputs", folder)]
    reward = () if judge == "" else ("--reward.function", f"{there}:{judge}")
    return main(["judge", "--data", "data", *folders, *reward, "--out", "out", *more])


def rows() -> dict[tuple[str, int, str], dict]:
    lines = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    return {(row["id"], row["turn"], row["output"]): row for row in lines}


def cells(text: str, title: str, name: str) -> list[str]:
    """A line of one of the printed tables."""
    below = text.split(f"\n{title}\n", 1)[1].splitlines()
    (line,) = [line for line in below[: below.index("")] if line.split()[:1] == [name]]
    return re.split(r" {2,}", line.strip())[1:]


def asked() -> int:
    path = Path("asked")
    return len(path.read_text().splitlines()) if path.exists() else 0


# ------------------------------------------------------------------------- what came back


def test_scores_means_spread_and_shares(there, capsys):
    assert run(there) == 0
    text = capsys.readouterr().out
    assert text.startswith("2 sessions, 6 outputs, 12 turns\njudge: a light meter\n")
    # IF of turn 1: means of siblings are (0.8, 0.4, 1.0) and (0.6, 0.2, 0.4).
    first, second = (np.mean([0.8, 0.4, 1.0]), np.mean([0.6, 0.2, 0.4]))
    mean, se = (first + second) / 2, np.std([first, second], ddof=1) / math.sqrt(2)
    assert cells(text, "Scores by turn", "IF")[0] == f"{mean:.3f} +- {se:.3f}"
    # Of turn 2 the first sibling of "dim" failed.
    second = [np.mean([0.6, 0.6, 0.2]), 0.4]
    assert cells(text, "Scores by turn", "IF")[1].startswith(f"{np.mean(second):.3f} +-")
    # Each has votes 0.1 to either side; four groups, of which one (0.4, 0.4) ties.
    groups = [(0.8, 0.4, 1.0), (0.6, 0.6, 0.2), (0.6, 0.2, 0.4), (0.4, 0.4)]
    pooled = sum(np.var(g) * len(g) for g in groups) / sum(len(g) - 1 for g in groups)
    assert cells(text, "Spread", "IF") == [
        f"{math.sqrt(0.02):.3f}",
        "-",
        f"{math.sqrt(pooled):.3f}",
        "-",
        "25.0% of 4",
    ]
    assert cells(text, "Spread", "CC")[-1] == "33.3% of 3"  # of dim's turn 2 there is none
    assert "IF failed: 1 of 12 (8.3%): it is <night> (1)" in text
    assert "CC does not apply: 4 of 12 (33.3%): too dark (4)" in text
    assert (
        re.search(r"calls: 12 made; .* 4 at once; a turn takes 1 calls and", text) and asked() == 12
    )
    row = rows()["bright", 1, "a"]
    assert row["scores"] == {"IF": 0.8, "CC": 0.2} and row["image"] == "a/images/0_t1.png"
    assert row["answers"]["IF"] == [{"value": 0.8, "reason": "turn 1 is lit <b>well</b>"}]
    assert rows()["bright", 1, "b"]["answers"]["IF"][0]["votes"] == [0.3, 0.5]
    dark = rows()["dim", 2, "a"]
    assert dark["scores"] == {"IF": None, "CC": None}
    assert dark["answers"] == {
        "IF": [{"failed": "it is <night>"}],
        "CC": [{"does_not_apply": "too dark"}],
    }
    assert len(rows()) == 12


def test_what_was_answered_is_not_asked_again(there, capsys):
    assert run(there, "--repeats", "2") == 0
    first, scores, page = asked(), Path("out/scores.jsonl").read_bytes(), capsys.readouterr().out
    assert first == 24 and "calls: 24 made;" in page
    assert run(there, "--repeats", "2") == 0
    text = capsys.readouterr().out
    assert "calls: 2 made, 22 answers from the record" in text  # what failed is asked again
    assert asked() == first + 2 and Path("out/scores.jsonl").read_bytes() == scores
    fine = ("--reward.options", "{fails: 0}")
    assert run(there, *fine) == 0 and asked() == first + 2 + 12  # another judge, by its options
    capsys.readouterr()
    assert run(there, *fine) == 0 and asked() == first + 2 + 12
    assert "calls: none; all 12 answers were on the record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("declared", "calls"),
    [
        ("concurrency, by_turn, batch = None, True, 1", 6),
        ("concurrency, by_turn, batch = None, False, 4", 3),  # and one for the first question
        ("concurrency, by_turn, batch = 2, True, None", 3),
        ("exact = True", 2),
    ],
)
def test_calls_are_counted_however_a_reward_is_asked(there, capsys, declared, calls):
    path = Path(f"{there}.py")
    fair = path.read_text().replace("fails=0.1", "fails=-1")
    path.write_text(fair.replace("concurrency, by_turn, batch = 4, True, 1", declared))
    assert run(there) == 0
    assert f"calls: {calls} made;" in capsys.readouterr().out
    assert run(there) == 0
    assert re.search(r"calls: none; all \d answers? were on", capsys.readouterr().out)


def test_asking_again_shows_the_judges_own_noise(there, capsys):
    noisy = ("--reward.options", "{noise: 0.1}")
    assert run(there, *noisy, "--repeats", "4") == 0
    text = capsys.readouterr().out
    _, again, siblings, less, _ = cells(text, "Spread", "IF")
    assert float(again) == pytest.approx(0.1 / math.sqrt(3), abs=0.015)  # of a uniform one
    rest = math.sqrt(float(siblings) ** 2 - float(again) ** 2 / 4)
    assert float(less) == pytest.approx(rest, abs=0.001) and float(less) < float(siblings)
    answers = rows()["bright", 2, "b"]["answers"]["IF"]
    assert len({answer["value"] for answer in answers}) == 4
    assert rows()["bright", 2, "b"]["scores"]["IF"] == pytest.approx(
        np.mean([answer["value"] for answer in answers]), abs=1e-6
    )


def test_several_lines_of_one_session_are_siblings(there, capsys):
    path = Path("a/outputs.jsonl")
    path.write_text(path.read_text() * 2)
    assert run(there, outputs="a") == 0
    assert {output for _, _, output in rows()} == {"a", "a#2"}
    assert cells(capsys.readouterr().out, "Spread", "IF")[-1] == "100.0% of 3"  # they are equal


@pytest.mark.parametrize(
    ("weights", "reward"),
    [
        (
            "{IF: 3, CC: 1}",
            {("bright", 1, "a"): 2.6, ("bright", 2, "c"): 0.8, ("dim", 2, "a"): None},
        ),
        (None, None),
    ],
)
def test_the_reward_is_the_sum_of_what_applies(there, capsys, weights, reward):
    assert run(there, *(("--credit.weights", weights) if weights else ())) == 0
    assert ("no sum of the scores" in capsys.readouterr().out) == (reward is None)
    for place, value in (reward or {}).items():
        assert rows()[place]["reward"] == (value and pytest.approx(value, abs=1e-5))
    assert reward or "reward" not in rows()["bright", 1, "a"]


# ------------------------------------------------------------------------------- agreement


def write_labels(*lines: dict) -> tuple[str, str]:
    Path("labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "--labels", "labels.jsonl"


def point(id: str, turn: int, output: str, score: float, **more) -> dict:
    return {"id": id, "turn": turn, "output": output, "score": score, **more}


BRIGHT = [point("bright", 1, s, v) for s, v in (("a", 3), ("b", 1), ("c", 4))]
PAIR = {"id": "dim", "turn": 1, "better": "a", "worse": "b"}


@pytest.mark.parametrize(
    ("labels", "of_if", "of_cc"),
    [
        (BRIGHT, ["1.00 [1.00, 1.00] of 3", "1.00", "1.00"], ["0.00", "-1.00", "-1.00"]),
        ([PAIR], ["1.00 [1.00, 1.00] of 1", "-", "-"], ["0.00", "-", "-"]),
        ([PAIR, {**PAIR, "better": "b", "worse": "a"}], ["0.50", "-", "-"], ["0.50", "-", "-"]),
        ([PAIR | {"name": "IF"}], ["1.00", "-", "-"], ["-", "-", "-"]),
        (
            [{"id": "bright", "turn": 2, "better": "a", "worse": "b"}],  # they tie
            ["0.50", "-", "-"],
            ["0.50", "-", "-"],
        ),
        # Of an output that has no score nothing can be said.
        ([point("dim", 2, "a", 1), point("dim", 2, "b", 2)], ["-", "-", "-"], ["-", "-", "-"]),
        ([point("dim", 1, "a", 1), point("dim", 1, "b", 1)], ["-", "-", "-"], ["-", "-", "-"]),
    ],
)
def test_agreement_with_labels(there, capsys, labels, of_if, of_cc):
    assert run(there, *write_labels(*labels)) == 0
    text = capsys.readouterr().out
    for name, wanted in (("IF", of_if), ("CC", of_cc)):
        found = cells(text, "Agreement with labels.jsonl", name)
        assert [cell[: len(want)] for cell, want in zip(found, wanted, strict=True)] == wanted


def test_a_label_of_an_only_output_need_not_name_it(there, capsys):
    labels = [
        {"id": name, "turn": 1, "score": score} for name, score in (("bright", 2), ("dim", 1))
    ]
    assert run(there, *write_labels(*labels), outputs="a") == 0
    found = cells(capsys.readouterr().out, "Agreement with labels.jsonl", "IF")
    assert found[0] == "-" and found[1].startswith("1.00 ")


def test_agreement_with_another_reward(there, capsys):
    assert run(there, "--against.function", f"{there}:dark") == 0
    text = capsys.readouterr().out
    assert f"\nAgreement with {there}:dark\n" in text
    line = next(line for line in text.splitlines() if line.startswith("IF, dark"))
    # Of 11 scores; of the pairs of siblings that the other tells apart, none has the same order.
    assert re.split(r" {2,}", line)[1:] == [
        "0.00 [0.00, 0.00] of 8",
        "-1.00 [-1.00, -1.00] of 11",
        "-1.00 [-1.00, -1.00] of 11",
    ]
    line = next(line for line in text.splitlines() if line.startswith("CC, dark"))
    assert re.split(r" {2,}", line)[2] == "1.00 [1.00, 1.00] of 8"
    assert rows()["bright", 1, "a"]["against"] == {"dark": pytest.approx(0.2)}
    # By IF sibling a of bright, the lightest (of dim a turn failed); by CC the siblings b, and
    # of two where there is no b, a of bright and c of dim: (.5 + .3 + .5 + .7 + .6 + .7) / 6.
    best = text[text.index("\nBest of k\n") :].splitlines()
    assert [
        re.split(r" {2,}", line)[:1] + re.findall(r"(\S+) (?=\[)", line) for line in best[3:7]
    ] == [
        ["dark, chosen by IF", "0.400", "0.333", "0.300"],
        ["dark, oracle", "0.400", "0.467", "0.500"],
        ["dark, chosen by CC", "0.533", "0.550", "0.600"],
        ["dark, oracle", "0.533", "0.583", "0.600"],
    ]


@pytest.mark.parametrize("seed", range(4))
def test_rank_correlations_are_those_of_their_definitions(seed):
    made = np.random.default_rng(seed)
    a = made.integers(0, 5, 40) / 4
    b = np.round(a + made.normal(0, 0.4, 40), 1)
    session = np.repeat(np.arange(10), 4)
    concordant, apart = 0, [0, 0]
    for i in range(40):
        for j in range(i):
            x, y = np.sign(a[i] - a[j]), np.sign(np.round(b[i] - b[j], 6))
            concordant += x * y
            apart = [apart[0] + abs(x), apart[1] + abs(y)]
    tau = kendall(a, b, session)
    assert tau.value == pytest.approx(concordant / math.sqrt(apart[0] * apart[1]))
    ranks = [[np.mean(np.flatnonzero(np.sort(v) == x)) for x in v] for v in (a, b)]
    rho = spearman(a, b, session)
    assert rho.value == pytest.approx(np.corrcoef(ranks)[0, 1])
    for found in (tau, rho):
        assert found.low < found.value < found.high and found.count == 40
    # A monotone change of a scale changes no rank.
    assert spearman(np.exp(3 * a), b, session) == rho and kendall(7 * a - 1, b, session) == tau


def test_a_resample_draws_whole_sessions():
    """The same thing said ten times over makes nothing surer."""
    made = np.random.default_rng(0)
    a, b = made.random(12), made.random(12)
    once, often = np.arange(12), np.repeat(np.arange(12), 10)
    for statistic in (spearman, kendall, pair_accuracy):
        lone, many = statistic(a, b, once), statistic(a.repeat(10), b.repeat(10), often)
        assert (many.low, many.high) == pytest.approx((lone.low, lone.high))
        surer = statistic(a.repeat(10), b.repeat(10), np.arange(120))
        assert surer.high - surer.low < 0.6 * (lone.high - lone.low)


def test_accuracy_on_pairs_gives_a_tie_half():
    better, worse = np.array([0.9, 0.5, 0.5, 0.1]), np.array([0.1, 0.5, 0.5 + 1e-12, 0.9])
    assert pair_accuracy(better, worse, np.arange(4)).value == 0.5
    assert pair_accuracy(better[:3], worse[:3], np.arange(3)).value == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------ what is wrong


def change(path: str, function) -> None:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    function(lines)
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


WRONG = {
    "no folder": (lambda: ("--outputs", "nowhere"), r"nowhere: no such file .accepted: a folder"),
    "no outputs": (lambda: ("--outputs", "data"), r"data: no outputs.jsonl in the folder"),
    "twice": (lambda: ("--outputs", "a"), r"--outputs: a given twice"),
    "an image": (
        lambda: Path("b/images/1_t2.png").unlink(),
        r"b/outputs.jsonl:2: turns\[1\].image: b/images/1_t2.png: no such file",
    ),
    "an image that leads out": (
        lambda: change("b/outputs.jsonl", lambda x: x[0]["turns"][0].update(image="../a/x.png")),
        r"b/outputs.jsonl:1: turns\[0\].image: \.\./a/x.png leads out of b",
    ),
    "no image": (
        lambda: change("b/outputs.jsonl", lambda x: x[0]["turns"][0].pop("image")),
        r"b/outputs.jsonl:1: turns\[0\].image: null \(accepted: the path",
    ),
    "a damaged image": (
        lambda: Path("a/images/0_t1.png").write_bytes(b"no"),
        r"a/outputs.jsonl:1: turns\[0\].image: .*not a readable image",
    ),
    "another size": (
        lambda: Image.fromarray(level(1)[:4]).save("a/images/0_t1.png"),
        r"a/outputs.jsonl:1: turns\[0\].image: 4x8 .height x width., and .*'bright' is 8x8",
    ),
    "an unknown id": (
        lambda: change("c/outputs.jsonl", lambda x: x[1].update(id="fog")),
        r"c/outputs.jsonl:2: id: 'fog' is no session of --data .accepted: 'bright', 'dim'",
    ),
    "a turn too few": (
        lambda: change("c/outputs.jsonl", lambda x: x[1]["turns"].pop()),
        r"c/outputs.jsonl:2: turns: 1 of session 'dim' .accepted: 2, ",
    ),
    "another instruction": (
        lambda: change("c/outputs.jsonl", lambda x: x[0]["turns"][1].update(instruction="fly")),
        r"c/outputs.jsonl:1: turns\[1\].instruction: the string 'fly' .accepted: .*'edit 1'",
    ),
    "no JSON": (lambda: Path("c/outputs.jsonl").write_text("{"), r"c/outputs.jsonl:1: .*JSON"),
    "an empty file": (lambda: Path("c/outputs.jsonl").write_text("\n"), r"c/outputs.jsonl: no out"),
    "no labels": (lambda: ("--labels", "nowhere"), r"nowhere: cannot be read"),
    "empty labels": (lambda: write_labels(), r"labels.jsonl: no labels"),
    "a label of no session": (
        lambda: write_labels(PAIR, point("fog", 1, "a", 1)),
        r"labels.jsonl:2: id: 'fog', of which there is no output .accepted: 'bright', 'dim'",
    ),
    "a label of no turn": (
        lambda: write_labels(point("dim", 3, "a", 1)),
        r"labels.jsonl:1: turn: the number 3 .accepted: a whole number from 1 to 2",
    ),
    "a label of turn true": (
        lambda: write_labels(point("dim", True, "a", 1)),
        r"labels.jsonl:1: turn: true",
    ),
    "a label of no output": (
        lambda: write_labels(point("dim", 1, "d", 1)),
        r"labels.jsonl:1: output: the string 'd' .accepted for 'dim': 'a', 'b', 'c'",
    ),
    "a label of one of three": (
        lambda: write_labels({"id": "dim", "turn": 1, "score": 1}),
        r"labels.jsonl:1: output: null .accepted for 'dim': 'a', 'b', 'c'",
    ),
    "a label without a number": (
        lambda: write_labels(point("dim", 1, "a", "good")),  # type: ignore[arg-type]
        r"labels.jsonl:1: score: the string 'good' .accepted: a number",
    ),
    "a label of no score": (
        lambda: write_labels(point("dim", 1, "a", 1, name="GA")),
        r"labels.jsonl:1: name: the string 'GA' .accepted: IF, CC, or absent",
    ),
    "a label that says more": (
        lambda: write_labels(point("dim", 1, "a", 1, rater="me")),
        r"labels.jsonl:1: rater: unknown key .accepted: id, turn, score, output, name",
    ),
    "a pair with itself": (
        lambda: write_labels({**PAIR, "worse": "a"}),
        r"labels.jsonl:1: worse: the string 'a', as better",
    ),
    "half a pair": (
        lambda: write_labels({"id": "dim", "turn": 1, "better": "a"}),
        r"labels.jsonl:1: worse: null",
    ),
    "weights of others": (
        lambda: ("--credit.weights", "{GA: 1}"),
        r"credit.weights: \['GA'\] .accepted: a weight for exactly",
    ),
    "no such reward": (lambda: ("--against.name", "pretty"), r"against.name: 'pretty' .accepted"),
    "two names": (
        lambda: ("--against.name", "world", "--against.function", "x:y"),
        r"against.name: 'world' .accepted with against.function",
    ),
    "no repeats": (lambda: ("--repeats", "0"), r"--repeats: 0 .accepted"),
    "no price": (lambda: ("--price-per-call", "-1"), r"--price-per-call: -1"),
    "a file in place of the folder": (
        lambda: ("--out", "a/outputs.jsonl"),
        r"out: 'a/outputs.jsonl' .accepted: a folder",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_before_anything_is_asked(name, there, capsys):
    make, message = WRONG[name]
    more = make() or ()
    assert run(there, *(more if isinstance(more, tuple) else ())) == 2
    captured = capsys.readouterr()
    assert re.match(rf"error: {message}", captured.err) and captured.err.count("\n") == 1
    assert asked() == 0 and captured.out == ""


def test_a_judge_that_is_down_is_asked_about_a_few(there, capsys):
    assert run(there, judge="down") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no score for any of the first outputs: session bright: ")
    assert "ConnectionError: refused" in error and asked() == 4
    assert not Path("out/scores.jsonl").exists()


def test_outputs_of_another_size_are_judged_beside_a_source_brought_to_it(there, capsys):
    for path in Path().glob("[abc]/images/*.png"):
        Image.open(path).resize((6, 4)).save(path)
    assert run(there, "--data.resize", "stretch") == 0
    assert rows()["bright", 1, "a"]["scores"]["IF"] == 0.8


@pytest.mark.parametrize(("made", "cost"), [(12, "cost: 6 at 0.5 a call, 0.5 a turn")])
def test_cost(there, capsys, made, cost):
    assert run(there, "--price-per-call", "0.5") == 0
    assert f"\n{cost}\n" in capsys.readouterr().out and asked() == made


def test_votes_of_one_request_are_one_call(tmp_path):
    """Of them the first line of the record bears the tries, the others none."""
    record = CountingRecord(tmp_path)
    record.begin(lambda line: None)
    for vote, tries in enumerate((2, 0, 0, 0)):
        failed = "no verdict" if vote == 3 else None
        record.write(request_key(vote=vote), {"value": vote}, failed=failed, seconds=0, tries=tries)
    assert record.calls == Calls(made=1, failed=1, again=1)


def test_who_waits_is_told_how_far_it_is(tmp_path, monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr("editr2.judge.trial.time.monotonic", lambda: clock[0])
    record = CountingRecord(tmp_path)
    record.begin(said.append)
    for n in range(40):
        clock[0] += 1
        failed = "down" if n == 20 else None
        record.write(request_key(n=n), n, failed=failed, seconds=1, tries=1)
    assert said == ["15 calls made in 15 s", "30 calls made in 30 s, 1 failed"]


def test_the_page_has_every_image_with_what_was_said(there, beside):
    report = beside("test_report")
    turns = (Turn(EVIL), Turn("edit 1"))
    save_sessions([Session(name, level(0.5), turns) for name in LEVELS], "data")
    for sibling in "abc":
        change(
            f"{sibling}/outputs.jsonl",
            lambda x: [line["turns"][0].pop("instruction") for line in x],
        )
    assert (
        run(there, "--against.function", f"{there}:dark", "--credit.weights", "{IF: 1, CC: 1}") == 0
    )
    text = Path("out/judge.html").read_text()
    page = report.Page(text)
    assert len(page.images) == 2 + 12 and all(i["src"].startswith("data:") for i in page.images)
    assert "script" not in {tag for tag, _ in page.tags} and "<b>well</b>" not in text
    assert "http" not in report.without_scripts(Path("out/judge.html")).replace("http-equiv", "")
    for said in (
        EVIL,
        "IF turn 2 is lit <b>well</b>",
        "IF 0.80 CC 0.20 reward 1.00",
        "CC does not apply",
        "CC too dark",
        "failed : IF: it is <night>",
        "a light meter",
        f"Agreement with {there}:dark",
        "dark of the best of k",
        "IF failed: 1 of 12",
    ):
        assert said in page.text, said


def test_outputs_of_a_rollout_are_read_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["rollout", "--out", "made", "--eval.sessions", "2", "--rollout.turns", "2"]) == 0
    assert main(["judge", "--outputs", "made", "--out", "out", "--rollout.turns", "2"]) == 0
    text = capsys.readouterr().out
    assert "2 sessions, 2 outputs, 4 turns" in text and "every turn has every score" in text
    assert set(rows()[next(iter(rows()))]["scores"]) == {"IF", "CC", "GA"}
