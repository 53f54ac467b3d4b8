"""A Hugging Face hub on loopback: the routes that uploads use, accounts, rights, and what it has been sent."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import urlsplit

import yaml

# Bytes of a part; the real hub's are larger.
CHUNK = 8192
LFS_SUFFIXES = (".safetensors", ".flac", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._route("GET")

    def do_HEAD(self):
        self._route("HEAD")

    def do_POST(self):
        self._route("POST")

    def do_PUT(self):
        self._route("PUT")

    def _route(self, method):
        self.body = self._read()
        path = urlsplit(self.path).path
        self.server.requests.append((method, path))
        if self.server.status is not None:
            return self._answer(self.server.status, {"error": "out of order"})
        for verb, pattern, handle in ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                return handle(self, **found.groupdict())
        return self._answer(404, {"error": f"no route {method} {path}"})

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status, value=None, content=None, **headers):
        content = json.dumps(value).encode() if content is None else content
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            # A client that was killed reads no answer.
            with contextlib.suppress(OSError):
                self.wfile.write(content)

    @property
    def user(self):
        return self.server.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _may_write(self, repo):
        if self.user == repo.split("/")[0]:
            return True
        message = f"You don't have the rights to write to {repo}"
        self._answer(403, {"error": message}, X_Error_Message=message)
        return False

    def whoami(self):
        if self.user is None:
            return self._answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        return self._answer(200, {"name": self.user, "type": "user"})

    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or self.user}/{asked['name']}"
        if not self._may_write(repo):
            return None
        if repo in self.server.repos:
            return self._answer(409, {"error": "You already created this model repo"})
        self.server.add(repo, asked.get("visibility") == "private")
        return self._answer(200, {"url": f"{self.server.url}/{repo}", "name": repo})

    def info(self, repo):
        held = self.server.repos.get(repo)
        if held is None or (held["private"] and self.user != repo.split("/")[0]):
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in held["files"]]
        return self._answer(200, {"id": repo, "private": held["private"], "sha": held["sha"], "siblings": siblings})

    def resolve(self, repo, revision, name):
        held = self.server.repos[repo]
        content = held["files"][name]
        headers = {"ETag": f'"{git_oid(content)}"', "X_Repo_Commit": held["sha"]}
        return self._answer(200, content=content, **headers)

    def validate(self):
        card = json.loads(self.body)["content"]
        data = yaml.safe_load(card.split("---\n")[1])
        errors = [{"message": f"{key} is missing"} for key in ("license", "tags") if not data.get(key)]
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", data.get("base_model", "a/b")):
            errors.append({"message": '"base_model" must be a model id'})
        return self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo):
        if not self._may_write(repo):
            return None
        held = self.server.repos[repo]["files"]
        files = []
        for file in json.loads(self.body)["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES)
            told = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in held:
                content = held[file["path"]]
                told["oid"] = hashlib.sha256(content).hexdigest() if lfs else git_oid(content)
            files.append(told)
        return self._answer(200, {"files": files})

    def batch(self, repo):
        if not self._may_write(repo):
            return None
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            told = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                here = f"{self.server.url}/storage/{oid}"
                parts = {str(number + 1): f"{here}/{number}" for number in range(-(-size // CHUNK))}
                several = {"href": f"{here}/complete", "header": {"chunk_size": str(CHUNK), **parts}}
                told["actions"] = {"upload": several if size > CHUNK else {"href": f"{here}/whole"}}
            objects.append(told)
        return self._answer(200, {"transfer": "multipart", "objects": objects})

    def put(self, oid, part):
        self.server.hold(oid, part)
        if part == "whole":
            self.server.objects[oid] = self.body
        else:
            self.server.parts[oid, int(part)] = self.body
        return self._answer(200, {}, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, oid):
        parts = json.loads(self.body)["parts"]
        self.server.objects[oid] = b"".join(self.server.parts[oid, part["partNumber"] - 1] for part in parts)
        return self._answer(200, {})

    def commit(self, repo):
        if not self._may_write(repo):
            return None
        held = self.server.repos[repo]
        header, *operations = map(json.loads, self.body.splitlines())
        if header["value"].get("parentCommit", held["sha"]) != held["sha"]:
            return self._answer(412, {"error": "A commit has happened since"})
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                held["files"][value["path"]] = base64.b64decode(value["content"])
            else:
                held["files"][value["path"]] = self.server.objects[value["oid"]]
        held["sha"] = hashlib.sha1(self.body).hexdigest()
        address = f"{self.server.url}/{repo}/commit/{held['sha']}"
        return self._answer(200, {"commitUrl": address, "commitOid": held["sha"]})

    def log_message(self, *args):
        pass


ROUTES = [
    ("GET", "/api/whoami-v2", Hub.whoami),
    ("POST", "/api/repos/create", Hub.create),
    ("GET", f"/api/models/{REPO}(?:/revision/main)?", Hub.info),
    ("POST", "/api/validate-yaml", Hub.validate),
    ("POST", f"/api/models/{REPO}/preupload/main", Hub.preupload),
    ("POST", f"/{REPO}.git/info/lfs/objects/batch", Hub.batch),
    ("PUT", r"/storage/(?P<oid>\w+)/(?P<part>\w+)", Hub.put),
    ("POST", r"/storage/(?P<oid>\w+)/complete", Hub.complete),
    ("POST", f"/api/models/{REPO}/commit/main", Hub.commit),
    ("HEAD", rf"/{REPO}/resolve/(?P<revision>\w+)/(?P<name>[\w.]+)", Hub.resolve),
    ("GET", rf"/{REPO}/resolve/(?P<revision>\w+)/(?P<name>[\w.]+)", Hub.resolve),
]


class HubServer(http.server.ThreadingHTTPServer):
    """.url, .requests as (method, path), .repos by id: private, sha and files; .objects by the digest of their bytes.

    .users    names by token
    .status   of every answer, when the hub is out of order
    .hold     called with an object's digest and part before it is taken
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests, self.repos, self.objects, self.parts = [], {}, {}, {}
        self.users, self.status, self.hold = {"hf_alice": "alice", "hf_bob": "bob"}, None, lambda oid, part: None

    def add(self, repo, private, **files):
        self.repos[repo] = {"private": private, "files": dict(files), "sha": hashlib.sha1(repo.encode()).hexdigest()}

    def sent(self):
        """Digests of the objects whose bytes were sent, in order, one for each part."""
        return [path.split("/")[2] for method, path in self.requests if method == "PUT"]


@contextlib.contextmanager
def hub_server():
    with HubServer() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
