"""NaN and infinity pass through every backend as through the reference: a table of operators x
places x values.

A row a place: the sample that holds it must be finite, NaN, inf or -inf in the outputs and
gradients where the reference's is, and no other sample may notice. Samples do not depend on one
another, so one call has a sample for every place and value. The reference of an output is `*_ref`;
of a gradient the formula of backend "ref", where a factor of 0 gives exactly 0: autograd through
`*_ref` multiplies that 0 by what is not finite.
"""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

import editr2_kernels as ek

VALUES = (math.nan, math.inf, -math.inf)
if os.environ.get("TRITON_INTERPRET") == "1":  # some 50 ms a sample
    VALUES = VALUES[:2]
N, WIDTH = 35, 7  # an odd number of elements, in rows of seven: not a multiple of any vector
AT = 33  # in the tail of every instruction set's vectors; element 4 of its row

SIGMAS = [0.9, 0.7, 0.4, 0.2, 0.0]
TABLE = torch.cat(
    [
        ek.transition_table(SIGMAS, dynamics="flow-sde", noise_level=0.7),
        ek.transition_table(SIGMAS, dynamics="cps", noise_level=0.5),
        ek.transition_table(SIGMAS, dynamics="ode"),
        ek.transition_table(SIGMAS, dynamics="dpm++sde"),
    ]
)
STEPS = {"flow-SDE": 1, "CPS": 5, "ODE": 9, "second order": 13}


class Batch:
    """Tensors by name, with one sample a place and value, and a last one that stays finite."""

    def __init__(self, tensors: tuple[str, ...], numbers: tuple[str, ...] = ()):
        self.places = [(name, value) for name in (*tensors, *numbers) for value in VALUES]
        generator = torch.Generator().manual_seed(0)
        batch = len(self.places) + 1
        self.inputs = {
            name: torch.randn(batch, N // WIDTH, WIDTH, generator=generator) for name in tensors
        }
        self.inputs |= {name: torch.rand(batch, generator=generator) for name in numbers}
        for i, (name, value) in enumerate(self.places):
            self.inputs[name][i].view(-1)[AT if name in tensors else 0] = value

    def __getitem__(self, name):
        return self.inputs.get(name)

    def __len__(self):
        return len(self.places) + 1


def kind(value):
    """0 finite, 1 NaN, 2 inf, 3 -inf."""
    return value.isnan() * 1 + value.isposinf() * 2 + value.isneginf() * 3


def broken(value):
    """Of each sample: whether it holds anything that is not finite."""
    return ~value.isfinite().flatten(1).all(1)


def agree(ours, theirs, places, kind=kind):
    """Output by output; says which place of which sample is otherwise."""
    assert ours.keys() == theirs.keys()
    for name, their in theirs.items():
        our, their = kind(ours[name]), kind(their)
        if their.dim() == 0:
            assert our == their, f"{name}: {our} for {their}"
            continue
        unlike = (our != their).flatten(1).any(1) if their.dim() > 1 else our != their
        told = [
            f"{places[i] if i < len(places) else 'the finite one'}"
            for i in unlike.nonzero().flatten().tolist()
        ]
        assert not told, (
            f"{name}, of samples with {told}: {our[unlike].unique()} for {their[unlike].unique()}"
        )


GUIDED = ("v", "v_uncond", "v_uncond_image")
GUIDANCE = {
    "": {},
    "none": {"renorm": "none"},
    "token": {"renorm": "token"},
    "text_channel": {"renorm": "text_channel"},
    "channel": {"renorm": "channel"},
    "global": {"renorm": "global"},
}


def branches(batch, guidance):
    """The arguments of guidance, where there is any; the weights of the two branches are numbers of
    the batch."""
    if not guidance:
        return {}
    return {
        **{name: batch[name] for name in (*GUIDED[1:], "guidance", "guidance_image")},
        **GUIDANCE[guidance],
    }


def guided_places(guidance):
    return (
        (("v_uncond", "v_uncond_image"), ("guidance", "guidance_image")) if guidance else ((), ())
    )


def with_gradient(batch, names):
    leaves = {
        name: batch[name].clone().requires_grad_() for name in names if batch[name] is not None
    }
    return {**batch.inputs, **leaves}, leaves


CASES = list(itertools.product(STEPS, GUIDANCE))
FEW = [
    (step, guidance)
    for i, (step, guidance) in enumerate(CASES)
    if i % 5 == 0 or step == "ODE" or not guidance
]


@pytest.mark.parametrize("step, guidance", FEW)
def test_sde_step(backend, step, guidance):
    tensors, numbers = guided_places(guidance)
    batch = Batch(("x", "v", "noise", "m_prev", *tensors), numbers)
    index = torch.full((len(batch),), STEPS[step])

    def call(function, **more):
        out = function(
            batch["x"],
            batch["v"],
            TABLE,
            index,
            None,
            noise=batch["noise"],
            m_prev=batch["m_prev"],
            **branches(batch, guidance),
            **more,
        )
        return out._asdict()

    agree(call(ek.sde_step, backend=backend, return_x0=True), call(ek.sde_step_ref), batch.places)


@pytest.mark.parametrize("step, guidance", FEW)
def test_sde_log_prob(backend, step, guidance):
    tensors, numbers = guided_places(guidance)
    batch = Batch(("x", "x_next", "v", "m_prev", "v_ref", *tensors), numbers)
    index = torch.full((len(batch),), STEPS[step])

    def call(function, **more):
        inputs, leaves = with_gradient(batch, GUIDED)
        batch_of = type("Given", (), {"__getitem__": lambda self, name: inputs.get(name)})()
        out = function(
            inputs["x"],
            inputs["x_next"],
            inputs["v"],
            TABLE,
            index,
            m_prev=inputs["m_prev"],
            v_ref=inputs["v_ref"],
            **branches(batch_of, guidance),
            **more,
        )
        grads = torch.autograd.grad(out.log_prob.sum() + out.mean_diff.sum(), list(leaves.values()))
        return out._asdict(), dict(zip(leaves, grads, strict=True))

    ours, our_grads = call(ek.sde_log_prob, backend=backend)
    agree(ours, call(ek.sde_log_prob_ref)[0], batch.places)
    agree(our_grads, call(ek.sde_log_prob, backend="ref")[1], batch.places)
    # Through guidance autograd orders its products otherwise: what of a broken sample is finite is
    # then another matter.
    agree(our_grads, call(ek.sde_log_prob_ref)[1], batch.places, broken if guidance else kind)


# Losses: the gradient has a sample for every place; the loss itself, a sum, is looked at of one
#     sample at a time.


def some(batch, backend):
    """The samples whose loss is looked at: on slow backends not all."""
    return range(0, len(batch), {"ref": 5, "cpu": 1, "cuda": 4, "triton": 9}[backend])


def losses(batch, backend, call):
    """call(mask, function choice) -> (outputs by name, gradients by name); compares with the
    reference's."""
    everything = torch.ones(len(batch), dtype=torch.bool)
    ours, our_grads = call(everything, backend)
    agree(ours, call(everything, None)[0], batch.places)
    agree(our_grads, call(everything, "ref")[1], batch.places)
    for i in some(batch, backend):
        only = torch.arange(len(batch)) == i
        ours, our_grads = call(only, backend)
        agree(ours, call(only, None)[0], batch.places)
        assert not any(grad[~only].any() for grad in our_grads.values()), (
            "a masked sample trains nothing"
        )


def named(loss):
    return {
        **loss._asdict(),
        **{f"metrics.{k}": v for k, v in loss.metrics._asdict().items()},
        "metrics": torch.ones(()),
    }


GRPO = {
    "": dict(step="flow-SDE"),
    "KL": dict(step="flow-SDE", kl_weight=0.1, kl_scale="step"),
    "KL in v": dict(step="CPS", kl_weight=0.1, kl_scale="velocity"),
    "guard": dict(step="flow-SDE", guard=True, kl_weight=0.1),
    "guided": dict(step="second order", guidance="none", kl_weight=0.1, kl_scale="mean"),
    "an ODE row": dict(step="ODE"),
    "an ODE row with KL": dict(step="ODE", kl_weight=0.1, kl_scale="velocity"),
    "no clamp": dict(step="flow-SDE", advantage_clip=None),
    "renormalised": dict(step="flow-SDE", guidance="token", kl_weight=0.1),
}


@pytest.mark.parametrize("options", GRPO.values(), ids=GRPO)
def test_grpo_loss(backend, options):
    options = dict(options)
    step, guidance = options.pop("step"), options.pop("guidance", "")
    tensors, numbers = guided_places(guidance)
    velocities = [
        name for name, has in (("v_ref", "kl_weight"), ("v_old", "guard")) if has in options
    ]
    m_prev = ["m_prev"] if step == "second order" else []
    batch = Batch(
        ("x", "x_next", "v", *velocities, *m_prev, *tensors),
        ("old_log_prob", "advantage", *numbers),
    )
    index = torch.full((len(batch),), STEPS[step])

    def call(mask, backend):
        inputs, leaves = with_gradient(batch, GUIDED)
        given = type("Given", (), {"__getitem__": lambda self, name: inputs.get(name)})()
        function, more = (
            (ek.grpo_loss_ref, {}) if backend is None else (ek.grpo_loss, {"backend": backend})
        )
        names = ("x", "x_next", "v")
        out = function(
            *(inputs[name] for name in names),
            TABLE,
            index,
            inputs["old_log_prob"],
            inputs["advantage"],
            mask=mask,
            **{name: inputs[name] for name in (*velocities, *m_prev)},
            **branches(given, guidance),
            **options,
            **more,
        )
        grads = torch.autograd.grad(out.loss, list(leaves.values()))
        return named(out), dict(zip(leaves, grads, strict=True))

    losses(batch, backend, call)


@pytest.mark.parametrize("v_ref", [False, True])
def test_nft_loss(backend, v_ref):
    batch = Batch(("x0", "noise", "v", "v_old", *["v_ref"] * v_ref))
    sigma, r = torch.linspace(0.1, 0.9, len(batch)), torch.linspace(0.0, 1.0, len(batch))

    def call(mask, backend):
        inputs, leaves = with_gradient(batch, ("v",))
        function, more = (
            (ek.nft_loss_ref, {}) if backend is None else (ek.nft_loss, {"backend": backend})
        )
        out = function(
            inputs["x0"],
            inputs["noise"],
            sigma,
            inputs["v"],
            inputs["v_old"],
            r,
            beta=0.5,
            v_ref=inputs.get("v_ref"),
            ref_weight=0.1,
            mask=mask,
            **more,
        )
        return named(out), {"v": torch.autograd.grad(out.loss, leaves["v"])[0]}

    losses(batch, backend, call)


TOKENS = [(place, value) for place in ("chosen", "other", "last", "all") for value in VALUES]


@pytest.mark.parametrize("width", [5, 37])
def test_token_log_prob(backend, width):
    """A row a place and value: logits of -inf are a mask, of which the chosen one may be a part."""
    ids = torch.full((len(TOKENS) + 1,), 2)
    base = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(0))
    for row, (place, value) in zip(base, TOKENS, strict=False):
        row[{"chosen": 2, "other": 1, "last": -1, "all": slice(None)}[place]] = value

    def call(function, **more):
        logits = base.clone().requires_grad_()
        out = function(logits, ids, temperature=0.7, **more)
        return {
            **out._asdict(),
            "grad": torch.autograd.grad(out.log_prob.sum() + out.entropy.sum(), logits)[0],
        }

    ours = call(ek.token_log_prob, backend=backend)
    agree(ours, call(ek.token_log_prob, backend="ref"), TOKENS)
    theirs = call(ek.token_log_prob_ref)
    agree({"grad": ours.pop("grad")}, {"grad": theirs.pop("grad")}, TOKENS, broken)
    agree(ours, theirs, TOKENS)


def test_group_advantage(backend):
    """What is masked may hold anything; what is not must be finite on CPU tensors, and weights
    everywhere."""
    scores = torch.rand(len(VALUES) + 1, 2, 2)
    mask = torch.ones(len(scores), 2, dtype=torch.bool)
    for i, value in enumerate(VALUES):
        scores[i, 1], mask[i, 1] = value, False
    group = torch.zeros(len(scores), dtype=torch.int64)
    for options in (ek.CREDIT_PRESETS["edit-r2"], ek.CREDIT_PRESETS["gdpo"]):
        out = ek.group_advantage(scores, group, options, mask=mask, backend=backend)
        assert out.advantage.isfinite().all() and not out.mask[~mask].any()
        applies = mask[..., None].expand(scores.shape).clone()
        applies[..., 0] = True
        finite = torch.where(scores[..., :1].isfinite(), scores[..., :1], 0.5)
        mixed = torch.cat([finite, scores[..., 1:]], 2)
        out = ek.group_advantage(mixed, group, options, applies=applies, backend=backend)
        assert out.advantage.isfinite().all() and out.mask[:, 0].all()
    for value in VALUES:
        broken = torch.rand(2, 1, 1)
        broken[1] = value
        with pytest.raises(ValueError, match="^scores"):
            ek.group_advantage(broken, group[:2], options, backend=backend)
