"""What must hold of the methods whatever the policy: ratios, filters, zero gradients, NFT at its
start, credit."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from editr2.config import Config, CreditConfig, preset_config, replace_nested
from editr2.errors import ConfigError
from editr2.policies.base import Velocity
from editr2.policies.unified.guidance import Guidance
from editr2.policies.weights import add_lora, exchanged, merged_weights, mix, snapshot, trainable
from editr2.rewards.base import Score, Scores, lay_out
from editr2.rewards.world import WorldReward
from editr2.rl import gradient as gradient_module
from editr2.rl.credit import assign_credit, credit_notes, credit_options, weighted_reward
from editr2.rl.gradient import Batch, accumulate_gradient
from editr2.rl.judging import judge
from editr2.rl.losses import LOSSES, Asked, noised, stored
from editr2.rl.rollout import Chunk, Seeds, Walk, rollout_chunk
from editr2.rl.sampler import make_sampler, rollout_sampler
from editr2.rl.sentinel import RatioError
from editr2.rl.state import new_state
from editr2.run.processes import Processes
from editr2.sessions import Session, Turn
from editr2.worlds.shapes import make_session
from editr2_kernels import nft_loss, nft_optimality

HERE = Processes(Accelerator(cpu=True))


def settings(**changes) -> Config:
    base = {
        "policy": {"intent_tokens": 5},
        "rollout": {"sessions": 2, "siblings": 3},
        "train": {"ema": None, "packed": "off"},
    }
    return replace_nested(replace_nested(Config(), base), changes)


def sampled(policy, config, turns=(3, 3)):
    """One chunk of rollouts with random advantages: (batch, state)."""
    sampler, seeds = rollout_sampler(config.rollout), Seeds(0, "train")
    sessions = [make_session(0, i, turns=n) for i, n in enumerate(turns)]
    chunk = Chunk(sessions, list(range(len(sessions))), config.rollout.siblings)
    rollout_chunk(
        policy,
        chunk,
        sampler,
        seeds,
        config.policy,
        rollout=config.rollout,
        keep_velocity=config.train.guard,
    )
    shape = (chunk.rollouts, max(turns))
    mask = torch.zeros(shape, dtype=torch.bool)
    for turn, record in enumerate(chunk.turns):
        mask[record.rollout, turn] = True
    advantage = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    batch = Batch(
        [chunk], advantage, mask, int(mask.sum()), sampler, seeds, config.policy, config.rollout
    )
    return batch, new_state(config.train, policy)


def asked(batch, update):
    """What a loss sees of the first chunk."""
    credit = batch.credit_of(0)
    return Asked(batch.chunks[0], *credit, batch.sampler, batch.seeds, update)


def gradient(config, state, batch, update=0):
    """(flat gradient, statistics); the policy's gradients are empty before and after."""
    state.optimizer.zero_grad()
    seen = accumulate_gradient(config.train, state, batch, update, 0, HERE)
    grads = [
        torch.zeros_like(p) if p.grad is None else p.grad
        for p in trainable(state.policy.module).values()
    ]
    flat = torch.cat([g.flatten() for g in grads]).clone()
    state.optimizer.zero_grad()
    return flat, seen


def again(batch, **changes):
    """The same rollout before any update was made of it."""
    return dataclasses.replace(batch, old={}, old_text={}, **changes)


# --------------------------------------------------------------------------------- on-policy ratios


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"micro_batch": 5},
        {"packed": "on"},
        {"packed": "on", "context_gradient": True},
        {"context_gradient": True},
        {"guard": True},
        {"kl_weight": 0.1},
    ],
    ids=str,
)
def test_the_first_update_finds_ratios_of_one_for_images_and_intents_at_every_turn(
    tiny_unified, train
):
    config = settings(train=train)
    batch, state = sampled(tiny_unified, config, turns=(3, 2))
    flat, seen = gradient(config, state, batch)
    assert (
        seen["ratio_error"] <= 1e-6
        and seen["text_error"] <= 2e-5
        and seen["clipped"] == seen["text_clipped"] == 0
    )
    assert flat.abs().max() > 0
    assert {turn for _, turn, _ in batch.old_text} == {1, 2}
    # The ratio is 1 because both sides were computed, not because one was copied: other weights are
    # told apart.
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), alpha=3e-2)
    moved = again(batch)
    state.iteration = 1  # past the sentinel, which would stop here
    _, seen = gradient(config, state, moved)
    assert seen["ratio_error"] > 1e-4 and seen["text_error"] > 1e-4


@pytest.mark.parametrize("renorm", ["none", "text_channel", "global"])
def test_ratios_of_one_under_guidance(tiny_unified, renorm):
    tiny_unified.guidance = Guidance(3.0, 2.0, renorm)
    config = settings(train={"kl_weight": 0.1})
    batch, state = sampled(tiny_unified, config)
    _, seen = gradient(config, state, batch)
    assert seen["ratio_error"] <= 1e-6 and seen["kl"] <= 1e-10


def test_ratios_of_one_in_bf16_storage_because_samples_are_rounded_before_they_are_scored(
    tiny_unified,
):
    config = settings(rollout={"store_dtype": "bfloat16"}, train={"guard": True})
    batch, state = sampled(tiny_unified, config)
    record = batch.chunks[0].turns[0]
    assert record.x.dtype == record.x_next.dtype == record.velocity.dtype == torch.bfloat16
    _, seen = gradient(config, state, batch)
    assert seen["ratio_error"] <= 1e-5  # guard's bias term sees the rounded velocity


def test_all_ways_to_replay_give_one_gradient(tiny_unified):
    base = settings(train={"kl_weight": 0.05})
    batch, state = sampled(tiny_unified, base, turns=(3, 2))
    expected, _ = gradient(base, state, batch)
    for train in ({"micro_batch": 7}, {"micro_batch": 1000}, {"packed": "on"}):
        config = replace_nested(base, {"train": train})
        got, _ = gradient(config, state, again(batch))
        torch.testing.assert_close(
            got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )
    through, _ = gradient(
        replace_nested(base, {"train": {"context_gradient": True}}), state, again(batch)
    )
    packed = replace_nested(base, {"train": {"context_gradient": True, "packed": "on"}})
    got, _ = gradient(packed, state, again(batch))
    torch.testing.assert_close(got, through, rtol=1e-3, atol=1e-4 * float(through.abs().max()))
    assert (through - expected).norm() > 0.01 * expected.norm()  # the flag does something


# ------------------------------------------------------------------------------------ filter, masks


@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_filtered_turn_adds_exactly_nothing_whatever_it_holds(tiny_unified, packed):
    config = settings(train={"packed": packed, "old_log_prob": "rollout"})
    batch, state = sampled(tiny_unified, config)
    mask = batch.mask.clone()
    mask[1, 1:] = False  # rollout 1 failed its first instruction
    batch = again(batch, mask=mask)
    expected, _ = gradient(config, state, batch)
    record = batch.chunks[0].turns[1]
    at = int((record.rollout == 1).nonzero()[0, 0])
    record.x_next[at] = torch.nan
    record.log_prob[at] = torch.inf
    other = again(batch, advantage=batch.advantage.clone())
    other.advantage[1, 1:] = 1e6
    got, seen = gradient(config, state, other)
    assert torch.equal(got, expected) and expected.abs().max() > 0
    nothing, _ = gradient(config, state, again(batch, mask=torch.zeros_like(mask)))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_equal_scores_give_exactly_zero_advantage_and_gradient(tiny_unified):
    config = settings()
    batch, state = sampled(tiny_unified, config)
    scores = scores_of(torch.full((6, 3, 3), 0.37))
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    for preset in ("edit-r2", "mt-editflow", "flow-grpo", "dr-grpo", "gdpo"):
        credit = assign_credit(scores, group, CreditConfig(preset=preset, baseline=None))
        assert torch.equal(credit.advantage, torch.zeros(6, 3))
    flat, _ = gradient(config, state, again(batch, advantage=credit.advantage))
    assert torch.equal(flat, torch.zeros_like(flat))


def test_turns_without_advantage_are_not_replayed_and_the_gradient_is_the_same(
    tiny_unified, monkeypatch
):
    config = settings()
    batch, state = sampled(tiny_unified, config, turns=(3, 2))
    advantage = batch.advantage.clone()
    advantage[:3] = 0  # a group whose siblings all scored alike
    advantage[4, 1] = 0
    batch = again(batch, advantage=advantage)
    asked, velocity = [], type(tiny_unified).velocity

    def counting(self, x, sigma, context):
        asked.append(len(x))
        return velocity(self, x, sigma, context)

    monkeypatch.setattr(type(tiny_unified), "velocity", counting)
    got, _ = gradient(config, state, again(batch))
    assert sum(asked) == 2 * int((batch.mask & (advantage != 0)).sum()) == 2 * 5
    asked.clear()
    real = gradient_module.replay
    monkeypatch.setattr(gradient_module, "replay", lambda *args: real(*args[:-1], batch.mask))
    everything, _ = gradient(config, state, again(batch))
    assert sum(asked) == 2 * int(batch.mask.sum()) > 20
    torch.testing.assert_close(
        got, everything, rtol=1e-4, atol=1e-6 * float(everything.abs().max())
    )


def scores_of(values, expected=None):
    present = torch.ones(values.shape[:2], dtype=torch.bool) if expected is None else expected
    return Scores(("IF", "CC", "GA"), values, present, present, {})


@pytest.mark.parametrize(
    "preset", ["edit-r2", "edit-r2-released", "mt-editflow", "gdpo", "dr-grpo"]
)
def test_permuting_siblings_permutes_advantages_bitwise(preset):
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 5, (12, 3, 3), generator=generator) / 4
    group = torch.arange(2).repeat_interleave(6)
    order = torch.cat(
        [torch.randperm(6, generator=generator), 6 + torch.randperm(6, generator=generator)]
    )
    config = CreditConfig(preset=preset, baseline=None)
    one, two = (
        assign_credit(scores_of(values), group, config),
        assign_credit(scores_of(values[order]), group, config),
    )
    assert torch.equal(one.advantage[order], two.advantage) and torch.equal(
        one.mask[order], two.mask
    )
    if preset == "dr-grpo":  # centred and not divided: GCPO's form
        sums = one.advantage.view(2, 6, 3).double().sum(1)
        assert sums.abs().max() < 1e-5


def test_credit_over_trajectories_of_different_lengths(tiny_unified):
    """A session of two turns is normalised with its siblings over its two turns; the missing third
    counts nowhere."""
    generator = torch.Generator().manual_seed(4)
    values = torch.rand(8, 3, 3, generator=generator)
    expected = torch.ones(8, 3, dtype=torch.bool)
    expected[4:, 2] = False
    group = torch.arange(2).repeat_interleave(4)
    config = CreditConfig(preset="mt-editflow", baseline=None)
    credit = assign_credit(scores_of(values, expected), group, config)
    alone = assign_credit(scores_of(values[4:, :2]), group[:4], config)
    assert (
        torch.equal(credit.advantage[4:, :2], alone.advantage) and (credit.advantage[:4] != 0).any()
    )
    assert not credit.mask[4:, 2].any() and credit.mask[4:, :2].all()


def mixed_scores(rows):
    """Of sessions of their own lengths and the rewards IF, CC and GA: a number, "-" for one that
    does not apply, "f" for one that failed."""
    words = {"-": Score.not_applicable(), "f": Score(None, "down")}
    names = ("IF", "CC", "GA")
    said = [
        [{n: words.get(v) or Score(v) for n, v in zip(names, turn)} for turn in row] for row in rows
    ]
    image = np.zeros((24, 24, 3), np.uint8)
    sessions = [
        Session(f"s{i}", image, tuple(Turn("paint") for _ in row)) for i, row in enumerate(rows)
    ]
    return lay_out(names, sessions, said, max(map(len, rows)))


def test_the_reward_of_a_turn_is_of_what_applies_to_it():
    """Its weights grow in proportion; a failed score takes the turn, whatever else applies."""
    rows = [
        [(1, 0.5, 0.25), (1, "-", 0.25), ("-", "-", 0.25)],
        [("-", "-", "-"), ("f", "-", 1), (1, 1, 1)],
    ]
    scores = mixed_scores(rows)
    assert scores.present.tolist() == [[True, True, True], [False, False, True]]
    assert scores.unfailed.tolist() == [[True, True, True], [True, False, True]]
    assert (scores.failed, scores.not_applicable) == (1, 3)
    reward = weighted_reward(scores, {"IF": 0.3, "CC": 0.3, "GA": 0.4})
    nan = float("nan")
    expected = torch.tensor([[0.55, 0.4 / 0.7, 0.25], [nan, nan, 1.0]])
    torch.testing.assert_close(reward, expected, equal_nan=True)
    # GA is only looked at: where nothing else applies there is no reward.
    reward = weighted_reward(scores, {"IF": 0.5, "CC": 0.5, "GA": 0.0})
    expected = torch.tensor([[0.75, 1.0, nan], [nan, nan, 1.0]])
    torch.testing.assert_close(reward, expected, equal_nan=True)
    values = torch.rand(64, 3, 3)
    weights = torch.tensor([0.3, 0.3, 0.4])
    whole = weighted_reward(scores_of(values), CreditConfig().weights)
    assert torch.equal(whole, (values * weights).sum(-1))


def test_credit_is_told_what_applies():
    """Over whole trajectories of two lengths: a turn that nothing judges takes nothing along, a
    failed one its rollout; a reward that is nowhere leaves the numbers of the others."""
    config = CreditConfig(
        preset="mt-editflow", baseline=None, weights={"IF": 0.5, "CC": 0.5, "GA": 1}
    )
    rows = [
        [(0.2, 0.9, "-"), ("-", "-", "-")],
        [(0.8, "-", "-"), (0.4, 0.7, "-")],
        [(0.5, 0.1, "-"), ("-", "f", "-")],
        [(0.3, 0.3, "-"), (0.6, 0.2, "-")],
        [(0.1, 0.2, "-")],
        [(0.7, "-", "-")],
    ]
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    credit = assign_credit(mixed_scores(rows), group, config)
    trains = [[1, 0], [1, 1], [0, 0], [1, 1], [1, 0], [1, 0]]
    assert credit.mask.int().tolist() == trains and not credit.advantage[~credit.mask].any()
    # IF and CC of the rollouts, by hand; each has half the weight of all three, twice over.
    first, second = np.array([0.2, 0.6, 0.45]), np.array([0.9, 0.7, 0.25])
    a, b = ((x - x.mean()) / (x.std() + 1e-4) for x in (first, second))
    np.testing.assert_allclose(credit.advantage[[0, 1, 3], 0], a + b, atol=1e-5)
    single = (np.array([0.1, 0.7]) - 0.4) / (0.3 + 1e-4)  # CC has one rollout to compare
    np.testing.assert_allclose(credit.advantage[4:, 0], single * [1, 2], atol=1e-5)


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"aggregate": "median"}, "credit.aggregate"),
        ({"fusion": "sum"}, "credit.fusion"),
        ({"std": "none"}, "credit.std"),
        ({"baseline": "turn"}, "credit.baseline"),
    ],
)
def test_a_bad_credit_setting_is_named(changes, field):
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        credit_options(CreditConfig(**changes))


def test_the_filter_needs_a_reward_named_if():
    with pytest.raises(ConfigError, match=r"credit\.filter: true needs a reward named IF"):
        credit_options(CreditConfig(preset="edit-r2", filter=True), ("bright",))
    assert (
        credit_options(CreditConfig(preset="edit-r2"), ("bright",)).filter_reward is None
    )  # off, and said
    (note,) = credit_notes(CreditConfig(preset="edit-r2"), ("bright",))
    assert "no reward is named IF (the rewards: bright)" in note
    assert not credit_notes(CreditConfig(preset="edit-r2"), ("CC", "IF"))
    assert not credit_notes(CreditConfig(preset="flow-grpo"), ("bright",))
    assert not credit_notes(CreditConfig(preset="edit-r2", filter=False), ("bright",))
    assert (
        credit_options(CreditConfig(preset="edit-r2", filter=False), ("bright",)).filter_reward
        is None
    )
    assert credit_options(CreditConfig(preset="edit-r2"), ("CC", "IF")).filter_reward == 1


def test_global_awareness_is_monotone_over_turns_under_an_exact_judge():
    """The shipped start on sessions of four turns: once wrong, wrong for good."""
    from editr2.policies.unified.policy import UnifiedPolicy

    policy = UnifiedPolicy.load()
    sessions = [make_session(7, i, turns=4) for i in range(12)]
    chunk = Chunk(sessions, list(range(12)), 1)
    rollout_chunk(policy, chunk, make_sampler(4), Seeds(0, "eval"), Config().policy, greedy=True)
    ga = judge(WorldReward(), [chunk], 4).values[..., 2]
    assert (ga[:, 1:] <= ga[:, :-1]).all() and 0 < ga.mean() < 1


# ---------------------------------------------------------------------------------------------- NFT


def nft(**train) -> Config:
    return settings(
        policy={"intent": False},
        rollout={"window": 0, "shared_noise": False},
        train={"loss": "nft", "kl_weight": 1e-4, **train},
    )


def test_nft_starts_with_equal_halves_and_learns_towards_the_better_sibling(tiny_unified):
    config = nft()
    batch, state = sampled(tiny_unified, config)
    places, rows = noised(asked(batch, 0), 2)
    v = torch.randn(rows.x.shape)
    args = (rows.x_next, rows.noise, rows.sigma, v, v.clone(), nft_optimality(rows.advantage))
    halves = nft_loss(*args, beta=1.0).metrics
    assert torch.equal(halves.positive, halves.negative)  # at v = v_old both are v_old itself
    assert torch.allclose(rows.x, torch.lerp(rows.x_next, rows.noise, rows.sigma[:, None, None]))
    assert (
        places.sigma[0][:, 0] > places.sigma[0][:, 1]
    ).all()  # one noise level from each half of the steps
    flat, _ = gradient(config, state, batch)
    zero, _ = gradient(config, state, again(batch, advantage=torch.zeros_like(batch.advantage)))
    assert zero.norm() < 1e-4 * flat.norm()  # r = 1/2 on both halves: they cancel at v = v_old


def test_nft_draws_anew_for_every_update_and_the_old_policy_follows(tiny_unified):
    config = nft(updates=2)
    batch, state = sampled(tiny_unified, config)
    one, _ = noised(asked(batch, 0), 2)
    two, _ = noised(asked(batch, 1), 2)
    assert not torch.equal(one.x[0], two.x[0])
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.add_(1.0)
    name = "llm2vae.bias"
    before = state.old[name].clone()
    state.iteration = 200  # keeps min(0.001 * 200, 0.5)
    state.step_copies(config.train, iteration_done=True)
    live = trainable(tiny_unified.module)[name]
    torch.testing.assert_close(state.old[name], 0.2 * before + 0.8 * live.detach())


# --------------------------------------------------------------------------- windows, shared prefix


class Counting:
    """A policy whose velocity is cheap and counts the samples it is asked about."""

    writes_text, latent_shape, image_size = False, (4, 3), (24, 24)

    def __init__(self):
        self.module = torch.nn.Linear(1, 1)
        self.asked = []

    def encode(self, images):
        return torch.arange(len(images)).float()

    def instruct(self, context, instructions):
        return context + sum(len(c) for c in instructions) * 0

    def velocity(self, x, sigma, context):
        self.asked.append(len(x))
        return Velocity(x * 0.3 + sigma[:, None, None] + context[:, None, None])

    def append(self, context, images):
        return context

    def select(self, context, index):
        return context[index]

    def join(self, contexts):
        return torch.cat(contexts)

    def decode(self, latents):
        return latents.new_zeros(len(latents), 24, 24, 3).byte().numpy()


@pytest.mark.parametrize("schedule", ["random", "released"])
def test_the_first_turn_is_denoised_once_a_group_until_its_window_opens(schedule):
    window = {"window": 2, "window_range": 0.75, "window_schedule": schedule}
    config = replace_nested(Config(), {"rollout": {"steps": 8, **window}})
    sampler, sessions = (
        rollout_sampler(config.rollout),
        [make_session(0, i, turns=2) for i in range(3)],
    )
    runs = []
    for siblings in (1, 4):
        policy, chunk = Counting(), Chunk(sessions, [0, 1, 2], siblings)
        rollout_chunk(
            policy, chunk, sampler, Seeds(0, "train"), config.policy, rollout=config.rollout
        )
        runs.append((policy, chunk))
    (_, alone), (policy, group) = runs
    seeds, choices = Seeds(0, "train"), sampler.last_start + 1
    drawn = seeds.start if schedule == "random" else seeds.rank_start
    starts = drawn(group, torch.arange(12), 0, choices).view(3, 4)
    # All siblings whose windows are open, and one that stands for the others.
    expected = [int(((starts <= k).sum(1) + (starts > k).any(1)).sum()) for k in range(8)]
    assert torch.equal(group.turns[0].step_index[:, 0] % 8, starts.flatten())
    assert (starts.amin(1) == starts.amax(1)).all() == (schedule == "random")
    assert policy.asked[:8] == expected and policy.asked[8:] == [12] * 8 and min(expected) < 12
    # The first sibling of a group is what it would be alone, bit for bit.
    for name in ("x", "x_next", "log_prob", "step_index", "x0"):
        for one, all_ in zip(alone.turns, group.turns, strict=True):
            assert torch.equal(getattr(one, name), getattr(all_, name)[::4]), name
    first = group.turns[0]
    for i in range(4):  # at one start siblings have one latent, and noise of their own behind it
        for j in range(i):
            same = bool(starts[0, i] == starts[0, j])
            assert torch.equal(first.x[i, 0], first.x[j, 0]) == same
            assert not torch.equal(first.x_next[i, 0], first.x_next[j, 0])


def test_windows_random_fixed_and_progressive():
    base = replace_nested(
        Config(), {"rollout": {"steps": 6, "window": 2, "window_range": 1.0, "window_every": 3}}
    )

    def at(schedule, iteration):
        rollout = dataclasses.replace(base.rollout, window_schedule=schedule, dynamics="flow-sde")
        sampler = rollout_sampler(rollout).at(iteration)
        return sampler.first_start, sampler.last_start

    assert [at("progressive", i)[0] for i in (0, 2, 3, 6, 12, 15)] == [0, 0, 1, 2, 4, 0]
    assert all(len(set(at("progressive", i))) == 1 for i in range(5))
    assert at("random", 7) == (0, 4) and at("fixed", 7) == (0, 0)


def test_released_windows_start_as_the_releases_processes_do():
    """random.seed(rank) and randint(0, 5) of ranks 0 to 23, as its rollout has them before every
    image: of 600 rollouts these starts, this often, in every turn the same."""
    of_ranks = [3, 1, 0, 1, 1, 4, 4, 2, 1, 3, 4, 3, 3, 2, 0, 1, 2, 4, 1, 5, 5, 1, 1, 2]
    group = Chunk([make_session(0, i, turns=2) for i in range(100)], list(range(100)), 6)
    seeds, everyone = Seeds(0, "train"), torch.arange(600)
    starts = seeds.rank_start(group, everyone, 0, 6)
    assert torch.equal(seeds.rank_start(group, everyone, 1, 6), starts)
    drawn = torch.stack([seeds.start(group, everyone, turn, 6) for turn in range(2)])
    assert not torch.equal(drawn[0], drawn[1])
    for start in range(6):
        # At least 3.5 standard deviations of a binomial.
        assert abs(int((starts == start).sum()) - 25 * of_ranks.count(start)) < 40
        assert abs(int((drawn == start).sum()) / 6 - 200 / 6) < 20


# ------------------------------------------------------------------------------- reference and LoRA


def test_lora_trains_adapters_alone_and_its_reference_is_the_base_model(tiny_unified):
    config = settings(train={"kl_weight": 0.1})
    base = {k: v.clone() for k, v in tiny_unified.module.state_dict().items()}
    batch, _ = sampled(tiny_unified, config)
    chunk = batch.chunks[0]
    add_lora(tiny_unified.module, 4)
    state = new_state(config.train, tiny_unified)
    names = set(trainable(tiny_unified.module))
    assert names and all(".lora_" in n for n in names) and set(state.reference) == names
    _, seen = gradient(config, state, again(batch))
    assert seen["ratio_error"] <= 1e-6 and seen["kl"] == 0  # B starts at zero: nothing has changed
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)), alpha=0.05)
    state.iteration = 1
    _, seen = gradient(config, state, again(batch))
    assert seen["kl"] > 0
    walked, _ = stored(asked(batch, 0))
    context = tiny_unified.instruct(
        tiny_unified.encode(chunk.sessions[0].image[None]), chunk.turns[0].text[:1]
    )
    x, sigma = walked.x[0][:1, 0], walked.sigma[0][:1, 0]
    adapted = tiny_unified.velocity(x, sigma, context).v
    merged = merged_weights(tiny_unified.module)
    assert set(merged) == set(base)
    with exchanged(tiny_unified.module, state.reference):
        plain_context = tiny_unified.instruct(
            tiny_unified.encode(chunk.sessions[0].image[None]), chunk.turns[0].text[:1]
        )
        plain = tiny_unified.velocity(x, sigma, plain_context).v
    from editr2.policies.unified.model import UnifiedModel
    from editr2.policies.unified.policy import UnifiedPolicy

    for weights, expected in ((base, plain), (merged, adapted)):
        model = UnifiedModel(tiny_unified.module.config)
        model.load_state_dict(weights)
        other = UnifiedPolicy(model, tiny_unified.codec)
        there = other.instruct(other.encode(chunk.sessions[0].image[None]), chunk.turns[0].text[:1])
        torch.testing.assert_close(
            other.velocity(x, sigma, there).v, expected, rtol=1e-4, atol=1e-5
        )


def test_exchanged_weights_leave_a_graph_and_the_weights_as_they_were():
    module = torch.nn.Linear(3, 3)
    values = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    x = torch.randn(2, 3)
    out = module(module(x)).sum()
    expected = torch.autograd.grad(module(module(x)).sum(), module.weight)[0]
    before = snapshot(module)
    with exchanged(module, values):
        assert module(x).abs().max() == 0
        mix(values, SimpleNamespace(named_parameters=lambda: []), 0.5)
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())
    assert torch.equal(torch.autograd.grad(out, module.weight)[0], expected)


# ------------------------------------------------------------------------------------------ presets


@pytest.mark.parametrize(
    "preset", ["edit-r2", "edit-r2-released", "mt-editflow-nft", "mixgrpo", "grpo-guard", "pku"]
)
def test_a_preset_gives_the_same_bits_twice(preset, tmp_path, beside):
    """Those that differ in mechanism; `python tests/presets_twice.py 20` runs all of them for
    longer."""
    different, moved = beside("presets_twice").differing(preset, tmp_path, 2)
    assert different == [] and moved


def test_the_loss_by_hand(tiny_unified):
    """On-policy every ratio is 1, so the loss is minus the mean advantage: per trained turn over
    its two steps, and the text beside it by lambda over the steps."""
    for weight in (None, 1.0, 0.25):
        config = settings(train={"text_weight": weight})
        batch, state = sampled(tiny_unified, config)
        mask = batch.mask.clone()
        mask[2, 1:] = False
        batch = again(batch, mask=mask, trained=int(mask.sum()))
        _, seen = gradient(config, state, batch)
        a, n = torch.where(mask, batch.advantage, 0.0), int(mask.sum())
        assert seen["loss"] == pytest.approx(-float(a.sum()) / n, rel=1e-5)
        text = (0.5 if weight is None else weight) * -float(a[:, 1:].sum()) / (n * 2)
        assert seen["text_loss"] == pytest.approx(text, rel=1e-5)
        assert seen["samples"] == 2 * n and seen["tokens"] > 0


@pytest.mark.parametrize("loss", ["grpo", "nft"])
@pytest.mark.parametrize("packed", ["off", "on"])
def test_a_second_update_measures_against_what_sampled(tiny_unified, loss, packed):
    """Sessions of different lengths and intents: the old log-probs of every answer are its own,
    walked or packed."""
    if loss == "nft":
        config = replace_nested(nft(packed=packed, updates=2), {"policy": {"intent": True}})
    else:
        config = settings(
            train={
                "packed": packed,
                "updates": 2,
                "clip_low": 0.5,
                "clip_high": 0.5,
                "text_clip": 0.5,
            }
        )
    batch, state = sampled(tiny_unified, config, turns=(3, 2))
    gradient(config, state, batch)
    generator = torch.Generator().manual_seed(6)
    start = snapshot(tiny_unified.module)
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=1e-2)
    flat, seen = gradient(config, state, batch, update=1)
    reference = dict.fromkeys(("text_loss", "text_clipped"), 0.0)
    chunk = batch.chunks[0]
    total, q = int(batch.mask.sum()), 2
    for turn in (1, 2):
        record = chunk.turns[turn]
        asking = again_context(tiny_unified, chunk, turn)
        written = record.written["intent"]
        ids = [i.ids for i in written.samples]
        new = tiny_unified.answer_log_prob(asking, written.questions, ids, temperature=0.7)
        with exchanged(tiny_unified.module, start), torch.no_grad():
            before = again_context(tiny_unified, chunk, turn)
            old = tiny_unified.answer_log_prob(before, written.questions, ids, temperature=0.7)
        ratio = (new.log_prob - old.log_prob).exp()
        a = batch.advantage[record.rollout, turn][:, None]
        token = torch.maximum(
            -a * ratio, -a * ratio.clamp(1 - config.train.text_clip, 1 + config.train.text_clip)
        )
        sample = torch.where(new.valid, token, 0.0).sum(1) / new.valid.sum(1)
        reference["text_loss"] += float(0.5 * sample.detach().sum() / (total * q))
    assert seen["text_loss"] == pytest.approx(reference["text_loss"], rel=1e-3)
    assert flat.abs().max() > 0


@torch.no_grad()
def again_context(policy, chunk, turn):
    """The context on which the intents of a turn were asked."""
    walk = Walk(policy, chunk)
    for t in range(turn):
        if t:
            walk.advance(t, chunk.turns[t - 1].images)
        walk.instruct(chunk.turns[t].text)
    walk.advance(turn, chunk.turns[turn - 1].images)
    return walk.context


def test_minibatches_are_part_of_one_mean_and_the_sentinel_sees_all_of_them(
    tiny_unified, monkeypatch
):
    base = settings(rollout={"groups_per_batch": 1})
    one, state = sampled(tiny_unified, base, turns=(2,))
    two, _ = sampled(tiny_unified, base, turns=(3,))
    mask = torch.zeros(6, 3, dtype=torch.bool)
    mask[:3, :2], mask[3:] = one.mask, two.mask
    advantage = torch.zeros(6, 3)
    advantage[:3, :2], advantage[3:] = one.advantage, two.advantage
    chunks = [one.chunks[0], two.chunks[0]]
    batch = dataclasses.replace(
        one, chunks=chunks, advantage=advantage, mask=mask, trained=int(mask.sum())
    )
    whole, _ = gradient(base, state, batch)
    halves = replace_nested(base, {"train": {"minibatches": 2, "old_log_prob": "replay"}})
    parts, batch = [], again(batch)
    for minibatch in range(2):
        state.optimizer.zero_grad()
        accumulate_gradient(halves.train, state, batch, 0, minibatch, HERE)
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad
            for p in trainable(tiny_unified.module).values()
        ]
        parts.append(torch.cat([g.flatten() for g in grads]).clone())
    torch.testing.assert_close(
        (parts[0] + parts[1]) / 2, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max())
    )
    assert set(batch.old) == {0, 1}
    chunks[1].turns[1].log_prob[0] += (
        1e-2  # as if the rollout of the second minibatch had come from other code
    )
    with pytest.raises(RatioError, match="ratio: differs from 1 by 0.0"):
        gradient(halves, state, again(batch))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "nft"])
def test_intents_of_later_minibatches_are_compared_with_the_policy_that_wrote_them(
    tiny_unified, loss
):
    """Nft has an old policy, which says it by its weights."""
    train = {"loss": loss, "minibatches": 2}
    config = settings(rollout={"groups_per_batch": 1}, train=train)
    one, state = sampled(tiny_unified, config, turns=(2,))
    two, _ = sampled(tiny_unified, config, turns=(2,))
    advantage = torch.tensor([1.0, -1.0, 0.0] * 2)[:, None].expand(6, 2).contiguous()
    batch = dataclasses.replace(
        one,
        chunks=[one.chunks[0], two.chunks[0]],
        advantage=advantage,
        mask=advantage != 0,
        trained=8,
    )
    accumulate_gradient(config.train, state, batch, 0, 0, HERE)
    known = {key: old.clone() for key, old in batch.old_text.items()}
    assert {number for number, *_ in known} == {0, 1}
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.mul_(1.1)  # an optimiser step
    accumulate_gradient(config.train, state, batch, 0, 1, HERE)
    for key, old in known.items():
        assert torch.equal(batch.old_text[key], old)


def test_released_constants():
    config = preset_config("edit-r2-released")
    r, t, p = config.rollout, config.train, config.policy
    assert (r.sessions, r.siblings, r.turns, r.steps, r.shift, r.noise_level) == (
        16,
        6,
        3,
        14,
        3.0,
        1.3,
    )
    assert (p.guidance, p.guidance_image, p.renorm, p.temperature, p.intent_tokens) == (
        4,
        2,
        "text_channel",
        0.7,
        150,
    )
    assert (p.lora_rank, p.lora_alpha, t.lr, t.minibatches, t.kl_weight) == (64, 128, 1e-4, 2, 0.01)
    assert r.sessions % (t.minibatches * r.groups_per_batch) == 0  # two equal optimiser steps
    assert (t.clip_low, t.text_clip, t.text_weight, config.eval.steps) == (1e-5, 1e-5, 1.0, 49)
    assert (t.betas, t.weight_decay, t.kl_scale) == ((0.9, 0.999), 1e-4, "diffusion")
    sampler = rollout_sampler(r)
    assert (sampler.window, sampler.first_start, sampler.last_start) == (2, 0, 5)
    options = credit_options(config.credit)
    assert (
        options.filter_in_statistics and options.baseline == "session" and options.std == "global"
    )


def test_a_checkpoint_holds_every_copy_of_the_weights(tiny_unified, tmp_path):
    config = nft(ema=0.5, kl_weight=1e-4)
    add_lora(tiny_unified.module, 4)
    state = new_state(config.train, tiny_unified)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for values in (state.reference, state.old, state.ema, trainable(tiny_unified.module)):
            for value in values.values():
                value.copy_(torch.randn(value.shape, generator=generator))
    state.iteration = 3
    expected = {k: {n: v.clone() for n, v in c.items()} for k, c in state._copies().items()}
    live = snapshot(tiny_unified.module)
    state.save(tmp_path, config)
    (saved,) = tmp_path.glob("step_*")
    files = {f.stem for f in saved.glob("*.safetensors")}
    assert {"policy", "reference", "old", "ema"} <= files
    with torch.no_grad():
        for p in trainable(tiny_unified.module).values():
            p.zero_()
    other = new_state(config.train, tiny_unified)
    other.load(saved, config)
    assert other.iteration == 3
    assert all(torch.equal(live[n], p) for n, p in trainable(tiny_unified.module).items())
    for kind, copies in other._copies().items():
        assert all(torch.equal(expected[kind][n], v) for n, v in copies.items())
