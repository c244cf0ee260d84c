"""Where the objects with a name are in an image: Grounding DINO and OWLv2 of transformers, and any
detector behind an address.

`find` returns what was found, which may be nothing. Whatever goes wrong raises `DetectorError`: a
detector that did not answer has not found that an object is gone.
"""

from __future__ import annotations

import base64
import io
import random
import threading
import time
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from editr2.errors import ConfigError, one_line, plain
from editr2.rewards.base import Held
from editr2.rewards.geometry import Box, Found
from editr2.rewards.models import (
    LookError,
    LookingModel,
    as_pixels,
    normalised,
    resized,
    resized_by_pillow,
)
from editr2.rewards.wire import is_private, retry_after

THRESHOLD = 0.3


class DetectorError(LookError):
    """A detector did not answer. Never the same as an object that was not found."""


class Detector(Protocol):
    """Finds objects by name. May be called from many threads."""

    def find(
        self, image: np.ndarray, names: Sequence[str], *, threshold: float = THRESHOLD
    ) -> list[list[Found]]:
        """For every name, the boxes whose score is above the threshold, the surest first.

        image: uint8 [H, W, 3] of RGB. Raises `DetectorError`.
        """
        ...


def _names(names: Sequence[str]) -> list[str]:
    """In lower case and without full stops, which part the names of a prompt."""
    cleaned = [" ".join(name.lower().replace(".", " ").split()) for name in names]
    for name, clean in zip(names, cleaned, strict=True):
        if not clean:
            raise DetectorError(f"detector: {name!r} is no name (accepted: words)")
    return cleaned


def _sorted(boxes: Tensor, scores: Tensor, threshold: float) -> list[Found]:
    """boxes: (x0, y0, x1, y1) [M, 4]; scores [M]."""
    if not (torch.isfinite(boxes).all() and torch.isfinite(scores).all()):
        raise DetectorError("detector: boxes or scores are not finite")
    found = [
        Found(Box.of(box), score)
        for box, score in zip(boxes.tolist(), scores.tolist(), strict=True)
        if score > threshold
    ]
    return sorted(found, key=lambda one: -one.score)


def _corners(boxes: Tensor) -> Tensor:
    """(centre x, centre y, width, height) as (x0, y0, x1, y1)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


class _Prompt(NamedTuple):
    """One text for Grounding DINO. names: which of the names it asks for."""

    names: list[int]
    text: str
    spans: list[tuple[int, int]]

    @classmethod
    def of(cls, names: Sequence[str], chosen: Sequence[int]) -> _Prompt:
        text, spans = "", []
        for i in chosen:
            text += " " if text else ""
            spans.append((len(text), len(text) + len(names[i])))
            text += f"{names[i]} ."
        return cls(list(chosen), text, spans)


class _Local:
    """What the detectors of transformers share."""

    kinds: ClassVar[dict[str, str]]

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        self.model = LookingModel(
            name, self.kinds, what="detector", device=device, revision=revision
        )

    def quick_look(self) -> None:
        """Looks at the model's files without reading weights. Raises `ConfigError`."""
        self.model.quick_look()
        _ = self.model.tokenizer

    def takes(self) -> Held:
        """What the model takes. What it allocates depends on the words and boxes that it finds, and
        nothing but its weights can tell these."""
        return self.model.takes()

    def load(self) -> None:
        """Loads the model and its tokenizer. Raises `ConfigError` with the remedy."""
        self.model.load()
        _ = self.model.settings, self.model.tokenizer

    def lend(self) -> None:
        """Leaves the trainer's GPU, if it is there."""
        self.model.lend()

    def take(self) -> None:
        """Comes back to it."""
        self.model.take()

    def find(
        self, image: np.ndarray, names: Sequence[str], *, threshold: float = THRESHOLD
    ) -> list[list[Found]]:
        cleaned = _names(names)
        if not cleaned:
            return []
        try:
            self.load()
            return self._find(image, cleaned, threshold)
        except (DetectorError, ConfigError):
            raise
        except LookError as error:
            raise DetectorError(str(error)) from error
        except Exception as error:
            raise DetectorError(f"detector: {one_line(error, kind=True)}") from error

    def _find(self, image: np.ndarray, names: list[str], threshold: float) -> list[list[Found]]:
        raise NotImplementedError


class GroundingDino(_Local):
    """Grounding DINO (arXiv 2303.05499), asked as the benchmarks ask it: lower case, "name .".

    Args:
        name: a folder, or an id of the hub such as IDEA-Research/grounding-dino-tiny, which is the
            SwinT-OGC of the benchmarks.
        together: ask for all names in one text, as the consistency of the benchmarks does; a box
            then belongs to the name that it answers most. Else each name is a text of its own.
        short, long: the sides of an image are brought to `short`, and to `long` at most. None: what
            the model's preprocessor_config.json says, else 800 and 1333.
        device, revision: see `LookingModel`.
    """

    kinds: ClassVar[dict[str, str]] = {"grounding-dino": "GroundingDinoForObjectDetection"}

    def __init__(
        self,
        name: str,
        *,
        together: bool = False,
        short: int | None = None,
        long: int | None = None,
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        super().__init__(name, device=device, revision=revision)
        self.together, self.short, self.long = together, short, long

    def _find(self, image: np.ndarray, names: list[str], threshold: float) -> list[list[Found]]:
        as_pixels(image, "detector")  # is it one?
        settings = self.model.settings
        height, width = self.size(image.shape[0], image.shape[1])
        small = as_pixels(resized_by_pillow(image, height, width), "detector")
        pixels = normalised(small, settings)[None]
        found: list[list[Found]] = [[] for _ in names]
        with self.model.held() as (module, device):
            for prompt in self._prompts(names):
                inputs, owners = self._tokens(prompt)
                said = module(
                    pixel_values=pixels.to(device),
                    pixel_mask=torch.ones(1, height, width, dtype=torch.long, device=device),
                    **{key: value.to(device) for key, value in inputs.items()},
                )
                boxes = _corners(said.pred_boxes[0]).float().cpu()
                # Beyond the text there is minus infinity, which becomes 0.
                probs = said.logits[0].float().sigmoid().cpu()[:, : len(owners)]
                scores = probs.max(-1).values
                parts = [probs[:, owners == i].max(-1).values for i in range(len(prompt.names))]
                best = torch.stack(parts, -1).argmax(-1)
                for i, name in enumerate(prompt.names):
                    mine = best == i
                    found[name] = _sorted(boxes[mine], scores[mine], threshold)
        return found

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of an image of this size in the model."""
        given = self.model.settings.get("size") or {}
        short = self.short or given.get("shortest_edge") or 800
        long = self.long or given.get("longest_edge") or 1333
        low, high = min(height, width), max(height, width)
        wanted = float(short) if short * high / low <= long else long * low / high
        if low == round(wanted):
            return height, width
        sides = round(wanted), int(wanted * high / low)
        return sides if height <= width else sides[::-1]

    def _prompts(self, names: list[str]) -> list[_Prompt]:
        """Texts of at most as many tokens as the model reads."""
        if not self.together:
            return [_Prompt.of(names, [i]) for i in range(len(names))]
        prompts, chosen = [], [0]
        for i in range(1, len(names)):
            text = _Prompt.of(names, [*chosen, i]).text
            if len(self.model.tokenizer(text)["input_ids"]) > self._most:
                prompts.append(_Prompt.of(names, chosen))
                chosen = []
            chosen.append(i)
        return [*prompts, _Prompt.of(names, chosen)]

    @property
    def _most(self) -> int:
        return int(self.model.config.max_text_len)

    def _tokens(self, prompt: _Prompt) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs, and for each token which of the prompt's names it belongs to, or
        -1."""
        said = self.model.tokenizer(
            prompt.text, return_offsets_mapping=True, return_token_type_ids=True
        )
        offsets = said.pop("offset_mapping")
        if len(offsets) > self._most:
            raise DetectorError(
                f"detector: {plain(prompt.text)[:80]!r}...: {len(offsets)} tokens (accepted: up to "
                f"{self._most})"
            )
        owners = torch.full((len(offsets),), -1)
        for i, (begin, end) in enumerate(prompt.spans):
            for token, (first, last) in enumerate(offsets):
                if last > first and begin <= first and last <= end:
                    owners[token] = i
            if not (owners == i).any():
                raise DetectorError(f"detector: {prompt.text[begin:end]!r} has no token")
        keys = ("input_ids", "token_type_ids", "attention_mask")
        return {key: torch.tensor([said[key]]) for key in keys}, owners


class Owlv2(_Local):
    """OWLv2 (arXiv 2306.09683). Its scores are lower than Grounding DINO's: 0.1 to 0.2 is the usual
    threshold.

    Args:
        name: a folder, or an id of the hub such as google/owlv2-base-patch16-ensemble.
        prompt: around the name.
        device, revision: see `LookingModel`.
    """

    kinds: ClassVar[dict[str, str]] = {"owlv2": "Owlv2ForObjectDetection"}

    def __init__(
        self,
        name: str,
        *,
        prompt: str = "a photo of a {}",
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        super().__init__(name, device=device, revision=revision)
        if prompt.count("{}") != 1:
            raise ConfigError(f"detector: prompt {prompt!r} (accepted: a text with one {{}})")
        self.prompt = prompt

    def _find(self, image: np.ndarray, names: list[str], threshold: float) -> list[list[Found]]:
        settings = self.model.settings
        pixels = as_pixels(image, "detector")
        _, height, width = pixels.shape
        side = max(height, width)
        square = torch.zeros(3, side, side)  # filled up to the right and below
        square[:, :height, :width] = pixels
        vision = self.model.config.vision_config.image_size
        pixels = normalised(resized(square, vision, vision), settings)[None]
        most = self.model.config.text_config.max_position_embeddings
        texts = self.model.tokenizer(
            [self.prompt.format(name) for name in names],
            padding="max_length",
            truncation=False,
            max_length=most,
        )
        longest = max(len(ids) for ids in texts["input_ids"])
        if longest > most:
            raise DetectorError(f"detector: a name of {longest} tokens (accepted: up to {most})")
        with self.model.held() as (module, device):
            said = module(
                pixel_values=pixels.to(device),
                input_ids=torch.tensor(texts["input_ids"], device=device),
                attention_mask=torch.tensor(texts["attention_mask"], device=device),
            )
            boxes = _corners(said.pred_boxes[0]).float().cpu()
            probs = said.logits[0].float().sigmoid().cpu()
        boxes = boxes * torch.tensor([side / width, side / height] * 2)
        found = [_sorted(boxes, probs[:, i], threshold) for i in range(len(names))]
        # What lies in the filling has no area left.
        return [[one for one in row if one.box.area > 0] for row in found]


class RemoteDetector:
    """A detector behind an address. Its protocol, for any server:

        POST url  {"image": base64 of a PNG, "names": [...], "threshold": 0.3}
        200       {"found": [[[x0, y0, x1, y1, score], ...], ...]}

    with a list for every name, in their order, and boxes in [0, 1] of the image's width and height.
    Any other answer is a failure. Asked again after an answer of 408, 429 or 5xx and after a
    connection that failed, with pauses drawn from [0, 0.5 s · 2^k], or as Retry-After says.

    Args:
        url: the address.
        timeout: seconds that one try may take.
        retries: tries after the first.
        concurrency: calls at once; all others wait.
    """

    AGAIN = frozenset({408, 429, 500, 502, 503, 504})
    PAUSE = 0.5
    LONGEST = 30.0

    def __init__(
        self, url: str, *, timeout: float = 30.0, retries: int = 3, concurrency: int = 8
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"detector: url {url!r} (accepted: http://... or https://...)")
        if is_private(url):
            raise ConfigError(
                "detector: the address holds a password or a query, which would stand in the run's "
                "folder (accepted: an address without)"
            )
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise ConfigError(
                f"detector: timeout {timeout:g}, retries {retries}, concurrency {concurrency} "
                f"(accepted: above 0, at least 0, at least 1)"
            )
        self.url, self.timeout, self.retries = url, timeout, retries
        self._places = threading.BoundedSemaphore(concurrency)
        self._lock = threading.Lock()
        self._client: Any = None

    def find(
        self, image: np.ndarray, names: Sequence[str], *, threshold: float = THRESHOLD
    ) -> list[list[Found]]:
        try:
            as_pixels(image, "detector")
        except LookError as error:
            raise DetectorError(str(error)) from error
        cleaned = _names(names)
        if not cleaned:
            return []
        picture = io.BytesIO()
        Image.fromarray(image).save(picture, format="PNG")
        body = {
            "image": base64.b64encode(picture.getvalue()).decode("ascii"),
            "names": cleaned,
            "threshold": threshold,
        }
        with self._places:
            answer = self._post(body)
        return self._found(answer, len(cleaned), threshold)

    def _post(self, body: dict[str, Any]) -> Any:
        import httpx2

        with self._lock:
            if self._client is None:
                self._client = httpx2.Client(timeout=self.timeout)
        for attempt in range(self.retries + 1):
            pause = min(random.uniform(0, self.PAUSE * 2**attempt), self.LONGEST)
            try:
                said = self._client.post(self.url, json=body)
            except httpx2.HTTPError as error:
                why = one_line(error, kind=True, limit=200)
            else:
                if said.status_code == 200:
                    try:
                        return said.json()
                    except ValueError as error:
                        raise DetectorError("detector: the answer is no JSON") from error
                why = f"status {said.status_code}"
                if said.status_code not in self.AGAIN:
                    break
                pause = retry_after(said.headers.get("retry-after")) or pause
            if attempt < self.retries:
                time.sleep(pause)
        raise DetectorError(f"detector: {why} after {attempt + 1} tries")

    def _found(self, answer: Any, count: int, threshold: float) -> list[list[Found]]:
        try:
            rows = answer["found"]
            if len(rows) != count:
                raise ValueError(f"{len(rows)} lists for {count} names")
            found = [[Found(Box.of(one[:4]), _score(one)) for one in row] for row in rows]
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise DetectorError(f"detector: the answer: {one_line(error, kind=True)}") from error
        return [
            sorted((one for one in row if one.score > threshold), key=lambda one: -one.score)
            for row in found
        ]


def _score(one: Any) -> float:
    (score,) = one[4:]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise ValueError(f"score {score!r} is not in [0, 1]")
    return float(score)
