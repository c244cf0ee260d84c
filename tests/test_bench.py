"""The frame of the benchmarks, not the benchmarks: no row without a green gate, turns and clocks,
the report from rows alone, the comparison of two commits. Nothing here asserts how long anything
takes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from bench import compare, frame, full_size, page, peer_sides, peer_work, real_peer, report, sizes
from bench.frame import Row
from editr2.config import PolicyConfig
from editr2.errors import ConfigError
from editr2.policies.kontext import KontextPolicy
from editr2.policies.unified.model import UnifiedConfig

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).resolve().parent.parent

BENCHMARKS = """
import pytest
ours, calls = "editr2 cpu", []

def run(compare, gate, **options):
    return compare(op="op", mode="forward", shape=(2, 3), dtype="fp32", gate=gate,
                   providers={"eager": lambda: None, "compile": lambda: None, ours: lambda: None},
                   **options)

def test_green(compare):
    rows = run(compare, lambda: {ours: 0.5}, bytes_moved=800, flops=7,
               extra=lambda name: {"told": name})
    assert list(rows) == ["eager", "compile", ours]

def test_inputs_stay_in_the_cache(compare, monkeypatch):
    monkeypatch.setattr("bench.frame.l2_bytes", lambda device: 4096)
    run(compare, lambda: {ours: 0.5}, bytes_moved=800)

def test_red_before(compare):
    def gate():
        assert False, "wrong before"
    run(compare, gate)

def test_red_after(compare):
    def gate():
        calls.append(1)
        assert len(calls) == 1, "wrong after"
        return {ours: 0.0}
    run(compare, gate)

def test_says_nothing_of_ours(compare):
    run(compare, lambda: {"eager": 0.0})

def test_error_is_nan(compare):
    run(compare, lambda: {ours: float("nan")})

@pytest.mark.full
def test_full(compare):
    raise AssertionError("only with --full")

@pytest.mark.gpu
def test_gpu(compare):
    raise AssertionError("only on a GPU")
"""


def test_only_a_green_gate_gives_rows(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [
        "-p",
        "bench.conftest",
        "-p",
        "no:cacheprovider",
        "--results",
        "rows",
        "--seconds",
        "0",
    ]
    done = pytester.runpytest_subprocess(*options, "-m", "not gpu or full")
    done.assert_outcomes(passed=2, failed=4, deselected=2)
    for said in (
        "*wrong before*",
        "*wrong after*",
        "*says nothing of editr2 cpu*",
        "*errors must be finite*",
    ):
        done.stdout.fnmatch_lines([said])
    rows = frame.read_rows(pytester.path / "rows")
    assert [row.provider for row in rows] == ["eager", "compile", "editr2 cpu"] * 2
    ours, warm = rows[2], rows[5]
    assert warm.bytes == 800 and warm.copy_gb_s is not None and warm.copy_percent is None
    assert (ours.shape, ours.max_error, ours.bytes, ours.flops, ours.rounds) == (
        [2, 3],
        0.5,
        800,
        7,
        3,
    )
    assert ours.extra == {"told": "editr2 cpu"} and ours.copy_percent is not None
    assert ours.threads == 1 and ours.torch == torch.__version__ and ours.driver is None
    assert rows[0].bytes is None and rows[0].max_error is None and rows[1].launches is None


class CountingClock:
    """Milliseconds by call, told beforehand; what ran is in `ran`."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def measure(self, run: Any, calls: int) -> float:
        run()
        return self.ms


def test_providers_take_turns() -> None:
    ran: list[str] = []
    times = frame.interleave(
        {name: lambda n=name: ran.append(n) for name in "ab"}, CountingClock(30.0), 0.0, 4
    )
    assert (
        ran == ["a"] * 3 + ["b"] * 3 + list("abba") * 2
    )  # warmed up one by one, then in turns, in either order
    assert times == {"a": [30.0] * 4, "b": [30.0] * 4}


def test_short_calls_are_timed_together_and_long_ones_warmed_up_twice() -> None:
    ran: list[int] = []
    assert frame.warm_up(lambda: ran.append(0), CountingClock(0.1)) == 200
    assert len(ran) == 3
    assert frame.warm_up(lambda: ran.append(0), CountingClock(800.0)) == 1
    assert len(ran) == 5


def test_event_clock_starts_on_an_idle_device_and_divides_by_the_calls() -> None:
    done: list[str] = []

    class Event:
        def record(self) -> None:
            done.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 12.0

    clock = frame.EventClock(Event, lambda: done.append("wait"))
    assert clock.measure(lambda: done.append("call"), 3) == 4.0
    assert done == ["wait", "record", "call", "call", "call", "record", "wait"]


def test_inputs_rotate_past_the_cache() -> None:
    assert frame.copies_past_cache(1536, 4096) == 6  # 2 * 4096 / 1536, rounded up
    assert frame.past_cache(6, 1536, 4096) and not frame.past_cache(5, 1536, 4096)
    assert frame.copies_past_cache(1536, 1 << 30) == frame.MAX_COPIES
    assert not frame.past_cache(frame.MAX_COPIES, 1536, 1 << 30)
    assert frame.copies_past_cache(1536, 0) == 1 and frame.past_cache(1, 1536, 0)  # a CPU
    seen: list[int] = []
    run = frame.rotation(seen.append, [1, 2, 3])
    assert seen == [1, 2, 3]  # each once before the timing
    for _ in range(4):
        run()
    assert seen[3:] == [1, 2, 3, 1]


def test_profile_counts_operators_waits_and_memory() -> None:
    x = torch.ones(1 << 18)
    seen = frame.profile(lambda: (x + 1).sum().item(), "cpu")
    assert (seen.launches, seen.host_syncs) == (3, 1)  # and not the copies and fills inside of them
    assert seen.peak_mib is not None and 1.0 <= seen.peak_mib < 1.01


def test_what_is_read_of_the_inputs_decides_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {
        "x": torch.zeros(256),
        "more": (torch.zeros(256, dtype=torch.bfloat16), [None, 3]),
    }  # 1536 bytes
    monkeypatch.setattr(frame, "l2_bytes", lambda device: 4096)
    assert len(frame.make_copies(lambda: one, "cuda")) == 6
    assert len(frame.make_copies(lambda: one, "cuda", read=512)) == 16


def test_a_wait_is_what_torch_calls_one_and_launches_unseen_are_not_none_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def set_mode(mode: str) -> None:
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode does not yet detect all synchronizing operations",
                stacklevel=1,
            )

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a GPU the profiler says that it sees none
        none = frame.profile(lambda: None, "cuda")
        one = frame.profile(
            lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1), "cuda"
        )
    assert (none.host_syncs, one.host_syncs) == (0, 1)
    assert none.launches is None


def test_operations_are_counted_without_what_only_the_first_call_makes() -> None:
    """A context is made at the first call, and every later one attends to what it kept."""
    from bench import test_transformers as benchmark

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "frequency_size": 8,
    }
    make = partial(benchmark.unified, text=8, num_attention_heads=2, num_key_value_heads=2, **sizes)
    channels = UnifiedConfig().latent_dim
    case = benchmark.Case("tiny", make, "unified", 4, channels, 2, 2, "cpu", torch.float32)
    for train in (False, True):
        _, velocity = benchmark.build(case, "meta", 2, train)
        x = torch.empty(2, 16, channels, device="meta")
        first = benchmark.flops_of(velocity, x, train)
        assert first == benchmark.flops_of(velocity, x, train) > 0


@pytest.mark.parametrize("name", ["tiny FLUX.1 (a smoke case)", "FLUX.2-klein 4 B, 512²"])
def test_adapters_stand_where_the_trainer_puts_them(name: str) -> None:
    from bench import test_transformers as benchmark

    (case,) = (case for case in benchmark.CASES if case.name == name)
    module, _ = benchmark.build(case, "meta", 1, True)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_gpu_sizes_are_marked_and_pass_the_l2() -> None:
    for params in (sizes.latents(), sizes.latents(variant=True), sizes.shapes([(2, 3)], [(2, 3)])):
        assert len({p.id for p in params}) == len(params)
        for p in params:
            assert (p.values[0].device == "cuda") == any(mark.name == "gpu" for mark in p.marks)
    grid = {
        (p.values[0].device, p.values[0].shape, p.values[0].dtypes.name) for p in sizes.latents()
    }
    for batch in (1, 4, 16):
        for shape in ((batch, 1024, 64), (batch, 4096, 64), (batch, 1024, 128), (batch, 4096, 128)):
            assert {
                ("cpu", shape, "fp32"),
                ("cuda", shape, "bf16"),
                ("cuda", shape, "x fp32, v bf16"),
            } <= grid
    assert sizes.Size("cuda", sizes.PAST_L2, sizes.MIXED).bytes(x=2, v=1) >= 1 << 30


# The report


def row(provider: str, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "op": "sde_step",
        "mode": "forward",
        "shape": [8, 4096, 64],
        "dtype": "fp32",
        "p20_ms": 1.0,
        "p50_ms": 2.0,
        "p80_ms": 3.0,
        "device": "A CPU",
        "commit": "abc1234",
        "date": "2026-11-21T10:00:00+00:00",
        "threads": 2,
    }
    return Row(provider=provider, **{**values, **changes})


def rendered(rows: list[Row], folder: Path) -> str:
    frame.append_rows(folder / "rows", rows)
    assert (
        report.main(["--results", str(folder / "rows"), "--out", str(folder / "performance.md")])
        == 0
    )
    return (folder / "performance.md").read_text()


def test_report_is_made_of_rows_alone(tmp_path: Path) -> None:
    ours = {
        "speedup_vs_eager": 7.5,
        "speedup_vs_compile": 2.5,
        "copy_percent": 61.0,
        "flops": 100,
        "bytes": 50,
    }
    ours |= {"copy_gb_s": 9.0, "max_error": 1e-6, "launches": 11, "host_syncs": 0, "peak_mib": 8.0}
    rows = [
        row("eager", p50_ms=15.0),
        row(
            "editr2 cpu", p50_ms=777.0, date="2026-11-20T10:00:00+00:00"
        ),  # an earlier run of the same case
        row("editr2 cpu", **ours),
        row("editr2 cpu", **{**ours, "shape": [8, 1024, 64], "speedup_vs_eager": 5.0}),
    ]
    text = rendered(rows, tmp_path)
    assert "No row here was measured on a GPU" in text
    assert "777" not in text
    assert "| **editr2 cpu** | 2 (1–3) | 7.5 | 2.5 | 8 | 61 | 11 | 0 | 1e-06 |" in text
    assert "A CPU, 2 threads, commit abc1234, 2026-11-21" in text
    for plot in ("speedup-a-cpu", "roofline-a-cpu"):
        assert f"(performance/{plot}.png)" in text
        assert (tmp_path / "performance" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


def test_report_with_a_gpu_says_nothing_of_its_absence(tmp_path: Path) -> None:
    text = rendered([row("editr2 cuda", device="A GPU", driver="580.1")], tmp_path)
    assert "No row here was measured on a GPU" not in text
    assert "| A GPU | 580.1 |" in text


def test_rows_of_before_the_columns_are_read(tmp_path: Path) -> None:
    old = {
        f.name: getattr(row("editr2 cpu"), f.name)
        for f in dataclasses.fields(Row)
        if f.name not in ADDED
    }
    (tmp_path / "sde_step.jsonl").write_text(json.dumps({**old, "peak_rss": 3}) + "\n")
    (found,) = frame.read_rows(tmp_path)
    assert found.copy_percent is None and found.driver is None and found.launches is None
    assert found.extra == {"peak_rss": 3}  # of a column that this version does not know
    assert "No row here" in report.render([found], tmp_path / "performance.md")
    (tmp_path / "sde_step.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"sde_step.jsonl:1: not a row of a benchmark"):
        frame.read_rows(tmp_path)


ADDED = {
    "bytes",
    "flops",
    "copy_gb_s",
    "copy_percent",
    "launches",
    "host_syncs",
    "rounds",
    "driver",
    "triton",
    "editr2",
}
ADDED |= {"extra", "peak_mib"}


def test_rows_in_the_repository_are_read() -> None:
    rows = frame.read_rows(REPOSITORY / "bench" / "results")
    assert rows and all(row.p20_ms <= row.p50_ms <= row.p80_ms for row in rows)


def test_gains_are_counted_from_the_batched_plan(tmp_path: Path) -> None:
    names = {
        "peer-plan, sample by sample": 80.0,
        "peer-plan": 40.0,
        "peer + context kept": 20.0,
        "eager": 12.0,
    }
    rows = [
        row(
            name,
            op="iteration",
            shape=[1, 4, 2],
            p50_ms=ms,
            extra={"phases_s": {"rollout": ms / 1e3}},
        )
        for name, ms in {**names, "editr2": 10.0}.items()
    ]
    text = report.render(rows, tmp_path / "performance.md")
    assert (
        "Gains over *peer-plan*, one after the other: + context kept 2.00 ×, the trainer itself "
        "2.00 ×;" in text
    )
    assert "all together 4.00 ×" in text
    assert "Over *peer-plan, sample by sample*: samples batched 2.00 ×, *editr2* 8.00 ×." in text
    text = report.render(
        [r for r in rows if "sample by sample" not in r.provider], tmp_path / "performance.md"
    )
    assert "all together 4.00 ×" in text and "Over *peer-plan, sample" not in text


def test_report_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--results", str(tmp_path), "--out", str(tmp_path / "performance.md")]) == 1
    assert "no rows in" in capsys.readouterr().err
    assert not (tmp_path / "performance.md").exists()


@pytest.mark.parametrize(
    "value, text",
    [
        (None, ""),
        (0, "0"),
        (0.0123456, "0.0123"),
        (12.345, "12.3"),
        (123456.0, "123,000"),
        (2e-7, "2.0e-07"),
    ],
)
def test_numbers_are_written_short(value: float | None, text: str) -> None:
    assert page.number(value) == text


# Two commits

SIDE = """
import json, os, sys
reader, writer = map(int, sys.argv[-1].split(","))
case, package, ms, end = sys.argv[1:5]
def say(**message):
    os.write(writer, (json.dumps(message) + "\\n").encode())
lines = os.fdopen(reader)
if end == "red before":
    say(case=case, error="AssertionError: wrong")
    sys.exit(1)
say(case=case, providers=["editr2 cpu", case], package=package)
for line in lines:
    if line == "\\n":
        break
    say(ms=float(ms))
if end == "red after":
    say(case=case, error="AssertionError: wrong")
    sys.exit(1)
if end == "dies":
    sys.exit(3)
say(gate="green")
sys.exit(5 if end == "nothing" else 0)
"""


def sides(
    folder: Path, base: tuple[str, str, str], here: tuple[str, str, str]
) -> list[compare.Side]:
    """A case, a package and an end for each, in processes that speak as pytest does; base takes
    twice as long."""
    made = []
    for name, ms, (case, package, end) in (("BASE", "4", base), ("this tree", "2", here)):
        command = [sys.executable, "-c", SIDE, case, str(folder / package), ms, end]
        made.append(compare.Side(name, folder, command, folder / name))
    return made


def compared(
    folder: Path, base: tuple[str, str, str], here: tuple[str, str, str]
) -> list[compare.Comparison]:
    both = sides(folder, base, here)
    try:
        return compare.interleaved(*both, 3)
    finally:
        for side in both:
            side.stop()


def test_ratio_of_two_sides(tmp_path: Path) -> None:
    (found,) = compared(tmp_path, ("a", "here.py", ""), ("a", "here.py", ""))[:1]
    assert (found.case, found.provider, found.base_ms, found.here_ms) == (
        "a",
        "editr2 cpu",
        [4.0] * 3,
        [2.0] * 3,
    )
    assert found.ratio == (2.0, 2.0, 2.0)
    assert "2.000 to 2.000" in compare.table([found])


@pytest.mark.parametrize(
    "base, here, why",
    [
        (
            ("a", "p", "red before"),
            ("a", "p", ""),
            "gate of a is red on BASE: AssertionError: wrong",
        ),
        (
            ("a", "p", ""),
            ("a", "p", "red after"),
            "gate of a is red on this tree: AssertionError: wrong",
        ),
        (("a", "p", ""), ("b", "p", ""), "BASE is at a, this tree at b"),
        (("a", "p", ""), ("a", "../p", ""), "which is not below"),
        (("a", "p", "dies"), ("a", "p", ""), "BASE broke off"),
        (("a", "p", ""), ("a", "p", "nothing"), "this tree: no case matches"),
    ],
)
def test_no_ratio_is_reported(tmp_path: Path, base: Any, here: Any, why: str) -> None:
    with pytest.raises(compare.Refused, match=why):
        compared(tmp_path, base, here)


def test_unknown_base(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["no-such-commit"]) == 1
    assert "BASE must name a commit, got 'no-such-commit'" in capsys.readouterr().err


@pytest.mark.parametrize("gates", [["green", "green"], ["green", "red"], ["red"]])
def test_a_case_is_served(gates: list[str]) -> None:
    """The end inside pytest, against what the asking end says."""
    to_worker, from_parent = os.pipe()
    to_parent, from_worker = os.pipe()
    left, raised = list(gates), []

    def gate() -> None:
        assert left.pop(0) == "green", "wrong"

    def work() -> None:
        try:
            compare.serve(
                "case", {"editr2 cpu": int}, CountingClock(6.0), gate, f"{to_worker},{from_worker}"
            )
        except AssertionError as error:
            raised.append(error)
        os.close(from_worker)

    os.write(from_parent, b"editr2 cpu\neditr2 cpu\n\n")
    worker = threading.Thread(target=work)
    worker.start()
    with os.fdopen(to_parent) as answers:
        said = [json.loads(line) for line in answers]
    worker.join()
    for descriptor in (to_worker, from_parent):
        os.close(descriptor)
    started = (
        []
        if gates[0] == "red"
        else [{"case": "case", "providers": ["editr2 cpu"]}, {"ms": 6.0}, {"ms": 6.0}]
    )
    if started:
        assert Path(said[0].pop("package")).name == "__init__.py"
    red = "red" in gates
    assert said == [
        *started,
        {"case": "case", "error": "AssertionError: wrong"} if red else {"gate": "green"},
    ]
    assert bool(raised) == red


# On a GPU


@pytest.mark.gpu
def test_graphs_are_checked_and_waits_counted() -> None:
    x = [torch.full((1024,), float(k), device="cuda") for k in range(3)]
    out: list[torch.Tensor] = []
    run = frame.rotation(frame.Graph(lambda t: out.append(t * 2) or out[-1]), x)
    for _ in x:
        run()
    torch.cuda.synchronize()
    assert frame.profile(run, "cuda").launches == 1
    with pytest.raises(frame.NotCapturable):
        frame.rotation(frame.Graph(lambda t: t.sum().item()), x)
    torch.cuda.synchronize()
    seen = frame.profile(lambda: x[0].sum().item(), "cuda")
    assert seen.host_syncs == 1 and seen.launches is not None and seen.launches >= 2
    assert frame.EventClock().measure(lambda: x[0].mul(2), 10) > 0


# An editor of full size


def full_size_config(folder: Path, weights: Path, **policy: Any) -> Path:
    values = {
        "data": {"path": str(REPOSITORY / "examples" / "shapes"), "resize": "crop"},
        "reward": {"function": "editr2.rewards.brightness:Brightness"},
        "credit": {"preset": "flow-grpo", "baseline": None, "weights": {"brightness": 1.0}},
        "policy": {
            "model": "kontext",
            "weights": str(weights),
            "lora_rank": 4,
            "resolution": [32, 32],
        }
        | policy,
        "rollout": {"sessions": 1, "siblings": 2, "steps": 2, "window": 1, "window_range": 0.5},
        "train": {"ema": None},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


def test_full_size_iterations_stand_beside_their_estimate(
    tmp_path: Path, beside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    beside("tiny_editors").kontext_pipeline(num_layers=2).save_pretrained(tmp_path / "weights")
    file = full_size_config(tmp_path, tmp_path / "weights", gradient_checkpointing=True)
    assert full_size.main([str(file), "--iterations=3", f"--results={tmp_path / 'rows'}"]) == 0
    said = capsys.readouterr().out
    assert said.count("iteration ") == 3 and "kontext rollout" in said and "kontext train" in said
    rows = frame.read_rows(tmp_path / "rows")
    assert [(row.provider, row.mode) for row in rows] == [
        (provider, f"kontext {phase}")
        for phase in ("rollout", "train")
        for provider in ("editr2 check", "editr2")
    ]
    assert all(row.p50_ms > 0 and row.peak_mib is not None and row.peak_mib > 0 for row in rows)
    assert all(row.shape == [1, 2, 32, 32] and row.device == frame.cpu_model() for row in rows)
    text = report.render(rows, tmp_path / "performance.md")
    assert (
        "Editors of full size" in text
        and "kontext train, [1, 2, 32, 32] (sessions, siblings, pixels)" in text
    )
    ratio = rows[1].p50_ms / rows[0].p50_ms
    assert f"| {page.number(ratio)} |" in text


def test_full_size_weights_are_those_of_the_settings_and_words_are_repeatable(
    tmp_path: Path, beside: Any
) -> None:
    pipe = beside("tiny_editors").kontext_pipeline(num_layers=2)
    pipe.save_pretrained(tmp_path / "weights")
    config = PolicyConfig(
        model="kontext", weights=str(tmp_path / "weights"), lora_rank=4, resolution=(32, 32)
    )
    policy = full_size.random_policy(KontextPolicy.blueprint(config), torch.device("cpu"))
    frozen = {
        n.replace(".base_layer", ""): p
        for n, p in policy.module.named_parameters()
        if ".lora_" not in n
    }
    stock = dict(pipe.transformer.named_parameters())
    assert {n: p.shape for n, p in frozen.items()} == {n: p.shape for n, p in stock.items()}
    assert all(
        0.5 < float(p.std()) * p[0].numel() ** 0.5 < 1.5 for p in frozen.values() if p.dim() > 1
    )
    one, same, other = (policy.embed([text], [])[0]["words"] for text in ("a", "a", "b"))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_full_size_says_what_it_cannot_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = full_size_config(tmp_path, tmp_path / "none")
    for arguments, message in (
        ([str(file), "--iterations=1"], "at least two iterations"),
        (["--policy.model=unified"], "an editor on diffusers"),
        ([str(file), "--gpu=h100"], "--gpu: h100"),
        ([str(file)], "policy.weights: .* is no folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            full_size.main(arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100-80",
        "NVIDIA GeForce RTX 4090": "rtx4090",
    }
    for name, device in (
        names | {"NVIDIA RTX A6000": "a6000", "NVIDIA H100 80GB HBM3": "h100"}
    ).items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert full_size.this_device() == device
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    with pytest.raises(ConfigError, match="NVIDIA T4 is none of"):
        full_size.this_device()


FAKE_PEER = """
class PointwiseRewardModel: pass
class RewardModelOutput(dict):
    def __init__(self, rewards): self.rewards = rewards
"""


def peer_setup(**given: Any) -> real_peer.Setup:
    return real_peer.Setup(**({"resolution": 32, "steps": 2, "window": 1} | given))


@pytest.mark.parametrize(
    "given, ours, peer",
    [
        ({}, (2, 16, 1, 8), (2, 16, 1, 8)),
        ({"ties": True}, (2, 16, 1, 4), (2, 16, 1, 8)),
        ({"ties": True, "batch": 4}, (4, 16, 1, 4), (4, 16, 2, 8)),
        ({"ties": True, "turns": 2}, (4, 32, 2, 8), (4, 32, 2, 16)),
    ],
    ids=["dense", "ties", "ties, a group a batch", "ties, two turns"],
)
def test_our_side_of_the_real_peer_makes_the_calls_that_are_asked_of_it(
    tmp_path: Path, given: dict[str, Any], ours: tuple[int, ...], peer: tuple[int, ...]
) -> None:
    setup = peer_setup(**given)
    real_peer.write_folder(tmp_path, setup, num_layers=1, num_single_layers=1)
    side = real_peer.Ours(tmp_path, setup, Accelerator(cpu=True))
    phases = side()
    counts = side.counter.take()
    real_peer.check_iteration(real_peer.OURS, side, counts, setup, first=True)
    for wanted, found in ((ours, counts), (peer, setup.counts(ours=False))):
        assert wanted == (found.forwards, found.forward_rows, found.trained, found.trained_rows)
    assert counts.backwards == counts.trained and counts.texts == 4 * setup.turns
    assert counts.encoded == 2 + setup.samples - setup.rollouts
    assert sum(phases.values()) > 0 and set(phases) == set(real_peer.PHASES)
    assert side.counter.now == real_peer.Counts()
    with pytest.raises(real_peer.Unequal, match="counted"):
        one_more = dataclasses.replace(counts, forwards=counts.forwards + 1)
        real_peer.check_iteration(real_peer.OURS, side, one_more, setup, first=True)
    side()  # from here on sources and words are kept
    real_peer.check_iteration(real_peer.OURS, side, side.counter.take(), setup, first=False)
    with pytest.raises(real_peer.Unequal, match="counted"):
        real_peer.check_iteration(real_peer.OURS, side, counts, setup, first=False)
    side.finite = [1.0, float("nan")]
    with pytest.raises(real_peer.Unequal, match="finite"):
        real_peer.check_iteration(real_peer.OURS, side, counts, setup, first=True)
    side.finite, side.learning = [1.0], side.learning - 1
    with pytest.raises(real_peer.Unequal, match="learns from"):
        real_peer.check_iteration(real_peer.OURS, side, counts, setup, first=True)


def test_a_judge_that_waits_is_asked_by_several_at_once(tmp_path: Path) -> None:
    setup = peer_setup(judge_seconds=0.2, judge_workers=8)
    real_peer.write_folder(tmp_path, setup, num_layers=1, num_single_layers=1)
    side = real_peer.Ours(tmp_path, setup, Accelerator(cpu=True))
    waiting, most = [0], [0]
    sleep, lock = real_peer.time.sleep, threading.Lock()

    def slept(seconds: float) -> None:
        assert seconds == 0.2
        with lock:
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])
        sleep(seconds)
        with lock:
            waiting[0] -= 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_peer.time, "sleep", slept)
        side()
    assert most[0] == 8 and side.counter.take().judged == 8


def test_empty_modules_stand_in_for_what_is_missing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("editr2_no_such", "editr2_no_such.v3", "json", "email.message")
    assert real_peer.stand_in(names) == ["editr2_no_such", "editr2_no_such.v3"]
    try:
        exec(
            "import editr2_no_such.v3 as v3; import editr2_no_such; assert editr2_no_such.v3 is v3"
        )
        assert real_peer.stand_in(names[:2]) == []
    finally:
        for name in names[:2]:
            del sys.modules[name]
    assert sys.modules["json"] is json


def test_the_peers_judge_scores_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    package, rewards = ModuleType("flow_factory"), ModuleType("flow_factory.rewards")
    exec(FAKE_PEER, vars(rewards))
    monkeypatch.setitem(sys.modules, "flow_factory", package)
    monkeypatch.setitem(sys.modules, "flow_factory.rewards", rewards)
    judge = peer_work.Judge(0.0)
    judge.counter = SimpleNamespace(add=lambda name, count: asked.append(name))
    asked: list[str] = []
    model = peer_sides.peer_judge(judge).Brightness()
    images = [torch.full((3, 4, 4), 0.25), torch.full((3, 4, 4), 0.75)]
    said = model(prompt=["edit", peer_work.TIED + "edit"], image=images).rewards
    assert said.tolist() == [0.25, 0.5] and asked == ["judged"] * 2


def test_rows_of_the_real_peer_are_made_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = real_peer.Setup(judge_seconds=0.5)
    clock = iter([6.0, 2.0, 3.0, 4.5, 2.0, 2.5])  # warm-up, then two rounds
    now, worked = [0.0], [0.0]

    class Side:
        learning, finite = 8, [0.1]

        def __init__(self, name: str) -> None:
            self.work = 3.0 if name == real_peer.PEER else 1.5
            self.counter = SimpleNamespace(take=lambda: setup.counts(name == real_peer.OURS))

        def __call__(self) -> dict[str, float]:
            now[0] += next(clock)
            worked[0] += self.work
            return dict.fromkeys(real_peer.PHASES, 0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_peer.time, "perf_counter", lambda: now[0])
        patch.setattr(real_peer.time, "process_time", lambda: worked[0])
        seen = real_peer.measure(
            {name: Side(name) for name in (real_peer.PEER, real_peer.OURS)}, setup, rounds=2
        )
    # The second round begins with ours.
    assert seen[real_peer.PEER].seconds["all"] == [3.0, 2.5]
    assert seen[real_peer.OURS].seconds["all"] == [4.5, 2.0]
    facts = {"peer_commit": "a0b2bc5", "answers_apart": 1e-7, "load": [0.5, 0.25]}
    rows = real_peer.rows_of(setup, seen, facts)
    assert [(r.provider, r.ours) for r in rows] == [
        (real_peer.PEER, False),
        (real_peer.OURS, True),
    ]
    assert rows[1].extra["peer_over_ours"] == [0.9583, 0.6667, 1.25]
    frame.append_rows(tmp_path / "rows", rows)
    text = report.render(frame.read_rows(tmp_path / "rows"), tmp_path / "performance.md")
    assert (
        "peer at a0b2bc5, load 0.5 and 0.25. Peer / ours **0.96** (0.67–1.25), of processor time "
        "**2.00** (2.00–2.00)." in text
    )
    assert "| **editr2** | 3.25 (2–4.5) | 0.5 (0.5–0.5) |" in text and "| 32 + 16 | 0 |" in text
    assert (
        "peer / ours: 0.96 (0.67 - 1.25), of processor time 2.00 (2.00 - 2.00);"
        in real_peer.text_of(rows)
    )


def test_the_real_peer_needs_a_checkout_and_whole_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "src" / "flow_factory" / "trainers").mkdir(parents=True)
    there = [str(tmp_path)]
    for arguments, message in (
        (there, "no src/flow_factory there"),
        ([*there, "--batch", "6"], "--batch: 6 (accepted: whole groups"),
        ([*there, "--groups", "4", "--batch", "8", "--ties"], "accepted with --ties"),
        ([*there, "--window", "4"], "--window: 4 (accepted: 1 to --steps - 1)"),
        ([*there, "--resolution", "40"], "multiples of 16"),
    ):
        with pytest.raises(SystemExit):
            real_peer.parsed(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "src" / "flow_factory" / "trainers" / "grpo.py").touch()
    options, setup = real_peer.parsed([*there, "--judge-seconds", "0.5", "--dtype", "bfloat16"])
    assert options.rounds == 5 and setup == real_peer.Setup("bfloat16", judge_seconds=0.5)


def test_the_real_peer_where_there_is_a_checkout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """EDITR2_FLOW_FACTORY: a clone of X-GenGroup/Flow-Factory."""
    checkout = os.environ.get("EDITR2_FLOW_FACTORY")
    if not checkout:
        pytest.skip("EDITR2_FLOW_FACTORY names no checkout")
    command = [sys.executable, "-m", "bench", "real_peer", checkout, "--rounds", "1"]
    sizes = [
        "--resolution",
        "32",
        "--text-tokens",
        "32",
        "--turns",
        "2",
        "--results",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *sizes], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peer, ours = frame.read_rows(tmp_path)
    kept = {"encoded": 0}  # ours may encode the sources anew
    assert peer.extra["counts"] | kept == ours.extra["counts"] | kept
    assert ours.extra["answers_apart"] <= real_peer.CLOSE["float32"]


def test_phases_are_medians_over_the_calls_of_each_provider():
    class Run:
        def __init__(self, *rounds):
            self.rounds = iter(rounds)

        def __call__(self):
            self.seconds = next(self.rounds)

    first, second = {"a": 1.0, "b": 5.0}, {"a": 3.0}
    phases = frame.Phases({"one": Run(second, second, first), "two": Run(first)})
    calls = phases.providers()
    for name in ("one", "two", "one", "one"):
        calls[name]()
    assert phases.medians("one") == {"a": 3.0, "b": 0.0} and phases.medians("two") == first
