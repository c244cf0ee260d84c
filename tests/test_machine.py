"""How threads wait for work, and what is said of a busy machine."""

import json
import os
import subprocess
import sys

import pytest

from editr2.run.machine import CoreWatch, choose_waiting, competing

MAIN, WORKER, NEW = "100", "101", "102"


@pytest.mark.parametrize(
    ("given", "others", "cores", "expected"),
    [
        ({}, 0, 2, {"GOMP_SPINCOUNT": "10000"}),
        ({}, 1, 2, {"OMP_WAIT_POLICY": "passive"}),
        ({}, 3, 64, {"GOMP_SPINCOUNT": "10000"}),
        ({}, 16, 64, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_NUM_THREADS": "2"}, 3, 2, {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}),
        ({"OMP_WAIT_POLICY": "active"}, 3, 2, {"OMP_WAIT_POLICY": "active"}),
        ({"GOMP_SPINCOUNT": "1000"}, 3, 2, {"GOMP_SPINCOUNT": "1000"}),
        ({"KMP_BLOCKTIME": "200"}, 0, 2, {"KMP_BLOCKTIME": "200"}),
    ],
)
def test_threads_sleep_beside_others_unless_the_user_says_otherwise(
    given, others, cores, expected, monkeypatch
):
    monkeypatch.delitem(sys.modules, "torch")
    choose_waiting(given, lambda: others, cores)
    assert given == expected


def test_who_computes_is_counted_without_us(tmp_path):
    told = tmp_path / "loadavg"
    assert competing(told) == 0, "nobody can tell"
    told.write_text("0.10 0.20 0.30 4/512 1234\n", encoding="ascii")
    assert competing(told) == 3
    told.write_text("?", encoding="ascii")
    assert competing(told) == 0
    assert competing() >= 0


def test_nothing_is_set_where_torch_is_there_already():
    environment = {}
    choose_waiting(environment)
    assert environment == {}


TRAIN = "import sys; sys.argv[1:] = ['train']"  # help needs no torch
SPIES = {
    # What OpenMP would read when torch is loaded: torch's place is taken by a module that tells and
    # stops.
    "editr2": f"{TRAIN}; import editr2.__main__ as m; m.main()",
    "python -m editr2": f"{TRAIN}; import runpy; runpy.run_module('editr2', run_name='__main__')",
    "python -m editr2.cli": (
        f"{TRAIN}; import runpy; runpy.run_module('editr2.cli', run_name='__main__')"
    ),
    "a library": "import editr2, editr2.rl.loop",
}


@pytest.mark.parametrize("entry", SPIES)
@pytest.mark.parametrize("own", [None, "active"])
def test_every_way_into_the_command_sets_it_before_torch_and_a_library_does_not(
    entry, own, tmp_path
):
    spy = (
        "import json, os; print(json.dumps([os.environ.get(n) for n in ('OMP_WAIT_POLICY', "
        "'GOMP_SPINCOUNT')]))"
    )
    (tmp_path / "torch.py").write_text(f"{spy}; raise SystemExit(7)", encoding="utf-8")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *sys.path])
    if own:
        environment["OMP_WAIT_POLICY"] = own
    done = subprocess.run(
        [sys.executable, "-c", SPIES[entry]],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
    ours = [["passive", None], [None, "10000"]]  # as busy as the machine is
    assert json.loads(done.stdout) in ([[own, None]] if own or entry == "a library" else ours)


class Machine:
    """A kernel that tells what the test says (unless there is a load average instead), and a
    clock."""

    def __init__(self, folder, load=None):
        self.folder, self.now, self.threads, self.load = folder, 0.0, {}, load
        self.run(0, {MAIN: (40.0, 9.0)})  # what was before counts nothing
        self.watch = CoreWatch(tasks=folder, load=load, cores=2, clock=lambda: self.now)

    def run(self, seconds, threads):
        self.now += seconds
        for name, spent in threads.items():
            total = [a + b for a, b in zip(self.threads.get(name, (0, 0)), spent, strict=True)]
            self.threads[name] = total
            if self.load is None:
                (self.folder / name).mkdir(exist_ok=True)
                words = [*(str(round(1e9 * s)) for s in total), "17"]
                (self.folder / name / "schedstat").write_text(" ".join(words) + "\n")


@pytest.mark.parametrize(
    ("threads", "said"),
    [
        # 10 s of wall time; by thread the seconds that it computed and that it waited for a core.
        ({MAIN: (9.0, 0.2), WORKER: (8.0, 0.3)}, ""),
        ({MAIN: (4.0, 6.0), WORKER: (4.0, 6.0)}, "60%"),
        ({MAIN: (7.4, 2.6)}, "26%"),
        ({MAIN: (7.6, 2.4)}, ""),
        ({MAIN: (4.0, 6.0), WORKER: (0.0, 0.0)}, "60%"),
        ({NEW: (4.0, 6.0)}, "60%"),
        ({MAIN: (0.3, 0.8)}, ""),  # waits for a GPU or a judge: hardly computes, whoever else does
        ({MAIN: (0.3, 1.2)}, "80%"),
        ({}, ""),
    ],
)
def test_a_machine_is_busy_when_threads_wait_for_a_core(tmp_path, threads, said):
    machine = Machine(tmp_path)
    machine.run(10, threads)
    expected = f"busy machine: threads waited for a core {said} of the time" if said else ""
    assert machine.watch.lap() == expected
    machine.run(10, {MAIN: (9.5, 0.1)})
    assert machine.watch.lap() == ""  # each lap counts its own


def test_a_thread_that_has_ended_is_left_out(tmp_path):
    machine = Machine(tmp_path)
    machine.run(5, {WORKER: (2.0, 3.0)})
    (tmp_path / WORKER / "schedstat").unlink()
    machine.run(5, {MAIN: (4.0, 6.0)})
    assert machine.watch.lap().endswith("60% of the time")


def no_load():
    raise OSError("no load average")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda: 2.0, ""),
        (lambda: 2.9, ""),
        (lambda: 5.04, "busy machine: 5.0 processes for 2 cores"),
        (no_load, ""),
    ],
)
def test_without_the_kernels_word_the_load_decides(tmp_path, load, said):
    machine = Machine(tmp_path, load)
    machine.run(10, {MAIN: (4.0, 6.0)})
    assert machine.watch.lap() == said


def test_this_machine_is_looked_at():
    watch = CoreWatch()
    assert isinstance(watch.lap(), str)
