"""How the evaluations of two runs were sampled, where that is not alike: then a difference of their
scores is not of the weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from editr2.benchmarks.sides import Side

ALWAYS = (
    "rollout.shift",
    "policy.guidance",
    "policy.guidance_image",
    "policy.guidance_interval",
    "policy.guidance_embed",
)
OF_NOISE = (
    "rollout.dynamics",
    "rollout.noise_level",
    "rollout.window_range",
    "rollout.window_schedule",
)
"""Where both have steps with noise; without, they change nothing."""


def sampled_apart(sides: Sequence[Side]) -> list[str]:
    """A line for each run that was evaluated by another sampler than the first: by what."""
    first, lines = sides[0], []
    for other in sides[1:]:
        if not (first.sampling and other.sampling):
            continue  # without its settings nobody knows
        if apart := list(_apart(first.sampling, other.sampling)):
            lines.append(
                f"{first.name} and {other.name} were sampled differently, so that a difference is "
                f"not of the weights alone: {'; '.join(apart)}."
            )
    return lines


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    steps, noisy = ([of(config) for config in (a, b)] for of in (_steps, _noisy))
    if steps[0] != steps[1]:
        yield f"{steps[0]} and {steps[1]} denoising steps (eval.steps, else rollout.steps)"
    if noisy[0] != noisy[1]:
        yield f"{noisy[0]} and {noisy[1]} steps with noise (eval.sampler, rollout.window)"
    for name in (*ALWAYS, *(OF_NOISE if all(noisy) else ())):
        if name in a and name in b and a[name] != b[name]:
            yield f"{name} {_said(a[name])} and {_said(b[name])}"


def _steps(config: Mapping[str, Any]) -> Any:
    return config.get("eval.steps") or config.get("rollout.steps")


def _noisy(config: Mapping[str, Any]) -> Any:
    """An ODE has none, whatever the window of training."""
    return 0 if config.get("eval.sampler") == "ode" else config.get("rollout.window", 0)


def _said(value: object) -> str:
    return "none" if value is None else str(value)
