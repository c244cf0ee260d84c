"""The page of `editr2 watch` in a browser, while the run grows and the server is killed. Needs
playwright (the extra `dev`) and an installed Chromium; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.rl.kept import file_name

pytest.importorskip("uvicorn", reason="needs uvicorn: editr2[label]")
SERVE = """
import sys
from pathlib import Path
from editr2 import serving
from editr2.watch.serve import Watch, listen, serve
watch, listening = Watch(Path(sys.argv[1]), "token"), listen(int(sys.argv[2]))
print(serving.address(watch.token, listening), flush=True)
serve(watch, listening)
"""
pytestmark = [pytest.mark.exhaustive, pytest.mark.slow]


class Server:
    """On one port, as a process of its own."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self.start()

    def start(self):
        command = [sys.executable, "-c", SERVE, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def add(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("train: {iterations: 40}\n")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def train(i):
    turns = {"reward_turn": [0.5 + i / 100, 0.4], "if_turn": [0.5, 0.4], "ratio_error": 0.0}
    return {
        "event": "train",
        "iteration": i,
        "loss": 1 / (i + 1),
        **turns,
        "seconds": {"rollout": 3},
    }


def evaluated(folder, at):
    """An evaluation with images of two sessions; an instruction tries to be more than text."""
    kept = folder / "evaluations"
    kept.mkdir(exist_ok=True)
    sheet = np.random.default_rng(0).integers(0, 255, (48, 72, 3), np.uint8)
    Image.fromarray(sheet).save(kept / f"{file_name(at)}.png")
    turn = {"instruction": "<img src=x onerror=alert(1)> paint", "reward": 0.5, "scores": {"IF": 1}}
    lines = [
        {"id": f"s{k}", "mode": "cm", "turns": [turn, turn | {"reason": "the judge is down"}],
         "sheet": {"top": 24 * k, "cell": [24, 24], "outputs": 2, "expected": 0}}
        for k in range(2)
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (kept / f"{file_name(at)}.jsonl").write_text(text)
    reward = [{"mean": 0.5, "se": 0.1}, {"mean": 0.4, "se": 0.1}]
    alarms = {"drift": "saturation of outputs is 3 at turn 2"}
    return {
        "event": "eval",
        "iteration": at,
        "name": "during",
        "reward_turn": reward,
        "alarms": alarms,
    }


def test_the_page_follows_a_run_and_its_server(browser, tmp_path):
    folder = tmp_path / "run"
    server = Server(folder)
    try:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(30_000)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(server.url)
        page.get_by_text("no run has begun there").wait_for()
        add(folder, {"event": "start"}, *map(train, range(9)))
        page.get_by_text("iteration 9 of 40").wait_for()
        drawn = page.locator("#curves figure canvas")
        assert drawn.count() == 2
        row = evaluated(folder, 9)
        add(folder, row, train(9))
        page.get_by_text("iteration 10 of 40").wait_for()
        page.locator(".session img").first.wait_for()
        assert page.locator(".session").count() == 2 and page.locator(".why").count() == 2
        assert page.get_by_text("<img src=x onerror=alert(1)> paint").count() == 4
        assert "saturation of outputs" in page.locator("#notes li[data-kind=alarm]").inner_text()
        page.locator("#more > summary").click()
        assert page.locator("#curves-more figure canvas").count() >= 2
        label = page.locator("#curves .plot").first.get_attribute("aria-label")
        assert label == "Reward by turn, newest: t1 0.59, t2 0.4"
        server.kill()
        page.get_by_text("does not answer").wait_for()
        add(folder, train(10))
        server.start()
        page.get_by_text("iteration 11 of 40").wait_for()
        page.wait_for_selector("#problem", state="hidden")
        assert page.title() == "27 % run"
        for width in (400, 1280):
            page.set_viewport_size({"width": width, "height": 800})
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert problems == []
    finally:
        server.kill()


def axe_core():
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None:
        pytest.skip("needs axe-playwright-python: editr2[dev]")
    return next(Path(found.origin).parent.rglob("axe.min.js")).read_text("utf-8")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_all_of_it_can_be_read_aloud(browser, tmp_path, width, scheme):
    axe, folder = axe_core(), tmp_path / "run"
    add(folder, {"event": "start"}, *map(train, range(9)))
    failed = train(10) | {"failed_scores": 1, "first_failure": "the judge is down"}
    add(folder, evaluated(folder, 9), failed)
    server = Server(folder)
    try:
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme, bypass_csp=True)
        page = context.new_page()
        page.goto(server.url)
        page.locator(".session img").first.wait_for()
        page.locator("#more > summary").click()
        page.evaluate(axe)
        kinds = "['wcag2a', 'wcag2aa', 'best-practice']"
        found = page.evaluate(f"axe.run(document, {{runOnly: {kinds}}})")
        told = [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]}"
            for one in found["violations"]
        ]
        assert told == [] and len(found["passes"]) > 20
    finally:
        server.kill()
