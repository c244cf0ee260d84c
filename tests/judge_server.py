"""A judge for tests: a server on this machine that speaks chat completions, well or badly.

What it answers is a `Reply` of `replies`, in order, and behind them (or without) what `answer`
makes of the request. It keeps every request, and how many were under way at once.
"""

# No annotations as texts: `beside` loads this under no name, where dataclasses would look them up.

import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHAT, MODELS, HEALTH, SYSTEMONE = "/v1/chat/completions", "/v1/models", "/health", "/v1/systemone"


@dataclass(frozen=True)
class Reply:
    """One answer. body: bytes, or what becomes JSON. after: seconds it takes. cut: only so many
    bytes of the body are sent, then the connection ends."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: float = 0.0
    cut: int | None = None


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


@dataclass
class JudgeServer:
    """As a context manager. says: the text of an answer, a function of (body, number of the
    choice). top: what log-probs show, a dict of text -> probability for every token, the first of
    which was chosen. honours: what it does of n, logprobs, schema, images; a request for
    what it `refuses` gets a 400. most_images: in a prompt. after: seconds every answer takes."""

    says: Callable[[dict[str, Any], int], str] | str = "yes"
    top: list[dict[str, float]] = field(default_factory=lambda: [{"yes": 0.8, "no": 0.2}])
    honours: set[str] = field(default_factory=lambda: {"n", "logprobs", "schema", "images"})
    refuses: set[str] = field(default_factory=set)
    models: list[str] | None = field(default_factory=lambda: ["judge"])
    systemone: Callable[[dict[str, Any]], Any] | None = None
    most_images: int = 8
    after: float = 0.0
    finish: str = "stop"

    def __post_init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.requests: list[Asked] = []
        self.under_way = self.peak = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> "JudgeServer":
        outer = self

        class Handler(_Handler):
            judge = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def chats(self) -> list[Asked]:
        """The requests for an answer."""
        return [asked for asked in self.requests if asked.path == CHAT]

    def script(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    def reply(self, asked: Asked) -> Reply:
        if asked.path == MODELS:
            if self.models is None:
                return Reply({"error": "offline"}, 500)
            return Reply({"object": "list", "data": [{"id": name} for name in self.models]})
        if asked.path == HEALTH:
            return Reply({"status": "ok"})
        if asked.path == SYSTEMONE and self.systemone is not None:
            with self._lock:
                if self.replies:
                    return self.replies.popleft()
            return Reply(self.systemone(asked.body))
        if asked.path != CHAT:
            return Reply({"detail": "Not Found"}, 404)
        with self._lock:
            if self.replies:
                return self.replies.popleft()
        return self.answer(asked.body)

    def answer(self, body: dict[str, Any]) -> Reply:
        """As a server does that honours some of it and silently ignores the rest."""
        if self.models is not None and body["model"] not in self.models:
            return Reply({"error": {"message": f"no model {body['model']}"}}, 404)
        content = body["messages"][0]["content"]
        images = sum(part["type"] == "image_url" for part in content)
        if images > self.most_images:
            return Reply({"error": {"message": f"at most {self.most_images} images"}}, 400)
        for name in self.refuses & set(body):
            return Reply({"error": {"message": f"{name} is not supported"}}, 400)
        count = body.get("n", 1) if "n" in self.honours else 1
        tops = self.top if "logprobs" in self.honours and body.get("logprobs") else None
        seen = images if "images" in self.honours else 0
        choices = [choice(self.text(body, k), tops, self.finish, k) for k in range(count)]
        usage = {"prompt_tokens": 10 + 16 * seen, "completion_tokens": count}
        return Reply({"choices": choices, "usage": usage}, after=self.after)

    def text(self, body: dict[str, Any], k: int) -> str:
        if "response_format" in body and "schema" in self.honours:
            made = made_of(body["response_format"]["json_schema"]["schema"])
            return json.dumps(made)
        return self.says if isinstance(self.says, str) else self.says(body, k)


def choice(
    text: str | None,
    tops: Iterable[dict[str, float]] | None = None,
    finish: str = "stop",
    index: int = 0,
) -> dict[str, Any]:
    """One of a response's."""
    made: dict[str, Any] = {"index": index, "message": {"content": text}, "finish_reason": finish}
    if tops is not None:
        content = []
        for top in tops:
            pairs = [
                {"token": token, "logprob": math.log(p) if 0 < p <= 1 else p}
                for token, p in top.items()
            ]
            content.append({**pairs[0], "top_logprobs": pairs})
        made["logprobs"] = {"content": content}
    return made


def made_of(schema: dict[str, Any]) -> Any:
    """A value that follows a schema of the few forms that are asked for."""
    kind = schema["type"]
    if kind == "object":
        return {name: made_of(one) for name, one in schema["properties"].items()}
    if kind == "array":
        return [made_of(schema["items"])] * schema["minItems"]
    if kind == "string":
        return schema.get("enum", ["because it is"])[-1]
    return schema["maximum"]


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def _do(self) -> None:
        judge = self.judge
        length = int(self.headers.get("content-length") or 0)
        received = self.rfile.read(length)
        path, _, query = self.path.partition("?")
        body = json.loads(received) if received else None
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, path, query, headers, body)
        with judge._lock:
            judge.requests.append(asked)
            judge.under_way += 1
            judge.peak = max(judge.peak, judge.under_way)
        try:
            reply = judge.reply(asked)
            if reply.after:
                judge._closing.wait(reply.after)
        finally:
            with judge._lock:  # before the answer is sent: the next request may follow at once
                judge.under_way -= 1
        sent = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        try:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent if reply.cut is None else sent[: reply.cut])
        except OSError:  # nobody waits any more
            self.close_connection = True
        if reply.cut is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
