"""Pages that this machine alone serves, to people who have their address: on 127.0.0.1, with a
token in it. What `editr2 label` and `editr2 watch` share. Needs the extra `label`."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editr2.errors import ConfigError

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import BaseRoute

HOST = "127.0.0.1"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def listen(port: int) -> socket.socket:
    """On this machine's own address. port: 0 is any free one. Raises ConfigError."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((HOST, port))
        made.listen(128)  # who has the address is waited for from here on
    except OSError as error:
        made.close()
        raise ConfigError(
            f"--port: {port}: {error.strerror} (accepted: a free port; 0 takes any)"
        ) from error
    return made


def address(token: str, listening: socket.socket) -> str:
    """Of a page, with its token."""
    return f"http://{HOST}:{listening.getsockname()[1]}/{token}/"


def file_routes(files: Mapping[str, Path]) -> list[BaseRoute]:
    """Of what a page is made of: `page.html` at the address itself, too. files: by the name that
    each has on the page. Raises ImportError without the extra."""
    from starlette.responses import Response
    from starlette.routing import Route

    def served(path: Path) -> Any:
        def of(request: Any) -> Response:
            return Response(path.read_bytes(), 200, HEADERS, TYPES[path.suffix])

        return of

    routes = [Route(f"/{name}", served(path)) for name, path in files.items()]
    return [Route("/", served(files["page.html"])), *routes]


def page_app(token: str, routes: Sequence[BaseRoute]) -> Starlette:
    """Routes below a token. A page of another site that has its name lead here is refused by what
    it calls us. Raises ImportError without the extra."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Mount

    ours = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=[Mount(f"/{token}", routes=list(routes))], middleware=[ours])


def server_of(app: Starlette, command: str) -> Any:
    """uvicorn's, to be run with a socket. command: whose page it is, for errors. Raises ConfigError
    without the extra."""
    try:
        import uvicorn
    except ImportError as error:
        raise without(error, command) from error
    return uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,  # addresses hold the token
            timeout_graceful_shutdown=2,
        )
    )


def without(error: ImportError, command: str) -> ConfigError:
    """What a page's command says where the extra is not installed."""
    package = (error.name or "starlette").partition(".")[0]  # what pip knows, of a module
    return ConfigError(
        f"{command}: the page needs {package} (accepted: pip install 'editr2[label]')"
    )
