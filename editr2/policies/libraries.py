"""diffusers and transformers, without what they print that is of no use here."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def stock_pipeline(name: str) -> Any:
    """diffusers' class."""
    import diffusers

    with without_processor_notes():
        return getattr(diffusers, name)


_PROCESSOR_NOTE = re.compile(
    r"`(CLIP|Siglip|Qwen2VL)ImageProcessor` requires torchvision \(not installed\); falling back"
)


@contextmanager
def without_processor_notes() -> Iterator[None]:
    """Without transformers' notes that image processors work without torchvision: a Flux pipeline's
    import touches two that it has no use for, and Qwen's is meant to."""

    def needed(record: logging.LogRecord) -> bool:
        return not _PROCESSOR_NOTE.match(record.getMessage())

    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(needed)
    try:
        yield
    finally:
        logger.removeFilter(needed)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' notes about weights that are missing, which `load_part` turns into
    errors."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # torch_dtype's new name, dtype, is unknown to the oldest diffusers that we accept.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])


@contextmanager
def no_bars() -> Iterator[None]:
    """Without diffusers' progress bars, for what takes no time."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
