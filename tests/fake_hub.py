"""A stand-in for the Hub on this machine: what huggingface_hub asks to create, push to and read repositories."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER, TOKEN = "someone", "hf_stand_in"
# As the Hub does for binary files
LFS_SUFFIXES = (".safetensors", ".png")


class FakeHub:
    """
    Serves repositories kept in memory; a context manager.

    Attributes:
        endpoint (`str`): For `HF_ENDPOINT`.
        commits (`dict`): By kind ("models", "spaces") and id of a repository, the files of each commit by its sha.
        branches (`dict`): Likewise, the sha of each branch.
        requests (`list[str]`): Method and path of each request.
    """

    def __init__(self):
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        key = kind, repo_id
        return self.commits[key][self.branches[key].get(revision, revision)]

    def commit(self, key: tuple[str, str], files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.commits.setdefault(key, {})
        contents = sorted((path, hashlib.sha256(content).hexdigest()) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([*key, len(commits), contents]).encode()).hexdigest()
        commits[sha] = files
        self.branches.setdefault(key, {})[branch] = sha
        return sha

    def environment(self, home) -> dict[str, str]:
        """What a process needs to take this for the Hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "0",
            # It knows the older protocol of large files alone
            "HF_HUB_DISABLE_XET": "1",
        }


def blob_id(path: str, content: bytes) -> str:
    """The ETag of a file: git's id, or the SHA-256 of a large one."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return getattr(self, name)(**match.groupdict())
        self.error(404, "RepoNotFound", f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def reply(self, body: bytes | dict | list, status: int = 200, **headers: str):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def error(self, status: int, code: str, message: str):
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.error(401, "Unauthorized", "Invalid username or password.")
        return False

    def found(self, kind: str, repo: str, revision: str):
        """Commit of a revision, or `None` after an error was sent."""
        key = kind, repo
        if key not in self.hub.commits:
            return self.error(404, "RepoNotFound", f"no repository {repo}")
        sha = self.hub.branches[key].get(revision, revision)
        if sha not in self.hub.commits[key]:
            return self.error(404, "RevisionNotFound", f"no revision {revision}")
        return sha, self.hub.commits[key][sha]

    def whoami(self):
        if self.may_write():
            self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self):
        self.reply({"errors": [], "warnings": []})

    def create(self):
        if not self.may_write():
            return
        asked = json.loads(self.body)
        kind = asked.get("type", "model") + "s"
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo}"
        if (kind, repo) in self.hub.commits:
            return self.reply({"error": "You already created this repo", "url": url}, 409)
        self.hub.commit((kind, repo), {".gitattributes": b"*.safetensors filter=lfs"})
        self.reply({"url": url, "name": repo})

    def branch(self, kind: str, repo: str, name: str):
        if self.may_write():
            branches = self.hub.branches[kind, repo]
            if name in branches:
                return self.error(409, "BranchExists", f"there is a branch {name}")
            branches[name] = branches["main"]
            self.reply({})

    def info(self, kind: str, repo: str, revision: str | None = None):
        if commit := self.found(kind, repo, revision or "main"):
            siblings = [{"rfilename": path} for path in sorted(commit[1])]
            self.reply({"id": repo, "modelId": repo, "sha": commit[0], "siblings": siblings, "tags": []})

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None):
        if commit := self.found(kind, repo, revision):
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(path, content)}
                for path, content in sorted(commit[1].items())
                if path.startswith((folder or "").lstrip("/"))
            ]
            if not entries:
                return self.error(404, "EntryNotFound", f"no folder {folder}")
            self.reply(entries)

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None):
        if commit := self.found(kind or "models", repo, revision):
            sha, files = commit
            if path not in files:
                return self.error(404, "EntryNotFound", f"no file {path}")
            self.reply(files[path], ETag=f'"{blob_id(path, files[path])}"', X_Repo_Commit=sha)

    def preupload(self, kind: str, repo: str, revision: str):
        if self.may_write() and (commit := self.found(kind, repo, revision)):
            files = []
            for file in json.loads(self.body)["files"]:
                path, content = file["path"], commit[1].get(file["path"])
                mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
                oid = None if content is None else blob_id(path, content)
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.reply({"files": files})

    def lfs_batch(self, repo: str, kind: str | None = None):
        if not self.may_write():
            return
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/objects/{entry['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.error(400, "BadRequest", "the content is not that of the id")
        self.hub.objects[oid] = self.body
        self.reply(b"")

    def post_commit(self, kind: str, repo: str, revision: str):
        if not (self.may_write() and (commit := self.found(kind, repo, revision))):
            return
        files = dict(commit[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit((kind, repo), files, revision)
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self.reply({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|spaces)/{_REPO}"
_PREFIX = r"/(?:(?P<kind>spaces)/)?"
_ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("POST", "/api/repos/create", "create"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
    ("POST", rf"{_API}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "post_commit"),
    ("POST", rf"{_PREFIX}{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", "put_object"),
    ("GET HEAD", rf"{_PREFIX}{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]
