"""The unified text + image transformer (BAGEL's architecture and parameter names, any size).

One decoder reads text, clean images and a noisy image, writes text, and predicts the velocity of
the noisy image
(v = noise - data, from t = 1 noise to t = 0 data). Every layer holds two experts, routed by token
type: *understanding* (text and image marks) and *generation* (image latents; parameters with the
suffix `_moe_gen`); attention is joint.

Physical order. Within any block handed to the layers all understanding tokens stand first and all
generation tokens after them, so routing is two slices instead of a gather, and the two streams are
joined for
attention alone. The true order lives in the RoPE positions and the mask only:
text is causal and advances the position by one a token; all tokens of an image block share one
position and the block advances it by one; a noisy block sees everything before it and is seen by
nobody.

Legend of shapes: B samples, L tokens of the block, K cached tokens, H hidden, N latent tokens, D
numbers per latent token, heads x head_dim as in the configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from editr2.errors import ConfigError, DataError
from editr2.policies.base import autocast_dtype
from editr2.policies.tensor_files import read_json

T = TypeVar("T")

LARGEST_SIZE = 1 << 20
LARGEST = {
    "num_hidden_layers": 1024,
    "latent_patch_size": 256,
    "latent_channels": 1024,
    "max_latent_size": 4096,
}
"""Of sizes in a file: far above any model, far below what would fill the host before the weights
are compared."""


@dataclass(frozen=True)
class UnifiedConfig:
    """Sizes of the model. Defaults: the embedded small model; names follow the Qwen2 and BAGEL
    configurations."""

    vocab_size: int = 64
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    latent_channels: int = 3  # 16 for FLUX's autoencoder; 3 where pixels are the latents
    latent_patch_size: int = 4
    max_latent_size: int = 6  # side of the position table, in latent tokens
    frequency_size: int = 256  # sinusoidal features of the time embedder

    def __post_init__(self) -> None:
        if (
            self.hidden_size % self.num_attention_heads
            or self.num_attention_heads % self.num_key_value_heads
        ):
            raise ConfigError(
                f"num_attention_heads: {self.num_attention_heads} must divide hidden_size "
                f"{self.hidden_size} and be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.hidden_size % 4 or self.head_dim % 2:
            raise ConfigError(
                f"hidden_size: {self.hidden_size} must be a multiple of 4, with an even head size"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def latent_dim(self) -> int:
        return self.latent_patch_size**2 * self.latent_channels

    @staticmethod
    def load(path: Path) -> UnifiedConfig:
        """A file that `UnifiedPolicy.save` wrote. Raises `CheckpointError` or `ConfigError` naming
        the key."""
        values = read_json(path)
        fields: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(UnifiedConfig)}
        if unknown := sorted(set(values) - set(fields)):
            raise ConfigError(f"{path}: unknown keys {unknown} (accepted: {', '.join(fields)})")
        if gone := sorted(set(fields) - set(values)):
            raise ConfigError(f"{path}: {gone[0]}: missing (accepted: all of {', '.join(fields)})")
        for name, default in fields.items():
            given, kind = values[name], type(default)
            if kind is bool:
                fits, accepted = isinstance(given, bool), "true or false"
            elif kind is int:
                most = LARGEST.get(name, LARGEST_SIZE)
                fits, accepted = (
                    type(given) is int and 1 <= given <= most,
                    f"a whole number, 1 to {most}",
                )
            else:
                fits = type(given) in (int, float) and 0 < given < math.inf
                accepted = "a number above 0"
            if not fits:
                raise ConfigError(f"{path}: {name}: {given!r} (accepted: {accepted})")
        try:
            return UnifiedConfig(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


Reach = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""New keys and values of a block, [B, kv_heads, L, head_dim] each -> those of the past with the new
ones behind."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention in a form of its own: queries, keys and values [B, heads, ., head_dim] -> [B, heads, L,
head_dim]."""

Mask = Tensor | Attend | None
"""A boolean mask (True = may look) for dense attention, `Attend`, or None: everything sees
everything."""

Streams = dict[str, Tensor]
"""A block's hidden states by expert, the key being the suffix of the expert's parameters: "" for
understanding, then `_moe_gen` for generation. An expert without tokens is left out, so most layers'
work is done in place, without gathers.
"""


def _streams(x_BLH: Tensor, split: int) -> Streams:
    parts = {"": x_BLH[:, :split], "_moe_gen": x_BLH[:, split:]}
    return {suffix: x for suffix, x in parts.items() if x.shape[1]}


def _join(parts: Iterable[Tensor]) -> Tensor:
    """The block of the streams, understanding first."""
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        size, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        for suffix in ("", "_moe_gen"):
            self.add_module(f"q_proj{suffix}", nn.Linear(size, size))
            self.add_module(f"k_proj{suffix}", nn.Linear(size, kv))
            self.add_module(f"v_proj{suffix}", nn.Linear(size, kv))
            self.add_module(f"o_proj{suffix}", nn.Linear(size, size, bias=False))
            for name in ("q_norm", "k_norm"):
                norm = (
                    RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                )
                self.add_module(f"{name}{suffix}", norm)

    def project(self, streams: Streams, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the block, [B, heads, L, head_dim]. Keys are kept in the
        values' precision, which is the computing one: rotated in float32 they would be twice as
        large and attention would round them to it anyway."""

        def project(name: str, heads: int, normed: bool) -> Tensor:
            parts = []
            for suffix, x in streams.items():
                y = getattr(self, f"{name}_proj{suffix}")(x).unflatten(-1, (heads, self.head_dim))
                parts.append(getattr(self, f"{name}_norm{suffix}")(y) if normed else y)
            return _join(parts).transpose(1, 2)

        q, k = project("q", self.heads, True), project("k", self.kv_heads, True)
        v = project("v", self.kv_heads, False)
        return _rotate(q, cos, sin), _rotate(k, cos, sin).to(v.dtype), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if mask is None or isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads
            )
        return mask(q, k, v)

    def give(self, streams: Streams, out: Tensor) -> Streams:
        """What was attended to, [B, heads, L, head_dim], as the streams take it."""
        parts = out.transpose(1, 2).flatten(2).split([x.shape[1] for x in streams.values()], dim=1)
        attended = zip(streams, parts, strict=True)
        return {suffix: getattr(self, f"o_proj{suffix}")(part) for suffix, part in attended}


class Layer(nn.Module):
    """Everything but attention depends on the block alone, not on what was read before, so these
    two parts have few shapes: they are what is compiled (`policies.blocks`)."""

    compiled_parts = ("before", "behind")
    takes_all = False
    """As of `UnifiedModel`."""

    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        for suffix in ("", "_moe_gen"):
            self.add_module(f"mlp{suffix}", MLP(config.hidden_size, config.intermediate_size))
            self.add_module(
                f"input_layernorm{suffix}", RMSNorm(config.hidden_size, config.rms_norm_eps)
            )
            self.add_module(
                f"post_attention_layernorm{suffix}",
                RMSNorm(config.hidden_size, config.rms_norm_eps),
            )

    def forward(
        self, streams: Streams, cos: Tensor, sin: Tensor, mask: Mask, reach: Reach | None
    ) -> tuple[Streams, tuple[Tensor, Tensor]]:
        if self.takes_all:
            streams = dict(zip(streams, _take_all(self, streams.values()), strict=True))
        q, k, v = self.before(streams, cos, sin)
        seen = (k, v) if reach is None else reach(k, v)
        return self.behind(streams, self.self_attn.attend(q, *seen, mask)), (k, v)

    def before(self, streams: Streams, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = {
            suffix: getattr(self, f"input_layernorm{suffix}")(x) for suffix, x in streams.items()
        }
        queries: tuple[Tensor, Tensor, Tensor] = self.self_attn.project(normed, cos, sin)
        return queries

    def behind(self, streams: Streams, out: Tensor) -> Streams:
        attended, result = self.self_attn.give(streams, out), {}
        for suffix, x in streams.items():
            x = x + attended[suffix]
            normed_x = getattr(self, f"post_attention_layernorm{suffix}")(x)
            result[suffix] = x + getattr(self, f"mlp{suffix}")(normed_x)
        return result


class _TakeAll(torch.autograd.Function):
    """The streams as they are. Backward, once all that stands behind them is done: parameters to
    which nothing gave a gradient get zeros."""

    @staticmethod
    def forward(ctx: Any, count: int, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.parameters = given[count:]
        return tuple(x.view_as(x) for x in given[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rest = (torch.zeros_like(p) if p.grad is None else None for p in ctx.parameters)
        return None, *grads, *rest


def _take_all(module: nn.Module, given: Iterable[Tensor], but: nn.Module | None = None) -> Any:
    """The tensors, behind which every trained parameter of the module has a gradient. but: a part
    of it that sees to its own."""
    if not torch.is_grad_enabled():
        return tuple(given)
    own = set(but.parameters()) if but is not None else set()
    tensors = tuple(given)
    trained = (p for p in module.parameters() if p.requires_grad and p not in own)
    return _TakeAll.apply(len(tensors), *tensors, *trained)


def _computed_again(layer: Layer, *given: Any) -> Any:
    return checkpoint(layer.__call__, *given, use_reentrant=False)


class _Decoder(nn.Module):
    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden_size, config.rms_norm_eps)


class _LanguageModel(nn.Module):
    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class _TimeEmbedder(nn.Module):
    """256 sinusoidal features of the raw t in [0, 1] (cosines first, period up to 10,000), then two
    linear layers."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
        angles = t.float()[..., None] * torch.exp(-math.log(10_000.0) * exponents)
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


class _PositionTable(nn.Module):
    """Frozen 2-D sine-cosine table [side * side, hidden]: the first half of the width from the
    column, then the row."""

    def __init__(self, side: int, hidden: int) -> None:
        super().__init__()
        quarter = hidden // 4
        omega = 1.0 / 10_000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
        grid = torch.arange(side, dtype=torch.float64)
        row, column = torch.meshgrid(grid, grid, indexing="ij")

        def features(position: Tensor) -> Tensor:
            angles = position.reshape(-1, 1) * omega
            return torch.cat([angles.sin(), angles.cos()], dim=1)

        table = torch.cat([features(column), features(row)], dim=1).float()
        self.pos_embed = nn.Parameter(table, requires_grad=False)


@dataclass(frozen=True)
class Context:
    """What the model has read so far. Immutable: appending returns a new one, so branches and
    siblings are free.

    keys, values: per layer [B, kv_heads, K, head_dim]; valid: bool [B, K] (False at padding);
    position: int64 [B], the RoPE position of the next token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    valid: Tensor
    position: Tensor

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    @cached_property
    def padded(self) -> bool:
        """Whether anything here is padding; looked up once a context, since on a GPU looking
        waits."""
        return bool(self.valid.shape[1]) and not bool(self.valid.all())

    def reach(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys[layer], k], dim=2), torch.cat([self.values[layer], v], dim=2)

    def select(self, index: Tensor) -> Context:
        """The samples at `index` int64 [M] (repeats allowed): siblings share the context of their
        group this way."""
        return Context(
            tuple(k[index] for k in self.keys),
            tuple(v[index] for v in self.values),
            self.valid[index],
            self.position[index],
        )

    def detach(self) -> Context:
        return Context(
            tuple(k.detach() for k in self.keys),
            tuple(v.detach() for v in self.values),
            self.valid,
            self.position,
        )

    def pad(self, length: int) -> Context:
        """With masked tokens at the end, `length` in all."""
        more = length - self.valid.shape[1]
        keys, values = (
            tuple(F.pad(x, (0, 0, 0, more)) for x in layers) for layers in (self.keys, self.values)
        )
        return Context(keys, values, F.pad(self.valid, (0, more)), self.position)

    @staticmethod
    def join(parts: Sequence[Context]) -> Context:
        """Contexts of different lengths as one batch; shorter ones are padded (and masked) at the
        end."""
        longest = max(p.valid.shape[1] for p in parts)
        padded = [p if p.valid.shape[1] == longest else p.pad(longest) for p in parts]
        layers = range(len(parts[0].keys))
        return Context(
            tuple(torch.cat([p.keys[i] for p in padded]) for i in layers),
            tuple(torch.cat([p.values[i] for p in padded]) for i in layers),
            torch.cat([p.valid for p in padded]),
            torch.cat([p.position for p in padded]),
        )


register_dataclass(Context)  # see `policies.base`


class Branch:
    """A copy of a context with room for `capacity` more tokens, written in place: for text decoded
    token by token, where copying the whole past at every token would cost more than the token."""

    def __init__(self, context: Context, capacity: int) -> None:
        def room(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(*x.shape[:2], capacity, x.shape[3])], dim=2)

        self.keys, self.values = [room(k) for k in context.keys], [room(v) for v in context.values]
        self.valid = F.pad(context.valid, (0, capacity), value=False)
        self.position = context.position
        self.length = context.valid.shape[1]

    def reach(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class UnifiedModel(nn.Module):
    """See the module docstring. Parameter names equal those of a published BAGEL checkpoint
    (without its ViT)."""

    _repeated_blocks = ("Layer",)
    """As diffusers has it: what is gathered at once where weights are shared out."""

    def __init__(self, config: UnifiedConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = _LanguageModel(config)
        self.time_embedder = _TimeEmbedder(config.frequency_size, config.hidden_size)
        self.vae2llm = nn.Linear(config.latent_dim, config.hidden_size)
        self.llm2vae = nn.Linear(config.hidden_size, config.latent_dim)
        self.latent_pos_embed = _PositionTable(config.max_latent_size, config.hidden_size)
        self._again: Callable[..., Any] | None = None
        self.takes_all = False

    def share_out(self) -> None:
        """From here on every pass through the layers gives all that trains a gradient, zeros where
        it had no part: words alone leave the other expert out, and a process that reads them adds
        its gradients up with those of one that paints, block by block."""
        for module in (self, *self.language_model.model.layers):
            module.takes_all = True

    @classmethod
    def from_config(cls, config: UnifiedConfig) -> UnifiedModel:
        """As diffusers' models are made of theirs."""
        return cls(config)

    def enable_gradient_checkpointing(self, again: Callable[..., Any] | None = None) -> None:
        """Layers' activations are computed again in the backward pass. again: called with a layer
        and what it is given, in place of the layer; by default all are computed again."""
        self._again = again or _computed_again

    def disable_gradient_checkpointing(self) -> None:
        self._again = None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Normal(0, 0.02) weights, residual outputs scaled by 1/sqrt(2 layers), zero biases and
        velocity head."""
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if "norm" in name or "pos_embed" in name:
                continue
            with torch.no_grad():
                if parameter.ndim == 1 or name.startswith("llm2vae"):
                    parameter.zero_()
                else:
                    std = residual if "o_proj" in name or "down_proj" in name else 0.02
                    if name == "vae2llm.weight":
                        std = parameter.shape[1] ** -0.5
                    parameter.normal_(0, std, generator=generator)

    def forward(self, work: Callable[[UnifiedModel], T]) -> T:
        """Runs work on the model. Whoever may have shared its weights out (`policies.sharding`)
        calls it through here, where they are put together."""
        return work(self)

    # ------------------------------------------------------------------------------ the two streams

    def embed_text(self, ids: Tensor) -> Tensor:
        return self.language_model.model.embed_tokens(ids)

    def embed_seen(self, seen_BMH: Tensor) -> Tensor:
        """What understanding sees of an image, in the precision of the words."""
        return seen_BMH.to(self.language_model.model.embed_tokens.weight.dtype)

    def embed_latents(self, latents_BND: Tensor, t: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latent tokens [B, N, D] at time t ([B] or a 0-dim tensor) on a (rows, columns) grid ->
        [B, N, H]."""
        rows, columns = grid
        side = self.config.max_latent_size
        if rows > side or columns > side or rows * columns != latents_BND.shape[1]:
            raise DataError(
                f"latents: {latents_BND.shape[1]} tokens on a {rows} x {columns} grid (accepted: "
                f"sides up to {side})"
            )
        device = latents_BND.device
        index = (
            torch.arange(rows, device=device)[:, None] * side + torch.arange(columns, device=device)
        ).reshape(-1)
        time = self.time_embedder(t)
        x = self.vae2llm(latents_BND.to(self.vae2llm.weight.dtype))
        return (
            x
            + (time[:, None] if time.ndim == 2 else time)
            + self.latent_pos_embed.pos_embed[index].to(x.dtype)
        )

    def run(
        self,
        x_BLH: Tensor,
        split: int,
        position_BL: Tensor,
        mask: Mask,
        context: Context | Branch | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All layers over a block (understanding tokens first, `split` of them) behind a context.

        mask: bool, broadcastable to [B, heads, L, K + L], or attention of another form. Returns the
        final hidden states [B, L, H] and the block's own keys and values per layer.
        """
        half = self.config.head_dim // 2
        exponents = torch.arange(half, device=x_BLH.device, dtype=torch.float32) / half
        angles = position_BL[:, None, :, None].float() * self.config.rope_theta ** (-exponents)
        cos, sin = angles.cos().to(x_BLH.dtype), angles.sin().to(x_BLH.dtype)
        if self.takes_all:
            (x_BLH,) = _take_all(self, [x_BLH], self.language_model.model.layers)
        keys, values, streams = [], [], _streams(x_BLH, split)
        again = self._again if torch.is_grad_enabled() else None
        for i, layer in enumerate(self.language_model.model.layers):
            reach = partial(context.reach, i) if context is not None else None
            given = (streams, cos, sin, mask, reach)
            streams, (k, v) = again(layer, *given) if again else layer(*given)
            keys.append(k)
            values.append(v)
        final = (
            getattr(self.language_model.model, f"norm{suffix}")(x) for suffix, x in streams.items()
        )
        return _join(final), tuple(keys), tuple(values)

    # -------------------------------------------------------------------------- reading and writing

    def empty_context(self, batch: int, device: torch.device | str = "cpu") -> Context:
        c = self.config
        dtype = autocast_dtype(torch.device(device)) or self.vae2llm.weight.dtype
        nothing = torch.zeros(
            batch, c.num_key_value_heads, 0, c.head_dim, device=device, dtype=dtype
        )
        return Context(
            (nothing,) * c.num_hidden_layers,
            (nothing,) * c.num_hidden_layers,
            torch.zeros(batch, 0, dtype=torch.bool, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
        )

    @staticmethod
    def _extend(
        context: Context, keys: tuple, values: tuple, valid: Tensor, advance: Tensor | int
    ) -> Context:
        return Context(
            tuple(torch.cat([old, new], 2) for old, new in zip(context.keys, keys, strict=True)),
            tuple(
                torch.cat([old, new], 2) for old, new in zip(context.values, values, strict=True)
            ),
            torch.cat([context.valid, valid], 1),
            context.position + advance,
        )

    def append_text(self, context: Context, ids: Tensor, valid: Tensor) -> tuple[Context, Tensor]:
        """Reads text. ids int64 [B, L], valid bool [B, L] (padding only at the end).

        Returns the longer context and the final hidden states [B, L, H] (for `logits`).
        """
        hidden, keys, values = self._text_block(context, context.valid, ids, valid)
        return self._extend(context, keys, values, valid, valid.sum(1)), hidden

    def text_hidden(self, context: Context, ids: Tensor, valid: Tensor) -> Tensor:
        """The hidden states of `append_text` alone, where nothing will read what was read:
        differentiable."""
        return self._text_block(context, context.valid, ids, valid)[0]

    def extend_branch(self, branch: Branch, ids: Tensor, valid: Tensor) -> Tensor:
        """`append_text` in place: the same hidden states [B, L, H]; no gradient. Raises ValueError
        beyond capacity."""
        start, end = branch.length, branch.length + ids.shape[1]
        if end > branch.valid.shape[1]:
            raise ValueError(f"branch: {end} tokens in a capacity of {branch.valid.shape[1]}")
        hidden, _, _ = self._text_block(branch, branch.valid[:, :start], ids, valid)
        branch.valid[:, start:end] = valid
        branch.position = branch.position + valid.sum(1)
        branch.length = end
        return hidden

    def _text_block(
        self, context: Context | Branch, past: Tensor, ids: Tensor, valid: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        length = ids.shape[1]
        offsets = torch.arange(length, device=ids.device)
        own = (offsets[:, None] >= offsets) & valid[:, None, :]
        # A padded query must look at something, else its softmax is NaN: at itself.
        own = own | torch.eye(length, dtype=torch.bool, device=ids.device)
        mask = torch.cat([past[:, None, :].expand(-1, length, -1), own], dim=2)
        position = context.position[:, None] + offsets
        return self.run(self.embed_text(ids), length, position, mask[:, None], context)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.language_model.lm_head(hidden)

    def _image_block(
        self, context: Context, latents: Tensor, t: Tensor, grid: tuple[int, int], marks: Tensor
    ) -> tuple[Tensor, tuple, tuple]:
        b = len(latents)
        x = torch.cat(
            [
                self.embed_text(marks).expand(b, -1, -1),
                self.embed_latents(latents, t, grid).to(self.vae2llm.weight.dtype),
            ],
            1,
        )
        return self._block(context, x, 2)

    def _block(
        self, context: Context, x: Tensor, split: int
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """All of an image's tokens x [B, L, H], `split` of understanding, which see one another and
        share one position."""
        b, length, _ = x.shape
        mask = None
        if context.padded:
            mask = F.pad(context.valid, (0, length), value=True)[:, None, None, :]
        position = context.position[:, None].expand(b, length)
        return self.run(x, split, position, mask, context)

    def append_image(
        self, context: Context, latents: Tensor, grid: tuple[int, int], marks: Tensor
    ) -> Context:
        """Reads a clean image: latents [B, N, D] at t = 0 between the two `marks` (ids int64
        [2])."""
        b, n, _ = latents.shape
        _, keys, values = self._image_block(
            context, latents, torch.zeros((), device=latents.device), grid, marks
        )
        valid = torch.ones(b, n + 2, dtype=torch.bool, device=latents.device)
        return self._behind(context, keys, values, valid)

    def append_seen(self, context: Context, seen: Tensor, marks: Tensor) -> Context:
        """Reads what understanding sees of the image before it, [B, M, H], between the same two
        marks."""
        x = torch.cat([self.embed_text(marks).expand(len(seen), -1, -1), self.embed_seen(seen)], 1)
        _, keys, values = self._block(context, x, x.shape[1])
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self._behind(context, keys, values, valid)

    def _behind(self, context: Context, keys: tuple, values: tuple, valid: Tensor) -> Context:
        """Behind an image's tokens, of which none is padding: known without a look."""
        longer = self._extend(context, keys, values, valid, 1)
        longer.__dict__["padded"] = context.padded
        return longer

    def velocity(
        self, context: Context, x: Tensor, t: Tensor, grid: tuple[int, int], marks: Tensor
    ) -> Tensor:
        """Velocity of the noisy latents x [B, N, D] at times t [B], in x's place after the context:
        [B, N, D]."""
        hidden, _, _ = self._image_block(context, x, t, grid, marks)
        return self.llm2vae(hidden[:, 2:])
