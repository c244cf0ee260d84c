"""`editr2.edit`: a policy at work on an image, without a run.

    import editr2

    steps = editr2.edit("kitchen.png", ["add a red cup", "make it blue"], policy="runs/mine")
    steps[-1].image.save("blue.png")

The policy is whatever `--policy` takes (`editr2.policies.found`) or one that is loaded already. It
edits as in an evaluation: what the rollout computes of a session, with greedy texts. `Editor`
loads a policy once; `Step.edit` goes on from any step, so that a user can look at an image before
saying what is next, and go back.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from editr2.config import Config, PolicyConfig, replace_nested, settings_problems
from editr2.config.fields import normalised
from editr2.errors import ConfigError, DataError, one_line, shown
from editr2.policies.base import Policy, at_size, device_of
from editr2.policies.found import editor_of
from editr2.policies.load import open_policy
from editr2.rl.rollout import Chunk, Seeds, Walk, in_evaluation, rollout_turn
from editr2.rl.sampler import eval_sampler, own_schedule
from editr2.rl.sessions import demands
from editr2.run.processes import open_processes
from editr2.sessions import Session, Turn
from editr2.sessions.buckets import Sizes
from editr2.sessions.images import RESIZES, Pixels, decode_image, read_image

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
"""A file, an image of Pillow, or uint8 [H, W, 3]."""

_AT_WORK = frozenset(("intent", "intent_tokens", "thinking_tokens"))
"""Settings of a policy that are read while it edits, and not when it is loaded."""


@dataclass(frozen=True, eq=False)
class Step:
    """An image that an editor has in front of it: the source (turn 0), or what a turn made of it.

    pixels: uint8 [H, W, 3]. turn: from 1; 0 is the source. instruction: the turn's, as it was said.
    intent: what the policy made of it and painted by, None where it took the instruction as it is.
    reasoning: what it wrote before that. thought: what it thought before it painted, where it does
    (`policy.thinking`). It keeps the context that `edit` goes on from, on the
    policy's device, for as long as it is kept itself.
    """

    pixels: Pixels = field(repr=False)
    turn: int = 0
    instruction: str | None = None
    intent: str | None = None
    reasoning: str | None = None
    thought: str | None = None
    _past: _Past | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    def edit(self, instruction: str) -> Step:
        """The next turn. This step stays as it is: others can go on from it, too.

        Raises `DataError` for an instruction, or references, that the policy has no use for, and
        `NonFiniteError`.
        """
        assert self._past is not None  # an `Editor` makes steps
        return self._past.editor._turn(self._past, instruction)


@dataclass(frozen=True)
class _Past:
    """What a step goes on from. session: so far; turns: how many of it there are (before the
    first it holds one that nobody has said, since a session has turns). walk: behind the last;
    None before the first."""

    editor: Editor
    session: Session
    seed: int
    turns: int = 0
    walk: Walk | None = None


class Editor:
    """A policy that is loaded, and how it edits: its `config`, of which policy, the sampler's part
    of rollout, and eval are used. note: what was found and where, in a line; empty for a policy
    that was given."""

    def __init__(
        self,
        policy: str | os.PathLike[str] | Policy | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """policy: the folder of a run, an export, a saved policy or a pipeline, or a hub id; or a
        `Policy`; None is the shipped one. settings: by section and field, in place of what comes
        with it: `{"policy": {"resolution": "1024x1024"}, "eval": {"steps": 28}}`.

        Raises `ConfigError` and the other `UserError`s of what is not there, or cannot be followed.
        """
        given: Any = {name: dict(of) for name, of in (settings or {}).items()}
        config, self.note = Config(), ""
        if isinstance(policy, str | os.PathLike):
            if "weights" in given.get("policy", {}):
                raise ConfigError("policy.weights: given beside a policy (accepted: one of both)")
            found = editor_of(os.fspath(policy), given.get("policy", {}).get("model"))
            config, self.note = replace_nested(config, found.settings), found.note
        elif policy is not None and (late := sorted(set(given.get("policy", {})) - _AT_WORK)):
            raise ConfigError(
                f"policy.{late[0]}: given beside a policy that is loaded (accepted: "
                f"{', '.join(sorted(_AT_WORK))}; what a policy is loaded with goes with its folder "
                f"or hub id)"
            )
        elif isinstance(own := getattr(policy, "config", None), PolicyConfig):
            config = dataclasses.replace(config, policy=own)  # of one that is loaded already
        config = replace_nested(config, given)
        for problem in settings_problems(config, "rollout"):
            raise ConfigError(problem)
        config = normalised(config)
        options, self._rollout = in_evaluation(config)
        # Of several processes each has its own images to edit.
        mine = dataclasses.replace(options, shard=False)
        self.config = dataclasses.replace(config, policy=mine)
        if policy is None or isinstance(policy, str | os.PathLike):
            policy = open_policy(mine, open_processes(), trains=False)
        self.policy: Policy = policy
        self._sampler = eval_sampler(config.rollout, config.eval, own_schedule(policy))
        wanted = demands(self.config, policy)
        self._sizes: Sizes = wanted["size"]
        self._unreadable = wanted["unreadable"]

    def start(
        self,
        image: Picture,
        *,
        references: Sequence[Picture] = (),
        mode: str | None = None,
        seed: int = 0,
        resize: str = "crop",
    ) -> Step:
        """A session that begins with an image.

        references: further images, which every turn sees (an editor that takes several). mode: "cm"
        or "cu", in whose words intents are asked for. seed: of the noise; the same gives the same
        images. resize: how an image is brought to the policy's size, the nearest of several:
        "crop", "stretch", or "no", which wants that size.

        Raises `DataError` for an image that cannot be read.
        """
        if resize not in RESIZES:
            raise ConfigError(f"resize: {resize!r} (accepted: {', '.join(RESIZES)})")
        pixels = _read(image, "image", self._sizes, resize)
        size = (pixels.shape[0], pixels.shape[1])
        beside = [_read(r, f"references[{i}]", size, resize) for i, r in enumerate(references)]
        session = Session("edit", pixels, (Turn("?"),), mode, references=tuple(beside))
        return Step(pixels, _past=_Past(self, session, seed))

    def edit(self, image: Picture, instructions: Sequence[str] | str, **how: Any) -> list[Step]:
        """A step for every instruction, each of the one before. how: as for `start`."""
        told = [instructions] if isinstance(instructions, str) else list(instructions)
        if not told:
            raise DataError("instructions: none (accepted: one or more)")
        step, steps = self.start(image, **how), []
        for instruction in told:
            step = step.edit(instruction)
            steps.append(step)
        return steps

    @torch.no_grad()
    def _turn(self, past: _Past, instruction: str) -> Step:
        turn, size = past.turns, past.session.image_size
        turns = (*past.session.turns[:turn], Turn(instruction))
        session = dataclasses.replace(past.session, turns=turns)
        self._check(session)
        policy = at_size(self.policy, size)
        chunk = Chunk([session], [0], 1)
        if past.walk is None:
            walk = Walk(policy, chunk)
        else:  # contexts do not change: others can go on from the step, too
            walk, chunk.turns = copy.copy(past.walk), list(past.walk.chunk.turns)
            walk.chunk = chunk
            walk.advance(turn, chunk.turns[-1].images)
        record = rollout_turn(
            walk,
            turn,
            self._sampler.of(size).to(device_of(policy.module)),
            Seeds(past.seed, "rollout"),
            self.config.policy,
            rollout=self._rollout,
            greedy=True,
        )
        chunk.turns.append(record)
        intent, thought = (record.sample(kind, 0) for kind in ("intent", "thought"))
        return Step(
            record.images[0],
            turn + 1,
            instruction,
            None if intent is None else intent.text,
            None if intent is None else intent.reasoning,
            None if thought is None else thought.text,
            _Past(self, session, past.seed, turn + 1, walk),
        )

    def _check(self, session: Session) -> None:
        told = [turn.instruction for turn in session.turns]
        more = {"references": len(session.references)} if session.references else {}
        for turn, problem in self._unreadable(told, session.image_size, **more):
            what = "references" if turn is None else f"instructions[{turn}]"
            raise DataError(f"{what}: {problem}")


def edit(
    image: Picture,
    instructions: Sequence[str] | str,
    *,
    policy: str | os.PathLike[str] | Policy | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    references: Sequence[Picture] = (),
    mode: str | None = None,
    seed: int = 0,
    resize: str = "crop",
) -> list[Step]:
    """Edits an image by one instruction after the other, each on the output of the one before, and
    returns a `Step` for each, with its `image`.

    policy, settings: as for `Editor`, which is what loads a policy once for several images. The
    others as for `Editor.start`. Raises `UserError`s as these do.
    """
    how: dict[str, Any] = {"references": references, "mode": mode, "seed": seed, "resize": resize}
    return Editor(policy, settings).edit(image, instructions, **how)


def _read(image: Picture, name: str, size: Sizes, resize: str) -> Pixels:
    """uint8 [H, W, 3] of one of these sizes. Raises `DataError` naming the argument."""
    try:
        if isinstance(image, str | os.PathLike):
            return read_image(Path(image).expanduser(), size, resize)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                given = f"{image.dtype} {list(image.shape)}"
                raise DataError(f"{given} (accepted: a uint8 array [H, W, 3])")
            image = Image.fromarray(image)
        if not isinstance(image, Image.Image):
            accepted = "a file's path, an image of Pillow or a uint8 array [H, W, 3]"
            raise DataError(f"{shown(type(image).__name__)} (accepted: {accepted})")
        return decode_image(_as_file(image), size, resize)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _as_file(image: Image.Image) -> bytes:
    """As a PNG, so that it is read as files are: turned, in sRGB, on white."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG", exif=image.getexif())
    except (OSError, ValueError) as error:
        raise DataError(f"not an image that can be read: {one_line(error)}") from error
    return buffer.getvalue()
