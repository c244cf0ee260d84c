"""What a judge is sent and what it sends back: the bodies of requests, and the checked parts of
replies."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from editr2.errors import plain
from editr2.rewards.record import pixel_digest
from editr2.rewards.wire import NoAnswer, Server, Wire

SYSTEMONE_IMAGES = 4
"""More than so many images `transformers serve` 5.23 does not take with a question."""

_CACHED = 64
"""Encoded images that are kept: the images of a turn are asked about several times in a row."""

Part = str | np.ndarray
"""Of a prompt: a text, or an image, uint8 [H, W, 3]."""


@dataclass(frozen=True)
class Place:
    """One token of an answer. top: (text, log-prob) of the most probable tokens there, among them
    the one that was chosen."""

    token: str
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """What a judge wrote. finish: "stop", or "length" where it was cut off after `max_tokens`. top:
    its tokens, where log-probs were asked for. reasoning: what the server kept apart as such."""

    text: str
    finish: str
    top: tuple[Place, ...] = ()
    reasoning: str = ""

    def written(self) -> dict[str, Any]:
        """As the record has it."""
        row: dict[str, Any] = {"text": self.text, "finish": self.finish}
        if self.top:
            row["top"] = [[place.token, [list(pair) for pair in place.top]] for place in self.top]
        return row | ({"reasoning": self.reasoning} if self.reasoning else {})

    @staticmethod
    def read(row: Mapping[str, Any]) -> Answer:
        places = tuple(
            Place(token, tuple((text, log_prob) for text, log_prob in top))
            for token, top in row.get("top", [])
        )
        return Answer(row["text"], row["finish"], places, row.get("reasoning", ""))


@dataclass(frozen=True)
class Failure:
    """Why there is no answer, in one line, without the server's address."""

    reason: str


class Pictures:
    """Images as they are sent, base64. The last ones are kept."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lock = threading.Lock()
        self._encoded: OrderedDict[str, str] = OrderedDict()

    @property
    def form(self) -> list[Any]:
        """What of the encoding a judge can see."""
        server = self._server
        return ["png" if server.images == "png" else f"jpeg {server.quality}", server.max_side]

    def base64(self, image: np.ndarray) -> str:
        key = digest(image)
        with self._lock:
            if (known := self._encoded.get(key)) is not None:
                self._encoded.move_to_end(key)
                return known
        text = base64.b64encode(self._bytes(image)).decode()
        with self._lock:
            self._encoded[key] = text
            while len(self._encoded) > _CACHED:
                self._encoded.popitem(last=False)
        return text

    def _bytes(self, image: np.ndarray) -> bytes:
        from PIL import Image

        picture, side = Image.fromarray(image), self._server.max_side
        if side is not None and max(picture.size) > side:
            scale = side / max(picture.size)
            width, height = (max(1, round(length * scale)) for length in picture.size)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        into = io.BytesIO()
        if self._server.images == "png":
            picture.save(into, "PNG", compress_level=1)  # a third of the time, a tenth larger
        else:
            picture.save(into, "JPEG", quality=self._server.quality, subsampling=0)
        return into.getvalue()


def chat_body(
    pictures: Pictures,
    server: Server,
    model: str,
    parts: Sequence[Part],
    *,
    temperature: float,
    max_tokens: int,
    top_logprobs: int = 0,
    schema: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Of a request for one answer."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            address = f"data:image/{server.images};base64,{pictures.base64(part)}"
            content.append({"type": "image_url", "image_url": {"url": address}})
    body = {
        **server.extra,
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": temperature,
        "max_tokens": max_tokens,
    }
    if top_logprobs:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    if schema is not None:
        form = {"name": "verdict", "schema": dict(schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return body


def question_body(
    pictures: Pictures,
    server: Server,
    model: str,
    parts: Sequence[Part],
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """A request for `/v1/systemone`, where an image is a word of the text that `assets` has."""
    texts = "".join(part for part in parts if isinstance(part, str)) + json.dumps(question)
    mark = hashlib.sha256(texts.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    state: list[str] = []
    assets: dict[str, dict[str, str]] = {}
    for part in parts:
        if isinstance(part, str):
            state.append(part)
            continue
        word = f"<image-{mark}-{len(assets) + 1}>"
        assets[word] = {
            "type": "image",
            "format": server.images,
            "data_base64": pictures.base64(part),
        }
        state.append(word)
    if len(assets) > SYSTEMONE_IMAGES:
        raise ValueError(f"systemone: {len(assets)} images (accepted: {SYSTEMONE_IMAGES})")
    body = {"model": model, "state": "\n".join(state), "questions": {"q": dict(question)}}
    return body | ({"assets": assets} if assets else {})


def answer_of(wire: Wire, choice: Any, top_logprobs: int) -> Answer:
    """One of the choices that came back. Raises `NoAnswer` where it says nothing."""
    choice = mapping(choice)
    message = mapping(choice.get("message"))
    text = message.get("content")
    if isinstance(text, list):  # a list of parts
        text = "".join(str(mapping(part).get("text", "")) for part in text)
    if not isinstance(text, str):
        refusal = message.get("refusal")
        said = f": {wire.clean(refusal)}" if isinstance(refusal, str) else ""
        finish = wire.clean(str(choice.get("finish_reason")), 40)
        raise NoAnswer(f"no text came back (finish_reason {finish}){said}")
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    return Answer(
        wire.hidden_in(text),
        wire.clean(str(choice.get("finish_reason")), 40),
        _places(wire, choice) if top_logprobs else (),
        wire.hidden_in(reasoning) if isinstance(reasoning, str) else "",
    )


def _places(wire: Wire, choice: Mapping[str, Any]) -> tuple[Place, ...]:
    if not has_logprobs(choice):
        raise NoAnswer("log-probs were asked for and none came back")
    places = []
    for chosen in choice["logprobs"]["content"]:
        top = mapping(chosen).get("top_logprobs")
        pairs = [_log_prob(wire, entry) for entry in (top if isinstance(top, list) else [])]
        own = _log_prob(wire, chosen)
        # By its text: what a server rounds in one of the two places is not another token.
        pairs = pairs if own[0] in [text for text, _ in pairs] else [own, *pairs]
        if math.fsum(math.exp(log_prob) for _, log_prob in pairs) > 1.01:
            raise NoAnswer("the probabilities of one token sum to more than 1")
        places.append(Place(own[0], tuple(pairs)))
    return tuple(places)


def _log_prob(wire: Wire, entry: Any) -> tuple[str, float]:
    text, log_prob = mapping(entry).get("token"), entry.get("logprob")
    number = isinstance(log_prob, int | float) and not isinstance(log_prob, bool)
    if not isinstance(text, str) or not number or not log_prob <= 1e-3:  # not so for NaN
        raise NoAnswer(f"a log-prob is {wire.quoted(log_prob)} (accepted: a number, at most 0)")
    return wire.hidden_in(text), float(log_prob)


def mapping(value: Any) -> Mapping[str, Any]:
    """An object of JSON. Raises `NoAnswer` for anything else."""
    if not isinstance(value, dict):
        raise NoAnswer(f"the answer has {type(value).__name__} where an object belongs")
    return value


def has_logprobs(choice: Any) -> bool:
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return isinstance(content, list) and len(content) > 0


def prompt_tokens_of(reply: Any) -> int | None:
    """How long the server says the prompt was, where it does."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def probabilities_of(reply: Any, question: Mapping[str, Any]) -> tuple[float, ...]:
    """Of a systemone reply, one an option."""
    answer = mapping(mapping(mapping(reply).get("answers")).get("q"))
    if question["type"] == "noul":
        yes = answer.get("noul")
        values: list[Any] = [1 - yes if isinstance(yes, int | float) else yes, yes]
    else:
        by_level = mapping(answer.get("probabilities"))
        values = [by_level.get(str(k)) for k in range(len(question["criteria"]))]
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -1e-6 <= value <= 1 + 1e-6:
            raise NoAnswer(f"a probability is {plain(repr(value))[:40]} (accepted: 0 to 1)")
    if abs(sum(values) - 1) > 1e-3:
        raise NoAnswer(f"the probabilities sum to {sum(values):g}, not to 1")
    return tuple(min(max(float(value), 0.0), 1.0) for value in values)


def digest(image: np.ndarray) -> str:
    """Of an image's pixels. Raises ValueError for what is none."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(
            f"image: {image.dtype} {list(image.shape)} (accepted: uint8 [height, width, 3])"
        )
    return pixel_digest(image)
