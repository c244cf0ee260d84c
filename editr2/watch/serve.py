"""The page's server: three kinds of answers, none of which changes anything. Needs the extra
`label`."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editr2 import serving
from editr2.errors import ConfigError
from editr2.report.pages import VENDOR
from editr2.watch.follow import Followed
from editr2.watch.view import page_state, page_strips, status

if TYPE_CHECKING:
    from starlette.applications import Starlette

PORT = 8421
FILES = Path(__file__).parent / "page"
PARTS = {
    **{name: FILES / name for name in ("page.html", "page.css", "page.js")},
    **{name: VENDOR / name for name in ("uplot.css", "uplot.min.js")},
}


class Watch:
    """What is behind the page of a run's folder."""

    def __init__(self, folder: Path, token: str) -> None:
        self.run, self.token = Followed(folder), token
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}
        self._strips: tuple[str, dict[str, Any]] = ("", {})

    def state(self, have: str) -> dict[str, Any]:
        """have: the version that the page shows already; of that it needs but the time."""
        with self._lock:
            self.run.look()
            version = str(self.run.version)
            if have == version:
                return {"version": version, "status": status(self.run)}
            if self._state.get("version") != version:
                self._state = page_state(self.run)
            return self._state | {"status": status(self.run)}

    def strips(self, have: str) -> dict[str, Any]:
        with self._lock:
            version = str(self.run.version)
            if self._strips[0] != version:
                found = page_strips(self.run)
                digest = hashlib.sha256(repr(found).encode("utf-8", "surrogatepass")).hexdigest()
                self._strips = (version, found | {"version": digest[:16]})
            found = self._strips[1]
            return {"version": have} if found["version"] == have else found

    def app(self) -> Starlette:
        """To be served. Raises ConfigError without the extra."""
        try:
            from starlette.concurrency import run_in_threadpool
            from starlette.responses import JSONResponse
            from starlette.routing import Route
        except ImportError as error:
            raise serving.without(error, "watch") from error

        def answered(function: Callable[[str], dict[str, Any]]) -> Callable[..., Any]:
            async def of(request: Any) -> Any:
                said = await run_in_threadpool(function, request.query_params.get("have", ""))
                return JSONResponse(said, headers=serving.HEADERS)

            return of

        routes = [
            *serving.file_routes(PARTS),
            Route("/state", answered(self.state)),
            Route("/strips", answered(self.strips)),
        ]
        return serving.page_app(self.token, routes)


def token_of(folder: Path, keys: Path | None = None) -> str:
    """Of a folder's page: the same whenever it is served again, so that a browser that has it open
    goes on, and nobody else's to guess. keys: the folder of the secret that it follows from, one of
    this user's; where that cannot be kept the token is another each time."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = (keys or Path(base) / "editr2") / "watch.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(32))
        except FileExistsError:
            pass
        secret = path.read_bytes()
    except OSError:
        secret = b""
    if len(secret) < 32:
        return secrets.token_hex(16)
    where = os.fsencode(folder.resolve())
    return hmac.new(secret, where, hashlib.sha256).hexdigest()[:32]


def listen(port: int | None) -> socket.socket:
    """port: None is the usual one, or any free one while that is another's."""
    if port is not None:
        return serving.listen(port)
    try:
        return serving.listen(PORT)
    except ConfigError:
        return serving.listen(0)


def serve(watch: Watch, listening: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    serving.server_of(watch.app(), "watch").run(sockets=[listening])
