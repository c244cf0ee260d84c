"""What a type checker has to find: an error in every line that says so."""

from __future__ import annotations

from editr2 import Config, Score, edit, replace_nested, train
from editr2_kernels import sde_step

config = replace_nested(Config(), {})
rate = config.train.learning_rate  # error
lr: str = config.train.lr  # error
train("runs/mine")  # error
edit("kitchen.png")  # error
Score("0.5")  # error
sde_step(1.0)  # error
