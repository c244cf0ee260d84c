"""Sessions of several sizes in one run: each is edited, scored and trained as in a run of its own
size alone."""

import functools
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from editr2.check import estimate as estimates
from editr2.check import preflight
from editr2.check.editors import Editor
from editr2.check.estimate import mixed
from editr2.check.meter import Cost
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, RolloutConfig, replace_nested
from editr2.errors import ConfigError, DataError
from editr2.judge.outputs import output_sizes
from editr2.policies.base import SizedPolicy, at_size
from editr2.policies.configured import policy_class
from editr2.policies.rules import check_config
from editr2.rl import compiled_step
from editr2.rl.drift import drift
from editr2.rl.evaluate import _drifts
from editr2.rl.gradient import Batch, accumulate_gradient
from editr2.rl.judging import judge
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.sampler import own_schedule, rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes
from editr2.run.tracking import read_metrics
from editr2.sessions import Session, Turn, load_sessions, save_sessions
from editr2.sessions.buckets import nearest, spread
from editr2.training import train

LYING, UPRIGHT, SQUARE = SIZES = ((32, 48), (48, 32), (32, 32))
"""Of the first two the transposed has equally many tokens, in other places."""
TURNS = tuple(Turn(text) for text in ("make it red", "more light", "remove the dog"))


@pytest.fixture(scope="module")
def pipeline(beside):
    """A model's tiny pipeline, one for all tests: nothing here trains."""

    @functools.cache
    def made(model):
        if model == "qwen-edit":
            return beside("tiny_qwen").qwen_pipeline()
        return getattr(beside("tiny_editors"), f"{model}_pipeline")()

    return made


@pytest.fixture
def policy(pipeline):
    def made(model, **settings):
        settings = {"text_tokens": 40, "resolution": SQUARE, "buckets": SIZES} | settings
        return policy_class(model)(pipeline(model), PolicyConfig(model=model, **settings))

    return made


def sessions(order, turns=TURNS):
    """One of each size of `order`; all of one colour, so that equal bytes stand for several
    sizes."""
    return [
        Session(str(i), np.full((*size, 3), 40 + 20 * (i // 2), np.uint8), turns)
        for i, size in enumerate(order)
    ]


ORDER = (LYING, SQUARE, LYING, UPRIGHT)


def settings_of(loss):
    window = {"window": 0, "shared_noise": False} if loss == "nft" else {"window": 1}
    rollout = {"siblings": 2, "steps": 2, **window}
    return replace_nested(Config(), {"rollout": rollout, "train": {"loss": loss, "ema": None}})


def rolled(policy, config, at, groups):
    """Chunks of the sessions at some places of `ORDER`."""
    sampler = rollout_sampler(config.rollout, own_schedule(policy))
    given, seeds = sessions(ORDER), Seeds(0, "test")
    return sampler, [
        rollout_chunk(policy, chunk, sampler, seeds, config.policy, rollout=config.rollout)
        for chunk in chunks([given[i] for i in at], at, config.rollout.siblings, groups)
    ]


def outputs(done):
    """The images of every rollout, by the ordinal of its session and its place in the group."""
    return {
        (chunk.ordinals[i // 2], i % 2): chunk.images_of(i)
        for chunk in done
        for i in range(chunk.rollouts)
    }


def gradient(policy, config, at, groups):
    """The images, the gradient of the loss with credit that is anything, and the sums of it."""
    sampler, done = rolled(policy, config, at, groups)
    advantage = torch.randn(len(ORDER), 2, 3, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        done,
        advantage[list(at)].flatten(0, 1),
        torch.ones(2 * len(at), 3, dtype=torch.bool),
        6 * len(ORDER),
        sampler,
        Seeds(0, "test"),
        config.policy,
        config.rollout,
    )
    state, processes = new_state(config.train, policy), Processes(Accelerator(cpu=True))
    sums = accumulate_gradient(config.train, state, batch, 0, 0, processes)
    parameters = policy.module.parameters()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    state.put_back()
    return outputs(done), found, sums


@pytest.mark.parametrize(
    ("model", "loss"), [("kontext", "grpo"), ("klein", "nft"), ("qwen-edit", "grpo")]
)
def test_sessions_are_edited_and_trained_as_in_a_run_of_their_size(policy, model, loss):
    config = settings_of(loss)
    images, whole, sums = gradient(policy(model), config, range(4), 3)
    assert sums["ratio_error"] <= 1e-6 and len(images) == 8
    again = outputs(rolled(policy(model), config, range(4), 1)[1])
    apart = [np.abs(images[key].astype(int) - again[key]).max() for key in images]
    assert max(apart) <= 1  # of 255: products of other batches may round otherwise
    parts = torch.zeros_like(whole)
    for size in SIZES:
        at = [i for i, own in enumerate(ORDER) if own == size]
        alone = policy(model, resolution=size, buckets=())
        found, part, _ = gradient(alone, config, at, 3)
        parts += part
        for key, image in found.items():
            assert image.shape == (3, *size, 3) and np.array_equal(image, images[key]), key
    assert float(whole.abs().max()) > 1e-6
    assert torch.allclose(parts, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_recorded_step_is_of_its_size(policy, monkeypatch):
    def rerun(run, pool):
        """Stands in for a CUDA graph: the same code on the same tensors."""
        outputs = run()

        def replay():
            for own, new in zip(outputs, run(), strict=True):
                if own is not None:
                    own.copy_(new)

        return outputs, replay

    monkeypatch.setattr(compiled_step, "check_capture", lambda how, device: None)
    monkeypatch.setattr(compiled_step, "_record", rerun)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    bucketed, config = policy("kontext"), settings_of("grpo")
    graphs = replace_nested(config, {"rollout": {"capture": "graph"}})
    _, plain = rolled(bucketed, config, (2, 3), 3)
    _, replayed = rolled(bucketed, graphs, (2, 3), 3)
    a, b = outputs(plain), outputs(replayed)
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_what_chunks_give_stands_in_the_order_of_the_sessions(policy):
    class Width:
        names = ("width",)

        def __call__(self, session, images):
            return [{"width": images.shape[2] / 100 + int(session.id) / 10} for _ in images]

    bucketed, config = policy("kontext"), settings_of("grpo")
    _, done = rolled(bucketed, config, range(4), 3)
    assert [chunk.places for chunk in done] == [[0, 2], [1], [3]]
    values = judge(Width(), done, 3).values[:, 0, 0]
    expected = [ORDER[i][1] / 100 + i / 10 for i in range(4) for _ in range(2)]
    assert torch.allclose(values, torch.tensor(expected))
    drifts, images = _drifts(done, 3), outputs(done)
    for i, session in enumerate(sessions(ORDER)):
        assert np.array_equal(drifts[2 * i], drift(session.image, images[i, 0]), equal_nan=True)


def test_windows_start_alike_at_every_size(policy):
    own = own_schedule(policy("kontext"))
    for schedule in ("fixed", "progressive"):
        moves = RolloutConfig(steps=4, window=1, window_schedule=schedule, window_every=1)
        sampler = rollout_sampler(moves, own).at(1)
        lying = sampler.of(LYING)
        assert (lying.first_start, lying.last_start) == (sampler.first_start, sampler.last_start)
        assert not torch.equal(lying.sigmas, sampler.sigmas)
    assert rollout_sampler(RolloutConfig(shift=3.0), own).of(LYING).sizes == {}


# ------------------------------------------------------------------------------------------- a run


@pytest.fixture
def folder(pipeline, tmp_path):
    """Kontext's weights, and sessions of three shapes twice as large as the buckets."""
    pipeline("kontext").save_pretrained(tmp_path / "weights")
    lines = []
    for i, size in enumerate(ORDER):
        image = np.random.default_rng(i).integers(0, 256, (2 * size[0], 2 * size[1], 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        turns = [{"instruction": turn.instruction} for turn in TURNS]
        lines.append(json.dumps({"id": str(i), "image": f"{i}.png", "turns": turns}))
    (tmp_path / "sessions.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def config(folder):
    def made(out, iterations=2):
        values = {
            "out": str(folder / out),
            "data": {"path": str(folder / "sessions.jsonl"), "resize": "crop"},
            "reward": {"function": "editr2.rewards.brightness:Brightness"},
            "policy": {
                "model": "kontext",
                "weights": str(folder / "weights"),
                "resolution": SQUARE,
                "buckets": SIZES,
                "text_tokens": 40,
                "lora_rank": 2,
            },
            "rollout": {"sessions": 3, "siblings": 2, "steps": 2, "window": 1},
            "credit": {"preset": "flow-grpo", "weights": {"brightness": 1.0}},
            "train": {"iterations": iterations, "lr": 1e-2},
            "eval": {"sessions": 3, "strips": 3},
        }
        return replace_nested(Config(), values)

    return made


def test_a_run_goes_on_bit_for_bit_and_everything_around_it_knows_the_sizes(folder, config):
    whole = train(config("whole"))
    train(config("parts", 1))
    parts = train(config("parts"))
    file = "pytorch_lora_weights.safetensors"
    a, b = (load_file(run / "policy" / file) for run in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [row for row in read_metrics(whole / "metrics.jsonl")[0] if row["event"] == "train"]
    assert all(row["ratio_error"] <= 1e-6 and row["grad_norm"] > 0 for row in rows)
    strips = [Image.open(whole / "strips" / "after" / f"00{i}_t3.png").size for i in range(3)]
    assert strips == [(size[1], size[0]) for size in ORDER[:3]]
    (folder / "run.yaml").write_text((whole / "config.yaml").read_text())
    changes = ["--out", str(folder / "out"), "--eval.sessions", "4"]
    assert main(["rollout", "--config", str(folder / "run.yaml"), *changes]) == 0
    written = (folder / "out" / "outputs.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in written] == ["0", "1", "2", "3"]
    assert output_sizes([str(folder / "out")]) == (LYING, SQUARE, UPRIGHT)


def test_memory_is_that_of_the_largest_size_and_time_that_of_the_mix(config, monkeypatch):
    def cost(editor, step, batch, *how):
        pixels = editor.image_size[0] * editor.image_size[1]
        return Cost({torch.float32: pixels * 10**12}, 0, 0, 0, pixels * 2**20, 0)

    seen = []
    monkeypatch.setattr(Editor, "cost", cost)
    monkeypatch.setattr(Editor, "held", lambda *of: 0)
    monkeypatch.setattr(estimates, "mixed", lambda parts: seen.append(parts) or mixed(parts))
    lines = "\n".join(preflight(config("checked")).lines)
    shares = "32 x 48 (50%), 32 x 32 (25%), 48 x 32 (25%) of the sessions"
    assert f"buckets     {shares}\n" in lines
    ((three, large), (one, small)) = seen[0]
    together = mixed(seen[0])
    assert (three, one) == (0.75, 0.25) and large.peak > small.peak
    assert together.peaks == large.peaks
    train_s = [part.seconds["train"] for part in (large, small, together)]
    assert train_s[0] / train_s[1] == pytest.approx(1.5, rel=1e-3)
    assert train_s[2] == pytest.approx(0.75 * train_s[0] + 0.25 * train_s[1])


# --------------------------------------------------------------------------------------- the sizes


@pytest.mark.parametrize(
    ("image", "size"),
    [
        ((100, 100), (128, 128)),  # of equal ratios the nearest area
        ((1000, 1400), (96, 144)),  # 1.4 is nearer to 1.5 than to 1
        ((1400, 1000), (144, 96)),
        ((1000, 1200), (128, 128)),  # and 1.2 to 1
        ((10, 90), (96, 144)),
        ((70, 70), (64, 64)),
    ],
)
def test_an_image_gets_the_size_of_the_nearest_ratio(image, size):
    assert nearest(((128, 128), (64, 64), (96, 144), (144, 96)), *image) == size


@pytest.mark.parametrize("side", [512, 768, 1024])
def test_sizes_laid_out_have_the_area_and_the_multiple(side):
    sizes = spread(side * side, 16)
    assert len(sizes) == 9 and sizes[4] == (side, side)
    assert set(sizes) == {(w, h) for h, w in sizes}
    assert all(h % 16 == w % 16 == 0 and abs(h * w / side**2 - 1) < 0.02 for h, w in sizes)
    assert max(h / w for h, w in sizes) == pytest.approx(2, rel=0.03)


def test_a_line_can_name_its_size(tmp_path):
    images = [np.zeros((60, 90, 3), np.uint8), np.zeros((48, 32, 3), np.uint8)]
    given = [Session("a", images[0], TURNS, size=SQUARE), Session("b", images[1], TURNS)]
    file = save_sessions(given, tmp_path)
    found = load_sessions(file, size=SIZES, resize="crop")
    assert [s.image_size for s in found] == [s.image.shape[:2] for s in found] == [SQUARE, UPRIGHT]
    assert [s.size for s in load_sessions(file)] == [SQUARE, None]
    assert [s.image_size for s in load_sessions(file, memory=0)] == [(60, 90), UPRIGHT]
    refused = {
        "[32, 32] (accepted: 32×48, 48×32, or absent)": {"size": SIZES[:2], "resize": "crop"},
        "60×90 pixels, height × width (accepted: 32×32": {"size": SIZES},
    }
    for said, how in refused.items():
        with pytest.raises(DataError) as caught:
            load_sessions(file, **how)
        assert f"{file}:1: " in str(caught.value) and said in str(caught.value)
    line = json.loads(file.read_text().splitlines()[0])
    for size in ([32], [32, 0], [32, 32.0], "32x32", [True, 32]):
        file.write_text(json.dumps(line | {"size": size}) + "\n")
        with pytest.raises(DataError, match=r":1: size: .* \(accepted: \[height, width\]"):
            load_sessions(file)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy": {"buckets": "all"}}, "policy.buckets: 'all'"),
        ({"policy": {"buckets": [[32, 4]]}}, "and this has 4"),
        ({"policy": {"buckets": [[32, 48]] * 2}}, r"\[32, 48\] twice"),
        ({"policy": {"condition_resolution": SQUARE}}, "policy.condition_resolution: "),
        ({"train": {"minibatches": 2}}, "train.minibatches: 2 .*policy.buckets"),
        ({"policy": {"model": "unified", "resolution": (512, 512)}}, "policy.buckets: .* unified"),
    ],
)
def test_what_does_not_go_with_them_is_refused(changes, said):
    policy = {"model": "kontext", "buckets": SIZES, "resolution": SQUARE}
    config = replace_nested(Config(), {"policy": policy, "data": {"path": "."}})
    with pytest.raises(ConfigError, match=said):
        check_config(replace_nested(config, changes))


def test_a_view_has_no_room_of_another_size(policy):
    whole, alone = policy("qwen-edit"), policy("qwen-edit", resolution=UPRIGHT, buckets=())
    assert whole.text_room(1) != whole.at(UPRIGHT).text_room(1) == alone.text_room(1)


def test_a_policy_refuses_sizes_that_it_cannot_have(policy, tiny_unified):
    with pytest.raises(ConfigError, match=r"policy.buckets: \[32, 40\] .*multiples of 16"):
        policy("kontext", buckets=[(32, 48), (32, 40)])
    bucketed = policy("kontext")
    assert isinstance(bucketed, SizedPolicy) and bucketed.at(LYING).at(SQUARE) is bucketed
    with pytest.raises(DataError, match="images: 64 x 64 px"):
        bucketed.at((64, 64))
    assert at_size(tiny_unified, (64, 64)) is tiny_unified
    config = replace_nested(Config(), {"policy": {"buckets": SIZES}})
    with pytest.raises(ConfigError, match=r"UnifiedPolicy, which edits one size: \[\]"):
        sessions_for(config, tiny_unified)
