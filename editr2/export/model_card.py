"""The README.md of an export: what the weights are, how to load them, what was proven, how they
score, how they were made; and the film-strip beside it, drawn from the run's strips."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from editr2.config import Config
from editr2.policies.forms import Form
from editr2.report.build import evaluation_table
from editr2.report.data import PASS_NAMES, Run, StripTurn
from editr2.report.gallery import thin

if TYPE_CHECKING:
    from editr2.export.export import Exported

STRIP_SESSIONS = 3
CELL, GAP, LINE = 192, 8, 16
"""Pixels of a film-strip: the side of a picture, the space between two, the height of a line of
text."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Base:
    """What was trained. hub_id: None for weights that stand in a folder. name: for the text."""

    name: str
    hub_id: str | None

    @staticmethod
    def of(policy: Any, weights: str | None) -> Base:
        """weights: as the settings have them; a policy on diffusers knows what they rest on."""
        weights = getattr(policy, "base", weights)
        if weights is None:
            return Base(policy.default_weights, None)
        if HUB_ID.fullmatch(weights) and not Path(weights).exists():
            return Base(weights, weights)
        return Base(f"{Path(weights).name} (a local folder)", None)


def write_card(
    folder: Path, seen: Run, config: Config, base: Base, done: Exported, form: Form
) -> None:
    """Writes README.md, and strips.png where the run has strips."""
    pictured = film_strip(seen, folder / "strips.png")
    parts = [
        f"---\n{yaml.safe_dump(_header(base, done, form), sort_keys=False)}---",
        f"# {done.folder.name}",
        _what(config, base, done),
        "![Sessions before and after training](strips.png)" if pictured else "",
        f"## How to load it\n\n{_how(base, done, config, form)}{_strength(done, config)}",
        f"## Proof\n\nAt export, the base weights and these files were loaded anew as above: "
        f"{done.proof}.",
        f"## Scores\n\n{_scores(seen, config, done)}",
        f"## How it was made\n\n{_made(seen, config)}",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")


def _header(base: Base, done: Exported, form: Form) -> dict[str, Any]:
    adapter = done.kind == "lora"
    header: dict[str, Any] = {"library_name": form.library}
    if base.hub_id:
        relation = {"lora": "adapter", "merged": "merge", "full": "finetune"}[done.kind]
        header |= {"base_model": base.hub_id, "base_model_relation": relation}
    tags = [
        "editr2",
        "image-editing",
        "multi-turn",
        "reinforcement-learning",
        *(["lora"] if adapter else []),
    ]
    return header | {"pipeline_tag": "image-to-image", "tags": tags}


def _what(config: Config, base: Base, done: Exported) -> str:
    p = config.policy
    alpha = 2 * p.lora_rank if p.lora_alpha is None else p.lora_alpha
    lora = f"LoRA adapters (rank {p.lora_rank}, alpha {alpha:g})"
    kinds = {"lora": f"{lora} for", "merged": f"{lora} merged into", "full": "All weights of"}
    weights = "averaged" if done.weights == "ema" else "last"
    stage = f"iteration {done.iteration} of {config.train.iterations}"
    return (
        f"{kinds[done.kind]} {base.name}, trained on multi-turn edits: the {weights} weights of "
        f"{stage}."
        + (" The training was not finished." if done.iteration < config.train.iterations else "")
    )


def _how(base: Base, done: Exported, config: Config, form: Form) -> str:
    this, origin = done.folder.name, base.hub_id or config.policy.weights
    dtype = config.policy.dtype if done.kind == "lora" or config.policy.lora_rank else "float32"
    code = "```python\n" + "\n".join(form.code(this, origin, dtype)) + "\n```"
    return "\n\n".join(filter(None, [code, form.also(this)]))


def _strength(done: Exported, config: Config) -> str:
    """Of adapters: that every loader applies them alike, and what that cost."""
    if done.kind != "lora":
        return ""
    rank, alpha = config.policy.lora_rank, config.policy.lora_alpha
    trained = (2 * rank if alpha is None else alpha) / rank
    cost = (
        f"a number of B moved by {done.folding:.1e} of itself at most"
        if done.folding
        else "exactly"
    )
    return (
        f"\n\nThe adapters stand at strength 1: alpha / rank, {trained:.6g} in training, is part "
        f"of B ({cost}), and "
        "the alpha in the settings is the rank. So they act the same in a loader that does not "
        "read the settings."
    )


def _scores(run: Run, config: Config, done: Exported) -> str:
    table = evaluation_table(run)
    if table is None:
        return "The run has no evaluation."
    rows = [
        ["", *table.head],
        ["---"] * (len(table.head) + 1),
        *([name, *cells] for name, cells in table.rows),
    ]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = ["Means and standard errors over held-out sessions."]
    if run.start.get("heldout_is_training"):
        notes = [
            "Means and standard errors over the training sessions: no held-out ones were given."
        ]
    after = run.evaluation("after")
    if after is None:
        notes.append("The run was not finished, so there is no evaluation after training.")
    elif after.iteration != done.iteration:
        notes.append(f"The evaluation after training was at iteration {after.iteration}.")
    if done.weights == "live" and config.train.ema is not None:
        notes.append("They are those of the averaged weights; these are the last ones.")
    return f"{text}\n\n{' '.join(notes)}"


def _made(run: Run, config: Config) -> str:
    r, t = config.rollout, config.train
    weights = (
        run.start.get("rewards") or config.credit.weights
    )  # a run knows what its rewards were called
    reward = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
    facts = {
        "Method": f"{t.loss}, credit preset {config.credit.preset}",
        "Sessions": config.data.path or "drawn from the procedural shapes world",
        "Reward": reward + (f" by {config.reward.function}" if config.reward.function else ""),
        "An iteration": f"{r.sessions} sessions x {r.siblings} siblings, {r.steps} denoising steps",
        "Seed": config.seed,
    }
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    settings = (
        f"<details><summary>All "
        f"settings</summary>\n\n```yaml\n{(run.config_text or '').strip()}\n```\n\n</details>"
    )
    return f"{listed}\n\n{settings}"


# --------------------------------------------------------------------------------------- film-strip


def film_strip(run: Run, path: Path) -> bool:
    """Draws up to `STRIP_SESSIONS` sessions, from the most to the least improved: source and every
    turn's output, one row a pass, the instructions above. Returns whether there was anything to
    draw."""
    pairs = thin(sorted(run.pairs, key=lambda pair: -(pair.change or 0.0)), STRIP_SESSIONS)
    blocks = [
        _block(run.folder / "strips", [(n, s) for n in PASS_NAMES if (s := getattr(p, n))])
        for p in pairs
    ]
    if not blocks:
        return False
    sheet = Image.new("RGB", (max(b.width for b in blocks), sum(b.height for b in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    sheet.save(path)
    return True


def _block(folder: Path, passes: list[tuple[str, Any]]) -> Image.Image:
    """One session."""
    turns: tuple[StripTurn, ...] = max((strip.turns for _, strip in passes), key=len)
    said = [["source"], *(textwrap.wrap(turn.instruction, CELL // 7) for turn in turns)]
    head = GAP + LINE * max(map(len, said))
    row = CELL + LINE + GAP
    block = Image.new(
        "RGB", (GAP + (CELL + GAP) * len(said), head + row * len(passes) + GAP), "white"
    )
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(12)
    for column, lines in enumerate(said):
        draw.text((GAP + column * (CELL + GAP), GAP), "\n".join(lines), fill="black", font=font)
    for i, (name, strip) in enumerate(passes):
        top = head + i * row
        for column, shown in enumerate((strip, *strip.turns)):
            left = GAP + column * (CELL + GAP)
            block.paste(_picture(folder, shown.image), (left, top))
            reward = getattr(shown, "reward", None)
            note = (
                ""
                if column == 0
                else f"{name}" + ("" if reward is None else f": reward {reward:.2f}")
            )
            draw.text((left, top + CELL + 1), note, fill="dimgray", font=font)
    return block


def _picture(folder: Path, name: str | None) -> Image.Image:
    """A picture fitted into a cell; grey where there is none that can be read."""
    cell = Image.new("RGB", (CELL, CELL), "lightgray")
    try:
        with Image.open(folder / (name or "")) as image:
            scale = CELL / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # A small world's pixels stay sharp squares.
            how = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
            cell.paste(image.convert("RGB").resize(size, how))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        pass
    return cell
