"""A judge behind HTTP: chat completions with images, as vLLM, SGLang, `transformers serve` and
hosted services speak them.

    client = Client(Server(url="http://127.0.0.1:8000/v1"), Calls(concurrency=16), record)
    for note in client.probe(images=2): print(note)
    answers = client.chat(["Is it red?", image], n=4, temperature=0.6, seed=7, name="IF", turn=0)

An entry of `chat` is an `Answer` or a `Failure`, which says why there is none: nothing is ever made
up. The rules:

| what happens | what is done |
|---|---|
| no connection, a connection that breaks off, no whole answer in `timeout` s, 408, 429, 5xx | tried
again, `retries` times: after a random part of 0.5 s, 1 s, 2 s, ... up to 30 s (full jitter), and
what Retry-After says (seconds or a date; at most 120 s of it) on top |
| any other status | a failure that quotes the server; redirects are not followed |
| an answer that is no JSON, larger than 16 MiB, without a choice, without text, or without
log-probs that were asked for | a failure |
| fewer choices than `n` | those that came are the first votes, each of the others is asked alone |

At most `concurrency` requests are under way at once, whatever the number of threads; one that waits
for its next try is not. Every vote is a line of the record with its own key and seed, found again
alone; of votes that came with one request, the first line bears its tries and seconds.

Secrets: the key is named by `key_env` and read from the environment; an address with a password or
a query stands in the environment, too (`url_env`). Neither is ever in a `repr`, an error, the
record or a log line of the HTTP library, nor in what a server sends back.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from editr2.rewards.base import Calls
from editr2.rewards.messages import (
    SYSTEMONE_IMAGES,
    Answer,
    Failure,
    Part,
    Pictures,
    Place,
    answer_of,
    chat_body,
    digest,
    probabilities_of,
    question_body,
)
from editr2.rewards.probe import Abilities, Probe, only_model
from editr2.rewards.record import Record, request_key
from editr2.rewards.wire import NoAnswer, Server, Wire

T = TypeVar("T")

__all__ = [
    "SYSTEMONE_IMAGES",
    "Abilities",
    "Answer",
    "Client",
    "Failure",
    "Part",
    "Place",
    "Server",
    "vote_seed",
]


class Client:
    """One server, from as many threads as you like.

    server: where. calls: how many at once, how long, how often; `CONCURRENCY`, `TIMEOUT` and
    `RETRIES` where it says nothing. record: where answers are kept and found, or None.

    Raises `ConfigError`, naming the field, for an address that is none or holds a secret, and for
    an environment variable that is not set. Nothing is asked of the server before it is needed.
    """

    def __init__(
        self,
        server: Server,
        calls: Calls | None = None,
        record: Record | None = None,
    ) -> None:
        self.server, self.record = server, record
        self.known: Abilities | None = None
        self._wire, self._pictures = Wire(server, calls), Pictures(server)
        self._asking = threading.RLock()  # one thread finds out what the server has and does
        self._model = server.model

    def __repr__(self) -> str:
        return f"Client({self.at}, model={self._model!r}, concurrency={self._wire.concurrency})"

    @property
    def at(self) -> str:
        """The server's address as it may be shown."""
        return self._wire.at

    def close(self) -> None:
        """Its connections; the next request makes new ones."""
        self._wire.close()

    @property
    def model(self) -> str:
        """The judge's name: the configured one, or the only one that the server has. Raises
        `ConfigError` where there is no such."""
        with self._asking:
            if self._model is None:
                listed = Probe(self._wire, self._pictures).models()
                self._model = only_model(listed, self.at)
            return self._model

    def abilities(self) -> Abilities:
        """What the server does; probed once where nobody did. Raises as `probe` does."""
        with self._asking:
            if self.known is None:
                self.probe()
            assert self.known is not None
            return self.known

    def chat(
        self,
        parts: Sequence[Part],
        *,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        n: int = 1,
        seed: int = 0,
        top_logprobs: int = 0,
        schema: Mapping[str, Any] | None = None,
        name: str = "",
        turn: int = 0,
        recorded: bool = False,
    ) -> list[Answer | Failure | None]:
        """n answers to one prompt.

        Args:
            parts: texts and images of the one message, in order.
            temperature: 0 is greedy: no seed is sent, and n is 1, since all answers are equal.
            max_tokens: of an answer.
            seed: of the rollout; every vote has its own, from it, name, turn and the vote's number.
            top_logprobs: most probable tokens at each place to ask for, or 0.
            schema: a JSON schema that the answer must follow, where the server can see to that.
            name, turn: which score of which turn (from 0) is asked about, for the record.
            recorded: nothing is asked; None stands where the record has no answer.

        Raises ValueError where n and temperature contradict each other, or an image is none.
        """
        if n < 1 or (temperature == 0 and n > 1):
            raise ValueError(f"chat: n={n} at temperature {temperature:g} (accepted: 1)")
        asked = {
            "messages": self._digested(parts),
            "temperature": temperature,
            "max_tokens": max_tokens,
            "top_logprobs": top_logprobs,
            "schema": schema,
        }
        seeds = [vote_seed(seed, name, turn, v) if temperature else None for v in range(n)]
        keys = [self._key("chat", **asked, seed=one) for one in seeds]
        answers: list[Answer | Failure | None] = [self._found(key, Answer.read) for key in keys]
        missing = [v for v in range(n) if answers[v] is None]
        if recorded or not missing:
            return answers
        body = chat_body(
            self._pictures,
            self.server,
            self.model,
            parts,
            temperature=temperature,
            max_tokens=max_tokens,
            top_logprobs=top_logprobs,
            schema=schema,
        )
        together = self.known is None or self.known.votes
        while missing:
            votes = missing if together else missing[:1]
            got, tries, seconds = self._choices(body, len(votes), seeds[votes[0]], top_logprobs)
            for place, (vote, answer) in enumerate(zip(votes, got)):
                answers[vote] = self._kept(
                    keys[vote],
                    answer,
                    tries=0 if place else tries,
                    seconds=0.0 if place else seconds,
                    name=name,
                    turn=turn + 1,
                    vote=vote + 1,
                )
            missing, together = missing[len(got) :], False
        return answers

    def decide(
        self,
        parts: Sequence[Part],
        question: Mapping[str, Any],
        *,
        name: str = "",
        turn: int = 0,
        recorded: bool = False,
    ) -> tuple[float, ...] | Failure | None:
        """The probability of each option of a question, by `/v1/systemone` of `transformers serve`.

        question: `{"type": "noul"}`, whose options are no and yes, or `{"type": "score",
        "criteria": [level, ...]}`, lowest first; see `chat` for the rest. The server adds its own
        line on how to answer.
        """
        key = self._key("systemone", messages=self._digested(parts), question=question)
        if (found := self._found(key, _probabilities)) is not None:
            return found
        if recorded:
            return None
        answer: Any
        try:
            body = question_body(self._pictures, self.server, self.model, parts, question)
            reply, tries, seconds = self._wire.send("POST", "/systemone", body)
        except NoAnswer as no:
            answer, tries, seconds = Failure(no.reason), no.tries, no.seconds
        else:
            try:
                answer = probabilities_of(reply, question)
            except NoAnswer as no:
                answer = Failure(self._wire.hidden_in(no.reason))
        failed = isinstance(answer, Failure)
        if self.record is not None:
            stands = self.record.write(
                key,
                None if failed else {"probabilities": list(answer)},
                failed=answer.reason if failed else None,
                seconds=seconds,
                tries=tries,
                name=name,
                turn=turn + 1,
                vote=1,
            )
            if stands is not None:
                return tuple(stands["probabilities"])
        return answer

    def probe(
        self,
        *,
        images: int = 1,
        logprobs: bool = True,
        votes: bool = True,
        schema: bool = False,
        systemone: bool = False,
    ) -> list[str]:
        """Asks the server what it does, with a handful of requests that nobody's record has.

        images: in one prompt, as many as the reward needs; the rest: what the reward would use
        (systemone is looked for besides where log-probs are wanted and not given).
        Returns a line for each of those that it does not do, with the remedy. What it found stands
        in `known` afterwards.

        Raises `RewardFailure` where nothing answers, and `ConfigError` for a key that is refused, a
        model that is not there, and images that are not taken.
        """
        with self._asking:
            self.known = Probe(self._wire, self._pictures).abilities(
                self.server.model,
                images=images,
                logprobs=logprobs,
                votes=votes,
                schema=schema,
                systemone=systemone,
            )
            self._model = self.known.model
            return list(self.known.notes)

    def _choices(
        self, body: Mapping[str, Any], n: int, seed: int | None, top_logprobs: int
    ) -> tuple[list[Answer | Failure], int, float]:
        """At least one and at most n answers, tries and seconds; n failures where none came."""
        body = {**body, **({"n": n} if n > 1 else {}), **({} if seed is None else {"seed": seed})}
        try:
            reply, tries, seconds = self._wire.send("POST", "/chat/completions", body)
        except NoAnswer as no:
            return [Failure(no.reason)] * n, no.tries, no.seconds
        choices = reply.get("choices") if isinstance(reply, dict) else None
        if not isinstance(choices, list) or not choices:
            return (
                [Failure(f"no choices came back ({self._wire.quoted(reply)})")] * n,
                tries,
                seconds,
            )
        answers: list[Answer | Failure] = []
        for choice in choices[:n]:
            try:
                answers.append(answer_of(self._wire, choice, top_logprobs))
            except NoAnswer as no:
                answers.append(Failure(no.reason))
        return answers, tries, seconds

    def _key(self, api: str, **asked: Any) -> str:
        form, extra = self._pictures.form, self.server.extra
        return request_key(api=api, model=self.model, images=form, extra=extra, **asked)

    def _digested(self, parts: Sequence[Part]) -> list[Any]:
        return [part if isinstance(part, str) else {"image": digest(part)} for part in parts]

    def _found(self, key: str, read: Callable[[Any], T]) -> T | None:
        return None if self.record is None else self.record.find(key, read)

    def _kept(
        self, key: str, answer: Answer | Failure, *, tries: int, seconds: float, **where: Any
    ) -> Answer | Failure:
        """The answer that stands: another thread's, where it came first."""
        if self.record is None:
            return answer
        failed = answer.reason if isinstance(answer, Failure) else None
        written = None if isinstance(answer, Failure) else answer.written()
        stands = self.record.write(
            key, written, failed=failed, seconds=seconds, tries=tries, **where
        )
        return answer if stands is None or isinstance(answer, Failure) else Answer.read(stands)


def _probabilities(row: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float(p) for p in row["probabilities"])


def vote_seed(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2**31), which every server takes, from a rollout's and what is asked."""
    said = json.dumps([seed, *parts]).encode()
    return int.from_bytes(hashlib.sha256(said).digest()[:4], "big") >> 1
