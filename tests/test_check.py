"""The pre-flight check: what it counts against what really runs, what it finds, and the recipes."""

import json
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from editr2.check import Report, levers, preflight, settled_for_device
from editr2.check.devices import _SHEETS, PEER_EFFICIENCY, Device, device_at_hand, find_device
from editr2.check.editors import Editor, open_editor
from editr2.check.estimate import estimate, evaluation_plan, plan, strips_plan
from editr2.check.judges import Measured, judging, waiting
from editr2.check.levers import (
    AGAIN,
    COMPILE,
    ROOM,
    ROWS,
    Case,
    alone,
    autos,
    fastest,
    flags,
    propose,
    settle,
    value_of,
    with_values,
)
from editr2.check.meter import Cost, Meter, Speed
from editr2.cli.main import main
from editr2.config import Config, PolicyConfig, RewardConfig, replace_nested
from editr2.errors import ConfigError
from editr2.policies.base import TurnTask
from editr2.policies.blocks import recompute_blocks
from editr2.policies.blueprint import simulated
from editr2.policies.configured import policy_class
from editr2.policies.load import load_policy
from editr2.policies.pipeline_blueprint import PipelineBlueprint
from editr2.rewards.adapt import adapt
from editr2.rewards.base import Score
from editr2.rewards.load import load_reward
from editr2.rl.evaluate import evaluate
from editr2.rl.gradient import Batch, accumulate_gradient
from editr2.rl.rollout import Seeds, chunks, rollout_chunk
from editr2.rl.rules import run_problems
from editr2.rl.sampler import rollout_sampler
from editr2.rl.sessions import sessions_for
from editr2.rl.state import new_state
from editr2.run.processes import Processes
from editr2.worlds.shapes import make_session

ROOT = Path(__file__).parent.parent
DIFFUSION = ("kontext", "klein", "klein-kv", "qwen-edit", "qwen-edit-plus")
SINCE = ("flux2", "longcat-edit", "qwen-image-2.1")
TEXTS = ["make it red", "make it a good deal bluer"]

EXHAUSTIVE = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def _no_levers(request, monkeypatch):
    """What others levers would give takes as long as the rest of the page together; a test that
    looks at it is marked."""
    if request.node.get_closest_marker("levers") is None:
        monkeypatch.setattr("editr2.check.text.levers", lambda case, given: [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny pipelines by model; kontext's has three blocks of each kind, one more than
    any that is measured, and small's has one."""

    def load(name):
        spec = spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    editors, qwen = load("tiny_editors"), load("tiny_qwen")
    made = {}

    def folder(model):
        if model not in made:
            made[model] = tmp_path_factory.mktemp(model)
            if model.startswith("qwen-edit"):
                qwen.save_pipeline(
                    qwen.qwen_pipeline(plus=model.endswith("plus"), num_layers=2), made[model]
                )
            elif model == "qwen-image-2.1":
                qwen.save_pipeline(qwen.qwen_image_pipeline(), made[model])
            elif model == "longcat-edit":
                qwen.save_pipeline(qwen.longcat_pipeline(), made[model])
            elif model == "klein":
                editors.klein_pipeline(num_layers=2).save_pretrained(made[model])
            elif model == "klein-kv":
                editors.klein_kv_pipeline().save_pretrained(made[model])
            elif model == "flux2":
                editors.flux2_pipeline(num_layers=2).save_pretrained(made[model])
            else:
                blocks = {"num_layers": 3, "num_single_layers": 3} if model == "kontext" else {}
                editors.kontext_pipeline(**blocks).save_pretrained(made[model])
        return str(made[model])

    return folder


def counted(run):
    """torch's own count. It does not know the CPU's fused attention: two matrix products forward,
    and backward those of the scores again and two for each of the two."""

    def pairs(query, key):
        return 2 * query[0] * query[1] * query[2] * key[2] * query[3]

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        op: lambda q, k, *_, **__: 2 * pairs(q, k),
        backward: lambda grad, q, k, *_, **__: 5 * pairs(q, k),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def opened(folders):
    """A loaded policy, its editor without weights, and a context of two instructions, by model."""
    made = {}

    def of(model):
        if model not in made:
            config = PolicyConfig(
                model=model, weights=folders(model), resolution=(64, 64), lora_rank=4
            )
            policy, editor = load_policy(config), open_editor(config)
            context = policy.instruct(
                policy.encode(np.zeros((2, 64, 64, 3), dtype=np.uint8)),
                TEXTS if policy.masks or model in DIFFUSION else TEXTS[:1] * 2,
            )
            length = context.prompt["words"].shape[1]
            if model.startswith("qwen"):  # whose prompts are as long as they are
                known = {"text_length": lambda *_: length}
                editor.blueprint.__class__ = type("Known", (PipelineBlueprint,), known)
            assert editor.blueprint.text_length(0) == length
            made[model] = policy, editor, context
        return made[model]

    return of


@pytest.mark.parametrize("model", (*DIFFUSION, *SINCE))
def test_a_context_takes_what_the_loaded_policys_takes(opened, model):
    _, editor, context = opened(model)
    prompt = (t for name, t in context.prompt.items() if name != "mask" or editor.policy.masks)
    tensors = (*context.conditions, *prompt, *context.derived)
    assert editor.held(2, 0) == sum(t.nbytes for t in tensors)
    assert (len(context.derived) > 0) == (model == "klein-kv")
    assert editor.policy.derives() == (model in ("klein-kv", "qwen-image-2.1"))


@pytest.mark.parametrize("model", [*DIFFUSION, *(pytest.param(m, marks=EXHAUSTIVE) for m in SINCE)])
def test_flops_and_parameters_are_those_of_the_loaded_policy(opened, model):
    policy, editor, context = opened(model)
    x, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.7])
    assert (editor.image_size, editor.latent_shape) == (policy.image_size, policy.latent_shape)
    assert editor.own(4) == policy.sigmas(4)

    def forward():
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # as matrix products, which torch's counter sees by itself
            policy.velocity(x, sigma, context)

    def backward():
        policy.velocity(x, sigma, context).v.sum().backward()

    with torch.no_grad():
        assert editor.cost("velocity", 2, 0).total_flops == counted(forward)
    assert editor.cost("train", 2, 0, "off").total_flops == counted(backward)
    if model == "kontext":
        policy.module.enable_gradient_checkpointing()
        again = counted(backward)
        policy.module.disable_gradient_checkpointing()
        assert (
            editor.cost("train", 2, 0, "all").total_flops
            == again
            > editor.cost("train", 2, 0, "off").total_flops
        )
    images = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        conditions = policy.to_latents(images)
        read = counted(lambda: policy.to_latents(images)) + counted(
            lambda: policy.derive((conditions,))
        )
        with sdpa_kernel(SDPBackend.MATH):
            one = policy.select(context, torch.tensor([0]))
            read += counted(lambda: policy.extend(one.prompt, one.conditions))
        assert editor.cost("encode", 1, 0).total_flops == read
        assert editor.cost("decode", 1, 0).total_flops == counted(lambda: policy.to_pixels(x[:1]))
    sizes, parameters = editor.sizes(), list(policy.module.parameters())
    assert sizes.parameters == sum(p.numel() for p in parameters)
    assert sizes.trainable == sum(p.numel() for p in parameters if p.requires_grad)
    assert (
        sizes.weights == 4 * (sizes.parameters - sizes.trainable)
        and sizes.trained == 4 * sizes.trainable
    )
    blocks = [
        p for p in policy.module.modules() if type(p).__name__ in policy.module._repeated_blocks
    ]
    frozen = [
        4 * sum(p.numel() for name, p in b.named_parameters() if ".lora_" not in name)
        for b in blocks
    ]
    assert len(blocks) >= 2 and (sizes.block, sizes.outside) == (
        max(frozen),
        sizes.weights - sum(frozen),
    )
    text = sum(
        p.numel() for name in policy.text_encoders for p in getattr(policy.pipe, name).parameters()
    )
    assert (sizes.text, sizes.vae) == (
        4 * text,
        4 * sum(p.numel() for p in policy.pipe.vae.parameters()),
    )


def test_cost_at_a_batch_is_the_line_through_two_smaller_ones(opened):
    policy, editor, context = opened("kontext")
    rows = torch.tensor([0, 1, 0, 1, 0])
    x, wide = torch.randn(5, *policy.latent_shape), policy.select(context, rows)
    with torch.no_grad(), Meter() as meter:
        v = policy.velocity(x, torch.full((5,), 0.5), wide)
    del v
    estimated = editor.cost("velocity", 5, 0)
    assert estimated.total_flops == meter.cost.total_flops
    assert estimated.peak == pytest.approx(meter.cost.peak, rel=0.02)
    assert estimated.bytes == pytest.approx(meter.cost.bytes, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["off", "all", 2, 4])
def test_peak_memory_is_what_the_allocator_hands_out(opened, checkpointing):
    policy, editor, context = opened("kontext")
    x, sigma = torch.randn(2, *policy.latent_shape), torch.tensor([0.3, 0.7])
    recompute_blocks(policy.module, checkpointing)

    def step():
        policy.velocity(x, sigma, context).v.sum().backward()

    step()  # gradients are there from now on
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    policy.module.disable_gradient_checkpointing()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # Kernels take small workspaces of their own; as measured, 0.03 and 0.5 %, of some blocks 2.3 %.
    assert editor.cost("train", 2, 0, checkpointing).peak == pytest.approx(peak, rel=0.03)


def test_flops_of_the_unified_policy_are_those_of_a_walk():
    config = PolicyConfig(intent=False)
    policy, editor = load_policy(config), open_editor(config)
    session = make_session(0, 0)
    said = session.turns[0].instruction
    same = replace(session, turns=(session.turns[0],) * 3)
    editor.see([same])
    images = np.stack([session.image] * 4)
    with torch.no_grad():
        context = policy.instruct(policy.encode(images), [said] * 4)
        context = policy.instruct(policy.append(context, images), [said] * 4)
    x, sigma = torch.randn(4, *policy.latent_shape), torch.full((4,), 0.5)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        assert editor.cost("velocity", 4, 1).total_flops == counted(
            lambda: policy.velocity(x, sigma, context)
        )
        assert editor.cost("encode", 4, 2).total_flops == counted(
            lambda: policy.append(context, images)
        )
    backward = counted(lambda: policy.velocity(x, sigma, context).v.sum().backward())
    assert editor.cost("train", 4, 1).total_flops == backward


@pytest.mark.parametrize(
    "rows, sessions", [(None, [6]), (1, [1] * 6), (11, [1] * 6), (12, [2] * 3), (25, [4, 2])]
)
def test_packed_sessions_go_whole_as_many_as_there_are_rows_for(rows, sessions):
    """Two groups of three, of which one has a third turn; two places a turn, questions from the
    second turn on."""
    values = {
        "rollout": {"sessions": 2, "siblings": 3, "window": 2, "groups_per_batch": 2},
        "train": {"packed": "on", "micro_batch": rows},
    }
    config = replace_nested(Config(), values)
    calls = plan(config, open_editor(config.policy), rollout_sampler(config.rollout), [3, 2], 1)
    expected = [(t, max(1, round(n * (0.5 if t == 2 else 1)))) for n in sessions for t in range(3)]
    for step, places, first in (("train", 2, 0), ("answer", 1, 1)):
        found = [(c.turn, c.batch) for c in calls if c.step == step]
        assert found == [(t, n * places) for t, n in expected if t >= first]


@pytest.mark.exhaustive
def test_a_packed_forward_keeps_what_it_has_of_all_turns():
    """Of two guided rollouts of three turns, or of one of them, beside what torch keeps."""
    values = {
        "policy": {"intent": False, "guidance": 4.0, "guidance_image": 2.0},
        "rollout": {"sessions": 1, "siblings": 2, "window": 2, "groups_per_batch": 1},
        "train": {"packed": "on"},
    }
    config = replace_nested(Config(), values)
    policy, editor = load_policy(config.policy), open_editor(config.policy)
    session = make_session(0, 0)
    said = session.turns[0].instruction
    editor.see([replace(session, turns=(session.turns[0],) * 3)])
    samplers = (rollout_sampler(config.rollout),) * 2
    device = Device("made up", 2**30, Speed({torch.float32: 1e12}, 1e12, 0.0, True))
    for rollouts, rows in ((2, None), (1, 6), (1, 1)):
        images = np.stack([session.image] * rollouts)
        x, sigma = torch.randn(rollouts, 2, *policy.latent_shape), torch.rand(rollouts, 2)
        turns = [TurnTask([said] * rollouts, images, x, sigma)] * 3
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            done = policy.replay_packed(images, turns, context_gradient=False, temperature=1.0)
        for p in policy.module.parameters():
            kept.pop(p.untyped_storage().data_ptr(), None)
        bounded = replace_nested(config, {"train": {"micro_batch": rows}})
        result = estimate(bounded, editor, device, samplers, ([3], [3]), 1)
        assert result.memory["activations, train"] == pytest.approx(sum(kept.values()), rel=0.15)
        del done


@pytest.mark.parametrize("loss", ["grpo", "nft"])
def test_the_plan_lists_the_velocities_that_an_iteration_asks_for(tiny_unified, loss):
    settings = {
        "policy": {"intent": False},
        "rollout": {
            "sessions": 3,
            "siblings": 3,
            "groups_per_batch": 2,
            "steps": 4,
            "turns": 2,
            "shared_noise": False,
        },
        "train": {
            "packed": "off",
            "kl_weight": 0.1,
            "loss": loss,
            "ema": None,
            "old_log_prob": "rollout",
        },
        "eval": {"sessions": 9},
    }
    settings["rollout"] |= {"window": 0} if loss == "nft" else {}
    settings["train"] |= {} if loss == "nft" else {"micro_batch": 5}
    config = replace_nested(Config(), settings)
    sampler, asked, velocity = rollout_sampler(config.rollout), [], tiny_unified.velocity

    def counting(x, sigma, context):
        asked.append(("train" if torch.is_grad_enabled() else "velocity", len(x)))
        return velocity(x, sigma, context)

    def same(calls):
        found = Counter()
        for c in calls:
            found[c.step, c.batch] += c.times
        seen, wanted = (
            Counter(asked),
            {k: n for k, n in found.items() if k[0] in ("velocity", "train")},
        )
        asked.clear()
        return seen == wanted

    tiny_unified.velocity = counting
    editor = open_editor(config.policy)
    listed = plan(config, editor, sampler, [2, 2, 2], 1)
    source, seeds = sessions_for(config, tiny_unified), Seeds(0, "train")
    processes = Processes(Accelerator(cpu=True))
    done = [
        rollout_chunk(tiny_unified, chunk, sampler, seeds, config.policy, rollout=config.rollout)
        for chunk in chunks([source[o] for o in range(3)], range(3), 3, 2)
    ]
    assert same([c for c in listed if c.phase == "rollout"])
    batch = Batch(
        done,
        torch.randn(9, 2),
        torch.ones(9, 2, dtype=torch.bool),
        18,
        sampler,
        seeds,
        config.policy,
        config.rollout,
    )
    accumulate_gradient(config.train, new_state(config.train, tiny_unified), batch, 0, 0, processes)
    assert same([c for c in listed if c.phase == "train"])
    evaluate(tiny_unified, load_reward(config.reward), source.heldout, sampler, config, processes)
    assert same(evaluation_plan(config, editor, sampler, [2] * 9, 1))


def test_what_fusing_saves():
    """An elementwise chain between two products reads what it starts from and writes what the next
    product takes; what a later kernel reads again was written once, and is read again."""
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    with Meter() as meter:
        y = x @ w
        kept = y.mul(2).add(y)  # read y once, write kept once
        z = kept @ w
        z.add_(kept)  # read z and kept, write z
        one = meter.cost
    size = x.nbytes
    assert (one.fused_bytes, one.bytes) == (2 * size + 3 * size, (2 + 3 + 2) * size)
    assert (one.fused_operations, one.operations) == (4, 5)
    with Meter() as meter:
        doubled = x.mul(2)  # read x
        torch.mm(x, w)
        doubled.add(1)  # of another kernel: doubled was written, and is read
    assert (meter.cost.fused_bytes, meter.cost.fused_operations) == (3 * size, 3)
    with Meter() as meter:
        x.mul(2).add(1).sin()  # read once; nobody asks for what it makes
    assert (meter.cost.fused_bytes, meter.cost.bytes) == (size, 6 * size)
    speed = Speed({}, 1.0, 0.0, True)
    assert (meter.cost.seconds(speed, True), meter.cost.seconds(speed)) == (size, 6 * size)


def test_simulated_tensors_hold_nothing_and_memory_comes_back():
    with simulated(torch.bfloat16):
        big = torch.empty(2**20, 2**16)  # 128 GiB
        with Meter() as meter:
            half = big[: 2**19] + 1
            assert meter.cost.peak == meter.cost.kept == half.untyped_storage().nbytes() == 2**36
            del half
        assert (
            meter.cost.kept == 0
            and meter.cost.operations == 1
            and meter.cost.bytes == 2**37 + 2**36
        )
    assert torch.get_default_dtype() == torch.float32


# ----------------------------------------------------------------------------------------- problems


def failing(session, images):
    return [{"IF": Score(None, "no judge at this address")} for _ in images]


def test_all_problems_come_together(tmp_path, capsys):
    images = tmp_path / "sessions.jsonl"
    images.write_text('{"image": "none.png", "turns": [{"instruction": "x"}]}\n{"turns": 3}\n')
    arguments = [
        "--data",
        str(images),
        "--rollout.window",
        "9",
        "--train.minibatches",
        "5",
        "--train.lr",
        "0",
    ]
    arguments += [
        "--credit.weights",
        '{"beauty": 1.0}',
        "--rollout.siblings",
        "1",
        "--credit.fusion",
        "none-such",
    ]
    assert main(["check", *arguments]) == 2
    said = capsys.readouterr()
    assert not said.out
    lines = said.err.splitlines()
    for start in (
        "rollout.window: 9",
        "train.minibatches: 5",
        "train.lr: 0",
        "rollout.siblings: 1",
        "credit.weights: ['beauty']",
        "credit.fusion: 'none-such'",
        f"{images}:1: ",
        f"{images}:2: ",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"policy": {"model": "kontext", "resolution": [500, 512]}},
            r"policy\.resolution: \[500, 512\]",
        ),
        ({"policy": {"model": "qwen-edit", "keep_source": True}}, r"policy\.keep_source: True"),
        (
            {"policy": {"model": "klein", "weights": "someone/else"}},
            r"policy\.weights: 'someone/else'.*downloads nothing",
        ),
        (
            {"policy": {"model": "klein", "lora_rank": 4, "lora_targets": "nothing"}},
            r"policy\.lora_targets: 'nothing'",
        ),
        ({"policy": {"weights": "no/such"}}, "no/such: no config.json"),
        ({"reward": {"function": "editr2.rewards.brightness:Dark"}}, r"reward\.function: .*Dark"),
        (
            {"rollout": {"dynamics": "ddim-sde", "noise_level": 1.0, "window": 4}},
            r"rollout\.window: steps \[3\]",
        ),
    ],
)
def test_a_problem_is_one_line_that_names_the_field(settings, message):
    config = replace_nested(Config(), settings)
    if config.policy.model != "unified":
        config = replace_nested(
            config, {"data": {"path": str(ROOT / "examples" / "shapes"), "resize": "crop"}}
        )
    (problem,) = preflight(config).problems
    assert re.search(message, problem) and "\n" not in problem


def test_a_problem_of_every_image_is_not_a_line_of_every_image():
    data = str(ROOT / "examples" / "shapes")
    problems = preflight(
        replace_nested(Config(), {"policy": {"model": "kontext"}, "data": {"path": data}})
    ).problems
    assert len(problems) == 9 and all("data.resize" in line for line in problems[:8])
    assert problems[8] == f"{data}: 8 more problems after these 8"


class Asked:
    """names, and whatever else a reward declares; every turn takes so many seconds."""

    def __init__(self, seconds=0.0, notes=(), **declared):
        self.seconds, self.notes, self.names = seconds, notes, ("IF",)
        vars(self).update(declared)

    def judge(self, items):
        time.sleep(self.seconds * sum(len(item.asked) for item in items))
        return [[1.0] * len(item.asked) for item in items]

    def probe(self):
        if isinstance(self.notes, Exception):
            raise self.notes
        return self.notes


SERVER = {"concurrency": 16, "by_turn": True, "batch": 1}


@pytest.mark.parametrize(
    ("declared", "rollout", "expected"),
    [
        # 16 rollouts of 3 turns: 48 turns of 0.2 s.
        ({}, 5.0, (1, 1, 9.6, 9.6)),  # one call, on the main thread, after the rollout
        ({"batch": 1}, 5.0, (16, 1, 9.6, 9.6)),
        ({"batch": 5}, 5.0, (4, 1, 9.6, 9.6)),
        (SERVER, 0.0, (48, 16, 0.6, 0.6)),
        (SERVER, 0.3, (48, 16, 0.6, 0.35)),  # of two chunks with three turns each the last is left
        (SERVER, 60.0, (48, 16, 0.6, 0.1)),
        ({**SERVER, "by_turn": False}, 60.0, (16, 16, 0.6, 0.3)),
        ({**SERVER, "concurrency": 100}, 0.0, (48, 48, 0.2, 0.2)),
        ({**SERVER, "calls_a_turn": 4.5}, 0.0, (216, 16, 0.6, 0.6)),
    ],
)
def test_what_an_iteration_asks_of_a_judge(declared, rollout, expected):
    m = Measured(adapt(Asked(**declared)), 0.2, [])
    found = judging(m, sessions=4, siblings=4, turns=3.0, chunks=2, rollout=rollout)
    calls, at_once, seconds, waits = expected
    assert (found.calls, found.at_once) == (calls, at_once)
    assert (found.seconds, found.waits) == pytest.approx((seconds, waits))
    alone = Measured(adapt(Asked()), 0.1, [])
    beside = [(m, found), (alone, judging(alone, 4, 4, 3.0, 2, rollout))] * 2
    # What is asked beside the rollout is asked at once, the rest one after the other.
    waited = waits if "concurrency" in declared else 2 * waits
    assert waiting(beside) == pytest.approx(waited + 9.6)


def test_the_part_of_the_judges(monkeypatch, folders):
    module = ModuleType("a_judge")
    module.slow = Asked(0.05, ["it gives no log-probs", "one image a prompt"], **SERVER)
    monkeypatch.setitem(sys.modules, "a_judge", module)
    config = replace_nested(small(folders), {"credit": {"weights": {"IF": 1.0}}})
    config = replace(config, reward=RewardConfig("a_judge:slow"))
    plain = preflight(small(folders), "cpu")
    report = preflight(config, "cpu")
    assert not report.problems and not plain.problems
    at = next(n for n, line in enumerate(report.lines) if line.startswith("judges"))
    r = config.rollout
    calls = r.sessions * r.siblings * 3
    said = report.lines[at : at + 4]
    assert said[0] == "judges      IF (reward.function: 'a_judge:slow'): answers"
    assert re.fullmatch(
        rf" +{calls} calls an iteration, {min(16, calls)} at once, 0\.05\d* s a turn: [\d.]+ s "
        rf"beside the rollout",
        said[1],
    )
    assert [line.strip() for line in said[2:]] == [
        "reward.function: 'a_judge:slow': it gives no log-probs",
        "reward.function: 'a_judge:slow': one image a prompt",
    ]
    (waited,) = [line for line in report.lines if line.startswith("  reward ")]
    assert float(waited.split()[1]) == pytest.approx(calls * 0.05 / min(16, calls), rel=1)
    assert "reward: waiting" in "\n".join(report.lines)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (
            ConfigError("reward.options.url: nobody answers there (accepted: a server)"),
            "^reward.opt",
        ),
        (
            OSError("no route"),
            r"^reward.function: 'a_judge:slow': probe\(\) raised OSError: no route",
        ),
    ],
)
def test_a_judge_that_is_not_there_is_a_problem(problem, said, monkeypatch):
    module = ModuleType("a_judge")
    module.slow = Asked(notes=problem)
    monkeypatch.setitem(sys.modules, "a_judge", module)
    report = preflight(replace(Config(), reward=RewardConfig("a_judge:slow")), "cpu")
    assert len(report.problems) == 1 and re.search(said, report.problems[0])


def test_a_reward_is_asked_once(monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "a_judge", module)
    monkeypatch.setattr(failing, "names", ("IF",), raising=False)
    config = replace_nested(
        Config(), {"credit": {"preset": "flow-grpo", "baseline": None, "weights": {"IF": 1.0}}}
    )
    config = replace(config, reward=RewardConfig("a_judge:failing"))
    (problem,) = preflight(config).problems
    assert (
        problem.startswith("reward.function: no score for session")
        and "no judge at this address" in problem
    )


def test_groups_must_go_around(capsys):
    assert main(["check", "--processes", "13"]) == 2
    assert "rollout.sessions: 12 (accepted: at least 13, one a process)" in capsys.readouterr().err
    assert main(["check", "--processes", "0"]) == 2
    assert "--processes: 0 (accepted: a whole number, 1 to 1000000)" in capsys.readouterr().err
    assert main(["check", "--gpu", "abacus"]) == 2
    assert "--gpu: 'abacus' (accepted: b200, h200, h100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sessions", "minibatches", "message"),
    [
        (4, 2, None),
        (4, 3, "accepted: a divisor of 2"),
        (5, 1, None),
        (
            5,
            2,
            "accepted: 1, since some processes have 2 batches of rollout.groups_per_batch = 1 "
            "groups and some 3",
        ),
    ],
)
def test_minibatches_are_the_same_on_all_processes(sessions, minibatches, message):
    changes = {
        "rollout": {"sessions": sessions, "groups_per_batch": 1},
        "train": {"minibatches": minibatches},
    }
    found = list(
        run_problems(replace_nested(Config(), changes), None, None, cannot_pack=None, processes=2)
    )
    assert len(found) == (message is not None)
    assert all(
        problem.startswith(f"train.minibatches: {minibatches}") and message in problem
        for problem in found
    )


@pytest.mark.parametrize(("processes", "fits"), [(1, True), (8, True), (64, True), (12, False)])
def test_processes_that_share_a_copy_have_to_divide_all(processes, fits):
    changes = {
        "policy": {"model": "kontext", "shard": True, "shard_group": 8},
        "data": {"path": "x"},
        "rollout": {"sessions": 64},
    }
    config = replace_nested(Config(), changes)
    for command in ("check", "train", "eval"):
        found = list(run_problems(config, None, None, processes=processes, command=command))
        assert [p for p in found if p.startswith("policy.shard_group: 8")] == found
        assert len(found) == (not fits)


# ------------------------------------------------------------------------------------- what it says


def small(folders, **policy):
    settings = {
        "policy": {
            "model": "kontext",
            "weights": folders("small"),
            "resolution": [64, 64],
            "lora_rank": 4,
        }
        | policy,
        "data": {"path": str(ROOT / "examples" / "shapes"), "resize": "crop"},
        "reward": {"function": "editr2.rewards.brightness:Brightness"},
        "credit": {"preset": "flow-grpo", "baseline": None, "weights": {"brightness": 1.0}},
    }
    return replace_nested(Config(), settings)


def test_offload_checkpointing_and_four_bits_take_less(folders):
    lean_settings = {"offload": True, "gradient_checkpointing": True, "quantize": "4bit"}
    reports = [preflight(small(folders, **settings), "rtx4090") for settings in ({}, lean_settings)]
    assert all(not report.problems and report.fits for report in reports)
    plain, lean = ("\n".join(report.lines) for report in reports)
    assert re.search(r"activations, train +[\d.]+ MiB  \(with checkpointing [\d.]+ MiB\)", plain)
    assert re.search(
        r"activations, train, checkpointing +[\d.]+ MiB  \(without checkpointing [\d.]+ MiB\)", lean
    )
    assert "4-bit base" in lean and "on the host while idle" in lean
    assert "verdict: fits rtx4090" in plain
    assert (
        "while loading" in plain
        and "while training" not in plain
        and "at most while training" in lean
    )

    def megabytes(text, part):
        (value,) = re.findall(rf"{part} +([\d.]+) MiB", text)
        return float(value)

    for part in ("alive at most in rollout", "alive at most in train", "frozen weights"):
        assert megabytes(lean, part) < megabytes(plain, part)


def test_too_large_is_said(folders, monkeypatch):
    monkeypatch.setitem(_SHEETS, "tiny", (10, *_SHEETS["rtx4090"][1:]))
    report = preflight(small(folders), "tiny")
    assert (
        not report.fits
        and not report.problems
        and report.lines[-1].startswith("verdict: DOES NOT FIT tiny: ")
    )


BLOCK = 37_888, 15_744
"""Weights of the tiny kontext's two kinds of block. 32 wide, of the first: two modulations of 32 x
192 + 192; eight projections of 32 x 32 + 32; four norms of 16; two MLPs of 32 x 128 + 128 and back.
Of the second: 32 x 96 + 96; three projections and two norms; 32 x 128 + 128 and 160 x 32 + 32."""
OUTSIDE = 24_400
"""Outside of them: tokens 16 x 32 + 32 in and 32 x 16 + 16 out, words 32 x 32 + 32, time and
guidance 256 x 32 + 32 and 32 x 32 + 32 each, the pooled words 16 x 32 + 32 and 32 x 32 + 32, the
last norm 32 x 64 + 64."""
FROZEN = 4 * (OUTSIDE + 3 * sum(BLOCK))


@pytest.fixture(scope="module")
def two_processes(folders):
    """The estimate for two processes of a tiny kontext with three blocks of each kind, whose
    forwards are all a billion operations; by changes to the policy and to the device. Only what is
    asked for here takes time."""

    class Even(Editor):
        def cost(self, step, *_):
            return Cost(
                {torch.float32: 10**9 if step in ("velocity", "train") else 0}, 0, 0, 0, 100, 0
            )

    settings = small(folders, weights=folders("kontext")).policy
    editor = Even(settings, policy_class(settings.model).blueprint(settings))

    def of(flops=1e30, bandwidth=float("inf"), **policy):
        config = small(folders, weights=folders("kontext"), **policy)
        speed = Speed({torch.float32: flops}, bandwidth, 0.0, True)
        device = Device("made up", 2**30, speed, peers=1e6)
        samplers = (rollout_sampler(config.rollout, editor.own),) * 2
        return estimate(config, editor, device, samplers, ([3] * 4, [3] * 4), 2)

    of.sizes = editor.sizes()
    return of


def test_sharded_weights_are_held_by_share_and_gathered_block_by_block(two_processes):
    plain, sharded = (two_processes(shard=on) for on in (False, True))
    assert (plain.memory["frozen weights"], plain.memory["gathered blocks"]) == (FROZEN, 0)
    gathered = 4 * (3 * max(BLOCK) + OUTSIDE)
    assert (sharded.memory["frozen weights"], sharded.memory["gathered blocks"]) == (
        FROZEN // 2,
        gathered,
    )
    less = {phase: plain.peaks[phase] - sharded.peaks[phase] for phase in plain.peaks}
    # While images and words are read no block is gathered; what is outside of the blocks stays
    # whole.
    at_work = FROZEN // 2 - gathered
    assert less == {"rollout": at_work, "encode": FROZEN // 2 - 4 * OUTSIDE, "train": at_work}
    for part in ("adapters", "gradients", "optimizer states", "text encoders"):
        assert sharded.memory[part] == plain.memory[part] > 0


def test_gathering_takes_the_time_that_computing_does_not_cover(two_processes):
    once = FROZEN / 2 / 1e6  # the other process's half, at a million bytes a second: 0.37 s
    bare = two_processes(shard=True)
    assert bare.gathering == pytest.approx(once) and two_processes().gathering == 0
    assert bare.seconds["rollout"] == pytest.approx(bare.rollout_forwards * once)
    assert bare.seconds["train"] == pytest.approx(bare.train_forwards * 2 * once)
    for branches, gathers in (("apart", 2), ("together", 1)):
        guided = two_processes(shard=True, guidance=2.0, branches=branches)
        assert guided.seconds["rollout"] == pytest.approx(gathers * bare.seconds["rollout"])
    half = two_processes(
        flops=2e9, shard=True
    )  # a call computes for 0.5 s: more than gathering once, less than twice
    assert half.seconds["rollout"] == pytest.approx(half.rollout_forwards * 0.5)
    assert half.seconds["train"] == pytest.approx(half.train_forwards * 2 * once)
    copied = two_processes(bandwidth=1e6, shard=True)
    assert copied.seconds["rollout"] == pytest.approx(copied.rollout_forwards * 2 * FROZEN / 1e6)


def test_without_adapters_what_trains_is_shared_out_too(two_processes):
    trained = two_processes.sizes.trained
    half, once = trained // 2, (FROZEN + trained) / 2 / 1e6
    full = two_processes(shard=True, lora_rank=0)
    names = ("trained weights", "optimizer states", "copies (reference, old, average)")
    copies = full.memory[names[2]] // half
    assert [full.memory[name] for name in names] == [half, 2 * half, copies * half]
    # Gradients of a block, twice on their way and once of the block before; of what is in none.
    assert full.memory["gradients"] == half + 4 * (3 * max(BLOCK) + OUTSIDE)
    assert full.gathering == pytest.approx(once)
    reduced = half / 1e6
    assert full.seconds["train"] == pytest.approx(full.train_forwards * (2 * once + reduced))
    assert full.host["saving"] == (3 + copies) * trained
    # Two branches of guidance have one backward, where their gradients are added up first.
    assert (
        two_processes(shard=True, lora_rank=0, guidance=2.0, branches="apart").memory["gradients"]
        == half + trained
    )


def test_contexts_of_all_who_are_denoised_together_are_alive(folders):
    """Of four siblings and one group a batch; training in twos copies two more."""
    for micro_batch, rows in ((None, 4), (2, 6)):
        config = small(folders)
        sizes = {
            "rollout": {"siblings": 4, "groups_per_batch": 1},
            "train": {"micro_batch": micro_batch},
        }
        config = replace_nested(config, sizes)
        editor = open_editor(config.policy)
        samplers = (rollout_sampler(config.rollout, editor.own),) * 2
        device = Device("made up", 2**30, Speed({torch.float32: 1e12}, 1e12, 0.0, True))
        result = estimate(config, editor, device, samplers, ([3] * 4, [3] * 4), 1)
        # Of a row: 16 condition tokens of 16 numbers, 512 words of 32, one pooled vector of 16.
        assert result.memory["contexts"] == rows * 4 * (16 * 16 + 512 * 32 + 16)
        beside = (
            "contexts",
            "frozen weights",
            "adapters",
            "optimizer states",
            "stored latents",
            "gradients",
        )
        beside = (
            *beside,
            "text encoders",
            "autoencoder",
            "activations, train",
            "copies (reference, old, average)",
        )
        assert result.peaks["train"] == sum(result.memory[part] for part in beside)


def test_each_further_image_that_a_turn_sees_costs(opened):
    policy, editor, _ = opened("kontext")
    config = replace(policy.config, history=2, keep_source=True)
    longer = open_editor(config)
    assert [longer.policy.images_at(turn) for turn in range(4)] == [1, 2, 3, 3]
    one, *more = (longer.cost("velocity", 1, turn).total_flops for turn in range(4))
    assert one == editor.cost("velocity", 1, 3).total_flops < more[0] < more[1] == more[2]
    assert longer.held(1, 2) - longer.held(1, 0) == 2 * 4 * 16 * 16


def test_the_sheets_rate_between_devices():
    for name, rate in (("h100", 450e9), ("rtx4090", 16e9)):
        assert find_device(name).peers == rate * PEER_EFFICIENCY


def test_memory_of_the_host_is_that_of_all_processes(two_processes):
    sizes = two_processes.sizes
    beside, whole = 2 * (sizes.text + sizes.vae), FROZEN + sizes.trained
    for settings, loading, training in (
        ({}, 2 * whole, 0),
        ({"shard": True}, whole, 0),
        ({"shard": True, "offload": True}, whole, beside),
    ):
        assert two_processes(**settings).host == {"loading": loading + beside, "training": training}


def test_what_is_sharded_and_on_the_host_is_said(folders):
    config = small(folders, shard=True)
    plain, sharded = ("\n".join(preflight(config, "rtx4090", n).lines) for n in (1, 2))
    assert re.search(
        r"frozen weights .*\(sharded over 2 processes\)\n +gathered blocks +[\d.]+ MiB\n", sharded
    )
    assert (
        "70% of the sheet's rate between devices" in sharded and "2 processes together" in sharded
    )
    assert "gather" not in plain and "sharded" not in plain and "together" not in plain
    for lines in (plain, sharded):  # and nothing while training
        assert re.search(r"memory of the host.*\n  at most while loading +[\d.]+ MiB\n\n", lines)
    assert "memory of the host" not in "\n".join(preflight(config, "cpu", 2).lines)


@pytest.fixture(scope="module")
def small_case(folders):
    """Six blocks, on a device that holds four of them without computing them again, in a run whose
    policy and rows are auto."""
    config = replace_nested(
        small(folders, weights=folders("kontext"), gradient_checkpointing="auto"),
        {"train": {"micro_batch": "auto"}, "rollout": {"sessions": 4, "groups_per_batch": 2}},
    )
    editor = open_editor(config.policy)
    samplers = (rollout_sampler(config.rollout, editor.own),) * 2
    plain = with_values(config, {AGAIN: 2, ROWS: None, COMPILE: "on"})

    def on(memory):
        device = Device("made up", memory, Speed({torch.float32: 1e12}, 1e12, 0.0, True), True)
        return Case(editor, device, samplers, ([3] * 4, [3] * 4))

    return config, plain, on, 1.0001 * on(1.0).of(plain).needed / ROOM


def test_the_fewest_blocks_that_fit_are_computed_again(small_case, monkeypatch):
    monkeypatch.setattr(levers, "CANDIDATES", {ROWS: (None, 1, 2), levers.OFFLOAD: (False, True)})
    monkeypatch.setattr(levers, "OTHER_NUMBERS", {})
    _, plain, on, memory = small_case
    found = fastest(on(memory), plain, {}, again=True)
    assert value_of(found.config, AGAIN) == 2 and found.fits(ROOM)
    assert not on(memory).of(with_values(plain, {AGAIN: 1})).fits(ROOM)
    most, least = on(2 * memory), on(memory / 100)
    assert value_of(fastest(most, plain, {}, again=True).config, AGAIN) == "off"
    assert fastest(least, plain, {}, again=True) is None
    # Smaller batches leave room, and what fits is proposed as flags.
    free = propose(on(memory), plain)
    assert free.fits(ROOM) and free.seconds <= found.seconds * 1.01
    assert value_of(free.config, AGAIN) == "off" and value_of(free.config, COMPILE) == "on"
    assert flags(free.config, plain).startswith("--policy.gradient_checkpointing off --train.")
    alone_ = {(key, value): option for key, value, option in alone(on(memory), plain)}
    assert alone_[COMPILE, "off"].seconds > on(memory).of(plain).seconds
    assert not alone_[AGAIN, "off"].fits(ROOM) and (AGAIN, "all") in alone_


def test_auto_is_settled_once_and_kept_by_whoever_goes_on(small_case, tmp_path, monkeypatch):
    config, _, on, memory = small_case
    monkeypatch.setattr(levers, "CANDIDATES", {ROWS: (None, 1, 2)})
    keys = autos(config)  # without guidance there are no branches to settle
    assert keys == [AGAIN, COMPILE, ROWS]
    done, (line,) = settle(config, True, lambda _: on(memory))
    assert not autos(done) and value_of(done, COMPILE) == "on" and done.train.micro_batch
    assert line.startswith("auto: policy.gradient_checkpointing off, policy.compile on, train.mi")
    assert settle(done, True, lambda _: pytest.fail("nothing is auto")) == (done, [])
    done, (line,) = settle(config, True, lambda _: on(1.0))
    assert (value_of(done, AGAIN), done.train.micro_batch) == ("all", 1) and "may not fit" in line
    done, (line,) = settled_for_device(config, torch.device("cpu"), 1)
    assert [value_of(done, key) for key in keys] == ["off", "off", None] and "no GPU" in line
    # Of older settings, and of a GPU.
    at = tmp_path / "checkpoints" / "step_000003"
    at.mkdir(parents=True)
    had = {"policy": {"gradient_checkpointing": True, "compile": True}, "train": {"micro_batch": 4}}
    state = {"config": had, "identity": {"made": {"device": "a GPU"}}}
    (at / "state.json").write_text(json.dumps({"state": state}))
    config = replace(config, out=str(tmp_path))
    done, (line,) = settled_for_device(config, torch.device("cpu"), 1)
    assert [value_of(done, key) for key in keys] == ["all", "on", 4]
    assert line.endswith("as recorded by the run that goes on (on a GPU; this is cpu)")
    done, lines = settled_for_device(config, torch.device("cpu"), 1, ["policy"])
    assert [value_of(done, key) for key in keys] == ["off", "off", 4] and len(lines) == 2


def test_the_device_at_hand_has_its_sheet():
    for name, gib, sheet in (
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.1, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 23.5, "rtx4090"),
        ("a card of next year", 23.9, "rtx4090"),
    ):
        found = device_at_hand(name, gib * 2**30)
        assert found.speed == find_device(sheet).speed and found.memory == gib * 2**30


def test_strips_are_shared_out(folders):
    config = replace_nested(
        small(folders), {"eval": {"strips": 3}, "rollout": {"groups_per_batch": 9}}
    )
    editor = open_editor(config.policy)
    sampler = rollout_sampler(config.rollout, editor.own)
    for processes, most in ((1, 3), (2, 2), (8, 1)):
        calls = strips_plan(config, editor, sampler, [1] * 5, processes)
        assert [c.batch for c in calls if c.step == "encode"] == [most]


def test_dry_run_trains_two_iterations_by_the_trainers_own_code(capsys, monkeypatch):
    monkeypatch.setattr("editr2.check.preflight", lambda *_: Report([], ["checked"], True))
    small = [
        "--rollout.sessions",
        "2",
        "--rollout.siblings",
        "2",
        "--rollout.turns",
        "1",
        "--policy.intent",
        "false",
    ]
    assert main(["check", "--gpu", "cpu", "--dry-run", *small]) == 0
    said = capsys.readouterr().out
    assert said.startswith("checked\n")
    assert re.search(r"dry run +the second iteration took rollout [\d.]+ s", said)


def test_this_machine_is_measured():
    device = find_device("cpu")
    assert not device.gpu and 1e8 < device.speed.flops[torch.float32] < 1e14
    assert 1e8 < device.speed.bandwidth < 1e13 and 1e-8 < device.speed.launch < 1e-3


# ------------------------------------------------------------------------------------------ recipes


@pytest.fixture(scope="module")
def recipes():
    spec = spec_from_file_location("recipe_estimates", ROOT / "scripts" / "recipe_estimates.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.levers
@pytest.mark.parametrize(
    "path",
    [
        # Half a minute each: one of them always.
        pytest.param(path, id=path.stem, marks=[] if "kontext" in path.stem else [EXHAUSTIVE])
        for path in sorted((ROOT / "editr2" / "recipes").glob("*.yaml"))
    ],
)
def test_a_recipe_passes_and_carries_what_the_check_prints(path, recipes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # from any folder
    text = path.read_text()
    now, then = recipes.printed(text), recipes.recorded(text)
    number = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    for new, old in zip(now, then, strict=True):
        if " calls an iteration" in new or new.startswith(("  reward ", "  judges ")):
            continue  # as long as the judge took on that machine
        assert re.split(number, new.replace(" ", "")) == re.split(number, old.replace(" ", "")), (
            "run scripts/recipe_estimates.py"
        )
        for a, b in zip(re.findall(number, new), re.findall(number, old), strict=True):
            assert float(a) == pytest.approx(float(b), rel=0.03, abs=0.06), (new, old)
    assert now[-1].startswith("verdict: fits ")
