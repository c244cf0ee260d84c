"""group_advantage: presets against NumPy written from the papers, bits on all backends, masks,
filter, dropped sets."""

import ctypes
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import editr2_kernels as ek

OPTIONS = [
    ek.CreditOptions(
        aggregate=aggregate,
        fusion=fusion,
        baseline=baseline,
        std=std,
        unbiased=i % 2 == 1,
        broadcast=aggregate != "none",
        filter_reward=(None, 0, 1)[i % 3],
        filter_in_statistics=aggregate == "none" and i % 5 == 0,
        eps_mode=("add", "floor")[i // 2 % 2],
        min_std=(None, None, 0.0, 0.2)[i % 4],
        max_mean=(None, None, None, 0.55)[i // 3 % 4],
    )
    for i, (aggregate, fusion, baseline, std) in enumerate(
        itertools.product(
            ("none", "mean", "last", "product", "prefix"),
            ("reward", "advantage", "gdpo"),
            ("session", "session_turn"),
            ("group", "global", "none"),
        )
    )
    if aggregate == "none" or baseline == "session"
]
# All of them on fast backends, a spread of them on slow ones (steps that are coprime to all the
# cycles).
SPREAD = {"ref": OPTIONS, "cpu": OPTIONS, "cuda": OPTIONS[::7], "triton": OPTIONS[::17]}
FAST = [name for name in ("ref", "cpu") if ek.backends()[name].available]


def bits(t):
    return t.view(torch.int32)


def data(n=18, turns=3, rewards=2, groups=3, levels=None):
    scores = torch.rand(n, turns, rewards)
    if levels:
        scores = (scores * levels).round() / levels
    return scores, torch.arange(n) % groups


def close(actual, expected):
    # fp32 statistics against float64: a few roundings of values of size 1, divided by std of about
    # 0.3.
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5)


def edit_r2_oracle(scores, group, weights, filter_in_statistics):
    """Edit-R2: fused reward a turn, mean over the session's group and all its turns, std over
    everything gathered."""
    s = scores.double().numpy()
    reward = (s * weights.double().numpy()).sum(-1)
    failed = s[:, :, 0] == 0
    masked = np.zeros_like(failed)
    for i, t in zip(*np.nonzero(failed)):
        masked[i, t + 1 :] = True
    counted = np.ones_like(masked) if filter_in_statistics else ~masked
    advantage = np.zeros_like(reward)
    for g in np.unique(group):
        rows = group.numpy() == g
        advantage[rows] = reward[rows] - reward[rows][counted[rows]].mean()
    advantage = np.clip(advantage / (reward[counted].std() + 1e-4), -5, 5)
    advantage[masked] = 0
    return advantage, ~masked


@pytest.mark.parametrize("preset", ["edit-r2", "edit-r2-released"])
def test_edit_r2(backend, preset):
    scores, group = data(rewards=3, levels=4)
    weights = torch.tensor([0.3, 0.3, 0.4])
    out = ek.group_advantage(
        scores, group, ek.CREDIT_PRESETS[preset], weights=weights, backend=backend
    )
    advantage, mask = edit_r2_oracle(scores, group, weights, preset.endswith("released"))
    assert not mask.all()
    assert out.mask.numpy().tolist() == mask.tolist()
    close(out.advantage, advantage)
    assert not out.advantage[~out.mask].any()


def test_mt_editflow(backend):
    scores, group = data()
    out = ek.group_advantage(
        scores,
        group,
        ek.CREDIT_PRESETS["mt-editflow"],
        weights=torch.tensor([0.6, 0.4]),
        backend=backend,
    )
    r = scores.double().numpy().mean(1)
    expected = np.zeros(len(r))
    for g in range(3):
        rows = group.numpy() == g
        normal = (r[rows] - r[rows].mean(0)) / (r[rows].std(0) + 1e-4)
        expected[rows] = normal @ np.array([0.6, 0.4])
    close(out.advantage, np.clip(expected, -5, 5)[:, None].repeat(3, 1))
    assert out.mask.all()


def test_flow_grpo(backend):
    scores, group = data(rewards=1)
    out = ek.group_advantage(scores, group, ek.CREDIT_PRESETS["flow-grpo"], backend=backend)
    s = scores.double().numpy()[:, :, 0]
    expected = np.zeros_like(s)
    for g in range(3):
        rows = group.numpy() == g
        expected[rows] = (s[rows] - s[rows].mean(0)) / (s[rows].std(0) + 1e-4)
    close(out.advantage, np.clip(expected, -5, 5))


@pytest.mark.parametrize("how", ["mean", "last", "product", "prefix"])
def test_aggregates(backend, how):
    scores, group = data(rewards=1, turns=4)
    s = scores.double().numpy()[:, :, 0]
    value = {
        "mean": s.mean(1),
        "last": s[:, -1],
        "product": s.prod(1),
        "prefix": np.cumprod(s, 1).mean(1),
    }[how]
    options = ek.CreditOptions(
        aggregate=how, std="group", unbiased=True, eps=0.0, clip=None, broadcast=True
    )
    out = ek.group_advantage(scores, group, options, backend=backend)
    expected = np.zeros_like(value)
    for g in range(3):
        rows = group.numpy() == g
        expected[rows] = (value[rows] - value[rows].mean()) / value[rows].std(ddof=1)
    close(out.advantage, expected[:, None].repeat(4, 1))


def test_same_bits_on_every_backend(backend):
    n = 23 if backend != "triton" else 7
    for i, options in enumerate(SPREAD[backend]):
        scores, group = data(n=n, groups=4, levels=5 if i % 2 else None)
        scores = scores * 10.0 ** (i % 7 - 3)
        group = group * -(2**40) + 3
        mask = torch.rand(n, 3) < 0.9
        weights = torch.tensor([0.7, 0.2])
        options = dataclasses.replace(
            options, eps=0.0 if i % 3 else 1e-4, clip=1.5 if i % 4 else None
        )
        expected = ek.group_advantage(
            scores, group, options, weights=weights, mask=mask, backend="ref"
        )
        out = ek.group_advantage(
            scores, group, options, weights=weights, mask=mask, backend=backend
        )
        assert torch.equal(out.mask, expected.mask)
        assert torch.equal(out.advantage.view(torch.int32), expected.advantage.view(torch.int32)), (
            options
        )
        again = ek.group_advantage(
            scores, group, options, weights=weights, mask=mask, backend=backend
        )
        assert torch.equal(out.advantage, again.advantage) and torch.equal(out.mask, again.mask)


@pytest.mark.parametrize("scale", [3e38, 1e25, 1e-25])
def test_what_leaves_the_range_of_fp32_is_nan_everywhere_alike(backend, scale):
    """Sums, differences and squares that overflow; squares that underflow. One bit pattern, no
    arbitrary number."""
    scores, group = data(n=8, turns=2, groups=2)
    scores = scores - 0.5
    scores[group == 0] *= scale
    for i, options in enumerate(SPREAD[backend][::3]):
        options = dataclasses.replace(options, clip=(None, 5.0)[i % 2])
        weights = torch.tensor([0.5, 4.0])
        expected = ek.group_advantage(scores, group, options, weights=weights, backend="ref")
        out = ek.group_advantage(scores, group, options, weights=weights, backend=backend)
        assert torch.equal(out.mask, expected.mask)
        assert torch.equal(bits(out.advantage), bits(expected.advantage)), options
        broken = out.advantage.isnan()
        assert torch.equal(
            bits(out.advantage)[broken], torch.full_like(bits(out.advantage)[broken], 0x7FC00000)
        )
        if scale > 1:
            assert not out.advantage.isinf().any()
    if scale > 1:
        for std, other in (("group", False), ("global", True)):
            out = ek.group_advantage(
                scores,
                group,
                ek.CreditOptions(std=std),
                weights=torch.tensor([0.5, 4.0]),
                backend=backend,
            )
            assert out.mask.all() and out.advantage[group == 0].isnan().all()
            assert out.advantage[group == 1].isnan().all() == other


def test_dropped_sets(backend):
    """The thresholds themselves drop; what is dropped has advantage 0, mask False and no part in
    any statistic."""
    scores = torch.tensor([0.5, 0.5, 0.25, 0.75, 0.0, 1.0, 0.875, 1.0]).view(8, 1, 1)
    group = torch.tensor(
        [0, 0, 1, 1, 2, 2, 3, 3]
    )  # std 0, 1/4, 1/2, 1/16; mean 1/2, 1/2, 1/2, 15/16
    for change, kept in (
        ({}, [0, 1, 2, 3]),
        ({"min_std": 0.0}, [1, 2, 3]),
        ({"min_std": 0.0625}, [1, 2]),
        ({"min_std": 0.25}, [2]),
        ({"max_mean": 0.9375}, [0, 1, 2]),
        ({"max_mean": 0.95}, [0, 1, 2, 3]),
        ({"min_std": 0.2, "max_mean": 0.5}, []),
    ):
        for base in (ek.CreditOptions(std="global"), ek.CreditOptions(fusion="gdpo", std="none")):
            options = dataclasses.replace(base, eps=0.0, **change)
            out = ek.group_advantage(scores, group, options, backend=backend)
            mask = torch.isin(group, torch.tensor(kept))
            assert torch.equal(out.mask[:, 0], mask)
            without = ek.group_advantage(
                scores[mask], group[mask], dataclasses.replace(base, eps=0.0), backend=backend
            )
            assert torch.equal(bits(out.advantage[mask]), bits(without.advantage))
            assert not out.advantage[~mask].any()


def test_dropping_looks_at_the_weighted_reward_of_the_set(backend):
    """Not at single rewards, whatever the fusion; a turn of its own where turns have their own
    baseline."""
    scores = torch.rand(6, 2, 2)
    scores[:, 0, 1] = 1 - scores[:, 0, 0]  # the sum of both is constant in turn 0
    scores[:, 0] = (scores[:, 0] * 64).round() / 64
    group = torch.zeros(6, dtype=torch.int64)
    for fusion in ("reward", "advantage", "gdpo"):
        options = ek.CreditOptions(fusion=fusion, baseline="session_turn", min_std=0.0)
        out = ek.group_advantage(
            scores, group, options, weights=torch.tensor([0.5, 0.5]), backend=backend
        )
        assert not out.mask[:, 0].any() and out.mask[:, 1].all()
        pooled = dataclasses.replace(options, baseline="session")
        assert ek.group_advantage(
            scores, group, pooled, weights=torch.ones(2), backend=backend
        ).mask.all()


def per_prompt(prompts, rewards, global_std, unbiased=False, eps=1e-4):
    """The tracker most trainers use: for each unique prompt, rewards [N, T] minus their mean, over
    std + eps."""
    out = np.zeros_like(rewards)
    for prompt in np.unique(prompts):
        mask = prompts == prompt
        std = (rewards if global_std else rewards[mask]).std(
            axis=None if global_std else 0, ddof=int(unbiased)
        )
        out[mask] = (rewards[mask] - rewards[mask].mean(axis=0)) / (std + eps)
    return np.clip(out, -5, 5)


@pytest.mark.parametrize(
    "preset, arguments",
    [
        ("flow-grpo", (False,)),
        ("dance-grpo", (False, True, 1e-8)),
        ("verl-omni", (True, True)),
    ],
)
def test_per_prompt_tracker(backend, preset, arguments):
    scores, group = data(n=12, rewards=1, turns=2)
    prompts = np.array([f"make cube {g} red" for g in group.tolist()])
    out = ek.group_advantage(scores, group, ek.CREDIT_PRESETS[preset], backend=backend)
    close(out.advantage, per_prompt(prompts, scores[:, :, 0].double().numpy(), *arguments))


def test_presets_of_other_trainers():
    scores, group = data(n=24, turns=1)
    s, w = scores[:, 0].double().numpy(), np.array([0.7, 0.3])
    weights = torch.tensor([0.7, 0.3])

    def run(preset):
        return ek.group_advantage(
            scores, group, ek.CREDIT_PRESETS[preset], weights=weights
        ).advantage[:, 0]

    def by_group(values, scale):
        out = np.zeros_like(values)
        for g in range(3):
            rows = group.numpy() == g
            out[rows] = (values[rows] - values[rows].mean(0)) / scale(values[rows])
        return out

    close(run("mixgrpo"), np.clip(by_group(s, lambda x: x.std(0, ddof=1) + 1e-8) @ w, -5, 5))
    close(run("flow-factory"), np.clip(by_group(s @ w, lambda x: max((s @ w).std(), 1e-6)), -5, 5))
    close(run("dr-grpo"), by_group(s @ w, lambda x: 1.0))
    combined = by_group(s, lambda x: np.maximum(x.std(0), 1e-6)) @ w
    close(run("gdpo"), (combined - combined.mean()) / combined.std())
    kept = ek.group_advantage(scores, group, ek.CREDIT_PRESETS["pku"], weights=weights)
    assert kept.mask.all()
    close(run("pku"), by_group(s @ w, lambda x: x.std() + 1e-4))
    flat = scores * 0.05 + 0.5  # std of about 0.01
    assert not ek.group_advantage(flat, group, ek.CREDIT_PRESETS["pku"], weights=weights).mask.any()
    high = scores * 0.2 + torch.tensor(
        [0.85, 0.85]
    )  # std of about 0.045 a reward, mean of about 0.95
    assert not ek.group_advantage(high, group, ek.CREDIT_PRESETS["pku"], weights=weights).mask.any()


def test_groups_together_or_apart(backend):
    """Where statistics are a group's own, the other groups of a batch change no bit."""
    n = 9
    scores, group = data(n=n, groups=2)
    for options in SPREAD[backend][::3]:
        if options.std == "global" or options.fusion == "gdpo":
            options = dataclasses.replace(options, std="group", fusion="advantage")
        together = ek.group_advantage(scores, group, options, backend=backend)
        for g in range(2):
            alone = ek.group_advantage(
                scores[group == g], group[group == g], options, backend=backend
            )
            assert torch.equal(bits(together.advantage[group == g]), bits(alone.advantage))
            assert torch.equal(together.mask[group == g], alone.mask)


def test_prefix_falls_with_a_failure_and_never_rises(backend):
    """One more failed turn never raises the value that prefix aggregation ranks by."""
    patterns = list(itertools.product((0.0, 1.0), repeat=3))
    scores = torch.tensor(patterns)[:, :, None]
    options = ek.CreditOptions(aggregate="prefix", std="none", clip=None, broadcast=True)
    group = torch.zeros(len(patterns), dtype=torch.int64)
    a = ek.group_advantage(scores, group, options, backend=backend).advantage[:, 0]
    for i, j in itertools.product(range(8), repeat=2):
        if all(x <= y for x, y in zip(patterns[i], patterns[j])):
            assert a[i] <= a[j]
    assert a[patterns.index((1.0, 1.0, 0.0))] < a[patterns.index((1.0, 1.0, 1.0))]


def test_threads_and_sizes_change_no_bit(one_thread, two_threads):
    scores, group = data(n=12000, turns=2, groups=700)  # more units than go to one thread alone
    some = torch.rand(scores.shape) < 0.9
    for options, applies in zip(OPTIONS[::11], itertools.cycle([None, some])):
        call = functools.partial(ek.group_advantage, scores, group, options, applies=applies)
        out, single, reference = two_threads(call), one_thread(call), call(backend="ref")
        assert torch.equal(bits(out.advantage), bits(single.advantage)) and torch.equal(
            out.mask, single.mask
        )
        assert torch.equal(bits(out.advantage), bits(reference.advantage))


def test_order_of_blocks_and_threads_changes_no_bit(emulated_cuda):
    """Also which block finishes last."""
    scores, group = data(n=11, groups=3)
    order = ctypes.CDLL(emulated_cuda.__file__).editr2_emulator_order
    some = torch.rand(scores.shape) < 0.7
    for options, applies in itertools.product(OPTIONS[::13], (None, some)):
        call = functools.partial(ek.group_advantage, scores, group, options, applies=applies)
        expected = call(backend="ref")
        for seed in (0, 1, 2):
            order(seed)
            try:
                out = call(backend="cuda")
            finally:
                order(0)
            assert torch.equal(bits(out.advantage), bits(expected.advantage)), options
            assert torch.equal(out.mask, expected.mask)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 4, st.integers(-2, 2)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from(OPTIONS),
    st.randoms(use_true_random=False),
)
def test_permuting_samples_permutes_advantages_bitwise(samples, options, random):
    scores = torch.tensor([s[:4] for s in samples]).view(-1, 2, 2)
    group = torch.tensor([s[4] for s in samples])
    order = list(range(len(samples)))
    random.shuffle(order)
    for name in FAST:
        out = ek.group_advantage(scores, group, options, backend=name)
        permuted = ek.group_advantage(scores[order], group[order], options, backend=name)
        assert torch.equal(
            out.advantage[order].view(torch.int32), permuted.advantage.view(torch.int32)
        )
        assert torch.equal(out.mask[order], permuted.mask)
        assert out.advantage.isfinite().all()


@pytest.mark.parametrize("applies", [None, 0.7])
def test_permutation(backend, applies):
    scores, group = data()
    order = torch.randperm(18)
    given = {} if applies is None else {"applies": torch.rand(18, 3, 2) < applies}
    for options in SPREAD[backend][::7]:
        out = ek.group_advantage(scores, group, options, **given, backend=backend)
        permuted = ek.group_advantage(
            scores[order],
            group[order] * 17 - 2**60,
            options,
            **{name: value[order] for name, value in given.items()},
            backend=backend,
        )
        assert torch.equal(out.advantage[order], permuted.advantage) and torch.equal(
            out.mask[order], permuted.mask
        )


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e-7, 1.3e-33, 0.0])
def test_equal_scores_give_exactly_zero(backend, value):
    scores = torch.full((7, 3, 2), value)
    scores[4:] = 0.9  # another group, so that a global std is not zero
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    for options in SPREAD[backend]:
        out = ek.group_advantage(
            scores, group, dataclasses.replace(options, eps=0.0), backend=backend
        )
        assert torch.equal(out.advantage.view(torch.int32), torch.zeros(7, 3, dtype=torch.int32)), (
            options
        )


def test_single_sample_gives_zero_and_not_nan(backend):
    scores = torch.rand(3, 1, 2)
    for options in SPREAD[backend][::3]:
        out = ek.group_advantage(scores, torch.arange(3), options, backend=backend)
        assert torch.equal(out.advantage, torch.zeros(3, 1))


def test_failed_scores_stay_outside(backend):
    """A masked score changes nothing, whatever it holds, and its turn (or sample, when aggregated)
    does not train."""
    scores, group = data()
    mask = torch.ones(18, 3, dtype=torch.bool)
    mask[4, 1] = mask[7, 2] = False
    for options in SPREAD[backend][::3]:
        outputs = []
        for junk in (0.0, 0.5, float("nan"), float("inf")):
            broken = scores.clone()
            broken[~mask] = junk
            outputs.append(ek.group_advantage(broken, group, options, mask=mask, backend=backend))
        for out in outputs[1:]:
            assert torch.equal(out.advantage, outputs[0].advantage) and torch.equal(
                out.mask, outputs[0].mask
            )
        out = outputs[0]
        assert not out.mask[~mask].any() and not out.advantage[~out.mask].any()
        if options.aggregate != "none":
            assert not out.mask[[4, 7]].any()
            keep = mask.all(1)
            without = ek.group_advantage(scores[keep], group[keep], options, backend=backend)
            assert torch.equal(out.advantage[keep], without.advantage)


@pytest.mark.parametrize("preset", [None, *ek.CREDIT_PRESETS])
def test_all_that_applies_is_as_without_the_argument(backend, preset):
    """Bit for bit, whatever the weights."""
    scores, group = data(n=9 if backend == "triton" else 18, levels=4)
    mask = torch.rand(len(scores), 3) < 0.9
    everything = torch.ones_like(scores, dtype=torch.bool)
    weights = itertools.cycle(
        [torch.tensor(w) for w in ([0.3, 0.9], [-0.5, 0.0], [0.0, 0.0], [0.7, -0.7])]
    )
    for options in SPREAD[backend] if preset is None else [ek.CREDIT_PRESETS[preset]]:
        given = {"weights": next(weights), "mask": mask, "backend": backend}
        absent = ek.group_advantage(scores, group, options, **given)
        out = ek.group_advantage(scores, group, options, **given, applies=everything)
        assert torch.equal(bits(out.advantage), bits(absent.advantage)), options
        assert torch.equal(out.mask, absent.mask)


def test_same_bits_on_every_backend_where_not_every_reward_applies(backend):
    """Also of weights that are negative, or 0, and what is there where a reward does not apply."""
    n = 23 if backend != "triton" else 7
    for i, options in enumerate(SPREAD[backend]):
        scores, group = data(n=n, rewards=3, groups=4, levels=5 if i % 2 else None)
        given = {
            "applies": torch.rand(n, 3, 3) < (0.8, 0.5, 0.2)[i % 3],
            "mask": torch.rand(n, 3) < 0.9,
            "weights": torch.tensor(
                [[0.3, 0.3, 0.4], [0.7, -0.2, 0.1], [0.0, 0.5, 0.3], [-1.0, 1.0, 0.0]][i % 4]
            ),
        }
        scores = scores * 10.0 ** (i % 7 - 3)
        options = dataclasses.replace(
            options, eps=0.0 if i % 3 else 1e-4, clip=1.5 if i % 4 else None
        )
        expected = ek.group_advantage(scores, group, options, **given, backend="ref")
        assert expected.advantage.isfinite().all()
        # A 0 would be a failure to a filter that looked, and NaN would show in every sum.
        zero = torch.rand(scores.shape) < 0.5
        scores = scores.where(given["applies"], torch.where(zero, 0.0, torch.nan))
        out = ek.group_advantage(scores, group, options, **given, backend=backend)
        assert torch.equal(out.mask, expected.mask), options
        assert torch.equal(bits(out.advantage), bits(expected.advantage)), options


def test_a_reward_that_never_applies_is_as_without_it(backend):
    """Its weight is the others', in proportion: of half the weight, they have twice theirs."""
    scores, group = data(rewards=3)
    mask = torch.rand(18, 3) < 0.9
    applies = torch.rand(18, 3, 3) < 0.7
    applies[..., 1] = False
    for i, options in enumerate(SPREAD[backend][::2]):
        options = dataclasses.replace(options, filter_reward=(None, 0)[i % 2])
        if options.filter_reward is None:
            options = dataclasses.replace(options, filter_in_statistics=False)
        given = {"mask": mask, "backend": backend}
        for some in (applies, torch.ones_like(applies) & torch.tensor([True, False, True])):
            out = ek.group_advantage(
                scores,
                group,
                options,
                weights=torch.tensor([0.5, 0.75, 0.25]),
                applies=some,
                **given,
            )
            without = ek.group_advantage(
                scores[..., [0, 2]],
                group,
                options,
                weights=torch.tensor([1.0, 0.5]),
                applies=some[..., [0, 2]],
                **given,
            )
            assert torch.equal(out.mask, without.mask)
            assert torch.equal(bits(out.advantage), bits(without.advantage)), options


@pytest.mark.parametrize(
    "weights, alone",
    [([0.25, 0.75], 1.0), ([-0.25, 0.75], -1.0), ([-0.5, 0.5], -1.0), ([1.0, 0.0], 1.0)],
)
@pytest.mark.parametrize("fusion", ["reward", "advantage"])
def test_weights_of_what_applies_keep_the_size_of_all(backend, weights, alone, fusion):
    """And their signs. The second reward applies to the last two samples alone."""
    scores, group = data(n=8, turns=1, groups=1)
    applies = torch.ones(8, 1, 2, dtype=torch.bool)
    applies[:6, :, 1] = False
    options = ek.CreditOptions(std="none", clip=None, fusion=fusion)
    given = {"weights": torch.tensor(weights), "applies": applies, "backend": backend}
    out = ek.group_advantage(scores, group, options, **given)
    s, w = scores[:, 0].double().numpy(), np.array(weights)
    if fusion == "reward":
        fused = np.where(np.arange(8) < 6, alone * s[:, 0], s @ w)
        expected = fused - fused.mean()
    else:
        first, second = s[:, 0] - s[:, 0].mean(), s[:, 1] - s[6:, 1].mean()
        expected = np.where(np.arange(8) < 6, alone * first, w[0] * first + w[1] * second)
    close(out.advantage[:, 0], expected)
    assert out.mask.all()


@pytest.mark.parametrize("how", ["mean", "last", "product", "prefix"])
def test_aggregates_are_of_the_turns_that_apply(backend, how):
    """A rollout's value is that of a rollout of those turns; where there are none the reward leaves
    it, and what is left has all the weight."""
    scores, group = data(n=10, turns=4, groups=1)
    applies = torch.rand(10, 4, 2) < 0.6
    applies[..., 0] |= ~applies[..., 0].any(1, keepdim=True)
    applies[3, :, 1] = False
    s = scores.double().numpy()
    of = {
        "mean": np.mean,
        "last": lambda x: x[-1],
        "product": np.prod,
        "prefix": lambda x: np.cumprod(x).mean(),
    }[how]
    options = ek.CreditOptions(aggregate=how, std="none", clip=None, broadcast=True)
    out = ek.group_advantage(
        scores,
        group,
        options,
        weights=torch.tensor([0.5, 0.5]),
        applies=applies,
        backend=backend,
    )
    value = []
    for i in range(10):
        said = [of(s[i, applies[i, :, k].numpy(), k]) for k in range(2) if applies[i, :, k].any()]
        value.append(np.mean(said))
    expected = (np.array(value) - np.mean(value))[:, None].repeat(4, 1)
    judged = applies.any(2)
    assert torch.equal(out.mask, judged) and not judged.all()
    close(out.advantage, np.where(judged.numpy(), expected, 0))


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_a_turn_that_nothing_judges_does_not_train_and_is_no_failure(backend, weight):
    """Nor does one that only a reward of weight 0 judges."""
    scores, group = data()
    applies = torch.ones(18, 3, 2, dtype=torch.bool)
    silent = torch.zeros(18, 3, dtype=torch.bool)
    silent[4, 1] = silent[7, 2] = silent[9] = True
    applies[silent] = torch.tensor([False, weight == 0])
    weights = torch.tensor([0.5, weight])
    for options in SPREAD[backend][::3]:
        options = dataclasses.replace(options, min_std=None, max_mean=None)
        given = {"weights": weights, "applies": applies, "backend": backend}
        out = ek.group_advantage(scores, group, options, **given)
        assert torch.equal(out.mask, ~silent), options
        assert not out.advantage[silent].any()
        if options.aggregate == "none":  # outside of the statistics, as a failed one
            failed = ek.group_advantage(
                scores, group, options, weights=weights, mask=~silent, backend=backend
            )
            assert torch.equal(out.advantage, failed.advantage)
            assert torch.equal(out.mask, failed.mask)
        else:
            assert out.advantage[4, 0] == out.advantage[4, 2] != 0
            # A failed turn, whether a reward applies to it or not, takes its sample along.
            mask = torch.ones(18, 3, dtype=torch.bool)
            mask[4, 1] = False
            failed = ek.group_advantage(scores, group, options, mask=mask, **given)
            assert not failed.mask[4].any() and failed.mask[7, 0]


def test_a_filter_that_does_not_apply_never_filters(backend):
    scores, group = data(turns=4)
    scores[2, 1, 0] = scores[5, 0, 0] = 0
    applies = torch.ones(18, 4, 2, dtype=torch.bool)
    applies[2, 1, 0] = False
    for options in (ek.CreditOptions(filter_reward=0), ek.CREDIT_PRESETS["edit-r2-released"]):
        out = ek.group_advantage(scores, group, options, applies=applies, backend=backend)
        expected = torch.ones(18, 4, dtype=torch.bool)
        expected[5, 1:] = False
        assert torch.equal(out.mask, expected)


def test_nothing_applies(backend):
    scores, group = data()
    for options in SPREAD[backend][::9]:
        out = ek.group_advantage(
            scores * torch.nan,
            group,
            options,
            applies=torch.zeros(18, 3, 2, dtype=torch.bool),
            backend=backend,
        )
        assert not out.mask.any() and not out.advantage.any()


def test_everything_masked(backend):
    scores, group = data()
    for options in SPREAD[backend][::9]:
        out = ek.group_advantage(
            scores, group, options, mask=torch.zeros(18, 3, dtype=torch.bool), backend=backend
        )
        assert not out.mask.any() and not out.advantage.any()


def test_filter_masks_later_turns_only(backend):
    scores, group = data(turns=4)
    scores[2, 1, 0] = 0
    scores[5, 3, 0] = 0
    scores[6, 0, 1] = 0  # another reward
    mask = torch.ones(18, 4, dtype=torch.bool)
    scores[9, 0, 0], mask[9, 0] = 0, False  # not a score: filters nothing
    out = ek.group_advantage(
        scores, group, ek.CreditOptions(filter_reward=0), mask=mask, backend=backend
    )
    expected = mask.clone()
    expected[2, 2:] = False
    assert torch.equal(out.mask, expected)
    assert out.advantage[2, 1] != 0 and not out.advantage[2, 2:].any()


def test_filter_in_statistics(backend):
    scores, group = data()
    scores[0, 0, 0] = 0
    changed = scores.clone()
    changed[0, 2] = 0.123
    for inside in (False, True):
        options = ek.CreditOptions(filter_reward=0, filter_in_statistics=inside)
        a = ek.group_advantage(scores, group, options, backend=backend).advantage
        b = ek.group_advantage(changed, group, options, backend=backend).advantage
        assert torch.equal(a, b) != inside


FAR = {
    "about 25": [25.0, 25.001, 25.002, 25.003],
    "about 1e4": [1e4, 1e4 + 0.01, 1e4 + 0.02, 1e4 + 0.03],
    "about 1e7": [1e7, 1e7 + 1, 1e7 + 2, 1e7 + 5],
    "about -25": [-25.0, -25.001, -25.002, -25.003],
    "one of them far": [0.0, 0.001, 0.002, 25.0],
    "on both sides of 0": [-0.25, 0.75, 0.5, -1.0],
    "in [0, 1]": [0.1, 0.7, 0.3, 0.9],
    "small": [1e-9, 2e-9, 3e-9, 5e-9],
}


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("values", FAR.values(), ids=FAR)
def test_scores_far_from_zero_lose_nothing(backend, values, std):
    """Against float64 on the same fp32 scores, some roundings of the deviations: whatever the
    scores have in common.

    In every order, two groups of which the second lies twice as far away.
    """
    values = torch.tensor(values)
    scores = torch.stack([values, 2 * values]).view(8, 1, 1)
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    s = scores.double().view(2, 4)
    d = s - s.mean(1, keepdim=True)
    scale = {
        "group": s.std(1, correction=0, keepdim=True),
        "global": s.std(correction=0),
        "none": torch.ones(()),
    }[std]
    options = ek.CreditOptions(std=std, eps=0.0, clip=None)
    out = ek.group_advantage(scores, group, options, backend=backend).advantage
    tolerance = 4e-7 * (d / scale).abs().max().item()
    torch.testing.assert_close(out.view(2, 4).double(), d / scale, rtol=0, atol=tolerance)
    for order in ([7, 6, 5, 4, 3, 2, 1, 0], [1, 0, 4, 2, 6, 3, 7, 5]):
        permuted = ek.group_advantage(
            scores[order], group[order], options, backend=backend
        ).advantage
        assert torch.equal(bits(permuted), bits(out[order]))


def test_sums_are_zero_without_std(backend):
    scores, group = data(n=64, rewards=1)
    options = ek.CreditOptions(std="none", clip=None)
    out = ek.group_advantage(scores, group, options, backend=backend).advantage.double()
    assert (
        max(abs(out[group == g].sum()) for g in range(3)) < 1e-5
    )  # 64 roundings of 2^-25 each, times two


def test_dtypes_strides_and_empty(backend):
    scores, group = data()
    options = ek.CREDIT_PRESETS["flow-grpo"]
    out = ek.group_advantage(scores, group, options, backend=backend)
    strided = torch.stack([scores, scores], 3).permute(2, 0, 1, 3)[:, :, :, 0].permute(1, 2, 0)
    assert torch.equal(
        out.advantage, ek.group_advantage(strided, group, options, backend=backend).advantage
    )
    half = ek.group_advantage(scores.half(), group, options, backend=backend)
    assert half.advantage.dtype == torch.float32
    assert torch.equal(
        half.advantage,
        ek.group_advantage(scores.half().float(), group, options, backend=backend).advantage,
    )
    empty = ek.group_advantage(scores[:0], group[:0], options, backend=backend)
    assert empty.advantage.shape == empty.mask.shape == (0, 3)


def test_inputs_stay_as_they_were(backend):
    scores, group = data()
    given = {
        "weights": torch.tensor([0.5, 0.5]),
        "mask": torch.rand(18, 3) < 0.8,
        "applies": torch.rand(18, 3, 2) < 0.8,
    }
    inputs = (scores, group, *given.values())
    before = [t.clone() for t in inputs]
    ek.group_advantage(scores, group, OPTIONS[0], **given, backend=backend).mask.fill_(False)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))


def test_opcheck_and_compile():
    scores, group = data()
    mask = torch.ones(18, 3, dtype=torch.bool)
    fields = [
        getattr(ek.CREDIT_PRESETS["pku"], field.name)
        for field in dataclasses.fields(ek.CreditOptions)
        if field.name != "broadcast"
    ]
    for name, some in itertools.product(FAST, (None, torch.rand(18, 3, 2) < 0.7)):
        torch.library.opcheck(
            torch.ops.editr2.group_advantage,
            (scores, group, torch.ones(2), mask, some, *fields, name),
        )
    for preset in ("edit-r2", "gdpo", "pku"):
        for some in (None, torch.rand(18, 3, 2) < 0.7):
            options = ek.CREDIT_PRESETS[preset]
            function = lambda scores: ek.group_advantage(scores, group, options, applies=some)  # noqa: B023, E731
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            assert torch.equal(compiled(scores).advantage, function(scores).advantage)


@pytest.mark.parametrize(
    "error, name, change",
    [
        (TypeError, "scores", {"scores": [1.0]}),
        (TypeError, "scores", {"scores": torch.ones(18, 3, 2, dtype=torch.int64)}),
        (ValueError, "scores", {"scores": torch.ones(18, 3)}),
        (ValueError, "scores", {"scores": torch.full((18, 3, 2), torch.nan)}),
        (ValueError, "scores", {"scores": torch.full((18, 3, 2), torch.inf)}),
        (ValueError, "scores", {"scores": torch.zeros(1, 1, 1).expand(2**20, 2, 1)}),
        (TypeError, "group", {"group": torch.zeros(18)}),
        (ValueError, "group", {"group": torch.zeros(17, dtype=torch.int64)}),
        (TypeError, "options", {"options": "edit-r2"}),
        (ValueError, "options.filter_reward", {"options": ek.CreditOptions(filter_reward=2)}),
        (ValueError, "weights", {"weights": torch.ones(3)}),
        (ValueError, "mask", {"mask": torch.ones(18, 2, dtype=torch.bool)}),
        (ValueError, "mask", {"mask": torch.ones(18, 3)}),
        (ValueError, "applies", {"applies": torch.ones(18, 3, dtype=torch.bool)}),
        (ValueError, "applies", {"applies": torch.ones(18, 3, 2)}),
        (TypeError, "applies", {"applies": [True]}),
        (ValueError, "backend", {"backend": "numpy"}),
    ],
)
def test_errors_name_the_argument(error, name, change):
    scores, group = data()
    arguments = {"scores": scores, "group": group, "options": OPTIONS[0], **change}
    with pytest.raises(error, match=f"^{name}"):
        ek.group_advantage(**arguments)


@pytest.mark.parametrize(
    "name, change",
    [
        ("aggregate", {"aggregate": "sum"}),
        ("fusion", {"fusion": "sum"}),
        ("baseline", {"baseline": "turn"}),
        ("baseline", {"aggregate": "mean", "broadcast": True, "baseline": "session_turn"}),
        ("std", {"std": "batch"}),
        ("eps", {"eps": -1.0}),
        ("eps_mode", {"eps_mode": "max"}),
        ("min_std", {"min_std": -0.1}),
        ("min_std", {"min_std": math.inf}),
        ("max_mean", {"max_mean": math.nan}),
        ("clip", {"clip": 0.0}),
        ("broadcast", {"aggregate": "mean"}),
        ("broadcast", {"broadcast": True}),
        ("filter_reward", {"filter_reward": -1}),
        (
            "filter_in_statistics",
            {"aggregate": "mean", "broadcast": True, "filter_in_statistics": True},
        ),
    ],
)
def test_option_errors_name_the_field(name, change):
    with pytest.raises(ValueError, match=f"^{name}"):
        ek.CreditOptions(**change)


@pytest.mark.parametrize("name", ["eps", "clip", "min_std", "max_mean"])
@pytest.mark.parametrize("value", ["1", torch.tensor(1.0), True])
def test_an_option_that_is_no_number(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a number"):
        ek.CreditOptions(**{name: value})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_must_be_finite(backend, bad):
    scores, group = data()
    with pytest.raises(ValueError, match="^weights"):
        ek.group_advantage(
            scores, group, OPTIONS[0], weights=torch.tensor([0.5, bad]), backend=backend
        )
