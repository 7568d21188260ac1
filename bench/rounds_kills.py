r"""A run in rounds is killed at random moments and must end as the unbroken one: same pairs, same losses, to the bit.

    python bench/rounds_kills.py --model outputs/mini/start --world outputs/mini/world --kills 20

Starts `python -m internvl_mpo.rounds` in a process group of its own, sends SIGKILL to the whole group, starts it again,
and so on. A kill comes in a drawn stage, after a drawn share of the processor time that it takes unbroken; every stage
is drawn once before any is drawn twice. A small server stands for the policy when responses are sampled: it answers
from the request's seed and writes down what it was asked. Only what was in flight when a kill came may be asked for
twice. Needs Linux, which tells the processor time of a group.
"""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import read_json
from internvl_mpo.jsonl import read_whole_lines
from internvl_mpo.programs import program
from internvl_mpo.records import Question, read_rows, write_rows
from internvl_mpo.settings import parse_settings, setting

CONCURRENCY = 4  # requests in flight
SECONDS_BETWEEN_LOOKS = 0.05
NUM_QUESTIONS, NUM_OPEN, NUM_SAMPLES = 24, 6, 6


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    model: str = setting(help="start model")
    world: str = setting(help="folder with questions.jsonl, open_questions.jsonl and their pictures")
    output: str = setting("outputs/rounds_kills", help="folder of both runs; an unbroken one that is there is used")
    kills: int = setting(20, help="how often the run is killed")
    rounds: int = setting(2, help="rounds of the run")
    seed: int = setting(0, help="of the moments")


class Policy(ThreadingHTTPServer):
    """Answers chat completions from the seed of the request, and appends that seed to a file."""

    daemon_threads = True

    def __init__(self, model: str, port: int, log: Path):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send({"data": [{"id": model, "root": model}]})

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with open(log, "a", encoding="utf-8") as out:
                    out.write(f"{model} {request['seed']}\n")
                time.sleep(0.02)
                content = request["messages"][-1]["content"]
                text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
                reply = {"message": {"content": answer(text, request["seed"])}, "finish_reason": "stop"}
                self.send({"choices": [reply], "usage": {"completion_tokens": 9}})

            def send(self, content: dict) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", port), Handler)


def answer(question: str, seed: int) -> str:
    """Return one of the numbers in a question as a final answer, or without one a description."""
    numbers = re.findall(r"\d+", question.rpartition("Question:")[2]) if "Question:" in question else []
    if not numbers:
        return f"The picture shows {seed % 7} things and number {seed % 1000}."
    return f"I looked {seed % 1000} times.\n\nFinal answer: {numbers[seed % len(numbers)]}"


def main(argv: list[str]) -> int:
    """Run unbroken and killed, and compare; 1 if anything differs."""
    if argv[:1] == ["serve"]:
        Policy(argv[1], int(argv[2]), Path(argv[3])).serve_forever()
    settings = parse_settings(Settings, argv, program="bench/rounds_kills.py", about=__doc__, config=False)
    out = Path(settings.output)
    for name in ("run", "run.asked", "run.log"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    if not (out / "whole").exists():
        write_questions(Path(settings.world), out)
        end_of(start(settings), out / "run.log")
        for name in ("run", "run.asked", "run.log"):  # rows name the policy, so both runs have one folder
            (out / name).rename(out / name.replace("run", "whole"))
    paths = sorted((out / "whole" / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    stages = [{"name": path.stem, **read_json(path)} for path in paths]
    killed = Counter(kill_often(settings, draw_moments(stages, settings.kills, settings.seed)))
    print(f"{killed.total()} kills in {len(killed)} of {len(stages)} stages; unbroken they take "
          f"{sum(stage['cpu_seconds'] for stage in stages):.0f} s of processor time")  # fmt: skip
    print("\n".join(f"  {count} in {name}" for name, count in killed.items()))
    wrong = [*differences(out / "whole", out / "run", settings.rounds), *asked_twice(out, killed.total())]
    print("\n".join(wrong) or "questions, responses, pairs and losses are those of the unbroken run")
    return 1 if wrong else 0


def write_questions(world: Path, out: Path) -> None:
    """Write small files of questions; two numbers stand in each, of which one is right."""
    rows = read_rows(world / "questions.jsonl", Question)
    write_rows([row for row in rows if len(re.findall(r"\d+", row.question)) > 1][:NUM_QUESTIONS], out / "q.jsonl")
    write_rows(read_rows(world / "open_questions.jsonl", Question)[:NUM_OPEN], out / "open.jsonl")


def start(settings: Settings) -> subprocess.Popen:
    """Start the run, or go on with it, in a process group of its own."""
    out = Path(settings.output)
    serve = f"{shlex.join(program('bench/rounds_kills.py'))} serve {{model}} {{port}} {out}/run.asked"
    values = {
        "output": out / "run", "model": settings.model, "questions": out / "q.jsonl", "image_root": settings.world,
        "open_questions": out / "open.jsonl", "held_out": out / "q.jsonl", "num_rounds": settings.rounds, "patience": 0,
        "num_samples": NUM_SAMPLES, "questions_per_round": NUM_QUESTIONS * 2 // 3, "serve": serve,
        "sampling": json.dumps({"max_new_tokens": 40, "concurrency": CONCURRENCY}),
        "training": json.dumps({"max_steps": 6, "save_steps": 2, "pairs_per_step": 4, "num_eval_samples": 0}),
        "evaluation": json.dumps({"limit": 2, "max_new_tokens": 4, "image_root": settings.world}),
    }  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    with open(out / "run.log", "ab") as log:
        return subprocess.Popen([*program("-m internvl_mpo.rounds"), *words], stdout=log, stderr=log,
                                start_new_session=True, env={"OMP_NUM_THREADS": "1", **os.environ})  # fmt: skip


class Moment(NamedTuple):
    """When a kill is to come: after so much processor time of a stage."""

    stage: str
    seconds: float


def draw_moments(stages: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[Moment]:
    """Return moments in the order in which a run comes to them; every stage has one before any has two.

    Args:
        stages: `name` and `cpu_seconds` of every stage, in order.
        count: of moments.
        seed: of the draw.
    """
    rng, drawn = random.Random(seed), Counter[int]()
    while drawn.total() < count:
        drawn.update(rng.sample(range(len(stages)), min(len(stages), count - drawn.total())))
    return [
        Moment(stages[place]["name"], stages[place]["cpu_seconds"] * share)
        for place in sorted(drawn)
        for share in sorted(rng.random() for _ in range(drawn[place]))
    ]


def kill_often(settings: Settings, moments: Iterable[Moment]) -> list[str]:
    """Kill the run at these moments and let it end; return the stage that ran at each kill."""
    out, killed = Path(settings.output), []
    for moment in moments:
        begin = (out / "run.log").stat().st_size if (out / "run.log").exists() else 0
        process = start(settings)
        wait_for(moment, process, out, begin)
        if process.poll() is not None:
            raise BadInputError(f"the run ended before {moment.stage} could be killed; see {out / 'run.log'}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(begun(out / "run.log", begin)[-1])
        print(f"killed in {killed[-1]}", flush=True)
    end_of(start(settings), out / "run.log")
    return killed


def wait_for(moment: Moment, process: subprocess.Popen, out: Path, begin: int) -> None:
    """Wait until a stage has taken so much processor time, the next one has begun, or the run is over."""
    before = None
    while process.poll() is None:
        names = begun(out / "run.log", begin)
        if moment.stage in names:
            before = group_seconds(process.pid) if before is None else before
            if names[-1] != moment.stage or group_seconds(process.pid) - before >= moment.seconds:
                return
        time.sleep(SECONDS_BETWEEN_LOOKS)


def begun(log: Path, begin: int) -> list[str]:
    """Return the names of the stages that were started since the log had so many bytes."""
    with open(log, "rb") as file:
        file.seek(begin)
        return re.findall(r"^([\w.]+): .*\n\$ ", file.read().decode(errors="replace"), re.MULTILINE)


def group_seconds(group: int) -> float:
    """Return the processor time of the processes of a group and of their children that have ended, in seconds."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            values = path.read_text().rpartition(")")[2].split()
            ticks += sum(map(int, values[11:15])) if int(values[2]) == group else 0
    return ticks / os.sysconf("SC_CLK_TCK")


def end_of(process: subprocess.Popen, log: Path) -> None:
    """Wait for a run.

    Raises:
        BadInputError: it failed.
    """
    if process.wait():
        raise BadInputError(f"the run ended with exit code {process.returncode}; see {log}")


def differences(whole: Path, killed: Path, rounds: int) -> Iterator[str]:
    """Yield what is not the same in two runs."""
    names = ("questions", "open_questions", "pass_rates", "responses", "open_responses", "pairs_correctness",
             "pairs_dropout_ntp")  # fmt: skip
    files = sorted(path.relative_to(whole) for name in names for path in whole.rglob(f"{name}.jsonl"))
    if len(files) != rounds * len(names):
        yield f"{len(files)} files of rows, expected {rounds * len(names)}"
    for name in files:
        if not (killed / name).is_file() or (whole / name).read_bytes() != (killed / name).read_bytes():
            yield f"{name} differs"
    logs = sorted(path.relative_to(whole) for path in whole.rglob("log.jsonl"))
    for name in logs:
        if losses(whole / name) != losses(killed / name):
            yield f"the losses in {name} differ"


def losses(path: Path) -> dict[int, float]:
    """Return the loss of every step; of one that was done twice the last."""
    return {row["step"]: row["loss"] for row in read_whole_lines(path) if "loss" in row}


def asked_twice(out: Path, kills: int) -> Iterator[str]:
    """Yield a line if more was asked for again than can have been in flight."""
    whole, killed = (Counter((out / f"{name}.asked").read_text(encoding="utf-8").splitlines())
                     for name in ("whole", "run"))  # fmt: skip
    again = sum(killed.values()) - len(killed)
    print(f"{len(killed)} requests were sent, {again} of them again; unbroken {len(whole)}")
    if len(killed) != len(whole) or again > kills * CONCURRENCY or max(whole.values()) > 1:
        yield f"{again} requests were sent again after {kills} kills with {CONCURRENCY} in flight"


if __name__ == "__main__":
    sys.exit(run_program(main))
