"""A small server that speaks chat completions, backed by a function; the tests' stand-in for a served model.

`reply` gets the decoded request and returns what to answer: a Reply, or text, which becomes an ordinary completion with
the stop string stripped as most servers do.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """A raw answer. `cut`: promise the whole body, send half and hang up. `delay`: seconds before anything is sent."""

    status: int = 200
    body: str | bytes = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    delay: float = 0.0


def completion(text: str, finish_reason: str = "stop", **choice: Any) -> Reply:
    message = {"role": "assistant", "content": text}
    usage = choice.pop("usage", {"prompt_tokens": 10, "completion_tokens": 5})
    answer = {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason, **choice}], "usage": usage}
    return Reply(body=json.dumps(answer))


class ChatServer:
    """Use as `with`; `url` ends in /v1. Every request is kept in `requests`, its headers in `headers`."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply | str], models: tuple[str, ...] = ("small",)) -> None:
        self.reply, self.models = reply, models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                rows = [{"id": name, "object": "model"} for name in outer.models]
                self._send(Reply(body=json.dumps({"object": "list", "data": rows})))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                outer.headers.append(dict(self.headers))
                if self.path != "/v1/chat/completions":
                    self._send(Reply(404, "not found"))
                elif request["model"] not in outer.models:
                    error = {"message": f"The model `{request['model']}` does not exist."}
                    self._send(Reply(404, json.dumps({"error": error})))
                else:
                    reply = outer.reply(request)
                    self._send(completion(strip_stop(reply, request["stop"])) if isinstance(reply, str) else reply)

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.delay)
                body = reply.body.encode() if isinstance(reply.body, str) else reply.body
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body[: len(body) // 2] if reply.cut else body)
                except ConnectionError:  # the client has given up waiting
                    self.close_connection = True
                if reply.cut:
                    self.close_connection = True

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing: the tests look at `requests`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def strip_stop(text: str, stops: list[str]) -> str:
    """Text up to the first stop string, which is left out."""
    ends = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
