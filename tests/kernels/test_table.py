import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import editr2_kernels as ek

A, B, C, S, W, CONST, SIGMA, NEXT = range(8)
SIGMAS = [1.0, 0.8, 0.55, 0.2, 0.0]


def full_log_prob(s):
    return -1 / (2 * s**2), -math.log(s) - 0.5 * math.log(2 * math.pi)


def assert_rows(table, expected):
    np.testing.assert_allclose(table.numpy(), np.array(expected), rtol=2e-7, atol=1e-8)  # one fp32 rounding


def flow_sde_row(sigma, after, g):
    """As Flow-GRPO writes it: x + [v + g^2/(2 sigma) (x + (1 - sigma) v)] dt, collected by x and v."""
    dt = after - sigma
    coefficient = g**2 / (2 * sigma)
    std = g * math.sqrt(-dt)
    return [1 + coefficient * dt, dt + coefficient * (1 - sigma) * dt, 0, std, *full_log_prob(std), sigma, after]


def test_flow_sde():
    level = 0.7
    g = [level * math.sqrt(s / (1 - (0.8 if s == 1.0 else s))) for s in SIGMAS[:-1]]
    expected = [flow_sde_row(s, n, gi) for s, n, gi in zip(SIGMAS, SIGMAS[1:], g)]
    assert expected[-1][S] > 0  # the last step is noisy
    assert_rows(ek.transition_table(SIGMAS, dynamics="flow-sde", noise_level=level), expected)


def test_flow_sde_bounds_sigma_only_at_one():
    table = ek.transition_table([0.999, 0.5, 0.0], noise_level=1.0)
    assert_rows(table[:1], [flow_sde_row(0.999, 0.5, math.sqrt(0.999 / 0.001))])


def test_dance_sde_excludes_the_last_step():
    expected = [flow_sde_row(s, n, 0.3) for s, n in pairwise(SIGMAS[:-1])]
    expected.append([1, -0.2, 0, 0, 0, 0, 0.2, 0.0])
    assert_rows(ek.transition_table(SIGMAS, dynamics="dance-sde", noise_level=0.3), expected)


def test_cps():
    expected = []
    for s, n in pairwise(SIGMAS):
        std = n * math.sin(0.8 * math.pi / 2)
        # x' = (1 - n) x0 + r x1 + std eps, x0 = x - s v, x1 = x + (1 - s) v
        r = math.sqrt(n**2 - std**2)
        expected.append([(1 - n) + r, -(1 - n) * s + r * (1 - s), 0, std, -1 if n else 0, 0, s, n])
    assert_rows(ek.transition_table(SIGMAS, dynamics="cps", noise_level=0.8), expected)
    assert_rows(ek.transition_table(SIGMAS, dynamics="cps", noise_level=0.8)[-1:], [[1, -0.2, 0, 0, 0, 0, 0.2, 0]])


@pytest.mark.parametrize("dynamics", ek.DYNAMICS)
def test_zero_noise_is_the_ode(dynamics):
    ode = [[1, n - s, 0, 0, 0, 0, s, n] for s, n in pairwise(SIGMAS)]
    assert_rows(ek.transition_table(SIGMAS, dynamics=dynamics, noise_level=0.0), ode)


def test_window_is_half_open_and_outside_is_the_ode():
    full = ek.transition_table(SIGMAS, noise_level=0.7)
    ode = ek.transition_table(SIGMAS, dynamics="ode")
    table = ek.transition_table(SIGMAS, noise_level=0.7, window=(1, 3))
    assert torch.equal(table, torch.stack([ode[0], full[1], full[2], ode[3]]))
    assert torch.equal(ek.transition_table(SIGMAS, noise_level=0.7, window=(2, 2)), ode)


def test_sequences_and_tensors_are_taken():
    table = ek.transition_table(SIGMAS, noise_level=0.7)
    assert table.dtype == torch.float32 and table.shape == (4, 8)
    assert torch.equal(table, ek.transition_table(torch.tensor(SIGMAS, dtype=torch.float64), noise_level=0.7))


def test_flow_sigmas():
    np.testing.assert_allclose(ek.flow_sigmas(4), [1, 0.75, 0.5, 0.25, 0])
    t = np.linspace(1, 0, 15)
    np.testing.assert_allclose(ek.flow_sigmas(14, 3.0), 3 * t / (1 + 2 * t))
    assert ek.flow_sigmas(7, 3.0)[0] == 1.0 and ek.flow_sigmas(7, 3.0)[-1] == 0.0


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("sigmas", {"sigmas": [1.0]}),
        ("sigmas", {"sigmas": [1.0, 1.0]}),
        ("sigmas", {"sigmas": [1.5, 0.0]}),
        ("sigmas", {"sigmas": [1.0, float("nan")]}),
        ("dynamics", {"dynamics": "sde"}),
        ("noise_level", {"noise_level": None}),
        ("noise_level", {"noise_level": -0.1}),
        ("noise_level", {"noise_level": 1e-25}),
        ("noise_level", {"dynamics": "cps", "noise_level": 1.5}),
        ("window", {"window": (2, 9)}),
        ("window", {"window": (3, 1)}),
    ],
)
def test_errors_name_the_argument(name, arguments):
    with pytest.raises(ValueError, match=name):
        ek.transition_table(**{"sigmas": SIGMAS, "noise_level": 0.7, **arguments})


def test_flow_sigmas_errors():
    with pytest.raises(ValueError, match="steps"):
        ek.flow_sigmas(0)
    with pytest.raises(ValueError, match="shift"):
        ek.flow_sigmas(4, 0.0)
