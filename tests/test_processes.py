"""One process or two, accelerate under torchrun: the same sessions, groups and noise; numbers equal
to rounding."""

import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path
from urllib.error import HTTPError

import pytest
import torch

from editr2.errors import ConfigError, UserError
from editr2.run.processes import Processes

ROOT = Path(__file__).parent.parent


def launch(processes: int, out: Path) -> dict:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "tests" / "two_processes.py"), str(out)],
        check=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    return torch.load(out)


def by_turn(result: dict, key: str, turn: int) -> list:
    return [record[key] for record in result["records"] if record["turn"] == turn]


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, beside):
    beside("two_processes").main(tmp_path / "1.pt")
    one, two = torch.load(tmp_path / "1.pt"), launch(2, tmp_path / "2.pt")
    assert (one["processes"], two["processes"]) == (1, 2)
    for turn in range(3):
        for key in ("ids", "text"):
            assert list(chain(*by_turn(one, key, turn))) == list(chain(*by_turn(two, key, turn)))
        for which in (0, 1):
            seeds = [torch.cat([s[which] for s in by_turn(r, "seeds", turn)]) for r in (one, two)]
            assert torch.equal(*seeds)
        assert torch.equal(*(torch.cat(by_turn(r, "step_index", turn)) for r in (one, two)))
        images = [torch.cat(by_turn(r, "images", turn)).int() for r in (one, two)]
        # Different batches round matrix products differently; 8-bit images may flip their last bit.
        assert (images[0] - images[1]).abs().max() <= 1
    assert torch.equal(one["scores"], two["scores"])
    assert torch.equal(one["advantage"], two["advantage"]) and torch.equal(one["mask"], two["mask"])
    assert one["gradient"].abs().max() > 0
    error = (one["gradient"] - two["gradient"]).norm() / one["gradient"].norm()
    assert error < 1e-3


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("out: taken"),
        FileNotFoundError("gone"),
        HTTPError("http://x", 404, "gone", None, None),  # which does not survive pickling
    ],
)
def test_what_the_first_process_cannot_do_ends_all(error):
    """A full disk, too: the others would wait for an answer until somebody stops them."""

    class Gathered(Processes):
        """One of two, told what the first had to say."""

        main = None

        def __init__(self, main):
            self.main = main

        def gather(self, items):
            said.extend(pickle.loads(pickle.dumps(items)) if self.main else [])
            return said

    def work():
        raise error

    said = []
    for main in (True, False):
        with pytest.raises(UserError if "404" in str(error) else type(error), match=str(error)):
            Gathered(main).on_main(work)
