"""The HTTP side of a Hub on the loopback interface: routes, ranges, and connections that break on purpose."""

import contextlib
import hashlib
import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import HubError, Repository

if TYPE_CHECKING:
    from loopback import LoopbackHub


class HubServer(ThreadingHTTPServer):
    daemon_threads = True
    hub: "LoopbackHub"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away, on purpose too, are no news."""


class _Cut(Exception):
    """The connection ends here."""


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

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
            status, headers, content = answer
        except HubError as error:
            status = error.status
            content = json.dumps({"error": error.message}).encode()
            headers = {"X-Error-Message": error.message, "Content-Type": "application/json", **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            if error.code == "" and "url" in error.headers:
                content = json.dumps({"error": error.message, "url": error.headers.pop("url")}).encode()
                headers.pop("url")
        except (_Cut, ConnectionError):
            self._reset()
        hub.requests.append((self.command, path, status, len(body)))  # before the client can go on
        if status:
            try:
                self._send(status, headers, content, None if fault is None else fault.reply_bytes)
            except ConnectionError:
                self.close_connection = True

    def _reset(self) -> None:
        """End the connection as a broken network does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

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

    def _send(self, status: int, headers: dict[str, str], content: bytes, limit: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:limit])
        if limit is not None:
            self._reset()

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
        verb, _, argument = rest.partition("/")
        answer = self._read(repository, verb, argument, query, body)
        if answer is None:
            answer = self._write(repository, verb, unquote(argument), query, body, token)
        if answer is None:
            raise HubError(404, f"nothing at {rest}", "EntryNotFound")
        return answer

    def _read(
        self, repository: Repository, verb: str, argument: str, query: dict[str, str], body: bytes
    ) -> tuple[Any, ...] | None:
        hub = self.server.hub
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
        return None

    def _write(
        self, repository: Repository, verb: str, argument: str, query: dict[str, str], body: bytes, token: str | None
    ) -> tuple[Any, ...] | None:
        hub = self.server.hub
        if verb == "branch":
            hub.check_write(repository.name, token)
            if argument in repository.refs:
                raise HubError(409, "Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint") or "main"
            commit = repository.head(start)
            repository.refs[argument] = [commit]
            return ({},)
        if verb == "preupload":
            if "create_pr" not in query:
                hub.check_write(repository.name, token)
            return (hub.preupload(repository, argument, json.loads(body)),)
        if verb == "commit":
            create_pr = "create_pr" in query
            if not create_pr:
                hub.check_write(repository.name, token)
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            return (hub.commit(repository, argument, lines, create_pr),)
        if verb == "xet-write-token" and hub.xet_folder is not None:
            hub.check_write(repository.name, token)
            headers = {
                "X-Xet-Cas-Url": f"local://{hub.xet_folder}",
                "X-Xet-Access-Token": "xet",
                "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
            }
            info = {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": "xet", "exp": int(time.time()) + 3600}
            return info, headers
        return None

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
