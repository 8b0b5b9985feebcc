"""A local server that speaks as much of the hub's protocol as fetching needs, and fails as a test says."""

import hashlib
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """The repository `owner/name`, a model and a dataset, of some files.

    fault: asked with (kind of request, the how manieth of its kind from 1) before each answer, where the kind is
    "info", "tree", "head" or "get". It says nothing, or (status, headers), or "cut": half of the file, then the
    end; or "short": half of it as if it were all.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.asked: list[str] = []
        self.fault: Callable[[str, int], object] = lambda kind, number: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer("head")

            def do_GET(self) -> None:
                if self.path.startswith("/api/") and "/owner/name" not in self.path:
                    self.send(404, {}, b"")  # what the client asks for its own sake
                else:
                    kinds = {"/tree/": "tree", "/resolve/": "get"}
                    self.answer(next((kind for part, kind in kinds.items() if part in self.path), "info"))

            def answer(self, kind: str) -> None:
                hub.asked.append(kind)
                fault = hub.fault(kind, hub.asked.count(kind))
                if isinstance(fault, tuple):
                    self.send(fault[0], fault[1], b"")
                elif kind in ("info", "tree"):
                    self.send(200, {}, json.dumps(listing(files) if kind == "info" else tree(files)).encode())
                else:
                    self.serve(unquote(self.path).partition("/resolve/")[2].partition("/")[2], fault)

            def serve(self, name: str, fault: object) -> None:
                if name not in files:
                    self.send(404, {"X-Error-Code": "EntryNotFound"}, b"")
                    return
                content = files[name][: len(files[name]) // 2] if fault == "short" else files[name]
                start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
                if start:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send(206 if start else 200, headers, content[start:], fault == "cut")

            def send(self, status: int, headers: dict, content: bytes, cut: bool = False) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                if cut:
                    self.close_connection = True

            def log_message(self, *given: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def listing(files: dict[str, bytes]) -> dict:
    return {"id": "owner/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}


def tree(files: dict[str, bytes]) -> list[dict]:
    sums = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
    return [{"type": "file", "path": name, "size": len(files[name]), "oid": total} for name, total in sums.items()]
