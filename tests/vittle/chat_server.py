"""A local HTTP server that speaks the chat completions protocol, as a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = str | int | bytes | tuple[int, bytes]
"""What the model says; or a status other than 200; or a body that is none; or both."""


class ChatServer:
    """Replies by a function of the user's message and of how often that message came before."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        lock, seen = threading.Lock(), dict[str, int]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = body["messages"][-1]["content"]
                with lock:
                    outer.requests.append(body | {"path": self.path})
                    outer.keys.add(self.headers["Authorization"])
                    times = seen[message] = seen.get(message, -1) + 1
                self._send(reply(message, times))

            def _send(self, found: Reply) -> None:
                status = found[0] if isinstance(found, tuple) else found if isinstance(found, int) else 200
                found = found[1] if isinstance(found, tuple) else found
                choice = {"index": 0, "message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
                completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                content = found if isinstance(found, bytes) else json.dumps(completion).encode()
                if isinstance(found, int):
                    key = self.headers["Authorization"]
                    content = json.dumps({"error": {"message": f"no, {key}, not now"}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


@contextmanager
def serving(reply: Callable[[str, int], Reply]) -> Iterator[ChatServer]:
    """A server for as long as it is needed."""
    server = ChatServer(reply)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
