"""The unified policy: one model, read turn by turn or packed, alone or in a batch."""

import dataclasses

import numpy as np
import pytest
import torch

from editr2.errors import CheckpointError, ConfigError, DataError
from editr2.policies.base import Questions
from editr2.policies.unified.codecs import patchify, unpatchify
from editr2.policies.unified.guidance import Guidance
from editr2.policies.unified.model import Branch, Context, UnifiedConfig, UnifiedModel
from editr2.policies.unified.packed import Segment, pack, run_packed
from editr2.policies.unified.policy import (
    UnifiedPolicy,
    read_intent,
)
from editr2.policies.unified.questions import wording_of
from editr2.worlds.shapes import make_session
from editr2_kernels import flow_sigmas, guided_velocity, sde_log_prob, sde_step, transition_table

CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 matrix products batched differently, two layers deep


@pytest.fixture
def policy(tiny_unified):
    return tiny_unified


def sessions(n):
    return [make_session(0, i) for i in range(n)]


def asked(batch, turn):
    """What the intents of a turn (counted from 0) answer."""
    earlier = [[t.instruction for t in s.turns[:turn]] for s in batch]
    return Questions(earlier, [s.turns[turn].instruction for s in batch], [s.mode for s in batch])


def walked(policy, batch, turns):
    """Contexts before turns 1, 2, ... of sessions whose outputs are their sources; each with its
    instruction, too."""
    images = np.stack([s.image for s in batch])
    context, before, after = policy.encode(images), [], []
    for turn in range(turns):
        before.append(context)
        after.append(policy.instruct(context, [s.turns[turn].instruction for s in batch]))
        context = policy.append(after[-1], images)
    return before, after


def test_parameter_names_are_those_of_a_published_checkpoint(policy):
    names = set(policy.module.state_dict())
    for i in range(2):
        for suffix in ("", "_moe_gen"):
            layer = f"language_model.model.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj"):
                assert {
                    f"{layer}.self_attn.{part}{suffix}.{x}" for x in ("weight", "bias")
                } <= names
            assert f"{layer}.self_attn.o_proj{suffix}.weight" in names
            assert f"{layer}.self_attn.o_proj{suffix}.bias" not in names
            for part in ("self_attn.q_norm", "self_attn.k_norm"):
                assert f"{layer}.{part}{suffix}.weight" in names
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert f"{layer}.mlp{suffix}.{part}.weight" in names
            for part in ("input_layernorm", "post_attention_layernorm"):
                assert f"{layer}.{part}{suffix}.weight" in names
    top = [
        "language_model.model.embed_tokens.weight",
        "language_model.model.norm.weight",
        "language_model.model.norm_moe_gen.weight",
        "language_model.lm_head.weight",
        *(f"time_embedder.mlp.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")),
        *(f"{n}.{x}" for n in ("vae2llm", "llm2vae") for x in ("weight", "bias")),
        "latent_pos_embed.pos_embed",
    ]
    assert set(top) == {n for n in names if ".layers." not in n}


def test_the_7b_configuration_is_the_same_class():
    config = UnifiedConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_theta=1e6,
        latent_channels=16,
        latent_patch_size=2,
        max_latent_size=64,
    )
    with torch.device("meta"):
        model = UnifiedModel(config)
    count = sum(p.numel() for p in model.parameters())
    assert 14.0e9 < count < 14.8e9  # two experts of 7 B: 14.7 B with its ViT
    assert model.latent_pos_embed.pos_embed.shape == (4096, 3584)
    assert model.vae2llm.weight.shape == (3584, 64)


def test_position_table_is_sine_cosine_with_columns_first():
    model = UnifiedModel(
        UnifiedConfig(
            hidden_size=32, num_attention_heads=2, num_key_value_heads=2, max_latent_size=6
        )
    )
    table = model.latent_pos_embed.pos_embed.view(6, 6, 32)
    assert not model.latent_pos_embed.pos_embed.requires_grad
    assert (table[0, :, :16] == table[5, :, :16]).all() and not (
        table[0, :, 16:] == table[5, :, 16:]
    ).all()
    assert table[0, 3, 0] == pytest.approx(np.sin(3.0)) and table[0, 3, 8] == pytest.approx(
        np.cos(3.0)
    )


def test_grouped_key_value_heads_run():
    model = UnifiedModel(
        UnifiedConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    )
    model.reset_parameters(torch.Generator().manual_seed(0))
    context = model.append_image(
        model.empty_context(2), torch.randn(2, 36, 48), (6, 6), torch.tensor([1, 2])
    )
    assert context.keys[0].shape == (2, 2, 38, 8)
    assert (
        model.velocity(
            context, torch.randn(2, 36, 48), torch.rand(2), (6, 6), torch.tensor([1, 2])
        ).shape[1]
        == 36
    )


def test_packed_session_equals_reading_turn_by_turn(policy):
    """Values and gradients; texts of different lengths in one batch; a private branch is seen by
    nobody."""
    batch = sessions(4)
    b = len(batch)
    marks, both = policy.marks.expand(b, -1), torch.ones(b, 2, dtype=torch.bool)
    image = patchify(np.stack([s.image for s in batch]), policy.patch)
    noisy, sigma = torch.randn(2, b, 36, 48), torch.rand(2, b)
    texts = [
        policy.codec.pad([policy.text_ids(s.turns[t].instruction) for s in batch], 10)
        for t in range(2)
    ]
    ask = policy.codec.pad(
        [policy.question_ids([s.turns[0].instruction], s.turns[1].instruction) for s in batch]
    )
    packed = pack(
        policy.module,
        [
            Segment(marks, both, image),
            Segment(*texts[0]),
            Segment(marks, both, noisy[0], sigma[0], private=True),
            Segment(marks, both, image),
            Segment(*ask, private=True),
            Segment(*texts[1]),
            Segment(marks, both, noisy[1], sigma[1], private=True),
        ],
        policy.grid,
    )
    hidden = run_packed(policy.module, packed)
    first, second = (policy.module.llm2vae(hidden[:, packed.latent_slices[i]]) for i in (2, 6))
    asked = hidden[:, packed.text_slices[4]]

    images = np.stack([s.image for s in batch])
    context = policy.instruct(policy.encode(images), [s.turns[0].instruction for s in batch])
    v = [policy.velocity(noisy[0], sigma[0], context).v]
    context = policy.append(context, images)
    _, branch = policy.module.append_text(context, *ask)
    context = policy.instruct(context, [s.turns[1].instruction for s in batch])
    v.append(policy.velocity(noisy[1], sigma[1], context).v)

    torch.testing.assert_close(first, v[0], **CLOSE)
    torch.testing.assert_close(second, v[1], **CLOSE)
    torch.testing.assert_close(asked[ask[1]], branch[ask[1]], **CLOSE)

    weights = [p for p in policy.module.parameters() if p.requires_grad]
    grads = [
        torch.autograd.grad(a.square().sum() + c.square().sum(), weights, allow_unused=True)
        for a, c in ((first, second), (v[0], v[1]))
    ]
    for g, h in zip(*grads, strict=True):
        if g is not None and h is not None:
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-3 * float(h.abs().max()))


def test_a_sample_does_not_depend_on_its_neighbours(policy):
    batch = sessions(5)
    x, sigma = torch.randn(5, 36, 48), torch.rand(5)

    def velocities(part):
        context = policy.encode(np.stack([s.image for s in batch[part]]))
        context = policy.instruct(context, [s.turns[0].instruction for s in batch[part]])
        return policy.velocity(x[part], sigma[part], context).v

    together = velocities(slice(0, 5))
    for i in range(5):
        torch.testing.assert_close(velocities(slice(i, i + 1)), together[i : i + 1], **CLOSE)


def test_context_select_and_join_give_the_samples_back(policy):
    batch = sessions(3)
    context = policy.instruct(
        policy.encode(np.stack([s.image for s in batch])), [s.turns[0].instruction for s in batch]
    )
    x, sigma = torch.randn(3, 36, 48), torch.rand(3)
    v = policy.velocity(x, sigma, context).v
    index = torch.tensor([2, 0, 2])
    selected = policy.select(context, index)
    torch.testing.assert_close(
        policy.velocity(x[index], sigma[index], selected).v, v[index], **CLOSE
    )
    short = policy.encode(batch[0].image[None])
    joined = policy.join([context, short])
    both = policy.velocity(torch.cat([x, x[:1]]), torch.cat([sigma, sigma[:1]]), joined).v
    torch.testing.assert_close(both[:3], v, **CLOSE)
    torch.testing.assert_close(both[3:], policy.velocity(x[:1], sigma[:1], short).v, **CLOSE)


def test_appending_leaves_the_old_context_as_it_was(policy):
    context = policy.encode(sessions(1)[0].image[None])
    before = [k.clone() for k in context.keys]
    policy.instruct(context, ["remove it"])
    asks = asked(sessions(1), 1)
    [intent] = policy.intend(context, asks, None, temperature=0.7, max_tokens=4)
    policy.answer_log_prob(context, asks, [intent.ids], temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(before, context.keys, strict=True))


def test_a_latent_sees_the_earlier_image_and_the_text_but_not_what_comes_later(policy):
    session = sessions(1)[0]
    x, sigma = torch.randn(1, 36, 48), torch.rand(1)
    context = policy.instruct(policy.encode(session.image[None]), ["remove it"])
    v = policy.velocity(x, sigma, context).v
    other_text = policy.instruct(policy.encode(session.image[None]), ["paint it"])
    other_image = policy.instruct(policy.encode(255 - session.image[None]), ["remove it"])
    for other in (other_text, other_image):
        assert (policy.velocity(x, sigma, other).v - v).abs().max() > 1e-6
    assert torch.equal(policy.velocity(x, sigma, context).v, v)


def test_a_branch_reads_token_by_token_what_a_context_reads_at_once(policy):
    batch = sessions(3)
    context = policy.instruct(policy.encode(np.stack([s.image for s in batch])), ["remove it"] * 3)
    rows = [policy.text_ids(s.turns[0].instruction) for s in batch]
    ids, valid = policy.codec.pad([*rows[:2], rows[2][:3]])
    with torch.no_grad():
        _, whole = policy.module.append_text(context, ids, valid)
        branch = Branch(context, ids.shape[1])
        parts = [
            policy.module.extend_branch(branch, ids[:, i : i + 1], valid[:, i : i + 1])
            for i in range(ids.shape[1])
        ]
    torch.testing.assert_close(torch.cat(parts, 1)[valid], whole[valid], **CLOSE)
    with pytest.raises(ValueError, match="capacity"):
        policy.module.extend_branch(branch, ids[:, :1], valid[:, :1])


def test_sampled_text_is_counter_based(policy):
    batch = sessions(4)
    context = policy.encode(np.stack([s.image for s in batch]))
    seeds = torch.tensor([5, 6, 7, 5])
    options = {"temperature": 1.0, "max_tokens": 8}
    together = policy.intend(context, asked(batch, 1), seeds, **options)
    for i in range(4):
        alone = policy.intend(
            policy.select(context, torch.tensor([i])),
            asked(batch[i : i + 1], 1),
            seeds[i : i + 1],
            **options,
        )
        assert alone[0].ids == together[i].ids
    assert len({i.ids for i in together[:3]}) == 3
    greedy = policy.intend(context, asked(batch, 1), None, **options)
    assert greedy == policy.intend(context, asked(batch, 1), None, **options)


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("greedy", [False, True])
def test_given_answers_score_what_they_scored_while_decoding(policy, turn, temperature, greedy):
    """Mixed lengths: some stop by their end mark, some at the limit without one, and one is left
    empty."""
    batch = sessions(8)
    with torch.no_grad():  # a distribution that is not flat
        policy.module.language_model.lm_head.weight *= 10
    context, asks = walked(policy, batch, turn + 1)[0][turn], asked(batch, turn)
    seeds = None if greedy else torch.arange(8)
    intents = policy.intend(context, asks, seeds, temperature=temperature, max_tokens=40)
    assert all(len(i.ids) == len(i.log_prob) for i in intents)
    answers = [i.ids[: 40 - 5 * row] for row, i in enumerate(intents)]
    if not greedy:
        ended = {i.ids[-1] == policy.codec.im_end and len(i.ids) < 40 for i in intents}
        assert ended == {True, False} and len({len(a) for a in answers}) > 4
    answers[3] = ()
    scores = policy.answer_log_prob(context, asks, answers, temperature=temperature)
    assert scores.valid.sum(1).tolist() == [len(a) for a in answers]
    assert (
        scores.log_prob[~scores.valid].abs().sum() == 0 and scores.log_prob[scores.valid].max() < 0
    )
    for row, answer, intent in zip(scores.log_prob, answers, intents, strict=True):
        torch.testing.assert_close(
            row[: len(answer)], torch.tensor(intent.log_prob)[: len(answer)], **CLOSE
        )
    gradient = torch.autograd.grad(
        scores.log_prob.sum(), policy.module.language_model.lm_head.weight
    )[0]
    assert gradient.abs().max() > 0
    nothing = policy.answer_log_prob(context, asks, [()] * 8, temperature=temperature)
    assert nothing.log_prob.shape == nothing.valid.shape == (8, 0)


def test_the_mode_words_the_question(policy):
    batch = sessions(1)
    context = policy.encode(np.stack([s.image for s in batch]))
    scores = {
        policy.answer_log_prob(
            context, Questions([["remove it"]], ["remove it"], [mode]), [(9, 10)], temperature=1.0
        )
        .log_prob.sum()
        .item()
        for mode in ("cm", "cu", None)
    }
    assert len(scores) == 3


def test_guidance_of_one_changes_nothing(policy):
    batch, x, sigma = sessions(2), torch.randn(2, 36, 48), torch.rand(2)
    same = UnifiedPolicy(policy.module, policy.codec, Guidance(1.0, 1.0, "text_channel"))
    context = walked(same, batch, 2)[1][1]
    assert isinstance(context, Context)
    v = same.velocity(x, sigma, context)
    assert not v.guidance
    assert torch.equal(v.v, policy.velocity(x, sigma, walked(policy, batch, 2)[1][1]).v)


@pytest.mark.parametrize("text, image", [(4.0, 2.0), (3.0, 1.0), (1.0, 2.0)])
def test_guided_velocity_is_the_nested_formula_over_three_contexts(policy, text, image):
    batch, x, sigma = sessions(3), torch.randn(3, 36, 48), torch.tensor([0.2, 0.5, 1.0])
    guided = UnifiedPolicy(policy.module, policy.codec, Guidance(text, image, interval=(0.3, 1.0)))
    context = walked(guided, batch, 2)[1][1]
    said = [[s.turns[t].instruction for s in batch] for t in range(2)]
    before, after = walked(policy, batch, 2)
    texts = policy.module.empty_context(3)
    for turn in range(2):
        texts = policy.instruct(texts, said[turn])
    v, v_td, v_id = (policy.velocity(x, sigma, c).v for c in (after[1], before[1], texts))
    v_t = v_td + text * (v - v_td)
    expected = v_id + image * (v_t - v_id)
    expected[0] = v[0]  # below the interval
    found = guided.velocity(x, sigma, context)
    torch.testing.assert_close(found.v, v, **CLOSE)
    assert ("v_uncond" in found.guidance, "v_uncond_image" in found.guidance) == (
        text != 1,
        image != 1,
    )
    torch.testing.assert_close(found.combined(sigma), expected, rtol=1e-3, atol=1e-4)
    gradients = [
        torch.autograd.grad(u.square().sum(), policy.module.vae2llm.weight)[0]
        for u in (found.combined(sigma), expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))

    # select, join and the text of a guided context
    index = torch.tensor([2, 0])
    part = guided.velocity(x[index], sigma[index], guided.select(context, index)).combined(
        sigma[index]
    )
    torch.testing.assert_close(part, expected[index], rtol=1e-3, atol=1e-4)
    first = walked(guided, batch, 1)[1][0]
    joined = guided.join([guided.select(first, index), context])
    both = guided.velocity(torch.cat([x[index], x]), torch.cat([sigma[index], sigma]), joined)
    both = both.combined(torch.cat([sigma[index], sigma]))
    torch.testing.assert_close(both[2:], expected, rtol=1e-3, atol=1e-4)
    alone = guided.velocity(x[index], sigma[index], guided.select(first, index)).combined(
        sigma[index]
    )
    torch.testing.assert_close(both[:2], alone, rtol=1e-3, atol=1e-4)
    options = {"temperature": 1.0, "max_tokens": 4}
    plain, seeds = after[1], torch.arange(3)
    intents = guided.intend(context, asked(batch, 2), seeds, **options)
    assert [i.ids for i in intents] == [
        i.ids for i in policy.intend(plain, asked(batch, 2), seeds, **options)
    ]
    answers = [i.ids for i in intents]
    a, b = (
        p.answer_log_prob(c, asked(batch, 2), answers, temperature=1.0)
        for p, c in ((guided, context), (policy, plain))
    )
    assert torch.equal(a.log_prob, b.log_prob)


@pytest.mark.parametrize("renorm", ["none", "text_channel", "channel", "global"])
def test_a_step_takes_the_branches_as_they_come_and_its_replay_has_ratio_one(policy, renorm):
    batch, x = sessions(3), torch.randn(3, 36, 48)
    guided = UnifiedPolicy(policy.module, policy.codec, Guidance(4.0, 2.0, renorm))
    table = transition_table(flow_sigmas(8, shift=3.0), dynamics="flow-sde", noise_level=0.9)
    index, seed = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
    sigma = torch.tensor(flow_sigmas(8, shift=3.0))[index]
    context = walked(guided, batch, 2)[1][1]
    with torch.no_grad():
        rolled = guided.velocity(x, sigma, context)
        step = sde_step(x, rolled.v, table, index, seed, **rolled.guidance)
        combined = sde_step(x, rolled.combined(sigma), table, index, seed)
    torch.testing.assert_close(step.x_next, combined.x_next, rtol=1e-5, atol=1e-5)
    trained = guided.velocity(x, sigma, context)  # the branches were joined without gradient before
    replay = sde_log_prob(x, step.x_next, trained.v, table, index, **trained.guidance)
    torch.testing.assert_close(
        (replay.log_prob - step.log_prob).exp(), torch.ones(3), rtol=0, atol=1e-6
    )
    assert torch.autograd.grad(
        replay.log_prob.sum(), policy.module.language_model.model.embed_tokens.weight
    )
    assert guided_velocity(trained.v, sigma, **trained.guidance).requires_grad


def test_branches_joined_without_gradient_still_carry_one(policy):
    guided = UnifiedPolicy(policy.module, policy.codec, Guidance(4.0, 2.0))
    batch, x, sigma = sessions(2), torch.randn(2, 36, 48), torch.rand(2)
    gradients = []
    for look in (True, False):
        context = walked(guided, batch, 1)[1][0]
        if look:
            with torch.no_grad():
                guided.velocity(x, sigma, context)
        loss = guided.velocity(x, sigma, context).combined(sigma).square().sum()
        gradients.append(
            torch.autograd.grad(loss, policy.module.language_model.model.embed_tokens.weight)[0]
        )
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"text": float("nan")}, "guidance.text"),
        ({"renorm": "row"}, "guidance.renorm: 'row'"),
        ({"interval": (1.0, 0.4)}, "guidance.interval"),
    ],
)
def test_guidance_names_what_is_wrong(options, named):
    with pytest.raises(ConfigError, match=named):
        Guidance(**options)


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).expand(6000, 3)
    counts = UnifiedPolicy._sample(logits, torch.arange(6000), 3, 1.0).bincount(minlength=3) / 6000
    assert (counts - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 4 * np.sqrt(0.25 / 6000)
    sharp = UnifiedPolicy._sample(logits, torch.arange(6000), 3, 0.25).bincount(minlength=3) / 6000
    assert sharp[0] > 0.9


@pytest.mark.parametrize(
    "answer, intent, thought",
    [
        ("it is red </think> paint it", "paint it", "it is red"),
        ("</think> remove it", "remove it", ""),
        ("paint it", None, "paint it"),
        ("x </think>", None, "x"),
        ("", None, ""),
    ],
)
def test_intent_is_what_follows_the_end_of_thought(answer, intent, thought):
    assert read_intent(answer) == (intent, thought)


def test_question_lists_raw_instructions():
    question = wording_of("embedded", None)
    assert question(["a", "b"], "c") == "earlier : a ; b ; now : c ; rewrite"
    assert question(["a"], "c", "cm").endswith("; rewrite always") and question(
        [], "c", "cu"
    ).endswith("; rewrite it")


def test_patches_round_trip_and_are_ordered_row_column_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    tokens = patchify(images, 4)
    assert tokens.shape == (2, 36, 48)
    assert (unpatchify(tokens, (6, 6), 4) == images).all()
    assert tokens[1, 7, 3 * (4 * 2 + 1) + 2] == pytest.approx(
        images[1, 4 + 2, 4 + 1, 2] / 127.5 - 1
    )


def test_save_and_load_round_trip(policy, tmp_path):
    policy.save(tmp_path)
    again = UnifiedPolicy.load(tmp_path)
    assert dataclasses.asdict(again.module.config) == dataclasses.asdict(policy.module.config)
    for name, value in policy.module.state_dict().items():
        assert torch.equal(value, again.module.state_dict()[name])
    assert again.codec.encode("paint it red") == policy.codec.encode("paint it red")


def test_loading_names_what_is_wrong(tmp_path, policy):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        UnifiedPolicy.load(tmp_path)
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        UnifiedPolicy.load(tmp_path)


def test_an_unknown_word_is_named(policy):
    with pytest.raises(DataError, match="'banana'"):
        policy.instruct(policy.encode(sessions(1)[0].image[None]), ["paint the banana red"])
