"""What a reward looks with, by its options: a detector and an encoder of images, each asked once
about the same thing.

Siblings share their source, and a turn's output is the next one's source: what was found in an
image under a name is kept for a while. What failed is not kept, and is asked again.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from editr2.config.fields import Bounds, setting
from editr2.config.plugins import resolve
from editr2.errors import ConfigError, UserError, one_line
from editr2.rewards.base import Held
from editr2.rewards.detect import Detector, DetectorError, GroundingDino, Owlv2, RemoteDetector
from editr2.rewards.features import Encoder
from editr2.rewards.geometry import Found
from editr2.rewards.record import pixel_digest

T = TypeVar("T")

KEPT = 1024
"""Answers of a detector that are kept."""

DETECTOR = "IDEA-Research/grounding-dino-tiny"
"""The SwinT-OGC of the benchmarks."""


@dataclass(frozen=True)
class Looking:
    """What a reward looks with. An `Options` that inherits from it has these fields beside its own.

    Args:
        detector: a folder or an id of the hub of Grounding DINO or OWLv2; `http://...`, a detector
            behind an address; `package.module:name`, an object with `find` or what makes one; none:
            what needs one does not apply.
        detector_kind: of a folder or an id: grounding-dino or owlv2.
        features: a folder or an id of the hub of DINOv3 or DINOv2; none: consistency does not
            apply. The published DINOv3 asks for its terms to be accepted first.
        device: where both are: cpu, cuda:1 or the like, or trainer, the GPU that trains.
        revision: of both on the hub: none is the newest.
        look_side: the sides of an image in the encoder; none is the model's own.
    """

    detector: str | None = DETECTOR
    detector_kind: Literal["grounding-dino", "owlv2"] = "grounding-dino"
    features: str | None = "facebook/dinov3-vitl16-pretrain-lvd1689m"
    device: str = "cpu"
    revision: str | None = None
    look_side: int | None = setting(None, Bounds(at_least=14, at_most=4096))


class Once:
    """Answers by key: of those who ask at the same time, one does the work and all get its
    answer."""

    def __init__(self, size: int = KEPT) -> None:
        self._size, self._lock = size, threading.Lock()
        self._known: OrderedDict[Any, Future[Any]] = OrderedDict()

    def __call__(self, key: Any, make: Callable[[], T]) -> T:
        with self._lock:
            future = self._known.get(key)
            mine = future is None
            if future is None:
                future = self._known[key] = Future()
                while len(self._known) > self._size:
                    self._known.popitem(last=False)
            else:
                self._known.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    if self._known.get(key) is future:
                        del self._known[key]
                future.set_exception(error)
        answer: T = future.result()
        return answer


class Eyes:
    """A detector and an encoder; from as many threads as you like.

    detector, encoder: in place of those that the options name. released: the encoder counts
    register tokens as patches, as the releases do.
    """

    def __init__(
        self,
        options: Looking,
        *,
        detector: Detector | None = None,
        encoder: Encoder | None = None,
        released: bool = False,
    ) -> None:
        self.detector = detector if detector is not None else _detector(options)
        self.encoder = encoder if encoder is not None else _encoder(options, released)
        self._together = self.detector
        if isinstance(self.detector, GroundingDino):  # the same model, asked in another way
            self._together = copy.copy(self.detector)
            self._together.together = True
        self._once = Once()

    @property
    def facts(self) -> dict[str, str]:
        return {
            name: self._name(thing)
            for name, thing in (("detector", self.detector), ("features", self.encoder))
        }

    @staticmethod
    def _name(thing: Any) -> str:
        model = getattr(thing, "model", None)
        if model is not None:
            return str(model.name) + (f" at {model.revision}" if model.revision else "")
        return "none" if thing is None else type(thing).__name__

    def quick_look(self) -> None:
        """Looks at what is local without loading it. Raises `ConfigError` with the remedy."""
        self._each("quick_look")

    def models_held(self) -> list[Held]:
        """What is local takes."""
        ours = (GroundingDino, Owlv2, Encoder)
        return [thing.takes() for thing in (self.detector, self.encoder) if isinstance(thing, ours)]

    def load(self) -> None:
        """Loads what is local. Raises `ConfigError` with the remedy."""
        self._each("load")

    def lend(self) -> None:
        """Leaves the trainer's GPU while it trains."""
        self._each("lend")

    def take(self) -> None:
        """Comes back to it."""
        self._each("take")

    def _each(self, method: str) -> None:
        for thing in (self.detector, self.encoder):
            if callable(function := getattr(thing, method, None)):
                function()

    def find(self, image: np.ndarray, name: str, threshold: float) -> list[Found]:
        """Where something is, the surest first. Raises `DetectorError`."""
        detector = self.detector
        if detector is None:
            raise DetectorError("detector: none (options.detector)")
        return self._once(
            (pixel_digest(image), name, threshold),
            lambda: _checked(detector, image, [name], threshold)[0],
        )

    def find_all(self, image: np.ndarray, names: Sequence[str], threshold: float) -> list[Found]:
        """Where any of several things is, asked for in one text where the detector is one that the
        benchmarks ask so. Raises `DetectorError`."""
        detector = self._together
        if detector is None:
            raise DetectorError("detector: none (options.detector)")
        found = self._once(
            (pixel_digest(image), tuple(names), threshold),
            lambda: _checked(detector, image, names, threshold),
        )
        return [one for row in found for one in row]


def _checked(
    detector: Detector, image: np.ndarray, names: Sequence[str], threshold: float
) -> list[list[Found]]:
    """What a detector says; one of a user's own may raise anything, or forget a name."""
    try:
        found = detector.find(image, names, threshold=threshold)
    except UserError:
        raise
    except Exception as error:
        raise DetectorError(f"detector: {type(error).__name__}: {error}") from error
    if len(found) != len(names):
        raise DetectorError(f"detector: {len(found)} lists for {len(names)} names")
    return found


def _detector(options: Looking) -> Detector | None:
    given = options.detector
    if given is None:
        return None
    if given.startswith(("http://", "https://")):
        return RemoteDetector(given)
    if ":" in given and "/" not in given:
        found = resolve("reward.options.detector", given)
        try:
            made: Any = found if hasattr(found, "find") and not isinstance(found, type) else found()
        except Exception as error:  # of a user's own
            raise ConfigError(
                f"detector: {given!r} raised {one_line(error, kind=True)} (accepted: something "
                f"with find, or what makes one)"
            ) from error
        if not hasattr(made, "find"):
            raise ConfigError(f"detector: {given!r} (accepted: something with find)")
        detector: Detector = made
        return detector
    kind = GroundingDino if options.detector_kind == "grounding-dino" else Owlv2
    return kind(given, device=options.device, revision=_of_hub(given, options.revision))


def _encoder(options: Looking, released: bool) -> Encoder | None:
    if options.features is None:
        return None
    return Encoder(
        options.features,
        size=options.look_side,
        released=released,
        device=options.device,
        revision=_of_hub(options.features, options.revision),
    )


def _of_hub(name: str, revision: str | None) -> str | None:
    return None if Path(name).expanduser().exists() else revision
