"""scripts/same_numbers.py and operator_bits.py without runs: that they see a key, a bit and a
missing row."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    return importlib.import_module


@pytest.fixture
def same(scripts):
    return scripts("same_numbers")


@pytest.fixture
def bits(scripts):
    return scripts("operator_bits")


ROWS = [
    {
        "event": "start",
        "identity": {"depends": {"weights": "5 bytes", "reward": "here"}, "host": "a"},
        "threads": 1,
    },
    {
        "event": "train",
        "iteration": 0,
        "loss": 0.1,
        "grad_norm": 1.0,
        "seconds": {"rollout": 3.0},
        "turns": [1.0, 2.0],
    },
    {
        "event": "train",
        "iteration": 1,
        "loss": 0.2,
        "grad_norm": 0.0,
        "elapsed_s": 7.0,
        "by": [{"a": 1}, {"a": 2}],
    },
]


@pytest.fixture
def run(tmp_path):
    """A run's folder with other rows, other weights, and other files beside."""

    def write(rows=ROWS, weights=(1.0, -0.0), beside=()) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        save_file({"w": torch.tensor(weights), "one": torch.ones(3)}, folder / "policy.safetensors")
        (folder / "manifest.json").write_text(
            json.dumps({"files": {"policy.safetensors": {"size": len(weights)}}})
        )
        (folder / "strip.png").write_bytes(b"pixels")
        for name in beside:
            (folder / name).write_text("seed: 1\n")
        return folder

    return write


def changed(index, **values):
    rows = copy.deepcopy(ROWS)
    rows[index].update(values)
    return rows


def where(same, one, two, new=()):
    found = same.differences(same.read_folder(one, "r"), same.read_folder(two, "r"), new)
    return [difference.where for difference in found]


def test_runs_that_differ_in_clocks_and_places_alone_are_equal(same, run):
    other = changed(1, seconds={"rollout": 9.0})
    other[0]["identity"] = {
        "depends": {"weights": "5 bytes", "reward": "elsewhere"},
        "host": "b",
        "commit": "c",
    }
    other[2]["elapsed_s"] = 8.0
    assert where(same, run(), run(other)) == []


@pytest.mark.parametrize(
    ("rows", "place"),
    [
        (changed(1, loss=0.1 + 2**-55), "train 0 (0): loss"),
        (changed(1, turns=[1.0, 2.5]), "train 0 (0): turns"),
        (changed(2, by=[{"a": 1}, {"a": 3}]), "train 1 (0): by[1].a"),
        (
            changed(0, identity={"depends": {"weights": "6 bytes"}}),
            "start (0): identity.depends.weights",
        ),
        (changed(1, kl=0.0), "train 0 (0): kl"),
        ([ROWS[0], ROWS[2]], "train 0 (0)"),
        ([*ROWS, ROWS[2]], "train 1 (1)"),
    ],
)
def test_a_value_a_key_or_a_row_that_differs_is_named_and_nothing_else(same, run, rows, place):
    one, two = run(), run(rows)
    assert where(same, one, two) == where(same, two, one) == [f"r/metrics.jsonl: {place}"]


def test_bits_of_tensors_and_files_count(same, run):
    next_up = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    assert where(same, run(), run(weights=(next_up, -0.0))) == ["r/policy.safetensors: w: bits"]
    assert where(same, run(), run(weights=(1.0, 0.0))) == ["r/policy.safetensors: w: bits"]
    one, two = run(), run()
    (two / "strip.png").write_bytes(b"pixel!")
    assert where(same, one, two) == ["r/strip.png: bytes"]


def test_what_is_new_is_a_difference_unless_it_was_said_and_what_is_gone_always(same, run):
    more, one = changed(1, kl=0.0, entropy=1.0), run()
    assert where(same, one, run(more), ["kl"]) == ["r/metrics.jsonl: train 0 (0): entropy"]
    assert where(same, one, run(more, beside=["options.yaml"]), ["kl", "entropy", "r/*.yaml"]) == []
    assert where(same, run(more), one, ["kl"]) == [
        f"r/metrics.jsonl: train 0 (0): {k}" for k in ("kl", "entropy")
    ]
    assert where(same, one, run(beside=["options.yaml"])) == ["r/options.yaml"]
    assert where(same, run(beside=["options.yaml"]), one, ["r/*"]) == ["r/options.yaml"]


def test_runs_without_any_gradient_are_told(same, run):
    still = changed(1, grad_norm=0.0)
    assert list(same.trained(same.read_folder(run(), "r"))) == []
    assert list(same.trained(same.read_folder(run(still), "r"))) == ["r"]


def test_rows_of_metrics_are_shown_first_and_no_file_fills_the_screen(same):
    tensors = [same.Difference(f"r/policy.safetensors: {i}: bits", "a", "b") for i in range(20)]
    metrics = [
        same.Difference(f"r/metrics.jsonl: train 0 (0): {key}", "1", "2")
        for key in ("loss", "kl", "reward")
    ]
    shown = same.to_show([*tensors, *metrics])
    assert shown == [*metrics[: same.OF_A_FILE], *tensors[: same.OF_A_FILE]]
    assert "loss\n    base: 1\n    here: 2" in str(shown[0])


def test_of_some_runs_their_exports_are_compared_too(same):
    files = {
        f"{name}/a": {}
        for name in ("world", "klein-nft", "klein-nft-export", "klein-lora", "kontext-lora")
    }
    assert list(same.of_runs(files, ["klein-nft", "kontext*"])) == [
        *list(files)[:3],
        "kontext-lora/a",
    ]
    assert same.of_runs(files, same.ALL) == files


def test_printed_times_do_not_count_and_other_numbers_do(same):
    line = "iter 1/3  reward 0.61  |ratio-1| 0e+00  {} s/iter (typical 0.663)  left {}s"
    assert same.lines(line.format(0.663, 1)) == same.lines(line.format(4.5, 12))
    assert same.lines(line.format(1, 1)) != same.lines(line.replace("0.61", "0.62").format(1, 1))


def test_a_call_is_its_results_their_gradients_or_its_refusal(bits):
    def scaled(x, factor, name="f"):
        if not factor:
            raise ValueError(f"{name} must not be 0")
        return factor * x

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found = bits.texts(scaled, x, 3.0)
    assert list(found) == ["result", "d result / d x"]
    assert found != bits.texts(scaled, x, 3.0 + 2**-22)
    assert found["d result / d x"] != bits.texts(scaled, x, 3.0 + 2**-22)["d result / d x"]
    assert bits.texts(scaled, x, 0.0) == {"refused": "ValueError: f must not be 0"}


def test_a_tensor_is_its_bytes_its_shape_and_its_dtype(bits):
    zero = torch.zeros(2, 5)
    last = zero.clone()
    last[1, 4] = -0.0
    texts = [
        bits.text_of(x) for x in (zero, last, zero.view(5, 2), zero.int(), zero.T.contiguous().T)
    ]
    assert len(set(texts[:4])) == 4 and texts[4] == texts[0]


def test_a_row_of_a_table_is_told_from_its_neighbours(bits, monkeypatch):
    table = torch.ones(3, 8)
    monkeypatch.setattr(bits.ek, "transition_table", lambda sigmas: table)
    before = bits.row_bits([]).split()
    table[1, 2] = torch.nextafter(table[1, 2], torch.tensor(2.0))
    after = bits.row_bits([]).split()
    assert [a != b for a, b in zip(before, after, strict=True)] == [False, True, False]
