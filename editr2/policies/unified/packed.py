"""Whole sessions as one packed sequence: equal to reading them segment by segment through contexts,
in one forward.

A session is a list of segments in logical order, public ones (images, instructions: the context)
and private ones (noisy images, questions with their answers: what is predicted). A token sees what
is public in earlier segments and its own segment, text only up to itself. This rule (`may_look`)
stands once; a dense mask, the block mask of `flex_attention` and attention segment by segment are
made from it.

Legend of shapes: B samples, L tokens, Q queries, K keys, N latent tokens, D numbers per latent
token, H hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from editr2.policies.unified.model import Attend, Context, UnifiedModel


@dataclass
class Segment:
    """A stretch of a packed sequence, in logical order.

    ids: understanding tokens int64 [B, U] with `valid` bool [B, U]; latents: generation tokens [B,
    N, D] at time `t` ([B], or None for clean), whose marks are all valid; seen: understanding
    tokens of an image [B, M, H] behind such marks. A `private` segment (noisy image, question and
    answer) sees all public segments before it; nobody else sees it and it does not advance the
    position.
    """

    ids: Tensor
    valid: Tensor
    latents: Tensor | None = None
    t: Tensor | None = None
    private: bool = False
    seen: Tensor | None = None

    @property
    def image(self) -> bool:
        """Whether all of its tokens see one another and share one position."""
        return self.latents is not None or self.seen is not None


@dataclass(frozen=True)
class Layout:
    """What the mask rule knows of a sequence in physical order.

    segment: int64 [L], in logical order. order: int64 [L], within a segment; one for all tokens of
    an image. private: bool [L]. valid: bool [B, L]. pieces: (segment, private, tokens) of the
    stretches that make up the sequence.
    """

    segment: Tensor
    order: Tensor
    private: Tensor
    valid: Tensor
    pieces: tuple[tuple[int, bool, int], ...]

    def take(self, kept: Sequence[int]) -> Layout:
        """The pieces at these indices as a layout."""
        parts = [torch.arange(n) for _, _, n in self.pieces]
        starts = [sum(n for _, _, n in self.pieces[:i]) for i in range(len(self.pieces))]
        at = torch.cat([parts[i] + starts[i] for i in kept]).to(self.segment.device)
        return Layout(
            self.segment[at],
            self.order[at],
            self.private[at],
            self.valid[:, at],
            tuple(self.pieces[i] for i in kept),
        )

    def behind(self, past: Layout) -> Layout:
        """The keys that these queries meet: `past`, then themselves."""
        return Layout(
            torch.cat([past.segment, self.segment]),
            torch.cat([past.order, self.order]),
            torch.cat([past.private, self.private]),
            torch.cat([past.valid, self.valid], 1),
            past.pieces + self.pieces,
        )


def may_look(
    q_segment: Tensor,
    q_order: Tensor,
    k_segment: Tensor,
    k_order: Tensor,
    k_private: Tensor,
    k_valid: Tensor,
) -> Tensor:
    """The mask rule, bool, for tensors that broadcast."""
    own = (q_segment == k_segment) & (q_order >= k_order)
    past = (q_segment > k_segment) & ~k_private
    # A padded query must look at something, else its softmax is NaN: at itself. Image tokens are
    # never padded.
    itself = (q_segment == k_segment) & (q_order == k_order)
    return (own | past) & (k_valid | itself)


def dense_mask(queries: Layout, keys: Layout) -> Tensor:
    """bool [B, Q, K], True = may look."""
    q = (queries.segment[:, None], queries.order[:, None])
    return may_look(*q, keys.segment, keys.order, keys.private, keys.valid[:, None])


def mask_mod(queries: Layout, keys: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as `flex_attention` wants it, over indices (sample, head, query, key)."""

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        looking = (queries.segment[q], queries.order[q])
        return may_look(*looking, keys.segment[k], keys.order[k], keys.private[k], keys.valid[b, k])

    return mod


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(queries: Layout, keys: Layout, compiled: bool = True) -> Attend:
    """Attention by `flex_attention` with a block mask. compiled: False is for tests without a
    GPU."""
    from torch.nn.attention import flex_attention as lib

    mod, device = mask_mod(queries, keys), queries.segment.device
    sizes = (queries.valid.shape[0], None, len(queries.segment), len(keys.segment))
    block_mask = lib.create_block_mask(mod, *sizes, device=str(device))
    function: Any = _compiled_flex_attention() if compiled else lib.flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return attend


def by_segment(queries: Layout, keys: Layout) -> Attend:
    """Attention of one segment after the other to the pieces that it may look at: no score is
    computed in vain.

    One core, embedded model, 8 rollouts of 2 places a turn, forward and backward with detached
    context: 0.49 s at 3 turns and 1.79 s at 8, against 0.57 and 3.44 s with the dense mask, and
    0.60 and 3.60 s with the private segments in the batch dimension, each against a copy of its
    prefix.
    """
    q_sizes, k_sizes = ([n for _, _, n in layout.pieces] for layout in (queries, keys))
    whole = dataclasses.replace(
        keys, valid=torch.ones_like(keys.valid[:1])
    )  # which pieces matter is no sample's own
    runs = []
    for segment in dict.fromkeys(s for s, _, _ in queries.pieces):
        asking = [i for i, (s, _, _) in enumerate(queries.pieces) if s == segment]
        here = queries.take(asking)
        seen = [
            i
            for i, part in enumerate(dense_mask(here, whole).split(k_sizes, 2))
            if bool(part.any())
        ]
        mask = dense_mask(here, keys.take(seen))
        if bool((mask == mask[:, :1]).all()):
            mask = mask[:, :1]  # an image: the same for every query
        runs.append((asking, seen, None if bool(mask.all()) else mask[:, None]))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One split and one cat: the backward of a slice would fill a tensor of the whole length
        # each time.
        q_pieces, k_pieces, v_pieces = q.split(q_sizes, 2), k.split(k_sizes, 2), v.split(k_sizes, 2)
        out: dict[int, Tensor] = {}
        for asking, seen, mask in runs:
            y = F.scaled_dot_product_attention(
                torch.cat([q_pieces[i] for i in asking], 2),
                torch.cat([k_pieces[i] for i in seen], 2),
                torch.cat([v_pieces[i] for i in seen], 2),
                attn_mask=mask,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out.update(zip(asking, y.split([q_sizes[i] for i in asking], 2), strict=True))
        return torch.cat([out[i] for i in range(len(q_sizes))], 2)

    return attend


def attention(queries: Layout, keys: Layout) -> Attend:
    """The fastest form for the device."""
    return (
        flex(queries, keys) if queries.segment.device.type == "cuda" else by_segment(queries, keys)
    )


@dataclass(frozen=True)
class Packed:
    """One batch of packed sequences, physically ordered understanding tokens first; slices by
    segment."""

    embedded: Tensor
    split: int
    position: Tensor
    layout: Layout
    text_slices: tuple[slice, ...]
    latent_slices: tuple[slice | None, ...]

    @property
    def mask(self) -> Tensor:
        """Dense, [B, 1, L, L]."""
        return dense_mask(self.layout, self.layout)[:, None]


def pack(
    model: UnifiedModel,
    segments: Sequence[Segment],
    grid: tuple[int, int],
    private: bool | None = None,
) -> Packed:
    """Lays segments out as one sequence: equal to reading them one after the other through
    contexts.

    private: None for all segments; else only the private or only the public ones, in the places
        they have among all.
    """
    b = segments[0].ids.shape[0]
    device = segments[0].ids.device
    counter = torch.zeros(b, dtype=torch.int64, device=device)
    text_x, text_position, text_order, text_valid, text_pieces, text_slices = [], [], [], [], [], []
    image_x, image_position, image_pieces = [], [], []
    latent_slices: list[slice | None] = []
    text_at = image_at = 0
    for number, s in enumerate(segments):
        start = counter
        if not s.private:
            counter = counter + (1 if s.image else s.valid.sum(1))
        if private is not None and s.private != private:
            continue
        words, valid = model.embed_text(s.ids), s.valid
        if s.seen is not None:
            words = torch.cat([words, model.embed_seen(s.seen)], 1)
            valid = F.pad(valid, (0, s.seen.shape[1]), value=True)
        width = words.shape[1]
        offsets = torch.arange(width, device=device)
        text_x.append(words)
        text_order.append(torch.zeros_like(offsets) if s.image else offsets)
        text_position.append(start[:, None] + text_order[-1])
        text_valid.append(valid)
        text_pieces.append((number, s.private, width))
        text_slices.append(slice(text_at, text_at + width))
        text_at += width
        if s.latents is None:
            latent_slices.append(None)
            continue
        n = s.latents.shape[1]
        t = s.t if s.t is not None else torch.zeros((), device=device)
        image_x.append(model.embed_latents(s.latents, t, grid))
        image_position.append(start[:, None].expand(b, n))
        image_pieces.append((number, s.private, n))
        latent_slices.append(slice(image_at, image_at + n))
        image_at += n
    pieces = (*text_pieces, *image_pieces)
    widths = torch.tensor([n for _, _, n in pieces], device=device)
    layout = Layout(
        torch.tensor([number for number, _, _ in pieces], device=device).repeat_interleave(widths),
        F.pad(torch.cat(text_order), (0, image_at)),
        torch.tensor([hidden for _, hidden, _ in pieces], device=device).repeat_interleave(widths),
        F.pad(torch.cat(text_valid, 1), (0, image_at), value=True),
        pieces,
    )
    shifted = tuple(
        None if s is None else slice(text_at + s.start, text_at + s.stop) for s in latent_slices
    )
    embedded, position = (
        torch.cat([*text_x, *image_x], 1),
        torch.cat([*text_position, *image_position], 1),
    )
    return Packed(embedded, text_at, position, layout, tuple(text_slices), shifted)


def run_packed(model: UnifiedModel, packed: Packed) -> Tensor:
    """Final hidden states [B, L, H] of a packed batch, in its physical order. With the dense mask,
    a plain tensor: pretraining compiles `model.run`."""
    hidden, _, _ = model.run(packed.embedded, packed.split, packed.position, packed.mask, None)
    return hidden


def run_session(
    model: UnifiedModel,
    segments: Sequence[Segment],
    grid: tuple[int, int],
    *,
    context_gradient: bool,
) -> dict[int, Tensor]:
    """Final hidden states of the private segments by their number: [B, N, H] of a noisy image, [B,
    U, H] of text.

    With `context_gradient` everything is one forward. Without, the public segments are read first,
    without gradient, and all private segments in a second forward behind their keys and values.
    Public segments that no private one follows are not read.
    """
    private = [i for i, s in enumerate(segments) if s.private]
    if not private:
        return {}
    segments = segments[: private[-1] + 1]
    if context_gradient:
        packed = pack(model, segments, grid)
        attend = attention(packed.layout, packed.layout)
        hidden, _, _ = model.run(packed.embedded, packed.split, packed.position, attend, None)
        asked = private
    else:
        with torch.no_grad():
            public = pack(model, segments, grid, private=False)
            attend = attention(public.layout, public.layout)
            _, keys, values = model.run(
                public.embedded, public.split, public.position, attend, None
            )
        packed = pack(model, segments, grid, private=True)
        attend = attention(packed.layout, packed.layout.behind(public.layout))
        context = Context(keys, values, public.layout.valid, public.position[:, -1] + 1)
        hidden, _, _ = model.run(packed.embedded, packed.split, packed.position, attend, context)
        asked = list(range(len(private)))
    return {
        i: hidden[:, packed.latent_slices[at] or packed.text_slices[at]]
        for i, at in zip(private, asked)
    }


# ----------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Counts:
    """What a replay of one rollout runs: tokens through the layers, (query, key) pairs of
    attention, forwards."""

    tokens: int
    pairs: int
    forwards: int


def token_counts(
    image: int,
    text: Sequence[int],
    noisy: Sequence[int],
    asked: Sequence[int],
    *,
    seen: int = 0,
    last_image: bool = False,
) -> dict[str, Counts]:
    """Counts of three ways to predict the same, by name:

    rebuild: the whole context is read again for every noisy image and every question.
    walk: the context is read once, its keys and values kept; everything predicted reads them.
    packed: one forward; every segment attends to its prefix and itself. By count it is a walk in
        one step.

    image: tokens of an image block. text, noisy, asked: tokens of the instruction, number of noisy
    images, and tokens of question and answer, turn by turn. seen: tokens of what
    understanding sees of an image, behind its block. last_image: read the last output, too, as one
    does whose packed sequence holds whole sessions; nothing needs it here. With it, and one
    noisy image a turn, rebuild / packed is 1.30, 1.85 and 2.64 at 3, 5 and 8 turns of 1026 tokens
    an image and 64 of text.
    """

    def pairs(tokens: int, past: int, causal: bool) -> int:
        return tokens * past + (tokens * (tokens + 1) // 2 if causal else tokens * tokens)

    context = Counts(0, 0, 0)
    rebuild, predicted = Counts(0, 0, 0), Counts(0, 0, 0)

    def add(a: Counts, tokens: int, attended: int, forwards: int = 1) -> Counts:
        return Counts(a.tokens + tokens, a.pairs + attended, a.forwards + forwards)

    def read(context: Counts) -> Counts:
        """An image."""
        context = add(context, image, pairs(image, context.tokens, False))
        return add(context, seen, pairs(seen, context.tokens, False)) if seen else context

    for said, places, question in zip(text, noisy, asked, strict=True):
        context = read(context)
        if question:
            answer = pairs(question, context.tokens, True)
            predicted = add(predicted, question, answer)
            rebuild = add(rebuild, context.tokens + question, context.pairs + answer)
        context = add(context, said, pairs(said, context.tokens, True))
        noise = pairs(image, context.tokens, False)
        predicted = add(predicted, places * image, places * noise, places)
        rebuild = add(
            rebuild, places * (context.tokens + image), places * (context.pairs + noise), places
        )
    if last_image:
        context = read(context)
    walk = add(context, predicted.tokens, predicted.pairs, predicted.forwards)
    return {"rebuild": rebuild, "walk": walk, "packed": Counts(walk.tokens, walk.pairs, 1)}


FORWARD_TOKENS = 100
"""Tokens that one more forward and backward of the layers costs besides its own. A walk of small
batches is mostly that."""

CPU_SPREAD = 0.12
"""On a CPU a packed token costs so much more than a walked one: the activations of all turns
together leave the caches. Both are fitted to the time of packed / walked replays of 3 turns with 2
places (embedded model, one core): 0.73 with
4 rollouts, 0.87 with 8, 0.90 with 16, 1.08 with 32; they give 0.73, 0.88, 0.98 and 1.05."""


def packed_is_cheaper(
    model: UnifiedModel, counts: dict[str, Counts], batch: int, forwards: int
) -> bool:
    """Whether `batch` rollouts cost less packed, in `forwards` forwards, than walked; no spread is
    known of a GPU."""
    c = model.config
    # Multiply-adds of one token in one layer, and of one (query, key) pair, with its scores and its
    # values.
    linear = c.hidden_size * (
        2 * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size
    )
    pair = 2 * c.hidden_size

    def cost(counted: Counts, calls: int, spread: float) -> float:
        return (
            batch * (counted.tokens + counted.pairs * pair / linear) * (1 + spread)
            + FORWARD_TOKENS * calls
        )

    spread = CPU_SPREAD if model.vae2llm.weight.device.type == "cpu" else 0.0
    walk = counts["walk"]
    return cost(counts["packed"], forwards, spread) < cost(walk, walk.forwards, 0.0)
