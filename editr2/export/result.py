"""What an export is, and what was proven of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Carried:
    """From a base in float8, on which a LoRA trained, to the published one, as `Proof`. moved: the
    difference between the exported policy's answers on the two. lost: the same between what
    training changed on the one and on the other."""

    moved: float
    lost: float


@dataclass(frozen=True)
class Proof:
    """What the forwards showed, as root mean squares over all velocities and log-probs of the
    probe.

    size: of the exported policy's answers. effect: their difference to the base weights' (0:
    nothing was trained). rounding: to those of the policy as trained, before it took on the
    export's precision and form. error: the largest difference to those of the reloaded export,
    always 0 (any other stops the export). carried: None where it trained on the base that it is
    for.
    """

    size: float
    effect: float
    rounding: float
    error: float
    carried: Carried | None = None

    def __str__(self) -> str:
        if not self.effect:
            said = "but its predictions are the base's: nothing was trained"
        else:
            share = self.effect / max(self.size, 1e-30)
            said = f"it differs from the base by {share:.2%} of the prediction"
        if self.effect and self.rounding:
            said += f", {self.rounding / self.effect:.2%} of that lost or added by rounding"
        if self.carried is not None:
            moved = self.carried.moved / max(self.size, 1e-30)
            said += f"; on the fp8 base that it trained on its predictions were {moved:.2%} away"
            if self.effect:
                lost = self.carried.lost / self.effect
                said += f", and what training changed there differs by {lost:.2%} of itself"
        return f"reloaded, equal to the last bit; {said}"


@dataclass(frozen=True)
class Exported:
    """folder: what was written. kind: lora, merged or full. weights: ema or live. iteration: of the
    checkpoint,
    of so many planned. folding: the largest relative change of a number of a LoRA's B by taking
    alpha / rank into it; 0 where that is a power of two."""

    folder: Path
    kind: str
    weights: str
    iteration: int
    iterations: int
    proof: Proof
    folding: float = 0.0

    def __str__(self) -> str:
        stage = f"iteration {self.iteration} of {self.iterations}"
        if self.iteration < self.iterations:
            stage += " (unfinished: its newest checkpoint)"
        return f"{self.kind}, {self.weights} weights of {stage}: {self.folder}\nproof: {self.proof}"
