"""`editr2 label`: questions, votes, what they say, and the server behind the page (its keyboard and
its looks are in test_label_page)."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import stat
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from editr2.benchmarks.pairs.asking import write_asked
from editr2.benchmarks.pairs.labelled import Comparison, Labelled, Pair, Picture
from editr2.cli.main import main
from editr2.errors import DataError
from editr2.label.export import preferences
from editr2.label.questions import BAD, SKIPPED, Question, read_answer, read_questions
from editr2.label.serve import Page
from editr2.label.store import NAME, Store, Vote
from editr2.label.summary import agreements, alpha, lines, people, said_of, wilson
from editr2.serving import listen
from editr2.sessions import ImageFile, Turn, save_sessions
from editr2.verifier.files import read_preferences
from editr2.worlds.shapes import make_session

KINDS = [{"text": "Is it red?", "kind": "follow"}, {"text": "Is the rest kept?", "kind": "keep"}]


@pytest.fixture
def folder(tmp_path):
    """With images 0.png to 3.png, of which number k is grey of the level k."""
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / f"{k}.png")
    return tmp_path


def written(folder: Path, rows: list[dict], name: str = "questions.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair(**more):
    return {"id": "q", "image": "0.png", "outputs": ["1.png", "2.png"], "instruction": "red"} | more


def asked(folder: Path, count: int, outputs: int = 2) -> Store:
    names = [f"{k}.png" for k in range(outputs)]
    rows = [pair(id=f"q{n}", outputs=names) for n in range(count)]
    store = Store(written(folder, rows))
    store.ask(read_questions(folder))
    return store


def say(store: Store, person: str, number: int, answer, shown=(0, 1), principles=()):
    question = store.question(number).question
    vote = Vote(question.id, person, answer, shown, principles, 1.0)
    store.vote(f"{person} {number} {answer} {os.urandom(4).hex()}", number, vote)


# -------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (pair(outputs=["1.png"]), "1: outputs: 1 (accepted: 2 to 64 images)"),
        (pair(outputs=["1.png", "9.png"]), "no such file (accepted: an image there)"),
        (pair(outputs=["1.png", "../x.png"]), "leads out of"),
        (pair(known=[0, 2]), "known: a list"),
        (pair(known=[0, 0, 1]), "known: a list"),
        (
            pair(known="best"),
            "known: the string 'best' (accepted: bad, skip, or 2 places from 0 on)",
        ),
        (pair(befores=["1.png"]), "befores: 1 (accepted: 2, or absent)"),
        (pair(principles=["Is it red?"]), "principles: a list"),
        (pair(winner=1), "winner: unknown field"),
    ],
)
def test_a_bad_question_is_one_line(folder, row, said, capsys):
    assert main(["label", str(written(folder, [row]))]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_of_pairs_or_edits_asks_each_pair_and_knows_what_was_said(folder):
    row = {"id": "a", "image": "0.png", "win": "2.png", "lose": "1.png", "instruction": "red"}
    (one,) = read_questions(written(folder, [row], "pairs.jsonl"))
    assert [path.name for path in one.outputs] == ["2.png", "1.png"] and one.known == (0, 1)
    (folder / "pairs.jsonl").unlink()
    edits = [
        {"id": f"e{k}", "image": "0.png", "edited": f"{k}.png", "instruction": said}
        for k, said in [(1, "red"), (2, "blue"), (3, "red"), (0, "red")]
    ]
    found = read_questions(written(folder, edits, "edits.jsonl"))
    assert [one.id for one in found] == ["e1+e3", "e1+e0", "e3+e0"]


# ------------------------------------------------------------------------------------------ store


def test_orders_are_random_by_person_and_stay(folder):
    store = asked(folder, 200)
    questions = [one.question for one in store.questions()]
    orders = {who: [store.order(one, who) for one in questions] for who in ("anna", "ben")}
    for of_one in orders.values():
        assert 70 < sum(order == (0, 1) for order in of_one) < 130  # 4 standard deviations
    assert 60 < sum(a == b for a, b in zip(*orders.values())) < 140
    lists = {who: store.left(who)[0] for who in orders}
    assert lists["anna"] != lists["ben"] and sorted(lists["anna"]) == list(range(1, 201))
    store.close()
    again = Store(folder)
    assert again.left("anna")[0] == lists["anna"]
    assert [again.order(one, "ben") for one in questions] == orders["ben"]
    files = list(folder.glob(f"{NAME}*"))
    assert len(files) == 3 and all(stat.S_IMODE(one.stat().st_mode) == 0o600 for one in files)


def test_a_vote_sent_twice_counts_once_and_one_taken_back_is_asked_again(folder):
    store = asked(folder, 3)
    vote = Vote("q0", "anna", (0, 1), (0, 1))
    for _ in range(2):
        store.vote("one name", 1, vote)
    assert len(store.votes()) == 1 and store.left("anna") == (store.left("anna")[0], 1)
    say(store, "anna", 1, BAD)
    assert [vote.answer for vote in store.votes()] == [BAD]
    assert store.undo("anna") == 1 and store.undo("anna") is None and store.votes() == []
    store.vote("one name", 1, vote)  # still the one that was replaced
    assert store.votes() == [] and len(store.left("anna")[0]) == 3


def test_a_question_is_done_when_enough_people_answered(folder):
    store = asked(folder, 2)
    store.ask(
        Question(one.question.id, one.question.image, one.question.outputs, "red", needed=2)
        for one in store.questions()
    )
    say(store, "anna", 1, (0, 1))
    assert 1 in store.left("ben")[0]
    say(store, "ben", 1, SKIPPED)
    assert store.left("cora")[0] == [2]


def test_another_question_of_an_id_that_has_votes_is_refused(folder):
    store = asked(folder, 2)
    say(store, "anna", 1, (0, 1))
    written(folder, [pair(id="q1", instruction="blue")])
    store.ask(read_questions(folder))
    assert store.question(2).question.instruction == "blue"
    written(folder, [pair(id="q0", instruction="blue")])
    with pytest.raises(DataError, match="q0 has votes, and asked something else"):
        store.ask(read_questions(folder))


def _votes_until_killed(folder, told):
    store = Store(folder)
    for number in range(1, 10_000):
        store.vote(f"name {number:08d}", 1 + number % 50, Vote("", f"p{number}", (0, 1), (0, 1)))
        told.send(number)


def test_what_was_acknowledged_is_there_after_sigkill(folder):
    asked(folder, 50).close()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_votes_until_killed, args=(folder, theirs)
    )
    process.start()
    while ours.recv() < 25:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    acknowledged = 25
    while ours.poll():
        acknowledged = ours.recv()
    kept = len(Store(folder).votes())
    assert kept in (acknowledged, acknowledged + 1)  # one may be on the disk and not told yet


def test_a_file_that_is_none_of_ours_is_one_line(folder, capsys):
    (folder / NAME).write_bytes(b"x" * 4096)
    assert main(["label", "report", str(folder)]) == 2
    assert "labels.sqlite: cannot be used: file is not a database" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- summary


def test_a_labeller_who_always_says_left_is_reported(folder):
    store = asked(folder, 40)
    for one in store.questions():
        shown = store.order(one.question, "lefty")
        say(store, "lefty", one.number, tuple(int(k != shown[0]) for k in range(2)), shown)
        shown = store.order(one.question, "anna")  # by chance; she takes either side as often
        say(store, "anna", one.number, (0, 1) if shown[0] == one.number % 2 else (1, 0), shown)
    lefty, anna = people(store.votes())
    assert lefty.side[0] == 1 and lefty.one_sided
    assert anna.side[0] == 0.5 and not anna.one_sided
    said = lines([one.question for one in store.questions()], store.votes())
    assert any("lefty" in line and "position bias" in line for line in said)
    assert not any("anna:" in line and "position bias" in line for line in said)


def test_agreement_by_hand(folder):
    # Krippendorff (2011), Computing Krippendorff's Alpha-Reliability, A: two observers, ten units.
    one, other = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    answers = {0: (0, 1), 1: (1, 0)}
    store = asked(folder, 10)
    for number, (a, b) in enumerate(zip(one, other), 1):
        say(store, "anna", number, answers[a])
        say(store, "ben", number, answers[b])
    said = said_of([], store.votes())
    (both,) = agreements(said)
    assert (both.same, both.pairs) == (6, 10)
    assert alpha(said)[0] == pytest.approx(0.095, abs=5e-4)
    low, high = alpha(said)[1:]
    assert low < 0.095 < high
    assert alpha({key: {"anna": "tie"} for key in said}) is None


def test_wilson_by_the_tables():
    assert wilson(5, 10) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)


def test_what_a_set_says_is_held_against_people(folder, capsys):
    rows = [pair(id=f"q{n}", known=[0, 1] if n else [0, 0]) for n in range(4)]
    store = Store(written(folder, rows))
    store.ask(read_questions(folder))
    for number in range(1, 5):
        say(store, "anna", number, (0, 1))
    store.close()
    assert main(["label", "report", str(folder)]) == 0
    assert "anna and the file: the same of 4 pairs in 75%" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- export


def test_export_is_what_most_prefer_and_the_verifier_reads_it(folder, capsys):
    rows = [pair(id=f"q{n}", principles=KINDS, task="colour") for n in range(6)]
    rows.append(pair(id="four", outputs=[f"{k}.png" for k in (3, 1, 2)]))
    store = Store(written(folder, rows))
    store.ask(read_questions(folder))
    for number, given in {
        1: [(0, 1), (0, 1), (1, 0)],
        2: [(1, 0), (1, 0), (0, 0)],
        3: [(0, 1), (1, 0)],
        4: [BAD, BAD, (0, 0)],
        5: [SKIPPED],
        7: [(1, 0, 1)],
    }.items():
        for person, answer in zip(("anna", "ben", "cora"), given):
            say(store, person, number, answer, tuple(range(len(rows[number - 1]["outputs"]))))
    store.close()
    file, votes = folder / "out" / "pairs.jsonl", folder / "votes.jsonl"
    file.parent.mkdir()
    assert main(["label", "export", str(folder), "--out", str(file), "--votes", str(votes)]) == 0
    said = capsys.readouterr().out
    assert "4 pairs" in said and "1 x people are divided" in said and "2 x ties" in said
    found = {one.id: one for one in read_preferences(file)}
    ends = {
        name: (one.win.edited.path.name, one.lose.edited.path.name, pytest.approx(one.margin))
        for name, one in found.items()
    }
    assert ends == {
        "q0": ("1.png", "2.png", 1 / 3),
        "q1": ("2.png", "1.png", 2 / 3),
        "four/1-2": ("1.png", "3.png", 1),
        "four/2-3": ("1.png", "2.png", 1),
    }
    assert found["q0"].win.principles[0].text == "Is it red?" and found["q0"].win.task == "colour"
    lines_of = [json.loads(line) for line in votes.read_text().splitlines()]
    assert Counter(row["person"] for row in lines_of) == {"anna": 6, "ben": 4, "cora": 3}
    strict = preferences([], [], file, least=0.5)
    assert strict.rows == []


# ----------------------------------------------------------------------------------------- import


def test_a_preference_file_is_asked_blind_and_its_label_known(folder, capsys):
    record = {"prompt": "red", "path_src": "0.png", "path1": "1.png", "path2": "2.png"}
    rows = [record, record | {"tie_case": True}, record | {"choice_dist": [0.2, 0.8]}]
    (folder / "their.json").write_text(json.dumps(rows))
    out = folder / "out"
    assert (
        main(["label", "import", "preferences", str(folder / "their.json"), "--out", str(out)]) == 0
    )
    assert "left out: 1 x" in capsys.readouterr().out
    first, second = read_questions(out)
    assert (first.known, second.known, first.instruction) == ((0, 1), (0, 0), "red")
    levels = [int(np.array(Image.open(path))[0, 0, 0]) for path in (first.image, *first.outputs)]
    assert levels == [0, 1, 2] and first.image.parent == out / "images"


def test_a_ranked_record_is_one_question(folder):
    def of(votes):
        found = Labelled()
        before, *after = (Picture(ImageFile(folder / f"{k}.png"), f"stamp {k}") for k in range(4))
        for name, picture in zip("abc", after):
            found.add("here", name, Turn("red"), before, picture)
        found.comparisons.append(Comparison("r", votes, "s"))
        (one,) = read_questions(write_asked(found, folder / "out").parent)
        return len(one.outputs), one.known

    assert of((Pair("c", "a"), Pair("c", "b"), Pair("a", "b", True))) == (3, (0, 1, 1))
    assert of((Pair("b", "a"), Pair("b", "c"), Pair("a", "c"))) == (3, (0, 1, 2))
    assert of((Pair("a", "b"), Pair("b", "c"))) == (3, None)  # nobody compared a and c
    assert of((Pair("a", "b"), Pair("b", "c"), Pair("c", "a"))) == (3, None)  # a circle


def test_outputs_of_sessions_are_asked_turn_by_turn(folder, capsys):
    sessions = [make_session(0, n, turns=2) for n in range(2)]
    save_sessions(sessions, folder / "set")
    for name, shift in (("a", 10), ("b", 20)):
        (folder / name).mkdir()
        lines = []
        for session in sessions if name == "a" else sessions[:1]:
            turns = []
            for t in range(2):
                image = (session.image.astype(int) + shift + t).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / name / f"{t}.png")
                turns.append({"image": f"{t}.png"})
            lines.append(json.dumps({"id": session.id, "turns": turns}) + "\n")
        (folder / name / "outputs.jsonl").write_text("".join(lines))
    given = [str(folder / "set"), "--outputs", str(folder / "a"), "--outputs", str(folder / "b")]
    assert main(["label", "import", "outputs", *given, "--out", str(folder / "out")]) == 0
    first, second = read_questions(folder / "out")  # the other session has one output
    assert [path.parent.name for path in first.outputs] == ["a", "b"] and not first.befores
    assert second.befores == first.outputs and second.earlier == (first.instruction,)
    assert first.image == second.image and np.array_equal(
        np.array(Image.open(first.image)), sessions[0].image
    )
    assert main(["label", "import", "pairs", *given, "--out", str(folder / "out")]) == 2
    assert "--outputs: accepted with the format outputs" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- server


def test_the_command_serves_a_folder_and_says_where(folder, monkeypatch, capsys):
    pytest.importorskip("starlette")
    seen = []
    monkeypatch.setattr(
        "editr2.label.serve.serve", lambda page, at: seen.append((page, at.getsockname()))
    )
    written(folder, [pair(id="a", principles=KINDS), pair(id="b")])
    flags = ["--port", "0", "--people", "3", "--principles"]
    assert main(["label", str(folder), *flags]) == 0
    ((page, (host, port)),) = seen
    assert host == "127.0.0.1" and page.principles
    said = capsys.readouterr().out
    store = Store(folder)
    assert f"2 questions: http://127.0.0.1:{port}/{store.fact('token')}/" in said
    assert [one.question.needed for one in store.questions()] == [3, 3]
    taken = listen(0)
    port = str(taken.getsockname()[1])
    assert main(["label", str(folder), "--port", port]) == 2
    assert (
        f"--port: {port}: Address already in use (accepted: a free port" in capsys.readouterr().err
    )
    taken.close()


def request(app, path: str, body: dict | None = None, host: str = "127.0.0.1:1"):
    """(status, body) of a request to an ASGI application, without a server."""

    async def asked():
        said = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(body or {}).encode()}

        async def send(message):
            said.append(message)

        path_only, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": "GET" if body is None else "POST",
            "path": path_only,
            "raw_path": path_only.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", host.encode())],
            "server": ("127.0.0.1", 1),
            "client": ("127.0.0.1", 2),
            "scheme": "http",
            "http_version": "1.1",
        }
        await app(scope, receive, send)
        data = b"".join(part.get("body", b"") for part in said[1:])
        return said[0]["status"], data

    return asyncio.run(asked())


@pytest.fixture
def served(folder):
    pytest.importorskip("starlette")
    store = Store(written(folder, [pair(id=f"secret{n}", principles=KINDS) for n in range(20)]))
    store.ask(read_questions(folder))
    page = Page(store, principles=True)
    app, root = page.app(), f"/{store.fact('token')}/"
    return store, lambda path, body=None, **more: request(app, root + path, body, **more)


def test_only_who_has_the_token_and_names_this_machine_is_served(served):
    store, ask = served
    assert ask("")[0] == 200 and b"page.js" in ask("")[1]
    assert ask("", host="evil.example")[0] == 400
    app = Page(store).app()
    for path in ("/", "/next", "/x/next", "/" + "A" * 24 + "/"):
        assert request(app, path)[0] == 404


def test_an_answer_by_sides_is_kept_by_outputs_and_nothing_tells_which_is_which(served):
    store, ask = served
    sides = Counter()
    for _ in range(20):
        status, data = ask("next", {"who": "anna"})
        said = json.loads(data)
        assert status == 200 and b"secret" not in data and b".png" not in data
        one = said["questions"][0]
        levels = []
        for url in one["outputs"]:
            status, image = ask(url)
            assert status == 200
            (folder_image := store.path.parent / "seen").write_bytes(image)
            levels.append(int(np.array(Image.open(folder_image))[0, 0, 0]))
        best = levels.index(2)  # anna likes 2.png, the second output
        sides[best] += 1
        answer = [int(side != best) for side in range(2)]
        body = {"who": "anna", "number": one["number"], "name": f"vote no. {one['number']}"}
        body |= {"answer": answer, "principles": [answer, BAD], "seconds": 0.5}
        assert ask("vote", body)[0] == 200
    assert sides[0] and sides[1]
    votes = store.votes()
    assert {vote.answer for vote in votes} == {(1, 0)} and len(votes) == 20
    assert {vote.principles for vote in votes} == {((1, 0), BAD)}
    assert json.loads(ask("next", {"who": "anna"})[1])["questions"] == []
    undone = json.loads(ask("undo", {"who": "anna"})[1])
    assert undone["undone"] and undone["questions"][0]["number"] == body["number"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"who": ""}, "who: a name"),
        ({"who": "a\u202eb"}, "who: a name"),
        ({"number": 99}, "no such question"),
        ({"answer": [0, 2]}, "2 places"),
        ({"answer": [True, 0]}, "2 places"),
        ({"answer": "left"}, "accepted: bad, skip"),
        ({"principles": [[0, 1]]}, "principles: a list of 2"),
        ({"seconds": -1}, "seconds: a number"),
        ({"name": "x"}, "name: 8 to 80"),
    ],
)
def test_a_vote_that_cannot_be_is_refused_and_not_kept(served, change, said):
    store, ask = served
    body = {"who": "anna", "number": 1, "name": "a vote's name", "answer": [0, 1]}
    body |= {"principles": [[0, 1], [0, 0]], "seconds": 1}
    status, data = ask("vote", body | change)
    assert status == 400 and said in json.loads(data)["error"]
    assert store.votes() == []


def test_answers_have_no_gaps():
    assert read_answer([1, 0, 0], 3) == (1, 0, 0)
    for wrong in ([], [1, 1], [0, -1], [0, 1.0], None, {"0": 1}, "tie"):
        with pytest.raises(ValueError, match="accepted: bad, skip, or 2 places"):
            read_answer(wrong, 2)
