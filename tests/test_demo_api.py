"""The demo's API in a running app, and what it must not give."""

import http.client
import http.server
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.demo_world import ScriptedBackend, make_page, wait_until
from tests.test_demo_browser import chromium, demo, page, picture_file, visit  # noqa: F401 - fixtures among them

gradio = pytest.importorskip("gradio", reason="the demo needs gradio")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(demo):
    from gradio_client import Client

    return Client(demo.url, verbose=False)


def test_compare_answers_programs(client, tmp_path):
    from gradio_client import handle_file

    result = client.predict("What is it?", [handle_file(picture_file(tmp_path))], "cot", api_name="/compare")
    assert (result["base"]["final_answer"], result["mpo"]["final_answer"]) == ("7", "12")
    assert result["agreement"] == "different"
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert list(described) == ["/compare"], "buttons are no endpoints"
    assert [p["parameter_name"] for p in described["/compare"]["parameters"]] == [
        "question",
        "images",
        "style",
        "temperature",
        "max_new_tokens",
        "max_tiles",
        "seed",
    ]


def test_compare_streams_and_cancelling_stops_the_engine(client, demo):
    job = client.submit("count", api_name="/compare")
    assert wait_until(lambda: len(job.outputs()) > 3)
    job.cancel()
    assert wait_until(lambda: demo.running() == 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["", None], "type a question"), (["what?", None, "loud"], "style"), (["what?", ["nonsense"]], "no picture")],
)
def test_compare_says_what_is_wrong(client, arguments, words):
    with pytest.raises(Exception, match=words):
        client.predict(*arguments, api_name="/compare")


def test_ten_visitors_queue_in_order_and_none_is_dropped(client, demo):
    before, first = demo.backend.activity.started, len(demo.backend.questions)
    jobs = []
    for number in range(10):
        jobs.append(client.submit(f"say: visitor {number}", api_name="/compare"))
        assert wait_until(lambda: jobs[-1].communicator.event_id), "in the queue before the next one asks"
    texts = [job.result(timeout=60)["mpo"]["text"] for job in jobs]
    assert texts == [f"visitor {number}" for number in range(10)]
    served = [question.chats["mpo"][-1].text.rsplit(" ", 1)[-1] for question in demo.backend.questions[first:]]
    assert served == [str(number) for number in range(10)], "first come, first served"
    assert demo.backend.activity.started - before == 10


def test_no_path_of_the_server_can_be_read(demo):
    (demo.folder / "secret.txt").write_text("the secret")
    here = str(demo.folder)
    for path in (
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=../../../../etc/passwd",
        "/gradio_api/file=%2e%2e%2f%2e%2e%2fetc/passwd",
        f"/gradio_api/file={here}/secret.txt",
        f"/gradio_api/file={here}/uploads/../secret.txt",
        f"/gradio_api/file={here}/votes/votes.jsonl",
        "/gradio_api/file=app.py",
        f"/gradio_api/file={Path(__file__)}",
        "/gradio_api/file=file:///etc/passwd",
        "/static/../../../../../etc/passwd",
        "/assets/..%2f..%2f..%2fetc/passwd",
        "/theme.css/../../etc/passwd",
    ):
        status, body = demo.get(path)
        assert status >= 400, path
        assert b"root:" not in body
        assert b"the secret" not in body


def test_no_address_is_fetched(demo, client):
    """Neither through the file route, nor in the data of a call, whoever asks."""
    hits = []

    class Inside(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inside)
    import threading

    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/picture.png"
    try:
        assert demo.get(f"/gradio_api/file={address}")[0] == 403
        assert demo.get(f"/gradio_api/proxy={address}")[0] == 403
        for named in (address, "http://169.254.169.254/latest/meta-data", "/etc/passwd", "file:///etc/passwd"):
            value = {"path": named, "meta": {"_type": "gradio.FileData"}}
            for call in ("/gradio_api/call/compare", "/gradio_api/call/v2/compare", "/gradio_api/run/compare"):
                status, _ = demo.post(call, {"data": ["what?", [value], "cot", 0, 8, None, 0]})
                assert status == 403, (call, named)
            joined = {"data": [{"text": "what?", "files": [value]}], "fn_index": 0, "session_hash": "x"}
            assert demo.post("/gradio_api/queue/join", joined)[0] == 403
        with pytest.raises(Exception, match="fetches no addresses"):
            client.predict("what?", [address], api_name="/compare")
        assert hits == []
    finally:
        server.shutdown()
        server.server_close()


def test_uploads_have_a_limit_that_is_kept_while_reading(demo):
    boundary = "x"
    buffer = io.BytesIO()
    buffer.write(f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode())
    buffer.write(b"0" * (1 << 20))
    buffer.write(f"\r\n--{boundary}--\r\n".encode())
    request = urllib.request.Request(
        f"{demo.url}/gradio_api/upload",
        buffer.getvalue(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code == 413
    assert not list(demo.uploads.rglob("a.png"))


def test_benchmark_tab_pages_through_the_differences(tmp_path, chromium, monkeypatch):
    from internvl_mpo.demo.page import launch
    from tests.test_demo_votes import write_run

    write_run(tmp_path / "runs" / "start", {"1": (1.0, "7"), "2": (0.0, "6"), "3": (0.0, "5")})
    write_run(tmp_path / "runs" / "mpo", {"1": (1.0, "7"), "2": (1.0, "7"), "3": (0.0, "4")})
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    blocks, url = launch(make_page(tmp_path, ScriptedBackend()))
    context = chromium.new_context()
    try:
        page = context.new_page()
        visit(page, url)
        page.click("button[role=tab] >> text=Benchmarks")
        page.wait_for_function(
            "document.querySelector('#bench-where')?.innerText.includes('Question 1 of 2, 3 in all')"
        )
        assert "Question 2 <b>?" in page.inner_text("#bench-question")
        assert "So it is 6" in page.inner_text("#bench-answer-a")
        assert "So it is 7" in page.inner_text("#bench-answer-b")
        page.click("#bench-next")
        page.wait_for_function("document.querySelector('#bench-question').innerText.includes('Question 3')")
    finally:
        context.close()
        blocks.close()


def test_calls_of_the_api_do_not_pile_up(tmp_path, monkeypatch):
    """Gradio made a session of 100 KB for each call and kept ten thousand of them: a gigabyte."""
    from internvl_mpo.demo import page as demo_page

    monkeypatch.setattr(demo_page, "MOST_SESSIONS", 3)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    blocks, url = demo_page.launch(make_page(tmp_path, ScriptedBackend()))
    try:
        for number in range(6):
            body = json.dumps({"data": [f"How many {number}?", [], "plain", 0, 4, None, 0]}).encode()
            call = urllib.request.Request(f"{url}gradio_api/call/compare", body, {"Content-Type": "application/json"})
            event = json.loads(urllib.request.urlopen(call, timeout=60).read())["event_id"]
            said = urllib.request.urlopen(f"{url}gradio_api/call/compare/{event}", timeout=60).read()
            assert b"event: complete" in said
        assert not blocks.app.state_holder.session_data
        assert blocks.app.state_holder.capacity == 3  # pages that are remembered
    finally:
        blocks.close()
