"""The demo in a real browser and through its API: Chromium is the system's, the app is started here."""

import http.client
import http.server
import io
import json
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from internvl_mpo.demo.conversation import Answer, Controls, Conversation, Turn
from internvl_mpo.demo.pictures import Limits
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.mmpr.reading import iter_pairs
from tests.demo_world import ScriptedBackend, make_page, wait_until
from tests.hostile_markup import hostile_answers

gradio = pytest.importorskip("gradio", reason="the demo needs gradio")
pytestmark = pytest.mark.slow

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PATIENCE = 90_000  # milliseconds; a busy machine is no failure
MARKUP = 'say: <img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> [go](javascript:window.hacked=1)'


class Demo:
    """A running app, its backend and the folder its files are in."""

    def __init__(self, folder: Path, backend: ScriptedBackend, url: str, uploads: Path):
        self.folder, self.backend, self.url, self.uploads = folder, backend, url.rstrip("/"), uploads

    def get(self, path: str) -> tuple[int, bytes]:
        """GET a path exactly as it is spelled."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()

    def post(self, path: str, content: object) -> tuple[int, str]:
        """POST JSON."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        connection.request("POST", path, json.dumps(content), {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    def running(self) -> int:
        """Answers that are being written, as the server counts them."""
        return json.loads(self.get("/health")[1])["running"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from internvl_mpo.demo.page import launch

    folder = tmp_path_factory.mktemp("demo")
    backend = ScriptedBackend(pause=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        blocks, url = launch(make_page(folder, backend))
        yield Demo(folder, backend, url, folder / "uploads")
        blocks.close()


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--use-fake-device-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def page(demo, chromium):
    """A visitor's page; anything the page itself throws fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    thrown = []
    opened.on("pageerror", lambda error: thrown.append(str(error)))
    visit(opened, demo.url)
    yield opened
    context.close()
    assert thrown == []
    assert wait_until(lambda: demo.running() == 0), "a closed page must not leave an answer running"


def visit(page, url: str) -> None:
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector("#box textarea")


def ask(page, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def wait_answered(page) -> None:
    page.wait_for_selector(".agreement:is(.same, .different, .unknown)", timeout=PATIENCE)


def toast(page) -> str:
    page.wait_for_selector(".toast-body", timeout=PATIENCE)
    return page.inner_text(".toast-body")


def picture_file(folder: Path, name: str = "red.png", size: tuple[int, int] = (300, 100)) -> str:
    path = folder / name
    Image.new("RGB", size, "red").save(path)
    return str(path)


def test_upload_ask_stream_formulas_vote(page, demo, tmp_path):
    page.set_input_files("#box input[type=file]", picture_file(tmp_path))
    page.click("#cut button")
    page.wait_for_selector("#tiles img")
    assert "16 tokens" in page.inner_text("#tiles")  # 3 x 1 tiles and the thumbnail, 4 tokens each
    ask(page, "What is it?")
    # both panes grow at the same time, before either has ended
    page.wait_for_function(
        "['a', 'b'].every(x => document.querySelector('#chat-' + x + ' .bot')?.innerText.trim().length > 1)"
        " && document.querySelector('.agreement.running')"
    )
    wait_answered(page)
    assert page.locator(".agreement.different").count() == 1
    for letter, number in (("a", "7"), ("b", "12")):
        pane = page.locator(f"#chat-{letter}")
        assert pane.locator(".user").count() == 0, "the question stands once, above both answers"
        assert pane.locator(".katex").count() >= 1
        assert re.search(rf"Final answer:\s*{number}", pane.inner_text())
        assert "tokens/s" in page.inner_text(f"#speed-{letter}")
    assert page.locator("#chat-b .katex-display").count() == 1
    assert page.locator("#asked img").get_attribute("alt") == "Picture 1 of the question"
    assert page.locator("#asked").inner_text().strip() == "What is it?"
    page.click("#vote-right")
    page.wait_for_function("document.querySelector('#vote-status').innerText.includes('stored as a preference')")
    (row,) = iter_pairs(demo.folder / "votes" / "votes.jsonl")
    assert row.pair.chosen.endswith("Final answer: 12")
    assert (row.image_root / row.pair.images[0]).is_file()
    assert page.locator("#vote-right").is_disabled()
    left = [path for path in demo.uploads.rglob("*") if path.is_file() and path.name == "red.png"]
    assert left == [], "the upload is deleted as soon as it has been read"


def test_stop_really_stops_the_engine(page, demo):
    ask(page, "count")
    page.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('5 6 7')")
    assert demo.running() == 1
    page.click("#stop")
    assert wait_until(lambda: demo.running() == 0, 5)
    written = demo.backend.activity.num_tokens
    time.sleep(0.3)
    assert demo.backend.activity.num_tokens == written
    page.wait_for_function("document.querySelector('#speed-a').innerText.includes('stopped')")
    assert page.locator("#stop").is_disabled()
    ask(page, "What is it?")  # and the page goes on
    page.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('Final answer: 12')")


def test_second_question_remembers_the_first_then_retry_and_clear(page):
    ask(page, "What is it?")
    wait_answered(page)
    ask(page, "And now?")
    page.wait_for_function("document.querySelector('#chat-a')?.innerText.includes('Earlier questions: 1.')")
    wait_answered(page)
    page.click("#retry")
    page.wait_for_selector(".agreement.running")
    wait_answered(page)
    page.click("#earlier button")
    page.wait_for_selector("#earlier-chat .user")
    assert page.locator("#earlier-chat .user").count() == 1
    assert page.locator("#asked .asked").inner_text().strip() == "And now?"
    ask(page, "count")
    page.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('5 6 7')")
    page.click("#clear")  # also in the middle of an answer
    page.wait_for_function("!document.querySelector('#asked .asked')")
    page.wait_for_timeout(500)
    assert page.locator("#asked .asked").count() == 0
    assert page.locator("#answers").count() == 0
    assert page.locator("#cards").is_visible()
    assert page.locator("#retry").is_disabled()


@pytest.mark.parametrize("reason", ["empty", "text file", "renamed text file", "too many pixels"])
def test_what_is_wrong_with_a_question_is_a_readable_toast(page, tmp_path, reason):
    if reason == "empty":
        ask(page, "   ")
        assert "type a question" in toast(page)
        return
    if reason == "text file":
        notes = tmp_path / "notes.txt"
        notes.write_text("hello")
        page.set_input_files("#box input[type=file]", str(notes))
        assert "image" in toast(page).lower()
        return
    path = tmp_path / "notes.png"
    path.write_text("hello") if reason == "renamed text file" else Image.new("1", (2500, 2500)).save(path)
    page.set_input_files("#box input[type=file]", str(path))
    page.wait_for_selector("#box .thumbnail-image, #box img, #box .thumbnail-item")
    ask(page, "What is it?")
    assert ("no picture" if reason == "renamed text file" else "4 megapixels") in toast(page)
    assert page.input_value("#box textarea") == "What is it?"  # nothing typed is lost


def test_text_cannot_carry_scripts(page):
    ask(page, MARKUP)
    wait_answered(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chat-a .message img:not(.sent), #chat-a script").count() == 0
    assert page.locator("#chat-a a[href^='javascript']").count() == 0
    assert "<img src=x onerror=" in page.inner_text("#chat-a")  # shown as what it is


def test_text_between_formula_signs_cannot_carry_scripts(page):
    ask(page, 'say: $5 and <img src=x onerror="window.hacked=1"> $6 $$<img src=x onerror="window.hacked=1">$$ `<b>`')
    wait_answered(page)
    page.wait_for_timeout(300)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#chat-a .message img").count() == 0


def test_two_hundred_hostile_answers_stay_in_their_panes(page, demo):
    """Opened through a shared link: questions, thoughts, bodies and final answers of both sides are seen."""
    answers = hostile_answers(200, seed=1)
    turns = []
    for number, (base, mpo) in enumerate(zip(answers[::2], answers[1::2], strict=True)):
        sides = {"base": Answer(base, 3, 0.1, 0.2, "stop"), "mpo": Answer(mpo, 3, 0.1, 0.2, "stop")}
        style = ("cot", "direct", "r1", "plain")[number % 4]
        turns.append(Turn(answers[-number], Controls(style=style), (), sides))
    name = Shelf(demo.folder / "shared", 1, Limits()).store(Conversation(turns))
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url))
    visit(page, f"{demo.url}/?c={name}")
    page.click("#earlier button")
    page.wait_for_function("document.querySelectorAll('#earlier-chat .user').length == 99")
    page.wait_for_timeout(1500)
    assert [url for url in elsewhere if not url.startswith((demo.url, "data:", "blob:"))] == []
    assert page.evaluate("window.hacked") is None
    inside = "#chat-a .message, #chat-b .message, #earlier-chat .message, #asked"
    forbidden = (
        "img:not(.sent), form, iframe, video, object, embed, style, link, base, script, svg image, input, .mermaid"
    )
    found = page.evaluate(
        f"""[...document.querySelectorAll("{inside}")].flatMap(m => [...m.querySelectorAll("{forbidden}")])
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert found == []
    out_of_place = page.evaluate(
        f"""[...document.querySelectorAll("{inside}")].flatMap(m => [...m.querySelectorAll("*")])
        .filter(e => ["fixed", "sticky"].includes(getComputedStyle(e).position)).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert out_of_place == []
    assert page.evaluate("getComputedStyle(document.body).backgroundImage") == "none"


def test_two_visitors_at_once_both_finish(demo, chromium):
    contexts = [chromium.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for one in pages:
        visit(one, demo.url)
    for number, one in enumerate(pages):
        ask(one, f"say: visitor {number}")
    for number, one in enumerate(pages):
        wait_answered(one)
        text = one.inner_text("#chat-b")
        assert f"visitor {number}" in text
        assert f"visitor {1 - number}" not in text
    for context in contexts:
        context.close()


def test_reload_keeps_nothing_private(page, demo):
    ask(page, "say: my secret")
    wait_answered(page)
    page.reload()
    page.wait_for_selector("#box textarea")
    page.wait_for_timeout(500)
    assert "my secret" not in page.content()
    assert page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage)").count("secret") == 0
    assert not (demo.folder / "shared").exists() or "my secret" not in "".join(
        path.read_text() for path in (demo.folder / "shared").rglob("*.json")
    )


def test_a_shared_link_shows_the_conversation_to_another_visitor(page, demo, chromium, tmp_path):
    page.set_input_files("#box input[type=file]", picture_file(tmp_path))
    ask(page, "What is it?")
    wait_answered(page)
    page.click("#share")
    page.wait_for_selector("#link :is(input, textarea)")
    link = page.input_value("#link :is(input, textarea)")
    assert re.fullmatch(rf"{demo.url}/\?c=[\w-]{{22}}", link)
    context = chromium.new_context()
    other = context.new_page()
    visit(other, link)
    other.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('Final answer: 12')")
    assert other.locator("#asked img").count() == 1
    context.close()


def test_blind_sides_are_named_after_the_vote_only(page, demo):
    page.click("#controls button")
    page.check("#blind input")
    ask(page, "What is it?")
    wait_answered(page)
    assert "tiny/mpo" not in page.inner_text("body")
    assert page.inner_text("#head-a h2") == "A"
    page.click("#vote-tie")
    page.wait_for_function("document.querySelector('#head-a').innerText.includes('tiny/')")


def test_keyboard_alone_is_enough(page):
    page.keyboard.type("What is it?")  # the box has the focus when the page opens
    page.keyboard.press("Enter")
    wait_answered(page)

    def reach(selector: str) -> None:
        for _ in range(60):
            if page.evaluate(f"document.activeElement?.closest('{selector}') !== null"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {selector}")

    page.evaluate("document.activeElement.blur()")
    reach("#vote-tie")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#vote-status').innerText.includes('stored')")
    reach("#retry")
    page.keyboard.press("Space")
    page.wait_for_selector(".agreement.running")
    wait_answered(page)
    reach("#controls button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#style input")
    reach("#style")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.querySelector('#style input[value=direct]').checked")


@pytest.mark.parametrize("width", [400, 900, 1600])
def test_the_question_box_is_in_view_before_and_after_an_answer(demo, chromium, width):
    context = chromium.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    visit(page, demo.url)
    page.wait_for_timeout(300)

    def box_is_in_view() -> bool:
        box = page.locator("#box").bounding_box()
        return box["y"] > 0 and box["y"] + box["height"] < 800

    assert page.evaluate("window.scrollY") == 0
    assert box_is_in_view()
    page.click("#cards button:has-text('product')")
    page.wait_for_function("document.querySelector('#box textarea').value.includes('product')")
    page.focus("#box textarea")
    page.keyboard.press("Enter")
    wait_answered(page)
    assert box_is_in_view()
    for part in ("#asked img", "#head-a"):  # after an example one sees what was asked, and who answers
        place = page.locator(part).bounding_box()
        assert 0 <= place["y"] < 800, part
    page.evaluate("window.scrollTo(0, document.body.scrollHeight / 3)")
    assert box_is_in_view()
    context.close()


def test_each_pane_and_button_has_a_name_of_its_own_and_stop_keeps_the_focus(page):
    ask(page, "count")
    page.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('5 6 7')")
    page.focus("#stop")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#speed-a').innerText.includes('stopped')")
    assert page.evaluate("document.activeElement.closest('#box') !== null")
    names = page.evaluate("[...document.querySelectorAll('#panes [role=log]')].map(e => e.ariaLabel)")
    assert names == ["Answer of A", "Answer of B"]
    page.wait_for_selector("#chat-b button[aria-label^='Copy']")
    labels = page.evaluate(
        """[...document.querySelectorAll("button:not([role=tab])")].filter(e => e.offsetParent)
        .map(e => e.ariaLabel || e.innerText.trim() || e.title)"""
    )
    assert "" not in labels
    assert len(set(labels)) == len(labels), sorted(labels)


def test_a_conversation_is_saved_as_a_file(page, tmp_path):
    ask(page, "What is it?")
    wait_answered(page)
    page.click("#save")
    page.wait_for_selector("#file a[download]")
    with page.expect_download() as waiting:
        page.click("#file a[download]")
    waiting.value.save_as(tmp_path / "taken.zip")
    with zipfile.ZipFile(tmp_path / "taken.zip") as file:
        assert "Final answer: 12" in file.read("conversation.md").decode()


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_layout_has_no_sideways_scrolling_and_every_picture_a_text(demo, chromium, width, theme, tmp_path):
    context = chromium.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    visit(page, f"{demo.url}/?__theme={theme}")
    page.set_input_files("#box input[type=file]", picture_file(tmp_path))
    ask(page, "What is it?")
    wait_answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = (page.locator(f"#chat-{letter}").bounding_box() for letter in "ab")
    assert (right["y"] > left["y"]) == (width == 400)  # below each other on a phone, beside each other else
    unnamed = page.evaluate(
        "[...document.querySelectorAll('#panes img, #tiles img')].filter(i => !i.alt).map(i => i.outerHTML)"
    )
    assert unnamed == []
    silent = page.evaluate(
        """[...document.querySelectorAll('button, textarea, input:not([type=file]):not([type=hidden])')]
        .filter(e => e.offsetParent && !(e.innerText || e.ariaLabel || e.title || e.placeholder || e.labels?.length
            || e.closest('label') || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 150))"""
    )
    assert silent == []
    context.close()


def test_an_example_fills_the_box(page):
    page.click("#cards button:has-text('Two pictures')")
    page.wait_for_function("document.querySelector('#box textarea').value.includes('third bar')")
    ask(page, page.input_value("#box textarea"))
    wait_answered(page)
    assert page.locator("#asked img").count() == 2


def test_pasted_pictures_arrive(page):
    page.focus("#box textarea")
    page.evaluate(
        """async () => {
            const canvas = Object.assign(document.createElement('canvas'), {width: 60, height: 40});
            const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
            const data = new DataTransfer();
            data.items.add(new File([blob], 'pasted.png', {type: 'image/png'}));
            document.querySelector('#box textarea').dispatchEvent(
                new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true}));
        }"""
    )
    page.wait_for_selector("#box .thumbnail-image, #box img")
    ask(page, "What is it?")
    wait_answered(page)
    assert page.locator("#asked img").count() == 1


def test_a_photo_of_the_camera_joins_the_question(demo, chromium):
    context = chromium.new_context(permissions=["camera"])
    page = context.new_page()
    visit(page, demo.url)
    page.fill("#box textarea", "What is it?")
    page.click("#camera button")
    page.click("#camera button:has-text('Access Webcam')")
    page.wait_for_function("document.querySelector('#camera video')?.readyState >= 2")  # or the photo would be empty
    page.click("#camera button[aria-label='capture photo']")
    page.wait_for_selector("#box .thumbnail-image, #box img")
    assert page.input_value("#box textarea") == "What is it?"
    context.close()


# --- the API, and what it must not give -------------------------------------------------------------------------------


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
    from tests.test_demo import write_run

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
