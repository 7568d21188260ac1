"""The second tab: two evaluated runs beside each other, question by question."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from internvl_mpo.demo import browser, widgets
from internvl_mpo.demo.conversation import SIDES
from internvl_mpo.demo.markup import safe_markdown
from internvl_mpo.demo.widgets import AT_ONCE, toasted


class RunsTab:
    """The tab with what its buttons do.

    Args:
        runs: folders of evaluated runs by name, see `browser.find_runs`.
    """

    def __init__(self, runs: dict[str, Path]):
        self.runs = runs

    def build(self, blocks: gr.Blocks) -> None:
        """Put its parts where the caller stands in the page."""
        names = list(self.runs)
        if len(names) < 2:
            gr.Markdown(
                "Give two runs of `evaluate_mpo.py` with `--runs FOLDER,FOLDER` (or one folder that holds both), and "
                "page here through the questions on which they differ."
            )
            return
        first_run = "start" if "start" in names else names[0]
        second_run = next(name for name in ("mpo", *reversed(names)) if name in names and name != first_run)
        with gr.Row():
            first = gr.Dropdown(names, value=first_run, label="First run")
            second = gr.Dropdown(names, value=second_run, label="Second run")
            task = gr.Dropdown([], label="Benchmark and mode")
            which = gr.Dropdown([(text, key) for key, text in browser.FILTERS.items()], value="differ", label="Show")
        with gr.Row(elem_id="bench-steps"):
            before = gr.Button("← Previous", size="sm", min_width=0, elem_id="bench-previous")
            number = gr.Number(
                1, precision=0, minimum=1, label="Question", show_label=False, min_width=0, elem_id="bench-number"
            )
            after = gr.Button("Next →", size="sm", min_width=0, elem_id="bench-next")
        where = gr.HTML(elem_id="bench-where")
        question = gr.HTML(elem_id="bench-question")
        verdicts, answers = [], []
        with gr.Row():
            for letter in "ab":
                with gr.Column(min_width=320):
                    verdicts.append(gr.HTML(elem_id=f"bench-verdict-{letter}"))
                    answers.append(widgets.build_answer_of_a_run(letter))
        chosen, shown = [first, second, task, which, number], [number, where, question, *verdicts, *answers]
        for choose in (first.input, second.input, blocks.load):
            choose(self._tasks, [first, second], task, **AT_ONCE).then(self._show, chosen, shown, **AT_ONCE)
        for choose in (task.input, which.input):
            choose(self._show, chosen, shown, **AT_ONCE)
        for move, step in ((number.submit, 0), (before.click, -1), (after.click, 1)):
            move(functools.partial(self._show, step=step), chosen, shown, **AT_ONCE)

    @toasted
    def _tasks(self, first: str, second: str) -> Any:
        names = browser.tasks(self.runs[first], self.runs[second])
        preferred = next((name for name in names if name.endswith("/cot")), names[0] if names else None)
        return gr.Dropdown(choices=names, value=preferred)

    @toasted
    def _show(
        self, first: str, second: str, task: str | None, which: str, number: float | None, step: int = 0
    ) -> list[Any]:
        selection = browser.select(self.runs[first], self.runs[second], task or "", which)
        count = len(selection.entries)
        if not count:
            return [1, f"<p class='muted'>None of {selection.total} questions.</p>", *[""] * (1 + 2 * len(SIDES))]
        number = min(max(1, int(number or 1) + step), count)
        entry = selection.entries[number - 1]
        return [
            number,
            f"<p class='muted' role='status'>Question {number} of {count}, {selection.total} in all</p>",
            browser.question_html(entry),
            *(browser.verdict_html(entry, side, name) for side, name in enumerate((first, second))),
            *(safe_markdown(row["answer"] or "no answer") for row in entry.rows),
        ]
