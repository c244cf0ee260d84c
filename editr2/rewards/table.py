"""The rewards that have a name.

A reward is one file with whatever `reward.function` takes (docs/rewards.md has the forms), and one
line here. Nothing is imported before it is asked for.
"""

from __future__ import annotations

WORLD = "world"
"""What judges where nothing else is named."""

REWARDS: dict[str, str] = {
    WORLD: "editr2.rewards.world:WorldReward",
    "pixels": "editr2.rewards.pixels:Pixels",
    "brightness": "editr2.rewards.brightness:Brightness",
}
"""Name -> `package.module:name`."""
