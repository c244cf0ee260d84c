"""What `rollout.prune: filter` saves of an iteration of the embedded model on the shapes world.

Gate: the gradient is that of an iteration which rolls everything out. The learning rate is 0, so
every round does the same work; judging is the world's, on the calling thread in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.frame import Phases
from bench.test_iteration import Ours, make_config
from editr2.policies.unified.policy import UnifiedPolicy

WHOLE, PRUNED = "peer: off", "filter"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "groups, siblings, turns",
    [(2, 8, 3), pytest.param(6, 8, 3, marks=pytest.mark.full)],
    ids=lambda n: str(n),
)
def test_pruning(groups: int, siblings: int, turns: int, compare: Callable[..., Any]) -> None:
    policy = UnifiedPolicy.load()
    runs = {
        name: Ours(make_config(groups, siblings, turns, rollout={"prune": prune}), policy)
        for name, prune in ((WHOLE, "off"), (PRUNED, "filter"))
    }
    counted: dict[str, dict[str, int]] = {}

    def gate() -> dict[str, float]:
        found = {name: run.result() for name, run in runs.items()}
        for name, result in found.items():
            counted[name] = {"denoised_rollouts": sum(map(len, result.text))}
        whole, pruned = found[WHOLE], found[PRUNED]
        assert counted[PRUNED]["denoised_rollouts"] < counted[WHOLE]["denoised_rollouts"]
        assert (whole.advantage - pruned.advantage).abs().max() == 0
        largest = whole.gradient.abs().max()
        assert largest > 0
        error = float((whole.gradient - pruned.gradient).abs().max() / largest)
        assert error <= 1e-4, f"gradient differs by {error} of its largest entry"
        return {PRUNED: error}

    phases = Phases(runs)

    def extra(name: str) -> dict[str, Any]:
        return {"phases_s": phases.medians(name), **counted[name]}

    compare(
        op="pruning",
        mode=f"{turns} turns, embedded model",
        shape=(groups, siblings, turns),
        dtype="fp32",
        providers=phases.providers(),
        gate=gate,
        extra=extra,
        seconds=30.0,
        min_rounds=5,
    )
