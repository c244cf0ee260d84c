"""`verifier`: a reasoning verifier (Edit-R1, arXiv 2604.27505): a vision-language model that is
asked about principles of the edit, reasons, gives a verdict 0 or 1 for each, and then a score from
0 to 10, whose tenth is the reward. Any chat model can be asked; one that `editr2 verifier` trained
for it is what the paper means.

Principles are ten or so questions about the edit. They are the turn's own (`meta.principles`), or
asked of the same judge, once for a turn of a session: siblings are held against the same ones.

Several traces (`traces`) are sampled and their scores averaged. A trace without a score is a failed
vote; where most are, the score failed.

It is asked behind a server (`url`), or is a folder that is loaded into the run's own process
(`weights`); where neither is named, it is the one that ships, which knows the shapes world alone.
In process all turns of a batch of rollouts are asked together, and an answer depends on nothing but
its own question and seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.config.plugins import resolve
from editr2.config.settings import COUNT
from editr2.errors import ConfigError, UserError, plain
from editr2.rewards.ask import Asker, Asking
from editr2.rewards.base import Calls, Held, Item, Score
from editr2.rewards.client import Answer, Client, Server
from editr2.rewards.eyes import Once
from editr2.rewards.models import TRAINER
from editr2.rewards.object_edits import scores_among
from editr2.rewards.reading import Unread, json_in
from editr2.rewards.record import Record, pixel_digest
from editr2.rewards.served import Served
from editr2.rewards.traces import KINDS, Principle, numbered, read_principles, read_trace
from editr2.rewards.wording import Prompts
from editr2.sessions import Session

SCORES = ("score", *KINDS)

AS: Mapping[str, str] = {"IF": "follow", "CC": "keep", "GA": "score"}
"""Scores by the names that Edit-R2 and MT-EditFlow have for them: their weights, and the filter of
turns after a failed instruction, go by these."""

FOLDER = "verifier"
"""Of its prompts."""

PRINCIPLES_TOKENS = 2048
"""Of an answer that lists principles."""

JUDGE = "judge.md"
"""In a verifier's folder: the words that it learnt to be asked with."""

SHIPPED = Path(__file__).parent.parent / "assets" / "verifier-small"
"""The shapes world's own."""

IN_PROCESS = "editr2.verifier.local:Local"
"""What answers in place of a server. It stands above the rewards and is known by its address."""

PRINCIPLES = "principles"
"""Of a turn's `meta`."""


@dataclass(frozen=True, repr=False)
class VerifierOptions(Server):
    """Options of `verifier`; see `Server` for the rest.

    Args:
        scores: which of score, the verifier's own of the whole, and follow, keep and quality, the
            share of the principles of that kind that hold; IF, CC and GA are follow, keep and
            score by the names that the presets edit-r2 and mt-editflow weigh and filter by.
        traces: answers, whose mean counts; at temperature 0 there is one.
        temperature: of traces.
        max_tokens: of a trace; one that is cut off is a failed vote.
        principles: given (a session's own; one without them fails), ask (always of the judge), or
            auto, the session's own where it has some.
        prompts: in place of ours: a folder or a file with `judge` and `principles`; none: the
            `judge.md` of the folder of `weights`, if there is one, else ours.
        weights: a folder as transformers has it, or a hub id, loaded into this process in place of
            a server; none without a url: the shipped verifier of the shapes world.
        dtype: float32 or bfloat16, of weights.
        rows: traces at once, of weights; a trace does not depend on how many others there are,
            to the last bit for one number of rows.
        device: of weights: cpu, cuda:1 or the like, or trainer, the GPU that trains, which they
            leave while there is training.
    """

    scores: tuple[str, ...] = scores_among(*SCORES, *AS, default=("score",))
    traces: int = setting(1, Bounds(at_least=1, at_most=64))
    temperature: float = setting(1.0, Bounds(at_least=0, at_most=2))
    max_tokens: int = setting(2048, Bounds(at_least=16, at_most=65_536))
    principles: Literal["auto", "given", "ask"] = "auto"
    prompts: str | None = setting(None, path=True)
    weights: str | None = setting(None, path=True)
    dtype: Literal["float32", "bfloat16"] = "float32"
    rows: int = setting(32, COUNT)
    device: str = TRAINER

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


def own_prompts(weights: str) -> str | None:
    """A verifier's folder, where it says what it is to be asked with."""
    return weights if (Path(weights).expanduser() / JUDGE).is_file() else None


def local_options(options: VerifierOptions) -> VerifierOptions | None:
    """Of a verifier in this process, with its folder and what is known of it; None of a server's.
    Raises `ConfigError` where both are named, or an option has no use beside `weights`."""
    served = options.url is not None or options.url_env is not None
    if options.weights is None and (served or not SHIPPED.is_dir()):
        return None
    if served:
        raise ConfigError("weights: beside a url (accepted: one of them)")
    for one in fields(Server):
        if getattr(options, one.name) != getattr(Server(), one.name):
            raise ConfigError(f"{one.name}: of a server alone (accepted with url)")
    weights = options.weights or str(SHIPPED)
    return replace(options, weights=weights, prompts=options.prompts or own_prompts(weights))


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
        self.local: Any = None
        self.fills = 1
        own = local_options(options) if asker is None else None
        if own is not None:
            options = own
            self.local = resolve("weights", IN_PROCESS)(own, record)
            asker = Asker(self.local, own.asking)
            self.calls_a_turn = 0
            # All that a rollout batch has to be asked is one call, on the main thread.
            vars(self).update(concurrency=None, batch=None)
            self.fills = max(1, own.rows // (own.traces if own.temperature else 1))
        asker = asker or Asker(Client(options, calls, record), options.asking)
        super().__init__(options, calls, record, asker=asker)
        self._once = Once()

    @property
    def wants(self) -> tuple[str, ...]:
        """Of a turn's `meta`, where somebody can tell it of the sessions that a run draws."""
        return () if self.options.principles == "ask" else (PRINCIPLES,)

    @property
    def version(self) -> str:
        return super().version if self.local is None else f"{super().version}{self.local.version}"

    @property
    def facts(self) -> dict[str, str]:
        facts = super().facts if self.local is None else self._local_facts()
        return {**facts, "principles": self.options.principles}

    def _local_facts(self) -> dict[str, str]:
        asking = self.options.asking
        votes = {"votes": f"{self._votes} at temperature {asking.temperature:g}"}
        return {**self.local.facts, **votes, **self.prompts.facts, "scale": self.scale}

    @property
    def _votes(self) -> int:
        return self.options.traces if self.options.temperature else 1

    def quick_look(self) -> None:
        """Looks at the weights' folder without reading them; a server is asked later."""
        if self.local is not None:
            self.local.quick_look()

    def models_held(self, items: Sequence[Item]) -> list[Held]:
        """The verifier in this process, asked about the longest of these turns."""
        if self.local is None:
            return []
        asked = []
        for item in items:
            for turn in item.asked:
                given, more = item.session.turns[turn].meta.get(PRINCIPLES), 0
                if self.options.principles == "ask" or given is None:
                    given, more = [], PRINCIPLES_TOKENS  # the judge's own, which nobody knows yet
                text = judge_text(
                    self.prompts,
                    item.session.turns[turn].instruction,
                    read_principles(given) if given else (),
                )
                asked.append((self._parts(item, turn, text), more))
        return [self.local.takes(asked, self._votes)]

    def probe(self) -> list[str]:
        """Loads the weights, or asks the server what it does."""
        if self.local is None:
            return super().probe()
        self.local.load()
        return []

    def take(self) -> None:
        """Weights come to the trainer's GPU."""
        if self.local is not None:
            self.local.take()

    def lend(self) -> None:
        """Weights leave the trainer's GPU."""
        if self.local is not None:
            self.local.lend()

    def lacks(self, session: Session) -> str | None:
        if self.options.principles == "given":
            for number, turn in enumerate(session.turns, 1):
                if PRINCIPLES not in turn.meta:
                    return f"fails, turn {number}: no meta.principles"
        return None

    def judge(self, items: Sequence[Item]) -> list[list[dict[str, Score]]]:
        if self.local is None:
            return super().judge(items)
        asked = []
        for item in items:
            for turn in item.asked:
                try:
                    _, text = self._question(item, turn)
                except (Unread, UserError, ValueError):
                    continue  # `turn` says it
                asked.append((self._parts(item, turn, text), self._how(item, turn), item.rollout))
        with self.local.ahead(asked):
            return super().judge(items)

    def turn(self, item: Item, turn: int) -> dict[str, Score]:
        try:
            principles, text = self._question(item, turn)
        except (Unread, UserError, ValueError) as error:
            return dict.fromkeys(self.names, Score(None, plain(str(error))))

        def read(said: str) -> dict[str, float | None]:
            trace = read_trace(said, len(principles))
            return {"score": trace.score} | {
                str(kind): trace.share(principles, kind) for kind in KINDS
            }

        *images, text = self._parts(item, turn, text)
        how = self._how(item, turn)
        said = self.asker.read(
            text, images, read, SCORES, seed=how["seed"], name=how["name"], turn=turn
        )
        return {name: said[AS.get(name, name)] for name in self.names}

    def _question(self, item: Item, turn: int) -> tuple[Sequence[Principle], str]:
        """The principles of a turn, and what is asked of it behind the pictures. Raises as
        `principles_of` does."""
        principles = self.principles_of(item.session, turn)
        instruction = item.session.turns[turn].instruction
        return principles, judge_text(self.prompts, instruction, principles)

    def _parts(self, item: Item, turn: int, text: str) -> list[Any]:
        return [item.before(turn), item.images[turn], text]

    def _how(self, item: Item, turn: int) -> dict[str, Any]:
        """Of a question's votes, what `Asker` tells the judge."""
        asking = self.options.asking
        return {
            "temperature": asking.temperature,
            "max_tokens": asking.max_tokens,
            "n": self._votes,
            "seed": item.seed,
            "name": self.names[0],
            "turn": turn,
        }

    def principles_of(self, session: Session, turn: int) -> Sequence[Principle]:
        """Those of the session, or the judge's. Raises `Unread` or ValueError where there are none
        to be had."""
        given = session.turns[turn].meta.get(PRINCIPLES)
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
