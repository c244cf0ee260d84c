"""What a server can do, found out by asking it: once, before the first rollout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from editr2.errors import ConfigError
from editr2.rewards.base import RewardFailure
from editr2.rewards.messages import (
    Part,
    Pictures,
    chat_body,
    has_logprobs,
    mapping,
    probabilities_of,
    prompt_tokens_of,
    question_body,
)
from editr2.rewards.wire import NoAnswer, Wire

TOP_LOGPROBS = (20, 5)
"""What is asked for at each place, the first of these that the server takes: 20 is vLLM's bound."""


@dataclass(frozen=True)
class Abilities:
    """What a server does, as `probe` found it. top_logprobs: how many it gives a token, 0 for none.
    votes: whether it takes `n`. schema: whether it keeps to `response_format`. systemone: whether
    it answers `/v1/systemone`. images: as many in one prompt were tried and taken."""

    model: str
    top_logprobs: int = 0
    votes: bool = True
    schema: bool = False
    systemone: bool = False
    images: int = 0
    notes: tuple[str, ...] = ()


_DECIDES = (
    "the server gives no log-probs: yes/no, digits and levels are answered by its /v1/systemone; "
    "serve the model with vLLM for the probabilities of its own answers"
)
_COUNTED = (
    "the server gives no log-probs: answers are counted votes instead; serve the model with vLLM "
    "for probabilities"
)
ALONE = (
    "the server ignores n: every vote is a request of its own, which reads the images again; serve "
    "the model with vLLM for votes in one request"
)
_FREE = (
    "the server ignores response_format: an answer that is not the JSON that was asked for fails; "
    "vLLM and SGLang keep to it"
)


class Probe:
    """Questions to a server of which nothing is known."""

    def __init__(self, wire: Wire, pictures: Pictures) -> None:
        self._wire, self._pictures, self._model = wire, pictures, ""
        self._at = wire.at

    def abilities(
        self,
        model: str | None,
        *,
        images: int = 1,
        logprobs: bool = True,
        votes: bool = True,
        schema: bool = False,
        systemone: bool = False,
    ) -> Abilities:
        """model: the configured one; the rest as `Client.probe` says."""
        listed = self.models()
        self._model = only_model(listed, self._at) if model is None else model
        said, took = self._plain_chat(listed, logprobs, votes)
        counted = self._images_taken(images, said) if images else 0
        choices = said.get("choices")
        choices = choices if isinstance(choices, list) else []
        top = took["top_logprobs"] if any(has_logprobs(one) for one in choices) else 0
        several = votes and took["n"] > 1 and len(choices) > 1
        keeps = schema and self._keeps_schema()
        decides = (systemone or (logprobs and not top)) and self._decides()
        missing = {
            _DECIDES if decides else _COUNTED: logprobs and not top,
            ALONE: votes and not several,
            _FREE: schema and not keeps,
        }
        notes = tuple(note for note, said_of in missing.items() if said_of)
        return Abilities(self._model, top, several or not votes, keeps, decides, counted, notes)

    def models(self) -> list[str] | None:
        """What the server says it has; None where it does not say (`transformers serve` without a
        network). Raises where nothing answers at all or the key is refused."""
        try:
            reply, _, _ = self._wire.send("GET", "/models", tries=1)
        except NoAnswer as no:
            self._refused(no)
            if no.status and not no.again:
                return None
            try:
                # Behind the 500 of a moment ago the server may have closed the connection.
                self._wire.send("GET", "/health", root=True, tries=max(2, self._wire.tries))
            except NoAnswer as none:
                if none.status == 0:
                    raise RewardFailure(
                        f"judge: nothing answers at {self._at}: {none.reason} (accepted: a "
                        f"server that is up)"
                    ) from None
            return None
        data = reply.get("data") if isinstance(reply, dict) else None
        names = [m.get("id") for m in data if isinstance(m, dict)] if isinstance(data, list) else []
        return [self._wire.clean(name) for name in names if isinstance(name, str)] or None

    def _refused(self, no: NoAnswer) -> None:
        if no.status in (401, 403):
            given = (
                "no key_env is set"
                if self._wire.server.key_env is None
                else f"the key is that of {self._wire.server.key_env}"
            )
            raise ConfigError(
                f"key_env: the server at {self._at} refuses: {no.reason}; {given} (accepted: the "
                f"name of an environment variable that holds its key)"
            ) from None

    def _plain_chat(
        self, listed: list[str] | None, logprobs: bool, votes: bool
    ) -> tuple[Mapping[str, Any], dict[str, int]]:
        """An answer without images, and what was asked for with it: as much as the server takes."""
        tops = TOP_LOGPROBS if logprobs else (0,)
        ways = [(n, top) for n in ((2, 1) if votes else (1,)) for top in (*tops, 0)]
        first: NoAnswer | None = None
        for n, top in dict.fromkeys(ways):
            try:
                reply = self._wire.send(
                    "POST", "/chat/completions", self._probing(["Say hi."], n, top)
                )
                return mapping(reply[0]), {"n": n, "top_logprobs": top}
            except NoAnswer as no:
                self._refused(no)
                first = first or no
                if no.again or no.status in (0, 404):
                    break
        assert first is not None
        if listed is not None and self._model not in listed and first.status in (400, 404, 422):
            raise ConfigError(
                f"model: {self._model!r} is not at {self._at} (accepted: {', '.join(listed[:20])})"
            )
        raise RewardFailure(f"judge: {self._at} does not answer a chat request: {first.reason}")

    def _images_taken(self, images: int, without: Mapping[str, Any]) -> int:
        """How many images one prompt may have, up to so many; raises where it is fewer."""
        seen = [np.full((32, 32, 3), 255 * k // images, np.uint8) for k in range(images)]
        for count in (*([images] if images > 1 else []), *([2] if images > 2 else []), 1):
            try:
                reply, _, _ = self._wire.send(
                    "POST", "/chat/completions", self._probing(["Say hi.", *seen[:count]], 1, 0)
                )
            except NoAnswer as no:
                if no.again or not no.status:
                    raise RewardFailure(
                        f"judge: {self._at} does not answer with images: {no.reason}"
                    ) from None
                why = no.reason
                continue
            tokens = [prompt_tokens_of(one) for one in (reply, without)]
            if None not in tokens and tokens[0] == tokens[1]:
                why = f"{self._model} leaves the images out of the prompt"
                break
            if count < images:
                raise ConfigError(
                    f"model: {self._model!r} at {self._at} takes {count} image"
                    f"{'s' if count > 1 else ''} a prompt, not {images} (accepted: at least "
                    f"{images}; vLLM: --limit-mm-per-prompt '{{\"image\": {images}}}')"
                )
            return count
        raise ConfigError(
            f"model: {self._model!r} at {self._at} takes no images: {why} (accepted: a model that "
            f"sees)"
        )

    def _keeps_schema(self) -> bool:
        """Whether an answer follows a schema that no model would follow by itself."""
        schema = {
            "type": "object",
            "properties": {"q7": {"type": "string", "enum": ["zyzzyva"]}},
            "required": ["q7"],
            "additionalProperties": False,
        }
        body = self._probing(["Say hi."], 1, 0, schema) | {"max_tokens": 32}
        try:
            reply, _, _ = self._wire.send("POST", "/chat/completions", body)
            text = mapping(mapping(reply)["choices"][0]["message"])["content"]
            return bool(json.loads(text) == {"q7": "zyzzyva"})
        except (NoAnswer, KeyError, IndexError, TypeError, ValueError):
            return False

    def _decides(self) -> bool:
        question = {"type": "noul", "instructions": "Is it red?"}
        parts: list[Part] = [np.zeros((32, 32, 3), np.uint8), "An image."]
        try:
            body = question_body(self._pictures, self._wire.server, self._model, parts, question)
            reply, _, _ = self._wire.send("POST", "/systemone", body)
            probabilities_of(reply, question)
        except NoAnswer:
            return False
        return True

    def _probing(
        self, parts: Sequence[Part], n: int, top: int, schema: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        body = chat_body(
            self._pictures,
            self._wire.server,
            self._model,
            parts,
            temperature=1.0,
            max_tokens=4,
            top_logprobs=top,
            schema=schema,
        )
        return body | {"seed": 1} | ({"n": n} if n > 1 else {})


def only_model(listed: list[str] | None, at: str) -> str:
    """The one model of a list. Raises `ConfigError` where there is another number of them."""
    if listed is not None and len(listed) == 1:
        return listed[0]
    has = "does not list any" if listed is None else f"has {len(listed)}"
    accepted = "its name" if listed is None else ", ".join(listed[:20])
    raise ConfigError(f"model: none is named and the server at {at} {has} (accepted: {accepted})")
