"""A stand-in on 127.0.0.1 for the hub as it takes an upload to me/out: repository, check of the card, large files, commit."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


def start() -> ThreadingHTTPServer:
    """Return the server: `files` of the last commits by name, how many `commits`, and `refusals`, status by part of a path."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.objects, server.refusals, server.commits = {}, {}, {}, 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body, server = self.rfile.read(int(self.headers["Content-Length"])), self.server
        host = f"http://127.0.0.1:{server.server_port}"
        for path, status in server.refusals.items():
            if path in self.path:
                return self.reply({"error": "the hub says no"}, status)
        if self.headers["Authorization"] != "Bearer hf_test":
            return self.reply({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    server.files[line["value"]["path"]] = server.objects[line["value"]["oid"]]
            server.commits += 1
            return self.reply({"commitUrl": f"{host}/me/out/commit/1", "commitOid": "1", "success": True})
        asked = json.loads(body)
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{host}/me/{asked['name']}", "id": f"me/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            base = yaml.safe_load(asked["content"].split("---")[1]).get("base_model", "a/b")
            message = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            if re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                return self.reply({"errors": [], "warnings": []})
            return self.reply({"errors": [{"message": message}], "warnings": []}, 400)
        if self.path == "/api/models/me/out/preupload/main":
            large = (".safetensors", ".png")
            files = [
                {"path": name, "uploadMode": "lfs" if name.endswith(large) else "regular", "shouldIgnore": False}
                for name in (file["path"] for file in asked["files"])
            ]
            return self.reply({"files": files})
        if self.path == "/me/out.git/info/lfs/objects/batch":
            objects = [o | {"actions": {"upload": {"href": f"{host}/lfs/{o['oid']}"}}} for o in asked["objects"]]
            return self.reply({"transfer": "basic", "objects": objects})
        self.reply({"error": f"unknown {self.path}"}, 404)

    def do_PUT(self):
        self.server.objects[self.path.removeprefix("/lfs/")] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_GET(self):
        self.reply({"id": "me/out", "sha": "0", "siblings": []}, 200 if "/me/out/" in self.path else 404)

    def reply(self, answer: dict, status: int = 200):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass
