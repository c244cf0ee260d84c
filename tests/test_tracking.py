import errno
import io
import json
import logging
import math

import pytest

from editr2.errors import CheckpointError
from editr2.run.tracking import MetricsLog, Progress, duration, flatten, profile_table, read_metrics


def train(iteration, **extra):
    return {"event": "train", "iteration": iteration, "reward": 0.5, **extra}


def iterations(rows, event="train"):
    return [row["iteration"] for row in rows if row["event"] == event]


def test_rows_come_back_as_written(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [train(0, note="line\u2028separator é"), train(1, reward_turn=[0.1, None])]
    with MetricsLog(path) as metrics:
        for row in rows:
            metrics.append(row)
            assert path.read_bytes().endswith(b"\n")  # on disk before the next, not at close
    assert read_metrics(path) == (rows, 0)


def test_reader_drops_and_counts_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    torn = b'{"event": "train", "iter'
    path.write_bytes(
        b'{"a": NaN}\n[1, 2]\n\x00\x00\xff\n\n' + torn + b'{"b": 2}\n{"c": 3}\n' + torn
    )
    assert read_metrics(path) == ([{"a": None}, {"c": 3}], 4)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_complete_last_line_without_its_newline_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}')
    assert read_metrics(path) == ([{"a": 1}], 0)


def test_killed_and_resumed_run_has_each_iteration_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        metrics.append({"event": "start"})
        metrics.append({"event": "eval", "name": "before", "iteration": 0})
        for i in range(4):
            metrics.append(train(i))
        metrics.append({"event": "eval", "name": "during", "iteration": 4})
        for i in range(4, 7):
            metrics.append(train(i, attempt=1))
        metrics.append({"event": "eval", "name": "after", "iteration": 7})
        metrics.append({"event": "comparison", "turn": 3})
    with open(path, "ab") as file:
        file.write(b'{"event": "train", "itera')
    with MetricsLog(path, resume_iteration=4) as metrics:
        assert metrics.dropped == 1
        for i in range(4, 6):
            metrics.append(train(i, attempt=2))
    rows, dropped = read_metrics(path)
    assert dropped == 0
    assert iterations(rows) == list(range(6))
    assert [row["attempt"] for row in rows if "attempt" in row] == [2, 2]
    assert iterations(rows, "eval") == [0, 4]
    assert [row["event"] for row in rows].count("start") == 1
    assert not any(row["event"] == "comparison" for row in rows)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_comparison_stays_with_the_evaluation_it_follows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        metrics.append(train(0))
        metrics.append({"event": "eval", "name": "after", "iteration": 1})
        metrics.append({"event": "comparison", "turn": 3})
    MetricsLog(path, resume_iteration=1).close()  # a finished run, extended
    assert [row["event"] for row in read_metrics(path)[0]] == ["train", "eval", "comparison"]


def test_a_torn_tail_never_swallows_the_next_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "tra')
    with MetricsLog(path, resume_iteration=0) as metrics:
        metrics.append(train(0))
    assert read_metrics(path) == ([train(0)], 0)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        metrics.append(train(0))
    with pytest.raises(CheckpointError, match="resume_iteration"):
        MetricsLog(path)
    with pytest.raises(ValueError, match="resume_iteration is -1"):
        MetricsLog(path, resume_iteration=-1)


def test_non_finite_numbers_become_null_and_are_named(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with caplog.at_level(logging.WARNING), MetricsLog(path) as metrics:
        for i in range(2):
            metrics.append(
                train(i, loss=math.nan, seconds={"reward": math.inf}, if_turn=(1.0, -math.inf))
            )
    raw = path.read_text()
    assert "NaN" not in raw and "Infinity" not in raw
    row = json.loads(raw.splitlines()[0])
    assert (
        row["loss"] is None and row["seconds"] == {"reward": None} and row["if_turn"] == [1.0, None]
    )
    assert row["non_finite"] == ["loss", "seconds.reward", "if_turn.1"]
    assert len(caplog.records) == 3  # each name once, not at every iteration


def test_tensors_and_arrays_are_numbers_and_other_objects_are_refused(tmp_path):
    import numpy
    import torch

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        metrics.append(
            {
                "a": torch.tensor(1.5),
                "b": numpy.arange(2),
                "c": numpy.float32(0.5),
                "d": torch.tensor(3),
            }
        )
        with pytest.raises(TypeError, match=r"'run\.path' holds a PosixPath"):
            metrics.append({"run": {"path": tmp_path}})
    assert read_metrics(path) == ([{"a": 1.5, "b": [0, 1], "c": 0.5, "d": 3}], 0)


def test_other_processes_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "run" / "metrics.jsonl", enabled=False) as metrics:
        metrics.append(train(0))
    assert not list(tmp_path.iterdir())


def test_flatten_counts_turns_from_one():
    row = {
        "event": "eval",
        "r": [{"mean": 0.5, "se": None}, 2],
        "ok": True,
        "seconds": {"loss": 1},
        "bad": math.nan,
    }
    assert dict(flatten(row)) == {"r/1/mean": 0.5, "r/2": 2.0, "seconds/loss": 1.0}


FULL = train(
    11,
    reward=0.62,
    reward_turn=[0.78, 0.63, None],
    if_turn=[0.8, 0.82],
    cc_turn=[1.0, None],
    ga_turn=[None],
    ratio_error=2e-7,
    seconds={"rollout": 4.0, "loss": 1.1},
)


def calm():
    return ""


def test_progress_prints_one_plain_line_for_each_iteration():
    stream = io.StringIO()
    with Progress(60, stream=stream, busy=calm) as progress:
        progress.update(FULL)
    assert stream.getvalue() == (
        "iter 12/60  reward 0.62 (t1 .78 t2 .63 t3 –)  IF .81 CC 1.00 GA –  |ratio-1| 2e-07  5.1 "
        "s/iter (typical 5.1)  left 4m05s\n"
    )


def test_the_line_has_scores_of_other_names():
    stream = io.StringIO()
    with Progress(60, stream=stream, busy=calm) as progress:
        progress.update(FULL | {"o_turn": [0.25, 0.75, None]})
    assert "  IF .81 CC 1.00 GA – o .50  " in stream.getvalue()


def timed(seconds, *, iterations, between=(), phases=True):
    """The lines of iterations that take `seconds`, with `between` seconds (by number of the
    iteration) after them."""
    now, stream = [0.0], io.StringIO()
    progress = Progress(iterations, stream=stream, busy=calm, clock=lambda: now[0])
    for i, s in enumerate(seconds):
        now[0] += s
        progress.update(
            {"iteration": i} | ({"seconds": {"rollout": s / 2, "loss": s / 2}} if phases else {})
        )
        now[0] += dict(between).get(i, 0.0)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize(
    ("run", "ends"),
    [
        # A machine that becomes busy: the typical iteration is as before, the time left is that of
        # the last five.
        (dict(seconds=[5] * 10 + [800], iterations=21), "800 s/iter (typical 5)  left 27m20s"),
        (dict(seconds=[5] * 10 + [800] * 5, iterations=25), "800 s/iter (typical 5)  left 2h13m"),
        # And free again.
        (dict(seconds=[800] * 10 + [5] * 5, iterations=25), "5 s/iter (typical 800)  left 50s"),
        (dict(seconds=[2] * 4 + [1234.5], iterations=5), "1234 s/iter (typical 2)  left 0s"),
        # An evaluation of 60 s after every other iteration is no part of an iteration, but of the
        # time left.
        (
            dict(seconds=[5] * 5, iterations=9, between=[(1, 60), (3, 60)]),
            "5 s/iter (typical 5)  left 2m20s",
        ),
        # Rows without phases: from one to the next.
        (
            dict(seconds=[2, 2, 2, 100, 2], iterations=10, phases=False),
            "2 s/iter (typical 2)  left 2m12s",
        ),
    ],
)
def test_seconds_of_the_last_iteration_the_typical_one_and_the_time_left(run, ends):
    assert timed(**run)[-1].endswith(ends)


def test_the_line_says_when_nothing_trains():
    progress = Progress(4, enabled=False)
    for advantage, said in ((0.0, True), (0.3, False)):
        line = progress.line({"iteration": 0, "reward": 0.5, "advantage_abs": advantage})
        assert ("nothing trains: siblings tie, or their turns are left out" in line) is said


def test_a_busy_machine_is_said_behind_the_line():
    stream, words = io.StringIO(), iter(["", "busy machine: ..."])
    progress = Progress(3, stream=stream, busy=lambda: next(words))
    progress.update({"iteration": 0})
    progress.update({"iteration": 1})
    first, second = stream.getvalue().splitlines()
    assert "busy" not in first and second.endswith("  busy machine: ...")


def test_progress_survives_a_bare_row_and_prints_only_on_the_main_process():
    stream = io.StringIO()
    Progress(3, stream=stream, busy=calm).update({})
    assert stream.getvalue() == "iter 1/3  reward –\n"
    quiet = io.StringIO()
    progress = Progress(3, enabled=False, stream=quiet)
    progress.update(FULL)
    progress.note("hidden")
    assert quiet.getvalue() == ""


def test_a_terminal_that_went_away_stops_no_run():
    class Gone(io.StringIO):
        error: OSError = OSError(errno.EIO, "Input/output error")

        def write(self, text):
            raise self.error

    progress = Progress(3, stream=Gone())
    progress.update(FULL)
    progress.note("hidden")
    Gone.error = BrokenPipeError()
    with pytest.raises(BrokenPipeError):  # `| head`
        Progress(3, stream=Gone()).note("read by nobody")


def test_progress_on_a_terminal_keeps_its_line_in_place(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress(60, stream=stream) as progress:
        progress.update(FULL)
        progress.note("[a note]")
        progress.update({**FULL, "iteration": 12})
    text = stream.getvalue()
    assert "iter 12/60" in text and "iter 13/60" in text and "[a note]" in text
    assert "\x1b[1A" in text  # went up and drew over the earlier line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (245, "4m05s"), (7500, "2h05m"), (200000, "2d07h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_profile_table_shares_add_up_and_show_untimed_seconds():
    rows = [
        train(0, elapsed_s=4.0, seconds={"rollout": 3.0, "loss": 1.0}),
        train(1, elapsed_s=9.0, seconds={"rollout": 3.0, "loss": 1.0}),  # 1 s untimed
        {"event": "eval", "iteration": 2},
        train(2, elapsed_s=99.0, seconds={"rollout": 6.0}),  # the evaluation is not the iteration's
    ]
    lines = {line.split()[0]: line.split()[1:] for line in profile_table(rows).splitlines()}
    assert lines["rollout"] == ["4.0000", "70.6%", "6.0000"]
    assert lines["loss"] == ["0.6667", "11.8%", "1.0000"]
    assert lines["untimed"] == ["1.0000", "17.6%", "1.0000"]
    assert lines["iteration"][:2] == ["5.6667", "100.0%"]
    assert profile_table([]) == "no timed iterations"


@pytest.mark.parametrize(
    ("count", "scores", "turns"),
    [(1, "1 score failed", "to 1 turn"), (2, "2 scores failed", "to 2 turns")],
)
def test_the_line_counts_one_as_one(count, scores, turns):
    row = {"iteration": 0, "reward": 0.5, "failed_scores": count, "not_applicable": count}
    parts = Progress(4, enabled=False).said(row)
    assert scores in parts and f"a reward does not apply {turns}" in parts
