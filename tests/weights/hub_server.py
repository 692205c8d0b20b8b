"""A stand-in for the Hugging Face Hub: its addresses, headers and error codes, over real HTTP.

It has what ``huggingface_hub`` asks for when a file of a model's repository is read and when a
commit is made: repositories with commits, branches and tags; large files (here the safetensors)
behind a redirect to another host, and uploaded there; private and gated repositories; tokens.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

READER, WRITER = "hf_reader", "hf_writer"
LICENCES = {"apache-2.0", "mit", "gpl-3.0", "cc-by-4.0", "unknown", "other"}


@dataclasses.dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict = dataclasses.field(default_factory=dict)  # commit -> {path: content}
    refs: dict = dataclasses.field(default_factory=dict)  # branch or tag -> commit
    messages: list = dataclasses.field(default_factory=list)

    def commit(self, files, *, to="main", message=""):
        """A commit that changes some files of a branch."""
        parent = self.refs.get(to, "")
        changed = {**self.commits.get(parent, {}), **files}
        seed = repr((parent, sorted(changed.items()), len(self.commits))).encode()
        oid = hashlib.sha1(seed).hexdigest()
        self.commits[oid] = changed
        self.refs[to] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision):
        return self.refs.get(revision, revision if revision in self.commits else None)


class RefusalError(Exception):
    def __init__(self, status, code="", message=""):
        self.status, self.code, self.message = status, code, message


def _is_large(path):
    return path.endswith(".safetensors")


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status=200, content=b"", **headers):
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self):
        hub = self.server.hub
        self.path = unquote(self.path.partition("?")[0])
        self.body = self.read_body()
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.path == "/api/agent-harnesses":  # of no repository
            return self.answer(404)
        hub.requests.append(f"{self.command} {self.path}")
        if hub.down:
            return self.answer(503)
        for method, pattern, serve in ROUTES:
            found = re.fullmatch(pattern, self.path)
            if method == self.command and found:
                try:
                    return serve(self, hub, *found.groups())
                except RefusalError as refusal:
                    return self.answer(
                        refusal.status,
                        {"error": refusal.message},
                        X_Error_Code=refusal.code,
                        X_Error_Message=refusal.message,
                    )
        return self.answer(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def repo(self, hub, name):
        repo = hub.repos.get(name)
        known = self.token in (READER, WRITER)
        if repo is None or (repo.private and not known):
            raise RefusalError(404 if known else 401, "RepoNotFound", "Repository not found")
        return repo

    def commit_of(self, repo, revision):
        commit = repo.resolve(revision)
        if commit is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def must_write(self):
        if self.token != WRITER:
            raise RefusalError(403 if self.token else 401, "", "no right to write")

    def info(self, hub, name, revision="main"):
        repo = self.repo(hub, name)
        commit = self.commit_of(repo, revision)
        files = [{"rfilename": path} for path in sorted(repo.commits[commit])]
        self.answer(
            content={
                "id": name,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "siblings": files,
            }
        )

    def resolve(self, hub, name, revision, path):
        repo = self.repo(hub, name)
        commit = self.commit_of(repo, revision)
        if repo.gated:
            raise RefusalError(403, "GatedRepo", f"Access to model {name} is restricted")
        content = repo.commits[commit].get(path)
        if content is None:
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        if not _is_large(path):
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return self.answer(content=content, ETag=f'"{etag}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(content).hexdigest()
        hub.large[digest] = content
        return self.answer(
            302,
            Location=f"{hub.storage}/{digest}",
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=str(len(content)),
        )

    def stored(self, hub, digest):
        assert "Authorization" not in self.headers, "the token went to another host"
        self.answer(content=hub.large[digest], ETag=f'"{digest}"')

    def create(self, hub):
        self.must_write()
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{hub.endpoint}/{name}"
        if name in hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility") == "private" or wanted.get("private", False)
        hub.repos[name] = Repo(private=private)
        hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(content={"url": url})

    def validate(self, hub):
        """The metadata in front of a page."""
        _, front, text = json.loads(self.body)["content"].split("---\n", 2)
        metadata = yaml.safe_load(front)
        if metadata["license"] not in LICENCES or not text:
            return self.answer(400, {"errors": [{"message": "bad metadata"}], "warnings": []})
        return self.answer(content={"errors": [], "warnings": []})

    def preupload(self, hub, name, revision):
        self.must_write()
        self.commit_of(self.repo(hub, name), revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(content={"files": files})

    def batch(self, hub, name):
        self.must_write()
        self.repo(hub, name)
        objects = [{"oid": item["oid"], "size": item["size"]} for item in self.wanted("objects")]
        for item in objects:
            if item["oid"] not in hub.large:
                item["actions"] = {"upload": {"href": f"{hub.storage}/{item['oid']}"}}
        self.answer(content={"transfer": "basic", "objects": objects})

    def wanted(self, key):
        return json.loads(self.body)[key]

    def store(self, hub, digest):
        if hub.full:
            raise RefusalError(507, "", "no room left")
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise RefusalError(400, "", "the content is not of this digest")
        hub.large[digest] = self.body
        self.answer()

    def commit(self, hub, name, revision):
        self.must_write()
        repo = self.repo(hub, name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, message = {}, ""
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = hub.large[value["oid"]]
        oid = repo.commit(files, to=revision, message=message)
        url = f"{hub.endpoint}/{name}/commit/{oid}"
        self.answer(content={"commitOid": oid, "commitUrl": url})


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    ("HEAD", rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.resolve),
    ("GET", rf"/{_NAME}/resolve/(refs/pr/\d+|[^/]+)/(.+)", _Handler.resolve),
    ("GET", r"/storage/(\w+)", _Handler.stored),
    ("PUT", r"/storage/(\w+)", _Handler.store),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
)


class HubServer:
    """The server in a thread, between ``with`` and its end.

    Attributes:
        repos: by ``org/name``.
        requests: method and path of each, in order.
        down: whether it answers 503 to all.
        full: whether it takes no more large files.
    """

    def __init__(self):
        self.repos, self.large, self.requests = {}, {}, []
        self.down = self.full = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.hub = self
        port = self.server.server_port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}/storage"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Nobody listens any more."""
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()
