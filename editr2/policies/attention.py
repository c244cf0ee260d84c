"""`policy.attention`: which of diffusers' backends the transformer's attention runs on.

A backend is asked for by name and never fallen back from. Whether it is installed is known when the
weights are loaded; whether it works on the device, at the dtype in use, with masks and with
gradients where they are needed, is seen by asking it once, beside torch's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from editr2.errors import ConfigError, one_line
from editr2.policies.libraries import quiet_libraries

APART = 0.05
"""Of the norm, how far an answer or a gradient may lie from torch's own: room for products in 8
bits. A mask or a gradient that is dropped lies all of it away."""


def names() -> list[str]:
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [backend.value for backend in AttentionBackendName]


def problem_of(name: str) -> str | None:
    """What is wrong with a name; nothing is loaded."""
    known = names()
    return None if name in known else f"policy.attention: {name!r} (accepted: {', '.join(known)})"


def usable() -> Iterator[str]:
    """The names whose packages are installed; kernels that the hub hands out are not asked for."""
    from diffusers.models.attention_dispatch import attention_backend

    for name in names():
        if name.endswith("_hub"):
            continue
        try:
            with attention_backend(name):
                yield name
        except (RuntimeError, ValueError, ImportError):
            continue


def attend_by(module: Any, name: str) -> None:
    """Raises `ConfigError` for a backend that is not there."""
    from diffusers.models.attention_dispatch import attention_backend

    if problem := problem_of(name):
        raise ConfigError(problem)
    try:
        # diffusers would make it the whole process's; inside, that stays what it was.
        with quiet_libraries(), attention_backend():
            module.set_attention_backend(name)
    except Exception as error:  # a kernel's package raises anything when it is imported
        raise _refusal(name, "here", one_line(error), usable()) from error


def try_out(
    name: str, width: int, device: torch.device, dtype: torch.dtype, *, masks: bool, trains: bool
) -> None:
    """Raises `ConfigError` for a backend that does not give attention over heads of `width` on the
    device. masks: with masked keys, too. trains: with gradients."""

    def wrong(backend: str) -> str | None:
        return _wrong(backend, width, device, dtype, masks=masks, trains=trains)

    if why := wrong(name):
        others = [other for other in usable() if other != name and not wrong(other)]
        raise _refusal(name, f"on device {device} in {dtype}", why, others)


def _wrong(
    name: str, width: int, device: torch.device, dtype: torch.dtype, *, masks: bool, trains: bool
) -> str | None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    given = torch.randn(3, 1, 128, 2, width, generator=torch.Generator().manual_seed(0))
    seen = torch.arange(128, device=device)[None, None, None] < 96

    def answers(backend: str, mask: Tensor | None) -> Sequence[Tensor]:
        query, key, value = (t.to(device, dtype).requires_grad_(trains) for t in given)
        with torch.enable_grad():
            out = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)
            if trains:
                out.float().square().sum().backward()
        return [t for t in (out.detach(), query.grad, key.grad, value.grad) if t is not None]

    for mask in (None, seen) if masks else (None,):
        try:
            with quiet_libraries():
                expected, found = answers("native", mask), answers(name, mask)
        except Exception as error:  # a kernel's package raises anything
            return one_line(error)
        pairs = zip(found, expected, strict=False)
        apart = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)
        if len(found) < len(expected):
            return "it has no gradients"
        if not apart <= APART:
            return f"{'masked ' if mask is not None else ''}answers {apart:.0%} apart from torch's"
    return None


def _refusal(name: str, where: str, why: str, others: Iterable[str]) -> ConfigError:
    return ConfigError(f"policy.attention: {name} (accepted {where}: {', '.join(others)}; {why})")
