"""A Hugging Face Hub in a folder (``OWNER/NAME/REVISION/FILE``), as a module and as a server."""

import base64
import hashlib
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

TOKEN = "hf_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def install(monkeypatch, root: Path) -> None:
    """Let ``import huggingface_hub`` give a module that reads and writes the folder."""

    def hf_hub_download(repo_id, filename, *, revision=None):
        path = root / repo_id / (revision or "main") / filename
        if not path.is_file():
            raise LookupError(f"404 Client Error.\n\nRepository Not Found for {repo_id}.")
        return str(path)

    class HfApi:
        def create_repo(self, repo_id, *, private, exist_ok):
            assert exist_ok
            (root / repo_id / "main").mkdir(parents=True, exist_ok=True)
            if private:
                (root / repo_id / "private").touch()

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            for file in Path(folder_path).iterdir():
                (root / repo_id / "main" / file.name).write_bytes(file.read_bytes())
            (root / repo_id / "message").write_text(commit_message)
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/{COMMIT}")

    module = ModuleType("huggingface_hub")
    module.hf_hub_download, module.HfApi = hf_hub_download, HfApi
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@contextmanager
def serve(root: Path):
    """Answer as the Hub to downloads and uploads; yields the address, for ``HF_ENDPOINT``."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.reply(with_body=False)

        def do_GET(self):
            self.reply(with_body=True)

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            parts = self.path.split("?")[0].strip("/").split("/")
            host = f"http://{self.headers['Host']}"
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                self.send_error(401)
                return
            if parts == ["api", "repos", "create"]:
                asked = json.loads(body)
                repository = f"{asked['organization']}/{asked['name']}"
                (root / repository / "main").mkdir(parents=True, exist_ok=True)
                answer = {"url": f"{host}/{repository}"}
            elif parts == ["api", "validate-yaml"]:
                answer = {"errors": [], "warnings": []}
            elif parts[:2] == ["api", "models"] and parts[4:] == ["preupload", "main"]:
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                files = json.loads(body)["files"]
                answer = {"files": [{"path": x["path"], **mode} for x in files]}
            elif parts[:2] == ["api", "models"] and parts[4:] == ["commit", "main"]:
                folder = root.joinpath(*parts[2:4])
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "header":
                        (folder / "message").write_text(line["value"]["summary"])
                    else:
                        data = base64.b64decode(line["value"]["content"])
                        (folder / "main" / line["value"]["path"]).write_bytes(data)
                url = f"{host}/{'/'.join(parts[2:4])}/commit/{COMMIT}"
                answer = {"commitUrl": url, "commitOid": COMMIT}
            else:
                self.send_error(404)
                return
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def reply(self, with_body):
            parts = self.path.split("?")[0].strip("/").split("/")
            file = root.joinpath(*parts[:2], *parts[3:]) if parts[2:3] == ["resolve"] else None
            if file is None or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
