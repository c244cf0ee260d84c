"""From settings to a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from editr2.config import PolicyConfig
from editr2.policies.unified import EMBEDDED, Guidance, UnifiedPolicy
from editr2.policies.weights import add_lora


def load_policy(config: PolicyConfig) -> UnifiedPolicy:
    """The configured weights with their guidance, and adapters where they are asked for."""
    guidance = Guidance(config.guidance, config.guidance_image, cast(Any, config.renorm))
    policy = UnifiedPolicy.load(Path(config.weights) if config.weights else EMBEDDED, guidance)
    if config.lora_rank:
        add_lora(policy.module, config.lora_rank, config.lora_alpha)
    return policy
