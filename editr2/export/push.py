"""An export on the hub. Nothing is uploaded unasked: `editr2 export --push` alone comes here.

What can be refused is asked before anything is exported: whether there is a network, a token that
the hub knows, and no repository of the name. The upload is one commit. When it fails, the export
stands, and `editr2 export FOLDER --push NAME` uploads it as it is (so one can read it before).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from editr2.errors import ConfigError, one_line, shown
from editr2.policies.recorded import EXPORT
from editr2.run.hub import HUB_ID, offline

T = TypeVar("T")

_FETCH = re.compile(r"\A`hf download .*\n\n")

CARD, LOADING = "README.md", "## How to load it\n\n"


def name_problem(name: str) -> str | None:
    """What a text would have to be to name a repository; None if it does."""
    return None if HUB_ID.fullmatch(name) else "each of letters, digits, '-', '_' and '.'"


def is_export(folder: Path) -> bool:
    """Whether it is what `editr2 export` wrote."""
    return (folder / EXPORT).is_file() and (folder / CARD).is_file()


@dataclass(frozen=True)
class Hub:
    """A repository that may be written, as the hub said. exists: it is there, and is committed
    to."""

    name: str
    private: bool
    exists: bool
    api: Any

    def push(self, folder: Path) -> str:
        """Uploads an export's folder in a commit, in place of what was there, and returns its
        address. The card says first how it is fetched. Raises `ConfigError`."""
        card = folder / CARD
        card.write_text(
            with_download(card.read_text("utf-8"), self.name, folder.resolve().name), "utf-8"
        )
        again = f"the export stands: editr2 export {folder} --push {self.name}"

        def upload() -> str:
            if not self.exists:
                # None is what its owner has as a default.
                self.api.create_repo(self.name, private=self.private or None)
            self.api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                commit_message="An export of editr2",
                delete_patterns="*" if self.exists else None,
            )
            return f"{self.api.endpoint}/{self.name}"

        # What was made here and then not filled is there the next time.
        return _asked(upload, self.name, f"; {again} --update")


def open_hub(name: str, *, private: bool = False, update: bool = False) -> Hub:
    """Asks the hub whether `name` can be written. private: a repository that nobody else sees.
    update: one that is there is committed to.

    Raises `ConfigError`, one line: no network, no token, one that the hub does not know, a
    repository that is there without `update`, or a public one for `private`.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if why := offline():
        raise ConfigError(f"--push: {name}: {why} (accepted: a machine with network)")
    if get_token() is None:
        raise ConfigError(
            f"--push: {name}: no token of the hub here (accepted: one that may write, by "
            f"`hf auth login` or HF_TOKEN)"
        )
    api = HfApi()

    def seen() -> Any:
        api.whoami()
        try:
            return api.model_info(name)
        except RepositoryNotFoundError:
            return None

    found = _asked(seen, name)
    if found is not None and not update:
        raise ConfigError(f"--push: {name}: is there already (accepted: a new name, or --update)")
    if found is not None and private and not found.private:
        raise ConfigError(
            f"--private: {name} is there already, and public (accepted: a new name, or a private "
            f"one)"
        )
    return Hub(name, private, found is not None, api)


def with_download(card: str, name: str, folder: str) -> str:
    """A card whose lines for loading begin with fetching the folder that they name. One that has
    none of these lines, since it was rewritten by hand, stays as it is; where it was fetched from
    before goes."""
    head, heading, rest = card.partition(LOADING)
    command = f"`hf download {name} --local-dir {folder}`"
    fetch = f"{command} fetches the folder that the lines below load.\n\n"
    return head + heading + fetch + _FETCH.sub("", rest) if heading else card


def _asked(ask: Callable[[], T], name: str, more: str = "") -> T:
    """What the hub answers. Raises `ConfigError` where it refuses."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        return ask()
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = _REFUSED.get(status) or f"the hub answers {status}: {shown(one_line(error))}"
    except (HTTPError, OSError, ValueError) as error:  # the network, or a name that is refused here
        why = shown(one_line(error))
    raise ConfigError(f"--push: {name}: {why}{more}")


_REFUSED = {
    401: "the hub does not know the token (accepted: one that may write, by `hf auth login` or "
    "HF_TOKEN)",
    403: "the token may not write there (accepted: a token with write access, and an owner that "
    "is you or yours)",
    409: "is there already (accepted: a new name, or --update)",
}
