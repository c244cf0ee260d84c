"""Ctrl-C and SIGTERM save what is done, a folder has one run, and what is said is true."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

from editr2.cli import main as cli
from editr2.run.checkpoint import latest_checkpoint, load_checkpoint
from editr2.run.lock import LockedError, RunLock
from editr2.run.stop import NAMES, Stopped

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def runs(beside) -> ModuleType:
    return beside("killed_runs")


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    with runs.dying_at(0, lambda: None) as passed:
        return runs.train_once(
            tmp_path_factory.mktemp("whole") / "run", checkpoint={"every": 99}
        ), passed


@pytest.fixture(autouse=True)
def hearing():
    """Whoever started the tests may have had SIGHUP ignored, as nohup does, or SIGINT, as a shell
    does for what it starts in the background, and a run keeps to it."""
    heard = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


FINISHED = ("step: before", "step: after", "append: before", "_write_folder: after")
"""Points at which what was begun is finished; at others it is given up, since no weight has
changed."""

# The point, which of its passings, and the iterations done there: all of them are saved, though
# checkpoint.every is 99.
STOPS = [
    ("evaluate: before", 1, 0),  # before the first iteration: nothing to save
    ("check_failures: before", 3, 2),
    ("accumulate_gradient: after", 2, 1),
    ("step: after", 2, 2),
    ("_write_folder: after", 1, 3),
    ("evaluate: after", 5, 3),
]
MORE_STOPS = [
    ("judge: after", 1, 0),
    ("evaluate: before", 2, 1),
    ("draw_strips: after", 1, 0),
    ("draw_strips: after", 2, 3),
    ("step: before", 2, 2),
    ("append: before", 7, 3),  # train row 2: the iteration is over
    ("build_report: before", 1, 3),
]


@pytest.mark.parametrize(
    "name, which, done",
    [*STOPS, *(pytest.param(*stop, marks=pytest.mark.exhaustive) for stop in MORE_STOPS)],
)
def test_a_signal_anywhere_saves_what_is_done(runs, whole, tmp_path, name, which, done, capfd):
    """And the same command goes on to what one leaves that was never stopped."""
    uninterrupted, passed = whole
    number = [i for i, p in enumerate(passed, 1) if p == name][which - 1]
    run, signum = tmp_path / "run", list(NAMES)[number % 3]
    with (
        pytest.raises(Stopped) as caught,
        runs.dying_at(number, lambda: signal.raise_signal(signum)),
    ):
        runs.train_once(run, checkpoint={"every": 99})
    assert caught.value.signum == signum and not caught.value.at_once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    said = str(caught.value)
    assert said.startswith(f"stopped by {NAMES[signum]}; {run} ")
    found = latest_checkpoint(run / "checkpoints")
    if done:
        assert (
            load_checkpoint(found).iteration == done
            and f"saved at iteration {done} of 3; the same command" in said
        )
    else:
        assert found is None and "no finished iteration yet; the same command begins again" in said
    assert ("stopping when this step is done" in capfd.readouterr().err) is (name in FINISHED)
    runs.train_once(run, checkpoint={"every": 99})
    assert runs.record(run) == runs.record(uninterrupted)
    a, b = (load_checkpoint(r / "checkpoints" / "step_000003") for r in (uninterrupted, run))
    assert all(
        str(getattr(a, part)) == str(getattr(b, part)) for part in ("tensors", "optimizer", "rng")
    )


def test_what_is_saved_are_the_live_weights_wherever_an_exchange_was_left(
    runs, whole, tmp_path, monkeypatch
):
    """A signal between two instructions of an exchange leaves the module with some of the other
    weights."""
    uninterrupted, passed = whole
    policy = runs.tiny()
    weight = policy.module.llm2vae.weight

    def halfway() -> None:
        weight.data = torch.zeros_like(weight)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(runs, "tiny", lambda: policy)
    number = [i for i, p in enumerate(passed, 1) if p == "check_failures: before"][
        2
    ]  # outside of every other exchange
    with pytest.raises(Stopped), runs.dying_at(number, halfway):
        runs.train_once(tmp_path / "run", checkpoint={"every": 99})
    monkeypatch.undo()
    runs.train_once(tmp_path / "run", checkpoint={"every": 99})
    assert runs.record(tmp_path / "run") == runs.record(uninterrupted)


def test_a_second_ctrl_c_stops_at_once(runs, tmp_path):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with runs.dying_at(0, lambda: None) as passed:
        runs.train_once(tmp_path / "whole", checkpoint={"every": 1})
    number = [i for i, p in enumerate(passed, 1) if p == "step: after"][1]
    with pytest.raises(
        Stopped, match="stopped at once; .* is saved at iteration 1 of 3; the same"
    ) as caught:
        with runs.dying_at(number, twice):
            runs.train_once(tmp_path / "run", checkpoint={"every": 1})
    assert caught.value.at_once and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").name == "step_000001"


def test_a_program_with_handlers_of_its_own_keeps_them(runs, tmp_path):
    heard: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with runs.dying_at(5, lambda: signal.raise_signal(signal.SIGTERM)):
            runs.train_once(tmp_path / "run", train={"iterations": 1})
    finally:
        signal.signal(signal.SIGTERM, earlier)
    assert heard == [signal.SIGTERM]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def stopped(*_: object, **__: object) -> None:
    raise Stopped(
        signal.SIGTERM,
        "stopped by SIGTERM; runs/x is saved at iteration 7 of 60; the same command goes on",
    )


@pytest.mark.parametrize(
    "command, raises, code, said",
    [
        (
            "train",
            interrupted,
            130,
            "stopped; nothing was trained by this start; the same command begins again, or go",
        ),
        (
            "train",
            stopped,
            143,
            "stopped by SIGTERM; runs/x is saved at iteration 7 of 60; the same command goes on",
        ),
        (
            "check",
            stopped,
            143,
            "stopped; nothing was written; start it again",
        ),  # its run's folder is gone
        ("check", interrupted, 130, "stopped; nothing was written; start it again"),
        ("eval", interrupted, 130, "stopped; no scores were written; the same command begins again"),
        (
            "rollout",
            interrupted,
            130,
            "stopped; what is in --out is not whole; the same command begins again",
        ),
        (
            "reproduce",
            interrupted,
            130,
            "stopped; finished runs stand; the same command trains the rest",
        ),
        (
            "world",
            interrupted,
            130,
            "stopped; what it was writing may not be whole; the same command begins again",
        ),
    ],
)
def test_what_is_said_of_a_command_that_was_stopped(
    monkeypatch, capsys, command, raises, code, said
):
    monkeypatch.setitem(cli.COMMANDS, command, raises)
    assert cli.main([command]) == code
    error = capsys.readouterr().err
    assert error.startswith(said) and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "module, command",
    [("editr2.config.fields", ["world", "--help"]), ("torch", ["train", "--eval.sessions=0"])],
)
def test_ctrl_c_while_the_libraries_load_is_one_line(module, command):
    """Also where an extension module would lose an exception, as torch does while it loads
    numpy."""
    code = f"""
        import builtins, os, signal, sys
        real = builtins.__import__
        def load(name, *rest, **named):
            if name == {module!r}:
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                except KeyboardInterrupt:
                    pass
            return real(name, *rest, **named)
        builtins.__import__ = load
        sys.argv[1:] = {command}
        from editr2.__main__ import main
        sys.exit(main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (130, "stopped while starting: nothing was done\n")


@pytest.mark.slow
def test_sigterm_to_the_command(tmp_path):
    """The real thing: a process, its exit code, its line, and what it left."""
    run = tmp_path / "run"
    flags = [
        "rollout.sessions=1",
        "rollout.siblings=2",
        "rollout.turns=1",
        "rollout.steps=2",
        "rollout.window=1",
    ]
    flags += [
        "eval.sessions=1",
        "eval.strips=1",
        "train.iterations=1000",
        "checkpoint.every=1000",
        f"out={run}",
    ]
    command = [sys.executable, "-m", "editr2.cli", "train", *(f"--{flag}" for flag in flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = ""
    for raw in process.stderr:
        said = raw.decode()
        if said.startswith("iter 3/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    saved = load_checkpoint(latest_checkpoint(run / "checkpoints")).iteration
    assert saved >= 3
    assert (
        said == f"stopped by SIGTERM; {run} is saved at iteration {saved} of 1000; the same "
        f"command goes on from there\n"
    )


# ----------------------------------------------------------------------------------------- the lock

HOLDER = """
    import os, signal, sys
    from pathlib import Path
    from editr2.run.lock import RunLock
    lock = RunLock(Path(sys.argv[1]))
    lock.take(make=True)
    print(os.getpid(), flush=True)
    signal.pause()
"""


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_is_in_nobodys_way(
    runs, tmp_path, capsys, monkeypatch
):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        said = f"{tmp_path / 'run'}: another run is at work in it: pid {pid} on "
        # At once: nothing is loaded, and nothing in the folder is touched.
        monkeypatch.setattr(
            "editr2.rl.loop.open_policy", lambda *_: pytest.fail("loaded before it looked")
        )
        assert cli.main(["train", f"--out={tmp_path / 'run'}"]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith(f"error: {said}") and len(error.splitlines()) == 1 and "--out" in error
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        with pytest.raises(LockedError, match=f"pid {pid} on "):
            runs.train_once(tmp_path / "run")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    runs.train_once(tmp_path / "run", train={"iterations": 1})
    held = json.loads((tmp_path / "run" / ".lock").read_text())
    assert held["pid"] == os.getpid() and held["host"] and held["since"]


def test_a_lock_is_let_go_and_is_not_taken_twice(tmp_path):
    with RunLock(tmp_path / "a") as lock:
        lock.take(make=False)
        assert not (tmp_path / "a").exists()
        lock.take(make=True)
        lock.take(make=True)
        with pytest.raises(LockedError, match=r"accepted: one run a folder; .*another --out"):
            RunLock(tmp_path / "a").take(make=False)
    with RunLock(tmp_path / "a") as lock:
        lock.take(make=False)


def test_a_file_system_without_locks_is_told_and_not_the_end(tmp_path, monkeypatch):
    import errno

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    lock = RunLock(tmp_path)
    lock.take(make=True)
    assert (
        lock.problem is not None and "nothing keeps a second run out of this folder" in lock.problem
    )
