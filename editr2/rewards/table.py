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
    "edit-r2": "editr2.rewards.edit_r2:EditR2",
    "edival": "editr2.rewards.edival:Edival",
    "pku": "editr2.rewards.pku:Pku",
    "editscore": "editr2.rewards.editscore:EditScore",
    "viescore": "editr2.rewards.viescore:VieScore",
    "unifiedreward": "editr2.rewards.unifiedreward:UnifiedReward",
    "imgedit": "editr2.rewards.imgedit:ImgEdit",
    "rational": "editr2.rewards.rational:Rational",
    "verifier": "editr2.rewards.verifier:Verifier",
    "human": "editr2.rewards.human:Human",
}
"""Name -> `package.module:name`."""
