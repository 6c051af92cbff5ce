"""A small local hub that speaks the download protocols of Hugging Face and of ModelScope, and fails as it is told."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from tests.deadlines import PATIENCE_S

TOKEN = "hf_secretsecretsecret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
Files = dict[str, bytes]


@dataclass
class Failure:
    """An answer in place of the real one, to paths that match, `times` often."""

    path: str
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: str = "{}"
    times: int = 1_000_000


@dataclass
class FakeHub:
    """One repository, `owner/model`. Set the fields before the requests; read the counts behind them."""

    commits: dict[str, Files]                                   # commit -> its files
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "master": COMMIT})
    needs_token: bool = False
    echoes_token: bool = False                                  # in its errors, as it should not
    cuts: dict[str, int] = field(default_factory=dict)          # file -> bytes after which the connection ends, once
    resets: Counter[str] = field(default_factory=Counter)       # file -> how often the connection is reset in its midst
    spoiled: set[str] = field(default_factory=set)              # files whose bytes are wrong, their sizes right
    lengthened: set[str] = field(default_factory=set)           # files that are longer than listed
    failures: list[Failure] = field(default_factory=list)
    etag: str | None = None                                     # of small files, in place of the right one
    is_silent: bool = False                                     # accepts, and never answers
    gate: threading.Event | None = None                         # files come when it is set,
    gated: str = ""                                             # those with this in their names
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)    # method, path, range
    bytes_sent: Counter[str] = field(default_factory=Counter)
    tokens_at_storage: list[str] = field(default_factory=list)  # given to the place that needs none
    waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))    # released when one does
    url: str = ""
    storage_url: str = ""

    def num_fetches(self, name: str) -> int:
        return sum(method == "GET" and path.endswith(f"#{name}") for method, path, _ in self.requests)

    def fetched(self) -> set[str]:
        return {path.rpartition("#")[2] for method, path, _ in self.requests if method == "GET" and "#" in path}


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve it, and the storage that its large files come from, which has another address."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "is_storage": storage}))
               for storage in (False, True)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        server.block_on_close = False
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    is_storage: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
        if self.hub.is_silent:
            self.hub.requests.append((self.command, path, None))
            threading.Event().wait(PATIENCE_S)
            return
        failure = next((failure for failure in self.hub.failures
                        if failure.times > 0 and re.search(failure.path, self.path)), None)
        if failure is not None:
            failure.times -= 1
            self.hub.requests.append((self.command, path, None))
            self._answer(failure.status, failure.body.encode(), failure.headers)
        elif self.is_storage:
            self.hub.tokens_at_storage.append(self.headers.get("Authorization", ""))
            self._file(path.rpartition("/")[2], self._files(path.split("/")[1]))
        elif self.hub.needs_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse()
        elif path.startswith(("/api/v1/", "/openapi/")):
            self._model_scope(path, query)
        else:
            self._hugging_face(path)

    def _refuse(self) -> None:
        self.hub.requests.append((self.command, urlsplit(self.path).path, None))
        given = self.headers.get("Authorization", "")
        words = f"Invalid credentials: {given}" if self.hub.echoes_token else "Access to owner/model is restricted."
        self._answer(401, json.dumps({"error": words, "Message": words, "Code": 10010200001}).encode(),
                     {"X-Error-Code": "GatedRepo", "X-Error-Message": words})

    def _files(self, revision: str) -> Files | None:
        return self.hub.commits.get(self.hub.branches.get(revision, revision))

    # ---- Hugging Face: huggingface.co/docs/hub/api, and the headers that its library reads ----

    def _hugging_face(self, path: str) -> None:
        self.hub.requests.append((self.command, path, None))
        if info := re.fullmatch(r"/api/models/owner/model(?:/revision/(.+))?", path):
            commit = self._commit(info[1] or "main")
            if commit is not None:
                self._json({"id": "owner/model", "sha": commit, "siblings": []})
        elif tree := re.fullmatch(r"/api/models/owner/model/tree/(.+)", path):
            commit = self._commit(tree[1])
            if commit is not None:
                self._json([_tree_entry(name, content) for name, content in self.hub.commits[commit].items()])
        elif file := re.fullmatch(r"/owner/model/resolve/([^/]+)/(.+)", path):
            commit = self._commit(file[1])
            if commit is not None:
                self.hub.requests.pop()
                self._resolve(commit, file[2])
        else:
            self._answer(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def _commit(self, revision: str) -> str | None:
        commit = self.hub.branches.get(revision, revision)
        if commit in self.hub.commits:
            return commit
        self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        return None

    def _resolve(self, commit: str, name: str) -> None:
        content = self.hub.commits[commit].get(name)
        if content is None:
            self._answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        elif is_large(name):
            self.hub.requests.append((self.command, f"/resolve/{name}", None))
            self._answer(302, b"", {"X-Repo-Commit": commit, "X-Linked-Size": str(len(content)),
                                    "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                                    "Location": f"{self.hub.storage_url}/{commit}/{name}?X-Amz-Signature=secretsig"})
        else:
            etag = self.hub.etag or git_hash(content)
            self._file(name, self.hub.commits[commit], {"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    # ---- ModelScope: /api/v1 as its library speaks it ----

    def _model_scope(self, path: str, query: dict[str, str]) -> None:
        if path == "/api/v1/models/owner/model/repo":
            self._file(query["FilePath"], self._files(query["Revision"]))
            return
        self.hub.requests.append((self.command, path, None))
        files = self._files(query.get("Revision", "master"))
        if path == "/api/v1/models/owner/model/repo/files" and files is not None:
            self._json({"Code": 200, "Success": True, "Data": {"Files": [
                {"Path": name, "Name": name, "Type": "blob", "Size": len(content),
                 "Sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()]}})
        elif path == "/openapi/v1/models/owner/model":
            self._json({"success": True, "data": {"id": "owner/model", "name": "model", "owner": "owner"}})
        else:
            self._answer(404, b'{"Code": 10010205001, "Message": "not found", "Success": false}', {})

    # ---- both ----

    def _file(self, name: str, files: Files | None, headers: dict[str, str] | None = None) -> None:
        wanted = self.headers.get("Range")
        self.hub.requests.append((self.command, f"{urlsplit(self.path).path}#{name}", wanted))
        if files is None or name not in files:
            self._answer(404, b"{}", {})
            return
        if self.hub.gate is not None and self.hub.gated in name and self.command == "GET":
            self.hub.waiting.release()
            self.hub.gate.wait(PATIENCE_S)
        content = bytes(byte ^ 1 for byte in files[name]) if name in self.hub.spoiled else files[name]
        content += b"more" if name in self.hub.lengthened else b""
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        headers = dict(headers or {}) | {"Accept-Ranges": "bytes"}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if wanted else 200, content[start:], headers, name)

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cuts.pop(name, None)
        if self.hub.resets[name] > 0:
            self.hub.resets[name] -= 1
            cut = len(body) // 2
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sent = body if cut is None else body[:cut]
        self.wfile.write(sent)
        self.hub.bytes_sent[name] += len(sent)
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _tree_entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    if is_large(name):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
