"""What no request may ask the demo's server for."""

import asyncio
import json
from urllib.parse import unquote

import pytest

from internvl_mpo.demo.guard import Guard
from internvl_mpo.errors import BadInputError
from tests.demo_world import settings_for
from tests.test_demo import ROOT, png  # noqa: F401 - fixtures among them


def send(guard: Guard, path: str, method: str = "GET", body: bytes = b"", headers=()) -> tuple[int, bytes]:
    """Return the guard's answer to a request; 200 "passed" where it lets it through."""
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def reply(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "method": method, "headers": headers}, receive, reply))
    return sent[0]["status"], sent[1]["body"]


@pytest.fixture
def guard(tmp_path):
    async def behind(scope, receive, reply):
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        await reply({"type": "http.response.start", "status": 200, "headers": []})
        await reply({"type": "http.response.body", "body": b"passed" + body})

    return Guard(behind, tmp_path / "uploads", max_body_bytes=10_000, health=lambda: {"running": 0})


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://169.254.169.254/latest/meta-data",
        "/gradio_api/file=HTTPS://example.org/a.png",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=%2568ttp://localhost/",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=a/..%5c..%5csecret",
        "/gradio_api/proxy=https://x.hf.space/a",
        "/file=http://localhost:1/",
    ],
)
def test_addresses_and_parent_folders_are_not_served(guard, path):
    status, reason = send(guard, path)
    said = "paths with .. are not served" if ".." in unquote(path) else "addresses are not fetched"
    assert (status, json.loads(reason)) == (403, {"detail": said})


@pytest.mark.parametrize(
    "named",
    [
        {"path": "/etc/passwd"},
        {"path": "http://169.254.169.254/latest", "meta": {"_type": "gradio.FileData"}},
        {"path": "//localhost/a.png"},
        {"path": "uploads/../../etc/passwd"},
        {"files": [{"path": "file:///etc/passwd"}]},
    ],
)
def test_a_call_names_uploaded_files_only(guard, named):
    body = json.dumps({"data": ["question", [named]]}).encode()
    status, reason = send(guard, "/gradio_api/queue/join", "POST", body)
    said = "only uploaded files are read; upload the picture first"
    assert (status, json.loads(reason)) == (403, {"detail": said})


def test_at_most_eight_pictures_are_fetched_at_a_time(guard):
    assert guard._fetching._value == 8


def test_honest_calls_pass_unchanged(guard, tmp_path):
    body = json.dumps({"data": [{"text": "what?", "files": [{"path": str(tmp_path / "uploads/ab/a.png")}]}]}).encode()
    assert send(guard, "/gradio_api/queue/join", "POST", body) == (200, b"passed" + body)
    assert send(guard, "/gradio_api/file=/somewhere/a.png") == (200, b"passed")
    assert send(guard, "/health") == (200, b'{"running": 0}')


def test_bodies_that_are_too_large_or_too_deep_are_refused(guard):
    assert send(guard, "/gradio_api/queue/join", "POST", b"x" * 10_000)[0] == 200
    status, reason = send(guard, "/gradio_api/queue/join", "POST", b"x" * 10_001)
    assert (status, json.loads(reason)) == (413, {"detail": "a call may have 0 MB at most"})
    assert send(guard, "/gradio_api/upload", "POST", b"x" * 10_001)[0] == 200  # has a limit of its own
    for begin, end in ((b"[", b"]"), (b'{"a":', b"}")):
        assert send(guard, "/gradio_api/queue/join", "POST", begin * 40 + b"{}" + end * 40)[0] == 200
        assert send(guard, "/gradio_api/queue/join", "POST", begin * 41 + b"{}" + end * 41) == (
            403,
            b'{"detail": "the call is nested too deeply"}',
        )
    assert send(guard, "/call", "POST", b"[" * 9_000) == (200, b"passed" + b"[" * 9_000)  # no JSON


def behind_guard(messages: list[dict], **options) -> tuple[list[dict], dict, list[dict]]:
    """What an app that reads on behind the guard gets: its messages, its scope, and what was sent before it."""
    got, scopes, sent = [], [], []

    async def app(scope, receive, reply):
        scopes.append(scope)
        got.extend([await receive(), await receive()])

    waiting = iter(messages)

    async def receive():
        return next(waiting)

    async def reply(message):
        sent.append(message)

    headers = [(b"content-length", b"1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "path": options.pop("path", "/call/compare"), "method": "POST", "headers": headers}
    asyncio.run(Guard(app, "/uploads", options.pop("max_body_bytes", 1000), **options)(scope, receive, reply))
    return got, scopes[0] if scopes else {}, sent


def test_a_body_in_parts_is_given_whole_and_once():
    parts = [{"type": "http.request", "body": body, "more_body": True} for body in (b'{"a"', b": 1")]
    last = [{"type": "http.request", "body": b"}"}, {"type": "http.disconnect"}]
    got, scope, _ = behind_guard([*parts, {"type": "http.request", "more_body": True}, *last])
    assert got == [{"type": "http.request", "body": b'{"a": 1}', "more_body": False}, {"type": "http.disconnect"}]
    assert scope["headers"][0] == (b"content-length", b"1")
    got, _, sent = behind_guard([parts[0], {"type": "http.disconnect"}])
    assert got == [] and sent[0]["status"] == 413 and b"the client has gone" in sent[1]["body"]
    for size, is_read in ((100, True), (101, False)):
        parts = [{"type": "", "body": b"x" * 50, "more_body": True}, {"type": "", "body": b"x" * (size - 50)}, {}]
        assert bool(behind_guard(parts, max_body_bytes=100)[0]) is is_read


@pytest.mark.parametrize("path", ["/call/compare", "/gradio_api/queue/join", "/run/compare/", "/run/other", "/x"])
def test_addresses_are_fetched_ahead_of_a_question_and_nowhere_else(path):
    call = {"data": ["http://a.example/", ["HTTP://a.example/", {"path": "https://b.example/"}, "x", {"path": 1}], 5]}
    body = json.dumps(call).encode()
    asked = []
    got, scope, _ = behind_guard(
        [{"type": "http.request", "body": body}, {}], path=path, fetch=lambda address: asked.append(address) or "data:,"
    )
    if path in ("/run/other", "/x"):
        assert asked == [] and got[0]["body"] == body and scope["headers"][0] == (b"content-length", b"1")
        return
    assert asked == ["HTTP://a.example/", "https://b.example/"]
    changed = json.dumps({"data": [call["data"][0], ["data:,", "data:,", "x", {"path": 1}], 5]}).encode()
    assert got[0]["body"] == changed
    assert scope["headers"] == [(b"content-type", b"application/json"), (b"content-length", str(len(changed)).encode())]
    assert (scope["path"], scope["method"]) == (path, "POST")


@pytest.mark.parametrize("body", [b"", b"no json", b"5", b"[]", b"{}", b'{"data": null}', b'{"data":   ["x"]}'])
def test_a_body_without_addresses_stays_as_it_is(body):
    got, _, _ = behind_guard([{"type": "http.request", "body": body}, {}], fetch=lambda address: pytest.fail(address))
    assert got[0]["body"] == body


def test_an_address_that_is_refused_is_a_bad_request():
    def refuse(address: str) -> str:
        raise BadInputError(f"{address} is not public")

    body = json.dumps({"data": [["http://a.example/"]]}).encode()
    got, _, sent = behind_guard([{"type": "http.request", "body": body}], fetch=refuse)
    assert got == [] and sent[0]["status"] == 400
    assert json.loads(sent[1]["body"]) == {"detail": "http://a.example/ is not public"}
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    assert headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize(
    ("path", "may"),
    [
        *(("/uploads/a.png", True), ("/uploads", True), ("/uploads/../etc", False), ("/etc", False), ("\0", False)),
        *(("http://a/", False), (" HTTPS://a/", False), ("ftp://a/", False), ("file:/a", False), ("//a", False)),
        *(("\\\\a", False), ("x" * 5000, False)),
    ],
)
def test_a_file_of_a_call_lies_among_the_uploads(path, may):
    assert Guard(None, "/uploads", 1)._may_read(path) is may
    fetching = Guard(None, "/uploads", 1, fetch=str)._may_read
    assert fetching(path) is (may or path.startswith("http"))
    assert fetching("HTTP://a/") and not fetching(" http://a/") and not fetching("ftp://a/")


def test_what_is_no_request_passes_and_health_is_asked_only_where_there_is_one(tmp_path):
    seen = []

    async def app(scope, receive, reply):
        seen.append((scope["type"], receive, reply))

    asyncio.run(Guard(app, tmp_path, 1)({"type": "lifespan"}, 1, 2))
    asyncio.run(Guard(app, tmp_path, 1)({"type": "http", "path": "/health", "method": "GET"}, 3, 4))
    assert seen[0] == ("lifespan", 1, 2) and seen[1][:2] == ("http", 3)


@pytest.mark.parametrize("path", ["/file=/a..b/c", "/file/a.png", "/proxy", "/x=http://a/", "/file=a/./b", "/file="])
def test_honest_paths_are_served(guard, path):
    assert send(guard, path)[0] == 200


@pytest.mark.parametrize(
    "path", ["/file/http://a", "/file=%255c%255ca", "/file=ftp:a", "/file/a/..", "/file=..", "/x/proxy="]
)
def test_an_address_hidden_in_a_path_is_refused(guard, path):
    assert send(guard, path)[0] == 403


def test_only_the_page_and_its_parts_import_gradio():
    for path in (ROOT / "internvl_mpo" / "demo").glob("*.py"):
        imported = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith(("import gradio", "from gradio"))
        ]
        assert bool(imported) == (path.name in ("page.py", "runs_tab.py", "widgets.py")), path.name


def test_settings_for_tests_are_settings(tmp_path):
    assert settings_for(tmp_path).limits.max_pixels == 1_000_000


@pytest.mark.parametrize("path", ["/", "/health", "/file=http://localhost:1/"])
def test_no_answer_may_fetch_pictures_frames_or_forms_of_elsewhere(guard, path):
    headers = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def reply(message):
        headers.extend(message.get("headers", ()))

    asyncio.run(guard({"type": "http", "path": path, "method": "GET"}, receive, reply))
    policy = dict(headers)[b"content-security-policy"].decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["img-src"] == rules["media-src"] == "'self' data: blob:"
    assert (rules["frame-src"], rules["object-src"]) == ("'none'", "'none'")
    assert {rules["form-action"], rules["connect-src"], rules["base-uri"]} == {"'self'"}
