"""group_advantage against the definition in unbounded precision, over all options."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import editr2_kernels as ek

FAST = [name for name in ("ref", "cpu") if ek.backends()[name].available]


def moments(values, unbiased):
    """Mean and std of Fractions: exact but for the root."""
    mean = sum(values) / len(values)
    divisor = len(values) - 1 if unbiased else len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / divisor) if divisor else 0.0


def exact_oracle(scores, group, options, weights, mask, applies):
    """The definition once more, unit by unit, in unbounded precision. Inputs: nested lists of
    Fractions and bools. Units, and their values by reward, are dicts of what there is."""
    n, turns, rewards = len(scores), len(scores[0]), len(weights)
    live = [list(row) for row in mask]
    if (k := options.filter_reward) is not None:
        for i, t in itertools.product(range(n), range(turns)):
            if mask[i][t] and applies[i][t][k] and scores[i][t][k] == 0:
                live[i][t + 1 :] = [False] * (turns - t - 1)
    heard = [k for k in range(rewards) if weights[k]] or list(range(rewards))
    judged = [[any(turn[k] for k in heard) for turn in sample] for sample in applies]

    def said(i, some):
        """What every reward says of some turns of sample i, where it says anything."""
        of = {k: [scores[i][t][k] for t in some if applies[i][t][k]] for k in range(rewards)}
        return {k: aggregated(row) for k, row in of.items() if row}

    def aggregated(row):
        if options.aggregate in ("none", "last"):
            return row[-1]
        running = [math.prod(row[: t + 1]) for t in range(len(row))]
        return {
            "mean": sum(row) / len(row),
            "product": running[-1],
            "prefix": sum(running) / len(row),
        }[options.aggregate]

    def weighed(said):
        """The weighted sum, of weights whose sizes add up to what all of them do."""
        left = sum(abs(weights[k]) for k in said)
        grown = sum(map(abs, weights)) / left if left else Fraction(1)
        return sum(weights[k] * grown * x for k, x in said.items())

    value, set_of, cells = {}, {}, {}
    for i in range(n):
        if options.aggregate == "none":
            for t in range(turns):
                if judged[i][t] and (mask if options.filter_in_statistics else live)[i][t]:
                    value[i, t] = said(i, [t])
                    set_of[i, t] = group[i], t if options.baseline == "session_turn" else None
                    cells[i, t] = [(i, t)]
        elif all(mask[i]) and any(judged[i]):
            value[i] = said(i, range(turns))
            set_of[i], cells[i] = group[i], [(i, t) for t in range(turns)]
    fused = {u: weighed(value[u]) for u in value}

    def members(s, units):
        return [u for u in units if set_of[u] == s]

    for s in set(set_of.values()):
        mean, std = moments([fused[u] for u in members(s, value)], options.unbiased)
        low = options.min_std is not None and std <= options.min_std
        if low or (options.max_mean is not None and mean >= options.max_mean):
            for u in members(s, value):
                del value[u]

    def normal(d, std):
        denominator = max(std, options.eps) if options.eps_mode == "floor" else std + options.eps
        return float(d) / denominator if denominator else 0.0

    def normalised(column):
        out = {}
        everything = moments(list(column.values()), options.unbiased)[1] if column else 0.0
        for u in column:
            mean, std = moments([column[v] for v in members(set_of[u], column)], options.unbiased)
            d = column[u] - mean
            out[u] = (
                float(d)
                if options.std == "none"
                else normal(d, everything if options.std == "global" else std)
            )
        return out

    if not value:
        a = {}
    elif options.fusion == "reward":
        a = normalised({u: fused[u] for u in value})
    else:
        columns = [
            normalised({u: said[k] for u, said in value.items() if k in said})
            for k in range(rewards)
        ]
        a = {
            u: float(weighed({k: Fraction(columns[k][u]) for k in said}))
            for u, said in value.items()
        }
        if options.fusion == "gdpo":
            mean, std = moments(list(a.values()), options.unbiased)
            a = {u: normal(a[u] - mean, std) for u in a}
    advantage, trained = np.zeros((n, turns)), np.zeros((n, turns), dtype=bool)
    for u in a:
        for i, t in cells[u]:
            if live[i][t] and judged[i][t]:
                trained[i, t] = True
                advantage[i, t] = (
                    a[u] if options.clip is None else min(max(a[u], -options.clip), options.clip)
                )
    return advantage, trained


@st.composite
def cases(draw):
    """Scores in eighths, of 1, 2 or 4 turns, and weights that grow by powers of two or 1.5: every
    value is exact in fp32, so ties and zeros are the oracle's too. A third is not: of 3 turns of 4
    no std is compared with 0."""
    turns, n = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 9))
    eighths = draw(st.lists(st.integers(-2, 8), min_size=n * turns * 2, max_size=n * turns * 2))
    mask = draw(
        st.lists(st.sampled_from([True, True, True, False]), min_size=n * turns, max_size=n * turns)
    )
    applies = draw(
        st.lists(
            st.sampled_from(draw(st.sampled_from([[True], [True, True, False], [True, False]]))),
            min_size=n * turns * 2,
            max_size=n * turns * 2,
        )
    )
    group = draw(st.lists(st.sampled_from([-(2**62), 0, 7]), min_size=n, max_size=n))
    aggregate = draw(st.sampled_from(["none", "none", "mean", "last", "product", "prefix"]))
    options = ek.CreditOptions(
        aggregate=aggregate,
        fusion=draw(st.sampled_from(["reward", "advantage", "gdpo"])),
        baseline=draw(st.sampled_from(["session", "session_turn"]))
        if aggregate == "none"
        else "session",
        std=draw(st.sampled_from(["group", "global", "none"])),
        unbiased=draw(st.booleans()),
        eps=draw(
            st.sampled_from([0.25, 1.0])
        ),  # large: cancellation leaves errors of 1e-7, which eps divides
        clip=draw(st.sampled_from([None, 0.5, 5.0])),
        broadcast=aggregate != "none",
        filter_reward=draw(st.sampled_from([None, 0, 1])),
        filter_in_statistics=draw(st.booleans()) if aggregate == "none" else False,
        eps_mode=draw(st.sampled_from(["add", "floor"])),
        min_std=draw(
            st.sampled_from([None, 0.1234567, *([0.0] if turns < 4 or all(applies) else [])])
        ),
        max_mean=draw(st.sampled_from([None, 0.6180339])),
    )
    return (
        torch.tensor(eighths).view(n, turns, 2) / 8,
        torch.tensor(group),
        options,
        torch.tensor(mask).view(n, turns),
        torch.tensor(applies).view(n, turns, 2),
        draw(st.sampled_from([(0.5, 0.25), (0.25, -0.25), (0.0, 0.5), (0.0, 0.0)])),
    )


@settings(max_examples=250, deadline=None)
@given(cases())
def test_exact_oracle(case):
    scores, group, options, mask, applies, weights = case
    exact = [[[Fraction(x) for x in turn] for turn in sample] for sample in scores.tolist()]
    expected, trained = exact_oracle(
        exact,
        group.tolist(),
        options,
        list(map(Fraction, weights)),
        mask.tolist(),
        applies.tolist(),
    )
    first = None
    given = {"weights": torch.tensor(weights), "mask": mask, "applies": applies}
    for name in FAST:
        out = ek.group_advantage(scores, group, options, **given, backend=name)
        assert out.mask.numpy().tolist() == trained.tolist()
        # Values below 8 in fp32, each some roundings from exact, over an eps of 1/4, twice for
        # gdpo.
        np.testing.assert_allclose(out.advantage.numpy(), expected, rtol=1e-5, atol=2e-5)
        first = first or out
        assert torch.equal(out.advantage.view(torch.int32), first.advantage.view(torch.int32))
