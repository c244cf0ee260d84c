import base64
import hashlib
import html
import html.parser
import io
import json
import math
import random
import re

import pytest
from PIL import Image

from editr2.cli.settings import run_config
from editr2.config import Config, replace_nested
from editr2.config.rules import settings_problems
from editr2.errors import DataError
from editr2.report import build as charts_of
from editr2.report import build_report, charts, pages
from editr2.report.data import load_run
from editr2.report.gallery import thin
from editr2.reproduce import plots
from editr2.rl.rollout import rollout_chunk
from editr2.run.tracking import read_metrics
from editr2.training import train

EVIL = '<script>alert("x")</script> & "quoted" \ud800 \u202e'


class Page(html.parser.HTMLParser):
    """Checks that tags nest and that no script runs but the page's own, and collects what the tests
    ask about. charts: the numbers of each, by title, the first of several."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.words, self.images = [], [], [], []
        self.script, self.data, own = None, [], set(pages.scripts().values())
        self.feed(text)
        assert not self.stack, f"not closed: {self.stack}"
        runs = [code for kind, code in self.data if kind != "application/json"]
        assert runs and all(code in own for code in runs)
        policy = re.search('script-src ([^;"]*)', html.unescape(text))[1].split()
        digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()) for code in runs]
        assert {f"'sha256-{digest.decode()}'" for digest in digests} <= set(policy)
        self.data = [json.loads(code) for kind, code in self.data if kind == "application/json"]
        self.charts = {}
        for one in self.data:
            if isinstance(one, dict):
                self.charts.setdefault(one["title"], one)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        if tag == "script":
            assert not {name for name, _ in attrs} - {"type", "id"}
            self.script = dict(attrs).get("type")
            self.data.append((self.script, ""))
        else:
            self.tags.append((tag, dict(attrs)))
        if tag == "img" and "src" in dict(attrs):
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"{tag} closes another tag"

    def handle_data(self, data):
        if self.stack[-1:] == ["script"]:
            self.data[-1] = (self.script, self.data[-1][1] + data)
        elif "style" not in self.stack:
            self.words.append(data)


def without_scripts(path):
    """The library names its own address in a comment."""
    return re.sub("(?s)<script>.*?</script>", "", path.read_text("utf-8"))


def page_of(folder, **options):
    path = build_report(folder, **options)
    assert path == folder / "report.html"
    assert not list(folder.glob("*.part"))
    return Page(path.read_text("utf-8"))


def train_row(rng, i, turns=3):
    reward = [0.5 + 0.01 * i - 0.1 * t for t in range(turns)]
    return {
        "event": "train",
        "iteration": i,
        "elapsed_s": 5.0 * (i + 1),
        "reward": sum(reward) / turns,
        "reward_turn": reward,
        "if_turn": [rng.random(), None, rng.random()],
        "cc_turn": [0.9] * turns,
        "ga_turn": None,
        "success": 0.1 + 0.01 * i,
        "ratio_error": 0.0 if i % 3 else 2e-7,
        "loss": math.nan if i == 4 else 0.1,
        "kl": None,
        "grad_norm": 0.5,
        "failed_scores": 0,
        "seconds": {"rollout": 3.0, "loss": 2.0},
    }


def eval_row(name, iteration, reward):
    return {
        "event": "eval",
        "name": name,
        "iteration": iteration,
        "sessions": 64,
        "reward_turn": [{"mean": reward - 0.1 * t, "se": 0.02} for t in range(3)],
        "if_turn": [{"mean": 0.6, "se": None}] * 3,
        "cc_turn": [{"mean": None, "se": None}] * 3,
        "success": {"mean": reward / 2, "se": 0.05},
        "by_mode": {"cm": {"reward_turn": [0.4, 0.3, 0.2], "success": 0.25}, "cu": {}},
    }


COMPARISON = {
    "event": "comparison",
    "turn": 3,
    "reward_before": 0.3,
    "reward_after": 0.45,
    "difference": 0.15,
    "se": 0.03,
    "sessions": 64,
}


def write_metrics(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"event": "train", "iterat')


def write_strips(folder, name, changes, size=24, evil=False):
    """Session k has reward 0.5 before and 0.5 + changes[k] after; None: not scored."""
    rng = random.Random(0)
    strips = folder / "strips"
    (strips / name).mkdir(parents=True, exist_ok=True)

    def picture(file):
        data = bytes(rng.randrange(256) for _ in range(size * size * 3))
        Image.frombytes("RGB", (size, size), data).save(strips / name / file)
        return f"{name}/{file}"

    sessions = []
    for k, change in enumerate(changes):
        missing = change is None
        reward = None if missing else 0.5 + (change if name == "after" else 0.0)
        turns = [
            {
                "instruction": EVIL if evil else f"paint it {t}",
                "intent": EVIL if evil else None,
                "reasoning": "because" if t else None,
                "expected": picture(f"e{k}{t}.png") if t == 0 else None,
                "image": picture(f"s{k}t{t}.png"),
                "scores": {"IF": None if missing else 1.0, "CC": 0.25, "GA": math.nan},
                "reward": reward,
                "advantage": -0.5,
                "reason": "judge timed out" if missing else None,
                "masked": missing,
                **({"why": {"IF": EVIL}} if evil else {}),
            }
            for t in range(3)
        ]
        id = EVIL if evil else f"session-{k}"
        sessions.append({"id": id, "mode": "cm", "image": picture(f"s{k}.png"), "turns": turns})
    (strips / f"{name}.json").write_text(json.dumps({"sessions": sessions}))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first run"
    rng = random.Random(0)
    rows = [
        {"event": "start", "device": "cpu", "versions": {"torch": "9.9"}},
        eval_row("before", 0, 0.5),
    ]
    rows += [train_row(rng, i) for i in range(20)]
    write_metrics(folder, [*rows, eval_row("after", 20, 0.65), COMPARISON])
    (folder / "config.yaml").write_text(
        "iterations: 20\nrollout:\n  groups: 8\n  siblings: 6\njudge:\n  api_key: sk-secret\n"
        "  url: http://me:pw@host/v1\n  password: null\n  max_tokens: 300\n"
    )
    for name in ("before", "after"):
        write_strips(folder, name, [0.0, 0.3, -0.2, None, 0.1])
    return folder


def test_the_turns_of_the_headline_are_those_recorded(run):
    settings = run / "config.yaml"  # `rollout.turns` is of drawn sessions, and these have three
    settings.write_text(settings.read_text().replace("  groups: 8\n", "  groups: 8\n  turns: 5\n"))
    assert "8 sessions × 6 siblings × 3 turns" in page_of(run).text


def test_headline(run):
    text = page_of(run).text
    assert "first run" in text
    assert "8 sessions × 6 siblings × 3 turns" in text
    assert "20 of 20" in text and "1m40s" in text
    assert "Reward at turn 3 0.30 ± 0.02 → 0.45 ± 0.02 +0.15 ± 0.03" in text
    assert "paired difference over 64 sessions; 5.0 standard errors" in text
    assert (
        "Session success 0.25 ± 0.05 → 0.33 ± 0.05" in text
        or "Session success 0.25 ± 0.05 → 0.32 ± 0.05" in text
    )
    assert "torch 9.9" in text


def test_a_difference_within_noise_is_called_that(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps({**COMPARISON, "difference": -0.03}) + "\n")
    assert (
        "−0.03 ± 0.03 · paired difference over 64 sessions; only 1.0 standard errors: may be chance"
        in page_of(run).text
    )


def test_what_is_missing_is_said(run):
    text = page_of(run).text
    assert "1 unreadable line of metrics.jsonl was left out" in text
    (run / "strips" / "after" / "s1t0.png").unlink()
    (run / "strips" / "after" / "s2t0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with open(run / "metrics.jsonl", "a") as file:
        row = train_row(random.Random(0), 3) | {"loss": None, "non_finite": ["loss", "if_turn.0"]}
        file.write("\n" + json.dumps(row) + "\n")
    text = page_of(run).text
    assert "2 images could not be read: after/s1t0.png (FileNotFoundError), after/s2t0.png" in text
    assert "if_turn, loss: NaN or infinite in 1 iteration" in text
    assert "1 iteration of metrics.jsonl repeated" in text


def test_sessions_are_all_shown_from_best_to_worst_with_counts(run):
    page = page_of(run)
    headings = re.findall(r"(session-\d) standing rules", page.text)
    assert headings == ["session-1", "session-4", "session-0", "session-2", "session-3"]
    assert "2 better 1 unchanged 1 worse 1 not comparable" in page.text
    assert "All 5 sessions are shown" in page.text
    assert "reward 0.50 → 0.30 −0.20" in page.text
    assert "masked : judge timed out" in page.text
    targets = {attrs.get("id") for _, attrs in page.tags}
    assert {attrs["href"][1:] for tag, attrs in page.tags if tag == "a"} <= targets


def test_thinned_sessions_keep_best_and_worst_and_say_so(run):
    text = page_of(run, max_sessions=3).text
    assert "3 of 5 sessions are shown, evenly spaced" in text
    assert re.findall(r"(session-\d) standing rules", text) == [
        "session-1",
        "session-0",
        "session-3",
    ]
    assert thin(list(range(10)), 4) == [0, 3, 6, 9]


def test_change_counts_only_turns_scored_on_both_sides(run):
    for name, rewards in (("before", [0.3, None, 1.0]), ("after", [0.4, 0.9, None])):
        path = run / "strips" / f"{name}.json"
        strips = json.loads(path.read_text())
        for turn, reward in zip(strips["sessions"][1]["turns"], rewards, strict=True):
            turn["reward"] = reward
        path.write_text(json.dumps(strips))
    pair = load_run(run).pairs[1]
    assert pair.rewards() == (0.3, 0.4) and pair.verdict == "better"


def test_one_offline_file(run):
    page = page_of(run)
    text = without_scripts(run / "report.html")
    assert "http://" not in text.replace("http://(withheld)@host", "") and "https://" not in text
    assert "url(" not in text and "@import" not in text
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object")
        assert not any(name.startswith("on") for name in attrs)
        if tag == "img" and "src" in attrs:  # the one without is where others are shown in large
            data = attrs["src"].removeprefix("data:image/png;base64,")
            Image.open(io.BytesIO(base64.b64decode(data, validate=True))).verify()
        elif "src" in attrs or ("href" in attrs and tag != "a"):
            assert attrs.get("href") == "data:,"
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    # 5 sessions: source, and each turn before and after; one expected image, equal in both passes
    assert len(page.images) == 5 * (1 + 6 + 1)
    assert all(attrs["alt"] for attrs in page.images)
    assert all("pixelated" in attrs["class"] for attrs in page.images)
    assert all(attrs.get("aria-label") for tag, attrs in page.tags if tag == "svg")


def test_text_is_escaped_everywhere(run):
    for name in ("before", "after"):
        write_strips(run, name, [0.1], evil=True)
    (run / "config.yaml").write_text("seed: 1\npolicy: '<b>bold</b>'\n# </pre><script>\n")
    with open(run / "metrics.jsonl", "a") as file:
        start = {"event": "start", "device": EVIL, "versions": {EVIL: EVIL}}
        odd = eval_row("after", 20, 0.6) | {
            "by_mode": {EVIL: {"reward_turn": [0.1], "success": 0.5}}
        }
        phases = train_row(random.Random(0), 20) | {"seconds": {EVIL: 1.0}}
        file.write("\n" + "\n".join(map(json.dumps, (start, odd, phases))) + "\n")
    page = page_of(run)  # Page also checks that the nesting held
    assert not any(tag == "b" and "on" in attrs for tag, attrs in page.tags)
    assert '<script>alert("x")</script> & "quoted"' in page.text
    assert "<b>bold</b>" in page.text


LONG = "The cup is red and stands where it stood. " * 6


@pytest.mark.parametrize(
    ("why", "shown", "folded"),
    [
        ({"IF": "a red cup"}, ["IF a red cup"], 0),
        ({"IF": "a red cup", "CC": LONG}, ["IF a red cup", f"CC {LONG[:100]}", LONG.strip()], 1),
        ({"GA": None}, [], 0),
        ({}, [], 0),
        (["IF"], [], 0),
    ],
)
def test_what_was_said_of_a_score_stands_below_it(run, why, shown, folded):
    before = len([tag for tag, _ in page_of(run).tags if tag == "details"])
    assert "red cup" not in page_of(run).text
    path = run / "strips" / "after.json"
    strips = json.loads(path.read_text())
    strips["sessions"][0]["turns"][0]["why"] = why
    path.write_text(json.dumps(strips))
    page = page_of(run)
    assert all(text in page.text for text in shown)
    assert len([tag for tag, _ in page.tags if tag == "details"]) - before == folded
    assert [attrs for tag, attrs in page.tags if attrs.get("class") == "why"] == [
        {"class": "why"}
    ] * bool(shown)


@pytest.mark.parametrize(
    ("judges", "shown"),
    [
        ({"judge": "qwen", "prompts": "1f2e"}, "Judges judge qwen prompts 1f2e"),
        ({EVIL[:27]: EVIL[:27]}, f"Judges {EVIL[:27]} {EVIL[:27]}"),
        ({}, None),
        (None, None),
        ("qwen", None),
    ],
)
def test_what_the_judges_said_of_themselves_stands_on_the_page(run, judges, shown):
    rows = [{"event": "start", "judges": judges}, eval_row("before", 0, 0.5)]
    write_metrics(run, rows)
    text = page_of(run).text
    assert shown in text if shown else "Judges" not in text


def test_secrets_of_the_configuration_stay_out(run):
    text = page_of(run).text
    assert "sk-secret" not in text and "me:pw" not in text
    assert "api_key: (withheld)" in text and "password: null" in text and "max_tokens: 300" in text


def test_images_outside_the_strips_are_not_read(run):
    Image.new("RGB", (8, 8)).save(run / "private.png")
    path = run / "strips" / "before.json"
    strips = json.loads(path.read_text())
    strips["sessions"][0]["turns"][0]["image"] = "../private.png"
    strips["sessions"][0]["turns"][1]["image"] = str(run / "private.png")
    strips["sessions"][0]["turns"][2]["image"] = "nul\0.png"
    path.write_text(json.dumps(strips))
    page = page_of(run)
    assert "3 images could not be read" in page.text
    assert len(page.images) == 5 * 8 - 3


def test_large_images_are_reduced_and_not_pixelated(tmp_path):
    write_strips(tmp_path, "before", [0.0], size=600)
    page = page_of(tmp_path, max_pixels=512)
    # Of noise, which takes the most bytes, not even 512 px fit on a page of 3 MB.
    (side,) = map(int, re.findall("large images: scaled to ([0-9]+) px or stored as", page.text))
    assert 400 < side < 512 and (tmp_path / "report.html").stat().st_size < 3e6
    for attrs in page.images:
        assert "pixelated" not in attrs["class"]
        picture = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert picture.format == "WEBP" and max(picture.size) == side
        assert attrs["src"].startswith("data:image/webp")


def test_large_images_with_few_bytes_stay_png(tmp_path):
    write_strips(tmp_path, "before", [0.0])
    for path in (tmp_path / "strips" / "before").glob("*.png"):
        Image.new("RGB", (1000, 500), "red").save(path)
    for attrs in page_of(tmp_path, max_pixels=512).images:
        picture = Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))
        assert (picture.format, picture.size) == ("PNG", (512, 256))


def test_evaluations_during_the_run_make_a_curve(run):
    assert "Reward by turn, evaluated" not in page_of(run).text
    with open(run / "metrics.jsonl", "a") as file:
        file.write("\n" + json.dumps(eval_row("during", 10, 0.6)) + "\n")
    page = page_of(run)
    assert "Held-out sessions, 3 evaluations." in page.text
    chart = page.charts["Reward by turn, evaluated"]
    assert chart["x"] == [0, 10, 20]
    assert [one["y"][1] for one in chart["series"]] == [0.6, 0.5, 0.4]
    assert chart["series"][2]["ends"][1] == pytest.approx([0.38, 0.42])


def test_scores_of_other_names_are_drawn_as_the_papers_are(tmp_path):
    start = {"event": "start", "rewards": {"IF": 0.5, "Beauty": 0.5}}
    own = {"beauty_turn": [0.25, 0.5, 0.75]}
    said = {"beauty_turn": [{"mean": m, "se": 0.1} for m in own["beauty_turn"]]}
    trained = [train_row(random.Random(0), i) | own for i in range(3)]
    rows = [eval_row(name, n, 0.5) | said for name, n in (("before", 0), ("after", 3))]
    write_metrics(tmp_path, [start, rows[0], *trained, rows[1]])
    text = page_of(tmp_path).text
    assert text.count("Beauty, turn 3") == 1 and "beauty, turn" not in text
    page = page_of(tmp_path)
    assert list(page.charts)[:4] == ["Reward", "IF", "Beauty", "Session success"]
    drawn = {one["label"]: one for one in page.charts["Scores, mean over turns"]["series"]}
    assert {"Beauty", "IF"} <= set(drawn)
    # A score has one colour on the whole page, and no other has it.
    colours = {name: drawn[name]["colour"] for name in drawn}
    assert len(set(colours.values())) == len(colours)
    assert {one["colour"] for one in page.charts["Beauty"]["series"]} == {colours["Beauty"]}
    assert {one["colour"] for one in page.charts["Reward"]["series"]} == {charts_of.REWARD}


def test_only_metrics(tmp_path):
    write_metrics(tmp_path, [train_row(random.Random(0), i) for i in range(3)])
    text = page_of(tmp_path).text
    assert "There are no strips" in text and "There is no evaluation “before”" in text
    assert "the first and last iteration; not a held-out evaluation" in text


def test_only_before(run):
    (run / "strips" / "after.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:10]))
    text = page_of(run).text
    assert "The strips have no “after” pass" in text and "There is no evaluation “after”" in text
    assert "The run is at iteration 8 of 20" in text
    assert "0.30 ± 0.02 → not evaluated" in text
    assert "All 5 sessions are shown" in text and "In the order of the file" in text


def test_only_strips_and_unpaired_sessions(tmp_path):
    write_strips(tmp_path, "before", [0.0, 0.0])
    write_strips(tmp_path, "after", [0.1])
    text = page_of(tmp_path).text
    assert (
        "There is no metrics.jsonl" in text and "1 session of the strips only in one pass" in text
    )


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"event": "train", "iteration": 0}],
        [
            {
                "event": "train",
                "iteration": 0,
                "seconds": {},
                "reward_turn": [None],
                "ratio_error": 0.0,
            }
        ],
        [
            {"event": "train", "iteration": i, "reward_turn": [0.5] * (i + 1), "seconds": {"a": 0}}
            for i in range(3)
        ],
        [{"event": "eval"}, {"event": "comparison"}, {"event": "other"}, {"no": "event"}],
        [
            {
                "event": "eval",
                "name": "before",
                "reward_turn": [],
                "success": None,
                "by_mode": {"cm": None, "cu": {}},
            }
        ],
        [
            {"event": "eval", "name": "after", "reward_turn": [0.5], "success": {"mean": 1}},
            {**COMPARISON, "se": 0},
        ],
        [
            {"event": "train", "iteration": i, "reward": -1e9 * i, "grad_norm": 1e-12}
            for i in range(300)
        ],
        [
            {"event": "train", "iteration": "x", "seconds": 5},
            {"event": "train", "iteration": 1, "seconds": "x"},
        ],
    ],
)
def test_sparse_and_odd_rows(tmp_path, rows):
    write_metrics(tmp_path, rows)
    page_of(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"sessions": [1]}', '{"sessions": [{"turns": []}]}']
)
def test_unreadable_strips_are_said(tmp_path, text):
    (tmp_path / "strips").mkdir()
    (tmp_path / "strips" / "before.json").write_text(text)
    assert "strips/before.json is not readable" in page_of(tmp_path).text


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "a: 2020-13-45", "a: " + "9" * 5000])
def test_unreadable_settings_are_said(tmp_path, text):
    write_metrics(tmp_path, [])
    (tmp_path / "config.yaml").write_text(text)
    assert "config.yaml is not YAML" in page_of(tmp_path).text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        build_report(tmp_path)


def test_duration_adds_up_over_a_restarted_clock(tmp_path):
    times = [10.0, 20.0, 5.0, 15.0]
    write_metrics(
        tmp_path, [{"event": "train", "iteration": i, "elapsed_s": s} for i, s in enumerate(times)]
    )
    assert load_run(tmp_path).train_seconds() == 35.0


def test_the_same_run_gives_the_same_page(run):
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first


def test_smoothing_keeps_constants_lines_and_gaps():
    assert charts.smooth([2.0] * 5, 3) == [2.0] * 5
    assert charts.smooth([0.0, 1.0, 2.0, 3.0], 3)[1:3] == [1.0, 2.0]
    assert charts.smooth([1.0, None, 3.0], 3) == [1.0, None, 3.0]


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.37, 0.41), (-3e6, 5e6), (0.0, 59.0), (1e-9, 3e-9)]
)
def test_ticks_are_few_and_inside(low, high):
    got = plots.ticks(low, high)
    assert 2 <= len(got) <= 7
    assert all(low - 1e-9 * abs(high) <= t <= high + 1e-9 * abs(high) for t in got)
    assert len({plots.label(t) for t in got}) == len(got)


def test_exact_zeros_have_a_place_on_the_logarithmic_axis():
    x = [1, 2, 3]
    chart = charts.log_chart("Ratio error", x, charts.Series("", [0.0, 1e-7, None], 0))
    assert chart.log and chart.range == (-8, -6) and chart.series[0].kind == "points"
    whole = charts.log_chart("Ratio error", x, charts.Series("", [2e-7, 1e-7, -1.0], 0))
    assert whole.range == (-7, -6) and whole.series[0].y[2] is None
    assert charts.log_chart("Ratio error", x, charts.Series("", [0.0, 0.0, 0.0], 0)) is not None
    assert charts.log_chart("Ratio error", x, charts.Series("", [None] * 3, 0)) is None


def test_a_long_run_is_drawn_as_means_of_neighbours():
    count = 3 * charts.POINTS
    y = [None if i % 3 else float(i) for i in range(count)]
    chart = charts.line_chart("loss", range(count), [charts.Series("loss", y, 0)])
    assert len(chart.x) == charts.POINTS and chart.x[1] == 4.0
    assert list(chart.series[0].y[:3]) == [0.0, 3.0, 6.0]
    assert "the mean of 3 iterations" in chart.note


# ------------------------------------------------------------------------- runs that evaluate less

OFF = "Evaluation was off (eval.sessions: 0)"
BY_GROUPS, BY_EVALUATION = "one rollout of a group", "the rollout that was evaluated"


@pytest.mark.parametrize(
    "evaluation, events, rolled, on_the_page",
    [
        ({"sessions": 0, "strips": 0}, "start train", [], {OFF}),
        ({"sessions": 0, "strips": 2}, "start train", [6, 6], {OFF, BY_GROUPS}),
        (
            {"sessions": 3, "strips": 2, "strips_from": "evaluation"},
            "start eval train eval comparison",
            [3, 3],
            {BY_EVALUATION},
        ),
    ],
)
def test_what_is_not_evaluated_costs_nothing_and_is_said(
    evaluation, events, rolled, on_the_page, tiny_unified, tmp_path, monkeypatch
):
    """rolled: rollouts of every call that evaluation and strips make."""
    made: list[int] = []

    def counted(policy, chunk, *arguments, **options):
        made.append(chunk.rollouts)
        return rollout_chunk(policy, chunk, *arguments, **options)

    monkeypatch.setattr("editr2.rl.evaluate.rollout_chunk", counted)
    values = {
        "out": str(tmp_path),
        "policy": {"intent_tokens": 2},
        "rollout": {"sessions": 2, "siblings": 3, "turns": 2, "steps": 3, "window": 1},
        "train": {"iterations": 1},
        "eval": evaluation,
    }
    config = replace_nested(Config(), values)
    state = {k: v.clone() for k, v in tiny_unified.module.state_dict().items()}
    train(config, policy=tiny_unified)
    rows = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert [row["event"] for row in rows] == events.split() and made == rolled
    page = " ".join((tmp_path / "report.html").read_text().split())
    assert {x for x in (OFF, BY_GROUPS, BY_EVALUATION) if x in page} == on_the_page
    assert "There is no evaluation" not in page and "There are no strips" not in page
    strips = tmp_path / "strips" / "after.json"
    assert strips.exists() == bool(evaluation["strips"])
    if not evaluation["strips"]:
        return
    turns = [s["turns"] for s in json.loads(strips.read_text())["sessions"]]
    assert len(turns) == 2 and all(len(t) == 2 for t in turns)
    alone = [t["advantage"] is None for session in turns for t in session]
    assert all(alone) if evaluation["sessions"] else not any(alone)
    if evaluation["sessions"]:
        shown = [session[-1]["reward"] for session in turns]
        assert shown == pytest.approx(rows[3]["per_session"]["reward"][:2])
    # Strips that are lost are drawn again, of the same weights.
    before, _ = strips.read_text(), strips.unlink()
    for _ in range(2):
        tiny_unified.module.load_state_dict(state)
        train(config, policy=tiny_unified)
    assert strips.read_text() == before and made == [*rolled, rolled[1]]
    assert len(read_metrics(tmp_path / "metrics.jsonl")[0]) == len(rows)


def test_without_evaluation_what_needs_one_is_refused():
    wrong = ["--eval.every=3", "--checkpoint.best=reward", "--train.stop_after=2"]
    wrong += ["--eval.drift.structure=0.4", "--eval.reward=[{name: brightness}]"]
    wrong += ["--eval.strips_from=evaluation"]
    names = ["eval.reward" if "reward=[" in x else x[2:].split("=")[0] for x in wrong]
    config = run_config("editr2 train", "x", ["--eval.sessions=0", *wrong])[0]
    said = list(settings_problems(config))
    assert sorted(line.split(":")[0] for line in said) == sorted(names)
    assert all("(accepted with eval.sessions 0, no evaluation: " in line for line in said)
    for command in ("eval", "rollout"):
        (line,) = settings_problems(run_config("x", "x", ["--eval.sessions=0"])[0], command)
        assert line == f"eval.sessions: 0 (accepted by editr2 {command}: at least 1)"
