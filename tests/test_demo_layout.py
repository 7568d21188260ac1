"""The demo's page at every width, by keyboard, for a screen reader."""

import pytest

from tests.test_demo_browser import ask, chromium, demo, page, picture_file, visit, wait_answered  # noqa: F401 - fixtures among them

gradio = pytest.importorskip("gradio", reason="the demo needs gradio")
pytestmark = pytest.mark.slow


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
    # what cannot be pressed must not be the most colourful thing on the page; a button fades while it is switched off
    page.wait_for_function(
        """![...document.querySelectorAll('button:disabled')].filter(e => e.offsetParent)
        .some(e => !getComputedStyle(e).filter.includes('grayscale(1)'))"""
    )
    assert page.locator("#stop").is_disabled(), "there is such a button here"
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
