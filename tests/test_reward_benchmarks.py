"""Benchmarks of rewards: what is said of a reward follows from labels and answers by hand, sets are
read as their own evaluators read them, and nothing is asked twice."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.benchmarks.best_of import best_of_rows
from editr2.benchmarks.rewards import pair_set_of, run_rewards
from editr2.benchmarks.rows import Row
from editr2.config import RewardConfig
from editr2.errors import ConfigError, DataError, UserError
from editr2.judge.best_of import curve, expected
from editr2.judge.settings import JudgeConfig
from editr2.run.processes import Processes

JUDGE = '''
import threading

from editr2 import Score

LOCK = threading.Lock()
ASKED = []
SHAPES = set()
STOP = [10**9]


class Light:
    """The brightness; it fails below 0.1, and does not apply above 0.95."""

    names = ("light",)

    def __call__(self, session, images):
        with LOCK:
            if len(ASKED) == STOP[0]:
                raise KeyboardInterrupt
            ASKED.append(session.id)
            SHAPES.add(images.shape)
        return [self.of(image.mean() / 255) for image in images]

    def of(self, light):
        if light < 0.1:
            return {"light": Score(None, "it is night")}
        return {"light": Score.not_applicable("glare") if light > 0.95 else float(light)}


class ByDimension(Light):
    names = ("overall", "consistency")

    def of(self, light):
        return {"overall": float(light), "consistency": 1 - float(light)}


def down(session, images):
    ASKED.append(session.id)
    raise ConnectionError("refused")
'''


def picture(path: Path, light: float, size: int = 8) -> str:
    Image.fromarray(np.full((size, size, 3), round(light * 255), np.uint8)).save(path)
    return path.name


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """The module of a judge in a working folder of its own."""
    import importlib

    monkeypatch.chdir(tmp_path)
    name = f"pair_judge_{abs(hash(tmp_path)):x}"  # modules are imported once a process
    (tmp_path / f"{name}.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name)


def config(judge, name: str = "Light", **more) -> JudgeConfig:
    return JudgeConfig(reward=RewardConfig(function=f"{judge.__name__}:{name}"), **more)


def run(judge, name: str, data: Path | None = None, out: str = "out", **more) -> dict:
    reward = more.pop("reward", "Light")
    run_rewards(config(judge, reward), name, out, data=data, **more)
    return json.loads(Path(out, "summary.json").read_text())


def value(summary: dict, key: str) -> float:
    return next(each["value"] for each in summary["measures"] if each["key"] == key)


def pairs_file(folder: Path, pairs: dict[str, tuple[float, float, str]]) -> Path:
    """id -> the brightness of the better and of the worse one, and the task."""
    lines = []
    for name, (win, lose, task) in pairs.items():
        files = {key: f"{name}_{key}.png" for key in ("image", "win", "lose")}
        for file, light in zip(files.values(), (0.5, win, lose), strict=True):
            picture(folder / file, light)
        record = {"id": name, **files, "instruction": f"edit {name}", "task": task}
        lines.append(json.dumps(record) + "\n")
    file = folder / "pairs.jsonl"
    file.write_text("".join(lines))
    return file


GOOD = {
    "right": (0.8, 0.2, "a"),
    "wrong": (0.4, 0.6, "a"),
    "tie": (0.6, 0.6, "b"),
    "too bright": (1.0, 0.6, "b"),
}


def test_numbers_are_those_counted_by_hand(judge, tmp_path):
    summary = run(judge, str(pairs_file(tmp_path, GOOD)))
    assert summary["pairs"] == {
        "asked": 4, "judged": 3, "not_applicable": 1, "failed": 0, "ties": 1, "tied_by_people": 0
    }  # fmt: skip
    assert summary["headline"] == {"accuracy": 0.5}  # 1, 0 and a half of three
    (of_all,) = [each for each in summary["measures"] if each["key"] == "accuracy"]
    assert (of_all["n"], of_all["ties"], of_all["ties_wrong"]) == (3, 1, pytest.approx(1 / 3))
    assert of_all["low"] == 0 and of_all["high"] == 1
    assert value(summary, "accuracy/task=a") == 0.5 and value(summary, "accuracy/task=b") == 0.5
    lines = [json.loads(line) for line in Path("out/comparisons.jsonl").read_text().splitlines()]
    assert [(line["state"], line.get("right")) for line in lines] == [
        ("judged", 1), ("judged", 0), ("judged", 0.5), ("not_applicable", None)
    ]  # fmt: skip
    page = Path("out/report.html").read_text()
    assert "edit wrong" in page and "edit right" not in page


def test_a_failed_pair_is_counted_and_too_many_leave_no_headline(judge, tmp_path, monkeypatch):
    file = str(pairs_file(tmp_path, GOOD | {"night": (0.0, 0.6, "a")}))
    summary = run(judge, file)
    assert summary["pairs"]["failed"] == 1 and value(summary, "accuracy") == 0.5
    assert summary["headline"] is None and "1 of 5 pairs failed" in summary["why"]
    assert summary["reasons"]["failed"] == {"light: it is night": 1}
    said = run_rewards(config(judge), file, "out")
    assert any(line.startswith("no headline: 1 of 5") for line in said)
    monkeypatch.setattr("editr2.benchmarks.rewards.MOST_FAILED", 0.2)
    assert run(judge, file)["headline"] == {"accuracy": 0.5}


# ---------------------------------------------------------------------------- what is asked again


def test_a_kill_resumes_to_the_same_files_and_asks_nothing_twice(judge, tmp_path, monkeypatch):
    monkeypatch.setattr("editr2.benchmarks.pairs.judging.BLOCK", 8)
    pairs = {f"p{n}": (0.2 + n / 100, 0.9 - n / 100, "ab"[n % 2]) for n in range(9)}
    file = str(pairs_file(tmp_path, pairs | {"night": (0.0, 0.6, "a")}))
    run(judge, file, out="whole")
    assert len(judge.ASKED) == 20
    for record_stays in (True, False):
        out = tmp_path / f"killed {record_stays}"
        judge.ASKED.clear()
        judge.STOP[0] = 15  # in the block behind the 4 + 8 that are written
        with pytest.raises(KeyboardInterrupt):
            run_rewards(config(judge), file, out)
        (part,) = out.glob("scores.*.part.jsonl")
        assert len(part.read_text().splitlines()) == 1 + 12
        part.write_text(part.read_text() + '{"output": "p6/w')  # what a killed process leaves
        if not record_stays:
            (out / "judges.jsonl").unlink()
        judge.ASKED.clear()
        judge.STOP[0] = 10**9
        run(judge, file, out=str(out))
        assert len(judge.ASKED) == (5 if record_stays else 8)
        assert not list(out.glob("*.part*"))
        for name in ("scores.jsonl", "comparisons.jsonl", "report.html"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    judge.ASKED.clear()
    run(judge, file, out="whole")
    assert judge.ASKED == ["night/win"]  # what failed, and nothing else


def test_answers_of_another_reward_or_image_are_not_taken(judge, tmp_path):
    file = pairs_file(tmp_path, {"one": (0.8, 0.2, "a")})
    assert run(judge, str(file))["headline"] == {"accuracy": 1.0}
    picture(tmp_path / "one_win.png", 0.15)
    assert run(judge, str(file))["headline"] == {"accuracy": 0.0}


class OneOf:
    """Of two processes, which are threads."""

    def __init__(self, index: int, barrier: threading.Barrier, table: dict) -> None:
        self.index, self.count, self._barrier, self._table = index, 2, barrier, table
        self.main = index == 0

    on_main = Processes.on_main

    def wait(self) -> None:
        self._barrier.wait(60)

    def gather(self, items: list) -> list:
        self._table[self.index] = items
        self.wait()
        found = [each for index in range(2) for each in self._table[index]]
        self.wait()
        return found

    def first(self, found):
        return next((each for each in self.gather([found]) if each is not None), None)


def test_two_processes_share_the_outputs_and_write_the_same(judge, tmp_path):
    file = pairs_file(tmp_path, {f"p{n}": (0.3 + n / 50, 0.5, "a") for n in range(6)})
    run(judge, str(file), out="one")
    asked, barrier, table = sorted(judge.ASKED), threading.Barrier(2), {}
    judge.ASKED.clear()
    lines: dict[int, list[str]] = {}

    def process(index: int) -> None:
        mine = OneOf(index, barrier, table)
        lines[index] = run_rewards(config(judge), str(file), "two", processes=mine)

    threads = [threading.Thread(target=process, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(judge.ASKED) == asked  # each once
    assert lines[0] and not lines[1]
    for name in ("scores.jsonl", "comparisons.jsonl"):
        assert Path("two", name).read_bytes() == Path("one", name).read_bytes()


def test_a_judge_that_is_down_is_not_asked_about_all(judge, tmp_path):
    file = pairs_file(tmp_path, {f"p{n}": (0.3, 0.5, "a") for n in range(6)})
    with pytest.raises(UserError, match="no score for any of the first outputs: .*refused"):
        run_rewards(config(judge, "down"), str(file), "out")
    assert len(judge.ASKED) == 4


# ------------------------------------------------------------------------------------ public sets


def editscore_rows(datasets, folder: Path, rows: list[dict]) -> Path:
    from datasets import Features, Image, Sequence, Value

    features = Features(
        {
            "key": Sequence(Value("string")),
            "instruction": Value("string"),
            "input_image": Image(),
            "output_images": Sequence(Image()),
            "task_type": Value("string"),
            "dimension": Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder))
    return folder


def cell(light: float, size: int = 8) -> Image.Image:
    return Image.fromarray(np.full((size, size, 3), round(light * 255), np.uint8))


def test_editscores_bench_is_read_and_counted_as_its_evaluator_does(judge, tmp_path):
    datasets = pytest.importorskip("datasets")

    def row(dimension: str, task: str, *outputs: tuple[str, float]) -> dict:
        return {
            "key": [key for key, _ in outputs],
            "instruction": f"edit {task}",
            "input_image": cell(0.5),
            "output_images": [cell(light, 16) for _, light in outputs],  # another size
            "task_type": task,
            "dimension": dimension,
        }

    a, b, c, d = ("a", 0.9), ("b", 0.3), ("c", 0.6), ("d", 0.6)
    rows = [
        row("overall", "compose", a, b),
        row("overall", "compose", b, a),
        row("overall", "compose", a, b),
        row("overall", "extract", a, b) | {"key": ["e", "f"]},
        row("overall", "extract", c, d),
        row("prompt_following", "compose", a, b),
        row("consistency", "compose", a, b),
    ]
    data = editscore_rows(datasets, tmp_path / "bench", rows)
    summary = run(judge, "editscore-bench", data, reward="ByDimension")
    # By hand: compose 2 of 3; extract 1 and a half of 2, where published counts take the tie for
    # wrong.
    assert value(summary, "accuracy/dimension=overall/task=compose") == pytest.approx(2 / 3)
    assert value(summary, "accuracy/dimension=overall/task=extract") == 0.75
    average = next(m for m in summary["measures"] if m["key"] == "average/dimension=overall")
    assert average["value"] == pytest.approx((2 / 3 + 0.75) / 2, abs=1e-6)
    assert average["ties_wrong"] == pytest.approx((2 / 3 + 0.5) / 2, abs=1e-6)
    assert value(summary, "average/dimension=overall/group=scene") == 0.75
    # Of its own score (darker is more consistent), and of the one that stands for all.
    assert value(summary, "average/dimension=consistency") == 0
    assert value(summary, "average/dimension=prompt_following") == 1
    assert sorted(judge.ASKED) == ["a", "b", "c", "d", "e", "f"]  # each output once
    assert {(1, 8, 8, 3)} == judge.SHAPES  # of the sources, as its evaluator has it


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dimension": "beauty"}, r"row 1: dimension: .*accepted: overall, prompt_following"),
        ({"key": ["a", "a"]}, r"row 1: key: .*two keys that differ"),
        ({"output_images": []}, r"row 1: output_images: not two"),
        ({"input_image": None}, r"row 1: input_image: missing"),
        ({"instruction": " "}, r"row 1: instruction: blank string"),
        ({"instruction": "another"}, r"row 1: key: 'a' has another image or instruction"),
    ],
)
def test_rows_that_are_wrong_are_named(change, problem, judge, tmp_path):
    datasets = pytest.importorskip("datasets")
    good = {
        "key": ["a", "b"],
        "instruction": "edit",
        "input_image": cell(0.5),
        "output_images": [cell(0.6), cell(0.4)],
        "task_type": "compose",
        "dimension": "overall",
    }
    data = editscore_rows(datasets, tmp_path / "bench", [good, good | change])
    with pytest.raises(DataError, match=problem):
        run(judge, "editscore-bench", data)
    assert not judge.ASKED


TIGER = {
    2: [
        ("A>B", (0.8, 0.2)),
        ("A<B", (0.8, 0.2)),
        ("A=B=Good", (0.5, 0.52)),
        ("A=B=Bad", (0.9, 0.2)),
    ],
    3: [("C>A>B", (0.5, 0.2, 0.8)), ("C>A>B", (0.8, 0.2, 0.5)), ("A>B>C", (0.8, 0.4, 0.4))],
    4: [("D>C>B>A", (0.2, 0.3, 0.4, 0.5))],
}
"""By number of outputs, the ranking and the brightness of each."""


def test_tigers_bench_in_both_forms(judge, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = []
    for ways, records in TIGER.items():
        told = []
        for number, (ranking, lights) in enumerate(records):
            paths = [
                picture(tmp_path / f"{ways}_{number}_{n}.png", light)
                for n, light in enumerate(lights)
            ]
            source = picture(tmp_path / f"{ways}_{number}.png", 0.5 + number / 100)
            told.append(
                {
                    "prompt": "edit",
                    "path_src": source,
                    "paths_generated": paths,
                    "human_vote": {"ranking": ranking},
                }
            )
            order = ranking.replace("<", "")
            for i, j in itertools.combinations(range(ways), 2):
                a, b = "ABCD"[i], "ABCD"[j]
                better = "A=B" if "=" in ranking else f"{a}>{b}"
                if "=" not in ranking and (
                    order.index(a) > order.index(b) or (ways == 2 and "<" in ranking)
                ):
                    better = f"{b}>{a}"
                rows.append(
                    {
                        "id": f"rec{number}_{i}{j}",
                        "dataset": f"{ways}pair",
                        "instruction": "edit",
                        "source_image": cell(0.5 + number / 100),
                        "candidate_1": cell(lights[i]),
                        "candidate_2": cell(lights[j]),
                        "ranking": better,
                        "comparison_type": f"{a}vs{b}",
                    }
                )
        file = tmp_path / f"EditReward_Bench_{ways}pair.json"
        file.write_text(json.dumps([*told, told[0] | {"path_src": ""}], indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "2pair" / "train.parquet")
    found = {}
    for form, data in (("files", tmp_path), ("rows", tmp_path / "rows")):
        summary = found[form] = run(judge, "tiger-bench", data, out=form)
        # Two outputs: right, wrong; a threshold of 0.02 makes one of the ties right, no other.
        assert value(summary, "all_right/ways=2") == 0.5
        assert value(summary, "with_ties/ways=2") == 0.5
        tied = next(m for m in summary["measures"] if m["key"] == "with_ties/ways=2")
        assert tied["threshold"] == pytest.approx(0.02, abs=0.002)
        # Three: all right; one pair wrong; two right and a tie, of which a coin has half.
        assert value(summary, "accuracy/ways=3") == pytest.approx((3 + 2 + 2.5) / 9, abs=1e-6)
        assert value(summary, "all_right/ways=3") == 0.5
        assert value(summary, "all_right/ways=4") == 1
        assert value(summary, "all_right") == pytest.approx((2 + 1.5 + 1) / 8)
        assert summary["pairs"]["tied_by_people"] == 2
    assert found["files"]["left_out"] == {"without an image": 3}
    assert [m["value"] for m in found["files"]["measures"]] == [
        m["value"] for m in found["rows"]["measures"]
    ]


def test_preferences_that_contradict_themselves_are_counted_and_left_out(judge, tmp_path):
    for name, light in (("s", 0.5), ("a", 0.8), ("b", 0.2)):
        picture(tmp_path / f"{name}.png", light)

    def record(**more):
        return {"prompt": "edit", "path_src": "s.png", "path1": "a.png", "path2": "b.png", **more}

    def scores(overall: tuple, *dimensions: tuple) -> dict:
        said = {"overall": overall, **{f"dim{n}": each for n, each in enumerate(dimensions, 1)}}
        return {
            f"model{m + 1}_{name}_score": each[m] for name, each in said.items() for m in range(2)
        }

    records = [
        record(choice_dist=None, confidence=None),
        record(choice_dist=[8, 2], **scores((7, 5), (4, 2), (3, 3))),
        record(**scores((7, 6), (2, 4), (5, 2))),  # dimensions that pull apart say nothing
        record(tie_case=True, **scores((6, 6), (4, 4))),
        record(choice_dist=[2, 8]),
        record(choice_dist=[5, 5]),
        record(**scores((0.2, 0.6), (4, 2))),
        record(**scores((5, 5), (3, 3))),
        record(**scores((7, 5), (2, 4))),
        record(tie_case=True, **scores((6, 5))),
    ]
    file = tmp_path / "valid.json"
    file.write_text(json.dumps(records, indent=2))
    summary = run(judge, str(file))
    assert summary["benchmark"] == "preferences"
    assert summary["left_out"] == {
        "choice_dist prefers path2": 1,
        "choice_dist is even": 1,
        "the overall scores prefer path2": 1,
        "the overall scores are equal": 1,
        "every score of a dimension prefers path2": 1,
        "tie_case, and the overall scores differ": 1,
    }
    assert summary["pairs"] | {"asked": 4, "tied_by_people": 1} == summary["pairs"]
    assert summary["headline"] == {"accuracy": 1.0}
    broken = [records[0], {**records[0], "path1": "gone.png"}]
    file.write_text(json.dumps(broken, indent=2))  # the second begins on line 10
    with pytest.raises(DataError, match=r"valid\.json:10: path1: .*gone\.png: no such file"):
        run(judge, str(file), out="broken")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"win": None}, r":2: win: .*path of an image"),
        ({"lose": "gone.png"}, r":2: lose: .*gone\.png: no such file"),
        ({"lose": "../x.png"}, r":2: lose: .*leads out of"),
        ({"id": "one"}, r":2: id: 'one' was already used on .*:1"),
        ({"instruction": ""}, r":2: instruction: blank string"),
        ({"margin": "wide"}, r":2: margin: .*accepted: a number"),
        ({"better": 1}, r":2: better: unknown field"),
        ({"principles": [{"text": "x", "kind": "luck"}]}, r":2: principles\[0\]\.kind: .*follow"),
    ],
)
def test_lines_that_are_wrong_are_named(change, problem, judge, tmp_path):
    file = pairs_file(tmp_path, {"one": (0.8, 0.2, "a"), "two": (0.8, 0.2, "a")})
    first, second = file.read_text().splitlines()
    record = {k: v for k, v in (json.loads(second) | change).items()}
    file.write_text(first + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=problem):
        run(judge, "pairs", file)
    assert not judge.ASKED


def test_names_of_sets(judge, tmp_path):
    file = pairs_file(tmp_path, GOOD)
    sessions = tmp_path / "sessions.jsonl"
    sessions.write_text('{"id": "a", "image": "a.png", "turns": [{"instruction": "x"}]}\n')
    assert [pair_set_of(str(each)) for each in ("tiger-bench", file, sessions, "mice")] == [
        "tiger-bench", "pairs", None, None
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"reward\.name: none"):
        run_rewards(JudgeConfig(), str(file), "out")
    with pytest.raises(ConfigError, match="NAME: 'mice'"):
        run_rewards(config(judge), "mice", "out")


# ----------------------------------------------------------------------------------------- best of


def brute(chooser: np.ndarray, held: np.ndarray, k: int) -> float:
    """The mean over all draws of k of what is chosen, equal ones sharing."""
    taken = []
    for draw in itertools.combinations(range(len(chooser)), k):
        top = max(chooser[i] for i in draw)
        taken.append(np.mean([held[i] for i in draw if chooser[i] == top]))
    return float(np.mean(taken))


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_best_of_k_is_the_mean_over_all_draws(n):
    rng = np.random.default_rng(n)
    for levels in (2, 3, 100):
        chooser, held = rng.integers(0, levels, n) / levels, rng.random(n)
        wanted = [brute(chooser, held, k) for k in range(1, n + 1)]
        np.testing.assert_allclose(expected(chooser, held), wanted, atol=1e-12)


def test_a_curve_has_the_mean_the_oracle_and_what_is_left_out():
    held = np.array([[0.0, 1.0, 0.5], [0.2, 0.4, 0.6], [1.0, np.nan, 1.0]])
    against = curve("r", -held, "h", held)
    assert against is not None and (against.sessions, against.left_out) == (2, 1)
    assert against.value[0].value == pytest.approx((0.5 + 0.4) / 2)
    assert against.value[2].value == pytest.approx((0.0 + 0.2) / 2)  # it chooses the worst
    assert against.oracle[2].value == pytest.approx((1.0 + 0.6) / 2)
    assert curve("r", held[:, :1], "h", held[:, :1]) is None


def test_best_of_the_samples_of_a_benchmark():
    def rows(scores: dict[int, tuple], metric: str, state: str = "judged") -> list[Row]:
        return [
            Row("s", "multipass", t + 1, t + 1, metric, "judged" if v is not None else state,
                v, None if v is not None else "why", None, None, len(values), sample)
            for sample, values in scores.items()
            for t, v in enumerate(values)
        ]  # fmt: skip

    held = rows({1: (0.2, 0.4), 2: (1.0, 0.8), 3: (0.5, 0.5)}, "GA")
    chosen = rows({1: (0.9, 0.9), 2: (0.5, 0.6), 3: (0.1, 0.1)}, "IF")
    more = rows({1: (0.0, 0.0), 2: (1.0, None), 3: (0.0, 0.0)}, "CC", "not_applicable")
    (by_if,) = best_of_rows(chosen, held)
    assert by_if.value[-1].value == pytest.approx(0.3)  # of sample 1
    (summed,) = best_of_rows([*chosen, *more], held, weights={"IF": 0.5, "CC": 0.5})
    assert summed.chosen == "reward" and summed.value[-1].value == pytest.approx(0.9)  # of sample 2
    failed = rows({1: (0.9, 0.9), 2: (0.5, None), 3: (0.1, 0.1)}, "IF", "failed")
    assert best_of_rows(failed, held) == []
