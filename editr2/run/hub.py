"""Whether the Hugging Face hub can be reached, asked once and briefly, before its libraries ask at
length.

They try every file six times with growing pauses, half a minute for a name that does not resolve,
and then say that a file is missing. Without the hub they are told so (offline mode), so that what
was downloaded before is found at once.
"""

from __future__ import annotations

import functools
import re
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, InvalidURL
from pathlib import Path

from editr2.errors import ConfigError, one_line
from editr2.files import runs_near

PATIENCE = 5.0
"""Seconds for an answer of any kind. Resolving a name has no time limit of its own, hence the
thread."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INDEX = "model_index.json"
"""Of a diffusers pipeline, what it is made of."""


def unreachable(endpoint: str) -> str | None:
    """Why the hub at an address does not answer, through the proxies of the environment; None if it
    does."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=PATIENCE):
                found.append(None)
        except (ValueError, InvalidURL) as error:  # HF_ENDPOINT is the user's
            found.append(f"no address: {error}")
        except (urllib.error.HTTPError, HTTPException):
            found.append(None)  # an answer all the same
        except OSError as error:
            why = getattr(error, "reason", error)
            # The hub's own client may have certificates that Python does not know of.
            found.append(None if isinstance(why, ssl.SSLError) else str(why) or type(why).__name__)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE + 1)
    return found[0] if found else f"no answer within {PATIENCE:g} s"


@functools.cache
def offline() -> str | None:
    """Why nothing can be fetched, or None; asked once. Where the hub does not answer its libraries
    are in offline mode from here on."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    why = unreachable(constants.ENDPOINT)
    if why is None:
        return None
    constants.HF_HUB_OFFLINE = True
    return f"{constants.ENDPOINT.rpartition('://')[2]} cannot be reached: {why}"


def check_model(name: str, key: str, file: str = INDEX) -> None:
    """Raises `ConfigError`, naming the setting `key`, for a hub id whose model is neither here nor
    to be had. file: of the model, by which one sees that it is here. The name of a folder passes,
    and so does what is no hub id."""
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        return
    why = offline()
    if why and cached(name, file) is None:
        said = f"no folder, not downloaded before, and {why}"
        raise ConfigError(
            f"{key}: {name}: {said} (accepted: its folder, or a machine with network"
            f"{runs_near(Path(name))})"
        )


def model_index(name: str) -> Path | None:
    """Where `model_index.json` of a pipeline's folder, or of a hub id that was downloaded before,
    is; None where it is not."""
    if (file := Path(name) / INDEX).is_file():
        return file
    return cached(name, INDEX) if HUB_ID.fullmatch(name) else None


def cached(name: str, file: str) -> Path | None:
    """Where a file of a hub id that was downloaded before is; None where it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def fetch_index(name: str) -> Path:
    """`model_index.json` of a hub id, downloaded where it was not before. Raises whatever the hub's
    client does."""
    from huggingface_hub import hf_hub_download

    return model_index(name) or Path(hf_hub_download(name, INDEX))


def fetch_files(name: str, key: str, files: Sequence[str]) -> Path:
    """The folder of a hub id's snapshot with these files of it, downloaded where they were not
    before. Raises `ConfigError`, naming the setting `key`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: {name}: {one_line(error)} (accepted: its folder, or a hub id)"
        ) from error
