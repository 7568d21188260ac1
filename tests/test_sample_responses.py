"""Sampling and Dropout-NTP as programs: on a tiny model, through HTTP and Ray, and killed in the middle."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny_world import make_model_folder, make_questions

from dataset_scripts import build_dropout_ntp_pairs, sample_responses
from internvl_mpo.engines import Reply
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.serve import BatchServer
from internvl_mpo.errors import run_program
from internvl_mpo.records import PreferencePair, Response, read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_model_folder(folder / "model")
    make_questions(folder)
    return folder


def arguments(world: Path, output: Path, **settings) -> list[str]:
    values = {
        "model": world / "model",
        "questions": world / "questions.jsonl",
        "image_root": world,
        "output": output,
        "num_samples": 3,
        "max_new_tokens": 12,
        **settings,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def sample(world: Path, output: Path, **settings) -> int:
    return run_program(sample_responses.main, arguments(world, output, **settings))


def test_rows_come_in_the_order_of_the_questions_with_provenance(world, tmp_path):
    assert sample(world, tmp_path / "out.jsonl") == 0
    rows = read_rows(tmp_path / "out.jsonl", Response)
    assert len(rows) == 18
    assert [row.answer for row in rows] == [str(1 + i // 3) for i in range(18)]
    first = rows[0]
    assert first.question.startswith("Your task is to answer the question below.")
    assert first.source == "questions"
    made = first.provenance
    assert made["original_question"] == "What is 0 and one?"
    assert (made["engine"], made["style"], made["temperature"], made["top_k"]) == ("transformers", "cot", 1.0, 50)
    assert made["revision"]
    assert len({row.provenance["seed"] for row in rows}) == 18
    assert len({row.id for row in rows}) == 18
    assert not (tmp_path / "out.jsonl.part").exists()


def test_same_seed_same_bytes_whatever_the_batch(world, tmp_path):
    sample(world, tmp_path / "a.jsonl", batch_size=64)
    sample(world, tmp_path / "b.jsonl", batch_size=4)
    sample(world, tmp_path / "c.jsonl", seed=1)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes() != (tmp_path / "c.jsonl").read_bytes()


def test_a_finished_file_is_extended_without_asking_again(world, tmp_path, monkeypatch):
    sample(world, tmp_path / "three.jsonl")
    sample(world, tmp_path / "out.jsonl", num_samples=1)
    asked: list[str] = []
    answer = InternVLEngine.generate

    def counting(self, requests, done=()):
        for reply in answer(self, requests, done):
            asked.append(reply.id)
            yield reply

    monkeypatch.setattr(InternVLEngine, "generate", counting)
    sample(world, tmp_path / "out.jsonl")
    assert len(asked) == 12
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "three.jsonl").read_bytes()


def test_other_settings_do_not_overwrite(world, tmp_path, capsys):
    sample(world, tmp_path / "out.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 2  # the settings beside the output stay those of the output
    assert sample(world, tmp_path / "out.jsonl", temperature=0.5) == 2
    assert "other questions or settings" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_a_missing_picture_is_named_and_asked_for_again(world, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    rows = [{"image": "here.png", "question": "What?"}, {"image": "1.png", "question": "What?"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sample(world, tmp_path / "out.jsonl", questions=questions) == 1
    assert "3 replies are missing" in capsys.readouterr().err
    assert len(read_rows(tmp_path / "out.jsonl", Response)) == 3
    missing = (tmp_path / "out.jsonl.missing.jsonl").read_text().splitlines()
    assert len(missing) == 3
    assert "here.png" in missing[0]
    picture = world / "here.png"
    picture.write_bytes((world / "1.png").read_bytes())
    try:
        assert sample(world, tmp_path / "out.jsonl", questions=questions) == 0
    finally:
        picture.unlink()
    assert len(read_rows(tmp_path / "out.jsonl", Response)) == 6
    assert not (tmp_path / "out.jsonl.missing.jsonl").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "chain"}, "unknown style 'chain'"),
        ({"temperature": 0}, "temperature 0 gives equal samples"),
        ({"questions": "none.jsonl"}, "'none.jsonl' does not exist"),
        ({"num_sample": 3}, "did you mean 'num_samples'"),
    ],
)
def test_bad_settings_end_with_one_sentence(world, tmp_path, capsys, settings, message):
    assert sample(world, tmp_path / "out.jsonl", **settings) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out.jsonl").exists()


def test_through_http_the_same_replies(world, tmp_path):
    sample(world, tmp_path / "local.jsonl")
    server = BatchServer(InternVLEngine(world / "model"), "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert sample(world, tmp_path / "http.jsonl", engine="http", base_url=server.url, model="served") == 0
    finally:
        server.shutdown()
        server.server_close()
    local, remote = (read_rows(tmp_path / name, Response) for name in ("local.jsonl", "http.jsonl"))
    assert [row.response for row in remote] == [row.response for row in local]
    assert {(row.provenance["engine"], row.provenance["model"]) for row in remote} == {("http", "served")}


class CountingServer(ThreadingHTTPServer):
    """Answers every chat completion with its seed after a moment, and counts how often each was asked for."""

    daemon_threads = True

    def __init__(self):
        asked = self.asked = Counter()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send({"data": [{"id": "m"}]})

            def do_POST(self) -> None:
                seed = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["seed"]
                asked[seed] += 1
                time.sleep(0.02)
                self.send({"choices": [{"message": {"content": f"drawn with {seed}"}, "finish_reason": "stop"}]})

            def send(self, content: dict) -> None:
                body = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """The killed client is no news."""


@pytest.mark.slow
def test_killed_through_http_nothing_but_what_was_in_flight_is_paid_for_twice(world, tmp_path):
    server = CountingServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    settings = {"engine": "http", "base_url": server.url, "model": "m", "num_samples": 50, "concurrency": 4}
    try:
        assert sample(world, tmp_path / "unbroken.jsonl", **settings) == 0
        assert set(server.asked.values()) == {1}
        assert len(server.asked) == 300
        server.asked.clear()
        for goal in (40, 120):
            program = [sys.executable, str(ROOT / "dataset_scripts" / "sample_responses.py")]
            process = subprocess.Popen([*program, *arguments(world, output, **settings)], stdout=subprocess.DEVNULL)
            while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") >= goal):
                time.sleep(0.005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        assert sample(world, output, **settings) == 0
    finally:
        server.shutdown()
        server.server_close()
    assert output.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    assert len(server.asked) == 300
    assert sum(server.asked.values()) <= 300 + 2 * 2 * 4  # two kills; sent, or answered and not yet kept


@pytest.mark.slow
def test_through_ray_the_same_bytes(world, tmp_path):
    pytest.importorskip("ray", reason="needs ray[data]")
    sample(world, tmp_path / "local.jsonl")
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from dataset_scripts import sample_responses
from internvl_mpo.errors import run_program
sys.exit(run_program(sample_responses.main))
"""
    output = tmp_path / "ray.jsonl"
    command = [sys.executable, "-c", code, *arguments(world, output, runner="ray", num_actors=2)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert output.read_bytes() == (tmp_path / "local.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_file(world, tmp_path, monkeypatch):
    settings = {"num_samples": 30, "batch_size": 4, "max_new_tokens": 24}
    sample(world, tmp_path / "unbroken.jsonl", **settings)
    output = tmp_path / "out.jsonl"
    program = ROOT / "dataset_scripts" / "sample_responses.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    part = tmp_path / "out.jsonl.part"
    kept = [0]
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, str(program), *arguments(world, output, **settings)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if part.exists() and part.read_bytes().count(b"\n") >= kept[-1] + 20:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            break
        kept.append(part.read_bytes().count(b"\n"))
    assert len(kept) > 1  # it was killed in the middle at least once
    assert kept == sorted(kept)
    left = 180 - kept[-1]
    asked: list[int] = []
    answer = InternVLEngine._answer
    monkeypatch.setattr(InternVLEngine, "_answer", lambda self, batch: asked.append(len(batch)) or answer(self, batch))
    assert sample(world, output, **settings) == 0
    assert sum(asked) <= left + 2 * 4  # nothing that was kept is paid for again, but for the batches in flight
    assert output.read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()


def test_questions_of_a_hub_dataset_bring_their_pictures(world, tmp_path):
    import datasets
    from PIL import Image

    table = datasets.Dataset.from_dict(
        {"question": ["What?", "Why?"], "answer": [1, 2], "image": [str(world / "1.png"), str(world / "2.png")]}
    ).cast_column("image", datasets.Image())
    folder = tmp_path / "dataset"
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))
    assert sample(world, tmp_path / "out.jsonl", questions=f"hub:{folder}", image_root=tmp_path / "pictures") == 0
    rows = read_rows(tmp_path / "out.jsonl", Response)
    assert [(row.answer, row.source) for row in rows[::3]] == [("1", "dataset"), ("2", "dataset")]
    with Image.open(tmp_path / "pictures" / rows[0].images[0]) as saved, Image.open(world / "1.png") as original:
        assert saved.tobytes() == original.tobytes()


# Dropout-NTP


@pytest.fixture(scope="module")
def responses(world) -> Path:
    path = world / "chosen.jsonl"
    texts = ["The picture shows two red things on a table.", "图中有一只白色的猫和一只黑色的狗", "One", ""]
    rows = [
        Response(
            question_id=f"q{i}",
            images=(f"{i + 1}.png",),
            question=f"<image>\nDescribe it, version {i}.",
            response=text,
            source="s",
            provenance={"finish_reason": "stop", "num_tokens": 10},
        )
        for i, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def drop(world: Path, responses: Path, output: Path, **settings) -> int:
    values = {
        "model": world / "model",
        "responses": responses,
        "output": output,
        "max_new_tokens": 8,
        "keep_truncated": True,
        **settings,
    }
    argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return run_program(build_dropout_ntp_pairs.main, argv)


def test_dropout_ntp_keeps_the_prefix_and_never_sees_the_image(world, responses, tmp_path, monkeypatch, capsys):
    seen = []
    answer = InternVLEngine.generate

    def watching(self, requests, done=()):
        requests = list(requests)
        seen.extend(requests)
        return answer(self, requests, done)

    monkeypatch.setattr(InternVLEngine, "generate", watching)
    assert drop(world, responses, tmp_path / "pairs.jsonl", num_continuations=2) == 0
    pairs = read_rows(tmp_path / "pairs.jsonl", PreferencePair)
    assert len(pairs) == 4
    assert all(not request.images and "<image>" not in request.question for request in seen)
    for pair in pairs:
        half = pair.chosen[: pair.provenance["prefix_chars"]]
        assert half in ("The picture shows two", "图中有一只白色的")
        assert pair.rejected.startswith(half)
        assert pair.rejected != pair.chosen
        assert pair.images and pair.question.startswith("<image>")
        assert pair.rule == "dropout_ntp"
    said = capsys.readouterr().out
    assert "18.0 generated tokens per pair" in said
    assert "1 empty responses, 1 responses too short to cut" in said


def test_dropout_ntp_with_image_and_without_prefix(world, responses, tmp_path):
    settings = {"ratio": 0.0, "with_image": True, "image_root": world}
    assert drop(world, responses, tmp_path / "pairs.jsonl", **settings) == 0
    pairs = read_rows(tmp_path / "pairs.jsonl", PreferencePair)
    assert len(pairs) == 3
    assert {pair.rule for pair in pairs} == {"prefix_with_image"}


def test_dropout_ntp_continuation_equal_to_chosen_is_left_out(world, responses, tmp_path, monkeypatch, capsys):
    answer = InternVLEngine.generate

    def parrot(self, requests, done=()):
        import dataclasses

        for reply in answer(self, requests, done):
            yield dataclasses.replace(reply, text=" red things on a table.", finish_reason="stop")

    monkeypatch.setattr(InternVLEngine, "generate", parrot)
    assert drop(world, responses, tmp_path / "pairs.jsonl") == 0
    assert "1 continuations equal to the chosen response" in capsys.readouterr().out
    (pair,) = read_rows(tmp_path / "pairs.jsonl", PreferencePair)
    assert pair.rejected == "图中有一只白色的 red things on a table."


def test_dropout_ntp_asks_again_only_for_what_is_missing(world, responses, tmp_path, monkeypatch):
    """Neither for pairs in the output nor for continuations that make none, though these are not in it."""
    asked, broken = [], {"图中有一只白色的"}

    def answer(self, requests, done=()):
        for request in requests:
            if request.id in done:
                continue
            asked.append((request.prefix, request.seed))
            words = " red things on a table." if len(asked) == 1 else f" no{len(asked)}"
            error = "no server" if request.prefix in broken else None
            yield Reply(id=request.id, text=words, finish_reason="stop", num_tokens=1, error=error)

    monkeypatch.setattr(InternVLEngine, "generate", answer)
    output = tmp_path / "pairs.jsonl"
    assert drop(world, responses, output, num_continuations=2) == 1
    assert len(read_rows(output, PreferencePair)) == 1
    broken.clear()
    first = asked.copy()
    assert drop(world, responses, output, num_continuations=2) == 0
    assert asked[len(first) :] == [entry for entry in first if entry[0] == "图中有一只白色的"]
    pairs = read_rows(output, PreferencePair)
    assert [pair.rejected for pair in pairs] == [
        "The picture shows two no2",
        "图中有一只白色的 no5",
        "图中有一只白色的 no6",
    ]
    first = asked.copy()
    assert drop(world, responses, output, num_continuations=2) == 0  # finished, and the same command once more
    assert asked == first
    assert read_rows(output, PreferencePair) == pairs


def test_dropout_ntp_is_extended_without_asking_again(world, responses, tmp_path, monkeypatch):
    assert drop(world, responses, tmp_path / "two.jsonl", num_continuations=2) == 0
    assert drop(world, responses, tmp_path / "pairs.jsonl") == 0
    answer, asked = InternVLEngine.generate, []

    def counting(self, requests, done=()):
        for reply in answer(self, requests, done):
            asked.append(reply.id)
            yield reply

    monkeypatch.setattr(InternVLEngine, "generate", counting)
    assert drop(world, responses, tmp_path / "pairs.jsonl", num_continuations=2) == 0
    assert len(asked) == 2
    assert (tmp_path / "pairs.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
