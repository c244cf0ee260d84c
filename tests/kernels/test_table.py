import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import editr2_kernels as ek

A, B, C, S, W, CONST, SIGMA, NEXT = range(8)
SIGMAS = [1.0, 0.8, 0.55, 0.2, 0.0]
KINDS = ("full", "scaled", "unscaled")


def full_log_prob(s):
    return -1 / (2 * s**2), -math.log(s) - 0.5 * math.log(2 * math.pi)


def assert_rows(table, expected):
    np.testing.assert_allclose(
        table.numpy(), np.array(expected), rtol=2e-7, atol=1e-8
    )  # one fp32 rounding


def flow_sde_row(sigma, after, g):
    """As Flow-GRPO writes it: x + [v + g^2/(2 sigma) (x + (1 - sigma) v)] dt, collected by x and
    v."""
    dt = after - sigma
    coefficient = g**2 / (2 * sigma)
    std = g * math.sqrt(-dt)
    return [
        1 + coefficient * dt,
        dt + coefficient * (1 - sigma) * dt,
        0,
        std,
        *full_log_prob(std),
        sigma,
        after,
    ]


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
    assert_rows(
        ek.transition_table(SIGMAS, dynamics="cps", noise_level=0.8)[-1:],
        [[1, -0.2, 0, 0, 0, 0, 0.2, 0]],
    )


def test_wan_sde():
    """g runs linearly in sigma between the last and the second entry, not the first."""
    sigmas = [1.0, 0.8, 0.55, 0.2, 0.1]
    expected = [flow_sde_row(s, n, 0.1 + (0.8 - 0.1) * s) for s, n in pairwise(sigmas)]
    assert_rows(ek.transition_table(sigmas, dynamics="wan-sde"), expected)
    halved = [flow_sde_row(s, n, 0.5 * (0.1 + (0.9 - 0.1) * s)) for s, n in pairwise(sigmas)]
    assert_rows(
        ek.transition_table(sigmas, dynamics="wan-sde", noise_level=0.5, sigma_max=0.9), halved
    )


def test_ddim_sde():
    """As DDIM writes it: mu from x0 and the noise (x - (1 - sigma) x0) / sigma, collected by x and
    v numerically."""
    expected = []
    for s, n in pairwise(SIGMAS):
        rho = 0.7 * n * math.sqrt(1 - n**2 * (1 - s) ** 2 / (s**2 * (1 - n) ** 2))

        def mu(x, v, s=s, n=n, rho=rho):
            x0 = x - s * v
            return (1 - n) * x0 + math.sqrt(n**2 - rho**2) * (x - (1 - s) * x0) / s

        w, c = full_log_prob(rho) if rho else (0, 0)
        expected.append([mu(1, 0), mu(0, 1), 0, rho, w, c, s, n])
    assert expected[-1][S] == 0 and expected[0][S] > 0
    assert_rows(ek.transition_table(SIGMAS, dynamics="ddim-sde", noise_level=0.7), expected)


def half_difference(i, m, m_prev):
    """(m - m_prev) / (2 r0), with r0 the ratio of the steps in lambda = ln((1 - sigma) / sigma); 0
    at first order."""
    if i in (0, len(SIGMAS) - 2) or SIGMAS[i - 1] == 1.0:
        return 0.0
    before, now, after = (math.log((1 - sigma) / sigma) for sigma in SIGMAS[i - 1 : i + 2])
    return (m - m_prev) / (2 * (now - before) / (after - now))


def decay(s, n):
    """e^-h"""
    return 0.0 if s == 1.0 or n == 0.0 else math.exp(math.log((1 - s) / s) - math.log((1 - n) / n))


def collected(mu, s):
    """The coefficients of a function of x, m and m_prev that is linear in them, with m = x - sigma
    v."""
    on_x, on_m, on_previous = mu(1, 0, 0), mu(0, 1, 0), mu(0, 0, 1)
    return [on_x + on_m, -s * on_m, on_previous]


def test_dpm_ode():
    expected = []
    for i, (s, n) in enumerate(pairwise(SIGMAS)):

        def mu(x, m, previous, i=i, s=s, n=n):
            return (n / s) * x - (1 - n) * (decay(s, n) - 1) * (m + half_difference(i, m, previous))

        expected.append([*collected(mu, s), 0, 0, 0, s, n])
    table = ek.transition_table(SIGMAS, dynamics="ode", solver="dpm++2m")
    assert_rows(table, expected)
    assert (table[:, C] != 0).tolist() == [False, False, True, False]
    ode = ek.transition_table(SIGMAS, dynamics="ode")
    assert torch.equal(table[[0, 1, 3]], ode[[0, 1, 3]])  # the first order is Euler's step


def test_dpm_sde():
    expected = []
    for i, (s, n) in enumerate(pairwise(SIGMAS)):
        e = decay(s, n)

        def mu(x, m, previous, i=i, s=s, n=n, e=e):
            return (n / s) * e * x + (1 - n) * (1 - e**2) * (m + half_difference(i, m, previous))

        std = n * math.sqrt(1 - e**2)
        w, c = full_log_prob(std) if std else (0, 0)
        expected.append([*collected(mu, s), std, w, c, s, n])
    table = ek.transition_table(SIGMAS, dynamics="dpm++sde")
    assert_rows(table, expected)
    assert (table[:, C] != 0).tolist() == [False, False, True, False]
    assert torch.equal(
        table[3], ek.transition_table(SIGMAS, dynamics="ode")[3]
    )  # its last step goes to x0


def test_dpm_is_of_second_order():
    """On x(sigma) = 1 - sigma + sigma^3 the error of Euler halves with the steps, that of DPM++2M
    quarters."""

    def error(steps, solver):
        sigmas = np.linspace(0.9, 0.1, steps + 1).tolist()
        table = ek.transition_table(sigmas, dynamics="ode", solver=solver).double()
        x, previous = 1 - 0.9 + 0.9**3, 0.0
        for row in table:
            sigma = row[SIGMA].item()
            # dx/dsigma = v along the exact path, made to depend on x so that errors propagate.
            v = -1 + 3 * sigma**2 + 0.5 * (x - (1 - sigma + sigma**3))
            x, previous = (row[A] * x + row[B] * v + row[C] * previous).item(), x - sigma * v
        return abs(x - (1 - 0.1 + 0.1**3))

    assert 1.7 < error(64, "euler") / error(128, "euler") < 2.3
    assert error(128, "dpm++2m") < error(128, "euler") / 10
    # The first and last steps are Euler's, of local order 2: together with the rest, global order
    # 2.
    assert 3.3 < error(64, "dpm++2m") / error(128, "dpm++2m") < 4.7


def test_deterministic_rows_follow_the_solver():
    sigmas = ek.flow_sigmas(8)
    solver = ek.transition_table(sigmas, dynamics="ode", solver="dpm++2m")
    noisy = ek.transition_table(sigmas, noise_level=0.7)
    table = ek.transition_table(sigmas, noise_level=0.7, window=(1, 4), solver="dpm++2m")
    assert torch.equal(table, torch.cat([solver[:1], noisy[1:4], solver[4:]]))
    assert torch.equal(ek.transition_table(sigmas, noise_level=0.0, solver="dpm++2m"), solver)


@pytest.mark.parametrize("dynamics", [d for d, entry in ek.DYNAMICS.items() if entry.stochastic])
def test_log_prob_variants(dynamics):
    entry = ek.DYNAMICS[dynamics]
    level = min(0.7, entry.max_level) if entry.has_level else 1.0
    tables = {
        kind: ek.transition_table(SIGMAS, dynamics=dynamics, noise_level=level, log_prob=kind)
        for kind in KINDS
    }
    noisy = tables["full"][:, S] > 0
    for kind, table in tables.items():
        assert (
            torch.equal(table[:, :W], tables["full"][:, :W])
            and not table[~noisy][:, [W, CONST]].any()
        )
        for row in table[noisy].double():
            w, c = full_log_prob(row[S].item())
            w, c = {"full": (w, c), "scaled": (w, 0.0), "unscaled": (-1.0, 0.0)}[kind]
            np.testing.assert_allclose(row[[W, CONST]].numpy(), [w, c], rtol=5e-7, atol=1e-7)
    default = ek.transition_table(SIGMAS, dynamics=dynamics, noise_level=level)
    assert torch.equal(default, tables[entry.log_prob])


def test_sigma_max_stands_in_at_one():
    table = ek.transition_table(SIGMAS, noise_level=0.7, sigma_max=0.95)
    assert_rows(table[:1], [flow_sde_row(1.0, 0.8, 0.7 * math.sqrt(1 / 0.05))])
    assert torch.equal(table[1:], ek.transition_table(SIGMAS, noise_level=0.7)[1:])


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
    assert torch.equal(
        table, ek.transition_table(torch.tensor(SIGMAS, dtype=torch.float64), noise_level=0.7)
    )


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
        ("window", {"window": (1, 2, 3)}),
        ("window", {"window": 2}),
        ("noise_level", {"dynamics": "ddim-sde", "noise_level": 1.5}),
        ("noise_level", {"dynamics": "dpm++sde", "noise_level": 0.5}),
        ("solver", {"solver": "heun"}),
        ("log_prob", {"log_prob": "mean"}),
        ("sigma_max", {"sigma_max": 1.0}),
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
