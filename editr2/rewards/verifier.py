"""`verifier`: a reasoning verifier (Edit-R1, arXiv 2604.27505): a vision-language model that is
asked about principles of the edit, reasons, gives a verdict 0 or 1 for each, and then a score from
0 to 10, whose tenth is the reward. Any chat model can be asked; one that `editr2 verifier` trained
for it is what the paper means.

Principles are ten or so questions about the edit. They are the turn's own (`meta.principles`), or
asked of the same judge, once for a turn of a session: siblings are held against the same ones.

Several traces (`traces`) are sampled and their scores averaged. A trace without a score is a failed
vote; where most are, the score failed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.errors import UserError, plain
from editr2.rewards.ask import Asker, Asking
from editr2.rewards.base import Calls, Item, Score
from editr2.rewards.client import Answer, Client, Server
from editr2.rewards.eyes import Once
from editr2.rewards.object_edits import scores_among
from editr2.rewards.reading import Unread, json_in
from editr2.rewards.record import Record, pixel_digest
from editr2.rewards.served import Served
from editr2.rewards.traces import KINDS, Principle, numbered, read_principles, read_trace
from editr2.rewards.wording import Prompts
from editr2.sessions import Session

SCORES = ("score", *KINDS)

FOLDER = "verifier"
"""Of its prompts."""

PRINCIPLES_TOKENS = 2048
"""Of an answer that lists principles."""


@dataclass(frozen=True, repr=False)
class VerifierOptions(Server):
    """Options of `verifier`; see `Server` for the rest.

    Args:
        scores: which of score, the verifier's own of the whole, and follow, keep and quality, the
            share of the principles of that kind that hold.
        traces: answers, whose mean counts; at temperature 0 there is one.
        temperature: of traces.
        max_tokens: of a trace; one that is cut off is a failed vote.
        principles: given (a session's own; one without them fails), ask (always of the judge), or
            auto, the session's own where it has some.
        prompts: in place of ours: a folder or a file with `judge` and `principles`; none: ours.
    """

    scores: tuple[str, ...] = scores_among(*SCORES, default=("score",))
    traces: int = setting(1, Bounds(at_least=1, at_most=64))
    temperature: float = setting(1.0, Bounds(at_least=0, at_most=2))
    max_tokens: int = setting(2048, Bounds(at_least=16, at_most=65_536))
    principles: Literal["auto", "given", "ask"] = "auto"
    prompts: str | None = setting(None, path=True)

    @property
    def asking(self) -> Asking:
        """How the judge is asked."""
        return Asking(
            "think",
            "votes",
            votes=self.traces,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
        )


def judge_text(prompts: Prompts, instruction: str, principles: Sequence[Principle]) -> str:
    """What a verifier is asked, behind the two pictures. prompts: of `prompts_of(FOLDER, ...)`."""
    text, _ = prompts(
        "judge",
        instruction=instruction,
        principles=numbered(principles),
        count=len(principles),
    )
    return text


def ask_principles(
    client: Client, prompts: Prompts, image: np.ndarray, said: Sequence[str], turn: int = 0
) -> tuple[Principle, ...]:
    """The judge's principles of an edit.

    Args:
        client: of the judge. prompts: of `prompts_of(FOLDER, ...)`.
        image: the source, uint8 [H, W, 3].
        said: what was asked for, turn by turn, the last being the one in question. turn: its
            number, from 0.

    Raises `Unread` where nothing comes back, or what cannot be read.
    """
    earlier = "".join(f"{n}. {one}\n" for n, one in enumerate(said[:-1], 1))
    history = f"It was edited before, by these requests:\n{earlier}" if earlier else ""
    text, _ = prompts("principles", instruction=said[-1], history=history)
    # Greedy: no seed is in what is asked, so that the record answers every sibling.
    [answer] = client.chat(
        [image, text], max_tokens=PRINCIPLES_TOKENS, name="principles", turn=turn
    )
    if not isinstance(answer, Answer):
        raise Unread(f"principles: {answer.reason if answer else 'no answer'}")
    try:
        return read_principles(json_in(answer.text).get("principles"))
    except (Unread, ValueError) as error:
        raise Unread(f"the judge's principles cannot be read: {error}") from None


class Verifier(Served):
    """See the module."""

    calls_a_turn = 1
    Options = VerifierOptions
    FOLDER = FOLDER
    PLACES: ClassVar[Mapping[str, Any]] = {}
    scale = "a tenth of 0 to 10"

    def __init__(
        self,
        options: VerifierOptions,
        calls: Calls | None = None,
        record: Record | None = None,
        *,
        asker: Asker | None = None,
    ) -> None:
        asker = asker or Asker(Client(options, calls, record), options.asking)
        super().__init__(options, calls, record, asker=asker)
        self._once = Once()

    @property
    def facts(self) -> dict[str, str]:
        return {**super().facts, "principles": self.options.principles}

    def lacks(self, session: Session) -> str | None:
        if self.options.principles == "given":
            for number, turn in enumerate(session.turns, 1):
                if "principles" not in turn.meta:
                    return f"fails, turn {number}: no meta.principles"
        return None

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        try:
            principles = self.principles_of(item.session, turn)
        except (Unread, UserError, ValueError) as error:
            return dict.fromkeys(self.names, Score(None, plain(str(error))))
        instruction = item.session.turns[turn].instruction
        text = judge_text(self.prompts, instruction, principles)

        def read(said: str) -> dict[str, float | None]:
            trace = read_trace(said, len(principles))
            return {"score": trace.score} | {
                str(kind): trace.share(principles, kind) for kind in KINDS
            }

        said = self.asker.read(
            text,
            [item.before(turn), item.images[turn]],
            read,
            SCORES,
            seed=item.seed,
            name=self.names[0],
            turn=turn,
        )
        return {name: said[name] for name in self.names}

    def principles_of(self, session: Session, turn: int) -> Sequence[Principle]:
        """Those of the session, or the judge's. Raises `Unread` or ValueError where there are none
        to be had."""
        given = session.turns[turn].meta.get("principles")
        if self.options.principles != "ask" and given is not None:
            return read_principles(given)
        if self.options.principles == "given":
            raise ValueError(
                "no meta.principles (accepted: a list of objects with text and kind; "
                "options.principles: auto)"
            )
        said = tuple(one.instruction for one in session.turns[: turn + 1])
        image = session.image
        return self._once((pixel_digest(image), said), lambda: self._asked(image, said, turn))

    def _asked(self, image: np.ndarray, said: Sequence[str], turn: int) -> Sequence[Principle]:
        return ask_principles(self.asker.client, self.prompts, image, said, turn)
