"""Aggregates of benchmarks against numbers counted by hand, and what a summary says of the rest."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from editr2.benchmarks import paper
from editr2.benchmarks.measures import measures
from editr2.benchmarks.rows import Row, read_rows
from editr2.benchmarks.summary import references, summarise, write
from editr2.benchmarks.table import Benchmark, Reference
from editr2.benchmarks.text import legend, lines
from editr2.errors import DataError
from editr2.report.intervals import interval
from editr2.report.paired import difference, estimate, mean
from editr2.sessions import Session, Turn

IMAGE = np.zeros((2, 2, 3), np.uint8)
STATES = {"n": "not_applicable", "f": "failed", "m": "missing"}


def rows_of(said, way="multipass", metric="IF", tasks="abc", modes=None, sample=1):
    """said: by session what was said of its turns, a number or a letter of a state; of a turn's
    image several in a single pass: a tuple."""
    rows = []
    for name, turns in said.items():
        mode = (modes or {}).get(name)
        for t, given in enumerate(turns, 1):
            several = given if isinstance(given, tuple) else (given,)
            for j, value in enumerate(several, t - len(several) + 1):
                state, value = (STATES[value], None) if value in STATES else ("judged", value)
                why = None if state == "judged" else f"{state}, it says"
                fixed = (state, value, why, tasks[j - 1], mode, len(turns), sample)
                rows.append(Row(name, way, t, j, metric, *fixed))
    return rows


def sessions_of(said, tasks="abc"):
    """Those that rows are of."""
    return [
        Session(name, IMAGE, tuple(Turn("do it", task=tasks[t]) for t in range(len(turns))))
        for name, turns in said.items()
    ]


def benchmark(headline=(), **given):
    return Benchmark("The bench", None, None, headline, **given)


# Sessions of two turns: every state is there, before and behind a 0.
FOLLOW = {
    **{"p": [1, 1], "q": [1, 0], "r": [0, "f"], "s": [1, "m"]},
    **{"t": ["n", 1], "u": ["f", 1], "v": [0, 0]},
}
KEEP = {
    **{"p": [1, 0.25], "q": [1, 1], "r": [1, "n"], "s": [1, "m"]},
    **{"t": [1, 0.81], "u": [1, 1], "v": [1, "f"]},
}
MODES = {name: "cm" if name in "pqr" else "cu" for name in FOLLOW}
SAID = [*rows_of(FOLLOW, modes=MODES), *rows_of(KEEP, metric="CC", modes=MODES)]

COUNTED = [
    # IF of turn 2: 1, 0, 1, 1, 0 of p, q, t, u, v.
    ("turns", "IF@1", 3 / 5, "5 1 1 0"),
    ("turns", "IF@2", 3 / 5, "5 0 1 1"),
    ("turns", "IF@last", 3 / 5, "5 0 1 1"),
    ("turns", "IF@2/mode=cm", 1 / 2, "2 0 1 0"),
    ("turns", "IF/task=b", 3 / 5, "5 0 1 1"),
    ("turns", "CC@2", (0.25 + 1 + 0.81 + 1) / 4, "4 1 1 1"),
    # Of turn 2 p and t are done, q, r and v not; s and u are not known, and r rests on a failure.
    ("edival", "success@1", 3 / 5, "5 1 1 0"),
    ("edival", "success@2", 2 / 5, "4 0 2 1"),
    ("edival", "marginal@2", 3 / 5, "5 0 1 1"),
    ("edival", "O_of_means@2", (2 / 5 * 3.06 / 4) ** 0.5, "3 0 3 1"),
    # 0.5 of p, 0 of q, 0.9 of t, 0 of v whatever its CC; that of r does not apply.
    ("edival", "O_of_roots@2", 1.4 / 4, "3 0 3 1"),
]


@pytest.mark.parametrize(("kind", "key", "value", "counts"), COUNTED)
def test_aggregates_are_those_counted_by_hand(kind, key, value, counts):
    found = measures(kind, SAID, list(FOLLOW))[key]
    assert estimate(found.statistic).value == pytest.approx(value)
    assert " ".join(str(n) for n in found.counts.values()) == counts


KINDS = {"k1": [0.8], "k2": ["f"], "k3": [0.6], "l1": [0.2], "l2": ["n"], "l3": ["m"]}
GROUPED = [
    # The mean over kinds counts a kind with one image as much as one with two.
    ("SC", (0.7 + 0.2) / 2, "3 1 1 1"),
    ("SC_of_images", 1.6 / 3, "3 1 1 1"),
    ("SC/task=k", 0.7, "2 0 1 0"),
    ("O", ((0.8**0.5 + 0.6**0.5) / 2 + 0.2**0.5) / 2, "3 1 1 1"),
]


@pytest.mark.parametrize(("key", "value", "counts"), GROUPED)
def test_a_mean_over_kinds_of_edit(key, value, counts):
    rows = [
        replace(row, task=row.image[0])
        for metric, said in (("SC", KINDS), ("PQ", {name: [1.0] for name in KINDS}))
        for row in rows_of(said, metric=metric)
    ]
    found = measures("gedit", rows, list(KINDS))[key]
    assert estimate(found.statistic).value == pytest.approx(value)
    assert " ".join(str(n) for n in found.counts.values()) == counts


def image_rate(said, t):
    """`get_summary` of analysis.ipynb of github.com/TianyuCodings/EdiVal at a7bbdecc, restated, of
    the lists of `image_rate.json`, to which its `eval.py` adds the turns that there are."""
    return np.mean([np.all([x for x in turns if x != "m"][:t]) for turns in said.values()])


def test_edival_counts_as_its_notebook_does():
    """`image_rate` and `task_rate` of both passes: of complete answers the same numbers."""
    rng = np.random.default_rng(0)
    tasks = {f"s{n}": rng.permutation(list("abc")) for n in range(40)}
    chain = {name: [int(x > 0) for x in rng.integers(0, 4, 3)] for name in tasks}
    joined = {
        name: [tuple(int(x > 0) for x in rng.integers(0, 4, t)) for t in (1, 2, 3)]
        for name in tasks
    }
    rows = {
        way: [row for name in tasks for row in rows_of({name: said[name]}, way, "IF", tasks[name])]
        for way, said in (("multipass", chain), ("singlepass", joined))
    }
    multi, single = (measures("edival", of, list(tasks)) for of in rows.values())
    for t in (1, 2, 3):
        task_rate = {task: [] for task in "abc"}
        for name, turns in chain.items():
            task_rate[tasks[name][t - 1]].append(turns[t - 1])
        expected = {
            f"success@{t}": image_rate(chain, t),
            f"marginal@{t}": np.mean([x for rates in task_rate.values() for x in rates]),
            **{f"marginal@{t}/task={task}": np.mean(task_rate[task]) for task in "abc"},
        }
        lists = {name: turns[t - 1] for name, turns in joined.items()}
        by_task = {
            task: [x for n, one in lists.items() for x, of in zip(one, tasks[n]) if of == task]
            for task in "abc"
        }
        expected_single = {
            f"success@{t}": np.mean([np.all(one) for one in lists.values()]),
            f"marginal@{t}": np.mean([one[-1] for one in lists.values()]),
            f"task_rate@{t}": np.mean([x for one in lists.values() for x in one]),
            **{f"task_rate@{t}/task={task}": np.mean(by_task[task]) for task in "abc"},
        }
        for found, values in ((multi, expected), (single, expected_single)):
            for key, value in values.items():
                assert estimate(found[key].statistic).value == pytest.approx(value), key
    # There a turn that is missing is passed over, and the session done without it.
    holed = {"a": [1, "m", 1], "b": [0, 1, 1]}
    ours = measures("edival", rows_of(holed), list(holed))["success@3"]
    assert image_rate(holed, 3) == 0.5
    assert estimate(ours.statistic).value == 0.0 and ours.counts["missing"] == 1


def test_of_samples_their_mean_counts():
    """√ of every sample, not of the mean; a sample that failed leaves the session the others."""
    ids = ["a", "b"]
    rows = [
        *rows_of({"a": [1.0], "b": [1.0]}),
        *rows_of({"a": [0.0], "b": ["f"]}, sample=2),
        *rows_of({"a": [0.64], "b": [0.36]}, metric="CC"),
        *rows_of({"a": [0.64], "b": [0.36]}, metric="CC", sample=2),
    ]
    found = measures("edival", rows, ids)
    values = {"success@1": (0.5 + 1) / 2, "O_of_roots@1": (0.4 + 0.6) / 2}
    for key, value in values.items():
        assert estimate(found[key].statistic).value == pytest.approx(value)
        assert found[key].counts["failed"] == 1 and found[key].expected == 4


def test_intervals_are_those_of_a_bootstrap_over_sessions():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 30))
    a[3], b[7] = np.nan, np.nan
    other = interval(a[None], 2000)
    found = estimate(mean(a), 2000)
    assert (found.value, found.low, found.high) == pytest.approx(
        (other.mean, other.low, other.high)
    )
    assert found.count == 29
    # Paired: by the sessions that both have, and narrower than either where they go together.
    paired = difference(mean(a), mean(a + 0.1 + 0.01 * b))
    assert paired.value == pytest.approx(np.nanmean(0.1 + 0.01 * b + 0 * a))
    assert paired.count == 28 and paired.high - paired.low < 0.01


WITHHELD = [
    # of 100 sessions so many are each; what the headline says
    ("f" * 2, None),
    ("f" * 3, "of 100 3 failed (3.0%, a headline may miss 2%); most often: failed, it says"),
    ("fmm", "of 100 1 failed and 2 are missing (3.0%, a headline may miss 2%); most often"),
    ("n" * 30, None),
    ("-" * 3, "of 100 3 are missing (3.0%, a headline may miss 2%)"),
    ("n" * 100, "none of 100 was judged"),
    ("-" * 100, "nothing was judged"),
]
"""`-`: there is no row at all."""


@pytest.mark.parametrize(("given", "why"), WITHHELD)
def test_no_headline_where_too_much_is_unknown(given, why):
    said = {f"s{n}": [given[n] if n < len(given) else 1] for n in range(100)}
    rows = rows_of({name: turns for name, turns in said.items() if turns != ["-"]})
    summary = summarise(rows, sessions_of(said), benchmark(("IF@last",)), {})
    (of,) = summary["headline"]["of"]
    assert (of["withheld"] or "").startswith(why or "") and bool(of["withheld"]) == bool(why)
    assert of["value"] == (None if why else 1.0)
    text = "\n".join(lines(summary))
    assert ("withheld" in text) == bool(why)
    if "-" in given[:1] and len(given) < 100:
        counts = summary["passes"]["multipass"]["counts"]["IF"]
        assert counts == {"judged": 97, "not_applicable": 0, "failed": 0, "missing": 3}
        assert "3 of 100 images are missing: s0, turn 1; s1, turn 1; s2, turn 1" in text


def test_the_headline_of_another_reward_is_of_its_scores():
    """As of `--against` and `--reward.name`: its names are not those that the benchmark knows."""
    said = {f"s{n}": [1, 0] for n in range(4)}
    rows = [replace(row, metric="warmth") for row in rows_of(said)]
    (of,) = summarise(rows, sessions_of(said), benchmark(("IF@last",)), {})["headline"]["of"]
    assert (of["key"], of["value"], of["withheld"]) == ("warmth@last", 0.0, None)
    known, other = summarise(rows_of(said), sessions_of(said), benchmark(("IF@last", "GA@2")), {})[
        "headline"
    ]["of"]
    assert (known["value"], known["withheld"]) == (0.0, None)
    assert (other["label"], other["value"]) == ("GA, turn 2", None)
    assert other["withheld"] == "this reward gives no such score"


def test_why_a_number_is_withheld_is_of_its_own_score():
    said = {f"s{n}": ["f"] for n in range(9)}
    rows = rows_of(said) + [replace(r, reason="no, CC") for r in rows_of(said, metric="CC")]
    rows = [*rows, *rows_of({"t": [1]}), *rows_of({"t": [1]}, metric="CC")]
    of = summarise(rows, sessions_of({**said, "t": [1]}), benchmark(("CC@1", "IF@1")), {})
    why = [one["withheld"].partition("often: ")[2] for one in of["headline"]["of"]]
    assert why == ["no, CC", "failed, it says"]


def test_a_judge_whose_scores_have_other_names_has_a_headline_of_its_own():
    said = {"a": [1, 0], "b": [1, 1]}
    for names, shown in (("O IF@last", ["O", "IF@last"]), ("O", ["IF@last"])):
        bench = benchmark(names.split())
        of = summarise(rows_of(said), sessions_of(said), bench, {})["headline"]["of"]
        assert [one["key"] for one in of] == shown and of[-1]["value"] == 0.5


ROW = {"image": "a", "pass": "multipass", "turn": 2, "metric": "IF", "state": "judged", "turns": 3}
NO_ROWS = [
    ({"turn": 0}, "1: asked 0, turn 0, turns 3, sample 1"),
    ({"asked": 3}, "1: asked 3, turn 2, turns 3, sample 1"),
    ({"turns": 1}, "1: asked 2, turn 2, turns 1, sample 1"),
    ({"sample": 0}, "1: asked 2, turn 2, turns 3, sample 0"),
    ({"sample": True}, "1: sample: True"),
    ({"asked": "2"}, "1: asked: '2'"),
    ({"reason": ["x"]}, "1: reason: ['x']"),
    ({"task": 5}, "1: task: 5"),
    ({"value": 2}, "1: value: 2"),
    ({}, "2: IF of 'a', multipass, turn 2, again"),
]


@pytest.mark.parametrize(("change", "said"), NO_ROWS)
def test_lines_that_are_no_rows_are_named(change, said, tmp_path):
    file = tmp_path / "scores.jsonl"
    file.write_text(2 * (json.dumps(ROW | {"value": 1} | change) + "\n"))
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}:{said}")


def test_a_table_of_two_says_how_many_sessions_each_has_and_the_wider_side():
    """Nine of ten are 1: the interval goes further down than up."""
    of = []
    for count in (10, 12):
        said = {f"s{n}": [0 if n == 0 else 1] for n in range(count)}
        of.append(summarise(rows_of(said), sessions_of(said), benchmark(), {}))
    table = paper.paper_table(of)
    assert table.title.endswith(", 10 and 12 sessions of 1 turn")
    one = of[0]["passes"]["multipass"]["measures"]["IF@1"]
    down, up = one["value"] - one["low"], one["high"] - one["value"]
    assert down > up and f"at most {down:.3f} to either side" in " ".join(table.notes)
    assert paper.paper_table(of[:1]).title.endswith(", 10 sessions of 1 turn")


def test_what_scores_of_the_field_are_called_is_said():
    said = {"s0": [1], "s1": [0]}
    rows = [*rows_of(said), *rows_of(said, metric="GA"), *rows_of(said, metric="warmth")]
    told = legend(summarise(rows, sessions_of(said), benchmark(), {}))
    assert told.startswith("IF: instruction following") and "GA: global awareness" in told
    assert "CC" not in told and "warmth" not in told
    told = legend(summarise(rows, sessions_of(said), benchmark(scale=100.0), {}))
    assert told.startswith("scores are out of 100; IF: ")


def test_exposure_is_of_the_sessions_that_both_passes_have():
    chain = {"a": [1, 0], "b": [1, "m"], "c": [1, 1], "d": [1]}
    exact = {"a": [1, 1], "b": [1, 0], "c": [1, 1], "d": [0]}
    rows = [*rows_of(chain), *rows_of(exact, way="exact")]
    summary = summarise(rows, sessions_of(chain), benchmark(scale=100.0), {})
    found = summary["exposure"]["exact"]
    # Of turn 2 a and c: 0 - 1 and 1 - 1. Of the last turn of one-turn sessions d: 1 - 0.
    assert (found["IF@2"]["value"], found["IF@2"]["n"]) == (-50.0, 2)
    assert (found["IF@last/turns=1"]["value"], found["IF@last/turns=1"]["n"]) == (100.0, 1)
    assert "-50.00 [-100.00, +0.00]" in "\n".join(lines(summary))


FACTS = {"judge": "openai/GPT-4.1-mini", "prompts": "of the checkout x (aaaabbbbcccc)"}
COMPARED = [
    ({}, None),
    ({"rules": "as released"}, None),
    ({"rules": "mended"}, "the rules are mended"),
    ({"judge": "Qwen2-VL-7B"}, "the judge is Qwen2-VL-7B, theirs gpt-4.1"),
    ({"prompts": "ours (aaaabbbb0000)"}, "the prompts are ours"),
    ({"IF, CC: rules": "mended"}, "the rules are mended"),
    ({"IF: judge": "Qwen2-VL-7B"}, "the judge is openai/GPT-4.1-mini, Qwen2-VL-7B"),
]


@pytest.mark.parametrize(("given", "why"), COMPARED)
def test_figures_of_others_only_beside_what_was_judged_alike(given, why):
    theirs = Reference("Other", "IF@1", 0.25, "a page", "gpt-4.1", ("aaaabbbbcccc",))
    bench = benchmark(("IF@1",), references=(theirs,))
    shown, said = references(bench, FACTS | given)
    assert (bool(shown), (said or "").startswith(why or "")) == (why is None, True)
    said = {"a": [1], "b": [0]}
    about = {"judged": {"facts": FACTS | given}, "editor": "mine_50%"}
    summary = summarise(rows_of(said), sessions_of(said), bench, about)
    text, table = "\n".join(lines(summary)), paper.paper_table([summary])
    for written in (text, paper.markdown(table), paper.latex(table)):
        assert ("Other" in written and "0.25" in written) == (why is None)
    assert r"mine\_50\% & 0.500" in paper.latex(table)


def test_a_table_for_a_paper():
    """A number of which too much is unknown is a dash; what is bold is said by the caller."""
    said = {"a": [1, 1], "b": [0, "f"]}
    summary = summarise(rows_of(said), sessions_of(said), benchmark(), {"editor": "x|y"})
    table = paper.paper_table([summary, summary], ["one", "x|y"], bold={(1, "IF@1")})
    assert paper.markdown(table).splitlines()[2:6] == [
        "|  | IF T1 | IF T2 |",
        "| :-- | --: | --: |",
        "| one | 0.500 | – |",
        r"| x\|y | **0.500** | – |",
    ]
    assert r" & \multicolumn{2}{c}{IF} \\" in paper.latex(table)
    assert r"x|y & \textbf{0.500} & -- \\" in paper.latex(table)


ODD = {
    "no rows": ({"a": [1, 1]}, []),
    "none judged": ({"a": ["f", "m"]}, None),
    "one session": ({"a": [1]}, None),
    "several lengths": ({"a": [1], "b": [1, 0.5, "n"], "c": [0] * 8}, None),
    "a single pass": ({"a": [(1,), (1, 0)]}, None),
}


@pytest.mark.parametrize("kind", ["turns", "edival", "gedit", "imgedit"])
@pytest.mark.parametrize("case", ODD)
def test_whatever_there_is_can_be_written(case, kind, tmp_path):
    said, rows = ODD[case]
    tasks = "abcabcab"
    given = rows_of(said, tasks=tasks) + rows_of(said, metric="CC", tasks=tasks)
    bench = benchmark(("IF@last", "success@2", "IF"), measures=kind)
    sessions = sessions_of(said, tasks)
    summary = summarise(given if rows is None else rows, sessions, bench, {"seed": float("nan")})
    write(tmp_path / "summary.json", summary)
    text = (tmp_path / "summary.json").read_text()
    assert "NaN" not in text and json.loads(text) == summary
    printed = lines(summary, ["a file"])
    assert max(map(len, printed)) <= 100 and printed[-1] == "wrote a file"
    table = paper.paper_table([summary])
    written = paper.write(tmp_path, table)
    assert [file.name for file in written] == ["table.md", "table.tex"]
    if case == "several lengths" and kind == "turns":
        found = summary["passes"]["multipass"]["measures"]
        assert [found[f"IF@last/turns={n}"]["value"] for n in (1, 3, 8)] == [1.0, None, 0.0]
        assert found["IF@2"]["value"] == 0.25
        assert [column.sub for column in table.columns][:3] == ["1 turn", "3 turns", "8 turns"]
