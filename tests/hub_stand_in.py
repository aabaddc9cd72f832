"""A stand-in for the hub on 127.0.0.1: it answers as the hub does for a data set's files, and fails when told to.

As the real one, `/datasets/<repository>/resolve/main/<path>` leads to another server, which holds the content by SHA-256
and answers range requests.
"""

import hashlib
import re
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

from utils import hub

PREFIX = "/datasets/poloclub/diffusiondb/resolve/main/"


class Hub:
    """Serves `folder`. `faults[path]` are what the next downloads of a file meet: "drop", "cut", "503" or "damage"."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.faults = defaultdict(list)  # of the content
        self.refusals = defaultdict(list)  # of the hub's own answers: "503"
        self.ranges = True  # whether range requests are answered as such
        self.log = []  # (method, path, Range header, bytes sent) of the content's server
        self.tokens = set()  # that reached the content's server, where none belongs
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in (Front, Content)]
        for server in self.servers:
            server.hub, server.daemon_threads = self, True
            server.handle_error = lambda *_: None  # a client that has gone away
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        self.address, self.content_address = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def use(self, monkeypatch):
        """Let this process's hub library ask here, whatever it has read from its environment, and wait less."""
        template = f"{self.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub, "WAITS", (0.01, 0.01))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}

    def fetched(self) -> int:
        return sum(sent for method, *_, sent in self.log if method == "GET")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def reply(self, status: int, headers=(), content: bytes = b"", declared: int | None = None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if declared is None else declared))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Front(Handler):
    def answer(self):
        hub, name = self.server.hub, self.path.removeprefix(PREFIX)
        commit = {"X-Repo-Commit": "0" * 40}
        if hub.refusals[name]:
            self.reply(int(hub.refusals[name].pop(0)))
        elif not self.path.startswith(PREFIX) or not (hub.folder / name).is_file():
            self.reply(404, commit | {"X-Error-Code": "EntryNotFound"})
        else:
            content = (hub.folder / name).read_bytes()
            linked = {"X-Linked-Size": len(content), "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self.reply(302, commit | linked | {"Location": f"{hub.content_address}/{name}"})


class Content(Handler):
    def answer(self):
        hub, name = self.server.hub, self.path.removeprefix("/")
        if "Authorization" in self.headers:
            hub.tokens.add(self.headers["Authorization"])
        content = (hub.folder / name).read_bytes()
        status, headers, asked = 200, {}, self.headers.get("Range") if hub.ranges else None
        if asked:
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", asked).groups()
            start = int(first) if first else max(0, len(content) - int(last))
            end = min(int(last) + 1, len(content)) if first and last else len(content)
            status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            content = content[start:end]
        fault = hub.faults[name].pop(0) if self.command == "GET" and hub.faults[name] else None
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if fault == "503":
            self.reply(503)
            return
        declared = len(content)
        if fault == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        if fault == "damage":
            content = content[:100] + bytes(100) + content[200:]
        hub.log.append((self.command, name, asked, len(content)))
        self.reply(status, headers, content, declared)
