"""The second stage of a benchmark: a row for every score that there is to be, the same ones however
it is asked, on however many processes, and wherever it was killed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from editr2.benchmarks import judging
from editr2.benchmarks.judging import FIRST, judge
from editr2.benchmarks.rows import Row, read_rows
from editr2.errors import UserError
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Item, Score
from editr2.rewards.panel import Panel
from editr2.rewards.record import Record, request_key
from editr2.run.processes import Processes
from editr2.sessions import Session, Turn

SIZE = 4


def pixels(*of: int | str) -> np.ndarray:
    return np.frombuffer(
        (request_key(of=of) * SIZE * SIZE).encode()[: SIZE * SIZE * 3], np.uint8
    ).reshape(SIZE, SIZE, 3)


def session(name: str, turns: int = 2) -> Session:
    told = tuple(Turn(f"edit {t + 1} of {name}", task="ab"[t % 2]) for t in range(turns))
    return Session(name, pixels(name), told, "cm")


class Folder:
    """Images of sessions; `absent` have none."""

    def __init__(
        self, folder: Path, sessions: list[Session], absent: tuple[tuple[str, int], ...] = ()
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for one in sessions:
            for t in range(len(one.turns)):
                if (one.id, t) not in absent and not self.file(one, t).exists():
                    Image.fromarray(pixels(folder.name, one.id, t)).save(self.file(one, t))

    def file(self, session: Session, turn: int) -> Path:
        return self.folder / f"{session.id}_{turn}.png"

    def of(self, session: Session) -> list[Path | None]:
        files = [self.file(session, t) for t in range(len(session.turns))]
        return [file if file.exists() else None for file in files]

    def read(self, session: Session, turn: int) -> np.ndarray:
        return np.asarray(Image.open(self.file(session, turn)))


class Scripted:
    """Scores that follow from all that is asked, and from the seed. what: `log`, a file that every
    call leaves a line in; `seeded`; `fails`, of (session, turn); `dies` and `down`, the number of
    the call of this process from which on."""

    names = ("IF", "CC", "GA", "SC")

    def __init__(self, log: Path | None = None, *, concurrency: int | None = 1, **script: Any):
        self.by_turn, self.batch, self.concurrency = True, 1, concurrency
        self.file, self.how = log, script
        self.count = itertools.count(1)  # of several threads no two get the same number

    def judge(self, items: list[Item]) -> list[list[dict[str, Score]]]:
        return [[self.score(item, turn) for turn in item.asked] for item in items]

    def score(self, item: Item, turn: int) -> dict[str, Score]:
        call = next(self.count)
        if call == self.how.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.file is not None:
            line = f"{item.session.id} {turn}\n".encode()
            handle = os.open(self.file, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
            os.write(handle, line)
            os.close(handle)
        if call >= self.how.get("down", sys.maxsize):
            raise ConnectionError("nobody is there")
        if self.how.get("fails", lambda *_: False)(item.session.id, turn):
            raise ValueError("cannot be read")
        seed = item.seed if self.how.get("seeded", True) else 0
        return scores(item.session.turns[turn], item.before(turn), item.images[turn], seed)


def scores(turn: Turn, before: np.ndarray, image: np.ndarray, seed: int = 0) -> dict[str, Score]:
    """GA applies to "b" alone."""
    key = request_key(of=(turn.instruction, before.tolist(), image.tolist(), seed))
    said = {
        name: Score(int(key[8 * n : 8 * n + 8], 16) / 2**32, f"for {name}")
        for n, name in enumerate(Scripted.names)
    }
    return said if turn.task == "b" else said | {"GA": Score.not_applicable()}


class Peers(Processes):
    """One or two processes without a process group."""

    def __init__(self, index: int = 0, other: Any = None) -> None:
        self.lockstep, self.other, self.place = None, other, index

    count = property(lambda self: 1 if self.other is None else 2)  # type: ignore[assignment]
    index = property(lambda self: self.place)  # type: ignore[assignment]

    def gather(self, items: list[Any]) -> list[Any]:
        if self.other is None:
            return items
        self.other.send(items)
        theirs = self.other.recv()
        return items + theirs if self.index == 0 else theirs + items


def run(
    out: Path,
    sessions: list[Session],
    reward: Any,
    processes: Processes | None = None,
    *,
    images: dict[str, list[Any]] | None = None,
    digest: str = "d",
    **options: Any,
) -> list[Row]:
    processes = processes or Peers()
    record = Record(out, index=processes.index)
    panel = Panel(
        [adapt(one) for one in (reward if isinstance(reward, list) else [reward])], record
    )
    images = images or {"multipass": [Folder(out.parent / "images", sessions)]}
    said: list[str] = []
    options.setdefault("progress", said.append)
    try:
        return judge(
            out / "scores.jsonl",
            sessions,
            images,
            panel,
            processes,
            seed=3,
            digest=digest,
            **options,
        )
    finally:
        record.close()


def children(count: int, work: Callable[[Processes], None]) -> list[int]:
    """The exit codes of so many processes; when one dies, the others are killed, as a launcher
    does."""
    ends = list(multiprocessing.Pipe()) if count == 2 else [None]
    started = {}
    for index, end in enumerate(ends):
        if (pid := os.fork()) == 0:
            try:
                work(Peers(index, end))
                os._exit(0)
            except UserError:
                os._exit(2)
            finally:
                os._exit(1)
        started[pid] = index
    codes, until = [0] * count, time.monotonic() + 60
    while started:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in started:
            codes[started.pop(pid)] = os.waitstatus_to_exitcode(status)
        late = time.monotonic() > until
        if late or any(codes):
            for pid in started:
                os.kill(pid, signal.SIGKILL)
        assert not late
        time.sleep(0.005)
    return codes


def asked(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines() if log.exists() else ())


def content(out: Path) -> bytes:
    assert sorted(file.name for file in out.glob("scores*")) == ["scores.jsonl", "scores.of.json"]
    return (out / "scores.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------ rows

FORMS: dict[str, Callable[[], Any]] = {
    "by turn, in threads": lambda: Scripted(concurrency=3, seeded=False),
    "by turn": lambda: Scripted(concurrency=None, seeded=False),
    "whole, in threads": lambda: whole(3),
    "whole": lambda: whole(None),
    "a function": lambda: a_function,
    "keywords": lambda: Keywords,
}


def whole(concurrency: int | None) -> Scripted:
    reward = Scripted(concurrency=concurrency, seeded=False)
    reward.by_turn, reward.batch = False, None
    return reward


class SessionForm:
    names = Scripted.names

    def __call__(self, session: Session, images: np.ndarray) -> list[dict[str, Score]]:
        before = [session.image, *images]
        return [scores(turn, before[t], images[t]) for t, turn in enumerate(session.turns)]


class Keywords:
    names = Scripted.names

    def __call__(self, sessions: Any, images: Any, **_: Any) -> Any:
        return [SessionForm()(*one) for one in zip(sessions, images, strict=True)]


a_function = SessionForm()


def exact(session: Session) -> np.ndarray:
    return np.stack([pixels("exact", session.id, t) for t in range(len(session.turns))])


def expected_of(one: Session, absent: int | None) -> dict[tuple[Any, ...], Any]:
    """By hand: (pass, image, asked, metric) -> what is scored, or why there is nothing."""
    own = {
        w: [pixels(w, one.id, t) for t in range(3)] for w in ("multipass", "singlepass", "exact")
    }
    source, truth, found = one.image, exact(one), {}

    def put(way: str, t: int, j: int, names: str, before: np.ndarray, gap: int | None) -> None:
        said = scores(one.turns[j], before, own[way][t])
        for name in names.split():
            score = said[name]
            state = score.value if score.applies else "not_applicable"
            found[way, t + 1, j + 1, name] = state if gap is None else f"no image of turn {gap + 1}"

    for t in range(3):
        gone = absent is not None and t >= absent
        before = own["multipass"][t - 1] if t else source
        put("multipass", t, t, "IF CC GA SC", before, absent if gone else None)
        here = absent if t == absent else None
        for j in range(t + 1):
            put("singlepass", t, j, "IF CC SC" if j == t else "IF SC", source, here)
        put("exact", t, t, "IF CC GA SC", truth[t - 1] if t else source, here)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_score_that_is_to_be_has_a_row(form, tmp_path):
    sessions = [session("whole", 3), session("gap", 3)]
    ways = ("exact", "singlepass", "multipass")  # rows come in the order of the table
    images = {way: [Folder(tmp_path / way, sessions, (("gap", 1),))] for way in ways}
    rows = run(tmp_path / "out", sessions, FORMS[form](), images=images, exact=exact)
    found = {(r.image, r.way, r.turn, r.asked, r.metric): r for r in rows}
    assert len(found) == len(rows)
    expected = {
        (one.id, *key): value
        for one in sessions
        for key, value in expected_of(one, 1 if one.id == "gap" else None).items()
    }
    assert set(found) == set(expected)
    for key, row in found.items():
        value = expected[key]
        if isinstance(value, float):
            assert (row.state, row.value) == ("judged", round(value, 6)), key
            assert row.reason == f"for {row.metric}"
        elif value == "not_applicable":
            assert (row.state, row.value) == (value, None) and row.reason
        else:
            assert (row.state, row.reason) == ("missing", value), key
        assert (row.mode, row.turns, row.sample) == ("cm", 3, 1)
        assert row.task == ("b" if row.asked == 2 else "a")
    assert rows == read_rows(tmp_path / "out/scores.jsonl")
    assert [*dict.fromkeys(r.way for r in rows)] == ["multipass", "singlepass", "exact"]
    assert [*dict.fromkeys(r.image for r in rows)] == ["whole", "gap"]


def test_one_turn_that_fails_is_one_turn_and_several_samples_are_told_apart(tmp_path):
    sessions = [session(f"s{n}") for n in range(3)]
    samples = [Folder(tmp_path / f"sample{n}", sessions) for n in (1, 2)]
    reward = Scripted(fails=lambda name, turn: (name, turn) == ("s1", 1))
    rows = run(tmp_path / "out", sessions, reward, images={"multipass": samples})
    failed = {(r.image, r.turn, r.sample): r.reason for r in rows if r.state == "failed"}
    assert [*failed] == [("s1", 2, 1), ("s1", 2, 2)] and "cannot be read" in failed["s1", 2, 1]
    assert [r.sample for r in rows if r.image == "s0"] == [1] * 8 + [2] * 8
    values = {r.sample: r.value for r in rows if (r.image, r.turn, r.metric) == ("s0", 1, "IF")}
    assert values[1] != values[2]


# ------------------------------------------------------------------------------------ the same


def many() -> list[Session]:
    return [session(f"s{n}", 1 + n % 3) for n in range(9)]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[bytes, Counter[str]]:
    folder = tmp_path_factory.mktemp("whole")
    run(folder / "out", many(), Scripted(folder / "log"))
    return content(folder / "out"), asked(folder / "log")


@pytest.mark.parametrize("concurrency", [None, 5])
def test_threads_and_company_do_not_matter(concurrency, whole_run, tmp_path):
    assert max(whole_run[1].values()) == 1 and len(whole_run[1]) == 18
    out = tmp_path / "out"
    run(out, many(), Scripted(concurrency=concurrency))
    assert content(out) == whole_run[0]
    few = run(tmp_path / "few", many()[5:2:-1], Scripted(concurrency=concurrency))
    mine = [row for row in read_rows(out / "scores.jsonl") if row.image in ("s3", "s4", "s5")]
    assert sorted(few, key=str) == sorted(mine, key=str)


@pytest.mark.parametrize(("count", "concurrency"), [(1, None), (1, 3), (2, 3)])
def test_a_stage_that_was_killed_goes_on_to_the_same_file(count, concurrency, whole_run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    Folder(tmp_path / "images", many())

    def work(dies: int | None) -> Callable[[Processes], None]:
        def go(processes: Processes) -> None:
            mine = dies if processes.index == count - 1 else None
            run(out, many(), Scripted(log, concurrency=concurrency, dies=mine), processes)

        return go

    kills = (5, 3)[: 3 - count]  # how much is left to one of two after a kill is nobody's to say
    for dies in kills:
        assert -signal.SIGKILL in children(count, work(dies))
        assert not (out / "scores.jsonl").exists()
    before = asked(log)
    assert 0 < len(before) < 18
    with max(out.glob("scores.*.part.jsonl"), key=lambda p: p.stat().st_size).open("ab") as part:
        part.write(b'{"session": "s8", "seen": "')  # what a kill leaves of a line
    assert children(count, work(None)) == [0] * count
    assert content(out) == whole_run[0]
    again = [call for call, times in asked(log).items() if times > 1]
    assert set(asked(log)) == set(whole_run[1])
    assert len(again) <= len(kills) * count * (concurrency or 1)  # those that were under way


def test_a_kill_at_any_file_operation_loses_nothing(whole_run, tmp_path):
    """Before each opening, renaming and removing of a file of scores, in a start that judges anew
    what failed."""
    expected = [line for line in whole_run[0].splitlines() if line < b'{"image": "s4']
    events = ("open", "os.rename", "os.remove")
    sessions = many()[:4]
    seen = {"multipass": [Folder(tmp_path / "images", sessions)]}
    failing = Scripted(fails=lambda name, turn: (name, turn) == ("s2", 1))
    run(tmp_path / "first", sessions, failing, images=seen)
    for n in range(1, 100):
        out = tmp_path / str(n)
        shutil.copytree(tmp_path / "first", out)

        def dying(processes: Processes, out: Path = out, n: int = n) -> None:
            left = [n]

            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                if event in events and "scores" in str(arguments[0]):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            run(out, sessions, Scripted(out / "log"), processes, images=seen)

        died = children(1, dying) != [0]
        run(out, sessions, Scripted(out / "log"), images=seen)
        assert content(out).splitlines() == expected
        assert set(asked(out / "log")) == {"s2 1"}
        if not died:
            break
    assert 10 < n < 99


# --------------------------------------------------------------------------------- begun again


def test_what_failed_is_asked_again_and_nothing_else(whole_run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    lost = ("s2 1", "s5 0", "s7 1")
    rows = run(out, many(), Scripted(log, fails=lambda *at: "{} {}".format(*at) in lost))
    assert sum(row.state == "failed" for row in rows) == 3 * 4
    log.unlink()
    run(out, many(), Scripted(log))
    assert asked(log) == Counter(lost)
    assert content(out) == whole_run[0]
    log.unlink()
    at = (out / "scores.jsonl").stat().st_mtime_ns
    run(out, many(), Scripted(log))
    assert not log.exists() and (out / "scores.jsonl").stat().st_mtime_ns == at


def test_scores_that_were_there_stay_without_the_record_too(tmp_path):
    out = tmp_path / "out"
    one = run(out, many(), Scripted(fails=lambda *at: at == ("s2", 1)))
    for path in out.glob("judges*"):
        path.unlink()
    two = run(out, many(), Scripted(seeded=False))
    assert {(b.image, b.turn) for a, b in zip(one, two, strict=True) if a != b} == {("s2", 2)}


def test_a_disk_that_has_room_for_half_a_session_is_full(tmp_path, monkeypatch):
    def half(file: int, said: bytes, write: Any = os.write) -> int:
        return write(file, said[:9] if b'"session"' in said[:20] else said)

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(UserError, match=r"scores\.jsonl: No space left on device"):
        run(tmp_path / "out", many(), Scripted())


def test_of_another_digest_everything_begins_anew(whole_run, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    run(out, many(), Scripted(log, seeded=False), digest="other")
    other = content(out)
    for path in out.glob("judges*"):
        path.unlink()
    children(1, lambda processes: run(out, many(), Scripted(log, dies=9), processes))
    log.unlink()
    (out / "scores.1.part.jsonl").write_text('{"of": "other"}\n{"session": "s0", "rows": []}\n')
    run(out, many(), Scripted(log))
    assert content(out) == whole_run[0] != other
    log.unlink()
    run(out, many(), Scripted(log, concurrency=2), digest="third")  # a setting of the judge's own:
    assert asked(log) == whole_run[1]  # no answer of the other on record is one of this


def test_images_that_were_made_again_are_judged_again(tmp_path):
    out, log, sessions = tmp_path / "out", tmp_path / "log", many()
    images = Folder(tmp_path / "images", sessions, (("s4", 1),))
    before = run(out, sessions, Scripted(log), images={"multipass": [images]})
    assert {(r.image, r.turn) for r in before if r.state == "missing"} == {("s4", 2)}
    log.unlink()
    Folder(tmp_path / "images", sessions)  # the one that was missing
    Image.fromarray(pixels("another")).save(images.file(sessions[5], 0))
    after = run(out, sessions, Scripted(log))
    assert set(asked(log)) == {"s4 1", "s5 0", "s5 1", "s5 2"}
    changed = {(r.image, r.turn) for r, b in zip(after, before, strict=True) if r != b}
    assert changed == {("s4", 2), ("s5", 1), ("s5", 2)}


# ---------------------------------------------------------------------------------------- down


@pytest.mark.parametrize("concurrency", [None, 4])
@pytest.mark.parametrize("down", [1, 20])
def test_a_judge_that_is_down_stops_the_stage_and_loses_nothing(down, concurrency, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    sessions = [session(f"s{n}", 1) for n in range(60)]
    with pytest.raises(UserError) as caught:
        run(out, sessions, Scripted(log, concurrency=concurrency, down=down))
    assert "no score IF, CC, GA, SC for 4 sessions, one after the other" in str(caught.value)
    assert "nobody is there" in str(caught.value) and "\n" not in str(caught.value)
    overtaken = (concurrency or 1) - 1  # the last one with an answer may be so many further on
    ahead = (concurrency or 0) + FIRST
    assert sum(asked(log).values()) <= down - 1 + overtaken + FIRST + ahead + 1
    again = tmp_path / "again"  # calls of the first may still be on their way to its log
    rows = run(out, sessions, Scripted(again))
    assert sum(asked(again).values()) == 60 - (down - 1) and len(rows) == 60 * 4
    run(tmp_path / "straight", sessions, Scripted())
    assert content(out) == content(tmp_path / "straight")


def test_sessions_that_nobody_can_judge_are_no_judge_that_is_down(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    sessions = [session(f"s{n}", 1) for n in range(20)]
    bad = {f"s{n}" for n in range(3, 17)}
    how = {"fails": lambda name, _: name in bad}
    for _ in range(2):  # begun again there are none but those, and the judge is asked another
        rows = run(out, sessions, Scripted(log, **how))
        assert {row.image for row in rows if row.state == "failed"} == bad
    assert asked(log)["s0 0"] + asked(log)["s1 0"] > 2
    before = content(out)
    with pytest.raises(UserError, match="no score IF"):
        run(out, sessions, Scripted(down=1))
    assert (out / "scores.jsonl").read_bytes() == before


def test_one_of_two_judges_that_is_down_is_named(tmp_path):
    other = Scripted(down=1)
    other.names = ("PQ",)
    with pytest.raises(UserError, match="no score PQ for"):
        run(tmp_path / "out", many(), [Scripted(), other])


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_sessions_than_it_takes_are_no_scores_either(count, tmp_path):
    sessions = many()[:3]
    Folder(tmp_path / "images", sessions)
    down = [Scripted(down=1), Scripted(down=1)]
    codes = children(count, lambda p: run(tmp_path / "out", sessions, down[p.index], p))
    assert codes == [2] * count
    # Where the other has scores, they are sessions that could not be judged.
    down[0] = Scripted()
    codes = children(count, lambda p: run(tmp_path / "out", sessions, down[p.index], p))
    assert codes == [0] * count


def test_it_says_now_and_then_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "SAID_EVERY", 0.02)

    class Slow(Scripted):
        def score(self, item: Item, turn: int) -> dict[str, Score]:
            time.sleep(0.01)
            return super().score(item, turn)

    said: list[str] = []
    reward = Slow(fails=lambda name, turn: (name, turn) == ("s1", 0))
    run(tmp_path / "out", many(), reward, progress=said.append)
    assert len(said) > 2 and said[-1].startswith("judged 9 of 9 sessions in ")
    assert said[-1].endswith(", 4 scores failed")
    counts = [int(line.split()[1]) for line in said]
    assert counts == sorted(counts) and len(set(counts)) > 2
