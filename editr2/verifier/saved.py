"""A trained verifier on disk: a folder of transformers again, whatever of it trained.

Adapters are merged: W + strength B A, in float32, rounded once to the dtype of the file. What is
written is loaded again and must be what was meant to be written, and a probe's log-probs are held
against those of the verifier that trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from editr2.errors import CheckpointError
from editr2.policies.tensor_files import writing
from editr2.policies.weights import load_trainable
from editr2.rewards.verifier import JUDGE
from editr2.run.checkpoint import replace_folder
from editr2.verifier.model import Prompt, load_reader
from editr2.verifier.settings import ReaderConfig

RESULT = "verifier"
"""The folder of a run that holds the trained verifier."""

FACTS = "trained.json"


def read_result(folder: Path) -> dict[str, Any] | None:
    """What the folder says of itself; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((folder / FACTS).read_text())
    except (OSError, ValueError):
        return None
    return found


def write_result(
    folder: Path,
    config: ReaderConfig,
    values: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    probe: tuple[Prompt, Sequence[int], Tensor],
    device: torch.device,
) -> str:
    """Writes the folder, with the words that the verifier is asked with, and returns a line about
    it.

    values: what trained, whole, by name. probe: a prompt, an answer, and the log-probs of it [A]
    under the verifier that trained. device: where that computed. Raises `CheckpointError` where the
    folder that was written is not what was trained.
    """
    base = load_reader(replace(config, gradient_checkpointing=False))
    load_trainable(base.module, {name: value.cpu() for name, value in values.items()})
    module = merged(base.module)
    module.to(torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)

    def write(to: Path) -> None:
        with writing(folder):
            module.save_pretrained(to)
            base.processor.save_pretrained(to)
            (to / JUDGE).write_text(base.prompts.texts["judge"], encoding="utf-8")
            (to / FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    replace_folder(folder, write)
    again = load_reader(replace(config, weights=str(folder), lora_rank=0), device)
    meant, found = module.state_dict(), again.module.state_dict()
    for name, value in meant.items():
        if not torch.equal(found[name].cpu(), value.float().to(found[name].dtype)):
            raise CheckpointError(f"{folder}: {name}: not what was trained, loaded again")
    with torch.no_grad():
        scored = again.log_probs([probe[0]], [probe[1]]).log_prob[0].cpu()
    gap = float((scored - probe[2]).abs().max())
    if config.dtype == "float32" and not gap <= 1e-3:
        raise CheckpointError(
            f"{folder}: loaded again, log-probs differ by {gap:.3g} from the verifier that trained "
            f"(accepted: 1e-3)"
        )
    return f"verifier: {folder} (loaded again: log-probs differ by up to {gap:.1g})"


@torch.no_grad()
def merged(module: Any) -> Any:
    """The module without adapters: what they add is added to the weights."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        there: Any = layer
        own: nn.Linear = there.get_base_layer()
        a, b = there.lora_A["default"].weight, there.lora_B["default"].weight
        added = there.scaling["default"] * (b.double() @ a.double())
        own.weight.copy_((own.weight.double() + added).to(own.weight.dtype))
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, own)
    return module
