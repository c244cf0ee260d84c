"""Whole sessions as one packed sequence: equal to reading them segment by segment through contexts,
in one forward.

A session is a list of segments in logical order, public ones (images, instructions: the context)
and private ones (noisy images, questions with their answers: what is predicted). A token sees what
is public in earlier segments of its chain and its own segment, text only up to itself. This rule
(`may_look`) stands once; a dense mask, the block mask of `flex_attention` and attention segment by
segment are made from it.

Guidance's branches are segments more. Without the current instruction: the same noisy image,
private, where the instruction has not been said yet. Without images: the texts once more as a chain
of their own, at positions of their own, and the noisy image at its end.

Legend of shapes: B samples, L tokens, Q queries, K keys, N latent tokens, D numbers per latent
token, H hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from editr2.policies.base import autocast_dtype
from editr2.policies.unified.model import Attend, Context, UnifiedModel

SESSION, TEXTS = 0, 1
"""The chains of a session: all of it, and its texts alone."""


@dataclass
class Segment:
    """A stretch of a packed sequence, in logical order.

    ids: understanding tokens int64 [B, U] with `valid` bool [B, U]; latents: generation tokens [B,
    N, D] at time `t` ([B], or None for clean), whose marks are all valid; seen: understanding
    tokens of an image [B, M, H] behind such marks. A `private` segment (noisy image, question and
    answer) sees all public segments of its chain before it; nobody else sees it and it does not
    advance the position, which every chain counts for itself.
    """

    ids: Tensor
    valid: Tensor
    latents: Tensor | None = None
    t: Tensor | None = None
    private: bool = False
    seen: Tensor | None = None
    chain: int = SESSION

    @property
    def image(self) -> bool:
        """Whether all of its tokens see one another and share one position."""
        return self.latents is not None or self.seen is not None


class Tokens(NamedTuple):
    """What the mask rule asks of tokens: their segment, in logical order; their place within it,
    one for all tokens of an image; their chain; whether their segment is private; whether they are
    no padding."""

    segment: Tensor
    order: Tensor
    chain: Tensor
    private: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Layout:
    """What the mask rule knows of a sequence in physical order.

    segment, order, chain: int64 [L]; private: bool [L]; valid: bool [B, L], as in `Tokens`. pieces:
    (segment, private, tokens) of the stretches that make up the sequence.
    """

    segment: Tensor
    order: Tensor
    chain: Tensor
    private: Tensor
    valid: Tensor
    pieces: tuple[tuple[int, bool, int], ...]

    def __len__(self) -> int:
        return len(self.segment)

    def part(self, at: Tensor | slice, pieces: tuple[tuple[int, bool, int], ...] = ()) -> Layout:
        """The tokens at these indices."""
        one = (self.segment[at], self.order[at], self.chain[at], self.private[at])
        return Layout(*one, self.valid[:, at], pieces)

    def take(self, kept: Sequence[int]) -> Layout:
        """The pieces at these indices as a layout."""
        parts = [torch.arange(n) for _, _, n in self.pieces]
        starts = [sum(n for _, _, n in self.pieces[:i]) for i in range(len(self.pieces))]
        at = torch.cat([parts[i] + starts[i] for i in kept]).to(self.segment.device)
        return self.part(at, tuple(self.pieces[i] for i in kept))

    def behind(self, past: Layout) -> Layout:
        """The keys that these queries meet: `past`, then themselves."""
        return Layout(
            torch.cat([past.segment, self.segment]),
            torch.cat([past.order, self.order]),
            torch.cat([past.chain, self.chain]),
            torch.cat([past.private, self.private]),
            torch.cat([past.valid, self.valid], 1),
            past.pieces + self.pieces,
        )


def may_look(q: Tokens, k: Tokens) -> Tensor:
    """The mask rule, bool, for tensors that broadcast."""
    own = (q.segment == k.segment) & (q.order >= k.order)
    past = (q.segment > k.segment) & (q.chain == k.chain) & ~k.private
    # A padded query must look at something, else its softmax is NaN: at itself. Image tokens are
    # never padded.
    itself = (q.segment == k.segment) & (q.order == k.order)
    return (own | past) & (k.valid | itself)


def dense_mask(queries: Layout, keys: Layout) -> Tensor:
    """bool [B, Q, K], True = may look."""
    q, k = queries, keys
    segment, order, chain, private = (x[:, None] for x in (q.segment, q.order, q.chain, q.private))
    return may_look(
        Tokens(segment, order, chain, private, q.valid[:, :, None]),
        Tokens(k.segment, k.order, k.chain, k.private, k.valid[:, None]),
    )


def mask_mod(queries: Layout, keys: Layout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule as `flex_attention` wants it, over indices (sample, head, query, key)."""

    def tokens(x: Layout, b: Tensor, at: Tensor) -> Tokens:
        return Tokens(x.segment[at], x.order[at], x.chain[at], x.private[at], x.valid[b, at])

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return may_look(tokens(queries, b, q), tokens(keys, b, k))

    return mod


BLOCK = 128
"""Side of the squares that `flex_attention` leaves out where nothing in them is seen."""
AT_ONCE = 1 << 26
"""Numbers of the mask that are looked at together."""


def block_mask(queries: Layout, keys: Layout, *, block: int = BLOCK, at_once: int = AT_ONCE) -> Any:
    """`flex_attention`'s `BlockMask` of the rule. The library's own maker holds the mask of all
    queries and keys, which at three guided turns of 512 x 512 pixels is 0.6 GB a rollout, several
    times over; this one looks at some queries after the others."""
    from torch.nn.attention.flex_attention import BlockMask

    rows = max(1, at_once // (keys.valid.numel() * block)) * block
    counts = []
    for first in range(0, len(queries), rows):
        mask = dense_mask(queries.part(slice(first, first + rows)), keys)
        mask = F.pad(mask, (0, -mask.shape[2] % block, 0, -mask.shape[1] % block))
        counts.append(mask.unflatten(2, (-1, block)).unflatten(1, (-1, block)).sum((2, 4)))
    seen = torch.cat(counts, 1)[:, None]  # [B, 1, blocks of queries, blocks of keys]

    def listed(kind: Tensor) -> tuple[Tensor, Tensor]:
        those_first = kind.int().argsort(dim=-1, descending=True, stable=True)
        return kind.sum(-1).int(), those_first.int()

    some, whole = listed((seen > 0) & (seen < block**2)), listed(seen == block**2)
    return BlockMask.from_kv_blocks(
        some[0],
        some[1],
        whole[0],
        whole[1],
        BLOCK_SIZE=block,
        mask_mod=mask_mod(queries, keys),
        seq_lengths=(len(queries), len(keys)),
    )


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(queries: Layout, keys: Layout, compiled: bool = True) -> Attend:
    """Attention by `flex_attention` with a block mask. compiled: False is for tests without a
    GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(queries, keys)
    function: Any = _compiled_flex_attention() if compiled else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Autocast knows the dense form, not this one, which wants one precision.
        dtype = autocast_dtype(q.device) or v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

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
    nothing = torch.zeros(b, dtype=torch.int64, device=device)
    counters = dict.fromkeys((s.chain for s in segments), nothing)
    text_x, text_position, text_order, text_valid, text_pieces, text_slices = [], [], [], [], [], []
    image_x, image_position, image_pieces = [], [], []
    latent_slices: list[slice | None] = []
    text_at = image_at = 0
    for number, s in enumerate(segments):
        start = counters[s.chain]
        if not s.private:
            counters[s.chain] = start + (1 if s.image else s.valid.sum(1))
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

    def spread(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=device).repeat_interleave(widths)

    layout = Layout(
        spread([number for number, _, _ in pieces]),
        F.pad(torch.cat(text_order), (0, image_at)),
        spread([segments[number].chain for number, _, _ in pieces]),
        spread([hidden for _, hidden, _ in pieces]),
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


def worth_reading(segments: Sequence[Segment]) -> list[int]:
    """The numbers of the segments that anybody looks at: private ones, and the public ones that a
    private one of their chain follows."""
    last = {s.chain: number for number, s in enumerate(segments) if s.private}
    return [number for number, s in enumerate(segments) if number <= last.get(s.chain, -1)]


class Past(NamedTuple):
    """The public segments of a session, as they were read."""

    layout: Layout
    context: Context


def read_public(model: UnifiedModel, segments: Sequence[Segment], grid: tuple[int, int]) -> Past:
    """Reads the public segments: one pass through the layers."""
    public = pack(model, segments, grid, private=False)
    attend = attention(public.layout, public.layout)
    _, keys, values = model.run(public.embedded, public.split, public.position, attend, None)
    return Past(
        public.layout, Context(keys, values, public.layout.valid, public.position[:, -1] + 1)
    )


def run_private(
    model: UnifiedModel, segments: Sequence[Segment], grid: tuple[int, int], past: Past | None
) -> dict[int, Tensor]:
    """Final hidden states of the private segments by their number: [B, N, H] of a noisy image, [B,
    U, H] of text. One pass through the layers: over the private segments behind `past`, or, where
    gradients shall go through the public ones, over all of them (None)."""
    packed = pack(model, segments, grid, private=None if past is None else True)
    keys = packed.layout if past is None else packed.layout.behind(past.layout)
    attend, context = attention(packed.layout, keys), None if past is None else past.context
    hidden, _, _ = model.run(packed.embedded, packed.split, packed.position, attend, context)
    private = [number for number, s in enumerate(segments) if s.private]
    packed_at = private if past is None else range(len(private))
    return {
        number: hidden[:, packed.latent_slices[at] or packed.text_slices[at]]
        for number, at in zip(private, packed_at, strict=True)
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
    dropped: tuple[bool, bool] = (False, False),
    together: bool = False,
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
    an image and 64 of text. dropped: which branches guidance has, without the current instruction
    and without images. together: the walk predicts all of them in one forward, padded to the
    longest.
    """

    def pairs(tokens: int, past: int, causal: bool) -> int:
        return tokens * past + (tokens * (tokens + 1) // 2 if causal else tokens * tokens)

    context, texts = Counts(0, 0, 0), Counts(0, 0, 0)
    rebuild, walked, packed = Counts(0, 0, 0), Counts(0, 0, 0), Counts(0, 0, 0)

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
            walked, packed = add(walked, question, answer), add(packed, question, answer)
            rebuild = add(rebuild, context.tokens + question, context.pairs + answer)
        behind = [context] if dropped[0] else []
        context = add(context, said, pairs(said, context.tokens, True))
        behind.append(context)
        if dropped[1]:
            texts = add(texts, said, pairs(said, texts.tokens, True))
            behind.append(texts)
        for past in behind:
            noise = pairs(image, past.tokens, False)
            packed = add(packed, places * image, places * noise)
            rebuild = add(
                rebuild, places * (past.tokens + image), places * (past.pairs + noise), places
            )
            if not together:
                walked = add(walked, places * image, places * noise, places)
        if together:
            noise, n = pairs(image, context.tokens, False), places * len(behind)
            walked = add(walked, n * image, n * noise, places)
    if last_image:
        context = read(context)
    context = add(context, texts.tokens, texts.pairs, texts.forwards)
    walk = add(context, walked.tokens, walked.pairs, walked.forwards)
    return {
        "rebuild": rebuild,
        "walk": walk,
        "packed": Counts(context.tokens + packed.tokens, context.pairs + packed.pairs, 1),
    }


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
