"""What no request may ask the demo's server for."""

import asyncio
import json

import pytest

from internvl_mpo.demo.guard import Guard
from tests.demo_world import settings_for
from tests.test_demo import ROOT, png  # noqa: F401 - fixtures among them


def send(guard: Guard, path: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
    """Return the guard's answer to a request; 200 "passed" where it lets it through."""
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def reply(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "method": method}, receive, reply))
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
    assert send(guard, path)[0] == 403


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
    assert send(guard, "/gradio_api/queue/join", "POST", body)[0] == 403


def test_honest_calls_pass_unchanged(guard, tmp_path):
    body = json.dumps({"data": [{"text": "what?", "files": [{"path": str(tmp_path / "uploads/ab/a.png")}]}]}).encode()
    assert send(guard, "/gradio_api/queue/join", "POST", body) == (200, b"passed" + body)
    assert send(guard, "/gradio_api/file=/somewhere/a.png") == (200, b"passed")
    assert send(guard, "/health") == (200, b'{"running": 0}')


def test_bodies_that_are_too_large_or_too_deep_are_refused(guard):
    assert send(guard, "/gradio_api/queue/join", "POST", b"x" * 10_001)[0] == 413
    assert send(guard, "/gradio_api/queue/join", "POST", b"[" * 60 + b"{}" + b"]" * 60)[0] == 403


def test_only_the_page_and_its_parts_import_gradio():
    for path in (ROOT / "internvl_mpo" / "demo").glob("*.py"):
        imported = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith(("import gradio", "from gradio"))
        ]
        assert bool(imported) == (path.name in ("page.py", "widgets.py")), path.name


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
    assert rules["img-src"] == "'self' data: blob:"
    assert (rules["frame-src"], rules["object-src"]) == ("'none'", "'none'")
    assert {rules["form-action"], rules["connect-src"], rules["base-uri"]} == {"'self'"}
