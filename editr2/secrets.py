"""What of settings and commands does not leave the machine: keys, passwords and tokens, by the name
that they stand under, by their form, and inside of addresses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

WITHHELD = "(withheld)"
_NAME = re.compile(
    r"(?i)(?:^|[_.])(?:api_?|access_?|private_?|secret_?)?key$|secret|passw(?:or)?d|passphrase"
    r"|token$|credential|authorization|cookie"
)
_FORM = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[opsur]_\w{16,}|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
    r"|(?i:(?<=bearer )\S+)"
)
_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_QUERY = re.compile(r"(?i)(?<=[?&])([\w-]*(?:key|token|secret|password|sig(?:nature)?)=)[^&\s'\"]+")


def is_secret(name: str) -> bool:
    """Whether what stands under a name is nobody else's business: `api_key`, `hf-token`; not
    `text_tokens`."""
    return _NAME.search(name.replace("-", "_")) is not None


def withheld(value: Any, name: str = "") -> Any:
    """Settings as they may be sent around. name: that a value stands under; a list's items stand
    under the list's."""
    if isinstance(value, Mapping):
        return {key: withheld(item, str(key)) for key, item in value.items()}
    if value is None or isinstance(value, bool) or value in ("", (), []):
        return value
    if is_secret(name):
        return WITHHELD
    if isinstance(value, list | tuple):
        return [withheld(item, name) for item in value]
    return withheld_text(value) if isinstance(value, str) else value


def withheld_text(text: str) -> str:
    """Without what has the form of a key, and without what addresses hold of one."""
    text = _USER.sub(WITHHELD, _FORM.sub(WITHHELD, text))
    return _QUERY.sub(rf"\1{WITHHELD}", text)


def withheld_command(words: Iterable[str]) -> str:
    """A command to be typed again, whose `--some.api_key VALUE` has none."""
    said: list[str] = []
    hidden = False
    for word in words:
        flag, equals, _ = word.partition("=")
        if hidden:
            said.append(WITHHELD)
        elif word.startswith("-") and equals and is_secret(flag):
            said.append(f"{flag}={WITHHELD}")
        else:
            said.append(withheld_text(word))
        hidden = word.startswith("-") and not equals and is_secret(word)
    return shlex.join(said)
