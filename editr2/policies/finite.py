"""Nothing that is not a finite number passes: weights when loaded and after a step, checkpoints,
all that a turn makes.

A NaN that goes on unseen ends as a black image, equal rewards, no advantage and an exit status of
0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from editr2.errors import DataError, NonFiniteError
from editr2.policies.base import AssembledPolicy, PixelPolicy, Policy, as_bytes, witness

LARGEST = 1e18
"""Weights beyond it are as useless as infinite ones: their squares leave float32."""

ACCEPTED = f"accepted: finite numbers below {LARGEST:.0e}"

LOOK_AT = {
    "velocity": "look at policy.weights and policy.dtype",
    "latents": "look at rollout.noise_level and rollout.store_dtype",
    "pixels": "look at the weights and the dtype of the autoencoder",
}
"""What a turn makes, in the order in which it is made, and what may be wrong."""


# ------------------------------------------------------------------------------------------ weights


def unusable(tensors: Iterable[tuple[str, Tensor]], limit: float = LARGEST) -> str | None:
    """The first name whose tensor holds NaN, infinity or something beyond `limit`; one wait for
    each device.

    Integers, empty tensors and those without data (meta) count as finite; of a tensor that is
    shared out, this process's part is looked at.
    """
    names: list[str] = []
    found: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for name, tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()
        if own.is_meta or not own.numel() or not own.is_floating_point():
            continue
        if own.itemsize == 1:  # float8 has few operators
            own = own.float()
        # A single pass whose result is finite exactly if all is; isfinite() makes a copy and takes
        # ten times as long.
        found.setdefault(own.device, []).append((len(names), torch.stack(own.aminmax()).float()))
        names.append(name)
    bad = []
    for parts in found.values():
        largest = torch.stack([extremes for _, extremes in parts]).abs().amax(1).cpu()
        bad += [
            at
            for (at, _), x in zip(parts, largest.tolist(), strict=True)
            if not (math.isfinite(x) and x <= limit)
        ]
    return names[min(bad)] if bad else None


def check_weights(policy: Policy, source: str) -> None:
    """All weights of a policy, those of its frozen parts too. Raises `NonFiniteError` that begins
    with `source`.

    Buffers may hold infinity, as masks do, but no NaN.
    """
    parts = policy.parts if isinstance(policy, AssembledPolicy) else {"": policy.module}
    for prefix, module in parts.items():
        dot = f"{prefix}." if prefix else ""
        name = unusable((dot + name, p) for name, p in module.named_parameters())
        name = name or unusable(
            (dot + n, b.nan_to_num(torch.nan, 0.0, 0.0)) for n, b in module.named_buffers()
        )
        if name is not None:
            raise NonFiniteError(f"{source}: {name}: NaN, infinite or too large ({ACCEPTED})")


def check_state(
    where: Path | str, tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Mapping[str, Any]
) -> None:
    """What a checkpoint holds: groups of weights by name, and an optimiser's state. Raises
    `NonFiniteError`."""
    weights = (
        (f"{group}.{name}", t) for group, held in tensors.items() for name, t in held.items()
    )
    name = unusable(weights) or unusable(_nested("optimizer", optimizer), torch.inf)
    if name is not None:
        what = f"{where}: {name}: NaN, infinite or too large"
        raise NonFiniteError(f"{what} ({ACCEPTED}); the checkpoints before it stand")


def _nested(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _nested(f"{name}.{key}", part)


# ----------------------------------------------------------------------------- what a turn has made


def read_turn(
    policy: Policy, latents: Tensor, velocity: Tensor
) -> tuple[np.ndarray, tuple[int, str] | None]:
    """Decodes a turn. latents: [M, *latent_shape], clean; velocity: [M], the sum of its velocities'
    `witness`.

    Returns the images (uint8 [M, H, W, 3], on the host) and what was not finite: (which of the M,
    its name), or None. Both come from the device in one copy, where the policy hands its pixels
    over (`PixelPolicy`); what becomes of a
    NaN in a `decode` of its own cannot be seen.
    """
    sums = {"velocity": velocity, "latents": witness(latents)}
    if isinstance(policy, PixelPolicy):
        pixels = policy.pixels(latents.float())
        sums["pixels"] = witness(pixels)
        made = as_bytes(pixels)
        finite = torch.stack([s.to(made.device) for s in sums.values()]).isfinite()
        read = torch.cat([made.flatten(), finite.flatten().byte()]).cpu()
        images, finite = (
            read[: made.numel()].view(made.shape).numpy(),
            read[made.numel() :].view(finite.shape).bool(),
        )
    else:
        images = np.asarray(policy.decode(latents.float()))
        if images.dtype != np.uint8:
            name = f"{type(policy).__name__}.decode"
            raise DataError(
                f"{name}: {images.dtype} (accepted: uint8 [B, H, W, 3]; numbers are given by "
                f"`pixels`)"
            )
        finite = torch.stack(list(sums.values())).isfinite().cpu()
    bad = (~finite).nonzero()
    return images, (int(bad[0, 1]), list(sums)[int(bad[0, 0])]) if len(bad) else None
