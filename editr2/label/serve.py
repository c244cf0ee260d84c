"""The labelling page: a server of this machine alone, whose address holds a token.

A page knows questions by number and outputs by place, so that neither a file's name nor the order
of a file can be seen on it. Needs the extra `label`.
"""

from __future__ import annotations

import functools
import io
import json
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from PIL import Image

from editr2 import serving
from editr2.errors import DataError, plain
from editr2.label.questions import SKIPPED, Answer, Question, read_answer
from editr2.label.store import LONGEST_NAME, Asked, Store, Vote
from editr2.serving import HEADERS
from editr2.sessions.images import read_image

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

FILES = Path(__file__).parent / "page"
PARTS = ("page.html", "page.css", "page.js")
URL = "url"
"""The fact of a store that says where its page was served last."""


class _Refused(Exception):
    """What was sent is not accepted; the message says why."""


class Page:
    """What is behind the page. principles: whether each of a pair's is voted on. title: of the
    page."""

    def __init__(self, store: Store, *, principles: bool = False, title: str = "labels") -> None:
        self.store, self.principles, self.title = store, principles, title
        self._picture = functools.lru_cache(maxsize=32)(_png)

    def app(self) -> Starlette:
        """To be served. Raises ConfigError without the extra."""
        try:
            from starlette.responses import JSONResponse, Response
            from starlette.routing import Route
        except ImportError as error:
            raise serving.without(error, "label") from error

        def answered(function: Callable[[Mapping[str, Any]], Any]) -> Callable[..., Any]:
            async def of(request: Request) -> Response:
                from starlette.concurrency import run_in_threadpool

                try:
                    given = json.loads(await request.body())
                    if not isinstance(given, dict):
                        raise _Refused("no object")
                    said = await run_in_threadpool(function, given)
                except (_Refused, ValueError) as error:
                    return JSONResponse({"error": plain(str(error))}, 400, HEADERS)
                return JSONResponse(said, headers=HEADERS)

            return of

        def image(request: Request) -> Response:
            number, slot = request.path_params["number"], request.path_params["slot"]
            path = self._path(number, slot, request.query_params.get("who", ""))
            if path is None:
                return Response("no such image", 404, HEADERS)
            try:
                data = self._picture(path, path.stat().st_mtime_ns)
            except (DataError, OSError) as error:
                return Response(plain(str(error)), 404, HEADERS, "text/plain")
            kept = {"Cache-Control": "private, max-age=3600"}
            return Response(data, 200, HEADERS | kept, "image/png")

        routes = [
            *serving.file_routes({name: FILES / name for name in PARTS}),
            Route("/image/{number:int}/{slot}", image),
            Route("/next", answered(self._next), methods=["POST"]),
            Route("/vote", answered(self._vote), methods=["POST"]),
            Route("/undo", answered(self._undo), methods=["POST"]),
        ]
        return serving.page_app(_token(self.store), routes)

    # ------------------------------------------------------------------------------ what is said

    def _next(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return self._state(_person(given))

    def _vote(self, given: Mapping[str, Any]) -> dict[str, Any]:
        person, asked = _person(given), self._asked(given.get("number"))
        name, seconds = given.get("name"), given.get("seconds", 0.0)
        if not isinstance(name, str) or not 8 <= len(name) <= 80:
            raise _Refused("name: 8 to 80 characters are accepted")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
            raise _Refused("seconds: a number from 0 on is accepted")
        shown = self.store.order(asked.question, person)
        answer = _back(read_answer(given.get("answer"), len(shown)), shown)
        said = given.get("principles", [])
        wanted = len(self._principles_of(asked.question)) if answer != SKIPPED else 0
        if not isinstance(said, list) or len(said) != wanted:
            raise _Refused(f"principles: a list of {wanted} is accepted")
        of_each = tuple(_back(read_answer(one, len(shown)), shown) for one in said)
        vote = Vote(asked.question.id, person, answer, shown, of_each, float(seconds))
        self.store.vote(name, asked.number, vote)
        return self._state(person)

    def _undo(self, given: Mapping[str, Any]) -> dict[str, Any]:
        person = _person(given)
        number = self.store.undo(person)
        return self._state(person) | {"undone": number is not None} | self._first(number, person)

    def _state(self, person: str) -> dict[str, Any]:
        """What to ask next, and what then, so that its images are there in time."""
        left, done = self.store.left(person)
        views = [self._view(self._asked(number), person) for number in left[:2]]
        return {"title": self.title, "questions": views, "done": done, "total": done + len(left)}

    def _first(self, number: int | None, person: str) -> dict[str, Any]:
        if number is None:
            return {}
        left, _ = self.store.left(person)
        then = [number, *(one for one in left if one != number)][:2]
        return {"questions": [self._view(self._asked(one), person) for one in then]}

    def _view(self, asked: Asked, person: str) -> dict[str, Any]:
        question, who = asked.question, quote(person, safe="")
        places = range(len(question.outputs))
        at = f"image/{asked.number}/{{}}?who={who}"
        return {
            "number": asked.number,
            "source": at.format("source"),
            "outputs": [at.format(place) for place in places],
            "befores": [at.format(f"before{p}") for p in places] if question.befores else [],
            "instruction": question.instruction,
            "earlier": question.earlier,
            "principles": [one["text"] for one in self._principles_of(question)],
        }

    def _principles_of(self, question: Question) -> tuple[Mapping[str, str], ...]:
        pair = len(question.outputs) == 2
        return question.principles if self.principles and pair else ()

    def _asked(self, number: Any) -> Asked:
        found = self.store.question(number) if type(number) is int else None
        if found is None:
            raise _Refused("number: no such question")
        return found

    def _path(self, number: int, slot: str, person: str) -> Path | None:
        asked = self.store.question(number)
        if asked is None:
            return None
        if slot == "source":
            return asked.question.image
        found = re.fullmatch(r"(before)?([0-9]{1,3})", slot)
        files = asked.question.befores if found and found[1] else asked.question.outputs
        if found is None or int(found[2]) >= len(files):
            return None
        return files[self.store.order(asked.question, person)[int(found[2])]]


def address(store: Store, listening: socket.socket) -> str:
    """Of the page, with its token."""
    return serving.address(_token(store), listening)


def _token(store: Store) -> str:
    found = store.fact("token")
    assert found is not None, "a store has one from its making"
    return found


def server_of(page: Page) -> Any:
    """uvicorn's, to be run with a socket. Raises ConfigError without the extra."""
    return serving.server_of(page.app(), "label")


def serve(page: Page, listening: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    server = server_of(page)
    page.store.note(URL, address(page.store, listening))
    server.run(sockets=[listening])


def _person(given: Mapping[str, Any]) -> str:
    name = given.get("who")
    name = " ".join(name.split()) if isinstance(name, str) else ""
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        raise _Refused(f"who: a name of 1 to {LONGEST_NAME} characters is accepted")
    return name


def _back(answer: Answer, shown: tuple[int, ...]) -> Answer:
    """From the order on the page to the question's own."""
    if isinstance(answer, str):
        return answer
    places = dict(zip(shown, answer, strict=True))
    return tuple(places[output] for output in range(len(shown)))


def _png(path: Path, changed: int) -> bytes:
    """As pixels alone: what a file says of itself besides would tell where it is from."""
    made = io.BytesIO()
    Image.fromarray(read_image(path)).save(made, "PNG", compress_level=1)
    return made.getvalue()
