"""The labelling page in a browser, by its keyboard, while its server is killed. Needs playwright
(the extra `dev`) and an installed Chromium; nothing is downloaded."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.label.questions import BAD, SKIPPED, read_questions
from editr2.label.serve import Page, address, server_of
from editr2.label.store import Store
from editr2.label.summary import people
from editr2.serving import listen

pytest.importorskip("uvicorn", reason="needs uvicorn: editr2[label]")
IDLE = "body:not([data-busy])"
SERVE = """
import sys
from pathlib import Path
from editr2.label.questions import read_questions
from editr2.label.serve import Page, address, serve
from editr2.label.store import Store
from editr2.serving import listen
store, listening = Store(Path(sys.argv[1])), listen(int(sys.argv[2]))
store.ask(read_questions(Path(sys.argv[1])))
print(address(store, listening), flush=True)
serve(Page(store), listening)
"""


class Server:
    """On one port, as a process of its own; as `editr2 label` without what that imports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", SERVE, str(self.folder), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.port = int(self.url.split(":")[2].split("/")[0])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def killable(folder: Path):
    server = Server(folder)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def serving(folder: Path, **more):
    """On a thread, which begins at once. Gives the store and the address."""
    store = Store(folder)
    store.ask(read_questions(folder))
    listening = listen(0)
    server = server_of(Page(store, **more))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield store, address(store, listening)
    finally:
        server.should_exit = True
        thread.join()
        store.close()


def questions(folder: Path, count: int, outputs: int = 2, **more) -> Path:
    for k in range(outputs):
        Image.fromarray(np.full((8, 8, 3), 25 * k, np.uint8)).save(folder / f"{k}.png")
    row = {"image": "0.png", "outputs": [f"{k}.png" for k in range(outputs)]}
    lines = [{"id": f"q{n:03d}", "instruction": f"no. {n}"} | row | more for n in range(count)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def pressed(page, key: str) -> None:
    """And what comes of it is on the page."""
    page.keyboard.press(key)
    page.wait_for_selector(IDLE)


def begun(browser, url: str, who: str, **context):
    page = browser.new_context(**context).new_page()
    page.set_default_timeout(20_000)
    page.goto(f"{url}?who={who}")
    page.wait_for_selector("#keys button, #finished:not([hidden]), #person:visible")
    return page


@pytest.mark.parametrize(
    "count", [12, pytest.param(200, marks=[pytest.mark.exhaustive, pytest.mark.slow])]
)
def test_no_vote_is_lost_when_the_server_is_killed_twice(browser, tmp_path, count):
    with killable(questions(tmp_path, count)) as server:
        page = begun(browser, server.url, "lefty")
        asked = []
        for n in range(count):
            asked.append(int(page.evaluate("document.body.dataset.number")))
            if n in (count // 3, 2 * count // 3):
                server.kill()
                page.keyboard.press("ArrowLeft")  # nobody is there to hear it
                page.wait_for_selector("#problem:not([hidden])")
                assert "sent again" in page.inner_text("#problem")
                server.start()
                page.wait_for_selector(f"{IDLE}:not([data-number='{asked[-1]}'])")
            else:
                pressed(page, "ArrowLeft")
        page.wait_for_selector("#finished:not([hidden])")
        assert page.inner_text("#count") == f"{count} of {count}"
        page.context.close()
    store = Store(tmp_path)
    votes = store.votes()
    order = [f"q{number - 1:03d}" for number in asked]
    assert [vote.question for vote in votes] == order and len(set(order)) == count
    assert all(vote.answer[vote.shown[0]] == 0 for vote in votes)
    (lefty,) = people(votes)
    assert lefty.side[0] == 1 and lefty.one_sided
    best = Counter(vote.answer for vote in votes)
    assert 0 < best[0, 1] < count  # as the sides were drawn, not always one output


def test_a_vote_that_nobody_had_when_both_were_killed_is_sent_by_the_next_page(browser, tmp_path):
    with killable(questions(tmp_path, 3)) as server:
        page = begun(browser, server.url, "anna")
        server.kill()
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#problem:not([hidden])")
        page.close()
        server.start()
        again = page.context.new_page()
        again.goto(server.url)  # it knows who it is
        again.wait_for_selector("#count:text-is('1 of 3')")
        again.context.close()
    (vote,) = Store(tmp_path).votes()
    assert vote.person == "anna" and vote.answer[vote.shown[1]] == 0


def test_every_key_says_what_it_shows(browser, tmp_path):
    principles = [{"text": "Is it red?", "kind": "follow"}, {"text": "Kept?", "kind": "keep"}]
    folder = questions(tmp_path, 6, principles=principles)
    with serving(folder, principles=True) as (store, url):
        page = begun(browser, url, "")
        page.fill("#person", "Anna B.")
        pressed(page, "Enter")
        page.wait_for_selector("#question:not([hidden])")
        overall = ["ArrowLeft", "ArrowRight", "ArrowDown", "ArrowUp"]
        for key in overall:
            pressed(page, key)
            assert page.inner_text("#principle") == "1 of 2Is it red?"
            pressed(page, "ArrowLeft")
            pressed(page, "Backspace")  # one step back only
            pressed(page, "ArrowDown")
            pressed(page, "ArrowUp")
        pressed(page, " ")
        pressed(page, "ArrowLeft")
        pressed(page, "ArrowRight")
        pressed(page, "ArrowRight")
        page.wait_for_selector("#finished:not([hidden])")
        pressed(page, "Backspace")  # the last vote again, and skipped now
        page.wait_for_function("document.querySelector('#count').innerText == '5 of 6'")
        pressed(page, " ")
        page.context.close()
        votes = store.votes()
    assert {vote.person for vote in votes} == {"Anna B."} and len(votes) == 6
    by_side = [
        vote.answer if isinstance(vote.answer, str) else tuple(vote.answer[k] for k in vote.shown)
        for vote in votes
    ]
    assert by_side == [(0, 1), (1, 0), (0, 0), BAD, SKIPPED, SKIPPED]
    assert [vote.principles for vote in votes] == [((0, 0), BAD)] * 4 + [()] * 2


def test_several_outputs_are_ranked(browser, tmp_path):
    with serving(questions(tmp_path, 3, outputs=4)) as (store, url):
        page = begun(browser, url, "anna")
        for key in ("3", "1", "=", "4"):
            pressed(page, key)
        pressed(page, "Enter")
        for key in ("2", "Backspace", "1", "2", "3", "4"):  # the last one needs no Enter
            pressed(page, key)
        pressed(page, "ArrowUp")
        page.wait_for_selector("#finished:not([hidden])")
        page.context.close()
        votes = store.votes()
    said = [
        vote.answer if isinstance(vote.answer, str) else [vote.answer[k] for k in vote.shown]
        for vote in votes
    ]
    assert said == [[1, 2, 0, 1], [0, 1, 2, 3], BAD]


@pytest.mark.parametrize(
    ("width", "outputs", "scheme"),
    [
        (1280, 2, "light"),
        (400, 9, "dark"),
        pytest.param(400, 2, "light", marks=pytest.mark.exhaustive),
        pytest.param(1280, 9, "dark", marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_is_cut_off_and_nothing_from_elsewhere_is_asked_for(
    browser, tmp_path, width, outputs, scheme
):
    said = "Replace the antidisestablishmentarianism on the left by a very red cup " * 2
    folder = questions(tmp_path, 1, outputs, instruction=said, earlier=["first this", "then that"])
    with serving(folder) as (_, url):
        context = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
        page = begun(browser, url, "anna", **context)
        seen = []
        page.on("request", lambda request: seen.append(request.url))
        page.reload()
        page.wait_for_selector("#keys button")
        page.wait_for_load_state("networkidle")
        wide = page.evaluate(
            "Math.max(document.documentElement.scrollWidth, ...[...document.body.querySelectorAll"
            "('*')].map((one) => one.getBoundingClientRect().right))"
        )
        assert wide <= width and all(each.startswith((url, "data:")) for each in seen)
        assert len(seen) > outputs and not any(".png" in each for each in seen)
        page.context.close()


def test_the_page_of_a_run_that_waits_goes_on_by_itself(browser, tmp_path):
    folder = questions(tmp_path, 1)
    with serving(folder) as (store, url):
        page = begun(browser, url, "anna")
        pressed(page, "ArrowLeft")
        page.wait_for_selector("#finished:not([hidden])")
        one = store.question(1).question
        store.ask([type(one)(**{**vars(one), "id": "new"})], waiting=True)
        page.wait_for_selector("#question:not([hidden])")
        pressed(page, "ArrowLeft")
        assert len(store.votes(["new"])) == 1
        page.context.close()
