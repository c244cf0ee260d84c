"""The judge and the detector that annotate: every answer is on the record, so that a second run
asks nothing, and one that was killed goes on."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.errors import UserError, plain
from editr2.rewards.ask import Asker, Asking, Verdict
from editr2.rewards.base import Calls
from editr2.rewards.client import Answer, Client, Server
from editr2.rewards.eyes import DETECTOR, Eyes, Looking
from editr2.rewards.geometry import Box, Found, deduplicate
from editr2.rewards.messages import Part
from editr2.rewards.reading import YES_NO, Unread, json_in
from editr2.rewards.record import Record, pixel_digest, request_key
from editr2.rewards.wording import prompts_of

ATTEMPTS = 2
"""An answer that cannot be used is asked for once more, with what is wrong with it."""

MOST_TOKENS = 1024


@dataclass(frozen=True)
class Options(Server):
    """Who annotates.

    Args:
        detector: a folder or an id of the hub of Grounding DINO or OWLv2; `http://...`, a detector
            behind an address; `package.module:name`; none: what the judge names is not looked for.
        detector_kind: of a folder or an id: grounding-dino or owlv2.
        device: where the detector is: cpu, cuda:1 or the like.
        threshold: a thing is there where the detector is surer of it.
        most: things that a picture is asked for, at most.
        prompts: a folder of prompts in place of ours (objects.md, turn.md, confirm.md, again.md,
            language.md), or some of them.
    """

    detector: str | None = DETECTOR
    detector_kind: Literal["grounding-dino", "owlv2"] = "grounding-dino"
    device: str = "cpu"
    threshold: float = setting(0.35, Bounds(at_least=0, at_most=1))
    most: int = setting(12, Bounds(at_least=1, at_most=64))
    prompts: str | None = None
    calls: Calls = field(default_factory=Calls)


class NoAnswer(Exception):
    """The judge did not answer, or not what can be read: `kind` is one of `problems.KINDS`."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind, self.why = kind, why


class Judge:
    """Questions about pictures. From as many threads as you like; raises `UserError` where nothing
    could be asked at all."""

    def __init__(self, options: Options, record: Record | None) -> None:
        self.prompts = prompts_of("annotate", options.prompts)
        self.client = Client(options, options.calls, record)
        self.asker = Asker(self.client, Asking(votes=1, temperature=0.0, max_tokens=MOST_TOKENS))
        self._ready = threading.Lock()

    @property
    def name(self) -> str:
        return f"vlm {self.client.model}"

    def text(self, prompt: str, **fields: object) -> str:
        return self.prompts(prompt, **fields)[0]

    def json(self, text: str, image: np.ndarray, *, name: str, turn: int = 0) -> dict[str, Any]:
        """The object of JSON that comes back. Raises `NoAnswer`."""
        parts: list[Part] = [image, text]
        asked: dict[str, Any] = {"max_tokens": MOST_TOKENS, "name": name, "turn": turn}
        [answer] = self.client.chat(parts, recorded=True, **asked)
        if answer is None:
            self._answers()
            [answer] = self.client.chat(parts, **asked)
        if not isinstance(answer, Answer):
            raise NoAnswer("no answer", answer.reason if answer else "nothing came back")
        if answer.finish == "length":
            raise NoAnswer("unread", f"cut off after {MOST_TOKENS} tokens")
        try:
            return json_in(answer.text)
        except Unread as unread:
            raise NoAnswer("unread", str(unread)) from None

    def agrees(
        self, prompt: str, image: np.ndarray, *, name: str, turn: int = 0, **fields: object
    ) -> Verdict:
        """The verdict to a question of yes or no."""
        text, tail = self.prompts(prompt, **fields)
        return self.asker.yes_no(text, [image], name=name, turn=turn, tail=tail)

    def marks(
        self, prompt: str, image: np.ndarray, marks: tuple[str, ...], *, name: str, **fields: object
    ) -> dict[str, Verdict]:
        """A verdict of yes or no by mark."""
        text = self.text(prompt, **fields)
        return self.asker.json(
            text, [image], dict.fromkeys(marks, YES_NO), name=name, constrain=False
        )

    def _answers(self) -> None:
        """Whether a server is there is found out once, and a run without one ends here."""
        with self._ready:
            if self.client.known is None:
                self.client.probe(images=1, votes=False)


class Looker:
    """Where things are in a picture, by the detector; None of `name`: there is no detector."""

    def __init__(
        self, options: Options, record: Record | None = None, *, eyes: Eyes | None = None
    ) -> None:
        looking = Looking(
            detector=options.detector,
            detector_kind=options.detector_kind,
            features=None,
            device=options.device,
        )
        self.eyes = eyes or Eyes(looking)
        self.threshold, self._record = options.threshold, record

    @property
    def name(self) -> str | None:
        return None if self.eyes.detector is None else f"detector {self.eyes.facts['detector']}"

    def find(self, image: np.ndarray, name: str) -> list[Found]:
        """The surest first, each place once. Raises `DetectorError`; `ConfigError` where there can
        be no detector."""
        asked = {"names": [name], "threshold": self.threshold, "image": pixel_digest(image)}
        key = request_key(api="detector", model=self.name, **asked)
        known = None if self._record is None else self._record.find(key)
        if known is not None:
            return [Found(Box(*box), score) for *box, score in known]
        found = deduplicate(self.eyes.find(image, name, self.threshold))
        if self._record is not None:
            rows = [[*one.box, one.score] for one in found]
            self._record.write(key, rows, seconds=0.0, tries=1, name=f"detector: {plain(name)}")
        return found


__all__ = ["ATTEMPTS", "Judge", "Looker", "NoAnswer", "Options", "UserError"]
