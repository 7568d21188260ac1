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
import hashlib
import json
import random
import re
import threading
from pathlib import Path
from typing import Any, Self

from hub_server import HubHandler, HubServer
from hub_state import Commit, Fault, File, HubError, Repository

WRITER, READER = "hf_loopbackwriter", "hf_loopbackreader"
LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".jpg", ".bin", ".arrow", ".zip")
LFS_BYTES = 1_000_000  # larger files are large files whatever they are called
KINDS = ("models", "datasets", "spaces")


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
        self._server = HubServer(("127.0.0.1", port), HubHandler)
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
