"""Presets of other trainers against what PEERS of this project's notes say they compute, written
out in float64.

Tolerances: our arithmetic is fp32 (2^-24 a rounding) on values up to about 8 and divides by S >=
0.2, so a sample is right to 3e-6 and a log-prob, an average over elements, to 1e-5.
"""

import copy
import dataclasses
import math
import pickle
from collections import defaultdict

import numpy as np
import pytest
import torch

import editr2_kernels as ek

SIGMAS = ek.flow_sigmas(6, 3.0)
STEPS = [0, 2, 3, 4]
INDEX = torch.tensor(STEPS)
LEVEL = {"wan-sde": None, "dpm++sde": None}
PAIRS = [(name, dynamics) for name, preset in ek.COMPAT.items() for dynamics in preset.log_prob]
LOSSES = [(name, dynamics) for name, dynamics in PAIRS if ek.COMPAT[name].grpo]
SEED = torch.arange(4)


def level_of(dynamics):
    return LEVEL.get(dynamics, 0.6)


def diffusion(dynamics, sigma, level):
    """g of the SDEs that are written with one, else None."""
    if dynamics == "flow-sde":
        return level * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1.0 else sigma)))
    if dynamics == "dance-sde":
        return level
    if dynamics == "wan-sde":
        return SIGMAS[-1] + (SIGMAS[1] - SIGMAS[-1]) * sigma
    return None


def step_of(dynamics, i, x, v, m_prev):
    """(mean, std) of step i of one sample."""
    sigma, after, level = SIGMAS[i], SIGMAS[i + 1], level_of(dynamics)
    dt, x0 = after - sigma, x - sigma * v
    g = diffusion(dynamics, sigma, level)
    if g is not None:
        drift = v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)
        return x + drift * dt, g * math.sqrt(-dt)
    x1 = x + (1 - sigma) * v
    if dynamics == "cps":
        std = after * math.sin(level * math.pi / 2)
        return (1 - after) * x0 + math.sqrt(after**2 - std**2) * x1, std
    if dynamics == "ddim-sde":
        rho = (
            level
            * after
            * math.sqrt(1 - after**2 * (1 - sigma) ** 2 / (sigma**2 * (1 - after) ** 2))
        )
        return (1 - after) * x0 + math.sqrt(after**2 - rho**2) * (x - (1 - sigma) * x0) / sigma, rho
    lam = [math.inf if s == 0 else -math.inf if s == 1 else math.log((1 - s) / s) for s in SIGMAS]
    h = lam[i + 1] - lam[i]
    slope = 0.0
    if i > 0 and i < len(SIGMAS) - 2:
        r0 = (lam[i] - lam[i - 1]) / h
        slope = (x0 - m_prev) / r0
    grown = 1 - math.exp(-2 * h)
    return (after / sigma) * math.exp(-h) * x + (1 - after) * grown * (
        x0 + 0.5 * slope
    ), after * math.sqrt(grown)


def log_prob_of(name, dynamics, sample, mean, std):
    """Averaged over the elements of a sample, with the constants that the project keeps."""
    z2 = (sample - mean).square().flatten(1).mean(1)
    if dynamics == "cps":
        return -z2
    value = -z2 / (2 * std**2)
    if name == "flow_grpo_bagel" or (name, dynamics) == ("mixgrpo", "dance-sde"):
        return value
    return value - math.log(std) - 0.5 * math.log(2 * math.pi)


def inputs(shape=(3, 40), dtype=torch.float32):
    x, v, eps, m_prev, change = (torch.randn(4, *shape) for _ in range(5))
    return x.to(dtype), v.to(dtype), eps, m_prev, (v + 0.1 * change).to(dtype)


def per_sample(function):
    """Stack what a function gives for sample b at its step."""
    results = [function(b, i) for b, i in enumerate(STEPS)]
    return tuple(torch.cat(column) for column in zip(*results))


def written_out(name, dynamics, x, v, eps, m_prev):
    def one(b, i):
        part = slice(b, b + 1)
        mean, std = step_of(dynamics, i, x[part].double(), v[part].double(), m_prev[part].double())
        sample = mean + std * eps[part].double()
        return sample, mean, log_prob_of(name, dynamics, sample, mean, std)

    return per_sample(one)


def test_the_presets_of_the_issue_exist():
    required = {"flow_grpo", "dance_grpo", "mixgrpo", "diffusion_nft", "flow_factory", "verl_omni"}
    assert required <= set(ek.COMPAT)
    assert {dynamics for _, dynamics in PAIRS} <= set(ek.DYNAMICS)


@pytest.mark.parametrize("name, dynamics", PAIRS)
def test_step_and_log_prob(backend, name, dynamics):
    x, v, eps, m_prev, _ = inputs()
    table = ek.COMPAT[name].transition_table(
        SIGMAS, dynamics=dynamics, noise_level=level_of(dynamics)
    )
    out = ek.sde_step(
        x,
        v,
        table,
        INDEX,
        None,
        noise=eps,
        m_prev=m_prev,
        score=ek.COMPAT[name].score,
        backend=backend,
    )
    sample, _, log_prob = written_out(name, dynamics, x, v, eps, m_prev)
    torch.testing.assert_close(out.x_next.double(), sample, rtol=0, atol=3e-6)
    torch.testing.assert_close(out.log_prob.double(), log_prob, rtol=1e-5, atol=1e-5)


def test_the_dance_window_ends_before_the_last_step():
    """The image is the x0 of the last step, which has no log-prob."""
    table = ek.COMPAT["dance_grpo"].transition_table(SIGMAS, dynamics="dance-sde", noise_level=0.3)
    x, v, _, _, _ = inputs()
    last = torch.full((4,), len(SIGMAS) - 2)
    out = ek.sde_step(x, v, table, last, SEED, return_x0=True)
    torch.testing.assert_close(out.x_next, out.x0, rtol=0, atol=1e-6)
    assert not out.log_prob.any() and (table[:-1, 3] > 0).all()


@pytest.mark.parametrize("name, dynamics", LOSSES)
def test_policy_loss_and_kl(backend, name, dynamics):
    preset, weight, clip = ek.COMPAT[name], 0.04, 1e-3
    x, v, eps, m_prev, v_ref = inputs()
    table = preset.transition_table(SIGMAS, dynamics=dynamics, noise_level=level_of(dynamics))
    x_next = ek.sde_step(x, v_ref, table, INDEX, None, noise=eps, m_prev=m_prev).x_next
    advantage = torch.tensor([1.0, -9.0, 7.0, -0.5])
    shift = torch.tensor([3e-4, -2e-3, -2e-3, 4e-3])
    old = (
        ek.sde_log_prob(x, x_next, v, table, INDEX, m_prev=m_prev, backend=backend).log_prob - shift
    )
    out = ek.grpo_loss(
        x,
        x_next,
        v,
        table,
        INDEX,
        old,
        advantage,
        clip=clip,
        v_ref=v_ref,
        kl_weight=weight,
        m_prev=m_prev,
        backend=backend,
        **preset.grpo_for(dynamics),
    )

    def kl(b, i):
        part = slice(b, b + 1)
        mean, std = step_of(dynamics, i, x[part].double(), v[part].double(), m_prev[part].double())
        ref_mean, _ = step_of(
            dynamics, i, x[part].double(), v_ref[part].double(), m_prev[part].double()
        )
        square = (mean - ref_mean).square().mean().view(1)
        if name == "flow_factory":  # plain mean square in x
            return (square,)
        # Image scripts divide by the diffusion coefficient; CPS has none, and its std stands there.
        if name in ("flow_grpo", "flow_grpo_bagel", "verl_omni") and dynamics != "cps":
            std = diffusion(dynamics, SIGMAS[i], level_of(dynamics))
        return (square / (2 * std**2),)

    (true_kl,) = per_sample(kl)
    torch.testing.assert_close(out.kl.double(), true_kl, rtol=1e-5, atol=0)
    ratio = torch.exp(shift.double())
    a = advantage.double().clamp(-5, 5)
    policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))
    # The ratio is the exponential of a difference of log-probs of size 2 that are right to 1e-6.
    torch.testing.assert_close(
        out.loss.double(), (policy + weight * true_kl).mean(), rtol=0, atol=2e-5
    )


def test_the_kl_of_mixgrpo_is_a_metric():
    x, v, eps, _, _ = inputs()
    table = ek.COMPAT["mixgrpo"].transition_table(SIGMAS, noise_level=0.7)
    step = ek.sde_step(x, v, table, INDEX, None, noise=eps)
    difference = torch.tensor([0.1, -0.3, 0.2, 0.0])
    out = ek.grpo_loss(
        x, step.x_next, v, table, INDEX, step.log_prob - difference, torch.ones(4), clip=1e-4
    )
    torch.testing.assert_close(
        out.metrics.approx_kl, 0.5 * difference.square().mean(), rtol=1e-4, atol=0
    )


def test_guard_of_verl_omni_at_one_step():
    """exp((log p - log p_old + b) S), b = mean((mu - mu_old)^2) / (2 S^2), the loss over -dt."""
    x, v, eps, _, v_old = inputs()
    i, clip = 2, 1e-3
    table = ek.COMPAT["verl_omni"].transition_table(SIGMAS, noise_level=0.7)
    index = torch.full((4,), i)
    step = ek.sde_step(x, v_old, table, index, None, noise=eps)
    advantage = torch.tensor([1.0, -2.0, 3.0, -0.5])
    out = ek.grpo_loss(
        x,
        step.x_next,
        v,
        table,
        index,
        step.log_prob,
        advantage,
        clip=clip,
        guard=True,
        v_old=v_old,
        **ek.COMPAT["verl_omni"].grpo_for("flow-sde"),
    )
    sigma, dt = SIGMAS[i], SIGMAS[i + 1] - SIGMAS[i]
    g = 0.7 * math.sqrt(sigma / (1 - sigma))
    std = g * math.sqrt(-dt)

    def mean(v):
        return (
            x.double()
            + (v.double() + g**2 / (2 * sigma) * (x.double() + (1 - sigma) * v.double())) * dt
        )

    z, z_old = step.x_next.double() - mean(v), step.x_next.double() - mean(v_old)
    log_ratio = -(z.square() - z_old.square()).flatten(1).mean(1) / (2 * std**2)
    bias = (mean(v) - mean(v_old)).square().flatten(1).mean(1) / (2 * std**2)
    ratio = torch.exp((log_ratio + bias) * std)
    a = advantage.double()
    loss = (torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)) / -dt).mean()
    torch.testing.assert_close(out.ratio.double(), ratio, rtol=3e-6, atol=0)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-5)


def advantages_of(name, rewards, group):
    """[N] rewards in float64."""
    members = defaultdict(list)
    for i, g in enumerate(group):
        members[g].append(i)
    out = np.zeros(len(rewards))
    for rows in members.values():
        own = rewards[rows]
        if name.startswith("flow_grpo") or name == "diffusion_nft":
            scale = own.std() + 1e-4
        elif name in ("dance_grpo", "mixgrpo"):
            scale = own.std(ddof=1) + 1e-8
        elif name == "flow_factory":
            scale = max(rewards.std(), 1e-6)
        else:
            scale = rewards.std(ddof=1) + 1e-4
        out[rows] = (own - own.mean()) / scale
    return out


@pytest.mark.parametrize("name", ek.COMPAT)
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_advantages(name, scale):
    """At scale 1e-3 the epsilon of a std shows; the reward of fp32 is exact in float64, so only our
    arithmetic errs."""
    group = np.repeat([3, 1, 4, 7], [6, 5, 8, 5])
    rewards = torch.tensor(np.random.default_rng(0).normal(size=24) * scale, dtype=torch.float32)
    out = ek.group_advantage(rewards[:, None, None], torch.tensor(group), ek.COMPAT[name].credit)
    expected = advantages_of(name, rewards.double().numpy(), group)
    np.testing.assert_allclose(out.advantage[:, 0].double().numpy(), expected, rtol=2e-6, atol=2e-6)


def test_global_std_is_one_replacement_away():
    group, rewards = torch.tensor([0, 0, 0, 1, 1, 1]), torch.randn(6)
    credit = dataclasses.replace(ek.COMPAT["flow_grpo"].credit, std="global")
    ours = ek.group_advantage(rewards[:, None, None], group, credit).advantage[:, 0].double()
    centred = rewards.double().view(2, 3) - rewards.double().view(2, 3).mean(1, keepdim=True)
    expected = centred.flatten() / (rewards.double().std(correction=0) + 1e-4)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


def test_diffusion_nft_loss():
    """With the float64 of the release; ours is fp32 throughout."""
    x0, noise, v, v_old, v_ref = (torch.randn(4, 3, 40) for _ in range(5))
    sigma, advantage, beta = (
        torch.tensor([0.9, 0.5, 0.2, 0.7]),
        torch.tensor([1.0, -2.0, 7.0, 0.0]),
        0.1,
    )
    options = ek.COMPAT["diffusion_nft"].nft
    r = (advantage / (2 * options["advantage_max"]) + 0.5).clamp(0, 1)
    out = ek.nft_loss(x0, noise, sigma, v, v_old, r, beta=beta, v_ref=v_ref, **options)
    d = [value.double() for value in (x0, noise, v, v_old, v_ref)]
    t = sigma.double().view(4, 1, 1)
    x_t = (1 - t) * d[0] + t * d[1]
    parts = []
    for velocity in (beta * d[2] + (1 - beta) * d[3], (1 + beta) * d[3] - beta * d[2]):
        error = x_t - t * velocity - d[0]
        weight = error.abs().flatten(1).mean(1).clamp(min=1e-5)
        parts.append(error.square().flatten(1).mean(1) / weight)
    r = r.double()
    policy = 5 * (r * parts[0] + (1 - r) * parts[1]) / beta
    expected = policy.mean() + 1e-4 * (d[2] - d[4]).square().mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", ["flow_grpo", "dance_grpo", "verl_omni"])
def test_scoring_before_the_cast_breaks_replay_by_the_known_amount(name):
    """The trap: the replay of a bf16 sample differs from the rollout by w (mean z_stored^2 - mean
    z^2), of the size of a clip range of 1e-5. Scored as stored, ours is equal to the bit."""
    preset = ek.COMPAT[name]
    dynamics = next(iter(preset.log_prob))
    table = preset.transition_table(SIGMAS, dynamics=dynamics, noise_level=0.7)
    x, v, eps, _, _ = inputs((1024, 16), torch.bfloat16)
    peer = ek.sde_step(x, v, table, INDEX, None, noise=eps, score=preset.score)
    ours = ek.sde_step(x, v, table, INDEX, None, noise=eps)
    replay = ek.sde_log_prob(x, peer.x_next, v, table, INDEX).log_prob
    assert torch.equal(replay, ours.log_prob) and torch.equal(peer.x_next, ours.x_next)
    row = table[INDEX].double()[:, :, None, None]
    mean = row[:, 0] * x.double() + row[:, 1] * v.double()
    z = row[:, 3] * eps.double()
    known = row[:, 4].flatten() * ((peer.x_next.double() - mean).square() - z.square()).flatten(
        1
    ).mean(1)
    gap = (replay - peer.log_prob).double()
    torch.testing.assert_close(gap, known, rtol=0, atol=1e-6)
    assert 1e-6 < gap.abs().max() < 1e-3


def test_presets_are_constants():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ek.COMPAT["flow_grpo"].score = "stored"


@pytest.mark.parametrize("name", ek.COMPAT)
def test_presets_can_be_sent_and_copied(name):
    """To the workers of a trainer, in its configuration."""
    preset = ek.COMPAT[name]
    assert pickle.loads(pickle.dumps(preset)) == copy.deepcopy(preset) == preset


@pytest.mark.parametrize("log_prob", [None, "full"])
def test_dynamics_a_project_does_not_have(log_prob):
    preset = ek.COMPAT["dance_grpo"]
    with pytest.raises(ValueError, match="^dynamics 'cps' .* which has dance-sde$"):
        preset.grpo_for("cps")
    with pytest.raises(ValueError, match="^dynamics 'cps' .* which has dance-sde$"):
        preset.transition_table(SIGMAS, dynamics="cps", noise_level=0.7, log_prob=log_prob)
    ode = preset.transition_table(SIGMAS, dynamics="ode", log_prob=log_prob)
    assert torch.equal(ode, ek.transition_table(SIGMAS, dynamics="ode"))


def test_the_table_of_a_preset():
    """Is the operators', with another default of the log-prob."""
    options = {"noise_level": 0.7, "window": (1, 3), "solver": "dpm++2m", "sigma_max": 0.9}
    table = ek.COMPAT["flow_grpo_bagel"].transition_table
    assert torch.equal(
        table(SIGMAS, **options), ek.transition_table(SIGMAS, log_prob="scaled", **options)
    )
    assert torch.equal(
        table(SIGMAS, log_prob="full", **options), ek.transition_table(SIGMAS, **options)
    )
    with pytest.raises(ValueError, match="^log_prob must be one of"):
        table(SIGMAS, log_prob="", noise_level=0.7)
