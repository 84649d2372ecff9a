"""Servers on the loopback: one that answers in an engine's schema, and one that passes on but fails at times."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: ``(method, path, body, headers) -> (status, answer)``; a string is sent as it is, anything else as JSON.
Answer = Callable[[str, str, Any, Any], tuple[int, Any]]

FAULTS = ("cut", "500", "429", "slow", "drip", "truncated", "garbage", "half")


class Server:
    """Serves ``answer`` on a free port; the first requests that are not GET meet ``faults`` instead."""

    def __init__(self, answer: Answer, faults: Sequence[str] = ()) -> None:
        self.answer, self.faults = answer, list(faults)
        self.requests: list[Any] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body go out at once, not 40 ms apart

            def do_GET(self) -> None:
                self.reply(*outer.answer("GET", self.path, None, self.headers))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(body)
                    fault = outer.faults.pop(0) if outer.faults else None
                    outer._at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer._at_once)
                try:
                    if fault:
                        self.fail(fault)
                    else:
                        self.reply(*outer.answer("POST", self.path, body, self.headers))
                finally:
                    with outer._lock:
                        outer._at_once -= 1

            def reply(self, status: int, answer: Any, **headers: str) -> None:
                content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def fail(self, fault: str) -> None:
                with suppress(OSError):  # the client may have hung up
                    self.spoil(fault)

            def spoil(self, fault: str) -> None:
                self.close_connection = True
                if fault == "500":
                    self.reply(500, {"error": "internal"})
                elif fault == "429":
                    self.reply(429, {"error": "busy"}, Retry_After="1")
                elif fault == "slow":
                    time.sleep(5)
                elif fault == "drip":  # each part within the time-out of one read
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    for _ in range(50):
                        self.wfile.write(b" ")
                        time.sleep(0.1)
                elif fault in ("truncated", "half"):
                    self.send_response(200)
                    # Cut by the connection where a length is given, else a body that is no whole JSON.
                    if fault == "truncated":
                        self.send_header("Content-Length", "1000")
                    self.send_header("Connection", "close")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [{"tok')
                elif fault == "garbage":
                    self.send_response(200)
                    self.send_header("Content-Length", "9")
                    self.end_headers()
                    self.wfile.write(b"<html>404")
                # "cut": nothing at all

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.handle_error = lambda *_: None  # clients that hung up
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@contextmanager
def serving(answer: Answer, faults: Sequence[str] = ()) -> Iterator[Server]:
    """A running :class:`Server`."""
    server = Server(answer, faults)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def passing_on(port: int) -> Answer:
    """Asks the server behind ``port`` and passes its answer on."""

    def answer(method: str, path: str, body: Any, headers: Any) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    return answer
