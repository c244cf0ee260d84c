"""The README.md of an export: what the weights are, how to load them, what was proven, how they
score, how they were made; and the film-strip beside it, drawn from the run's strips."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw, ImageFont

from editr2.config import Config, PolicyConfig, TrainConfig
from editr2.errors import counted
from editr2.export.result import Exported
from editr2.policies.configured import policy_class
from editr2.policies.forms import Form
from editr2.policies.recorded import EXPORT
from editr2.report.build import evaluation_table
from editr2.report.data import PASS_NAMES, Comparison, RecordedRun, StripTurn
from editr2.report.gallery import thin

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
    folder: Path, seen: RecordedRun, config: Config, base: Base, done: Exported, form: Form
) -> None:
    """Writes README.md, and strips.png where the run has strips."""
    pictured = film_strip(seen, folder / "strips.png")
    parts = [
        f"---\n{yaml.safe_dump(_header(base, done, form), sort_keys=False)}---",
        f"# {done.folder.name}",
        _what(config.policy, base, done),
        "![Sessions before and after training](strips.png)" if pictured else "",
        f"## How to load it\n\n{_how(base, done, config.policy, form)}"
        f"{_strength(done, config.policy)}",
        _written(config),
        f"## Proof\n\nAt export, the base weights and these files were loaded anew as above: "
        f"{done.proof}.",
        f"## Scores\n\n{_scores(seen, config.train, done)}",
        f"## How it was made\n\n{_made(seen, config)}",
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", "utf-8")


def _header(base: Base, done: Exported, form: Form) -> dict[str, Any]:
    adapter = done.kind == "lora"
    header: dict[str, Any] = {"library_name": form.library}
    if base.hub_id:
        relation = {"lora": "adapter", "merged": "merge", "full": "finetune"}[done.kind]
        header |= {"base_model": base.hub_id, "base_model_relation": relation}
    tags = ["editr2", "image-editing", "multi-turn", "reinforcement-learning"]
    tags += ["lora"] * adapter
    return header | {"pipeline_tag": "image-to-image", "tags": tags}


def _what(policy: PolicyConfig, base: Base, done: Exported) -> str:
    lora = f"LoRA adapters (rank {policy.lora_rank}, alpha {_alpha(policy):g})"
    kinds = {"lora": f"{lora} for", "merged": f"{lora} merged into", "full": "All weights of"}
    weights = "averaged" if done.weights == "ema" else "last"
    stage = f"iteration {done.iteration} of {done.iterations}"
    unfinished = done.iteration < done.iterations
    return (
        f"{kinds[done.kind]} {base.name}, trained on multi-turn edits: the {weights} weights of "
        f"{stage}.{' The training was not finished.' if unfinished else ''}"
    )


def _alpha(policy: PolicyConfig) -> float:
    """The default is that of the setting."""
    return 2 * policy.lora_rank if policy.lora_alpha is None else policy.lora_alpha


def _how(base: Base, done: Exported, policy: PolicyConfig, form: Form) -> str:
    this, origin = done.folder.name, base.hub_id or policy.weights
    dtype = policy.dtype if done.kind == "lora" or policy.lora_rank else "float32"
    code = "```python\n" + "\n".join(form.code(this, origin, dtype)) + "\n```"
    ours = (
        f"`--policy {this}` of `editr2` edits as this run did: its settings are in `{EXPORT}`. "
        f"So does, in Python,"
    )
    lines = [
        "import editr2",
        "",
        f'steps = editr2.edit("image.png", ["one edit", "the next"], policy="{this}")',
        'steps[-1].image.save("edited.png")',
    ]
    three = "```python\n" + "\n".join(lines) + "\n```"
    return "\n\n".join(filter(None, [code, form.also(this), ours, three]))


def _written(config: Config) -> str:
    """What a loader that knows weights alone loses of a policy that writes intents or thoughts."""
    parts = [part for part in (_intents(config), _thoughts(config.policy)) if part]
    return "\n\n".join(["## What the weights alone do not do", *parts]) if parts else ""


def _thoughts(policy: PolicyConfig) -> str:
    if not policy.thinking:
        return ""
    return (
        "Before every image this policy was trained to write a thought behind the turn's "
        f"instruction (greedily, at most {policy.thinking_tokens} tokens), with its system prompt "
        "for that in front of the session, and to paint behind both. The loader above asks for no "
        "thought. `editr2.edit` and `--policy` do; `steps[-1].thought` is what was thought."
    )


def _intents(config: Config) -> str:
    policy = config.policy
    if not (policy.intent and policy_class(policy.model).writes_text):
        return ""
    tokens = config.eval.intent_tokens or policy.intent_tokens
    return (
        "From the second turn on this policy was trained to write an intent before it paints: the "
        "instruction made self-contained, with what earlier turns have asked for and is still to "
        f"hold, or the thing that a pronoun means. It is asked on a copy of the context (greedily, "
        f"at most {tokens} tokens), and the text behind `</think>` takes the instruction's place. "
        "The loader above gives the weights, which can do it, and asks for nothing: behind the raw "
        "instruction the later turns are painted without it. `editr2.edit` and `--policy` ask as "
        'the run did (`mode="cm"` or `"cu"` in the words of that mode); `steps[-1].intent` is what '
        "was understood."
    )


def _load_pipeline(base: Base, pipeline: str, done: Exported, policy: PolicyConfig) -> list[str]:
    """By diffusers: a folder of all weights, or the base and the adapters."""
    this, lora = done.folder.name, done.kind == "lora"
    origin = (base.hub_id or policy.weights) if lora else this
    # Weights that trained are float32 masters; with adapters the base stays in its own precision.
    dtype = policy.dtype if policy.lora_rank else "float32"
    lines = [
        "import torch",
        f"from diffusers import {pipeline}",
        "",
        f'pipe = {pipeline}.from_pretrained("{origin}", torch_dtype=torch.{dtype})',
    ]
    return [*lines, f'pipe.load_lora_weights("{this}")'] if lora else lines


def _load_adapters(done: Exported, policy: PolicyConfig) -> list[str]:
    """By peft, on the unified model: the shipped one, or that of the run's folder."""
    weights = policy.weights
    source = f'Path("{weights}")' if weights else ""
    return [
        "from peft import PeftModel",
        *(["from pathlib import Path", ""] if weights else []),
        "from editr2 import UnifiedPolicy",
        "",
        f"policy = UnifiedPolicy.load({source})",
        f'PeftModel.from_pretrained(policy.module, "{done.folder.name}")',
    ]


def _strength(done: Exported, policy: PolicyConfig) -> str:
    """Of adapters: that every loader applies them alike, and what that cost."""
    if done.kind != "lora":
        return ""
    trained = _alpha(policy) / policy.lora_rank
    cost = "exactly"
    if done.folding:
        cost = f"a number of B moved by {done.folding:.1e} of itself at most"
    return (
        f"\n\nThe adapters stand at strength 1: alpha / rank, {trained:.6g} in training, is part "
        f"of B ({cost}), and the alpha in the settings is the rank. So they act the same in a "
        "loader that does not read the settings."
    )


def _scores(run: RecordedRun, train: TrainConfig, done: Exported) -> str:
    table = evaluation_table(run)
    if table is None:
        return "The run has no evaluation."
    rule = ["---"] * (len(table.head) + 1)
    rows = [["", *table.head], rule, *([name, *cells] for name, cells in table.rows)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\n{' '.join(_about_scores(run, train, done))}"


def _about_scores(run: RecordedRun, train: TrainConfig, done: Exported) -> list[str]:
    """What the table's scores are of, where that is not these weights on held-out sessions."""
    notes = ["Means and standard errors over held-out sessions."]
    if run.start.get("heldout_is_training"):
        notes = [
            "Means and standard errors over the training sessions: no held-out ones were given."
        ]
    notes += [_interval(compared) for compared in run.comparisons[-1:] if compared.se is not None]
    after = run.evaluation("after")
    if after is None:
        notes.append("The run was not finished, so there is no evaluation after training.")
    elif after.iteration != done.iteration:
        notes.append(f"The evaluation after training was at iteration {after.iteration}.")
    if done.weights == "live" and train.ema is not None:
        notes.append("They are those of the averaged weights; these are the last ones.")
    return notes


def _interval(compared: Comparison) -> str:
    """Of the paired difference; normal, as its standard error is all that a run keeps of it."""
    by, half = compared.difference or 0.0, 1.96 * (compared.se or 0.0)
    over = ""
    if compared.sessions is not None:
        over = f" over the same {counted(compared.sessions, 'session')}"
    return (
        f"Training changed the reward of turn {compared.turn} by {by:+.3f} "
        f"[{by - half:+.3f}, {by + half:+.3f}] (95 %, paired{over})."
    )


def _made(run: RecordedRun, config: Config) -> str:
    r, t = config.rollout, config.train
    # A run knows what its rewards were called; an older one's settings may.
    weights = run.start.get("rewards") or config.credit.weights
    reward = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
    if judge := config.reward.function or config.reward.name:
        reward += f" by {judge}"
    facts = {
        "Method": f"{t.loss}, credit preset {config.credit.preset}",
        "Sessions": config.data.path or "drawn from the procedural shapes world",
        "Reward": reward,
        "An iteration": f"{counted(r.sessions, 'session')} x {r.siblings} siblings, "
        f"{counted(r.steps, 'denoising step')}",
        "Seed": config.seed,
    }
    if config.policy.lora_weights is not None:
        facts["Start"] = f"the LoRA {Path(config.policy.lora_weights).name}"
    listed = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    settings = f"```yaml\n{(run.config_text or '').strip()}\n```"
    folded = f"<details><summary>All settings</summary>\n\n{settings}\n\n</details>"
    return f"{listed}\n\n{folded}"


# --------------------------------------------------------------------------------------- film-strip


def film_strip(run: RecordedRun, path: Path) -> bool:
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
    size = (GAP + (CELL + GAP) * len(said), head + row * len(passes) + GAP)
    block = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(12)
    for column, lines in enumerate(said):
        draw.text((GAP + column * (CELL + GAP), GAP), "\n".join(lines), fill="black", font=font)
    for i, (name, strip) in enumerate(passes):
        top = head + i * row
        notes = ["", *(_note(name, turn) for turn in strip.turns)]
        for column, (shown, note) in enumerate(zip((strip, *strip.turns), notes, strict=True)):
            left = GAP + column * (CELL + GAP)
            block.paste(_picture(folder, shown.image), (left, top))
            draw.text((left, top + CELL + 1), note, fill="dimgray", font=font)
    return block


def _note(name: str, turn: StripTurn) -> str:
    """What stands below a turn's picture."""
    return name if turn.reward is None else f"{name}: reward {turn.reward:.2f}"


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
