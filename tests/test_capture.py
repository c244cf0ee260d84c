"""A denoising step compiled or recorded: the same images and log-probs as plain calls, over turns
and shapes."""

import dataclasses
from contextlib import contextmanager
from functools import cached_property
from unittest.mock import MagicMock
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor

import editr2.rl.compiled_step as capture
from editr2.config import Config, PolicyConfig, RolloutConfig, replace_nested
from editr2.errors import ConfigError, NonFiniteError
from editr2.policies.base import Velocity
from editr2.policies.unified.guidance import Guidance
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.weights import exchanged, snapshot, trainable
from editr2.rl.compiled_step import Graphs, GraphStep, Stepped, capture_step
from editr2.rl.rollout import Chunk, Seeds, rollout_chunk
from editr2.rl.sampler import make_sampler
from editr2.worlds import shapes

PLAIN = Guidance()
GUIDED = Guidance(text=3.0, image=1.5)


def tiny(guidance: Guidance = PLAIN) -> UnifiedPolicy:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "frequency_size": 8,
    }
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    return UnifiedPolicy(policy.module, policy.codec, guidance)


def rolled(
    policy: UnifiedPolicy, how: str, device: str = "cpu", keep_velocity: bool = True
) -> Chunk:
    """Sessions of two and three turns: rollouts leave, contexts grow, leaders hand over inside the
    first turn."""
    sessions = [shapes.make_session(0, i, turns=2 + i % 2) for i in range(3)]
    policy.module.to(device)
    return rollout_chunk(
        policy,
        Chunk(sessions, [0, 1, 2], 3),
        make_sampler(4, dynamics="cps", noise_level=0.7, window=2),
        Seeds(0, "test"),
        PolicyConfig(intent_tokens=3),
        rollout=RolloutConfig(capture=how),
        keep_velocity=keep_velocity,
    )


def assert_same(found: Chunk, plain: Chunk) -> None:
    """Up to the rounding of a few layers in fp32; pixels may fall to the other side of a
    rounding."""
    for a, b in zip(found.turns, plain.turns, strict=True):
        assert a.text == b.text and torch.equal(a.step_index, b.step_index)
        for name in ("x", "x_next", "x0", "velocity"):
            torch.testing.assert_close(
                getattr(a, name), getattr(b, name), rtol=0, atol=2e-5, msg=name
            )
        torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=1e-6)
        assert abs(a.images.astype(int) - b.images).max() <= 1


def compiled_by(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Traces and guards as torch.compile does, but runs the graphs as they are: Inductor takes ten
    seconds for each. Returns the graphs."""
    graphs: list[object] = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(capture.denoising_step, fullgraph=True, backend=counting)
    monkeypatch.setattr(capture, "_compiled", lambda device_type: step)
    torch._dynamo.reset()
    return graphs


# ------------------------------------------------------------------------------------------ compile


def test_a_compiled_step_gives_the_plain_steps_rollout(monkeypatch):
    graphs = compiled_by(monkeypatch)
    policy = tiny(GUIDED)
    assert_same(rolled(policy, "compile"), rolled(policy, "off"))
    # The batch grows inside the first turn and the context after it: sizes that change become
    # symbols, once each.
    assert 1 < len(graphs) <= 5
    seen = len(graphs)
    rolled(policy, "compile")
    assert len(graphs) == seen
    with torch.no_grad():
        policy.module.llm2vae.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="turn 1: velocity"):
        rolled(policy, "compile")
    assert len(graphs) == seen


@pytest.mark.slow
def test_inductor_compiles_a_step():
    torch._dynamo.reset()
    policy = tiny()
    session = shapes.make_session(0, 0, turns=1)
    x = torch.randn(2, *policy.latent_shape)
    context = policy.instruct(
        policy.encode(session.image[None].repeat(2, 0)), [session.turns[0].instruction] * 2
    )
    table = make_sampler(4, dynamics="cps", noise_level=0.7, window=2).table
    given = (x, torch.ones(2), context, table, torch.tensor([4, 0]), torch.tensor([1, 2]))
    with torch.no_grad():
        found, plain = (
            capture_step(policy, how, x.device, True)(*given) for how in ("compile", "off")
        )
    torch.testing.assert_close(found.x_next, plain.x_next, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.log_prob, plain.log_prob, rtol=0, atol=1e-6)


def test_what_cannot_be_compiled_whole_is_refused_in_one_line(monkeypatch):
    compiled_by(monkeypatch)

    class Breaks(UnifiedPolicy):
        def velocity(self, x, sigma, context):
            torch._dynamo.graph_break()
            return super().velocity(x, sigma, context)

    policy = tiny()
    with pytest.raises(
        ConfigError, match=r"rollout.capture: compile \(accepted for this Breaks: off"
    ) as found:
        rolled(Breaks(policy.module, policy.codec), "compile")
    assert "\n" not in str(found.value)


def test_more_recompilations_than_dynamo_allows_are_refused(monkeypatch):
    compiled_by(monkeypatch)
    with (
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(ConfigError, match=r"rollout.capture: compile \("),
    ):
        rolled(tiny(), "compile")
    torch._dynamo.reset()


def test_training_takes_old_log_probs_of_its_own_where_the_rollout_was_captured(
    monkeypatch, tmp_path
):
    from editr2.run.tracking import read_metrics
    from editr2.training import train

    compiled_by(monkeypatch)
    values = {
        "out": str(tmp_path / "run"),
        "policy": {"intent": False},
        "rollout": {
            "sessions": 2,
            "siblings": 3,
            "turns": 2,
            "groups_per_batch": 2,
            "capture": "compile",
        },
        "train": {"iterations": 1, "packed": "off"},
        "eval": {"sessions": 0, "strips": 0},
    }
    run = train(replace_nested(Config(), values), policy=tiny())
    (row,) = (r for r in read_metrics(run / "metrics.jsonl")[0] if r["event"] == "train")
    assert row["ratio_error"] < 1e-6  # the sentinel's own limit is 1e-5


# -------------------------------------------------------------------------------------------- graph


def test_a_graph_without_a_cuda_device_is_refused():
    with pytest.raises(
        ConfigError, match=r"rollout.capture: graph \(accepted on device cpu: off, compile"
    ):
        rolled(tiny(), "graph")


@pytest.mark.parametrize(
    "ends", [False, True], ids=["the body's error", "and that of the capture's end"]
)
def test_what_a_graph_cannot_hold_is_refused_in_one_line(monkeypatch, ends):
    """A copy from the host, say, runs outside of a capture and not in one."""
    capturing = []

    @contextmanager
    def graph(made, pool):
        capturing.append(made)
        try:
            yield
        finally:
            capturing.clear()
            if ends:
                raise RuntimeError("CUDA error: an earlier error in the capture")

    def run():
        if capturing:
            raise RuntimeError(
                "\nCUDA error: operation not permitted\nwhen the stream is capturing"
            )

    for name in ("Stream", "current_stream", "CUDAGraph", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    said = (
        r"rollout.capture: graph \(accepted for this policy: off; CUDA: CUDA error: operation not "
        r"permitted\)$"
    )
    with pytest.raises(ConfigError, match=said):
        capture._record(run, None)


def rerun(run, pool):
    """Stands in for a CUDA graph: always the same code on the same tensors, written to the same
    outputs."""
    outputs = run()

    def replay() -> None:
        for own, new in zip(outputs, run(), strict=True):
            if own is not None:
                own.copy_(new)

    return outputs, replay


@pytest.fixture
def graphs(monkeypatch) -> Graphs:
    kept = Graphs(None)
    monkeypatch.setattr(capture, "check_capture", lambda how, device: None)
    monkeypatch.setattr(capture, "_graphs", lambda policy: kept)
    monkeypatch.setattr(capture, "_record", rerun)
    return kept


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_recordings_give_the_plain_steps_rollout_and_are_used_again(graphs, guidance):
    policy = tiny(guidance)
    plain = rolled(policy, "off")
    assert_same(rolled(policy, "graph"), plain)
    # Contexts of 46 to 52, about 93 and about 139 tokens, in buckets of 64; 3 to 9 rollouts.
    seen = len(graphs.by_key)
    assert 3 <= seen <= 9
    assert_same(rolled(policy, "graph"), plain)
    assert len(graphs.by_key) == seen


def test_a_recording_belongs_to_where_the_weights_lie(graphs, monkeypatch):
    policy = tiny()

    def record(run, pool):
        """A graph reads the memory that the weights had when it was made."""
        there = {name: p.data for name, p in trainable(policy.module).items()}
        outputs, replay = rerun(run, pool)

        def on_those() -> None:
            with exchanged(policy.module, there):
                replay()

        return outputs, on_those

    monkeypatch.setattr(capture, "_record", record)
    other = {
        name: value + 0.05 * torch.randn_like(value)
        for name, value in snapshot(policy.module).items()
    }
    first = rolled(policy, "graph")
    with exchanged(policy.module, other):
        second, plain = rolled(policy, "graph"), rolled(policy, "off")
    assert_same(second, plain)
    assert not torch.allclose(first.turns[0].x0, second.turns[0].x0, atol=1e-3)
    with torch.no_grad():  # as an optimiser does: in place
        for name, p in policy.module.named_parameters():
            if name in other:
                p.copy_(other[name])
    seen = len(graphs.by_key)
    assert_same(rolled(policy, "graph"), plain)
    assert len(graphs.by_key) == seen


@dataclasses.dataclass(frozen=True)
class Nested:
    parts: dict[str, list[Tensor]]
    scale: float
    pair: tuple[Tensor, ...]

    @cached_property
    def total(self) -> Tensor:
        return sum(self.pair) * self.scale


class NestedPolicy:
    """Reads every tensor of its context and a number beside them."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(3, 3)

    def velocity(self, x, sigma, context):
        return Velocity(self.module(x) + context.parts["a"][0] + context.total + sigma[:, None])


def test_contexts_are_any_nest_of_tensors_and_what_is_none_is_part_of_the_key(monkeypatch):
    monkeypatch.setattr(capture, "GRAPHS", 2)
    policy, kept = NestedPolicy(), Graphs(None)
    table = make_sampler(4, dynamics="cps", noise_level=0.7, window=2).table

    def both(scale: float, batch: int) -> None:
        given = torch.randn(4, batch, 3).unbind()
        context = Nested({"a": [given[0]]}, scale, (given[1], given[2]))
        rest = (table, torch.full((batch,), 4), torch.arange(batch))
        replayed: Stepped = GraphStep(policy, False, kept, rerun)(
            given[3], torch.ones(batch), context, *rest
        )
        plain = capture_step(policy, "off", torch.device("cpu"))(
            given[3], torch.ones(batch), context, *rest
        )
        assert torch.equal(replayed.x_next, plain.x_next) and torch.equal(
            replayed.log_prob, plain.log_prob
        )
        assert replayed.velocity is None

    with torch.no_grad():
        for scale, batch, recordings in ((1.0, 2, 1), (1.0, 2, 1), (2.0, 2, 2), (2.0, 3, 2)):
            both(scale, batch)
            assert len(kept.by_key) == recordings
        with pytest.raises(ConfigError, match="rollout.capture: graph .*holds a Linear"):
            GraphStep(policy, False, kept, rerun)(
                torch.ones(1, 3),
                torch.ones(1),
                policy.module,
                table,
                torch.zeros(1).long(),
                torch.zeros(1).long(),
            )


def test_a_policys_recordings_go_with_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(capture, "_OF_POLICY", WeakKeyDictionary())
    policy = tiny()
    assert capture._graphs(policy) is capture._graphs(policy)
    del policy
    assert not capture._OF_POLICY


# ---------------------------------------------------------------------------------------------- gpu


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["graph", "compile"])
@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_on_a_gpu_a_captured_rollout_is_the_plain_one(how, guidance):
    torch._dynamo.reset()
    policy = tiny(guidance)
    plain = rolled(policy, "off", "cuda")
    for _ in range(2):
        assert_same(rolled(policy, how, "cuda"), plain)


@pytest.mark.gpu
def test_on_a_gpu_a_replay_does_not_wait_for_the_device():
    policy = tiny()
    rolled(policy, "graph", "cuda")
    (recording, *_) = capture._graphs(policy).by_key.values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recording.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
