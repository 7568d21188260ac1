"""The parts of the page's first tab, without what they do: that is in `page`. How events behave, in both tabs."""

import functools
import html
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gradio as gr

from internvl_mpo.demo import show
from internvl_mpo.demo.conversation import STYLE_NAMES, Conversation
from internvl_mpo.demo.examples import Example
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.errors import BadInputError

PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
AT_ONCE = {**PRIVATE, "concurrency_limit": None}  # toasts travel through the queue; these never wait in it
LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
    {"left": "$", "right": "$", "display": False},
]
VOTE_LABELS = {"left": "← A is better", "right": "B is better →", "tie": "Tie", "both_bad": "Both bad"}
PRIVACY = (
    "A vote stores the question, its pictures and both answers as training data of the next round; a shared link "
    "stores the conversation. Nothing else is kept."
)
# Names for screen readers that Gradio gives to no part by itself: both panes are "chatbot conversation" to it, and
# every copy button "copy". Runs once, and whenever the page changes.
NAMES = """
() => {
  const panes = {"chat-a": "Answer of A", "chat-b": "Answer of B", "earlier-chat": "Earlier questions and answers"};
  const name = () => {
    for (const [id, text] of Object.entries(panes)) {
      document.querySelector(`#${id} [role=log]`)?.setAttribute("aria-label", text);
      document.querySelectorAll(`#${id} button`).forEach((button) => {
        const what = button.innerText || button.title || button.ariaLabel || "Button";
        if (!what.includes(text)) button.setAttribute("aria-label", `${what}: ${text}`);
      });
    }
  };
  name();
  new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
}
"""
# Gradio keeps a question that is sent while a picture is still on its way, and sends it when the picture is there; this
# says so meanwhile, and stops saying it.
SAY_WAITING = """
() => {
  const box = document.querySelector("#box"), line = document.querySelector("#waiting p");
  const isUploading = () => box.querySelector(".loader") !== null;
  const sent = () => {
    if (isUploading()) line.innerText = "The picture is still being uploaded; the question is sent when it is there.";
  };
  box.addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.shiftKey) sent(); }, true);
  box.addEventListener("click", (event) => { if (event.target.closest(".submit-button")) sent(); }, true);
  new MutationObserver(() => { if (line.innerText && !isUploading()) line.innerText = ""; })
    .observe(box, {childList: true, subtree: true});
}
"""
# A button that switches itself off takes the focus with it: it goes to the question box.
TO_THE_BOX = "() => document.querySelector('#box textarea')?.focus()"


def toasted(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let a handler's `BadInputError` become a toast that leaves everything on the page as it is."""

    @functools.wraps(handler)
    def handle(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except BadInputError as error:
            gr.Warning(html.escape(str(error), quote=False), title="Please check")
            return gr.skip()

    return handle


class Controls(NamedTuple):
    """How a question is asked, in the order `Service.controls` takes them; and whether sides are hidden."""

    style: gr.Radio
    temperature: gr.Slider
    length: gr.Slider
    tiles: gr.Slider
    seed: gr.Number
    blind: gr.Checkbox


class Panes(NamedTuple):
    """Both panes; A first."""

    heads: Sequence[gr.HTML]
    chats: Sequence[gr.Chatbot]
    speeds: Sequence[gr.HTML]


def build_panes(models: dict[str, str], blind: bool) -> Panes:
    """Two columns that become one on a phone."""
    start = Conversation()
    start.restart(blind)
    heads, chats, speeds = [], [], []
    with gr.Row(equal_height=True, elem_id="panes"):
        for position, letter in enumerate("ab"):
            with gr.Column(min_width=320):
                heads.append(gr.HTML(show.head_html(start, position, models), elem_id=f"head-{letter}"))
                chats.append(
                    gr.Chatbot(
                        elem_id=f"chat-{letter}",
                        label=f"Answer of {letter.upper()}",
                        show_label=False,
                        latex_delimiters=LATEX,
                        buttons=["copy"],
                        feedback_options=None,
                        placeholder=" ",
                        allow_tags=False,
                    )
                )
                speeds.append(gr.HTML(show.speed_html(None), elem_id=f"speed-{letter}"))
    return Panes(heads, chats, speeds)


def build_votes() -> dict[str, gr.Button]:
    """One button a verdict."""
    with gr.Row(elem_id="votes"):
        return {
            verdict: gr.Button(label, size="sm", interactive=False, elem_id=f"vote-{verdict}")
            for verdict, label in VOTE_LABELS.items()
        }


def build_box() -> gr.MultimodalTextbox:
    """The question and its pictures."""
    return gr.MultimodalTextbox(
        elem_id="box",
        label="Your question",
        show_label=False,
        placeholder="Ask about a picture, paste or drop one here",
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        max_lines=8,
        autofocus=True,
    )


def build_cards(examples: Sequence[Example]) -> gr.Gallery:
    """Examples as pictures with their titles, to be chosen from."""
    return gr.Gallery(
        [(example.card, example.title) for example in examples],
        label="Examples",
        show_label=False,
        columns=4,
        height="auto",
        object_fit="contain",
        allow_preview=False,
        buttons=[],
        interactive=False,
        format="png",
        elem_id="cards",
    )


def build_controls(settings: DemoSettings, most_tiles: int) -> Controls:
    """Everything that decides how a question is asked."""
    with gr.Accordion("How to ask", open=False, elem_id="controls"):
        with gr.Row():
            style = gr.Radio(
                [(name, key) for key, name in STYLE_NAMES.items()],
                value=settings.style,
                label="Prompt",
                info="The instruction put around your question",
                elem_id="style",
            )
            blind = gr.Checkbox(
                settings.blind,
                label="Blind",
                info="Hide and shuffle the sides of the next conversation",
                elem_id="blind",
            )
        with gr.Row():
            temperature = gr.Slider(0, 1.5, settings.temperature, step=0.05, label="Temperature", info="0 is greedy")
            length = gr.Slider(
                1,
                settings.max_new_tokens,
                min(512, settings.max_new_tokens),
                step=1,
                label="Longest answer",
                info="Tokens",
            )
            tiles = gr.Slider(1, most_tiles, most_tiles, step=1, label="Tiles", info="All pictures together")
            seed = gr.Number(0, precision=0, label="Seed", minimum=0, info="Of the draw", elem_id="seed")
    return Controls(style, temperature, length, tiles, seed, blind)


def build_camera() -> gr.Image:
    """A photo of the visitor's camera; it moves into the question box."""
    with gr.Accordion("Camera", open=False, elem_id="camera"):
        return gr.Image(sources=["webcam"], type="filepath", label="Take a picture", height=280, format="png")


def build_answer_of_a_run(letter: str) -> gr.Markdown:
    """One stored answer of the benchmark browser."""
    return gr.Markdown(latex_delimiters=LATEX, line_breaks=True, container=True, elem_id=f"bench-answer-{letter}")
