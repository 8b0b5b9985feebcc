"""A local server with OpenAI's chat completions, which notes what it is asked and answers as a test says."""

import base64
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

from PIL import Image


class _Http(ThreadingHTTPServer):
    request_queue_size = 64  # with fewer places a burst of connections waits a second for its second try


class Server:
    """Answers chat completions with `reply(number, body) -> (status, headers, body)` and notes what it was asked."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict, dict]] = []
        self.reply: Callable = lambda number, body: (200, {}, completion(f"caption {number}"))
        lock, server = Lock(), self

        class Handler(BaseHTTPRequestHandler):
            wbufsize = -1  # one packet an answer; two would wait for one another

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.seen)
                    server.seen.append((self.path, dict(self.headers), body))
                status, headers, content = server.reply(number, body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *given: object) -> None: ...

        self.http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def shown(body: dict) -> list[Image.Image]:
    """The images of a request, in their order."""
    parts = [part for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))) for part in parts]
