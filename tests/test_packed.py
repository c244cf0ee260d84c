"""Packed replay against the walk it stands for: values, gradients, masks, counts."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

from editr2.config import PolicyConfig, RolloutConfig
from editr2.policies.base import Questions, TurnTask
from editr2.policies.unified import packed
from editr2.policies.unified.guidance import Guidance
from editr2.policies.unified.packed import (
    TEXTS,
    Segment,
    block_mask,
    by_segment,
    dense_mask,
    flex,
    mask_mod,
    pack,
    token_counts,
)
from editr2.policies.unified.policy import UnifiedPolicy
from editr2.rl.replay import Queries, ReplayOptions, can_pack
from editr2.rl.replay import replay as replay_chunk
from editr2.rl.rollout import Chunk, Seeds, TurnRecord, rollout_chunk
from editr2.rl.sampler import rollout_sampler
from editr2.worlds.shapes import make_session

CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 matrix products batched differently, two layers deep
TEMPERATURE = 0.7


GUIDED = Guidance(4.0, 2.0, "text_channel")


@pytest.fixture
def policy(tiny_unified):
    return tiny_unified


def guided(policy, guidance):
    """The same policy under guidance."""
    return UnifiedPolicy(policy.module, policy.codec, guidance)


def tasks(policy, batch=3, turns=3, places=2, text=True):
    """(source images, tasks) with instructions, questions and answers of different lengths; one
    answer is empty."""
    sessions = [make_session(0, i, turns=turns) for i in range(batch)]
    done = []
    for t in range(turns):
        asks, answers = None, None
        if t and text:
            earlier = [[u.instruction for u in s.turns[:t]] for s in sessions]
            asks = Questions(
                earlier, [s.turns[t].instruction for s in sessions], [s.mode for s in sessions]
            )
            answers = [tuple(range(7, 7 + (3 * i * t) % 8)) for i in range(batch)]
        images = np.stack([make_session(1 + t, i).image for i in range(batch)])
        x, sigma = torch.randn(batch, places, *policy.latent_shape), torch.rand(batch, places)
        done.append(
            TurnTask([s.turns[t].instruction for s in sessions], images, x, sigma, asks, answers)
        )
    return np.stack([s.image for s in sessions]), done


def walk(policy, images, turns, context_gradient):
    """What a rollout does, with every turn's context detached or not: (velocities, token scores)
    turn by turn."""
    context, done = None, []
    for turn in turns:
        with torch.set_grad_enabled(context_gradient):
            context = policy.encode(images) if context is None else policy.append(context, images)
            before, context = context, policy.instruct(context, turn.text)
        tokens = None
        if turn.questions is not None:
            tokens = policy.answer_log_prob(
                before, turn.questions, turn.answers, temperature=TEMPERATURE
            )
        v = [
            branches(policy.velocity(turn.x[:, q], turn.sigma[:, q], context))
            for q in range(turn.sigma.shape[1])
        ]
        done.append((torch.stack(v, 1).flatten(0, 1) if v else None, tokens))
        images = turn.images
    return done


def branches(velocity):
    """A velocity with those of its branches, [B, branches, N, D]; [B, N, D] without guidance."""
    beside = [v for v in velocity.guidance.values() if isinstance(v, torch.Tensor)]
    return torch.stack([velocity.v, *beside], 1) if beside else velocity.v


def replay(policy, images, turns, context_gradient):
    done = policy.replay_packed(
        images, turns, context_gradient=context_gradient, temperature=TEMPERATURE
    )
    return [(branches(r.velocity), r.tokens) for r in done]


def gradients(policy, done):
    """Of a loss that tells places and tokens apart."""
    loss = torch.zeros(())
    for t, (v, tokens) in enumerate(done):
        if v is not None and v.numel():
            loss = loss + ((1 + t + torch.arange(v.numel()).view(v.shape) % 7) * v).square().mean()
        if tokens is not None and tokens.valid.any():
            loss = loss + ((1 + torch.arange(tokens.log_prob.shape[1])) * tokens.log_prob).mean()
    weights = [p for p in policy.module.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, weights, allow_unused=True)


def assert_same(policy, found, expected):
    for (v, tokens), (v_walk, tokens_walk) in zip(found, expected, strict=True):
        if v_walk is None:
            assert v.shape == (0, *v.shape[1:-2], *policy.latent_shape)
        else:
            torch.testing.assert_close(v, v_walk, **CLOSE)
        assert (tokens is None) == (tokens_walk is None)
        if tokens is not None:
            assert torch.equal(tokens.valid, tokens_walk.valid)
            torch.testing.assert_close(tokens.log_prob, tokens_walk.log_prob, **CLOSE)
    for g, h in zip(gradients(policy, found), gradients(policy, expected), strict=True):
        size = max([float(x.abs().max()) for x in (g, h) if x is not None], default=0.0)
        if g is None or h is None:
            assert size == 0
        else:
            torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize(
    "guidance",
    [Guidance(), Guidance(text=4.0), Guidance(image=2.0), GUIDED],
    ids=("none", "text", "image", "both"),
)
@pytest.mark.parametrize("context_gradient", [False, True])
def test_packed_replay_equals_the_walk(policy, context_gradient, guidance):
    policy = guided(policy, guidance)
    images, turns = tasks(policy)
    expected = walk(policy, images, turns, context_gradient)
    assert_same(policy, replay(policy, images, turns, context_gradient), expected)


def test_a_packed_velocity_is_guided_as_a_walked_one(policy):
    policy = guided(policy, GUIDED)
    images, turns = tasks(policy, turns=1)
    context = policy.instruct(policy.encode(images), turns[0].text)
    walked = policy.velocity(turns[0].x[:, 0], turns[0].sigma[:, 0], context).combined(
        turns[0].sigma[:, 0]
    )
    (done,) = policy.replay_packed(images, turns, context_gradient=False, temperature=1.0)
    found = done.velocity.combined(turns[0].sigma.flatten())
    torch.testing.assert_close(found[::2], walked, **CLOSE)


@pytest.mark.parametrize("context_gradient", [False, True])
def test_gradients_through_the_context_are_what_the_flag_says(policy, context_gradient):
    images, turns = tasks(policy)
    here, other = (
        gradients(policy, replay(policy, images, turns, g))
        for g in (context_gradient, not context_gradient)
    )
    assert any(
        not torch.allclose(a, b, rtol=1e-2)
        for a, b in zip(here, other)
        if a is not None and b is not None
    )


@pytest.mark.parametrize("context_gradient", [False, True])
def test_a_turn_may_ask_for_nothing(policy, context_gradient, monkeypatch):
    """No places in turns 1 and 3, all answers of turn 2 empty, no questions at all in turn 3."""
    images, turns = tasks(policy)
    none = {"x": turns[0].x[:, :0], "sigma": turns[0].sigma[:, :0]}
    turns = [
        dataclasses.replace(turns[0], **none),
        dataclasses.replace(turns[1], answers=[()] * 3),
        dataclasses.replace(turns[2], questions=None, answers=None, **none),
    ]
    found = replay(policy, images, turns, context_gradient)
    assert found[1][1].log_prob.shape == (3, 0)
    assert_same(policy, found, walk(policy, images, turns, context_gradient))
    nothing = [dataclasses.replace(t, questions=None, answers=None, **none) for t in turns]
    monkeypatch.setattr(policy.module, "forward", None)  # nor is the module called for nothing
    assert all(v.shape == (0, 36, 48) for v, _ in replay(policy, images, nothing, context_gradient))
    assert not policy.packs(nothing, context_gradient=context_gradient)


@pytest.mark.parametrize("context_gradient", [False, True])
def test_nothing_is_computed_that_nobody_asks_for(policy, context_gradient, monkeypatch):
    """And every call of the module goes through the layers once, as those wait for that hold parts
    of its weights."""
    images, turns = tasks(policy)
    tokens, calls = [], []
    run = policy.module.run

    def counted(x, *rest):
        tokens.append(x.shape[1])
        calls.append("run")
        return run(x, *rest)

    monkeypatch.setattr(policy.module, "run", counted)
    policy.module.register_forward_pre_hook(lambda *_: calls.append("call"))
    replay(policy, images, turns, context_gradient)
    text = [max(len(policy.text_ids(c)) for c in t.text) for t in turns]
    asked = [0, *(policy._asked(t.questions, t.answers)[0].shape[1] for t in turns[1:])]
    assert sum(tokens) == token_counts(38, text, [2] * 3, asked)["packed"].tokens
    assert calls == ["call", "run"] * (1 if context_gradient else 2)
    blank = [*turns[:2], dataclasses.replace(turns[2], images=np.zeros_like(images))]
    for (a, _), (b, _) in zip(
        *(replay(policy, images, t, context_gradient) for t in (turns, blank)), strict=True
    ):
        assert torch.equal(a, b)


def test_a_session_does_not_depend_on_its_neighbours(policy):
    images, turns = tasks(policy)
    together = replay(policy, images, turns, True)
    one = [
        dataclasses.replace(
            t,
            text=t.text[1:2],
            images=t.images[1:2],
            x=t.x[1:2],
            sigma=t.sigma[1:2],
            questions=t.questions and t.questions.select([1]),
            answers=None if t.answers is None else t.answers[1:2],
        )
        for t in turns
    ]
    for (v, tokens), (v_alone, tokens_alone) in zip(
        together, replay(policy, images[1:2], one, True), strict=True
    ):
        torch.testing.assert_close(v_alone, v[2:4], **CLOSE)
        if tokens is not None:
            n = len(tokens_alone.log_prob[0])
            torch.testing.assert_close(tokens_alone.log_prob[0], tokens.log_prob[1, :n], **CLOSE)


# -------------------------------------------------------------------------------------------- masks


SMALL = (2, 2)


def segments(policy, grid=SMALL, guided=True):
    """Two turns: a noisy image in each, in the second a question; and guidance's branches."""
    marks, both = policy.marks.expand(2, -1), torch.ones(2, 2, dtype=torch.bool)
    texts = [policy.codec.pad([[2, *[9] * n, 3], [2, 9, 3]]) for n in (1, 4, 6)]
    x = torch.randn(3, 2, grid[0] * grid[1], 48)
    noisy = Segment(marks, both, x[1], torch.rand(2), private=True)
    of_texts = dataclasses.replace(noisy, chain=TEXTS)
    return [
        Segment(marks, both, x[0]),
        *([noisy] * guided),
        Segment(*texts[0]),
        noisy,
        *([Segment(*texts[0], chain=TEXTS), of_texts] * guided),
        Segment(marks, both, x[2]),
        Segment(*texts[1], private=True),
        *([noisy] * guided),
        Segment(*texts[2]),
        noisy,
        *([Segment(*texts[2], chain=TEXTS), of_texts] * guided),
    ]


def layouts(policy, grid=SMALL):
    """(queries, keys) of one forward, of the context alone, and of the private segments behind
    it."""
    public, private, every = (
        pack(policy.module, segments(policy, grid), grid, p).layout for p in (False, True, None)
    )
    return [(every, every), (public, public), (private, private.behind(public))]


def test_the_mask_is_the_rule_token_by_token(policy):
    """The rule told once more, over lists."""
    chains = [s.chain for s in segments(policy)]
    for queries, keys in layouts(policy):
        mask = dense_mask(queries, keys)
        described = [
            [(s, private, image, offset) for s, private, image, n in pieces for offset in range(n)]
            for pieces in (
                [(s, p, n in (2, 4), n) for s, p, n in layout.pieces] for layout in (queries, keys)
            )
        ]
        for b in range(2):
            for i, (s, _, image, at) in enumerate(described[0]):
                for j, (other, private, _, before) in enumerate(described[1]):
                    own = s == other and (image or before <= at)
                    past = other < s and not private and chains[other] == chains[s]
                    itself = s == other and before == at
                    assert bool(mask[b, i, j]) == (
                        (own or past) and (bool(keys.valid[b, j]) or itself)
                    ), (b, i, j)


def test_the_block_mask_evaluates_to_the_dense_mask(policy):
    for queries, keys in layouts(policy):
        made = create_mask(mask_mod(queries, keys), 2, 1, len(queries), len(keys), device="cpu")
        assert torch.equal(made[:, 0], dense_mask(queries, keys))


def test_the_block_mask_is_the_one_that_its_library_makes(policy):
    """Its squares: left out, looked at number by number, or taken whole. Part by part."""
    for queries, keys in layouts(policy):
        sizes = (2, 1, len(queries), len(keys))
        theirs = create_block_mask(mask_mod(queries, keys), *sizes, device="cpu", BLOCK_SIZE=4)
        ours = block_mask(queries, keys, block=4, at_once=2 * 4 * 3 * len(keys))
        kinds = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        for name in (*kinds, "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert ours.shape == theirs.shape and ours.full_kv_num_blocks.any()


@pytest.mark.parametrize("form, kv_heads", [("by_segment", 1), ("by_segment", 4), ("flex", 1)])
def test_every_form_of_attention_is_the_dense_one(policy, form, kv_heads):
    for queries, keys in layouts(policy):
        q = torch.randn(2, 4, len(queries), 16)
        k, v = (torch.randn(2, kv_heads, len(keys), 16) for _ in range(2))
        mask = dense_mask(queries, keys)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        attend = (
            by_segment(queries, keys)
            if form == "by_segment"
            else flex(queries, keys, compiled=False)
        )
        torch.testing.assert_close(attend(q, k, v), expected, **CLOSE)


@torch.no_grad()
def test_a_session_is_replayed_by_flex_attention_as_by_segments(policy, monkeypatch):
    """Whole, in bfloat16's autocast, whose casts are made for it; uncompiled, and without gradient,
    which it has on no CPU."""
    policy = guided(policy, GUIDED)
    policy.compute_dtype = torch.bfloat16
    images, turns = tasks(policy, batch=2, turns=2, places=1)
    expected = replay(policy, images, turns, False)
    seen = set()

    def uncompiled(*tensors, **how):
        seen.update(x.dtype for x in tensors)
        return flex_attention(*tensors, **how)

    monkeypatch.setattr(packed, "attention", flex)
    monkeypatch.setattr(packed, "_compiled_flex_attention", lambda: uncompiled)
    for (v, tokens), (like, scores) in zip(
        replay(policy, images, turns, False), expected, strict=True
    ):
        torch.testing.assert_close(v, like, rtol=0.02, atol=0.02)
        if tokens is not None:
            torch.testing.assert_close(tokens.log_prob, scores.log_prob, rtol=0.02, atol=0.02)
    assert seen == {torch.bfloat16}


def test_nobody_looks_at_padding_or_at_private_segments(policy):
    """By gradient: what the context's last text and a later noisy image see of earlier
    embeddings."""
    laid = segments(policy)
    one = pack(policy.module, laid, SMALL)
    embedded = one.embedded.detach().requires_grad_()
    attend = by_segment(one.layout, one.layout)
    hidden, _, _ = policy.module.run(embedded, one.split, one.position, attend, None)
    for number in (len(laid) - 4, *range(len(laid) - 2, len(laid))):
        at = one.latent_slices[number] or one.text_slices[number]
        rows = (
            hidden[:, at]
            if one.latent_slices[number]
            else hidden[:, at] * one.layout.valid[:, at, None]
        )
        seen = torch.autograd.grad(rows.sum(), embedded, retain_graph=True)[0].abs().sum(-1) > 0
        for other, segment in enumerate(laid[:number]):
            shown = not segment.private and segment.chain == laid[number].chain
            for part in (one.text_slices[other], one.latent_slices[other]):
                if part is not None:
                    assert torch.equal(seen[:, part], one.layout.valid[:, part] & shown)


@pytest.mark.gpu
@pytest.mark.parametrize("context_gradient", [False, True])
def test_on_a_gpu_flex_attention_equals_the_cpu(policy, context_gradient):
    policy = guided(policy, GUIDED)
    images, turns = tasks(policy)
    expected = replay(policy, images, turns, context_gradient)
    expected_gradients = gradients(policy, expected)
    policy.module.cuda()
    moved = [dataclasses.replace(t, x=t.x.cuda(), sigma=t.sigma.cuda()) for t in turns]
    done = policy.replay_packed(
        images, moved, context_gradient=context_gradient, temperature=TEMPERATURE
    )
    found = [
        (
            branches(r.velocity).cpu(),
            r.tokens
            and dataclasses.replace(
                r.tokens, log_prob=r.tokens.log_prob.cpu(), valid=r.tokens.valid.cpu()
            ),
        )
        for r in done
    ]
    for (v, tokens), (v_cpu, tokens_cpu) in zip(found, expected, strict=True):
        torch.testing.assert_close(v, v_cpu, rtol=1e-3, atol=1e-4)
        if tokens is not None:
            torch.testing.assert_close(tokens.log_prob, tokens_cpu.log_prob, rtol=1e-3, atol=1e-4)
    for g, h in zip(gradients(policy, found), expected_gradients, strict=True):
        if g is not None and h is not None:
            torch.testing.assert_close(g.cpu(), h, rtol=1e-2, atol=1e-3 * float(h.abs().max()))


# ------------------------------------------------------------------------------ guidance and counts


def test_parts_of_packed_sessions_are_the_walk(policy):
    """A guided rollout of sessions of two lengths, with intents and an image beside the source:
    replayed walking, whole, and in forwards of so many rows."""
    policy = guided(policy, GUIDED)
    made = [make_session(0, i, turns=3 - i) for i in range(2)]
    beside = [(make_session(1, i).image,) for i in range(2)]
    sessions = [dataclasses.replace(s, references=r) for s, r in zip(made, beside, strict=True)]
    chunk = Chunk(sessions, [0, 1], 2)
    config = RolloutConfig(steps=4, window=2)
    given = (rollout_sampler(config), Seeds(0, "train"), PolicyConfig(intent_tokens=3))
    rollout_chunk(policy, chunk, *given, rollout=config)
    queries = Queries([r.x for r in chunk.turns], [r.sigma for r in chunk.turns])
    needed = torch.arange(3) < chunk.lengths[:, None]
    found = {}
    for how, rows in ((False, None), (True, None), (True, 1), (True, 9)):
        options = ReplayOptions(how, False, rows, TEMPERATURE, True)
        parts = list(replay_chunk(policy, chunk, queries, options, needed))
        of_parts = [(p.index, branches(p.velocity)) for p in parts]
        index, v = (torch.cat(x) for x in zip(*of_parts, strict=True))
        scores = [(a.turn, int(i)) for p in parts for a in p.answers for i in a.at]
        logs = [log.sum() for p in parts for a in p.answers for log in a.scores.log_prob]
        order = sorted(range(len(scores)), key=scores.__getitem__)
        told = (v[index.argsort()], torch.stack([logs[i] for i in order]))
        found[how, rows] = [index.sort()[0], *told, [len(p.index) for p in parts]]
    walked = found[False, None]
    assert walked[0].tolist() == list(range(2 * int(chunk.lengths.sum())))
    for replayed in found.values():
        for one, other in zip(replayed[:3], walked[:3], strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
    sizes = {rows: found[True, rows][3] for rows in (None, 1, 9)}
    assert sizes == {None: [20], 1: [4, 4, 6, 6], 9: [8, 6, 6]}


@pytest.mark.parametrize("turns, ratio", [(3, 1.30), (5, 1.85), (8, 2.64)])
def test_rebuilding_the_context_costs_what_is_known(turns, ratio):
    counts = token_counts(1026, [64] * turns, [1] * turns, [0] * turns, last_image=True)
    assert round(counts["rebuild"].tokens / counts["packed"].tokens, 2) == ratio
    more = token_counts(1026, [64] * turns, [2] * turns, [0] * turns, last_image=True)
    assert more["packed"].tokens - counts["packed"].tokens == turns * 1026
    assert more["rebuild"].tokens == 2 * counts["rebuild"].tokens


@pytest.mark.parametrize("guided", [False, True])
def test_counted_pairs_are_the_ones_of_the_mask(policy, guided):
    every = pack(policy.module, segments(policy, guided=guided), SMALL).layout
    whole = dataclasses.replace(every, valid=torch.ones_like(every.valid))
    counts, together = (
        token_counts(6, [3, 8], [1, 1], [0, 6], dropped=(guided, guided), together=together)
        for together in (False, True)
    )
    assert counts["packed"].tokens == len(every)
    assert counts["packed"].pairs == counts["walk"].pairs == int(dense_mask(whole, whole)[0].sum())
    forwards = [counts[name].forwards for name in ("walk", "packed", "rebuild")]
    assert forwards == ([7 + 6, 1, 7] if guided else [7, 1, 3])
    # Joined branches are one forward, in which each meets as many keys as the longest.
    assert together["packed"] == counts["packed"]
    assert together["walk"].tokens == counts["walk"].tokens
    assert together["walk"].forwards == counts["walk"].forwards - (4 if guided else 0)
    padded = 6 * (3 + 6) + 6 * (8 + 12) if guided else 0
    assert together["walk"].pairs == counts["walk"].pairs + padded


@pytest.mark.parametrize("context_gradient", [False, True])
def test_small_batches_pack_and_large_ones_walk(policy, context_gradient):
    assert policy.packs(tasks(policy)[1], context_gradient=context_gradient)
    assert not policy.packs(tasks(policy, batch=48)[1], context_gradient=context_gradient)


def test_turns_that_nobody_needs_speak_for_walking(policy):
    """Packing computes every turn of a rollout that is needed at all; walking leaves out the turns
    that are not."""
    sessions = [make_session(0, i, turns=3) for i in range(2)]
    places = Queries([torch.zeros(4, 2, *policy.latent_shape)] * 3, [torch.zeros(4, 2)] * 3)
    nothing, images = torch.zeros(4, 0), np.zeros((4, *policy.image_size, 3), np.uint8)
    records = [
        TurnRecord(torch.arange(4), ["red"] * 4, {}, *[nothing] * 6, images) for _ in range(3)
    ]
    chunk = Chunk(sessions, [0, 1], 2, records)
    options = ReplayOptions(False, False, None, TEMPERATURE, True)
    needed = torch.ones(4, 3, dtype=torch.bool)
    assert can_pack(policy, chunk, places, options, needed)
    needed[2:] = False  # rollouts that nobody needs cost neither way anything
    assert can_pack(policy, chunk, places, options, needed)
    needed[:2, 1] = False
    assert not can_pack(policy, chunk, places, options, needed)
