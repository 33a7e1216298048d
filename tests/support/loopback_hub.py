"""A Hub on the loopback interface: just enough of the HTTP API to push a model and load it by id.

It keeps every commit of every model repository in memory and answers the calls that
`huggingface_hub` and `transformers` make for `push_to_hub` and `from_pretrained`. Every upload is
answered with `uploadMode: "regular"`, so that a commit carries the files themselves (base64 in
NDJSON) and no large-file storage has to be imitated.

The client reads `HF_ENDPOINT` once, at its first import. So client code runs in a new process:

    with LoopbackHub() as hub:
        subprocess.run([sys.executable, "-c", "..."], env=hub.client_env(home=tmp_path), check=True)
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "tester"
Files = Mapping[str, bytes]


class HubError(Exception):
    """An answer that is no success, with the code by which the client picks its exception."""

    def __init__(self, status: int, code: str, **body: str) -> None:
        super().__init__(status, code)
        self.status, self.code, self.body = status, code, {"error": code, **body}


class Repository:
    """The commits of `main`. Each is a whole snapshot, so that every revision stays readable."""

    def __init__(self, files: Files | None = None) -> None:
        self.commits: dict[str, Files] = {}
        self.commit(files or {})

    def commit(self, files: Files) -> str:
        listing = sorted((path, blob_id(data)) for path, data in files.items())
        self.head = hashlib.sha1(repr((len(self.commits), listing)).encode()).hexdigest()
        self.commits[self.head] = files
        return self.head

    def resolve(self, revision: str) -> tuple[str, Files]:
        """The id and the files of a commit, given "main" or an id."""
        sha = self.head if revision == "main" else revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound")
        return sha, self.commits[sha]


def blob_id(data: bytes) -> str:
    """Git's name of a file's content; the client does not send a file whose name is known."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class LoopbackHub:
    """The server, a context manager. `unknown` lists the requests it had no answer to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def resolve(self, repo_id: str, revision: str = "main") -> tuple[str, Files]:
        """The id and the files of a commit, given "main" or an id."""
        if repo_id not in self.repositories:
            raise HubError(404, "RepoNotFound")
        return self.repositories[repo_id].resolve(revision)

    def client_env(self, home: Path) -> dict[str, str]:
        """The environment of a client process: this Hub, a cache under `home`, a token."""
        ours = ("HF_", "TRANSFORMERS_")
        return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "dummy",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    """One request. `ROUTES` names the method that answers it, from the parts of its path."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def handle_request(self) -> None:
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            writes = request.startswith(("POST /api/repos/", "POST /api/models/"))
            if writes and not self.headers.get("Authorization"):
                raise HubError(401, "Unauthorized")
            for pattern, answer in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    with self.hub.lock:
                        answer(self, **match.groupdict())
                    return
            self.hub.unknown.append(request)
            raise HubError(501, f"the loopback Hub has no answer to {request}")
        except HubError as error:
            self.send(json.dumps(error.body).encode(), error.status, {"X-Error-Code": error.code})

    do_GET = do_HEAD = do_POST = handle_request

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the output of a test is its own."""

    def send(self, data: bytes, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def create(self) -> None:
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise HubError(409, "RepoExists", url=url)
        self.hub.repositories[repo_id] = Repository()
        self.send_json({"url": url})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        stored = self.hub.resolve(repo, revision)[1]
        modes = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            oid = blob_id(stored[path]) if path in stored else None
            modes.append({"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": oid})
        self.send_json({"files": modes})

    def commit(self, repo: str) -> None:
        files = dict(self.hub.resolve(repo)[1])
        for operation in map(json.loads, self.body.splitlines()):
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key != "header":
                raise HubError(400, f"the loopback Hub takes no {key!r} in a commit")
        sha = self.hub.repositories[repo].commit(files)
        self.send_json({"commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def model_info(self, repo: str, revision: str | None) -> None:
        sha, files = self.hub.resolve(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.send_json({"id": repo, "sha": sha, "private": False, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None) -> None:
        """Every file below `folder`, as if asked with `recursive=True`."""
        prefix = f"{folder}/" if folder else ""
        files = self.hub.resolve(repo, revision)[1]
        found = [(path, data) for path, data in files.items() if path.startswith(prefix)]
        if folder and not found:
            raise HubError(404, "EntryNotFound")
        self.send_json(
            [{"type": "file", "path": p, "size": len(d), "oid": blob_id(d)} for p, d in found]
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        """A file, or the range of its bytes that is asked for."""
        sha, files = self.hub.resolve(repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound")
        data = files[path]
        headers = {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.send(data, 200, headers)
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= len(data):
            raise HubError(416, "RangeNotSatisfiable")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self.send(data[start:stop], 206, headers)


_REPO = "/(?P<repo>[^/]+/[^/]+)"
_REVISION = "/(?P<revision>[^/]+)"
ROUTES: dict[str, Callable[..., None]] = {
    "POST /api/repos/create": _Handler.create,
    "POST /api/validate-yaml": _Handler.validate_yaml,
    f"POST /api/models{_REPO}/preupload{_REVISION}": _Handler.preupload,
    f"POST /api/models{_REPO}/commit/main": _Handler.commit,
    f"GET /api/models{_REPO}(/revision{_REVISION})?": _Handler.model_info,
    f"GET /api/models{_REPO}/tree{_REVISION}(/(?P<folder>.+))?": _Handler.tree,
    f"(GET|HEAD) {_REPO}/resolve{_REVISION}/(?P<path>.+)": _Handler.resolve,
}
