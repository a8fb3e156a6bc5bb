"""A hub of models on this machine: the few addresses with which huggingface_hub creates, commits, lists and fetches."""

import base64
import hashlib
import json
import re
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """Use as a context manager: ``url`` is its address, ``files`` what each model has, by "org/name" and file name."""

    def __enter__(self) -> "Hub":
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (HubHandler,), {"files": self.files}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    files: dict[str, dict[str, bytes]]

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path.partition("?")[0]):
            self.take(*match.groups(), body)
        else:
            self.send(404, b"")

    def take(self, name: str, step: str, body: bytes) -> None:
        if step == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            kept = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": path, **kept} for path in paths]})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"http://{self.headers['Host']}/{name}"
        self.answer({"success": True, "commitOid": commit(self.files[name]), "commitUrl": url})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/\w+)?", path):
            name, what = match.groups()
            if not (files := self.files.get(name)):
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            sizes = [{"type": "file", "path": k, "size": len(v), "oid": oid(v)} for k, v in files.items()]
            self.answer(sizes if what == "tree" else {"id": name, "sha": commit(files), "siblings": []})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            files = self.files.get(match[1], {})
            if (content := files.get(match[2])) is None:
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            self.send(200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": commit(files)})
        else:
            self.send(404, b"")

    do_HEAD = do_GET

    def answer(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    """The name of a model's present state."""
    return oid(repr(sorted(files.items())).encode())
