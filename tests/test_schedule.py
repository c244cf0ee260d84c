"""Samplers as tables, windows, seeds: the small pure parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editr2.config import Config, replace_nested
from editr2.errors import ConfigError
from editr2.rl.sampler import eval_sampler, make_sampler, rollout_sampler
from editr2.rl.seeds import derive_seed, seed_tensor
from editr2_kernels import sde_step, transition_table


def test_rows_outside_the_window_are_ode_rows_and_inside_sde_rows():
    sampler = make_sampler(6, dynamics="flow-sde", noise_level=0.7, window=2)
    starts = torch.tensor([0, 1, 2])
    for k in range(6):
        rows, inside = sampler.step_index(k, starts)
        assert inside.tolist() == [int(s) <= k < int(s) + 2 for s in starts]
        assert ((sampler.table[rows, 3] > 0) == inside).all()  # S
        assert torch.equal(sampler.table[rows, 6], torch.full((3,), float(sampler.sigmas[k])))


def test_a_sample_takes_the_same_step_alone_and_among_others_at_other_steps():
    sampler = make_sampler(5, dynamics="cps", noise_level=0.6, window=2)
    x, v, seed = torch.randn(4, 9), torch.randn(4, 9), torch.arange(4)
    rows = torch.tensor([0, 6, 5, 3])
    together = sde_step(x, v, sampler.table, rows, seed)
    for i in range(4):
        alone = sde_step(
            x[i : i + 1], v[i : i + 1], sampler.table, rows[i : i + 1], seed[i : i + 1]
        )
        assert torch.equal(alone.x_next, together.x_next[i : i + 1])
        assert torch.equal(alone.log_prob, together.log_prob[i : i + 1])


def test_table_follows_the_shift():
    sampler = make_sampler(4, shift=3.0)
    expected = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert sampler.sigmas.tolist() == pytest.approx(expected)
    ode = transition_table(expected, dynamics="ode", noise_level=0.0)
    torch.testing.assert_close(sampler.table[:4], ode)


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"steps": 0}, "rollout.steps"),
        ({"window": 9}, "rollout.window"),
        ({"window_range": 0.0}, "rollout.window_range"),
        ({"window_range": 1.1}, "rollout.window_range"),
        ({"dynamics": "ddim"}, "rollout.dynamics"),
        ({"dynamics": "dpm++sde"}, "rollout.dynamics"),
        ({"dynamics": "cps", "window": 4, "noise_level": 0.5}, "have no noise"),
        (
            {"dynamics": "dpm++sde", "window": 4, "window_range": 1, "noise_level": 1.0},
            "lower rollout.window_range or rollout.window$",  # no level gives noise there
        ),
    ],
)
def test_an_impossible_sampler_is_named(arguments, name):
    with pytest.raises(ConfigError, match=name):
        make_sampler(**{"steps": 4, "window": 2, "noise_level": 0.7} | arguments)


def test_evaluation_is_ode_or_as_in_training():
    config = replace_nested(Config(), {"rollout": {"steps": 6}, "eval": {"sampler": "ode"}})

    def evaluating(values):
        changed = replace_nested(config, values)
        return eval_sampler(changed.rollout, changed.eval)

    assert eval_sampler(config.rollout, config.eval).window == 0
    assert evaluating({"eval": {"steps": 9}}).steps == 9
    same = evaluating({"eval": {"sampler": "rollout"}})
    assert torch.equal(same.table, rollout_sampler(config.rollout).table) and same.window == 2


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4), st.integers(0, 3))
def test_seeds_are_64_bit_and_change_with_every_part(parts, i):
    seed = derive_seed(*parts)
    assert -(2**63) <= seed < 2**63 and derive_seed(*parts) == seed
    changed = list(parts)
    changed[i % len(parts)] ^= 1
    assert derive_seed(*changed) != seed
    assert derive_seed(*parts, "x") != seed
    assert seed_tensor([seed]).tolist() == [seed]


def test_names_and_order_matter_in_a_seed():
    assert derive_seed(1, 2) != derive_seed(2, 1) and derive_seed("a", "b") != derive_seed("b", "a")
