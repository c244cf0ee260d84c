"""`patch`: the NFT loss of verl-omni, before and after.

Tolerances: ours sums in fixed chunks and eager code rounds every product in fp32: a few 1e-7 of
    values of size 1.
"""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch

import editr2_kernels as ek
from editr2.integrations import losses, patch

SHAPE = (4, 12, 8)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def nft_settings(**changes):
    values = dict(mix_beta=0.4, adv_clip_max=3.0, adaptive_weight_min=1e-5, ref_kl_coef=0.1)
    return SimpleNamespace(diffusion_loss=SimpleNamespace(**values | changes))


def nft_inputs(shape=SHAPE, clean=torch.float32, predicted=torch.float32):
    x0, noise, v, v_old, v_ref = torch.randn(5, *shape, generator=generator(3))
    t = torch.linspace(0.0, 1.0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    x0 = x0.to(clean)
    return {
        "forward_prediction": v.to(predicted).requires_grad_(),
        "old_prediction": v_old.to(predicted),
        "ref_forward_prediction": v_ref.to(predicted),
        "x0": x0,
        "xt": (1 - t) * x0 + t * noise,
        "t_expanded": t,
        "reward_prob": torch.linspace(1.0, 0.0, shape[0]),
    }


def nft_loss_of(inputs, config, owner=None):
    """Loss, gradient to the velocity, metrics."""
    owner = owner or sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    loss, metrics = owner.compute_loss(**inputs, config=config)
    return loss, torch.autograd.grad(3.0 * loss, inputs["forward_prediction"])[0], metrics


NFT_INPUTS = {
    "a sample a row": {},
    "images": {"shape": (3, 4, 6, 5)},
    "video": {"shape": (2, 4, 3, 6, 5)},
    "one noise level": {"shape": (1, 12, 8)},
}


@pytest.mark.parametrize(
    "changes", [{}, {"adaptive_weight_min": 0.9}, {"ref_kl_coef": 0.0, "mix_beta": 1.0}]
)
@pytest.mark.parametrize("given", NFT_INPUTS.values(), ids=NFT_INPUTS)
def test_the_nft_loss_of_verl_omni(peers, given, changes):
    """Its noise levels include 0, where x_t is x0, and 1."""
    config, inputs = nft_settings(**changes), nft_inputs(**given)
    cls = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    held = vars(cls)["compute_loss"]
    loss, grad, metrics = nft_loss_of(inputs, config)
    with patch("verl_omni"):
        assert vars(cls)["compute_loss"] is not held
        of_class = nft_loss_of(inputs, config)
        of_instance = nft_loss_of(inputs, config, type("Derived", (cls,), {})())
    assert vars(cls)["compute_loss"] is held, "unpatch must restore"
    assert torch.equal(nft_loss_of(inputs, config)[1], grad)
    for ours, our_grad, our_metrics in (of_class, of_instance):
        assert (
            ours.shape == loss.shape and ours.dtype == loss.dtype and our_grad.dtype == grad.dtype
        )
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
        assert list(our_metrics) == list(metrics) and all(
            type(value) is float for value in our_metrics.values()
        )
        assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("given", ["predicted", "clean"])
def test_an_nft_loss_of_bf16_tensors_is_computed_in_fp32(peers, given):
    """The original mixes velocities in bf16, and weighs branches by rewards in the dtype of the
    clean latents; ours gives what it would give in fp32."""
    inputs, config = nft_inputs(**{given: torch.bfloat16}), nft_settings()
    exact, exact_grad, _ = nft_loss_of(
        {
            name: value.detach().float().requires_grad_(value.requires_grad)
            for name, value in inputs.items()
        },
        config,
    )
    loss, grad, _ = nft_loss_of(inputs, config)
    with patch("verl_omni"):
        ours, our_grad, _ = nft_loss_of(inputs, config)
    assert (
        our_grad.dtype == grad.dtype == inputs["forward_prediction"].dtype
        and ours.dtype == loss.dtype
    )
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad.float(), exact_grad, rtol=2**-8, atol=1e-6)
    assert 1e-5 < abs(loss - exact) < 2e-2 * abs(exact)


def test_rewards_of_several_steps_are_averaged(peers):
    inputs, config = nft_inputs(), nft_settings()
    inputs["reward_prob"] = torch.rand(len(inputs["x0"]), 3, generator=generator(4))
    loss, grad, metrics = nft_loss_of(inputs, config)
    with patch("verl_omni"):
        ours, our_grad, our_metrics = nft_loss_of(inputs, config)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    assert our_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_operator_is_what_computes_the_nft_loss_and_where_it_does_not(peers, monkeypatch):
    calls = []
    monkeypatch.setattr(losses, "nft_loss", lambda *a, **k: calls.append(1) or ek.nft_loss(*a, **k))
    config = nft_settings()
    plain = nft_inputs()
    others = [
        {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in plain.items()
        },
        {**plain, "x0": plain["x0"].clone().requires_grad_()},
        {**plain, "xt": plain["xt"].bfloat16()},
        {**plain, "reward_prob": plain["reward_prob"] * 1.1},
        {**plain, "t_expanded": torch.tensor(0.5).view(1, 1, 1)},
        {**plain, "t_expanded": plain["t_expanded"].clone().requires_grad_()},
    ]
    theirs = [nft_loss_of(inputs, config) for inputs in others]
    free = nft_settings(ref_kl_coef=-0.1)
    theirs.append(nft_loss_of(plain, free))
    with patch("verl_omni"):
        calls.clear()
        nft_loss_of(plain, config)
        assert calls == [1]
        calls.clear()
        ours = [*(nft_loss_of(inputs, config) for inputs in others), nft_loss_of(plain, free)]
        assert not calls
    for (loss, grad, metrics), (our_loss, our_grad, our_metrics) in zip(theirs, ours, strict=True):
        assert (
            torch.equal(loss, our_loss) and torch.equal(grad, our_grad) and metrics == our_metrics
        )


def test_settings_as_a_dict_are_the_originals_own_affair(peers, monkeypatch):
    cls = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    original = cls.compute_loss.__func__

    def compute_loss(cls, **inputs):
        given = inputs["config"].diffusion_loss
        return original(
            cls, **inputs | {"config": nft_settings(**given)} if isinstance(given, dict) else inputs
        )

    compute_loss.__signature__ = inspect.signature(original)
    monkeypatch.setattr(cls, "compute_loss", classmethod(compute_loss))
    inputs, config = nft_inputs(), nft_settings()
    config.diffusion_loss = vars(config.diffusion_loss)
    with patch("verl_omni"):
        ours = nft_loss_of(inputs, config)[0]
    assert torch.equal(ours, nft_loss_of(inputs, config)[0])


def with_metrics(change):
    def changed(compute):
        def compute_loss(cls, **inputs):
            loss, metrics = compute.__func__(cls, **inputs)
            return loss, dict(change(name, value) for name, value in metrics.items())

        compute_loss.__signature__ = inspect.signature(compute.__func__)
        return classmethod(compute_loss)

    return changed


def without_a_least_weight(compute):
    def compute_loss(cls, **inputs):
        inputs["config"] = nft_settings(
            **vars(inputs["config"].diffusion_loss) | {"adaptive_weight_min": 1e-5}
        )
        return compute.__func__(cls, **inputs)

    compute_loss.__signature__ = inspect.signature(compute.__func__)
    return classmethod(compute_loss)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"negative_share": 2.0}, r"output 0 of call 0 of the probe differs by"),
        (
            with_metrics(lambda name, value: (name.replace("kl", "mse"), value)),
            "call 0 of the probe returns tuple of 0, 1.actor/policy_loss, .*actor/ref_mse_loss",
        ),
        (
            with_metrics(lambda name, value: (name, value**0.5 if "deviate" in name else value)),
            "output 1.actor/old_deviate of call 0 of the probe differs by",
        ),
        (without_a_least_weight, r"output 0 of call 1 of the probe differs by"),
        (
            lambda compute: staticmethod(compute.__func__),
            r"staticmethod \(accepted: a plain function or a class meth",
        ),
        (
            lambda compute: classmethod(lambda cls, **inputs: None),
            r"takes \(\*\*inputs\) .*\(\*, forward_prediction",
        ),
    ],
    ids=[
        "a constant",
        "a metric's name",
        "a metric",
        "a setting",
        "a static method",
        "a signature",
    ],
)
def test_another_nft_loss_is_refused_and_stays(peers, monkeypatch, change, reason):
    cls = sys.modules["verl_omni.trainer.diffusion.diffusion_algos"].DiffusionNFTLoss
    scheduler = sys.modules[
        "verl_omni.pipelines.schedulers.flow_match_sde"
    ].FlowMatchSDEDiscreteScheduler
    if callable(change):
        monkeypatch.setattr(cls, "compute_loss", change(vars(cls)["compute_loss"]))
    else:
        for name, value in change.items():
            monkeypatch.setattr(cls, name, value)
    held = vars(cls)["compute_loss"]
    step = scheduler.sample_previous_step
    with pytest.warns(UserWarning, match=reason), patch("verl_omni"):
        assert vars(cls)["compute_loss"] is held and scheduler.sample_previous_step is not step
