"""A folder in BAGEL's published layout beside what its own inferencer gives on it.

    python scripts/check_bagel.py FOLDER

FOLDER holds the files of a checkpoint (tiny, with random weights), `expected.safetensors` (images,
and of every case the latents and the output) and `expected.json` (the resize rule on many sizes,
ids of some texts, what was thought). Prints how far we are from each, and exits with 1 where that
is beyond what is accepted: latents 1e-5, ten values of the pixels by one level, all else equal.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from editr2.config import PolicyConfig
from editr2.policies.tensor_files import read_json
from editr2.policies.unified.bagel import PAINTING, BagelPolicy
from editr2.policies.unified.sight import LATENT_RULE, SIGHT_RULE, SizeRule, brought_to

CASES: list[tuple[list[str], bool]] = [
    (["make the hat red"], False),
    (["image_0", "make the hat red"], False),
    (["image_0", "make the hat red, then 3 cats"], True),
    (["image_0", "make it red", "image_1", "do it again"], False),
]
"""What each case reads, and whether it thinks."""
RULE = SizeRule(256, 128, 16)
STEPS, SEED, THOUGHT = 7, 9, 12
BLANK = (128, 160)
"""What is painted where no image says of which size."""
CLOSE, FEW = 1e-5, 10


class Small(BagelPolicy):
    sight_rule = SizeRule(196, 56, 14)


@torch.no_grad()
def run(policy: BagelPolicy, said: list[np.ndarray | str], thinks: bool) -> tuple:
    """Latents [N, 64], the image uint8 [H, W, 3], and what was thought."""
    size = BLANK
    context = policy.begin(1, PAINTING if thinks else None)
    for part in said:
        if isinstance(part, str):
            context = policy.instruct(context, [part])
        else:
            size = part.shape[:2]
            context = policy.at(size).append(context, part[None])
    thoughts: list[str] = []
    if thinks:  # theirs counts the opening mark
        thoughts = policy.think(context, max_tokens=THOUGHT - 1)
        context = policy.consider(context, thoughts)
    view = policy.at(size)
    x = torch.randn(view.latent_shape, generator=torch.manual_seed(SEED))[None]
    sigmas = view.sigmas(STEPS)
    for sigma, after in itertools.pairwise(sigmas):
        at = torch.tensor([sigma])
        x = x + (after - sigma) * view.velocity(x, at, context).combined(at)
    return x[0], view.decode(x)[0], thoughts


def main(folder: Path) -> int:
    expected, said = load_file(folder / "expected.safetensors"), read_json(folder / "expected.json")
    images = {
        name: brought_to(image.numpy(), RULE(*image.shape[:2]))
        for name, image in expected.items()
        if name.startswith("image_")
    }
    sizes = {BLANK, *(image.shape[:2] for image in images.values())}
    config = PolicyConfig(
        model="bagel",
        weights=str(folder),
        resolution=BLANK,
        buckets=tuple(sorted(sizes)),
        guidance=4.0,
        guidance_image=2.0,
        guidance_interval=(0.4, 1.0),
        renorm="text_channel",
        rounding="released",
    )
    policy = Small.from_config(config)
    good = True

    def told(what: str, ok: bool) -> None:
        nonlocal good
        good &= ok
        print(f"{what}: {'ok' if ok else 'NOT OK'}")

    for i, (parts, thinks) in enumerate(CASES):
        latents, output, thoughts = run(policy, [images.get(p, p) for p in parts], thinks)
        error = float((latents - expected[f"latents_{i}"]).abs().max())
        told(f"case {i}: latents {list(latents.shape)}, largest error {error:.1e}", error <= CLOSE)
        apart = np.abs(output.astype(int) - expected[f"output_{i}"].numpy().astype(int))
        told(
            f"case {i}: pixels {list(output.shape)}, {int((apart > 0).sum())} values differ, by up "
            f"to {int(apart.max())}",
            int(apart.max()) <= 1 and int((apart > 0).sum()) <= FEW,
        )
        told(f"case {i}: thought {thoughts}", thoughts == said["thought"][i])
    right = 0
    for row in said["resize"]:
        width, height = row["size"]  # the table has both rules on it; what runs chains them
        sizes_of = [list(rule(height, width)) for rule in (LATENT_RULE, SIGHT_RULE)]
        right += sizes_of == [row["vae_hw"], row["vit_hw"]]
    total = len(said["resize"])
    told(f"sizes: {right} of {total} equal", right == total)
    ids = {text: policy.codec.encode(text, marks=True) for text in said["tokens"]}
    told(f"ids of {len(ids)} texts: {sum(map(len, ids.values()))} tokens", ids == said["tokens"])
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
