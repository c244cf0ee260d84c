"""Questions to a judge, and numbers in [0, 1] from what it answers.

    asker = Asker(Client(options, calls, record), options)     # options: Server and Asking in one
    asker.yes_no(prompt, [before, after], seed=item.seed, name="IF", turn=t)
    asker.digits(prompt, images, high=5, ...)                  # PKU's: expectation over 0..5
    asker.levels(prompt, images, ["ruined", "flawed", "clean"], ...)
    asker.tagged(prompt, images, {"turn1": YES_NO, "turn2": YES_NO}, ...)      # a dict of them
    asker.json(prompt, images, {"score": [numbers(0, 25)] * 2}, ...)           # a dict of them

Each returns a `Verdict`, which is a `Score` and can be returned by a reward as it is, or a dict of
such. The three first are answered in the best way there is, and `Verdict.by` says which:

- `logprobs`: greedy, one short answer; the expectation over its first word, by the *text* of the
  most probable tokens (all spellings of a word count together). At least the share `mass` of the
  probability must lie on what was asked for, else it failed.
- `systemone`: the same from `/v1/systemone` of `transformers serve`, which gives no log-probs. Not
  with more than 4 images.
- `votes`: `votes` answers at `temperature`, each read as text; their mean, where at least half of
  them can be read and were not cut off, else it failed for the first one's reason.

`ask: think` (the judge reasons, then says its verdict between tags) is always by votes; so are
`tagged` and `json`. What cannot be read or is out of range is a failure that quotes it; it is never
a number.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.errors import ConfigError, UserError, plain
from editr2.rewards.base import Score
from editr2.rewards.client import (
    SYSTEMONE_IMAGES,
    Abilities,
    Answer,
    Client,
    Failure,
    Part,
)
from editr2.rewards.probe import ALONE
from editr2.rewards.reading import (
    YES_NO,
    Fields,
    Read,
    Scale,
    Unread,
    answer_part,
    first_word,
    graded,
    json_in,
    names_of,
    numbers,
    objects_of,
    quoted,
    schema_of,
    tags_of,
)

DIRECT_TOKENS = 8
"""Of an answer that is read by its log-probs: the first word, behind blanks and quotes."""

SHORT_TOKENS = 64
"""Of an answer in a word that is read as text."""

_REASON = 240
"""Characters of a judge's own words in a reason."""

Images = Sequence[np.ndarray]


@dataclass(frozen=True)
class Asking:
    """How a judge is asked. An `Options` that inherits from it has these fields beside its own.

    Args:
        ask: direct (one short answer, an expectation over its probabilities where the server gives
            them) or think (it reasons first; the mean of several votes).
        answers: auto (log-probs, else systemone, else votes, as the server can), or one of
            logprobs, systemone and votes, which then has to be there. Of direct.
        votes: answers to each question that is answered by votes.
        temperature: of votes; at 0 there is one.
        max_tokens: of an answer that reasons; one that is cut off is a failed vote.
        mass: least share of the probability that must lie on what was asked for.
    """

    ask: Literal["direct", "think"] = "direct"
    answers: Literal["auto", "logprobs", "systemone", "votes"] = "auto"
    votes: int = setting(4, Bounds(at_least=1, at_most=64))
    temperature: float = setting(0.6, Bounds(at_least=0, at_most=2))
    max_tokens: int = setting(1024, Bounds(at_least=16, at_most=65_536))
    mass: float = setting(0.5, Bounds(above=0, at_most=1))


@dataclass(frozen=True)
class Verdict(Score):
    """A score, and how it came about. by: `logprobs`, `systemone` or `votes`. votes: of those
    that could be read, each in [0, 1] (of probabilities, none). asked: how many votes there were
    to be. spread: their standard deviation, None where there is none to speak of."""

    by: str = ""
    votes: tuple[float, ...] = ()
    asked: int = 0

    @property
    def spread(self) -> float | None:
        return statistics.pstdev(self.votes) if len(self.votes) > 1 else None


class Asker:
    """Questions to one judge. From as many threads as you like.

    Every question takes a `prompt`, a text, or texts and images in order; `images`, uint8
    [H, W, 3], which come before the text; `seed`, of the rollout (`Item.seed`); and `name` and
    `turn` (from 0), of the score. Nothing is raised for what a server does.
    """

    def __init__(self, client: Client, asking: Asking | None = None) -> None:
        self.client, self.asking = client, asking or Asking()

    @property
    def facts(self) -> dict[str, str]:
        """For the header of a run: the judge, how it is asked, and how it answers."""
        server, asking, known = self.client.server, self.asking, self.client.known
        pictures = "png" if server.images == "png" else f"jpeg {server.quality}"
        by = self._route(known) if known else "as the server can"
        facts = {
            "judge": known.model if known else server.model or "the only one of its server",
            "ask": asking.ask,
            "answered by": by,
            "votes": f"{self._count} at temperature {asking.temperature:g}",
            "images": pictures + (f", at most {server.max_side} px" if server.max_side else ""),
        }
        return facts

    def probe(self, *, images: int = 2, schema: bool = False, votes: bool = False) -> list[str]:
        """What the server cannot do of what this will ask of it, a line each; raises `ConfigError`
        or `RewardFailure` where it cannot work at all. images: at most so many in a prompt. schema,
        votes: whether `json` will be asked, and anything that is always by votes."""
        asking = self.asking
        direct = asking.ask == "direct"
        notes = self.client.probe(
            images=images,
            logprobs=direct and asking.answers in ("auto", "logprobs"),
            systemone=direct and asking.answers == "systemone",
            votes=self._count > 1,
            schema=schema,
        )
        known = self.client.abilities()
        if not votes and self._route(known) != "votes":
            notes = [note for note in notes if note != ALONE]
        if direct and asking.answers == "logprobs" and not known.top_logprobs:
            raise ConfigError(
                f"answers: logprobs, and {known.model} at {self.client.at} gives none (accepted: "
                f"a server that does, such as vLLM; auto)"
            )
        if direct and asking.answers == "systemone" and not known.systemone:
            raise ConfigError(
                f"answers: systemone, and {self.client.at} has no /v1/systemone (accepted: "
                f"transformers serve, 5.23 or later; auto)"
            )
        return notes

    def yes_no(
        self,
        prompt: str | Sequence[Part],
        images: Images = (),
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
        tail: str | None = None,
    ) -> Verdict:
        """The probability of yes, against that of no. tail: what the prompt is told at its end on
        how to answer, in place of ours; "" where it says so itself."""
        return self.ask(YES_NO, prompt, images, seed=seed, name=name, turn=turn, tail=tail)

    def digits(
        self,
        prompt: str | Sequence[Part],
        images: Images = (),
        *,
        low: int = 0,
        high: int = 5,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
        tail: str | None = None,
    ) -> Verdict:
        """The expected number from low to high, which are 0 and 1 of the score."""
        scale = numbers(low, high)
        return self.ask(scale, prompt, images, seed=seed, name=name, turn=turn, tail=tail)

    def levels(
        self,
        prompt: str | Sequence[Part],
        images: Images,
        levels: Sequence[str],
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
        tail: str | None = None,
    ) -> Verdict:
        """The expected level; the first is 0 of the score, the last 1."""
        scale = graded(levels)
        return self.ask(scale, prompt, images, seed=seed, name=name, turn=turn, tail=tail)

    def ask(
        self,
        scale: Scale,
        prompt: str | Sequence[Part],
        images: Images = (),
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
        tail: str | None = None,
    ) -> Verdict:
        """What the three above do, of any scale."""
        where = _Where(seed, name, turn)
        try:
            if self.asking.ask == "think":
                parts = _parts(prompt, images, scale.think if tail is None else tail)
                return self._votes(parts, tags_of({"answer": scale}), ("answer",), where)["answer"]
            return self._direct(scale, prompt, images, tail, where)
        except UserError as error:
            return Verdict(None, plain(str(error)))

    def tagged(
        self,
        prompt: str | Sequence[Part],
        images: Images,
        tags: Mapping[str, Scale],
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
    ) -> dict[str, Verdict]:
        """Verdicts between tags, `<turn1>yes</turn1>`, by tag; of a tag that stands several times,
        the last counts. The prompt says what to write."""
        return self.read(
            prompt, images, tags_of(tags), tuple(tags), seed=seed, name=name, turn=turn
        )

    def json(
        self,
        prompt: str | Sequence[Part],
        images: Images,
        fields: Fields,
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
        reason: str | None = "reason",
        constrain: bool = True,
    ) -> dict[str, Verdict]:
        """Verdicts in an object of JSON, wherever in the answer it stands (the last one counts). A
        list of scales is a list of so many values, called `name[0]`, `name[1]`.

        reason: the name of a text that comes first, or None. constrain: have the server keep to
        these fields and their ranges, where it can.
        """
        names, where = names_of(fields), _Where(seed, name, turn)
        try:
            parts = _parts(prompt, images, "")
            schema = schema_of(fields, reason) if constrain else None
            if schema is not None and not self._follows(parts, schema, where):
                schema = None
            return self._votes(parts, objects_of(fields), names, where, schema)
        except UserError as error:
            return _all(names, Verdict(None, plain(str(error))))

    def read(
        self,
        prompt: str | Sequence[Part],
        images: Images,
        read: Read,
        names: Sequence[str],
        *,
        seed: int = 0,
        name: str = "",
        turn: int = 0,
    ) -> dict[str, Verdict]:
        """Votes on values of these names, which `read` finds in the text of each; for a format of
        one's own (`last_tag`, `json_in` and the scales' `worth` help)."""
        try:
            parts = _parts(prompt, images, "")
            return self._votes(parts, read, names, _Where(seed, name, turn))
        except UserError as error:
            return _all(names, Verdict(None, plain(str(error))))

    # ------------------------------------------------------------------------------- the ways

    @property
    def _count(self) -> int:
        return self.asking.votes if self.asking.temperature else 1

    def _route(self, known: Abilities) -> Literal["logprobs", "systemone", "votes"]:
        if self.asking.ask == "think":
            return "votes"
        if self.asking.answers != "auto":
            return self.asking.answers
        if known.top_logprobs:
            return "logprobs"
        return "systemone" if known.systemone else "votes"

    def _direct(
        self,
        scale: Scale,
        prompt: str | Sequence[Part],
        images: Images,
        tail: str | None,
        where: _Where,
    ) -> Verdict:
        parts = _parts(prompt, images, scale.direct if tail is None else tail)
        bare = _parts(prompt, images, "")
        count = sum(not isinstance(part, str) for part in parts)
        if self.client.known is None and self.asking.answers == "auto":
            # What is on the record needs no server that is up.
            for way in (self._by_logprobs, self._by_systemone):
                if found := way(scale, parts, bare, where, recorded=True):
                    return found
            if None not in self._answers(parts, where, max_tokens=SHORT_TOKENS, recorded=True):
                return self._short(scale, parts, where)
        route = self.asking.answers
        if route == "auto":
            route = self._route(self.client.abilities())
        if route == "systemone" and (count > SYSTEMONE_IMAGES or scale.question is None):
            route = "votes"
        if route == "votes":
            return self._short(scale, parts, where)
        way = self._by_logprobs if route == "logprobs" else self._by_systemone
        verdict = way(scale, parts, bare, where, recorded=False)
        assert verdict is not None
        return verdict

    def _short(self, scale: Scale, parts: Sequence[Part], where: _Where) -> Verdict:
        """By votes in a word."""

        def read(text: str) -> dict[str, float | None]:
            return {"": scale.worth(answer_part(text))}

        return self._votes(parts, read, ("",), where, max_tokens=SHORT_TOKENS)[""]

    def _by_logprobs(
        self,
        scale: Scale,
        parts: Sequence[Part],
        bare: Sequence[Part],
        where: _Where,
        *,
        recorded: bool,
    ) -> Verdict | None:
        known = self.client.known
        [answer] = self.client.chat(
            parts,
            max_tokens=DIRECT_TOKENS,
            top_logprobs=(known.top_logprobs if known else 0) or 20,
            seed=where.seed,
            name=where.name,
            turn=where.turn,
            recorded=recorded,
        )
        if answer is None:
            return None
        if isinstance(answer, Failure):
            return Verdict(None, answer.reason, by="logprobs")
        try:
            masses, seen = first_word(answer.top, scale)
            if seen < self.asking.mass:
                raise Unread(
                    f"{scale.what} had {seen:.2f} of the probability where {quoted(answer.text)} "
                    f"came back (accepted: at least {self.asking.mass:g}, options.mass)"
                )
        except Unread as unread:
            return Verdict(None, str(unread), by="logprobs")
        return _expected(scale, masses, seen, "logprobs")

    def _by_systemone(
        self,
        scale: Scale,
        parts: Sequence[Part],
        bare: Sequence[Part],
        where: _Where,
        *,
        recorded: bool,
    ) -> Verdict | None:
        if scale.question is None or sum(not isinstance(p, str) for p in bare) > SYSTEMONE_IMAGES:
            return None
        answer = self.client.decide(
            bare, scale.question, name=where.name, turn=where.turn, recorded=recorded
        )
        if answer is None:
            return None
        if isinstance(answer, Failure):
            return Verdict(None, answer.reason, by="systemone")
        return _expected(scale, dict(zip(scale.labels, answer)), 1.0, "systemone")

    def _follows(self, parts: Sequence[Part], schema: Mapping[str, Any], where: _Where) -> bool:
        """Whether answers keep to a schema: the server's do, or those on the record did, for which
        no server needs to be up."""
        if self.client.known is None:
            for form in (schema, None):
                if None not in self._answers(parts, where, form, recorded=True):
                    return form is not None
        return self.client.abilities().schema

    def _answers(
        self,
        parts: Sequence[Part],
        where: _Where,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        *,
        recorded: bool = False,
    ) -> list[Answer | Failure | None]:
        return self.client.chat(
            parts,
            temperature=self.asking.temperature,
            max_tokens=max_tokens or self.asking.max_tokens,
            n=self._count,
            seed=where.seed,
            schema=schema,
            name=where.name,
            turn=where.turn,
            recorded=recorded,
        )

    def _votes(
        self,
        parts: Sequence[Part],
        read: Read,
        names: Sequence[str],
        where: _Where,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> dict[str, Verdict]:
        answers = self._answers(parts, where, schema, max_tokens)
        read_votes: list[tuple[Mapping[str, float | None], str]] = []
        failures: list[str] = []
        for answer in answers:
            try:
                read_votes.append(_vote(answer, read, names))
            except Unread as unread:
                failures.append(str(unread))
        asked = len(answers)
        if 2 * len(read_votes) < asked:
            many = f" ({len(failures)} of {asked} votes failed)" if asked > 1 else ""
            failed = Verdict(None, f"{failures[0]}{many}", by="votes", asked=asked)
            return _all(names, failed)
        return {name: _mean(name, read_votes, asked) for name in names}


@dataclass(frozen=True)
class _Where:
    seed: int
    name: str
    turn: int


def _parts(prompt: str | Sequence[Part], images: Images, tail: str) -> list[Part]:
    parts: list[Part] = list(images)
    parts += [prompt] if isinstance(prompt, str) else prompt
    if not tail:
        return parts
    if parts and isinstance(parts[-1], str):
        return [*parts[:-1], f"{parts[-1].rstrip()}\n\n{tail}"]
    return [*parts, tail]


def _all(names: Sequence[str], verdict: Verdict) -> dict[str, Verdict]:
    return dict.fromkeys(names, verdict)


# --------------------------------------------------------------------------------------- votes


def _vote(
    answer: Answer | Failure | None, read: Read, names: Sequence[str]
) -> tuple[Mapping[str, float | None], str]:
    """Its values, and its words."""
    if not isinstance(answer, Answer):
        raise Unread(answer.reason if answer else "no answer")
    if answer.finish == "length":
        tail = plain(answer.text)[-60:]
        raise Unread(f"the answer was cut off by max_tokens, behind {quoted(tail)}")
    values = read(answer.text)
    for name in names:
        value = values.get(name)
        if name not in values or (value is not None and not 0 <= value <= 1):
            given = f"{value!r}" if name in values else "nothing"
            raise Unread(f"{given} was read for {name or 'the verdict'} (accepted: 0 to 1)")
    return values, answer.reasoning or answer.text


def _mean(
    name: str, votes: Sequence[tuple[Mapping[str, float | None], str]], asked: int
) -> Verdict:
    """The mean of one of the values; it does not apply where most votes say so."""
    said = [(value, words) for values, words in votes if (value := values[name]) is not None]
    if 2 * len(said) < len(votes) or not said:
        excerpt = _excerpt(votes[0][1])
        return Verdict(None, excerpt, applies=False, by="votes", asked=asked)
    numbers_ = tuple(value for value, _ in said)
    mean = math.fsum(numbers_) / len(numbers_)
    _, words = min(said, key=lambda pair: abs(pair[0] - mean))
    count = f"{len(numbers_)} of {asked} votes" if asked > 1 else ""
    spread = f", spread {statistics.pstdev(numbers_):.2f}" if len(numbers_) > 1 else ""
    reason = ": ".join(filter(None, [count + spread, _excerpt(words)]))
    return Verdict(mean, reason or None, by="votes", votes=numbers_, asked=asked)


def _excerpt(words: str) -> str:
    """What a judge gave as its reason, in one line: a JSON verdict's text, or what stands before
    the last tag."""
    try:
        found = json_in(words)
    except Unread:
        found = {}
    texts = [value for value in found.values() if isinstance(value, str) and " " in value]
    text = max(texts, key=len) if texts else re.sub(r"<(/?)[\w.-]+>", " ", answer_part(words))
    text = plain(text)
    return text if len(text) <= _REASON else f"{text[:_REASON]}..."


def _expected(scale: Scale, masses: Mapping[str, float], seen: float, by: str) -> Verdict:
    total = math.fsum(masses.values())
    value = math.fsum(p * scale.labels[label] for label, p in masses.items()) / total
    likely = sorted(masses.items(), key=lambda pair: -pair[1])[:3]
    shares = ", ".join(f"{label} {p / total:.2f}" for label, p in likely if p > 0)
    rest = f" ({seen:.2f} of the probability)" if seen < 0.995 else ""
    return Verdict(min(max(value, 0.0), 1.0), f"{shares}{rest}", by=by)
