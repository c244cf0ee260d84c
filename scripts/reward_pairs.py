"""Whether a reward puts the right output first: on pairs whose outputs are known to be right or
wrong, and beside the exact verifiers of the shapes world.

    python scripts/reward_pairs.py --reward pixels
    python scripts/reward_pairs.py --reward my_judge:Judge --options '{"server": "http://..."}'
    python scripts/reward_pairs.py --reward pixels --no-boxes
    python scripts/reward_pairs.py --reward pixels --world 60

The pairs are those of tests/drawn_scenes.py: of each task a turn with a right output, the source
again, the edit of a wrong object, and the right edit with a ruined background. Right is *first*
where its weighted reward is above each of the others' (a tie is not). A pair counts as judged where
IF of its right output applies; a score that does not apply leaves the weighted mean.

--no-boxes leaves out what the pairs say of where things are, which a user's sessions do not.
--world compares with the exact IF and CC on sessions of the shapes world: outputs that are right,
or wrong in one of several ways, with noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from editr2.config import RewardConfig
from editr2.errors import UserError
from editr2.rewards.base import Item, Score
from editr2.rewards.load import load_reward
from editr2.sessions import Session, Turn
from editr2.worlds import shapes

ROOT = Path(__file__).resolve().parent.parent
WRONG = ("untouched", "wrong object", "ruined background")
KINDS = ("right", *WRONG)
WEIGHTS = {"IF": 0.5, "CC": 0.5}

Row = dict[str, Score]


def drawn_scenes() -> ModuleType:
    """tests/drawn_scenes.py, which is on nobody's import path."""
    name = "drawn_scenes"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class Judged(NamedTuple):
    """One pair: what the reward said of each of its outputs."""

    task: str
    style: str
    rows: Mapping[str, Row]

    def applies(self) -> bool:
        """Whether there is something to rank by."""
        names = [name for name in ("IF",) if name in self.rows["right"]] or list(self.rows["right"])
        return any(self.rows["right"][name].applies for name in names)

    def total(self, kind: str, weights: Mapping[str, float]) -> float:
        """The weighted mean of the scores that apply; a failed score is an error."""
        total = weight = 0.0
        for name, score in self.rows[kind].items():
            if score.failed:
                raise UserError(f"{self.task}, {kind}: {name}: {score.reason}")
            if score.value is not None:
                total += weights.get(name, 1.0) * score.value
                weight += weights.get(name, 1.0)
        return total / weight if weight else 0.0

    def product(self, kind: str) -> float:
        return float(np.prod([s.value for s in self.rows[kind].values() if s.value is not None]))

    def first(self, kinds: Sequence[str] = WRONG, weights: Mapping[str, float] = WEIGHTS) -> bool:
        """Whether right is above all of these."""
        right = self.total("right", weights)
        return all(right > self.total(kind, weights) for kind in kinds)


def judge_pairs(reward: Any, pairs: Sequence[Any], boxes: bool = True) -> list[Judged]:
    """Of anything with `judge(items)`. pairs: of tests/drawn_scenes.py."""
    said = []
    for pair in pairs:
        session = pair.session if boxes else without_boxes(pair.session)
        items = [Item(session, pair.outputs[kind].image[None]) for kind in KINDS]
        rows = [rows[0] for rows in reward.judge(items)]
        said.append(Judged(pair.task, pair.style, dict(zip(KINDS, rows, strict=True))))
    return said


def without_boxes(session: Session) -> Session:
    turns = tuple(
        dataclasses.replace(t, meta={k: v for k, v in t.meta.items() if k != "boxes"})
        for t in session.turns
    )
    meta = {k: v for k, v in session.meta.items() if k != "boxes"}
    return dataclasses.replace(session, image=session.image, turns=turns, meta=meta)


def confusion(said: Sequence[Judged]) -> str:
    """By task: how many were judged, of how many right is first, how often it is above each kind of
    wrong output, and the mean IF / CC of each."""
    head = ["task", "pairs", "judged", "right first", *(f"over {kind}" for kind in WRONG)]
    table = [[*head, *(f"IF / CC {kind}" for kind in KINDS)]]
    tasks = list(dict.fromkeys(one.task for one in said))
    for task in [*tasks, "all"]:
        all_of = [one for one in said if task in (one.task, "all")]
        judged = [one for one in all_of if one.applies()]
        line = [task, str(len(all_of)), str(len(judged))]
        if not judged:
            reason = next(iter(all_of[0].rows["right"].values())).reason
            table.append([*line, "-", "does not apply:", str(reason)[:60]])
            continue
        line.append(f"{sum(one.first() for one in judged)}")
        line += [f"{sum(one.first((kind,)) for one in judged)}" for kind in WRONG]
        for kind in KINDS:
            means = []
            for name in judged[0].rows[kind]:
                values = [v for one in judged if (v := one.rows[kind][name].value) is not None]
                means.append(f"{np.mean(values):.2f}" if values else "-")
            line.append(" / ".join(means))
        table.append(line)
    widths = [max(len(row[i]) for row in table if len(row) > 6) for i in range(len(table[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in table)


# ------------------------------------------------------------------------------------------- world

_CELL = 1 / shapes.GRID


def _box(cell: int) -> list[float]:
    row, column = divmod(cell, shapes.GRID)
    return [column * _CELL, row * _CELL, (column + 1) * _CELL, (row + 1) * _CELL]


def _name(scene: shapes.Scene, cell: int) -> str:
    return f"{scene.object(cell)[0]} {shapes.position(cell)}"


def annotated(scene: shapes.Scene, op: shapes.Op) -> dict[str, Any]:
    """A turn of the world in the words of the benchmarks: task and meta."""
    boxes = {_name(scene, cell): _box(cell) for cell in scene.occupied()}
    if op.kind == "background":
        return {
            "task": "background_change",
            "meta": {
                "boxes": boxes,
                "formatted_instruction": f"change the background to [{op.background}]",
            },
        }
    assert op.cell is not None
    if op.kind == "add":
        task, form = "subject_add", f"add [{op.colour} {op.shape}]"
    elif op.kind == "remove":
        task, form = "subject_remove", f"remove [{_name(scene, op.cell)}]"
    elif op.kind == "paint":
        task = "color_alter"
        form = f"change the color of [{_name(scene, op.cell)}] to [{op.colour}]"
    else:  # to a side of where it is
        assert op.target is not None
        (row, column), (row2, column2) = (divmod(c, shapes.GRID) for c in (op.cell, op.target))
        sides = ("left", "right") if column != column2 else ("above", "below")
        later = column2 > column if column != column2 else row2 > row
        task, name = "position_change", _name(scene, op.cell)
        form = f"move [{name}] {sides[later]} [{name}]"
    return {"task": task, "meta": {"boxes": boxes, "formatted_instruction": form}}


def world_outputs(
    rng: np.random.Generator, before: shapes.Scene, op: shapes.Op, right: shapes.Scene
) -> Iterator[np.ndarray]:
    """Outputs of a turn that are right, or wrong in one of several ways."""
    others = [c for c in before.occupied() if c not in (op.cell, op.target)]
    image, source = shapes.render(right), shapes.render(before)
    yield image
    yield source
    if others:
        cell = others[int(rng.integers(len(others)))]
        shape, colour = before.object(cell)
        names = [name for name in shapes.COLOUR_NAMES if name != colour]
        content = (shape, names[int(rng.integers(len(names)))])
        yield shapes.render(before.put(cell, content))  # another object
        yield shapes.render(right.put(cell, content))  # the right one, and another
        yield shapes.render(right.put(cell, None))
    backgrounds = [name for name in shapes.BACKGROUND_NAMES if name != right.background]
    yield shapes.render(dataclasses.replace(right, background=backgrounds[0]))
    yield (image.astype(np.float32) * 0.5 + source * 0.5).round().astype(np.uint8)
    yield (image.astype(np.float32) * 0.45).round().astype(np.uint8)
    yield rng.integers(0, 256, image.shape).astype(np.uint8)


def world_agreement(reward: Any, sessions: int) -> dict[str, list[tuple[str, float, float]]]:
    """Pairs (kind of edit, exact score, the reward's) by name, of every turn's outputs, each turn
    from the right image."""
    found: dict[str, list[tuple[str, float, float]]] = {"IF": [], "CC": []}
    for index in range(sessions):
        session = shapes.make_session(16, index)
        rng = np.random.default_rng([3, index])
        states = shapes.meanings(session.image, [t.instruction for t in session.turns])
        images, turns = [], []
        for state, after, turn in zip(states, states[1:], session.turns):
            op = shapes.resolve(state, shapes.parse_instruction(turn.instruction))
            turns.append(Turn(turn.instruction, **annotated(state.scene, op)))
            so_far = dataclasses.replace(session, image=session.image, turns=tuple(turns))
            exact_so_far = [t.instruction for t in turns]
            for output in world_outputs(rng, state.scene, op, after.scene):
                noisy = output + rng.normal(0, 3, output.shape)
                noisy = np.clip(noisy, 0, 255).round().astype(np.uint8)
                rollout = np.stack([*images, noisy])
                exact = shapes.verify(session.image, exact_so_far, rollout)[-1]
                (rows,) = reward.judge([Item(so_far, rollout, (len(turns) - 1,))])
                for name, value in zip(("IF", "CC"), exact):
                    if (score := rows[0][name].value) is not None:
                        found[name].append((op.kind, float(value), score))
            images.append(shapes.render(after.scene))
    return found


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, with the mean rank of ties."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values)
        order = np.sort(array)
        return (np.searchsorted(order, array) + np.searchsorted(order, array, "right")) / 2

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def area_under_curve(truth: Sequence[bool], scores: Sequence[float]) -> float:
    """The chance that a right one is above a wrong one; a tie is half."""
    yes = np.array([s for t, s in zip(truth, scores) if t])
    no = np.array([s for t, s in zip(truth, scores) if not t])
    above = (yes[:, None] > no).mean() + 0.5 * (yes[:, None] == no).mean()
    return float(above)


def agreement(found: Mapping[str, Sequence[tuple[str, float, float]]]) -> str:
    lines = [f"{'':22}{'outputs':>8}{'rank corr.':>12}{'AUC (exact > 1/2)':>20}"]
    for name, rows in found.items():
        for kind in [*dict.fromkeys(kind for kind, _, _ in rows), "all"]:
            some = [row for row in rows if kind in (row[0], "all")]
            exact, said = [row[1] for row in some], [row[2] for row in some]
            truth = [value > 0.5 for value in exact]
            line = f"{name + ' ' + kind:22}{len(some):8}"
            if len(set(exact)) > 1 and len(set(said)) > 1:
                line += f"{rank_correlation(exact, said):12.3f}"
                if 0 < sum(truth) < len(truth):
                    line += f"{area_under_curve(truth, said):20.3f}"
            lines.append(line)
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--reward", required=True, help="a name, or package.module:name")
    parser.add_argument("--options", type=json.loads, default={}, help="of the reward, as JSON")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first pair")
    parser.add_argument("--no-boxes", action="store_true")
    parser.add_argument("--world", type=int, metavar="SESSIONS", help="sessions of the world")
    given = parser.parse_args(words)
    where = "function" if ":" in given.reward else "name"
    try:
        reward = load_reward(RewardConfig(**{where: given.reward}, options=given.options))
        for line in reward.probe():
            print(line)
        if given.world:
            print(agreement(world_agreement(reward, given.world)))
            return 0
        pairs = drawn_scenes().pairs(given.pairs, given.first)
        start = time.monotonic()
        said = judge_pairs(reward, pairs, not given.no_boxes)
        seconds = (time.monotonic() - start) / (len(KINDS) * len(pairs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(confusion(said))
    judged = [one for one in said if one.applies()]
    if judged:
        weighted = sum(one.first() for one in judged)
        product = sum(
            all(one.product("right") > one.product(kind) for kind in WRONG) for one in judged
        )
        weights = ", ".join(f"{name} {w:g}" for name, w in WEIGHTS.items())
        print(
            f"\nright first of {len(judged)} judged ({len(said) - len(judged)} do not apply): "
            f"{weighted} ({weighted / len(judged):.1%}) by the weighted reward ({weights}), "
            f"{product} ({product / len(judged):.1%}) by the product; "
            f"{1000 * seconds:.0f} ms an output"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
