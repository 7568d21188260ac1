"""The page: two panes that stream, controls, votes, a link to share, and the API; its second tab is `runs_tab`.

What a button does is in `service`, `votes`, `sharing` and
`browser`; what is shown is made in `show` from a `Conversation`, so every way to the same state looks the same.
"""

import functools
import html
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from starlette.middleware import Middleware

from internvl_mpo.demo import browser, show, widgets
from internvl_mpo.demo.conversation import Conversation
from internvl_mpo.demo.examples import Example
from internvl_mpo.demo.guard import Guard
from internvl_mpo.demo.pictures import fetch_data_uri
from internvl_mpo.demo.runs_tab import RunsTab
from internvl_mpo.demo.service import Service
from internvl_mpo.demo.serving import MOST_SESSIONS, forget_call, free_port
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.demo.streaming import Backend
from internvl_mpo.demo.takeaway import write_takeaway
from internvl_mpo.demo.votes import VoteBox
from internvl_mpo.demo.widgets import AT_ONCE, PRIVATE, toasted
from internvl_mpo.errors import BadInputError

QUEUE = "model"  # page and API wait in one line
EMPTY = {"text": "", "files": []}
STYLE_SHEET = Path(__file__).with_name("style.css")


class Page:
    """The demo with its parts.

    Args:
        backend: who answers.
        votes: where votes go.
        shelf: where shared conversations go.
        settings: of the program.
        examples: the gallery.
        uploads: Gradio's temporary folder.
    """

    def __init__(
        self,
        backend: Backend,
        votes: VoteBox,
        shelf: Shelf,
        settings: DemoSettings,
        examples: Sequence[Example],
        uploads: Path,
    ):
        self.backend, self.votes, self.shelf = backend, votes, shelf
        self.settings, self.examples = settings, examples
        self.service = Service(backend, settings.limits, uploads, settings.max_new_tokens)
        self.runs = browser.find_runs(settings.runs)
        self._in_line = {"concurrency_id": QUEUE, "concurrency_limit": settings.concurrency or backend.concurrency}

    def build(self) -> gr.Blocks:
        """Return the Gradio app."""
        with gr.Blocks(
            title="InternVL: base and MPO side by side",
            analytics_enabled=False,
            delete_cache=(600, 1800),
            fill_width=True,
        ) as blocks:
            gr.HTML(
                "<h1>Base and MPO think side by side</h1><p class='muted'>Ask about a picture. The same question goes "
                "to a model before and after Mixed Preference Optimization.</p>",
                elem_id="title",
            )
            with gr.Tabs():
                with gr.Tab("Ask", id="ask"):
                    self._build_ask(blocks)
                with gr.Tab("Benchmarks", id="benchmarks"):
                    RunsTab(self.runs).build(blocks)
            gr.api(self.compare, api_name="compare", **self._in_line)
            blocks.unload(self._leave)
        return blocks

    # --- the first tab ------------------------------------------------------------------------------------------------

    def _build_ask(self, blocks: gr.Blocks) -> None:
        most_tiles = self.settings.max_tiles or self.backend.cutter().max_tiles
        conversation, drawn = gr.State(Conversation(), time_to_live=6 * 3600), gr.State(None)

        with gr.Column(elem_id="welcome") as welcome:
            gr.HTML("<p class='muted'>Choose an example, or ask about a picture of your own.</p>")
            cards = widgets.build_cards(self.examples)
        with gr.Accordion("Earlier in this conversation", open=False, visible=False, elem_id="earlier") as earlier:
            history = gr.Chatbot(
                elem_id="earlier-chat", show_label=False, height=360, latex_delimiters=widgets.LATEX, allow_tags=False
            )
        asked = gr.HTML("", elem_id="asked")
        with gr.Column(visible=False, elem_id="answers") as answers:
            panes = widgets.build_panes(self._models(), self.settings.blind)
            agreement = gr.HTML(show.agreement_html(None, False), elem_id="agreement")
            votes = widgets.build_votes()
            voted = gr.HTML(show.status_html(""), elem_id="vote-status")
        with gr.Column(elem_id="composer"):
            box = widgets.build_box()
            gr.HTML("<p class='muted' role='status'></p>", elem_id="waiting")
            with gr.Row(elem_id="actions"):
                stop = gr.Button("Stop", size="sm", interactive=False, variant="stop", elem_id="stop")
                retry = gr.Button("Retry", size="sm", interactive=False, elem_id="retry")
                clear = gr.Button("Clear", size="sm", interactive=False, elem_id="clear")
                share = gr.Button("Share", size="sm", interactive=False, elem_id="share")
                save = gr.Button("Save", size="sm", interactive=False, elem_id="save")
        link = gr.Textbox(visible=False, label="Link to this conversation", elem_id="link", buttons=["copy"])
        file = gr.File(visible=False, label="This conversation as a file", elem_id="file")
        controls = widgets.build_controls(self.settings, most_tiles)
        with gr.Accordion("How the pictures are cut", open=False, elem_id="cut"):
            cut = gr.HTML(show.tiles_html(self.backend.cutter(), [], most_tiles), elem_id="tiles")
        photo = widgets.build_camera()
        gr.HTML(f"<p class='muted'>{widgets.PRIVACY}</p>", elem_id="privacy")

        view = [
            *(*panes.chats, *panes.heads, *panes.speeds, agreement, *votes.values(), stop, clear),
            *(retry, share, save),
            *(voted, link, file, asked, earlier, history, welcome, answers),
        ]
        for event in (
            box.submit(self._begin, [box, conversation, *controls], [box, *view], **AT_ONCE),
            retry.click(self._retry, [conversation, *controls[:-1]], [controls.seed, *view], **AT_ONCE),
        ):
            event.then(self._answer, conversation, view, **PRIVATE, **self._in_line)
        stop.click(self._stop, None, None, js=widgets.TO_THE_BOX, **AT_ONCE)
        clear.click(self._clear, controls.blind, [conversation, box, *view], **AT_ONCE)
        share.click(self._share, conversation, link, **AT_ONCE)
        save.click(self._save, conversation, file, **AT_ONCE)
        for verdict, button in votes.items():
            button.click(functools.partial(self._vote, verdict), conversation, view, **AT_ONCE)
            button.click(None, None, None, js=widgets.TO_THE_BOX)
        for changed in (box.change, controls.tiles.release):
            changed(self._preview, [box, controls.tiles, drawn], [cut, drawn], trigger_mode="always_last", **AT_ONCE)
        cards.select(self._take_example, None, [box, controls.style], **AT_ONCE)
        photo.change(self._add_photo, [photo, box], [box, photo], **AT_ONCE)
        blocks.load(self._open, None, [conversation, *view], **AT_ONCE)
        for script in (widgets.NAMES, widgets.SAY_WAITING):
            blocks.load(None, None, None, js=script)

    def _view(self, conversation: Conversation, running: bool = False, said: str = "") -> list[Any]:
        """Values of every output that shows the conversation, in the order of `view` above."""
        turn = conversation.turns[-1] if conversation.turns else None
        is_done = bool(turn and turn.is_finished and not running)
        can_vote = is_done and not turn.vote and all(answer.text for answer in turn.answers.values())
        return [
            *(show.answer_messages(turn, side) for side in conversation.order),
            *(show.head_html(conversation, position, self._models()) for position in (0, 1)),
            *(show.speed_html(turn.answers[side] if turn else None) for side in conversation.order),
            show.agreement_html(turn, running),
            *(gr.Button(interactive=can_vote) for _ in widgets.VOTE_LABELS),
            gr.Button(interactive=running),
            gr.Button(interactive=turn is not None),
            *(gr.Button(interactive=bool(turn) and not running) for _ in ("retry", "share", "save")),
            show.status_html(said),
            gr.Textbox(visible=False),
            gr.File(visible=False),
            show.question_html(turn),
            gr.Accordion(visible=len(conversation.turns) > 1),
            show.earlier_messages(conversation),
            gr.Column(visible=turn is None),
            gr.Column(visible=turn is not None),
        ]

    def _models(self) -> dict[str, str]:
        return {side: name.model for side, name in self.backend.names().items()}

    @toasted
    def _begin(
        self,
        message: Any,
        conversation: Conversation,
        style: str,
        temperature: float,
        length: float,
        tiles: float,
        seed: float | None,
        blind: bool,
        request: gr.Request,
    ) -> list[Any]:
        message = message or EMPTY
        controls = self.service.controls(style, temperature, length, tiles, seed)
        asked = message["text"], message["files"]
        self.service.begin(request.session_hash, conversation, *asked, controls, blind)
        for sentence in show.shrunk(conversation.turns[-1].images):
            gr.Info(sentence)
        return [EMPTY, *self._view(conversation, running=True)]

    @toasted
    def _retry(
        self,
        conversation: Conversation,
        style: str,
        temperature: float,
        length: float,
        tiles: float,
        seed: float | None,
        request: gr.Request,
    ) -> list[Any]:
        controls = self.service.controls(style, temperature, length, tiles, seed)
        used = self.service.retry(request.session_hash, conversation, controls)
        return [used.seed, *self._view(conversation, running=True)]

    def _answer(self, conversation: Conversation, request: gr.Request) -> Iterator[Any]:
        turn = conversation.turns[-1] if conversation.turns else None
        for _ in self.service.answer(request.session_hash, conversation):
            yield self._view(conversation, running=not turn.is_finished)
        now = self.service.current(request.session_hash)
        if now is not None and now is not conversation:  # cleared; our last view may reach the page after the empty one
            yield self._view(now, running=bool(now.turns) and not now.turns[-1].is_finished)
            return
        if turn is not None and turn in conversation.turns:
            for error in dict.fromkeys(answer.error for answer in turn.answers.values() if answer.error):
                gr.Warning(html.escape(error), title="No complete answer")

    def _stop(self, request: gr.Request) -> None:
        self.service.stop(request.session_hash)

    def _clear(self, blind: bool, request: gr.Request) -> list[Any]:
        conversation = self.service.clear(request.session_hash, blind)
        return [conversation, EMPTY, *self._view(conversation)]

    def _leave(self, request: gr.Request) -> None:
        self.service.leave(request.session_hash)

    @toasted
    def _vote(self, verdict: str, conversation: Conversation) -> list[Any]:
        said = self.votes.cast(conversation, verdict, self.backend.names())
        conversation.revealed = True
        return self._view(conversation, said=said)

    @toasted
    def _share(self, conversation: Conversation, request: gr.Request) -> Any:
        name = self.shelf.store(conversation)
        root = str(request.request.url).partition("/gradio_api")[0]
        kept = f"Stored on this server for {self.settings.shared_days:g} days; whoever has the link can read it."
        return gr.Textbox(value=f"{root}/?c={name}", visible=True, info=kept)

    @toasted
    def _save(self, conversation: Conversation) -> Any:
        folder = self.service.uploads / f"saved-{secrets.token_hex(8)}"  # cleaned away with the uploads
        path = write_takeaway(conversation, self._models(), folder)
        return gr.File(value=str(path), visible=True)

    def _take_example(self, chosen: gr.SelectData) -> tuple[dict[str, Any], str]:
        example = self.examples[chosen.index]
        return {"text": example.question, "files": list(example.images)}, example.style

    def _open(self, request: gr.Request) -> list[Any]:
        """Show the shared conversation that a page's address names; leave a page without one alone."""
        name = request.query_params.get("c")
        if name:
            try:
                conversation = self.shelf.open(name)
                return [conversation, *self._view(conversation)]
            except BadInputError as error:
                gr.Warning(str(error))
        return [gr.skip()] * (1 + len(self._view(Conversation())))

    def _add_photo(self, photo: str | None, message: Any) -> tuple[Any, None]:
        if photo is None:
            return gr.skip(), None
        message = message or EMPTY
        return {"text": message["text"], "files": [*message["files"], photo]}, None

    def _preview(self, message: Any, max_tiles: int, drawn: Any) -> tuple[Any, Any]:
        """Draw the tiles of the pictures in the box if they have changed; an empty box keeps the last drawing."""
        wanted = (tuple((message or EMPTY)["files"]), int(max_tiles))
        if wanted == drawn or not wanted[0]:
            return gr.skip(), gr.skip()
        try:
            pictures = self.service.preview(wanted[0])
        except BadInputError as error:
            return f"<p class='muted'>{html.escape(str(error))}</p>", wanted
        return show.tiles_html(self.backend.cutter(), pictures, int(max_tiles)), wanted

    # --- the API ------------------------------------------------------------------------------------------------------

    def compare(
        self,
        question: str,
        images: list[str | dict] | None = None,
        style: Literal["cot", "direct", "r1", "plain"] = "cot",
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        max_tiles: int | None = None,
        seed: int = 0,
        request: gr.Request | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Ask base and MPO the same question and return both answers.

        Args:
            question: the text.
            images: uploaded files (`gradio_client.handle_file`) or `data:image/...;base64,...` texts.
            style: cot (step by step), direct (a word or phrase), r1 (thinks first), plain (as it stands).
            temperature: 0 is greedy.
            max_new_tokens: longest answer.
            max_tiles: most tiles of all pictures together; empty is the model's own limit.
            seed: of the draw, where temperature is above 0.
            request: whose call it is; Gradio fills it in.

        Returns:
            {"base": {"text", "final_answer", "num_tokens", "tokens_per_s", "first_token_s", "finish_reason", "model"},
            "mpo": the same, "agreement": "same", "different" or "unknown"}; partial ones while the answers grow.
        """
        try:
            if not isinstance(question, str) or not isinstance(images or [], list):
                raise BadInputError("question must be text and images a list")
            limit = max_tiles or self.settings.max_tiles or self.backend.cutter().max_tiles
            controls = self.service.controls(style, temperature, max_new_tokens, limit, seed)
            yield from self.service.compare(question, images or [], controls)
        except BadInputError as error:
            raise gr.Error(str(error), print_exception=False) from error
        finally:
            forget_call(request)


def launch(page: Page) -> tuple[gr.Blocks, str]:
    """Start the server in threads of its own; return the app and its address.

    Raises:
        BadInputError: the port is taken, or MCP is asked for and not installed.
    """
    settings, limits = page.settings, page.service.limits
    blocks = page.build()
    blocks.queue(default_concurrency_limit=8)  # no max_size: nobody who waits is turned away
    guard = Middleware(
        Guard,
        uploads=page.service.uploads,
        max_body_bytes=limits.max_images * (limits.max_bytes * 4 // 3 + 4096) + (1 << 20),
        fetch=functools.partial(fetch_data_uri, limits=limits) if settings.allow_image_urls else None,
        health=page.backend.activity.as_dict,
    )
    try:
        _, url, _ = blocks.launch(
            server_name=settings.host,
            server_port=settings.port or free_port(settings.host),
            max_file_size=limits.max_bytes,
            state_session_capacity=MOST_SESSIONS,
            app_kwargs={"middleware": [guard]},
            mcp_server=settings.mcp or None,
            theme=gr.themes.Soft(
                primary_hue="blue",
                neutral_hue="slate",
                radius_size="md",
                spacing_size="sm",
                font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
                font_mono=["ui-monospace", "Consolas", "monospace"],
            ),
            css=STYLE_SHEET.read_text(encoding="utf-8"),
            ssr_mode=False,
            footer_links=["api", "settings"],
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise BadInputError(
            f"port {settings.port} on {settings.host} cannot be used; give another --port, or 0 for a free one"
        ) from error
    except ImportError as error:
        raise BadInputError(f"--mcp needs more packages ({error}); pip install 'gradio[mcp]'") from error
    return blocks, url
