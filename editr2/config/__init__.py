"""The settings of a run: what they are, where they start, and what they demand of each other.

Precedence: field defaults, then `--preset`, then `--config file.yaml`, then flags.
"""

from editr2.config.presets import (
    PRESETS,
    UNSET_WEIGHTS,
    preset_config,
    replace_nested,
)
from editr2.config.rules import folder_problem, noise_problem, settings_problems
from editr2.config.settings import (
    CheckpointConfig,
    Config,
    CreditConfig,
    DataConfig,
    DriftConfig,
    EvalConfig,
    PolicyConfig,
    RewardConfig,
    RewardUse,
    RolloutConfig,
    TrainConfig,
)

__all__ = [
    "PRESETS",
    "UNSET_WEIGHTS",
    "CheckpointConfig",
    "Config",
    "CreditConfig",
    "DataConfig",
    "DriftConfig",
    "EvalConfig",
    "PolicyConfig",
    "RewardConfig",
    "RewardUse",
    "RolloutConfig",
    "TrainConfig",
    "folder_problem",
    "noise_problem",
    "preset_config",
    "replace_nested",
    "settings_problems",
]
