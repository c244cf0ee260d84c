"""Good policy folders of every kind, from tiny random models, and the settings that name them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from editr2.config import PolicyConfig
from editr2.policies.load import load_policy
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import new_embedded_policy

RANK = 2


def make(root: Path, beside: Callable[[str], ModuleType]) -> dict[str, tuple[str, Path]]:
    """Model and folder by kind of folder, all below root: pipelines, a LoRA and a transformer over
    one, the unified model's."""
    flux, qwen = beside("tiny_editors"), beside("tiny_qwen")
    flux.klein_pipeline().save_pretrained(root / "klein")
    flux.kontext_pipeline().save_pretrained(root / "kontext")
    qwen.save_pipeline(qwen.qwen_pipeline(), root / "qwen-edit")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "frequency_size": 32,
    }
    unified = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    unified.save(root / "unified")
    folders = {name: (name, root / name) for name in ("klein", "kontext", "qwen-edit", "unified")}
    for model in ("klein", "kontext"):
        loaded(model, root / model, lora_rank=RANK).save(root / f"{model}-lora")
        folders[f"{model}-lora"] = (model, root / f"{model}-lora")
    loaded("klein", root / "klein").save(root / "klein-full")
    folders["klein-full"] = ("klein", root / "klein-full")
    return folders


def settings(model: str, weights: Path, **changes: Any) -> PolicyConfig:
    own = {} if model == "unified" else {"resolution": (32, 32)}
    return PolicyConfig(**{"model": model, "weights": str(weights), **own, **changes})


def loaded(model: str, weights: Path, **changes: Any) -> Any:
    return load_policy(settings(model, weights, **changes))
