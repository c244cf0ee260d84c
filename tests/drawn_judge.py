"""Judges and detectors for tests, which know what they are shown.

`FakeClient` answers as it is told, `Scripted` finds what it is told, and `edit_r2()` is the reward
`edit-r2` on the pairs of drawn_scenes.py with both of them told by the scenes:

    PYTHONPATH=tests python scripts/reward_pairs.py --reward drawn_judge:edit_r2
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from editr2.rewards.ask import Asker
from editr2.rewards.client import Abilities, Answer, Failure, Server
from editr2.rewards.detect import DetectorError
from editr2.rewards.geometry import Box, Found
from editr2.rewards.record import pixel_digest

Says = Callable[[str, list[np.ndarray]], "str | Failure | list[str | Failure]"]


class FakeClient:
    """In place of `Client`. says: of a prompt's text and images, what comes back: one for all
    votes, or a list with one each."""

    def __init__(self, says: Says | str) -> None:
        self.says: Says = (lambda text, images: says) if isinstance(says, str) else says
        self.server, self.known = Server(url="http://nowhere"), None
        self.asked: list[dict[str, Any]] = []

    def chat(self, parts: Sequence[Any], *, n: int = 1, **where: Any) -> list[Any]:
        if where.get("recorded"):  # there is no record
            return [None] * n
        text = "\n".join(part for part in parts if isinstance(part, str))
        images = [part for part in parts if not isinstance(part, str)]
        self.asked.append({"text": text, "images": images, "n": n, **where})
        said = self.says(text, images)
        said = said if isinstance(said, list) else [said] * n
        return [one if isinstance(one, Failure) else Answer(one, "stop") for one in said]

    def probe(self, **_: Any) -> list[str]:
        return []

    def abilities(self) -> Abilities:
        return Abilities("judge")


class Scripted:
    """In place of a detector. found: of an image (`pixel_digest`), name -> boxes, each (x0, y0, x1,
    y1) or with a score behind; a name that it does not have is found nowhere. An image that it does
    not know fails. `asked` has every (image, names, threshold)."""

    def __init__(self, found: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> None:
        self.found = found
        self.asked: list[tuple[str, tuple[str, ...], float]] = []

    def find(
        self, image: np.ndarray, names: Sequence[str], *, threshold: float = 0.3
    ) -> list[list[Found]]:
        key = pixel_digest(image)
        self.asked.append((key, tuple(names), threshold))
        if key not in self.found:
            raise DetectorError("detector: it is not there")
        rows = [self._row(self.found[key], name) for name in names]
        return [[one for one in row if one.score > threshold] for row in rows]

    @staticmethod
    def _row(found: Mapping[str, Sequence[Sequence[float]]], name: str) -> list[Found]:
        boxes = [Found(Box(*b[:4]), b[4] if len(b) > 4 else 0.9) for b in found.get(name, ())]
        return sorted(boxes, key=lambda one: -one.score)


def neighbour(name: str) -> ModuleType:
    """Another helper of this folder, which is on nobody's import path."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


class ByWord(dict):
    """Boxes by the word that a name ends in: a `red cup` is found where a `cup` is."""

    def get(self, name: str, otherwise: Any = ()) -> Any:
        return super().get(name.split()[-1], otherwise)


def on_pairs(count: int, scores: Sequence[str] = ("IF", "CC", "GA"), **options: Any) -> Any:
    """The reward on `pairs(count)`: the detector finds what was drawn, and the judge says what is
    so. Features are a random DINOv3's."""
    from editr2.rewards.edit_r2 import EditR2, EditR2Options
    from editr2.rewards.eyes import Eyes

    scenes = neighbour("drawn_scenes")
    found: dict[str, Any] = {}
    kinds: dict[str, tuple[Any, str]] = {}
    for pair in scenes.pairs(count):
        found[pixel_digest(pair.session.image)] = ByWord(pair.boxes)
        for kind, output in pair.outputs.items():
            found[pixel_digest(output.image)] = ByWord(output.boxes)
            kinds[pixel_digest(output.image)] = pair, kind

    def says(text: str, images: list[np.ndarray]) -> str:
        pair, kind = kinds[pixel_digest(images[-1])]
        done = kind in ("right", "ruined background")
        if "answer_final" in text:
            verdict = "yes" if kind == "right" else "no"
            return f"<answer_turn_1>{verdict}</answer_turn_1><answer_final>{verdict}</answer_final>"
        if "NOTHING" in text:
            wanted = pair.session.turns[0].meta["formatted_instruction"].split("[")[-1]
            return wanted.split("]")[0] if done else "SOMETHING ELSE"
        return "yes" if done else "no"

    folder = Path(tempfile.mkdtemp()) / "dinov3"
    features = str(neighbour("tiny_lookers").dinov3(folder))
    made = EditR2Options(
        detector=None, features=features, scores=tuple(scores), url="http://nowhere", **options
    )
    eyes = Eyes(made, detector=Scripted(found))
    return EditR2(made, eyes=eyes, asker=Asker(FakeClient(says), made))  # type: ignore[arg-type]


def edit_r2() -> Any:
    """IF, CC and GA."""
    return on_pairs(200)


def edit_r2_seen() -> Any:
    """IF and CC alone."""
    return on_pairs(200, ("IF", "CC"))
