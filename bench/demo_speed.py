"""What the demo adds to the models behind it: first token, whole answer, ten visitors at once.

    python bench/demo_speed.py --json outputs/demo_speed.json     # the mini models of the quickstart
    python bench/demo_speed.py --wide true                        # their architecture, 90 times the weights
    python bench/demo_speed.py --prefill 0.5              # prompts that take as long as a large model's
    python bench/demo_speed.py --base OpenGVLab/InternVL2-8B --mpo OpenGVLab/InternVL2-8B-MPO

Four ways to the same two answers alternate in one run, and the medians are compared:

    alone    the base model by itself, tokens thrown away
    both     both models in turn, tokens thrown away: what two answers on this device cost at least
    stream   the demo's backend: decoding, both panes, a frame every 80 ms
    page     a client of the running page: the queue, the server and the wire as well

`stream / both` is what streaming adds to the generation, `page / both` what a visitor waits longer.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import build_settings, parse_settings, setting, show_settings

QUESTION = "Describe the picture."

if TYPE_CHECKING:
    from internvl_mpo.demo.local_models import LocalModels


@dataclass
class Settings:
    """Settings of `demo_speed.py`."""

    base: str = setting("outputs/mini/start", help="model folder or Hub id")
    mpo: str = setting("outputs/mini/model", help="the other one")
    wide: bool = setting(False, help="random weights in base's architecture on both sides, 1024 wide and 8 layers")
    adapter: str | None = setting(None, help="LoRA adapter on base: one mixed batch in place of two models")
    prefill: float = setting(0.0, help="seconds a prompt waits in each model, as for a GPU that leaves the CPU free")
    tokens: int = setting(96, help="length of every answer; the end of a turn is not looked at")
    rounds: int = setting(7, help="rounds; the median counts")
    visitors: int = setting(10, help="visitors who ask at the same moment")
    device: str = setting("auto", help="torch device")
    dtype: str = setting("auto", help="torch dtype")
    json: str | None = setting(None, help="file for the numbers")


def main(argv: list[str]) -> int:
    """Measure, print, and write the numbers."""
    settings = parse_settings(Settings, argv, program="bench/demo_speed.py", about=__doc__) if argv else Settings()
    print(show_settings(settings, "demo_speed.py"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = f"{folder}/uploads"
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        result = measure(settings, Path(folder))
    print(json.dumps(result, indent=2))
    if settings.json:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    return 0


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Return the medians of every way, their ratios, and the visitors' waits."""
    from gradio_client import Client, handle_file

    from internvl_mpo.demo.conversation import SIDES, Message
    from internvl_mpo.demo.examples import make_examples
    from internvl_mpo.demo.page import Page, launch
    from internvl_mpo.demo.pictures import read_picture
    from internvl_mpo.demo.settings import DemoSettings
    from internvl_mpo.demo.sharing import Shelf
    from internvl_mpo.demo.streaming import VisitorQuestion
    from internvl_mpo.demo.votes import VoteBox
    from internvl_mpo.engines import Sampling

    backend = make_backend(settings, folder)
    backend.load()
    models = backend._models.get()
    for model in models:
        fix_length(model, settings.prefill)
    options = {"max_new_tokens": settings.tokens, "port": 0, "votes": f"{folder}/v", "shared": f"{folder}/s"}
    demo = build_settings(DemoSettings, {"base": settings.base, "mpo": settings.mpo, **options})
    examples = make_examples(folder / "examples")
    page = Page(backend, VoteBox(demo.votes), Shelf(demo.shared, 1, demo.limits), demo, examples, folder / "uploads")
    _, url = launch(page)
    client = Client(url, verbose=False)

    path = examples[0].images[0]
    picture = read_picture(Path(path).read_bytes(), "picture", demo.limits)
    message = Message("user", f"<image>\n{QUESTION}", (picture,))
    question = VisitorQuestion({side: [message] for side in SIDES}, Sampling(max_new_tokens=settings.tokens))

    def bare(number: int) -> Callable[[], tuple[float, float]]:
        return lambda: run_bare(models, number, question, bool(settings.adapter))

    def stream() -> tuple[float, float]:
        start, first = time.perf_counter(), None
        for pair in backend.stream(question):
            if first is None and all(answer.num_tokens for answer in pair):
                first = time.perf_counter() - start
        return first, time.perf_counter() - start

    def visit() -> tuple[float, float]:
        start = time.perf_counter()
        job = client.submit(QUESTION, [handle_file(path)], "plain", 0, settings.tokens, api_name="/compare")
        # Iterating over a job spins on the lock that its receiver needs, and would measure that.
        while not ((results := job.outputs()) and all(results[-1][side]["num_tokens"] for side in SIDES)):
            time.sleep(0.002)
        first = time.perf_counter() - start
        job.result()
        return first, time.perf_counter() - start

    times = take_turns({"alone": bare(1), "both": bare(2), "stream": stream, "page": visit}, settings.rounds)
    return {
        **compare(times),
        "visitors": queue(client, settings.visitors, settings.tokens),
        "num_weights": sum(p.numel() for p in models[0].model.parameters()),
        "device": str(models[0].device),
    }


def make_backend(settings: Settings, folder: Path) -> "LocalModels":
    """Return both models as the demo holds them."""
    from internvl_mpo.demo.local_models import LocalModels

    base, mpo = settings.base, settings.mpo
    if settings.wide:
        base = mpo = wide_model(settings.base, folder / "wide")
    return LocalModels(
        base,
        None if settings.adapter else mpo,
        adapter=settings.adapter,
        device=settings.device,
        dtype=settings.dtype,
    )


def fix_length(model: Any, prefill: float) -> None:
    """Let every answer have the same length, whatever the model says, and the prompt last `prefill` seconds longer."""
    model.suppressed = model.suppressed.clone()
    model.suppressed[model.stop_ids] = True
    if prefill:
        model.model.forward = slow_prompt(model.model.forward, prefill)


def take_turns(ways: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (seconds to the first token, seconds in all) of every way, round by round; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            measured = way()
            if number:
                times[name].append(measured)
    return times


def compare(times: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Return the medians of every way, and their ratios to both models alone."""
    medians = {
        name: {
            "first_token_s": statistics.median(first for first, _ in rows),
            "whole_s": statistics.median(whole for _, whole in rows),
        }
        for name, rows in times.items()
    }
    ratios = {
        f"{name}/both": {key: medians[name][key] / medians["both"][key] for key in ("first_token_s", "whole_s")}
        for name in ("alone", "stream", "page")
    }
    return {"median": medians, "ratio": ratios}


def slow_prompt(forward: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Let a forward over more than one position last longer by a wait that needs no CPU."""

    @functools.wraps(forward)
    def slow(*args: Any, **kwargs: Any) -> Any:
        given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if given.shape[1] > 1:
            time.sleep(seconds)
        return forward(*args, **kwargs)

    return slow


def run_bare(models: list[Any], number: int, question: Any, mixed: bool) -> tuple[float, float]:
    """Generate with nobody reading: seconds until every row has a first token, and until all have ended."""
    from internvl_mpo.demo.local_models import Turns

    start, firsts, stop = time.perf_counter(), [], threading.Event()
    jobs = [(models[0], number)] if mixed else [(model, 1) for model in models[:number]]
    turns = Turns(len(jobs))

    def work(me: int, model: Any, rows: int) -> None:
        seen: list[float] = []

        def put(tokens: list[int]) -> None:
            if not seen:
                seen.append(time.perf_counter() - start)
            turns.step_done(me)

        turns.wait(me)
        model.generate(
            [question.chats["base"]] * rows,
            sampling=question.sampling,
            seed=0,
            max_tiles=None,
            adapters=["__base__", "default"][:rows] if mixed else None,
            put=put,
            stop=stop,
        )
        turns.leave(me)
        firsts.append(seen[0])

    threads = [threading.Thread(target=work, args=(me, *job)) for me, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(firsts), time.perf_counter() - start


def queue(client: Any, visitors: int, tokens: int) -> dict[str, Any]:
    """Let visitors ask at the same moment; return how many were answered, and the shortest and longest wait."""
    start, waits = time.perf_counter(), []
    jobs = [client.submit(QUESTION, None, "plain", 0, tokens, api_name="/compare") for _ in range(visitors)]
    threads = []
    for job in jobs:

        def wait(job=job) -> None:
            job.result()
            waits.append(time.perf_counter() - start)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return {"asked": visitors, "answered": len(waits), "first_s": min(waits), "last_s": max(waits)}


def wide_model(base: str, folder: Path) -> str:
    """Write a model of base's architecture with random weights, large enough that computing outweighs Python."""
    import torch

    from internvl_mpo.publish import write_model_folder
    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel, InternVLChatProcessor

    if not Path(base).is_dir():
        raise BadInputError(f"{base} is no folder; --wide needs one for its tokenizer, as `make quickstart` makes it")
    config = InternVLChatConfig.from_pretrained(base)
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
    for name, value in {**sizes, "num_key_value_heads": 8}.items():
        setattr(config.llm_config, name, value)
    torch.manual_seed(0)
    write_model_folder(InternVLChatModel(config), InternVLChatProcessor.from_pretrained(base), folder)
    return str(folder)


if __name__ == "__main__":
    sys.exit(run_program(main))
