"""HTTP to a judge's server: tries, time, size, and what stays secret; `client` has the rules."""

from __future__ import annotations

import base64
import email.utils
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, unquote, urlsplit

from editr2.config.fields import ACCEPTS, Accepts, Bounds, setting
from editr2.errors import ConfigError, plain
from editr2.rewards.base import Calls

if TYPE_CHECKING:
    import httpx2

CONCURRENCY, TIMEOUT, RETRIES = 16, 120.0, 4
"""Where `Calls` says nothing."""

BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0
"""Seconds: the bound of the first wait, which doubles with every try, and of any."""

LONGEST_RETRY_AFTER = 120.0
"""Seconds that a server can ask for; what it asks beyond is not waited for."""

LARGEST_ANSWER = 16 << 20
"""Bytes of a response. Log-probs of a few tokens take some kilobytes."""

_LARGEST_REFUSAL = 1 << 16
_QUOTED = 200
"""Characters of a server's own words in a reason."""

_RESERVED = (
    *("model", "messages", "n", "seed", "temperature", "max_tokens"),
    *("logprobs", "top_logprobs", "response_format", "stream"),
)


_URL = {ACCEPTS: Accepts(what="an address, http://host:port/v1, or none")}


@dataclass(frozen=True)
class Server:
    """Where a judge is and how images get there. An `Options` that inherits from it has these
    fields beside its own.

    Args:
        url: of an OpenAI-compatible server, `http://host:port` or with the path up to `/v1`. An
            address with a password or a query stands in an environment variable: see url_env.
        url_env: the name of an environment variable that holds the address, in place of url.
        model: the name of the judge at the server; none is the only one it has.
        key_env: the name of an environment variable that holds the key, where one is needed.
        images: png, or jpeg for smaller requests (the judge then sees its artefacts).
        quality: of jpeg.
        max_side: larger images are scaled down to so many pixels; none leaves them.
        extra: further keys of every request, such as `chat_template_kwargs: {enable_thinking:
            false}`.
    """

    # Not in a repr: of what a user puts here, some is secret.
    url: str | None = field(default=None, repr=False, metadata=_URL)
    url_env: str | None = field(default=None, repr=False)
    model: str | None = None
    key_env: str | None = field(default=None, repr=False)
    images: Literal["png", "jpeg"] = "png"
    quality: int = setting(90, Bounds(at_least=1, at_most=100))
    max_side: int | None = setting(None, Bounds(at_least=16, at_most=16_384))
    extra: dict[str, Any] = field(default_factory=dict, repr=False)


class NoAnswer(Exception):
    """One try came to nothing. reason: without the number of tries. again: whether another may do
    better. wait: seconds that the server asked for."""

    def __init__(
        self, reason: str, *, again: bool = False, status: int = 0, wait: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.status, self.wait = reason, again, status, wait
        self.tries, self.seconds = 1, 0.0


class Wire:
    """Requests to one server, from as many threads as you like.

    Raises `ConfigError`, naming the field, for an address that is none or holds a secret, and for
    an environment variable that is not set.
    """

    def __init__(self, server: Server, calls: Calls | None = None) -> None:
        calls = calls or Calls()
        self.server = server
        self.concurrency = calls.concurrency or CONCURRENCY
        self.timeout = calls.timeout or TIMEOUT
        self.tries = 1 + (RETRIES if calls.retries is None else calls.retries)
        if taken := [name for name in _RESERVED if name in server.extra]:
            raise ConfigError(f"extra: {taken[0]!r} is set by the reward (accepted: other keys)")
        self._hidden: tuple[str, ...] = ()
        self._headers = {"accept": "application/json", "accept-encoding": "identity"}
        self._params: tuple[tuple[str, str], ...] = ()
        self.at = self._address()  # as it may be shown
        if server.key_env is not None:
            key = _from_environment("key_env", server.key_env)
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(
                    f"key_env: what {server.key_env} holds is no key (accepted: printable ASCII)"
                )
            self._hide(key)
            self._headers["authorization"] = f"Bearer {key}"
        self._slots = threading.BoundedSemaphore(self.concurrency)
        self._lock = threading.Lock()  # of what is below; never held while a request is made
        self._http: httpx2.Client | None = None

    def close(self) -> None:
        with self._lock:
            if self._http is not None:
                self._http.close()
                self._http = None

    def send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        tries: int | None = None,
        root: bool = False,
    ) -> tuple[Any, int, float]:
        """The JSON that came back, in how many tries and seconds with the server. Raises
        `NoAnswer` after the last. root: the path is not below `/v1`."""
        address = (self.at.removesuffix("/v1") if root else self.at) + path
        most, seconds = tries or self.tries, 0.0
        # Not by httpx2: it would say NaN, and not mend half a surrogate pair.
        sent = None if body is None else json.dumps(body).encode("utf-8", "backslashreplace")
        for attempt in range(1, most + 1):
            try:
                with self._slots:
                    start = time.monotonic()
                    try:
                        reply = self._once(method, address, sent, not root)
                    finally:
                        seconds += time.monotonic() - start
                return reply, attempt, seconds  # with those of this try
            except NoAnswer as no:
                no.tries, no.seconds = attempt, seconds
                if not no.again or attempt == most:
                    if attempt > 1:
                        no.reason = f"{no.reason} (in {attempt} tries)"
                    raise
                bound = min(BACK_OFF * 2 ** (attempt - 1), LONGEST_BACK_OFF)
                pause = no.wait + random.uniform(0, bound)
            _pause(pause)
        raise AssertionError("the last try returns or raises")

    def _once(self, method: str, address: str, sent: bytes | None, as_json: bool) -> Any:
        import httpx2

        deadline = time.monotonic() + self.timeout
        headers = {} if sent is None else {"content-type": "application/json"}
        params = self._params or None
        try:
            with self._session().stream(
                method, address, content=sent, headers=headers, params=params
            ) as response:
                # What a refusal says is cut off; an answer that is too long is none.
                limit = LARGEST_ANSWER if response.status_code == 200 else _LARGEST_REFUSAL
                received = _read(response, limit, deadline)
        except httpx2.TimeoutException:
            raise NoAnswer(f"no answer within {self.timeout:g} s", again=True) from None
        except _Late:
            raise NoAnswer(f"no whole answer within {self.timeout:g} s", again=True) from None
        except httpx2.ConnectError as error:
            raise NoAnswer(f"no connection{self._why(error)}", again=True) from None
        except (httpx2.NetworkError, httpx2.RemoteProtocolError):
            raise NoAnswer("the connection broke off", again=True) from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise NoAnswer(f"the request cannot be sent ({type(error).__name__})") from None
        status = response.status_code
        if status != 200:
            raise NoAnswer(
                self._said(status, received),
                again=status in (408, 429) or status >= 500,
                status=status,
                wait=retry_after(response.headers.get("retry-after")),
            )
        if len(received) > limit:
            raise NoAnswer(f"the answer has more than {limit >> 20} MiB", status=status)
        if not as_json:
            return None
        try:
            return json.loads(received)
        except (ValueError, RecursionError):
            raise NoAnswer(
                f"the answer is not JSON: {self.quoted(received)}", status=status
            ) from None

    def _session(self) -> httpx2.Client:
        import httpx2

        with self._lock:
            if self._http is None:
                _watch_logs(self._hidden)
                host = urlsplit(self.at).hostname or ""
                self._http = httpx2.Client(
                    headers=self._headers,
                    timeout=httpx2.Timeout(self.timeout, pool=None),
                    # How many there are is the semaphore's; uvicorn closes idle ones after 5 s.
                    limits=httpx2.Limits(
                        max_keepalive_connections=self.concurrency, keepalive_expiry=2.0
                    ),
                    follow_redirects=False,
                    # A proxy of the environment is for the way out, not for this machine.
                    trust_env=not (host == "localhost" or host.startswith("127.") or host == "::1"),
                )
            return self._http

    def _address(self) -> str:
        """The address up to `/v1` without anything secret; what is secret goes into headers and
        parameters."""
        server = self.server
        if (server.url is None) == (server.url_env is None):
            given = "neither" if server.url is None else "both"
            raise ConfigError(
                f"url, url_env: {given} (accepted: one of the two; url is a judge's address, such "
                "as http://127.0.0.1:8000/v1, docs/judges.md says how to serve one)"
            )
        key = "url" if server.url_env is None else "url_env"
        url = server.url or _from_environment("url_env", server.url_env or "")
        try:
            parts = urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port, parts = None, None, urlsplit("")
        if parts.scheme not in ("http", "https") or not host or "\\" in url:
            shown = _without_secrets(url) if server.url_env is None else "what it holds"
            raise ConfigError(f"{key}: {shown} (accepted: an address, http://host:port/v1)")
        private = is_private(url)
        if private and server.url_env is None:
            raise ConfigError(
                "url: it holds a password or a query, which would stand in the run's folder "
                "(accepted: an address without; key_env for the key, or url_env for the name of "
                "an environment variable that holds the whole address)"
            )
        if private:
            self._hide(url, *(pair.partition("=")[2] for pair in parts.query.split("&")))
            if parts.query:
                pairs = (pair.partition("=") for pair in parts.query.split("&"))
                self._params = tuple((unquote(name), unquote(value)) for name, _, value in pairs)
            if parts.username is not None:
                user, password = unquote(parts.username), unquote(parts.password or "")
                token = base64.b64encode(f"{user}:{password}".encode()).decode()
                self._hide(token, parts.password or parts.username)
                self._headers["authorization"] = f"Basic {token}"
        shown_host = f"[{host}]" if ":" in host else host
        path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
        return f"{parts.scheme}://{shown_host}{'' if port is None else f':{port}'}{path}"

    def _hide(self, *secrets: str) -> None:
        """These and their other spellings never show."""
        ways = {way for one in secrets for way in (one, unquote(one), quote(one, safe=""))}
        # What is shorter is no secret, and may be a word of an answer.
        hidden = {*self._hidden, *(way for way in ways if len(way) > 3)}
        self._hidden = tuple(sorted(hidden, key=len, reverse=True))

    def hidden_in(self, text: str) -> str:
        return _starred(text, self._hidden)

    def clean(self, text: str, limit: int = _QUOTED) -> str:
        """A server's words in one line, without a secret that it echoes."""
        said = plain(self.hidden_in(text))
        return said if len(said) <= limit else f"{said[:limit]}..."

    def quoted(self, said: Any) -> str:
        if isinstance(said, bytes):
            text = said[:4096].decode("utf-8", "replace")
        else:
            text = said if isinstance(said, str) else json.dumps(said, default=str)[:4096]
        if re.match(r"\s*<(!doctype|html)", text, re.IGNORECASE):
            return "an HTML page"
        return self.clean(text, 100) or "nothing"

    def _said(self, status: int, received: bytes) -> str:
        """A status and the server's own words."""
        try:
            phrase = f" {HTTPStatus(status).phrase}"
        except ValueError:
            phrase = ""
        if 300 <= status < 400:
            return f"{status}{phrase}: redirects are not followed"
        try:
            said: Any = json.loads(received)
        except (ValueError, RecursionError):
            said = received
        for name in ("error", "message", "detail"):
            if isinstance(said, dict) and said.get(name):
                said = said[name]
        return f"{status}{phrase}: {self.quoted(said)}" if said else f"{status}{phrase}"

    def _why(self, error: BaseException) -> str:
        """What the system says of a connection, without the address."""
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.strerror:
                return f" ({self.clean(cause.strerror, 80)})"
            cause = cause.__cause__ or cause.__context__
        return ""


def _pause(seconds: float) -> None:
    time.sleep(seconds)


class _Late(Exception):
    """The deadline passed while the answer trickled in."""


def _read(response: httpx2.Response, limit: int, deadline: float) -> bytes:
    """The body, or a little more than `limit` bytes of it."""
    received = bytearray()
    for chunk in response.iter_bytes():
        received += chunk
        if len(received) > limit:
            break
        if time.monotonic() > deadline:
            raise _Late
    return bytes(received)


def retry_after(said: str | None) -> float:
    """Seconds to wait: those of the header, or until its date; 0 where it says nothing usable."""
    if not said:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", said.strip()):
        seconds = float(said)
    else:
        try:
            date = email.utils.parsedate_to_datetime(said)
            seconds = date.timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def is_private(url: str) -> bool:
    """Whether an address holds what may be a secret: a user, a password or a query."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:  # it is no address, which whoever uses it says
        return False
    return bool(parts.username is not None or parts.password is not None or parts.query)


def _from_environment(key: str, name: str) -> str:
    """What a variable holds. A key that was pasted in place of a variable's name is not shown."""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise ConfigError(
            f"{key}: this is no variable's name, and not shown since it may be the secret itself "
            f"(accepted: the name of an environment variable in capitals, such as JUDGE_KEY)"
        )
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(
            f"{key}: the environment variable {name} is not set (accepted: one that is)"
        )
    return value


def _without_secrets(url: str) -> str:
    """An address as it may be shown: without user, password, query and fragment."""
    before, slashes, rest = url.partition("://")
    if not slashes:
        before, rest = "", url
    authority, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    shown = f"{before}{slashes}{authority.rpartition('@')[2]}{slash}{path}"
    return plain(shown)[:200]


def _starred(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


class _Hiding(logging.Filter):
    """Keeps what clients hold secret out of the HTTP library's own lines, which have addresses
    (INFO) and headers (DEBUG)."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: tuple[str, ...] = ()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        hidden = _starred(said, self.secrets)
        if hidden != said:
            record.msg, record.args = hidden, ()
        return True


_HIDING = _Hiding()
_LOGGERS = ("httpx2", *(f"httpcore2.{one}" for one in ("connection", "http11", "http2", "proxy")))


def _watch_logs(secrets: Sequence[str]) -> None:
    merged = {*_HIDING.secrets, *secrets}
    _HIDING.secrets = tuple(sorted(merged, key=len, reverse=True))
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_HIDING)
