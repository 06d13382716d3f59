"""A real HTTP server with the protocol of OpenAI's chat completions, that misbehaves when told to."""

import base64
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def said(text: Any, **more: Any) -> Reply:
    """A good answer."""
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": "tiny",
              "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
              "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}  # fmt: skip
    return 200, {}, json.dumps(answer | more).encode()


def refuses(names: Sequence[str], text: str) -> Callable[["Asked"], Reply]:
    """Answers of a model that refuses options, in the words of OpenAI."""

    def reply(asked: Asked) -> Reply:
        for name in names:
            if name in asked.body:
                return failed(400, f"Unsupported parameter: '{name}' is not supported with this model.")
        return said(text)

    return reply


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "type": "x", "code": status}}).encode()


class Asked:
    """A request, as the server reads it. nth: how often this very question has come, from 1."""

    def __init__(self, body: dict[str, Any], headers: Any, nth: int) -> None:
        self.body, self.headers, self.nth = body, headers, nth
        content = body["messages"][0]["content"]
        self.text = content if isinstance(content, str) else content[-1]["text"]
        self.jpeg = b""
        if not isinstance(content, str):
            head, data = content[0]["image_url"]["url"].split(",")
            self.jpeg = base64.b64decode(data)
            assert head == f"data:image/{self.picture.format.lower()};base64"

    @property
    def picture(self) -> Any:
        return Image.open(io.BytesIO(self.jpeg))


class _Threads(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class ChatServer:
    """Serves on a free port of 127.0.0.1 while the `with` block runs. reply: a question → the answer to it."""

    def __init__(self, reply: Callable[[Asked], Reply], models: tuple[str, ...] = ("tiny",)) -> None:
        self.reply, self.models = reply, models
        self.asked: list[Asked] = []
        self.flying = self.most = 0  # requests at once
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                data = [{"id": m, "object": "model"} for m in server.models]
                self._send(200, {}, json.dumps({"object": "list", "data": data}).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    nth = 1 + sum(a.body == body for a in server.asked)
                    asked = Asked(body, self.headers, nth)
                    server.asked.append(asked)
                    server.flying += 1
                    server.most = max(server.most, server.flying)
                reply = server.reply(asked)
                with server.lock:
                    server.flying -= 1
                with contextlib.suppress(OSError):  # where the client has given up
                    self._send(*reply)

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                if not status:  # the connection breaks
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = _Threads(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.http.shutdown()
        self.http.server_close()


def hang(asked: Asked, seconds: float = 1.0) -> Reply:
    time.sleep(seconds)
    return said("too late")
