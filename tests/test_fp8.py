"""A base in float8 (`policy.quantize: fp8`): the same weights in every path, a ratio of 1, the
adapters' gradients to the last bit those over the dequantised base, and an export that says how
far its own base is.

On a CPU its products are of dequantised weights unless `in_float8` asks for torch's.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from editr2.check.devices import find_device
from editr2.check.editors import open_editor
from editr2.check.text import base_note
from editr2.config import Config, PolicyConfig, replace_nested
from editr2.errors import ConfigError, NonFiniteError
from editr2.export.export import export
from editr2.policies.finite import check_weights
from editr2.policies.fp8 import (
    FLOAT8,
    Float8Linear,
    dequantized,
    quantize_rows,
)
from editr2.policies.load import load_policy
from editr2.policies.rules import check_config
from editr2.policies.weights import trainable
from editr2.rewards.base import Score
from editr2.run.tracking import read_metrics
from editr2.training import train

ROOT = Path(__file__).parent.parent
WORDS = ["make it red", "more light, please"]


@pytest.fixture(scope="module")
def weights(beside, tmp_path_factory):
    """Tiny pipelines on the disk, by model."""
    folder, tiny = tmp_path_factory.mktemp("base"), beside("tiny_editors")
    for model in ("kontext", "klein"):
        getattr(tiny, f"{model}_pipeline")().save_pretrained(folder / model)
    return folder


def settings(weights, model="kontext", **changes):
    given = {"lora_rank": 3, "quantize": "fp8", "resolution": (32, 32), "text_tokens": 48}
    return PolicyConfig(**{"model": model, "weights": str(weights / model), **given, **changes})


def loaded(weights, model, **changes):
    """In bfloat16, the same adapters every time, which are not zero."""
    torch.manual_seed(1)
    policy = load_policy(settings(weights, model, dtype="bfloat16", **changes))
    for p in trainable(policy.module).values():
        p.data += 0.05 * torch.randn_like(p)
    return policy


def predicted(tiny, policy):
    """Its velocities and the gradients of what trains."""
    context = policy.instruct(policy.encode(tiny.pictures(2, (32, 32))), WORDS)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    v = policy.velocity(x, torch.tensor([0.5, 0.25]), context).v
    v.float().square().mean().backward()
    gradients = {name: p.grad for name, p in trainable(policy.module).items()}
    policy.module.zero_grad(set_to_none=True)
    return v.detach(), gradients


# -------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_as_near_as_float8_is(dtype):
    x = torch.randn(200, 64) * torch.exp2(torch.randint(-60, 60, (200, 1)).float())
    x[0], x[1, 0], x[2] = 0, 500.0, 448.0
    x = x.to(dtype)
    rows, scale = quantize_rows(x)
    assert rows.dtype == FLOAT8 and scale.dtype == torch.float32
    largest = x.float().abs().amax(1, keepdim=True) / scale
    assert bool(((largest[1:] > 224) & (largest[1:] <= 448)).all()) and scale[2] == 1
    assert torch.equal(scale.log2(), scale.log2().round())
    back = dequantized(rows, scale, torch.float32)
    assert torch.equal(dequantized(rows, scale, torch.bfloat16).float(), back)
    # Half of the last of three bits, or of the smallest number of a row's scale.
    assert bool(((back - x.float()).abs() <= (x.float().abs() / 16).maximum(scale * 2**-10)).all())
    assert 0.02 < float((back[3:] - x[3:]).norm() / x[3:].float().norm()) < 0.03
    for odd in (torch.nan, torch.inf):
        x[5, 5] = odd
        assert not quantize_rows(x)[1][5].isfinite()


def test_the_product_is_that_of_the_dequantized_weights_and_its_gradient_too():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(48, 80).to(dtype).requires_grad_(False)
        made = Float8Linear(layer)
        reference = nn.Linear(48, 80).to(dtype).requires_grad_(False)
        reference.weight.data = dequantized(made.weight, made.weight_scale, dtype)
        reference.bias.data = layer.bias.data
        results = []
        for module in (made, reference):
            x = torch.randn(
                2, 7, 48, generator=torch.Generator().manual_seed(1), requires_grad=True
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                out = module(x)
            out.square().sum().backward()
            results.append((out, x.grad))
        assert results[0][0].dtype == dtype and results[0][1].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert made.weight.dtype == FLOAT8 and not any(p.requires_grad for p in made.parameters())
    made = Float8Linear(nn.Linear(48, 80, device="meta"))  # which has no autocast
    assert made(torch.empty(7, 48, device="meta")).shape == (7, 80)


def test_products_in_float8():
    """By torch's own, which on this torch may know no rows; one graph for a compiler; and a token's
    row does not depend on the others."""
    torch.manual_seed(0)
    made = Float8Linear(nn.Linear(64, 96).bfloat16())
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    plain = made(x)
    made.in_float8 = True
    try:
        out = made(x)
    except RuntimeError as error:
        pytest.skip(f"this torch has no such product on a CPU: {error}")
    tokens, scales = quantize_rows(x.detach())
    weight = dequantized(made.weight, made.weight_scale, torch.float32)
    expected = dequantized(tokens, scales, torch.float32) @ weight.t() + made.bias.float()
    torch.testing.assert_close(out.float(), expected, rtol=2**-7, atol=1e-3)
    assert not torch.equal(out, plain) and (out - plain).norm() < 0.05 * plain.norm()
    assert torch.equal(made(x[2:3]), out[2:3])
    traced = torch.compile(made, fullgraph=True, backend="aot_eager")(x)
    traced.float().square().sum().backward()
    assert torch.equal(traced, out)
    assert torch.equal(x.grad, (2 * out.float()).bfloat16() @ weight.bfloat16())


# ------------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("model", ["kontext", "klein"])
def test_an_editor_with_a_base_in_float8(model, weights, beside):
    tiny = beside("tiny_editors")
    policy = loaded(weights, model)
    layers = {n: m for n, m in policy.module.named_modules() if isinstance(m, Float8Linear)}
    # All of the blocks' linear layers but those of norms, with adapters or not.
    assert len(layers) > 10 and all(
        isinstance(m, Float8Linear) == ("blocks." in n and ".norm" not in n)
        for n, m in policy.module.named_modules()
        if isinstance(m, nn.Linear) and ".lora_" not in n
    )
    assert {p.dtype for p in trainable(policy.module).values()} == {torch.float32}
    few = loaded(weights, model, lora_targets=r".*\.attn\.add_._proj")
    assert sum(isinstance(m, Float8Linear) for m in few.module.modules()) == len(layers)
    v, gradients = predicted(tiny, policy)
    assert v.dtype == torch.bfloat16 and min(g.abs().max() for g in gradients.values()) > 0

    policy.module.enable_gradient_checkpointing()
    again = predicted(tiny, policy)
    assert torch.equal(again[0], v) and all(
        torch.equal(again[1][n], gradients[n]) for n in gradients
    )

    whole = loaded(weights, model, quantize="none")
    unrounded, _ = predicted(tiny, whole)
    assert 0.005 < float((v - unrounded).norm() / unrounded.norm()) < 0.1
    for name, layer in layers.items():
        back = dequantized(layer.weight, layer.weight_scale, torch.bfloat16)
        whole.module.get_submodule(name).weight.data = back
    expected = predicted(tiny, whole)
    assert torch.equal(expected[0], v) and expected[1].keys() == gradients.keys()
    assert all(torch.equal(expected[1][n], gradients[n]) for n in gradients)

    next(iter(layers.values())).weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="base_layer.weight: NaN"):
        check_weights(policy, "here")


class Brightness:
    names = ("bright",)

    def __call__(self, session, images):
        return [{"bright": Score(float(image.mean() / 255))} for image in images]


def test_it_trains_resumes_and_is_exported_for_the_base_as_published(weights, beside, tmp_path):
    """The ratio is 1 on-policy; a resumed run is the uninterrupted one to the last bit."""
    for i, image in enumerate(beside("tiny_editors").pictures(2, (32, 32))):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    turns = [{"instruction": text} for text in WORDS]
    rows = [{"id": f"s{i}", "image": f"{i}.png", "turns": turns} for i in range(2)]
    (tmp_path / "sessions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out, iterations):
        policy = settings(weights, dtype="bfloat16")
        values = {
            "out": str(tmp_path / out),
            "policy": vars(policy),
            "data": {"path": str(tmp_path / "sessions.jsonl")},
            "rollout": {
                "sessions": 1,
                "siblings": 2,
                "steps": 3,
                "window": 2,
                "window_range": 0.34,
            },
            "credit": {"preset": "flow-grpo", "weights": {"bright": 1.0}},
            "train": {"iterations": iterations, "lr": 2e-2, "ema": None},
            "eval": {"sessions": 1, "strips": 0},
        }
        return train(replace_nested(Config(), values), reward=Brightness())

    whole, _ = run("whole", 2), run("parts", 1)
    parts = run("parts", 2)
    a, b = (load_file(f / "policy" / "pytorch_lora_weights.safetensors") for f in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows = [r for r in read_metrics(whole / "metrics.jsonl")[0] if r["event"] == "train"]
    assert len(rows) == 2 and all(r["ratio_error"] <= 1e-6 and r["grad_norm"] > 0 for r in rows)
    assert load_policy(replace(settings(weights), weights=str(whole / "policy")))

    done = export(whole, tmp_path / "out")
    carried = done.proof.carried
    assert done.proof.error == 0 and carried is not None
    assert 0.005 < carried.moved / done.proof.size < 0.1
    assert 0 < carried.lost < 0.2 * done.proof.effect
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (str(done.proof), card):
        assert re.search(r"fp8 base that it trained on its predictions were [\d.]+% away", said)
        assert re.search(r"changed there differs by [\d.]+% of itself", said)
    assert "fp8" not in card.split("## Proof")[0]  # no loader needs to know


def test_what_check_says(weights):
    def asked(**policy):
        values = {
            "policy": {**vars(settings(weights, dtype="bfloat16")), **policy},
            "data": {"path": str(ROOT / "examples" / "shapes"), "resize": "crop"},
            "reward": {"function": "editr2.rewards.brightness:Brightness"},
            "credit": {"preset": "flow-grpo", "baseline": None, "weights": {"brightness": 1.0}},
        }
        return replace_nested(Config(), values)

    with pytest.raises(ConfigError, match="policy.quantize: fp8 .*lora_rank 0"):
        check_config(asked(lora_rank=0))
    check_config(asked(shard=True))
    assert base_note("fp8", find_device("h100")) == ", fp8 base"
    assert "no more speed: a6000 has no float8" in base_note("fp8", find_device("a6000"))

    plain, rounded = (open_editor(asked(quantize=name).policy) for name in ("none", "fp8"))
    layers = [m for m in loaded(weights, "kontext").module.modules() if isinstance(m, Float8Linear)]
    numbers, rows = (
        sum(t.numel() for t in ts)
        for ts in zip(*((m.weight, m.weight_scale) for m in layers), strict=True)
    )
    sizes = plain.sizes(), rounded.sizes()
    assert sizes[0].weights - sizes[1].weights == numbers - 4 * rows and sizes[1].float8 == numbers
    assert (sizes[0].trained, sizes[0].targets) == (sizes[1].trained, sizes[1].targets)
    whole = plain.cost("velocity", 2, 0)
    costs = [rounded.cost(step, 2, 0) for step in ("velocity", "train")]
    assert whole.total_flops == costs[0].total_flops and FLOAT8 not in whole.flops
    # Forward only: the gradient of the input is a product in bfloat16.
    assert costs[0].flops[FLOAT8] == costs[1].flops[FLOAT8] > 0.5 * whole.total_flops
    for name, factor in (("h100", 1979 / 989), ("a6000", 1.0)):
        rates = find_device(name).speed.flops
        assert rates[FLOAT8] == factor * rates[torch.bfloat16]
