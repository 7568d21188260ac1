"""The demo in a real browser and through its API: Chromium is the system's, the app is started here."""

import http.client
import http.server
import json
import re
import shutil
import time
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


@pytest.mark.parametrize("send", ["Enter", "button"])
def test_a_question_sent_while_a_picture_is_on_its_way_says_that_it_waits(page, demo, tmp_path, send):
    held = []
    page.route("**/upload?**", lambda route: held.append(route))
    page.set_input_files("#box input[type=file]", picture_file(tmp_path))
    page.fill("#box textarea", "What is it?")
    assert page.locator("#waiting").is_hidden(), "nothing has been sent"
    asked = len(demo.backend.questions)
    page.press("#box textarea", "Enter") if send == "Enter" else page.click("#box .submit-button")
    page.wait_for_function("document.querySelector('#waiting').innerText.includes('still being uploaded')")
    assert (page.input_value("#box textarea"), len(demo.backend.questions)) == ("What is it?", asked)
    for route in held:
        route.continue_()
    wait_answered(page)
    assert page.locator("#waiting").is_hidden()
    assert [len(question.chats["mpo"][-1].images) for question in demo.backend.questions[asked:]] == [1]


def test_stop_really_stops_the_engine(page, demo):
    ask(page, "count")
    page.wait_for_function("document.querySelector('#chat-b')?.innerText.includes('5 6 7')")
    assert demo.running() == 1
    assert all(button.is_disabled() for button in page.locator("#votes button").all()), "nobody judges half an answer"
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
    assert ("no picture" if reason == "renamed text file" else "1.5 megapixels") in toast(page)
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
