"""`editr2 reproduce`: arms as data, runs side by side, rows, and a page whose verdicts are
computed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from editr2.cli.main import main
from editr2.config import Config
from editr2.config.yaml import dump_yaml, load_yaml, to_dataclass
from editr2.errors import ConfigError
from editr2.report.intervals import COVERAGE, Interval, interval
from editr2.reproduce import page, runs
from editr2.reproduce.arms import (
    ARMS,
    BELIEVED,
    EVERY_ARM,
    STUDIES,
    TURNS,
    Settings,
    arm_config,
    evaluation_sampler,
    find_arms,
    study_of,
)
from editr2.reproduce.claims import CLAIMS, STUDY_CLAIMS, Claim, find, verdict
from editr2.reproduce.page import write_page
from editr2.reproduce.rows import fingerprints, make_row, read_rows, results, write_rows
from editr2.rewards.verifier import SHIPPED
from editr2.rl.credit import credit_options
from editr2.rl.evaluate import mean_se
from editr2.run.tracking import read_metrics
from editr2.verifier.model import weights_fingerprint

SMALL = Settings(iterations=1, sessions=4, groups=2, siblings=2)
FLAGS = ["--iterations=1", "--sessions=4", "--groups=2", "--siblings=2"]


def evaluation(ga, followed=None, kept=0.9):
    """An "eval" row as the trainer writes it, for GA [N, T] of 0 and 1."""
    ga = torch.as_tensor(ga, dtype=torch.float64)
    followed = ga if followed is None else torch.as_tensor(followed, dtype=torch.float64)
    scores = {"if": followed, "cc": torch.full_like(ga, kept), "ga": ga}
    even = torch.arange(len(ga)) % 2 == 0
    return {
        "event": "eval",
        **{f"{name}_turn": [mean_se(v) for v in values.T] for name, values in scores.items()},
        "marginal_turn": [mean_se((v >= 1).float()) for v in followed.T],
        "success": mean_se(ga[:, -1]),
        "intents_right": None,
        "per_session": {
            **{name: values.tolist() for name, values in scores.items()},
            "reward": (0.3 * followed + 0.3 * kept + 0.4 * ga)[:, -1].tolist(),
            "success": ga[:, -1].tolist(),
        },
        "by_mode": {
            mode: {
                "ga_turn": ga[of].mean(0).tolist(),
                "success": float(ga[of][:, -1].mean()),
                "sessions": int(of.sum()),
            }
            for mode, of in (("cm", even), ("cu", ~even))
        },
    }


def drawn(rng, sessions, chance):
    """GA that falls with turns: every turn is right with chance^(1/3), so that `chance` are right
    at the last."""
    turn = rng.random((sessions, TURNS)) < np.asarray(chance).reshape(-1, 1) ** (1 / TURNS)
    return np.cumprod(turn, 1)


def synthetic(chances, sessions=400, seeds=3, nft_sampler="ode"):
    """Rows of arms with known chances of a session all right. chances: arm -> chance, or (of cm, of
    cu)."""
    settings, rng, rows = Settings(sessions=sessions), np.random.default_rng(5), {}
    for arm in ARMS:
        if arm.name not in chances:
            continue
        chance = np.resize(
            np.atleast_1d(chances[arm.name]), sessions
        )  # cm and cu sessions alternate
        samplers = (
            ["cps", "ode"]
            if arm.name == "base"
            else [nft_sampler if arm.name.endswith("nft") else "cps"]
        )
        for seed in range(seeds) if arm.trained else [None]:
            for sampler in samplers:
                facts = fingerprints(arm_config(arm, settings, 0, "")) | {"seconds": 60.0}
                row = make_row(
                    arm, seed, sampler, settings, evaluation(drawn(rng, sessions, chance)), **facts
                )
                rows[arm.name, seed, sampler] = row
    return rows


# --------------------------------------------------------------------------------------------- arms


def changed(first, second, prefix=""):
    """Dotted fields in which two configurations differ."""
    names = set()
    for f in dataclasses.fields(first):
        a, b = getattr(first, f.name), getattr(second, f.name)
        if dataclasses.is_dataclass(a):
            names |= changed(a, b, f"{prefix}{f.name}.")
        elif a != b:
            names.add(prefix + f.name)
    return names


@pytest.mark.parametrize("arm", EVERY_ARM, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_run_with_the_same_edits_and_the_same_evaluation(arm):
    config = arm_config(arm, Settings(), 1, "x")
    credit_options(config.credit)
    first = arm_config(ARMS[0], Settings(), 1, "x")
    judged = {} if arm.judge is None else {"sessions": BELIEVED}
    assert config.eval == dataclasses.replace(first.eval, **judged)
    assert config.eval.turns == TURNS and config.train.kl_weight == 0
    assert to_dataclass(json.loads(json.dumps(dataclasses.asdict(config))), Config) == config
    r, f = config.rollout, first.rollout
    assert (
        r.sessions * r.siblings * r.turns == f.sessions * f.siblings * f.turns
        and r.steps == f.steps
    )


def test_every_arm_differs_from_its_neighbour_only_in_what_it_isolates():
    expected = {
        "base-intent": {"policy.intent"},
        "multi-turn": {"rollout.turns", "rollout.sessions"},
        "intent": {"policy.intent"},
        "edit-r2": {"credit.filter"},
        "mt-reward-fusion": {"credit.fusion"},
        "mt-per-turn": {"credit.aggregate", "credit.baseline"},
        "mt-editflow-nft": {"train.loss", "rollout.window", "rollout.shared_noise"},
        "sft": {"reward.name", "reward.options", "eval.sessions"},
        "gcpo": {"reward.options"},
        "early": {"reward.options"},
    }
    expected["shipped"], expected["direct"] = expected["sft"], {"reward.options"}
    expected["sft-broadcast"] = {"credit.aggregate"}
    for judge in ("exact", "shipped", "direct"):
        expected[f"{judge}-unfiltered"] = {"credit.filter"}
        expected[f"{judge}-broadcast"] = {"credit.aggregate"}
        expected[f"{judge}-fusion"] = {"credit.fusion"}
    configs = {arm.name: arm_config(arm, Settings(), 0, "x") for arm in EVERY_ARM}
    for arm in EVERY_ARM:
        if arm.beside is not None:
            assert changed(configs[arm.beside], configs[arm.name]) == expected.pop(arm.name), (
                arm.name
            )
    assert not expected
    options = {name: credit_options(config.credit) for name, config in configs.items()}
    assert options["edit-r2"].filter_reward == 0 and options["intent"].filter_reward is None
    assert options["mt-editflow-grpo"].broadcast and not options["mt-per-turn"].broadcast
    assert {options["mt-editflow-grpo"].fusion, options["mt-per-turn"].fusion} == {"advantage"}
    assert options["sft-broadcast"].broadcast and not options["sft"].broadcast
    for study, claims in STUDY_CLAIMS.items():
        arms = {arm.name for arm in STUDIES[study]}
        assert all({claim.above, claim.below} <= arms for claim in claims)


def test_an_unknown_arm_is_named(capsys):
    assert main(["reproduce", "--arms", "base,best"]) == 2
    assert "--arms: 'best' (accepted: base, " in capsys.readouterr().err
    assert main(["reproduce", "--jobs", "0"]) == 2
    assert [arm.name for arm in find_arms("edit-r2, base")] == ["base", "edit-r2"]


# ---------------------------------------------------------------------------------------- intervals


def test_the_interval_is_the_mean_with_percentiles_of_both_sources():
    values = np.random.default_rng(0).normal(1.0, 2.0, (1, 500))
    found = interval(values)
    assert found.mean == pytest.approx(values.mean())
    # One seed: the bootstrap of a mean, 1.96 standard errors to each side (4,000 resamples: a few
    # per cent off).
    half = 1.96 * values.std() / np.sqrt(500)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)
    assert interval(values) == found
    # Seeds that differ and sessions that do not: the ends, as one resample in 27 is of the lowest
    # seed alone.
    seeds = interval(np.array([[0.1] * 50, [0.2] * 50, [0.3] * 50]))
    assert seeds.by_seed == pytest.approx((0.1, 0.2, 0.3))
    assert (seeds.low, seeds.high) == pytest.approx((0.1, 0.3))
    assert interval(np.full((2, 5), np.nan)) is None
    values[0, :100] = np.nan
    assert interval(values).mean == pytest.approx(np.nanmean(values))


def test_sessions_are_drawn_once_for_all_seeds():
    """Three equal seeds hold no more sessions than one."""
    one = np.random.default_rng(1).normal(size=(1, 300))
    alone, thrice = interval(one), interval(np.repeat(one, 3, 0))
    assert thrice.high - thrice.low == pytest.approx(alone.high - alone.low, rel=0.08)


@pytest.mark.parametrize("deviation", COVERAGE)
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_is_said(deviation):
    """300 experiments of a known difference of two arms with three seeds. Nominal is 95 %; the page
    says what it is."""
    held = covered(deviation, seeds_of_other=3)
    # Three binomial standard errors of 300 experiments are 0.052 at 0.9.
    assert held == pytest.approx(COVERAGE[deviation], abs=0.055)


def test_the_interval_of_a_difference_from_the_start_holds_the_truth():
    """The start has no seeds, and its sessions are the same for every seed of the other arm."""
    assert 0.92 <= covered(0.015, seeds_of_other=1) <= 1


def covered(deviation, seeds_of_other):
    rng, truth, held = np.random.default_rng(2), 0.1, 0
    for _ in range(300):
        hard = (
            rng.random((1, 500)) * 0.5 + 0.15
        )  # the same sessions are hard for both arms and all seeds

        def outcomes(seeds, shift, hard=hard):
            of_seed = rng.normal(0, deviation, (seeds, 1)) * (seeds > 1)
            return (rng.random((seeds, 500)) < hard + shift + of_seed).astype(float)

        found = interval(outcomes(3, truth) - outcomes(seeds_of_other, 0.0), resamples=400)
        held += found.low <= truth <= found.high
    return held / 300


@pytest.mark.parametrize(
    "low, high, said, unordered",
    [
        (0.01, 0.2, "reproduces", "higher"),
        (-0.01, 0.2, "does not show", "no difference shown"),
        (0.0, 0.2, "does not show", "no difference shown"),
        (-0.2, -0.01, "reversed", "lower"),
    ],
)
def test_the_verdict_is_the_sign_of_the_whole_interval(low, high, said, unordered):
    found = Interval((low + high) / 2, low, high, ())
    assert verdict(found) == said and verdict(found, ordered=False) == unordered
    assert verdict(None) == "not run"


def test_a_least_difference_is_reached_by_the_interval_by_the_mean_or_not():
    assert verdict(Interval(0.2, 0.16, 0.24, ()), least=0.15) == "reached"
    assert (
        verdict(Interval(0.2, 0.14, 0.26, ()), least=0.15)
        == "reached on average, not by the interval"
    )
    assert verdict(Interval(0.1, 0.08, 0.12, ()), least=0.15) == "not reached"


# ----------------------------------------------------------------------------------- rows to a page

KNOWN = {
    "base": 0.25,
    "base-intent": 0.35,
    "single-turn": 0.30,
    "multi-turn": 0.45,
    "intent": (0.70, 0.30),
    "edit-r2": (0.72, 0.62),
    "mt-editflow-grpo": 0.30,
    "mt-reward-fusion": 0.30,
    "mt-per-turn": 0.45,
    "mt-editflow-nft": 0.30,
}


def test_known_effects_give_the_right_verdicts(tmp_path):
    rows = synthetic(KNOWN)
    findings = {claim.text: find(claim, results(rows)) for claim in CLAIMS}
    verdicts = {text: f.verdict for text, f in findings.items()}
    assert verdicts["multi-turn RL beats single-turn RL"] == "reproduces"
    assert verdicts["intent beats no intent on cm"] == "reproduces"
    assert verdicts["intent beats no intent on cu"] == "reversed"
    assert verdicts["the filter helps"] == "reproduces"
    assert verdicts["Edit-R2 raises the start with intent by 0.15"] == "reached"
    assert verdicts["advantage fusion beats reward fusion"] == "does not show"
    assert verdicts["broadcast beats per-turn credit"] == "reversed"
    for text, truth in (("intent beats no intent on cm", 0.25), ("the filter helps", 0.17)):
        found = findings[text].difference
        assert found.low < truth < found.high and len(found.by_seed) == 3
    write_rows(tmp_path, rows)
    page = write_page(tmp_path).read_text()
    line = next(line for line in page.splitlines() if line.startswith("| broadcast beats"))
    assert "**reversed**" in line and "−0.1" in line
    assert not [line for line in page.splitlines() if "nan" in line]
    for name in ("reproduction_ga.svg", "reproduction_differences.svg"):
        assert f"({name})" in page
        ElementTree.parse(tmp_path / name)


def test_the_page_is_a_pure_function_of_the_rows_and_keeps_what_was_written_by_hand(tmp_path):
    write_rows(tmp_path, synthetic(KNOWN, sessions=40))
    (tmp_path / "reproduction_notes.md").write_text("Intent *matters* | even here.\n")
    first = write_page(tmp_path).read_text()
    assert "## What we learnt\n\nIntent *matters* | even here.\n\n## Scores" in first
    assert main(["reproduce", "--report-only", "--docs", str(tmp_path)]) == 0
    assert (tmp_path / "reproduction.md").read_text() == first


def test_arms_sampled_differently_are_compared_by_their_gains():
    rows = synthetic({**KNOWN, "mt-editflow-nft": 0.30}, sessions=60)
    (claim,) = (claim for claim in CLAIMS if claim.above == "mt-editflow-nft")
    found = find(claim, results(rows))
    ga = {k: np.array(row["per_session"]["ga"][-1]) for k, row in rows.items()}
    seeds = [
        (ga["mt-editflow-nft", s, "ode"] - ga["base", None, "ode"])
        - (ga["mt-editflow-grpo", s, "cps"] - ga["base", None, "cps"])
        for s in range(3)
    ]
    assert found.gains and found.difference.mean == pytest.approx(np.mean(seeds))
    same = find(claim, results(synthetic(KNOWN, sessions=60, nft_sampler="cps")))
    assert not same.gains


def test_differences_are_taken_over_the_seeds_that_both_arms_have():
    rows = synthetic(KNOWN, sessions=20)
    del rows["multi-turn", 1, "cps"]
    claim = Claim("x", "intent", "multi-turn", "ours")
    assert find(claim, results(rows)).seeds == (0, 2)
    assert find(Claim("x", "intent", "base", "ours"), results(rows)).seeds == (0, 1, 2)
    assert find(Claim("x", "base-intent", "base", "ours"), results(rows)).seeds == (None,)
    kept = {k: row for k, row in rows.items() if k[0] != "multi-turn"}
    assert find(claim, results(kept)).verdict == "not run"


def test_a_page_of_a_part_says_what_is_missing(tmp_path):
    rows = synthetic(
        {name: KNOWN[name] for name in ("base", "intent", "multi-turn")}, sessions=20, seeds=2
    )
    del rows["intent", 1, "cps"]
    write_rows(tmp_path, rows)
    page = write_page(tmp_path).read_text()
    assert "**Incomplete**: without the seeds + intent [1]" in page
    assert "**Not run**: start + intent, single-turn RL" in page and "**not run**" in page


def test_rows_hold_the_evaluation_and_survive_the_file(tmp_path):
    ga = drawn(np.random.default_rng(0), 10, 0.5)
    source = evaluation(ga, followed=np.where(ga > 0, 1.0, 2 / 3), kept=0.98765)
    arm = ARMS[3]
    row = make_row(arm, 1, "cps", SMALL, source, seconds=12.3, threads=1, device="cpu")
    write_rows(tmp_path, {(arm.name, 1, "cps"): row})
    (back,) = results(read_rows(tmp_path))
    assert back.seeds == (1,) and list(back.modes[:2]) == ["cm", "cu"]
    for t in range(TURNS):
        assert back.values("GA", t + 1).mean() == pytest.approx(row["ga_turn"][t], abs=1e-6)
        assert back.values("marginal", t + 1).mean() == pytest.approx(
            row["marginal_turn"][t], abs=1e-6
        )
        assert back.values("CC", t + 1).mean() == pytest.approx(0.98765, abs=5e-4)
    assert row["per_session"]["reward"] == pytest.approx(source["per_session"]["reward"], abs=5e-4)
    assert back.values("GA", mode="cu").mean() == pytest.approx(row["by_mode"]["cu"]["success"])
    # Neither a folder nor the machine's name.
    assert str(tmp_path) not in json.dumps(row) and os.uname().nodename not in json.dumps(
        row["machine"]
    )


def test_rows_of_other_settings_are_not_mixed(tmp_path, capsys):
    rows = synthetic({"base": 0.3}, sessions=4)
    rows["base", None, "ode"]["settings"] = dataclasses.asdict(Settings(iterations=7))
    write_rows(tmp_path, rows)
    assert main(["reproduce", "--report-only", "--docs", str(tmp_path)]) == 2
    assert "rows of 2 settings" in capsys.readouterr().err
    write_rows(tmp_path, synthetic({"base": 0.3}, sessions=4))
    assert (
        main(["reproduce", "--docs", str(tmp_path), "--out", str(tmp_path / "runs"), *FLAGS]) == 2
    )
    assert "rows of other settings" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert main(["reproduce", "--report-only", "--docs", str(tmp_path / "none")]) == 2
    for name, said in (
        ("start", "rows of 2 start "),
        ("config", "several configurations of multi-turn"),
    ):
        rows = synthetic({"base": 0.3, "multi-turn": 0.4}, sessions=4)
        rows["multi-turn", 1, "cps"][name] = "other"
        write_rows(tmp_path, rows)
        assert main(["reproduce", "--report-only", "--docs", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    # All of them of an arm that has since been changed: still a page, but nothing to add to.
    rows = synthetic({"multi-turn": 0.4}, sessions=4, seeds=2)
    write_rows(
        tmp_path,
        {
            k: row | {"config": "earlier", "settings": dataclasses.asdict(SMALL)}
            for k, row in rows.items()
        },
    )
    assert main(["reproduce", "--report-only", "--docs", str(tmp_path)]) == 0
    assert (
        main(["reproduce", "--docs", str(tmp_path), "--out", str(tmp_path / "runs"), *FLAGS]) == 2
    )


# --------------------------------------------------------------------------------------------- runs


STUB = """
import json, pathlib, sys, time, yaml
source, rows, fails, waits = sys.argv[1:5]
config = yaml.safe_load(open(source))
out = pathlib.Path(config["out"])
out.mkdir(parents=True, exist_ok=True)
(out / "pid").write_text(str(__import__("os").getpid()))
time.sleep(float(waits))
if fails and fails in config["out"]:
    sys.exit("error: it broke\\nas it was told to")
(out / "config.yaml").write_text(open(source).read())
with open(out / "calls", "a") as file:
    file.write("x")
(out / "metrics.jsonl").write_text(open(rows).read())
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A trainer that writes a run's rows at once; gives a function that says which arm fails and
    how long all take."""
    ga = drawn(np.random.default_rng(3), 4, 0.5)
    rows = [
        {"event": "start", "iteration": 0, "threads": 1, "device": "cpu"},
        evaluation(ga * 0) | {"name": "before", "iteration": 0},
        {"event": "train", "iteration": 0, "elapsed_s": 2.5},
        evaluation(ga) | {"name": "after", "iteration": 1},
        {"event": "comparison", "iteration": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "stub.py").write_text(STUB)

    def use(fails="", waits=0):
        def command(config_file):
            words = [
                sys.executable,
                tmp_path / "stub.py",
                config_file,
                tmp_path / "rows.jsonl",
                fails,
                waits,
            ]
            return [str(word) for word in words]

        monkeypatch.setattr(runs, "command", command)

    return use


def reproduce(tmp_path, *flags):
    return main(
        ["reproduce", f"--out={tmp_path / 'runs'}", f"--docs={tmp_path / 'docs'}", *FLAGS, *flags]
    )


def test_finished_runs_are_not_run_again_and_more_seeds_are_added(tmp_path, stub, capsys):
    stub()
    arms = "--arms=base,multi-turn,mt-per-turn"
    assert reproduce(tmp_path, arms, "--seeds=1") == 0
    said = capsys.readouterr().out
    assert "multi-turn seed 0: turn-3 GA 0.000 -> " in said and "(2 of 2)" in said
    dated = {k: row | {"date": "2026-01-01"} for k, row in read_rows(tmp_path / "docs").items()}
    write_rows(tmp_path / "docs", dated)  # measured on another day, which stays its date
    before = (tmp_path / "docs" / "reproduction.jsonl").read_text()
    assert reproduce(tmp_path, arms, "--seeds=1") == 0
    assert (tmp_path / "docs" / "reproduction.jsonl").read_text() == before
    assert reproduce(tmp_path, arms, "--seeds=2") == 0
    calls = {path.parent: path.read_text() for path in (tmp_path / "runs").rglob("calls")}
    assert len(calls) == 4 and set(calls.values()) == {"x"}
    rows = read_rows(tmp_path / "docs")
    # The start was never evaluated by itself: it is what both arms began from.
    assert set(rows) == {
        ("base", None, "cps"),
        *((arm, seed, "cps") for arm in ("multi-turn", "mt-per-turn") for seed in (0, 1)),
    }
    assert "2 training seeds" in (tmp_path / "docs" / "reproduction.md").read_text()


def test_a_failed_run_is_reported_the_rest_goes_on_and_the_exit_code_is_1(tmp_path, stub, capsys):
    stub(fails="multi-turn/seed1")
    arms = "--arms=multi-turn,mt-per-turn"
    assert reproduce(tmp_path, arms, "--seeds=2") == 1
    said = capsys.readouterr()
    assert (
        "multi-turn seed 1: failed, exit code 1\n    error: it broke\n    as it was told to"
        in said.out
    )
    assert "failed: multi-turn seed 1" in said.err
    assert len([key for key in read_rows(tmp_path / "docs") if key[1] is not None]) == 3
    assert (
        "**Incomplete**: without the seeds multi-turn RL [1]"
        in (tmp_path / "docs" / "reproduction.md").read_text()
    )
    stub()
    assert reproduce(tmp_path, arms, "--seeds=2") == 0


def test_a_finished_run_of_other_settings_is_refused(tmp_path, stub, capsys):
    stub()
    assert reproduce(tmp_path, "--arms=multi-turn", "--seeds=1") == 0
    (tmp_path / "docs" / "reproduction.jsonl").unlink()
    assert reproduce(tmp_path, "--arms=multi-turn", "--seeds=1", "--iterations=2") == 2
    assert "seed0: holds a finished run of other settings" in capsys.readouterr().err
    yaml = tmp_path / "runs" / "multi-turn" / "seed0.yaml"
    text = yaml.read_text()
    yaml.write_text("# starts from other weights\n" + text.partition("\n")[2])
    assert reproduce(tmp_path, "--arms=multi-turn", "--seeds=1") == 2
    yaml.write_text(text)
    # The same run seen from another working directory is still the same run.
    arm = find_arms("multi-turn")[0]
    config = arm_config(arm, SMALL, 0, "elsewhere")
    (tmp_path / "runs" / "multi-turn" / "seed0" / "config.yaml").write_text(dump_yaml(config))
    assert reproduce(tmp_path, "--arms=multi-turn", "--seeds=1") == 0


def test_runs_start_seed_by_seed_and_share_the_cores(tmp_path, stub, monkeypatch):
    stub()
    started = []
    start = runs._start

    def watched(run, environment):
        started.append((run.seed, run.arm.name, environment["OMP_NUM_THREADS"]))
        return start(run, environment)

    monkeypatch.setattr(runs, "_start", watched)
    monkeypatch.setattr(runs, "cores", lambda: 8)
    assert reproduce(tmp_path, "--arms=multi-turn,intent", "--seeds=2", "--jobs=3") == 0
    order = [(seed, arm, "2") for seed in (0, 1) for arm in ("multi-turn", "intent")]
    assert started == order


def test_the_plotted_start_is_sampled_as_the_arms_are(tmp_path):
    """The start stands in rows of two samplers; its line is compared with theirs."""
    for arm, sampler in (("multi-turn", "cps"), ("mt-editflow-nft", "ode")):
        rows = synthetic({"base": 0.3, arm: 0.4})
        [start] = [
            one for one in results(rows) if one.arm.name == "base" and one.sampler == sampler
        ]
        drawn_as = page._series("base", 0, results(rows))
        assert drawn_as.title == page._title(start, results(rows))


def test_the_shipped_verifier_needs_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--study=judges", "--arms=shipped-broadcast", "--seeds=1", "--out=runs"]
    assert reproduce(tmp_path, *words) == 0
    row = read_rows(tmp_path / "docs")["shipped-broadcast", 0, "ode"]
    assert row["judge"]["name"] == "shipped"
    assert row["judge"]["weights"] == weights_fingerprint(str(SHIPPED))
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert "--study judges --seeds 1" in page and "--verifiers" not in page  # it would be refused
    # With a folder of others it is the same; alone with one, that is a mistake.
    capsys.readouterr()
    assert reproduce(tmp_path, *words, "--verifiers=verifiers") == 2
    assert "rewards none of the arms" in capsys.readouterr().err


def test_a_judged_run_is_scored_by_the_world(tmp_path, capsys, monkeypatch):
    """A verifier is the reward; what the page says of the editor is exact, and so is its start."""
    monkeypatch.chdir(tmp_path)
    verifiers = Path("verifiers")
    (verifiers / "sft").mkdir(parents=True)
    (verifiers / "sft" / "seed0").symlink_to(SHIPPED)
    words = ["--study=judges", f"--verifiers={verifiers}", "--seeds=1", "--out=runs"]
    words.append("--arms=base-intent,sft")
    assert reproduce(tmp_path, *words) == 0
    rows = read_rows(tmp_path / "docs")
    assert set(rows) == {("sft", 0, "ode"), ("base-intent", None, "ode")}  # no sampler of no arm
    judged, start = rows["sft", 0, "ode"], rows["base-intent", None, "ode"]
    for row in (judged, start):
        assert {v for turn in row["per_session"]["ga"] for v in turn} <= {0, 1}
        assert len(row["per_session"]["ga"][0]) == SMALL.sessions
    assert judged["judge"]["name"] == "sft" and "judge" not in start
    assert all(0 < value < 1 for value in judged["judge"]["believed"].values())
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert "What the verifiers believed" in page and "--study judges --verifiers VERIFIERS" in page
    assert study_of(row["arm"] for row in rows.values()) == "judges"
    # The run's folder, and its exact evaluation's, stand: nothing is done again.
    held = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("metrics.jsonl")}
    (tmp_path / "docs" / "reproduction.jsonl").unlink()
    assert reproduce(tmp_path, *words) == 0 and len(held) == 2
    assert held == {p: p.stat().st_mtime_ns for p in held}
    assert read_rows(tmp_path / "docs") == rows
    capsys.readouterr()
    for more, said in (
        (["--arms=gcpo"], f"--verifiers: {verifiers}/gcpo/seed0: no verifier"),
        (["--seeds=2"], f"--verifiers: {verifiers}/sft/seed1: no verifier"),
        (["--study=methods", "--arms=base"], "rewards none of the arms (accepted with --study"),
    ):
        assert reproduce(tmp_path, *words, *more) == 2
        assert said in capsys.readouterr().err
    assert reproduce(tmp_path, "--arms=base", "--out=runs") == 2
    assert "rows of another study" in capsys.readouterr().err
    assert main(["reproduce", "--study=judges", "--arms=sft"]) == 2
    assert "--verifiers: arm sft is rewarded by one (accepted: " in capsys.readouterr().err


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A finished run that a verifier rewarded, without its row; gives it."""
    ga = drawn(np.random.default_rng(3), SMALL.sessions, 0.5)
    monkeypatch.setattr(runs, "evaluate", lambda config: evaluation(ga * 0))
    monkeypatch.setattr(runs, "command", lambda *words: [sys.executable, "-c", "raise OSError"])
    verifiers = tmp_path / "verifiers"
    folder = verifiers / "sft" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    out = tmp_path / "runs" / "sft" / "seed0"
    (arm,) = find_arms("sft", "judges")
    config = arm_config(arm, SMALL, 0, out, verifiers)
    rows = [
        {
            **{"event": "start", "iteration": 0, "threads": 1, "device": "cpu"},
            "judges": {"judge": f"{folder}, in process ({weights_fingerprint(str(folder))})"},
        },
        evaluation(ga * 0) | {"name": "before", "iteration": 0},
        {"event": "train", "iteration": 0, "elapsed_s": 2.5},
        evaluation(ga) | {"name": "after", "iteration": 1},
        {"event": "comparison", "iteration": 1},
    ]
    run = runs.ArmRun(arm, 0, config, SMALL.sessions)
    run.exact.mkdir(parents=True)
    out.mkdir()
    (out / "config.yaml").write_text(dump_yaml(config))
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    exact = evaluation(ga) | {"iteration": 0, "sessions": SMALL.sessions}
    (run.exact / "metrics.jsonl").write_text(json.dumps(exact) + "\n")
    return run


def of_judges(tmp_path, *more, verifiers="verifiers"):
    words = ["--study=judges", f"--verifiers={tmp_path / verifiers}", "--arms=sft", "--seeds=1"]
    return reproduce(tmp_path, *words, *more)


def test_a_row_says_which_weights_judged(tmp_path, judged, capsys):
    """By more than their size, and another verifier's runs and rows are not taken for its own."""
    assert of_judges(tmp_path) == 0, capsys.readouterr()
    before = read_rows(tmp_path / "docs")
    folder = tmp_path / "verifiers" / "sft" / "seed0"
    assert before[judged.key]["judge"]["weights"] == weights_fingerprint(str(folder))
    # Where it lies is nothing of it, of a run that is read again as little as of a row.
    (tmp_path / "verifiers").rename(tmp_path / "elsewhere")
    for file in ("reproduction.jsonl", "none"):
        (tmp_path / "docs" / file).unlink(missing_ok=True)
        assert of_judges(tmp_path, verifiers="elsewhere") == 0, capsys.readouterr()
        assert read_rows(tmp_path / "docs") == before
    # Trained again, to as many bytes.
    (tmp_path / "elsewhere" / "sft" / "seed0" / "model.safetensors").write_bytes(b"two")
    capsys.readouterr()
    assert of_judges(tmp_path, verifiers="elsewhere") == 2
    assert f"{judged.folder}: holds a run that other weights rewarded" in capsys.readouterr().err
    (judged.folder / "metrics.jsonl").unlink()
    assert of_judges(tmp_path, verifiers="elsewhere") == 2
    said = capsys.readouterr().err
    assert "reproduction.jsonl: sft seed 0 was rewarded by other weights than " in said


def test_what_was_trained_by_other_settings_is_not_scored_as_if_by_these(tmp_path, judged, capsys):
    """Where its exact evaluation is still to be made, too, and where that is of other sessions."""
    assert of_judges(tmp_path, "--sessions=3") == 2
    config = dataclasses.replace(
        judged.config, eval=dataclasses.replace(judged.config.eval, sessions=BELIEVED)
    )
    (judged.folder / "config.yaml").write_text(dump_yaml(config))
    capsys.readouterr()
    assert of_judges(tmp_path, f"--sessions={BELIEVED + 1}") == 2
    assert "holds exact scores of 4 sessions (accepted: --sessions 4" in capsys.readouterr().err
    (judged.exact / "metrics.jsonl").unlink()
    assert of_judges(tmp_path, f"--sessions={BELIEVED + 1}", "--iterations=2") == 2
    assert "holds a finished run of other settings" in capsys.readouterr().err


def test_a_verifier_none_of_whose_answers_could_be_read(tmp_path, judged, capsys):
    rows = judged.metrics()
    rows[1]["ga_turn"] = [{"mean": None, "se": None} for _ in range(TURNS)]
    file = judged.folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert of_judges(tmp_path) == 0, capsys.readouterr()
    assert read_rows(tmp_path / "docs")[judged.key]["judge"]["believed"]["before"] is None
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert "| verifier, SFT | – | +" in page.partition("What the verifiers believed")[2]


def test_what_training_said_stays_above_the_exact_evaluation(tmp_path, judged, capsys):
    (judged.exact / "metrics.jsonl").unlink()
    judged.log.write_text("it trained\n")
    assert of_judges(tmp_path) == 1
    assert judged.log.read_text().startswith("it trained\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children(tmp_path, stub, number):
    """As a process of its own: the signal goes to it alone, and its child must not outlive it."""
    stub(waits=60)
    words = runs.command(Path("FILE"))
    code = (
        # A shell's background job, and whatever runs the tests in one, hands on that SIGINT is
        # ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pathlib "
        "import Path; from editr2.cli.main import main; from editr2.reproduce import runs; "
        "import sys; "
        f"runs.command = lambda file: [w.replace('FILE', str(file)) for w in {words!r}]; "
        f"sys.exit(main(['reproduce', '--out={tmp_path / 'runs'}', '--docs={tmp_path / 'docs'}', "
        "'--arms=multi-turn', '--seeds=1', '--iterations=1', '--sessions=4', '--groups=2', "
        "'--siblings=2']))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    pid_file = tmp_path / "runs" / "multi-turn" / "seed0" / "pid"
    try:
        deadline = time.monotonic() + 100
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            assert parent.poll() is None, parent.stderr.read()
            time.sleep(0.05)
        child = int(pid_file.read_text())
        parent.send_signal(number)
        assert parent.wait(20) == 130
    finally:
        parent.kill()
        parent.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_bad_configuration_stops_before_anything_is_trained(tmp_path, monkeypatch):
    bad = dataclasses.replace(ARMS[3], overrides={"credit": {"fusion": "cold"}})
    with pytest.raises(ConfigError, match=r"credit\.fusion: 'cold'"):
        runs.reproduce(tmp_path / "runs", tmp_path / "docs", SMALL, arms=[bad], seeds=1)
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def one_thread():
    """Two threads wait for each other on a busy machine: 40 seconds in place of 2."""
    earlier = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(earlier)


@pytest.mark.slow
def test_a_short_reproduction_from_start_to_page(tmp_path, capsys, one_thread):
    """Two arms of one iteration by the real trainer, with the start's rows from their evaluations.
    One seed: most of the time goes into processes that import torch, and the tests above have
    several seeds."""
    arms = "--arms=base,base-intent,single-turn,edit-r2"
    assert reproduce(tmp_path, arms, "--seeds=1", "--jobs=2") == 0, capsys.readouterr().out
    rows = read_rows(tmp_path / "docs")
    assert len(rows) == 4
    for (arm, seed, sampler), row in rows.items():
        if seed is None:
            continue
        folder = tmp_path / "runs" / arm / f"seed{seed}"
        metrics = read_metrics(folder / "metrics.jsonl")[0]
        (after,) = (m for m in metrics if (m["event"], m.get("name")) == ("eval", "after"))
        assert row["ga_turn"] == pytest.approx(
            [turn["mean"] for turn in after["ga_turn"]], abs=1e-6
        )
        assert len(row["per_session"]["if"]) == TURNS and len(row["per_session"]["if"][0]) == 4
        trained = to_dataclass(load_yaml(folder / "config.yaml")[0], Config)
        assert trained.seed == seed and evaluation_sampler(trained.eval, trained.rollout) == sampler
        # The world's sessions know their mode; the rows recompute it.
        for mode, part in after["by_mode"].items():
            of = [m == mode for m in row["per_session"]["mode"]]
            assert sum(of) == part["sessions"]
            assert np.mean(np.array(row["per_session"]["ga"][-1])[of]) == pytest.approx(
                part["ga_turn"][-1], abs=1e-3
            )
    page = (tmp_path / "docs" / "reproduction.md").read_text()
    assert "2 trained arms, 1 training seed**" in page and "single-turn RL" in page
    # Evaluated by itself, the start is what the runs began from.
    assert reproduce(tmp_path / "alone", "--arms=base-intent", "--seeds=1") == 0
    (alone,) = read_rows(tmp_path / "alone" / "docs").values()
    assert alone["per_session"] == rows["base-intent", None, "cps"]["per_session"]
