"""Runs every preset twice from one seed on a tiny random model and compares the final weights bit
for bit.

python tests/presets_twice.py 20 [preset ...]
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from editr2.config import PRESETS, Config, preset_config, replace_nested
from editr2.policies.unified.guidance import Guidance
from editr2.policies.unified.model import UnifiedConfig
from editr2.policies.unified.policy import UnifiedPolicy, new_embedded_policy
from editr2.policies.weights import add_lora
from editr2.rewards.base import Score
from editr2.training import train


class Toy:
    """Scores that spread widely over the outputs of a random policy, none of which the world would
    call right."""

    names = ("IF", "CC", "GA")

    def __call__(self, session, images):
        means = images.reshape(len(images), -1, 3).mean(1) * 7 % 1
        return [
            {name: Score(float(x)) for name, x in zip(self.names, row, strict=True)}
            for row in means
        ]


def tiny_policy(config: Config) -> UnifiedPolicy:
    """A random unified policy of two small layers, with the preset's guidance and adapters."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    policy = new_embedded_policy(
        UnifiedConfig(**sizes, num_attention_heads=2, num_key_value_heads=2), seed=0
    )
    torch.nn.init.normal_(
        policy.module.llm2vae.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    policy.guidance = Guidance.of(config.policy)
    if config.policy.lora_rank:
        torch.manual_seed(0)
        add_lora(policy.module, 4)
    return policy


def tiny(preset: str, out: Path, iterations: int) -> Config:
    """The preset at the smallest size that still has groups, turns, a window and two
    minibatches."""
    changes = {
        "out": str(out),
        "policy": {"intent_tokens": 4},
        "rollout": {
            "sessions": 2,
            "siblings": 3,
            "turns": 2,
            "groups_per_batch": 1,
            "window_every": 2,
        },
        "train": {"iterations": iterations},
        "eval": {"sessions": 2, "strips": 1, "sampler": "ode", "steps": 2, "intent_tokens": 4},
        "checkpoint": {"every": iterations},
    }
    return replace_nested(preset_config(preset), changes)


def final(preset: str, out: Path, iterations: int) -> dict[str, torch.Tensor]:
    config = tiny(preset, out, iterations)
    run = train(config, policy=tiny_policy(config), reward=Toy())
    folder = run / "checkpoints" / f"step_{iterations:06d}"
    return {
        f"{f.stem}.{k}": v
        for f in sorted(folder.glob("*.safetensors"))
        for k, v in load_file(f).items()
    }


def differing(preset: str, root: Path, iterations: int) -> tuple[list[str], bool]:
    """(tensors that differ between two runs, whether training moved the weights at all)."""
    one, two = (final(preset, root / f"{preset}-{i}", iterations) for i in range(2))
    start = {
        f"policy.{k}": v for k, v in tiny_policy(tiny(preset, root, 1)).module.state_dict().items()
    }
    moved = any(not torch.equal(v, start[k]) for k, v in one.items() if k in start)
    return [k for k in one if not torch.equal(one[k], two[k])], moved


def main() -> int:
    iterations, chosen = int(sys.argv[1]), sys.argv[2:] or list(PRESETS)
    bad = 0
    with tempfile.TemporaryDirectory() as root:
        for preset in chosen:
            different, moved = differing(preset, Path(root), iterations)
            print(
                f"{preset}: {'same bits' if not different else different[:3]}, "
                f"{'moved' if moved else 'NOT MOVED'}"
            )
            bad += bool(different) or not moved
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
