# pyright: strict
"""Settings, sessions, a training run and edits with what came of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from judge import REWARD, kept
from numpy.typing import NDArray
from PIL import Image

import editr2
from editr2 import Config, Policy, Session, Turn, UserError, preset_config, replace_nested, train


def settings(out: Path) -> Config:
    config = replace_nested(
        preset_config("edit-r2"), {"out": str(out), "train": {"iterations": 20, "lr": 1e-4}}
    )
    rate: float = config.train.lr
    assert rate == 1e-4 and config.policy.lora_rank >= 0
    return config


def sessions(folder: Path) -> list[Session]:
    image: NDArray[np.uint8] = np.zeros((24, 24, 3), np.uint8)
    turns = (
        Turn("add a cross top left", task="add"),
        Turn("paint it green", intent="a green cross"),
    )
    editr2.save_sessions([Session("a", image, turns, "cm")], folder)
    return list(editr2.load_sessions(folder))


def trained(out: Path, policy: Policy | None = None) -> Path:
    run: Path = train(settings(out), policy=policy, reward=REWARD)
    try:
        train(settings(out), reward=kept, profile=True)
    except UserError as error:
        print(f"error: {error}")
    page: Path = editr2.build_report(run)
    return page


def edits(run: Path) -> list[str]:
    steps = editr2.edit("kitchen.png", ["add a red cup", "make it blue"], policy=run, mode="cu")
    last: Image.Image = steps[-1].image
    last.save("blue.png")
    editor = editr2.Editor(run, {"eval": {"steps": 28}})
    step = editor.start(last, seed=3).edit("remove it")
    return [step.instruction or "", step.intent or "", str(step.pixels.shape)]


version: str = editr2.__version__
