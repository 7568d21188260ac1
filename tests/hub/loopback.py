"""A Hub on the loopback interface, for tests: what huggingface_hub, transformers and datasets ask the real one for.

Repositories live in memory: branches and pull requests with whole-tree commits, large files by their sha256, ranges,
tokens with rights, a quota. With Xet on, uploads go through hf_xet into a folder (`local://`), chunked as on the real
Hub. Every request is logged, and faults can be put in its way:

    with LoopbackHub() as hub:
        hub.fail("PUT", "/lfs/", status=500, times=2)       # two errors, then it works
        hub.fail("PUT", "/lfs/", cut_after=1000)            # the connection ends after 1,000 bytes of the body
        hub.fail("POST", "/commit/", lose_reply=True)       # done, but the client never hears of it

As a program it serves until it is ended, and writes its address into a file:

    python tests/hub/loopback.py --address_file FILE
"""

import argparse
import base64
import contextlib
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_loopbackwriter", "hf_loopbackreader"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".bin", ".arrow", ".zip")
LFS_BYTES = 1_000_000  # larger files are large files whatever they are called
KINDS = ("models", "datasets", "spaces")


class HubError(Exception):
    """An answer other than 200; `code` is what clients tell errors apart by."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    size: int
    git_oid: str
    sha256: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """What a client names its cached copy by."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A whole tree, and where it came from."""

    oid: str
    title: str
    files: dict[str, File]
    parent: str | None


@dataclass
class Repository:
    """Branches and pull requests of one repository."""

    kind: str
    name: str
    is_private: bool
    sdk: str | None = None
    refs: dict[str, list[Commit]] = field(default_factory=dict)

    def head(self, revision: str) -> Commit:
        """The commit of a branch, a pull request or an id."""
        if revision in self.refs:
            return self.refs[revision][-1]
        for commits in self.refs.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def paths(self, revision: str = "main") -> set[str]:
        """Names of the files, without the one every repository is born with."""
        return set(self.head(revision).files) - {".gitattributes"}


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a kind."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "injected"
    cut_after: int | None = None
    lose_reply: bool = False


class LoopbackHub:
    """The server; a context manager.

    Args:
        port: 0 picks a free one.
        xet_folder: uploads go there through hf_xet; None answers as a Hub without Xet.

    Attributes:
        repositories: (kind, "owner/name") -> Repository; kinds are models, datasets, spaces.
        rights: token -> (user, whether it may write, organisations).
        quota_bytes: of large files in all; None for no limit.
        requests: (method, path, status, bytes received) in order.
        faults: still to come; see `fail`.
    """

    def __init__(self, port: int = 0, xet_folder: Path | None = None):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.rights = {WRITER: ("ada", True, ["digits"]), READER: ("bob", False, [])}
        self.quota_bytes: int | None = None
        self.requests: list[tuple[str, str, int, int]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.faults: list[Fault] = []
        self.cut_share = 0.0
        self.xet_folder = xet_folder
        self.lock = threading.RLock()
        self._random = random.Random(0)
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fail(self, method: str, pattern: str, *, times: int = 1, **what: Any) -> None:
        """Put a fault in the way of the next `times` requests whose path matches `pattern`; see `Fault`."""
        self.faults.append(Fault(method, pattern, times, **what))

    def cut_at_random(self, share: float, seed: int) -> None:
        """Cut this share of all requests, at a random place of their body or before the reply."""
        self.cut_share, self._random = share, random.Random(seed)

    def repository(self, kind: str, name: str) -> Repository:
        """Return a repository.

        Raises:
            HubError: there is none.
        """
        if (kind, name) not in self.repositories:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repositories[kind, name]

    def text(self, kind: str, name: str, path: str, revision: str = "main") -> str:
        """Content of a text file."""
        return self.blobs[self.repository(kind, name).head(revision).files[path].sha256].decode()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request runs into."""
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    if not fault.times:
                        self.faults.remove(fault)
                    return fault
            if self.cut_share and self._random.random() < self.cut_share:
                if self._random.random() < 0.5:
                    return Fault(method, path, 1, lose_reply=True)
                return Fault(method, path, 1, cut_after=self._random.randrange(200_000))
        return None

    # --- what the routes below do -------------------------------------------------------------------------------------

    def user(self, token: str | None) -> tuple[str, bool, list[str]] | None:
        """User, write permission and organisations of a token; None for a visitor without one."""
        if token is None:
            return None
        if token not in self.rights:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.rights[token]

    def visible(self, kind: str, name: str, token: str | None) -> Repository:
        """A repository this visitor may read; others are told it does not exist, as on the real Hub."""
        user = self.user(token)
        repository = self.repository(kind, name)
        if repository.is_private and (user is None or not self._owns(user, name)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def check_write(self, name: str, token: str | None, *, what: str = "write to this repository") -> None:
        """Refuse a visitor who may not write."""
        user = self.user(token)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user[1]:
            raise HubError(403, "you must use a write token to " + what)
        if not self._owns(user, name):
            raise HubError(403, f'You don\'t have the rights to {what} under the namespace "{name.split("/")[0]}"')

    @staticmethod
    def _owns(user: tuple[str, bool, list[str]], name: str) -> bool:
        return name.split("/")[0] in (user[0], *user[2])

    def create(self, body: dict[str, Any], token: str | None) -> dict[str, str]:
        """Make a repository with its first commit."""
        user = self.user(token)
        owner = body.get("organization") or (user[0] if user else "")
        kind, name = f"{body.get('type', 'model')}s", f"{owner}/{body['name']}"
        self.check_write(name, token, what=f"create a {kind[:-1]}")
        prefix = "" if kind == "models" else f"{kind}/"
        address = f"{self.url}/{prefix}{name}"
        if (kind, name) in self.repositories:
            raise HubError(409, "You already created this repo", headers={"url": address})
        repository = Repository(kind, name, body.get("visibility") == "private", body.get("sdk"))
        self.repositories[kind, name] = repository
        attributes = self._keep(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", is_lfs=False)
        repository.refs["main"] = [self._commit("initial commit", {".gitattributes": attributes}, None)]
        return {"url": address, "name": name}

    def preupload(self, repository: Repository, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        """Say which files are large, and what is there under their names."""
        files = repository.head(revision).files
        answers = []
        for entry in body["files"]:
            known = files.get(entry["path"])
            is_lfs = entry["path"].endswith(LFS_SUFFIXES) or entry["size"] > LFS_BYTES
            answers.append(
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if is_lfs else "regular",
                    "shouldIgnore": False,
                    "oid": known and known.etag,
                }
            )
        return {"files": answers}

    def lfs_batch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Say where to put large files that are not here yet."""
        missing = [entry for entry in body["objects"] if entry["oid"] not in self.blobs]
        if self.quota_bytes is not None:
            wanted = sum(entry["size"] for entry in missing)
            if sum(map(len, self.blobs.values())) + wanted > self.quota_bytes:
                raise HubError(403, "Storage limit reached, please upgrade your plan to increase your storage limit")
        objects: list[dict[str, Any]] = [{"oid": entry["oid"], "size": entry["size"]} for entry in body["objects"]]
        for entry in objects:
            if entry["oid"] not in self.blobs:
                entry["actions"] = {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def commit(
        self, repository: Repository, revision: str, lines: list[dict[str, Any]], create_pr: bool
    ) -> dict[str, Any]:
        """Apply all operations, or none."""
        header, *operations = lines
        parent = repository.head(revision)
        wanted = header["value"].get("parentCommit")
        if wanted and wanted != parent.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = self._keep(base64.b64decode(value["content"]), is_lfs=False)
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self._large(value)
            elif value["path"] not in files:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                del files[value["path"]]
        ref = revision
        answer: dict[str, Any] = {"success": True}
        prefix = "" if repository.kind == "models" else f"{repository.kind}/"
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repository.refs)
            ref = f"refs/pr/{number}"
            repository.refs[ref] = list(repository.refs[revision])
            answer["pullRequestUrl"] = f"{self.url}/{prefix}{repository.name}/discussions/{number}"
        repository.refs[ref].append(self._commit(header["value"]["summary"], files, parent.oid))
        oid = repository.refs[ref][-1].oid
        return {
            **answer,
            "commitOid": oid,
            "commitUrl": f"{self.url}/{prefix}{repository.name}/commit/{oid}",
            "hookOutput": "",
        }

    def _large(self, value: dict[str, Any]) -> File:
        content = self.blobs.get(value["oid"])
        if content is None and self.xet_folder is None:  # with Xet, the bytes lie in chunks in its own folder
            raise HubError(400, f"LFS pointer of {value['path']} points to a file that does not exist")
        return File(value["size"], hashlib.sha1(value["oid"].encode()).hexdigest(), value["oid"], is_lfs=True)

    def _keep(self, content: bytes, *, is_lfs: bool) -> File:
        sha256 = hashlib.sha256(content).hexdigest()
        self.blobs[sha256] = content
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return File(len(content), git_oid, sha256, is_lfs)

    @staticmethod
    def _commit(title: str, files: dict[str, File], parent: str | None) -> Commit:
        text = json.dumps([title, parent, sorted((path, file.sha256) for path, file in files.items())])
        return Commit(hashlib.sha1(text.encode()).hexdigest(), title, files, parent)

    def info(self, repository: Repository, revision: str) -> dict[str, Any]:
        """Describe a repository at a revision, as `GET /api/models/owner/name` does."""
        commit = repository.head(revision)
        return {
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.split("/")[0],
            "sha": commit.oid,
            "private": repository.is_private,
            "disabled": False,
            "gated": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2026-11-24T00:00:00.000Z",
            "createdAt": "2026-11-24T00:00:00.000Z",
            "sdk": repository.sdk,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }

    @staticmethod
    def entry(path: str, file: File) -> dict[str, Any]:
        """Describe a file, as in listings."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
        return entry

    def tree(self, repository: Repository, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """List a folder; folders come once, with an id of their own."""
        files = repository.head(revision).files
        prefix = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(files.items()):
            if not path.startswith(prefix):
                continue
            rest = path[len(prefix) :].split("/")
            for depth in range(1, len(rest) if recursive else min(len(rest), 2)):
                name = prefix + "/".join(rest[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                entries.setdefault(name, {"type": "directory", "path": name, "oid": oid, "size": 0})
            if recursive or len(rest) == 1:
                entries[path] = self.entry(path, file)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist", "EntryNotFound")
        return list(entries.values())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, on purpose too, are no news."""


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        hub = self.server.hub
        address = urlsplit(self.path)
        path, query = address.path, {name: values[0] for name, values in parse_qs(address.query).items()}
        fault = hub.next_fault(self.command, path)
        hub.headers_seen.append(dict(self.headers))
        body, status = b"", 0
        try:
            body = self._body(fault.cut_after if fault else None)
            if fault and fault.cut_after is not None:
                raise _Cut
            if fault and fault.status:
                raise HubError(fault.status, fault.message, headers=fault.headers)
            with hub.lock:
                answer = self._route(path, query, body)
            if fault and fault.lose_reply:
                raise _Cut
            status = self._send(*answer)
        except HubError as error:
            status = error.status
            content = json.dumps({"error": error.message}).encode()
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json", **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.code == "" and "url" in error.headers:
                content = json.dumps({"error": error.message, "url": error.headers.pop("url")}).encode()
                headers.pop("url")
            self._send(error.status, headers, content)
        except (_Cut, ConnectionError):
            self.close_connection = True
            with contextlib.suppress(OSError):  # a reset, as a broken network gives it
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
        finally:
            hub.requests.append((self.command, path, status, len(body)))

    def _body(self, limit: int | None) -> bytes:
        """Read the request's body, or only so much of it."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts, size = [], -1
            while size != 0:
                size = int(self.rfile.readline().split(b";")[0], 16)
                parts.append(self.rfile.read(size))
                self.rfile.readline()
                if limit is not None and sum(map(len, parts)) >= limit:
                    break
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(length, limit))

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> int:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return status

    def _route(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        hub = self.server.hub
        authorization = self.headers.get("Authorization") or ""
        token = authorization.removeprefix("Bearer ").strip() or None

        def reply(content: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
            return 200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode()

        if path == "/api/whoami-v2":
            user = hub.user(token)
            if user is None:
                raise HubError(401, "Invalid username or password.")
            organisations = [{"name": name, "type": "org"} for name in user[2]]
            role = {"role": "write" if user[1] else "read", "displayName": "token"}
            auth = {"type": "access_token", "accessToken": role}
            return reply({"type": "user", "name": user[0], "orgs": organisations, "auth": auth})
        if path == "/api/repos/create":
            return reply(hub.create(json.loads(body), token))
        if path == "/api/validate-yaml":
            return reply({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise HubError(400, "content does not have this hash")
            hub.blobs[match[1]] = body
            return reply({})
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            hub.visible(match[1] or "models", match[2], token)
            hub.check_write(match[2], token)
            return reply(hub.lfs_batch(match[2], json.loads(body)))
        if match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path):
            kind, name, revision, file = match[1] or "models", match[2], unquote(match[3]), unquote(match[4])
            return self._file(hub.visible(kind, name, token), revision, file)
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.+))?", path):
            repository = hub.visible(match[1], match[2], token)
            return reply(*self._repository_route(repository, match[3] or "", query, body, token))
        raise HubError(404, f"nothing at {path}", "EntryNotFound")

    def _repository_route(
        self, repository: Repository, rest: str, query: dict[str, str], body: bytes, token: str | None
    ) -> tuple[Any, ...]:
        hub = self.server.hub
        verb, _, argument = rest.partition("/")
        revision, _, inside = argument.partition("/")
        revision, inside = unquote(revision) or "main", unquote(inside)
        if verb in ("", "revision"):
            return (hub.info(repository, unquote(argument) or "main"),)
        if verb == "tree":
            return (hub.tree(repository, revision, inside, query.get("recursive", "").lower() == "true"),)
        if verb == "paths-info":
            form = parse_qs(body.decode())
            paths = form["paths"] if "paths" in form else json.loads(body)["paths"]
            files = repository.head(unquote(argument)).files
            entries = [hub.entry(path, files[path]) for path in paths if path in files]
            for path in paths:
                if path not in files and any(name.startswith(f"{path}/") for name in files):
                    entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
            return (entries,)
        if verb == "refs":
            listed = [
                {"name": name, "ref": name if "/" in name else f"refs/heads/{name}", "targetCommit": commits[-1].oid}
                for name, commits in repository.refs.items()
            ]
            requests = [entry for entry in listed if entry["name"].startswith("refs/pr/")]
            branches = [entry for entry in listed if entry not in requests]
            return ({"branches": branches, "tags": [], "converts": [], "pullRequests": requests},)
        if verb == "commits":
            date = "2026-11-24T00:00:00.000Z"
            return (
                [
                    {"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": date}
                    for commit in reversed(repository.refs[revision])
                ],
            )
        if verb == "branch":
            hub.check_write(repository.name, token)
            if unquote(argument) in repository.refs:
                raise HubError(409, "Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            commit = repository.head(start)
            repository.refs[unquote(argument)] = [commit]
            return ({},)
        if verb == "preupload":
            if "create_pr" not in query:
                hub.check_write(repository.name, token)
            return (hub.preupload(repository, unquote(argument), json.loads(body)),)
        if verb == "commit":
            create_pr = "create_pr" in query
            if not create_pr:
                hub.check_write(repository.name, token)
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            return (hub.commit(repository, unquote(argument), lines, create_pr),)
        if verb == "xet-write-token" and hub.xet_folder is not None:
            hub.check_write(repository.name, token)
            headers = {
                "X-Xet-Cas-Url": f"local://{hub.xet_folder}",
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            }
            info = {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": "xet", "exp": int(time.time()) + 3600}
            return info, headers
        raise HubError(404, f"nothing at {rest}", "EntryNotFound")

    def _file(self, repository: Repository, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """A file, or the range of it that was asked for."""
        hub = self.server.hub
        commit = repository.head(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, f"{path} does not exist", "EntryNotFound", headers)
        content = hub.blobs.get(file.sha256)
        if content is None:
            raise HubError(404, f"the bytes of {path} lie in Xet", "EntryNotFound", headers)
        headers |= {"ETag": f'"{file.etag}"', "Content-Type": "application/octet-stream"}
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not match:
            return 200, {**headers, "Content-Length": str(len(content))}, content
        if match[1]:
            start, stop = int(match[1]), int(match[2] or len(content) - 1) + 1
        else:
            start, stop = max(0, len(content) - int(match[2])), len(content)
        stop = min(stop, len(content))
        if start >= len(content):
            raise HubError(416, "range", headers={"Content-Range": f"bytes */{len(content)}"})
        part = content[start:stop]
        headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "Content-Length": str(len(part))}
        return 206, headers, part


def environment(url: str, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """Variables that send a process to this Hub, with a cache of its own."""
    variables = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    return variables | ({"HF_TOKEN": token} if token else {})


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--address_file", type=Path, required=True)
    arguments = parser.parse_args()
    with LoopbackHub(arguments.port) as hub:
        arguments.address_file.write_text(hub.url, encoding="utf-8")
        threading.Event().wait()


if __name__ == "__main__":
    main()
