"""A small hub: what huggingface_hub asks of the real one to publish a folder and to fetch it again, over real HTTP.

It keeps what was committed in `files`, answers with `refusal` where that is set, and writes down every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """repository -> name -> content of what was published. refusal: (status, words) that every request gets."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refusal: tuple[int, str] | None = None
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: Any = b"", status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.server.refusal is not None:
            status, words = self.server.refusal
            self._answer({"error": words}, status)
        elif path == "/api/whoami-v2":
            self._answer({"name": "me", "type": "user", "orgs": []})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}", "id": "1"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tree|revision)/[^/]+", path):
            self._of_repository(match[1], match[2], body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._of_repository(match[1], "revision", body)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(match[1], match[2])
        else:
            self._answer({"error": f"no {path}"}, 404)

    do_GET = do_POST = do_HEAD = _handle  # noqa: N815

    def _of_repository(self, name: str, verb: str, body: bytes) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        elif verb == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            self._answer(
                {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}"}
            )
        elif verb == "tree":
            self._answer(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in files]
            self._answer(
                {"id": name, "modelId": name, "sha": COMMIT, "private": False, "siblings": siblings, "tags": []}
            )

    def _file(self, repository: str, name: str) -> None:
        data = self.server.repositories.get(repository, {}).get(name)
        if data is None:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        else:
            self._answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of this machine."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
