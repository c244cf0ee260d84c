"""A sampler is one entry of `DYNAMICS`: one that is not shipped gets a table, a step, a log-prob
and a loss."""

import math

import pytest
import torch

import editr2_kernels as ek

SIGMAS = ek.flow_sigmas(6, 3.0)
INDEX = torch.tensor([0, 2, 3, 5])
LEVEL = 0.6


def ancestral(step, level):
    """d = sigma' (1 + (sigma'/sigma - 1) a),  A = (1 - sigma') / (1 - d),  B = A (d - sigma),
    S = sqrt(sigma'^2 - (A d)^2)"""
    down = step.sigma_next * (1.0 + (step.sigma_next / step.sigma - 1.0) * level)
    scale = (1.0 - step.sigma_next) / (1.0 - down)
    noise = step.sigma_next**2 - (scale * down) ** 2
    return ek.Coefficients(scale, scale * (down - step.sigma), 0.0, math.sqrt(noise))


@pytest.fixture
def entry(monkeypatch):
    """Euler's method down to d, and noise up to sigma' again."""
    made = ek.Dynamics(ancestral, "a sampler that is not here", max_level=1.0, log_prob="scaled")
    monkeypatch.setitem(ek.DYNAMICS, "ancestral", made)


def written_out(i, x, v, eps):
    """(sample, log-prob) of step i in float64, as such a sampler is a loop's body elsewhere."""
    sigma, after = SIGMAS[i], SIGMAS[i + 1]
    down = after + (after / sigma - 1) * LEVEL * after
    mean = (x + v * (down - sigma)) * (1 - after) / (1 - down)
    std = math.sqrt(after**2 - (down * (1 - after) / (1 - down)) ** 2)
    if std == 0:
        return mean, 0.0
    return mean + std * eps, -(eps.square().mean().item()) / 2


def test_an_entry_is_all_that_a_sampler_needs(entry, backend):
    x, v, eps = (torch.randn(4, 3, 40) for _ in range(3))
    table = ek.transition_table(SIGMAS, dynamics="ancestral", noise_level=LEVEL)
    assert (table[:-1, 3] > 0).all() and table[-1, 3] == 0
    out = ek.sde_step(x, v, table, INDEX, None, noise=eps, backend=backend)
    for b, i in enumerate(INDEX.tolist()):
        sample, log_prob = written_out(i, x[b].double(), v[b].double(), eps[b].double())
        torch.testing.assert_close(out.x_next[b].double(), sample, rtol=0, atol=3e-6)
        assert out.log_prob[b].item() == pytest.approx(log_prob, abs=1e-5)
    v.requires_grad_()
    replay = ek.sde_log_prob(x, out.x_next, v, table, INDEX, backend=backend)
    assert torch.equal(replay.log_prob, out.log_prob)
    loss = ek.grpo_loss(
        x, out.x_next, v, table, INDEX, out.log_prob, torch.ones(4), backend=backend
    )
    loss.loss.backward()
    assert torch.equal(loss.ratio, torch.ones(4))
    assert (v.grad.flatten(1) != 0).any(1).tolist() == [True, True, True, False]


def test_refusals_of_a_level_are_the_entrys(entry):
    with pytest.raises(ValueError, match="^noise_level is required for dynamics 'ancestral'$"):
        ek.transition_table(SIGMAS, dynamics="ancestral")
    with pytest.raises(ValueError, match=r"lie in \[0, 1\] for dynamics 'ancestral', got 1.5$"):
        ek.transition_table(SIGMAS, dynamics="ancestral", noise_level=1.5)
    with pytest.raises(ValueError, match="^dynamics must be one of .*ode, ancestral, got 'sde'$"):
        ek.transition_table(SIGMAS, dynamics="sde")
    ode = ek.transition_table(SIGMAS, dynamics="ode")
    assert torch.equal(ek.transition_table(SIGMAS, dynamics="ancestral", noise_level=0.0), ode)


@pytest.mark.parametrize(
    "coefficients, message",
    [
        ((1.0, -0.1, 0.0, -0.1), "^dynamics 'wrong' gives S = -0.1 at step 0"),
        ((1.0, -0.1, 0.0, math.nan), "^dynamics 'wrong' gives S = nan at step 0"),
        ((1.0, -0.1, 0.2, 0.1), "^dynamics 'wrong' gives C = 0.2 at step 0"),
    ],
)
def test_what_an_entry_may_not_give(monkeypatch, coefficients, message):
    entry = ek.Dynamics(lambda step, level: ek.Coefficients(*coefficients), "nowhere")
    monkeypatch.setitem(ek.DYNAMICS, "wrong", entry)
    with pytest.raises(ValueError, match=message):
        ek.transition_table(SIGMAS, dynamics="wrong", noise_level=0.5)


def test_a_row_of_second_order_needs_an_entry_of_second_order(monkeypatch):
    entry = ek.Dynamics(lambda step, level: ek.Coefficients(1.0, -0.1, 0.2, 0.1), "", order=2)
    monkeypatch.setitem(ek.DYNAMICS, "second", entry)
    table = ek.transition_table(SIGMAS, dynamics="second", noise_level=0.5)
    assert (table[:, 2] == torch.tensor(0.2)).all()


@pytest.mark.parametrize("name", ek.DYNAMICS)
def test_every_entry_says_what_it_is(name):
    """Its formula and its source stand in it, and its defaults are among what it accepts."""
    entry = ek.DYNAMICS[name]
    assert entry.source and entry.log_prob in ek.LOG_PROBS
    assert entry.coefficients is None or "=" in (entry.coefficients.__doc__ or "")
    if entry.default_level is not None:
        table = ek.transition_table(SIGMAS, dynamics=name)
        explicit = ek.transition_table(SIGMAS, dynamics=name, noise_level=entry.default_level)
        assert torch.equal(table, explicit)
    level = entry.max_level if math.isfinite(entry.max_level) else 0.7
    table = ek.transition_table(SIGMAS, dynamics=name, noise_level=level)
    assert bool((table[:, 2] != 0).any()) == (entry.order == 2)
    assert bool((table[:, 3] > 0).any()) == entry.stochastic
