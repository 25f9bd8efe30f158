"""A hub on localhost for huggingface_hub's own client, uploads and downloads, that fails when it is told to.

In a test: the fixture `hub`, or `with HubServer(folder) as hub:`. In a process of its own:
`python tests/hub_server.py PORT FOLDER`. What was pushed stays in FOLDER: `repos.json` and `blobs/` by SHA-256.

It knows models and data sets with commits, branches and tags, git-lfs "basic" uploads, downloads with ranges, private
repositories, and three tokens. It has no pull requests, no spaces and no xet.
"""

import base64
import binascii
import hashlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "maker"
WRITE, READ, STRANGER = "hf_write", "hf_read", "hf_stranger"  # tokens: the user's, and one of somebody without access
ROLES = {WRITE: (USER, "write"), READ: (USER, "read"), STRANGER: ("stranger", "write")}
LFS = (".safetensors", ".bin", ".ckpt", ".pt", ".parquet", ".png", ".onnx")
CHUNK = 1 << 16
REPO, REV = "/api/(models|datasets)/([^/]+/[^/]+)", "([^/]+)"
FILES = "(?:/(datasets))?/([^/]+/[^/]+)"


@dataclass
class Request:
    """One request that was answered. `body` is empty where a file was put; `status` 0: no answer was sent."""

    method: str
    path: str
    status: int
    body: bytes = b""
    token: str | None = None


@dataclass
class Fault:
    """What goes wrong with requests whose path matches, for the next `times` of them."""

    kind: str
    pattern: str
    times: float
    method: str | None
    value: Any
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Answer:
    status: int = 200
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0  # of the part of a file that is sent
    size: int | None = None


class Refusal(Exception):
    """An answer that is an error, with the code and the message that the client looks at."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.answer = as_json({"error": message}, status)
        self.answer.headers |= {"X-Error-Code": code} if code else {}
        self.answer.headers["X-Error-Message"] = message


class HubServer:
    """A hub that serves `root` at `.url` in threads of its own, until `close()`.

    Args:
        root: folder of what was pushed; a later server on it has the same.
        port: 0 takes a free one.
        orgs: namespaces besides the user's own that the user's tokens may create in and see private models of.
    """

    def __init__(self, root: Path, port: int = 0, orgs: tuple[str, ...] = ("fab", "org", "other")) -> None:
        self.root, self.orgs = Path(root), orgs
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        index = self.root / "repos.json"
        self.repos: dict[str, dict[str, Any]] = json.loads(index.read_text()) if index.is_file() else {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.put: set[str] = set()  # SHA-256 of files that came to this server
        self.lock, self.closing = threading.RLock(), threading.Event()
        self.connections: set[socket.socket] = set()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def __enter__(self) -> "HubServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Be gone: hanging requests are let go of, open connections are cut, new ones are refused."""
        if self.closing.is_set():
            return
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                _cut(connection)
        self.thread.join()

    # ---- what tests read ----

    def paths(self, method: str | None = None) -> list[str]:
        """Paths asked for so far, without queries."""
        return [each.path.split("?")[0] for each in self.requests if method in (None, each.method)]

    def uploaded(self) -> dict[str, bytes]:
        """All that this server was sent, by name: bodies of requests, files that were put, files in commits."""
        found = {f"{n} {each.method} {each.path}": each.body for n, each in enumerate(self.requests) if each.body}
        found |= {f"lfs {digest}": self.blob(digest).read_bytes() for digest in sorted(self.put)}
        for key, repo in self.repos.items():
            for commit in repo["commits"]:
                found |= {f"{key}@{commit['id'][:7]} {path}": self._bytes(f) for path, f in commit["files"].items()}
        return found

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The files of a repository by path."""
        found = self.repos[f"{kind}/{repo}"]
        return {path: self._bytes(file) for path, file in self._commit(found, revision)["files"].items()}

    def commits(self, repo: str, kind: str = "models") -> list[str]:
        """Ids of the commits on main, the newest first."""
        found = self.repos[f"{kind}/{repo}"]
        return [commit["id"] for commit in self._history(found, found["refs"]["main"])]

    def set_private(self, repo: str, private: bool = True, kind: str = "models") -> None:
        with self.lock:
            self.repos[f"{kind}/{repo}"]["private"] = private
            self.save()

    def edit(self, repo: str, files: dict[str, bytes], kind: str = "models") -> str:
        """Commit files to main as somebody does on the hub's own pages; creates what is missing. Returns the id."""
        with self.lock:
            found = self.repos.setdefault(f"{kind}/{repo}", {"private": False, "refs": {}, "tags": [], "commits": []})
            before = self._commit(found, "main")["files"] if found["refs"] else {}
            added = {path: self._stored(content, _is_lfs(path, len(content))) for path, content in files.items()}
            return self._add_commit(found, "main", before | added, "Update by hand")

    # ---- what goes wrong ----

    def fail(
        self, pattern: str, status: int = 503, times: float = 1, method: str | None = None, **headers: str
    ) -> None:
        """Answer the next requests whose path matches the regular expression with an error.

        `headers` such as `X_Error_Code="RepoNotFound"` or `Retry_After="1"` go with it.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault("status", pattern, times, method, status, named))

    def truncate(self, pattern: str, after: int, times: float = 1, method: str | None = None) -> None:
        """Promise the whole body, send `after` bytes of it, and cut the connection."""
        self.faults.append(Fault("truncate", pattern, times, method, after))

    def hang(
        self, pattern: str = "", seconds: float = 60, times: float = float("inf"), method: str | None = None
    ) -> None:
        """Take a request and send nothing for so long, or until `close` or `heal`; then cut the connection."""
        self.faults.append(Fault("hang", pattern, times, method, seconds))

    def slow(
        self, pattern: str = "", seconds: float = 1, times: float = float("inf"), method: str | None = None
    ) -> None:
        """Answer, but so much later."""
        self.faults.append(Fault("slow", pattern, times, method, seconds))

    def lose(self, pattern: str, times: float = 1, method: str | None = None) -> None:
        """Do what is asked, and cut the connection without a word."""
        self.faults.append(Fault("lose", pattern, times, method, None))

    def heal(self) -> None:
        """No more faults."""
        self.faults.clear()

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in (None, method) and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def wait(self, fault: Fault) -> None:
        """As long as a fault says, unless it is taken away before."""
        end = time.monotonic() + fault.value
        while time.monotonic() < end and fault in self.faults and not self.closing.wait(0.02):
            pass

    # ---- the store ----

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest

    def save(self) -> None:
        index = self.root / "repos.json"
        index.with_suffix(".tmp").write_text(json.dumps(self.repos))
        index.with_suffix(".tmp").replace(index)

    def _bytes(self, file: dict[str, Any]) -> bytes:
        return self.blob(file["sha256"]).read_bytes()

    def _stored(self, content: bytes, lfs: bool) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        self.blob(digest).write_bytes(content)
        return _entry(digest, content, lfs)

    def _commit(self, repo: dict[str, Any], revision: str) -> dict[str, Any]:
        """The commit of a branch, a tag, or an id of at least seven digits."""
        ident = repo["refs"].get(revision, revision)
        for commit in repo["commits"]:
            if commit["id"] == ident or (len(ident) >= 7 and commit["id"].startswith(ident)):
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def _history(self, repo: dict[str, Any], ident: str | None) -> list[dict[str, Any]]:
        found = []
        while ident:
            found.append(self._commit(repo, ident))
            ident = found[-1]["parent"]
        return found

    def _add_commit(self, repo: dict[str, Any], branch: str, files: dict[str, Any], title: str) -> str:
        parent, when = repo["refs"].get(branch), time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        text = json.dumps([files, title, parent, len(repo["commits"]), when])
        ident = hashlib.sha1(text.encode()).hexdigest()
        repo["commits"].append({"id": ident, "parent": parent, "title": title, "date": when, "files": files})
        repo["refs"][branch] = ident
        self.save()
        return ident

    # ---- who may do what ----

    def _member(self, token: str | None, repo: str) -> bool:
        user = ROLES[token][0] if token else None
        space = repo.split("/")[0]
        return user == space or (user == USER and space in self.orgs)

    def find(self, kind: str, name: str, token: str | None, write: bool = False) -> dict[str, Any]:
        """A repository, if the token may read it, or write to it."""
        repo = self.repos.get(f"{kind}/{name}")
        if repo is None or (repo["private"] and not self._member(token, name)):
            if token is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(404, "RepoNotFound", "Repository not found")
        if write:
            self._check_write(token, name)
        return repo

    def _check_write(self, token: str | None, name: str) -> None:
        if token is None:
            raise Refusal(401, "", "Invalid username or password.")
        if ROLES[token][1] != "write" or not self._member(token, name):
            raise Refusal(403, "", f"You don't have the rights to write to the namespace {name.split('/')[0]!r}")

    # ---- answers, a method a route ----

    def whoami(self, call: "Call") -> Answer:
        if call.token is None:
            raise Refusal(401, "", "Invalid username or password.")
        user, role = ROLES[call.token]
        orgs = [{"type": "org", "name": org, "roleInOrg": role} for org in self.orgs] if user == USER else []
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return as_json({"type": "user", "id": user, "name": user, "orgs": orgs, "auth": auth})

    def create(self, call: "Call") -> Answer:
        asked = call.json()
        kind = f"{asked.get('type') or 'model'}s"
        space = asked.get("organization") or (ROLES[call.token][0] if call.token else USER)
        name = f"{space}/{asked['name']}"
        self._check_write(call.token, name)
        if not re.fullmatch(r"[\w.-]{1,96}", asked["name"]) or re.search(r"--|\.\.|^[-.]|[-.]$", asked["name"]):
            raise Refusal(400, "", f"Invalid repo name: {asked['name']}")
        url = f"{self.url}/{'' if kind == 'models' else kind + '/'}{name}"
        if f"{kind}/{name}" in self.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.repos[f"{kind}/{name}"] = {"private": private, "refs": {}, "tags": [], "commits": []}
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self._add_commit(repo, "main", {".gitattributes": self._stored(attributes, False)}, "initial commit")
        return as_json({"url": url, "name": name, "id": name})

    def delete(self, call: "Call") -> Answer:
        asked = call.json()
        kind, name = f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or USER}/{asked['name']}"
        self.find(kind, name, call.token, write=True)
        del self.repos[f"{kind}/{name}"]
        self.save()
        return Answer()

    def settings(self, call: "Call", kind: str, name: str) -> Answer:
        repo, asked = self.find(kind, name, call.token, write=True), call.json()
        if "visibility" in asked or "private" in asked:
            repo["private"] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.save()
        return as_json({"private": repo["private"]})

    def auth_check(self, call: "Call", kind: str, name: str) -> Answer:
        self.find(kind, name, call.token)
        return Answer()

    def validate_yaml(self, call: "Call") -> Answer:
        import yaml

        errors = []
        try:
            header = _front_matter(call.json()["content"])
            if not isinstance(header, dict):
                errors = [{"message": "The YAML header is no mapping"}]
        except yaml.YAMLError as error:
            errors = [{"message": str(error)}]
        return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, call: "Call", kind: str, name: str, revision: str) -> Answer:
        files = self._commit(self.find(kind, name, call.token, write=True), revision)["files"]
        told = []
        for file in call.json()["files"]:
            mode = "lfs" if _is_lfs(file["path"], file["size"]) else "regular"
            known = files.get(file["path"])
            oid = known and known["sha256" if known["lfs"] else "oid"]  # by which the client sees what has changed
            told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return as_json({"files": told})

    def lfs_batch(self, call: "Call", kind: str, name: str) -> Answer:
        self.find(kind or "models", name, call.token, write=True)
        objects = []
        for each in call.json()["objects"]:
            here = self.blob(each["oid"]).is_file()
            action = {} if here else {"actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}
            objects.append({"oid": each["oid"], "size": each["size"], **action})
        answer = as_json({"transfer": "basic", "objects": objects})
        answer.headers["Content-Type"] = "application/vnd.git-lfs+json"
        return answer

    def lfs_put(self, call: "Call", digest: str) -> Answer:
        """The address was handed out to one who may write; as with a signed one, no token comes with it."""
        if hashlib.sha256(call.body).hexdigest() != digest:
            raise Refusal(400, "", "The content has another SHA-256")
        part = self.blob(f"{digest}.{threading.get_ident()}")
        part.write_bytes(call.body)
        part.replace(self.blob(digest))
        self.put.add(digest)
        return Answer()

    def commit(self, call: "Call", kind: str, name: str, branch: str) -> Answer:
        repo = self.find(kind, name, call.token, write=True)
        if branch not in repo["refs"] or branch in repo["tags"]:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        files, title = dict(self._commit(repo, branch)["files"]), ""
        for line in filter(None, call.body.splitlines()):
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", repo["refs"][branch]) != repo["refs"][branch]:
                    raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
            else:
                self._operate(files, key, value)
        ident = self._add_commit(repo, branch, files, title)
        return as_json({"success": True, "commitOid": ident, "commitUrl": f"{self.url}/{name}/commit/{ident}"})

    def _operate(self, files: dict[str, Any], key: str, value: dict[str, Any]) -> None:
        """One line of a commit."""
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refusal(400, "", f"Invalid path {path}")
        if key == "file":
            files[path] = self._stored(base64.b64decode(value["content"], validate=True), False)
        elif key == "lfsFile":
            if not self.blob(value["oid"]).is_file():
                raise Refusal(400, "", f"LFS object {value['oid']} was not uploaded")
            files[path] = _entry(value["oid"], self.blob(value["oid"]).read_bytes(), True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(400, "", f"There is no file {path} to delete")
        elif key == "deletedFolder":
            for each in [each for each in files if each.startswith(path.rstrip("/") + "/")]:
                del files[each]
        else:
            raise Refusal(400, "", f"Unknown operation {key}")

    def info(self, call: "Call", kind: str, name: str, revision: str = "main") -> Answer:
        repo = self.find(kind, name, call.token)
        return as_json(self._told(name, repo, revision, {"full", "cardData"} | call.flags("blobs")))

    def listing(self, call: "Call", kind: str) -> Answer:
        query, found = call.query, []
        for key, repo in sorted(self.repos.items()):
            name = key.partition("/")[2]
            if not key.startswith(f"{kind}/") or (repo["private"] and not self._member(call.token, name)):
                continue
            if query.get("author", [name.split("/")[0]])[0] != name.split("/")[0]:
                continue
            if query.get("search", [""])[0].lower() not in name.lower():
                continue
            told = self._told(name, repo, "main", call.flags("full", "cardData", "config"), query.get("expand"))
            tags = self._told(name, repo, "main", set())["tags"]
            if set(query.get("filter", [])) <= set(tags):
                found.append(told)
        return as_json(found[: int(query.get("limit", [1000])[0])])

    def _told(
        self, name: str, repo: dict[str, Any], revision: str, flags: set[str], expand: list[str] | None = None
    ) -> dict[str, Any]:
        """What is said of a repository; the front matter of its card included, as far as it is one."""
        commit = self._commit(repo, revision)
        files, card = commit["files"], {}
        if "README.md" in files:
            try:
                card = _front_matter(self._bytes(files["README.md"]).decode())
            except Exception:  # a card that is none is not the hub's concern
                card = {}
        card = card if isinstance(card, dict) else {}
        ident = {"_id": hashlib.md5(name.encode()).hexdigest()[:24], "id": name, "modelId": name}
        tags = [*card.get("tags", []), *filter(None, [card.get("library_name"), card.get("pipeline_tag")])]
        tags += [f"license:{card['license']}"] if "license" in card else []
        tags += [f"dataset:{each}" for each in card.get("datasets", [])]
        every = {
            "author": name.split("/")[0],
            "sha": commit["id"],
            "lastModified": commit["date"],
            "createdAt": repo["commits"][0]["date"],
            "private": repo["private"],
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": tags,
            "siblings": [_sibling(path, file, "blobs" in flags) for path, file in sorted(files.items())],
            "cardData": card,
            **{key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card},
        }
        if expand:
            return ident | {key: every[key] for key in expand if key in every}
        left_out = set() if "full" in flags else {"author", "sha", "lastModified", "gated", "disabled", "siblings"}
        left_out |= set() if "cardData" in flags else {"cardData", "model-index"}
        return ident | {key: value for key, value in every.items() if key not in left_out}

    def tree(self, call: "Call", kind: str, name: str, revision: str, folder: str = "") -> Answer:
        files = self._commit(self.find(kind, name, call.token), revision)["files"]
        start = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: file for path, file in sorted(files.items()) if path.startswith(start)}
        if start and not inside:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        depth, whole = start.count("/"), bool(call.flags("recursive"))
        folders = {path.rsplit("/", up)[0] for path in inside for up in range(1, path.count("/") - depth + 1)}
        told = [
            {"type": "directory", "path": each, "oid": hashlib.sha1(each.encode()).hexdigest(), "size": 0}
            for each in sorted(folders)
            if whole or each.count("/") == depth
        ]
        told += [_listed(path, file) for path, file in inside.items() if whole or path.count("/") == depth]
        return as_json(told)

    def paths_info(self, call: "Call", kind: str, name: str, revision: str) -> Answer:
        files = self._commit(self.find(kind, name, call.token), revision)["files"]
        asked = call.json()["paths"] if call.body.startswith(b"{") else parse_qs(call.body.decode()).get("paths", [])
        told = []
        for path in asked:
            if path in files:
                told.append(_listed(path, files[path]))
            elif any(each.startswith(path.strip("/") + "/") for each in files):
                oid = hashlib.sha1(path.encode()).hexdigest()
                told.append({"type": "directory", "path": path, "oid": oid, "size": 0})
        return as_json(told)

    def refs(self, call: "Call", kind: str, name: str) -> Answer:
        repo, told = self.find(kind, name, call.token), {"branches": [], "tags": [], "converts": []}
        for ref, ident in repo["refs"].items():
            group, folder = ("tags", "tags") if ref in repo["tags"] else ("branches", "heads")
            told[group].append({"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": ident})
        return as_json(told)

    def history(self, call: "Call", kind: str, name: str, revision: str) -> Answer:
        repo = self.find(kind, name, call.token)
        told = self._history(repo, self._commit(repo, revision)["id"])
        keys = ("id", "title", "date")
        return as_json([{key: each[key] for key in keys} | {"message": "", "authors": []} for each in told])

    def add_tag(self, call: "Call", kind: str, name: str, revision: str) -> Answer:
        repo = self.find(kind, name, call.token, write=True)
        self._add_ref(repo, call.json()["tag"], revision)
        repo["tags"].append(call.json()["tag"])
        self.save()
        return Answer()

    def add_branch(self, call: "Call", kind: str, name: str, branch: str) -> Answer:
        repo = self.find(kind, name, call.token, write=True)
        self._add_ref(repo, branch, call.json().get("startingPoint") or "main")
        self.save()
        return Answer()

    def _add_ref(self, repo: dict[str, Any], ref: str, revision: str) -> None:
        ident = self._commit(repo, revision)["id"]
        if ref in repo["refs"]:
            raise Refusal(409, "", f"Reference {ref} already exists")
        repo["refs"][ref] = ident

    def drop_ref(self, call: "Call", kind: str, name: str, ref: str) -> Answer:
        repo = self.find(kind, name, call.token, write=True)
        if repo["refs"].pop(ref, None) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        repo["tags"] = [each for each in repo["tags"] if each != ref]
        self.save()
        return Answer()

    def resolve(self, call: "Call", kind: str | None, name: str, revision: str, path: str) -> Answer:
        commit = self._commit(self.find(kind or "models", name, call.token), revision)
        file = commit["files"].get(path)
        if file is None:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.answer.headers["X-Repo-Commit"] = commit["id"]
            raise refusal
        etag, size = f'"{file["sha256"] if file["lfs"] else file["oid"]}"', file["size"]
        headers = {"X-Repo-Commit": commit["id"], "ETag": etag, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream" if file["lfs"] else "text/plain; charset=utf-8"
        if file["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(size)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
        if not asked or not any(asked.groups()):
            return Answer(200, self.blob(file["sha256"]), headers, 0, size)
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first > last:
            return Answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return Answer(206, self.blob(file["sha256"]), headers, first, last - first + 1)


ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", HubServer.whoami),
    ("POST", "/api/validate-yaml", HubServer.validate_yaml),
    ("POST", "/api/repos/create", HubServer.create),
    ("DELETE", "/api/repos/delete", HubServer.delete),
    ("GET", "/api/(models|datasets)", HubServer.listing),
    ("GET", REPO, HubServer.info),
    ("GET", f"{REPO}/revision/{REV}", HubServer.info),
    ("PUT", f"{REPO}/settings", HubServer.settings),
    ("GET", f"{REPO}/auth-check", HubServer.auth_check),
    ("GET", f"{REPO}/tree/{REV}", HubServer.tree),
    ("GET", f"{REPO}/tree/{REV}/(.+)", HubServer.tree),
    ("POST", f"{REPO}/paths-info/{REV}", HubServer.paths_info),
    ("POST", f"{REPO}/preupload/{REV}", HubServer.preupload),
    ("POST", f"{REPO}/commit/{REV}", HubServer.commit),
    ("GET", f"{REPO}/commits/{REV}", HubServer.history),
    ("GET", f"{REPO}/refs", HubServer.refs),
    ("POST", f"{REPO}/tag/{REV}", HubServer.add_tag),
    ("DELETE", f"{REPO}/tag/{REV}", HubServer.drop_ref),
    ("POST", f"{REPO}/branch/{REV}", HubServer.add_branch),
    ("DELETE", f"{REPO}/branch/{REV}", HubServer.drop_ref),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", HubServer.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", HubServer.lfs_put),
    ("GET", f"{FILES}/resolve/{REV}/(.+)", HubServer.resolve),
]


@dataclass
class Call:
    """A request as the answers see it."""

    query: dict[str, list[str]]
    headers: Any
    token: str | None
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def flags(self, *names: str) -> set[str]:
        """Those of these switches of the query that are on."""
        return {name for name in names if self.query.get(name, [""])[0].lower() in ("1", "true")}


def as_json(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json; charset=utf-8"})


def _entry(digest: str, content: bytes, lfs: bool) -> dict[str, Any]:
    """A file as git knows it: of a large one the pointer."""
    size = len(content)
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    kept = pointer if lfs else content
    oid = hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
    return {"sha256": digest, "size": size, "oid": oid, "lfs": lfs, "pointer": len(pointer)}


def _is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS) or size > 10 * 2**20


def _listed(path: str, file: dict[str, Any]) -> dict[str, Any]:
    lfs = {"oid": file["sha256"], "size": file["size"], "pointerSize": file["pointer"]}
    told = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
    return told | ({"lfs": lfs} if file["lfs"] else {})


def _sibling(path: str, file: dict[str, Any], blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    lfs = {"sha256": file["sha256"], "size": file["size"], "pointerSize": file["pointer"]}
    told = {"rfilename": path, "size": file["size"], "blobId": file["oid"]}
    return told | ({"lfs": lfs} if file["lfs"] else {})


def _front_matter(text: str) -> Any:
    import yaml  # comes with huggingface_hub

    found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return yaml.safe_load(found[1]) if found else {}


def environment(hub: HubServer, home: Path, token: str = WRITE) -> dict[str, str]:
    """Variables by which a process of its own uses this hub and no other, with its cache under `home`."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
    }


def use(hub: HubServer, home: Path, monkeypatch: Any) -> None:
    """Have this process's client, which read its variables when it was imported, use this hub, and processes it starts.

    The token is read at each call, from `HF_TOKEN`: `monkeypatch.setenv` and `delenv` change it.
    """
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    for name, value in environment(hub, home).items():
        monkeypatch.setenv(name, value)
    values = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    close_session()


class _Server(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # of a client that has gone nothing is said
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        with self.server.hub.lock:
            self.server.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.hub.lock:
            self.server.hub.connections.discard(self.connection)
        super().finish()

    def answer(self) -> None:
        hub, method = self.server.hub, self.command
        path = urlsplit(self.path).path
        body = self._body()
        fault = hub.take_fault(method, path)
        kind = fault.kind if fault else ""
        if kind in ("hang", "slow"):
            hub.wait(fault)
        if hub.closing.is_set() or kind == "hang":
            return self._cut(body)
        if kind == "status":
            found = Answer(fault.value, b'{"error": "told to fail"}', fault.headers)
        else:
            found = self._found(path, body)
        if kind == "lose":
            return self._cut(body)
        self._log(found.status, body)
        self._send(found, fault.value if kind == "truncate" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _found(self, path: str, body: bytes) -> Answer:
        hub, method = self.server.hub, "GET" if self.command == "HEAD" else self.command
        try:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
            if given and given not in ROLES and not path.startswith("/lfs/"):
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            call = Call(parse_qs(urlsplit(self.path).query), self.headers, given, body)
            for verb, pattern, found in ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    with hub.lock:
                        return found(hub, call, *(unquote(each) if each else each for each in match.groups()))
        except Refusal as refusal:
            return refusal.answer
        except (ValueError, KeyError, TypeError, binascii.Error) as error:
            return Refusal(400, "", f"Bad request ({type(error).__name__})").answer
        return Refusal(404, "", "Sorry, we can't find the page you are looking for.").answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionError("the client went away")
        return body

    def _send(self, answer: Answer, limit: int | None) -> None:
        size = len(answer.body) if isinstance(answer.body, bytes) else answer.size
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        left = 0 if self.command == "HEAD" else size if limit is None else min(limit, size)
        if isinstance(answer.body, bytes):
            self.wfile.write(answer.body[:left])
        else:
            with open(answer.body, "rb") as file:
                file.seek(answer.start)
                while left and (chunk := file.read(min(left, CHUNK))):
                    self.wfile.write(chunk)
                    left -= len(chunk)
        if limit is not None and limit < size and self.command != "HEAD":
            self.close_connection = True
            _cut(self.connection)

    def _cut(self, body: bytes) -> None:
        self._log(0, body)
        self.close_connection = True
        _cut(self.connection)

    def _log(self, status: int, body: bytes) -> None:
        kept = b"" if self.command == "PUT" and self.path.startswith("/lfs/") else body
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip() or None
        with self.server.hub.lock:
            self.server.hub.requests.append(Request(self.command, self.path, status, kept, token))

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


if __name__ == "__main__":
    with HubServer(Path(sys.argv[2]), int(sys.argv[1])) as hub:
        print(hub.url, flush=True)
        hub.closing.wait()
