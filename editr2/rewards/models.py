"""A model of transformers that a reward looks with: loaded once, asked by one thread at a time, and
on a device of its own choice.

`device`: `cpu`, `cuda:1` or the like; or `trainer`, the GPU that trains, which the model leaves for
the host's memory while there is training (`lend`) and comes back to (`take`).
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from editr2.errors import ConfigError, UserError, one_line, shown
from editr2.rewards.base import Held
from editr2.rewards.folders import check_weights_beside
from editr2.run.hub import HUB_ID, offline

TRAINER = "trainer"
_DEVICE = re.compile(rf"cpu|cuda(:\d+)?|{TRAINER}")

FOLDER = "a folder as save_pretrained writes it"

DEVICES = f"cpu, cuda:0 or the like, {TRAINER}"


def known_device(device: str) -> bool:
    return bool(_DEVICE.fullmatch(device))


def device_of(device: str) -> torch.device:
    """What the setting names; the trainer's is the current GPU of this thread, if there is one."""
    if device != TRAINER:
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class LookError(UserError):
    """A model could not be asked, or did not answer as it should."""


class LookingModel:
    """The model of a folder, or of the hub under its id.

    Args:
        name: a folder as `save_pretrained` writes it, or an id of the hub, `owner/name`.
        kinds: the types of model that will do (`model_type` of its config.json) and the class of
            transformers for each.
        device: see the module.
        revision: the commit, branch or tag of the hub. A folder has none.
        what: what to call it in errors.
    """

    def __init__(
        self,
        name: str,
        kinds: dict[str, str],
        *,
        what: str,
        device: str = "cpu",
        revision: str | None = None,
    ) -> None:
        if not known_device(device):
            raise ConfigError(f"{what}: device {shown(device)} (accepted: {DEVICES})")
        folder = Path(name).expanduser()
        self.what, self.device, self.kinds = what, device, kinds
        self.name = str(folder) if folder.exists() else name
        if folder.exists() and revision is not None:
            raise ConfigError(f"{what}: revision {shown(revision)} of a folder (accepted: none)")
        if not folder.exists() and not HUB_ID.fullmatch(name):
            raise ConfigError(
                f"{what}: {shown(name)}: no such folder (accepted: one, or owner/name)"
            )
        self.revision = revision
        self._lock = threading.Lock()
        self._module: nn.Module | None = None
        self._config: Any = None
        self._lent = False
        self._place: torch.device | None = None

    def quick_look(self) -> None:
        """Looks at what is there without reading weights. Raises `ConfigError` in one line where it
        is missing, no model of these kinds, or damaged."""
        _ = self.config, self.settings
        if Path(self.name).is_dir():
            where = f"{self.what}: {shown(self.name)}"
            check_weights_beside(Path(self.name), self.sketch, where, f"accepted: {FOLDER}")

    @functools.cached_property
    def sketch(self) -> nn.Module:
        """The model without its weights, on the meta device. Raises `ConfigError`."""
        import transformers

        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                module: nn.Module = getattr(transformers, self.kinds[self.config.model_type])(
                    self.config
                )
            except Exception as error:
                raise self._error("config.json", error) from error
        return module.eval().requires_grad_(False)

    def takes(self, run: Callable[[], Any] | None = None) -> Held:
        """What it takes. run: runs the sketch once as it is asked at most."""
        return Held(self.what, self.device, bytes_of(self.sketch), run=run)

    def load(self) -> None:
        """Loads it, if it is not there yet. Raises `ConfigError` in one line, with the remedy."""
        with self._lock:
            self._loaded()

    @contextmanager
    def held(self) -> Iterator[tuple[nn.Module, torch.device]]:
        """The model, for this thread alone, without gradients, in float32 and outside of whatever
        autocast there is. Raises `LookError` while it is lent."""
        with self._lock:
            if self._lent:
                raise LookError(
                    f"{self.what}: lent to training (accepted: calls between take and lend)"
                )
            module = self._loaded()
            device = self._place or torch.device("cpu")
            with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                yield module, device

    @property
    def config(self) -> Any:
        """Its configuration, as transformers has it. For whoever holds the model, too. Raises
        `ConfigError` where there is none, or that of another kind of model."""
        if self._config is None:
            with _quiet():
                self._config = self._described()
        return self._config

    def lend(self) -> None:
        """Leaves the trainer's GPU until `take`. Elsewhere it stays where it is, and may go on
        answering."""
        if self.device == TRAINER:
            with self._lock:
                self._lent = True
                if self._module is not None:
                    self._module.to("cpu")

    def take(self) -> None:
        """Comes back to the trainer's GPU: the current one of this thread."""
        if self.device == TRAINER:
            with self._lock:
                self._lent, self._place = False, device_of(self.device)
                if self._module is not None:
                    self._module.to(self._place)

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What preprocessor_config.json says beside the weights; {} where there is none."""
        file = "preprocessor_config.json"
        path: str | None = str(Path(self.name) / file)
        if not Path(self.name).exists():
            from transformers.utils import cached_file

            path = cached_file(
                self.name,
                file,
                revision=self.revision,
                _raise_exceptions_for_missing_entries=False,
            )
        if path is None or not Path(path).is_file():
            return {}
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.what}: {shown(path)}: {one_line(error)}") from error
        return values if isinstance(values, dict) else {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer beside the weights."""
        from transformers import AutoTokenizer

        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.name, revision=self.revision)
        except Exception as error:
            raise self._error("tokenizer", error) from error
        # Without files of one, transformers makes one that knows its marks alone.
        known, needed = len(tokenizer), self.config.text_config.vocab_size
        if 2 * known < needed:
            raise ConfigError(
                f"{self.what}: {shown(self.name)}: tokenizer: {known} words of the model's "
                f"{needed} (accepted: its files beside the weights, such as tokenizer.json)"
            )
        return tokenizer

    def _loaded(self) -> nn.Module:
        if self._module is None:
            with _quiet():
                self._module = self._new()
        return self._module

    def _described(self) -> Any:
        import transformers

        if not Path(self.name).exists():
            offline()  # so that what was downloaded before is found at once
        try:
            config = transformers.AutoConfig.from_pretrained(self.name, revision=self.revision)
        except Exception as error:
            raise self._error("config.json", error) from error
        kind = getattr(config, "model_type", None)
        if kind not in self.kinds:
            raise ConfigError(
                f"{self.what}: {shown(self.name)} is a {kind} (accepted: {', '.join(self.kinds)})"
            )
        return config

    def _new(self) -> nn.Module:
        import transformers

        kind = self.config.model_type
        try:
            # Weights that a file lacks would be drawn, from the run's own numbers.
            with torch.random.fork_rng(devices=[]):
                module, said = getattr(transformers, self.kinds[kind]).from_pretrained(
                    self.name,
                    revision=self.revision,
                    dtype=torch.float32,
                    output_loading_info=True,
                )
        except Exception as error:
            raise self._error("weights", error) from error
        if lacking := sorted(said["missing_keys"]):
            raise ConfigError(
                f"{self.what}: {shown(self.name)}: weights: {lacking[0]} and {len(lacking) - 1} "
                f"more are not there (accepted: all weights of a {kind})"
            )
        place = self._place or device_of(self.device)
        try:
            module = module.eval().requires_grad_(False).to(place)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"{self.what}: device {self.device}: {one_line(error)} (accepted: one with room, "
                f"such as cpu)"
            ) from error
        self._place = place
        return module

    def _error(self, part: str, error: Exception) -> ConfigError:
        accepted = FOLDER
        if not Path(self.name).exists():
            why = offline()
            accepted = f"a folder, or an id of the hub{f'; {why}' if why else ''}"
        told = one_line(error, kind=True, limit=200)
        return ConfigError(
            f"{self.what}: {shown(self.name)}: {part}: {told} (accepted: {accepted})"
        )


def bytes_of(module: nn.Module) -> int:
    """Of its weights and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its notes on weights, which are errors here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def as_pixels(image: np.ndarray, what: str) -> Tensor:
    """uint8 [H, W, 3] as float32 [3, H, W] in [0, 1]. Raises `LookError` for anything else."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise LookError(f"{what}: {image.dtype} {list(image.shape)}, no RGB image")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def resized(pixels: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """[3, H, W] or [N, 3, H, W] at another size, without aliasing."""
    batch = pixels if pixels.ndim == 4 else pixels[None]
    out = nn.functional.interpolate(batch, (height, width), mode=mode, antialias=True)
    return out.clamp(0, 1) if pixels.ndim == 4 else out[0].clamp(0, 1)


def resized_by_pillow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] at another size, bilinear, rounded to uint8 as Pillow does it."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def normalised(pixels: Tensor, settings: dict[str, Any]) -> Tensor:
    """By the channels' mean and standard deviation of the settings, else ImageNet's."""
    mean = torch.tensor(settings.get("image_mean") or (0.485, 0.456, 0.406), dtype=torch.float32)
    std = torch.tensor(settings.get("image_std") or (0.229, 0.224, 0.225), dtype=torch.float32)
    return (pixels - mean[:, None, None]) / std[:, None, None]
