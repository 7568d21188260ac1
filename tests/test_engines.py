"""The engine in this process, on a tiny random model."""

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_world import make_model_folder, make_pictures

from internvl_mpo.engines import Draft, Reply, Request, Sampling
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.journal import Journal, sample_seed
from internvl_mpo.engines.loading import load_engine
from internvl_mpo.engines.local import SeededDraw, draw_tokens
from internvl_mpo.engines.revision import model_revision
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import iter_jsonl

DRAWN = Sampling(temperature=1.0, top_k=50, max_new_tokens=8)
GREEDY = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_folder) -> InternVLEngine:
    return InternVLEngine(model_folder, batch_size=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def ask(engine, requests, **kwargs) -> dict[str, Reply]:
    replies = list(engine.generate(requests, **kwargs))
    assert len({reply.id for reply in replies}) == len(replies)
    return {reply.id: reply for reply in replies}


def sampled(pictures) -> list[Request]:
    return [
        Request(
            id=f"{number}.{sample}",
            question="What is it?" * (1 + number),
            images=(pictures[number],) if number < 3 else (),
            seed=10 * number + sample,
            sampling=DRAWN,
        )
        for number in range(4)
        for sample in range(3)
    ]


def test_a_reply_depends_on_its_seed_and_not_on_its_batch(engine, pictures):
    requests = sampled(pictures)
    expected = ask(engine, requests)
    assert len({reply.text for reply in expected.values()}) > 6
    engine.batch_size = 5
    assert ask(engine, requests[::-1]) == expected
    assert ask(engine, requests[4:5]) == {requests[4].id: expected[requests[4].id]}
    engine.batch_size = 8


def test_done_requests_are_not_answered_again(engine, pictures):
    requests = sampled(pictures)
    expected = ask(engine, requests)
    done = {request.id for request in requests[:5]}
    assert ask(engine, requests, done=done) == {id: r for id, r in expected.items() if id not in done}


def test_greedy_says_what_chat_says(engine, pictures):
    replies = ask(
        engine,
        [
            Request(id="image", question="Say it", images=(pictures[2],), sampling=GREEDY),
            Request(id="placeholder", question="<image>\nSay it", images=(pictures[2],), sampling=GREEDY),
            Request(id="text", question="你好", sampling=GREEDY),
        ],
    )
    with Image.open(pictures[2]) as image:
        tiles = engine.processor.image_processor(image)["pixel_values"]
    settings = {"max_new_tokens": 8, "do_sample": False}
    said = engine.model.chat(engine.tokenizer, tiles, "Say it", dict(settings))
    assert replies["image"].text == replies["placeholder"].text == said
    assert replies["text"].text == engine.model.chat(engine.tokenizer, None, "你好", dict(settings))


def test_control_and_image_tokens_are_never_said(engine, pictures):
    vocab = engine.tokenizer.get_vocab()
    for token in ("<IMG_CONTEXT>", "<img>", "</img>", "<|im_start|>", "<|user|>"):
        assert engine.suppressed[vocab[token]]
    for token in ("<|im_end|>", "<box>", "</ref>"):
        assert not engine.suppressed[vocab[token]]
    requests = [
        Request(id=str(seed), question="?", seed=seed, sampling=Sampling(temperature=9.0, max_new_tokens=64))
        for seed in range(16)
    ]
    assert not any("<IMG_CONTEXT>" in reply.text or "<|im_" in reply.text for reply in ask(engine, requests).values())


def test_end_of_turn_stops_and_is_counted(engine):
    requests = [
        Request(id=str(seed), question="?", seed=seed, sampling=Sampling(temperature=9.0, max_new_tokens=400))
        for seed in range(8)
    ]
    replies = ask(engine, requests)
    stopped = [reply for reply in replies.values() if reply.finish_reason == "stop"]
    assert stopped
    assert all(reply.num_tokens <= 400 for reply in stopped)
    assert not any("<|im_end|>" in reply.text for reply in stopped)


def test_a_broken_request_costs_only_itself(engine, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures[2]).read_bytes()[:60])
    replies = ask(
        engine,
        [
            Request(id="good", question="Say it", images=(pictures[0],), sampling=GREEDY),
            Request(id="broken", question="Say it", images=(str(broken),), sampling=GREEDY),
            Request(id="missing", question="Say it", images=("none.png",), sampling=GREEDY),
            Request(id="two", question="<image> <image>", images=(pictures[0],), sampling=GREEDY),
            Request(id="spelled", question="<IMG_CONTEXT>", sampling=GREEDY),
        ],
    )
    assert {id for id, reply in replies.items() if reply.error} == {"broken", "missing", "two", "spelled"}
    assert replies["good"].text


def test_prefix_is_continued_not_repeated(engine):
    prompt = engine.render("Tell", 0, "The cat sat")
    assert prompt.endswith("assistant\nThe cat sat")
    (reply,) = engine.generate([Request(id="p", question="Tell", prefix="The cat sat", sampling=GREEDY)])
    ids = engine.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = engine.model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0]
    assert prompt + reply.text == engine.tokenizer.decode(expected)


def test_draw_follows_the_distribution_and_its_limits():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    uniforms = (torch.arange(1000) + 0.5) / 1000
    plain = Sampling(temperature=1.0)
    counts = torch.bincount(draw_tokens(logits.expand(1000, 4), plain, uniforms), minlength=4)
    assert counts.tolist() == [100, 200, 300, 400]
    top_k = draw_tokens(logits.expand(1000, 4), Sampling(temperature=1.0, top_k=2), uniforms)
    assert set(top_k.tolist()) == {2, 3}
    top_p = draw_tokens(logits.expand(1000, 4), Sampling(temperature=1.0, top_p=0.65), uniforms)
    assert set(top_p.tolist()) == {2, 3}
    assert draw_tokens(logits, Sampling(), None).tolist() == [3]


def test_revision_changes_with_the_weights(model_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert model_revision(str(copy)) == model_revision(str(model_folder))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_revision(str(copy)) != model_revision(str(model_folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "http"}, "needs --base_url"),
        ({}, "needs --model"),
        ({"model": "m", "temperature": -1.0}, "temperature is -1.0"),
        ({"model": "m", "top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_impossible_settings_are_refused_before_loading(values, message):
    with pytest.raises(BadInputError, match=message):
        EngineSettings(**values).sampling(8)


def test_a_folder_without_a_model_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="cannot load a model"):
        load_engine(EngineSettings(model=str(tmp_path)))


# The journal


@pytest.mark.parametrize("torn", [b'{"id": "3", "text": "to', b'{"id": "3", "text": "torn before its line end"}'])
def test_journal_survives_a_torn_line(tmp_path, torn):
    output = tmp_path / "out.jsonl"
    with Journal(output) as journal:
        for number in range(3):
            journal.append(Reply(id=str(number), text="ü" * number, finish_reason="stop", num_tokens=1))
    with open(tmp_path / "out.jsonl.part", "ab") as part:
        part.write(torn)
    with Journal(output) as journal:
        assert len(journal) == 3
        journal.append(Reply(id="3", text="new", finish_reason="stop", num_tokens=1))
    with Journal(output, reply_of=lambda row: Reply(id=row["id"])) as journal:
        assert [journal[str(number)].text for number in range(4)] == ["", "ü", "üü", "new"]
        assert journal.finish({"id": str(number)} for number in range(4)) == 4
    assert not (tmp_path / "out.jsonl.part").exists()
    assert len(output.read_text().splitlines()) == 4


def test_journal_refuses_replies_of_other_settings(tmp_path):
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.append(Reply(id="old", text="x", finish_reason="stop", num_tokens=1))
        with pytest.raises(BadInputError, match="1 replies to other questions or settings"):
            journal.check(["new"])
        journal.check(["old", "new"])


def test_a_kept_reply_is_on_its_way_to_disk_at_once(tmp_path):
    with Journal(tmp_path / "out.jsonl") as journal:
        for number in range(1, 4):
            journal.append(Reply(id=str(number), text="x"))
            assert (tmp_path / "out.jsonl.part").read_bytes().count(b"\n") == number


def test_two_runs_do_not_write_one_output(tmp_path):
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.append(Reply(id="1", text="x"))
        with pytest.raises(BadInputError, match="another run is writing"):
            Journal(tmp_path / "out.jsonl")
        assert journal["1"].text == "x"
    with Journal(tmp_path / "out.jsonl") as journal:
        assert len(journal) == 1


def test_rows_of_another_program_are_not_taken_for_replies(tmp_path):
    (tmp_path / "out.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(BadInputError, match=r"out.jsonl:1 was not written by this program"):
        Journal(tmp_path / "out.jsonl", reply_of=lambda row: Reply(id=row["provenance"]["request"]))
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "1"}\n'


def test_half_a_character_does_not_cost_the_output(tmp_path):
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.append(Reply(id="1", text="\ud83d"))
    with Journal(tmp_path / "out.jsonl") as journal:
        journal.finish([{"id": "1", "text": journal["1"].text}])
    assert [row for _, row in iter_jsonl(tmp_path / "out.jsonl")] == [{"id": "1", "text": "\ud83d"}]


def test_seeds_differ_by_question_and_sample_and_fit_31_bits():
    seeds = {sample_seed(0, f"q{question}", sample) for question in range(50) for sample in range(20)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert sample_seed(1, "q0", 0) not in seeds


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the module, which has an environment of its own; `bench/vllm_check.py` asks the real one."""
    started, calls = [], []

    class LLM:
        def __init__(self, **settings):
            started.append(settings)

        def chat(self, conversations, params, **kwargs):
            texts = [conversation[-1]["content"] for conversation in conversations]
            calls.append((texts, params, kwargs))
            if any("too long" in text for text in texts):
                raise ValueError("The decoder prompt (length 5000) is longer than the maximum model length of 1024.")
            reasons = ["abort" if "B?" in text else "stop" for text in texts]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=" hi", finish_reason=r, token_ids=[1])]) for r in reasons
            ]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams, module.CompletionOutput = LLM, lambda **kwargs: kwargs, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.delitem(sys.modules, "internvl_mpo.engines.vllm_engine", raising=False)
    return SimpleNamespace(started=started, calls=calls)


def test_vllm_is_asked_as_its_interface_wants(vllm, model_folder, pictures):
    engine = load_engine(EngineSettings(model=str(model_folder), engine="vllm", max_tiles=6))
    assert not vllm.started
    replies = ask(
        engine,
        [
            Request(id="a", question="A?", seed=3, sampling=DRAWN),
            Request(id="b", question="B?", sampling=DRAWN),
            Request(id="c", question="C?", prefix="So", sampling=DRAWN),
            Request(id="d", question="D?", images=("none.png",), sampling=DRAWN),
            Request(id="e", question="<image> <image>", images=tuple(pictures[:2]), sampling=DRAWN),
        ],
    )
    assert (replies["a"].text, replies["c"].text, replies["e"].text) == ("hi", " hi", "hi")
    assert replies["b"].error == "vLLM ended with 'abort'"
    assert "none.png" in replies["d"].error
    assert [one["limit_mm_per_prompt"] for one in vllm.started] == [{"image": 2}]
    plain, continued, two = vllm.calls
    assert plain[1][0] == {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "max_tokens": 8, "seed": 3}
    assert (plain[2]["add_generation_prompt"], plain[2]["continue_final_message"]) == (True, False)
    assert (continued[2]["add_generation_prompt"], continued[2]["continue_final_message"]) == (False, True)
    assert continued[0] == ["So"]
    assert [one[2]["mm_processor_kwargs"] for one in vllm.calls] == [None, None, {"max_dynamic_patch": 3}]
    assert len(two[0]) == 1


def test_a_prompt_that_vllm_refuses_costs_only_itself(vllm, model_folder):
    engine = load_engine(EngineSettings(model=str(model_folder), engine="vllm"))
    questions = {str(number): "too long" if number in (3, 40) else f"q{number}" for number in range(64)}
    replies = ask(engine, [Request(id=id, question=text, sampling=DRAWN) for id, text in questions.items()])
    assert {id for id, reply in replies.items() if reply.error} == {"3", "40"}
    assert "longer than the maximum model length" in replies["3"].error
    assert len(vllm.calls) < 30


def test_vllm_is_started_anew_for_more_pictures(vllm, model_folder, pictures, monkeypatch):
    engine = load_engine(EngineSettings(model=str(model_folder), engine="vllm"))
    monkeypatch.setattr("internvl_mpo.engines.vllm_engine.WINDOW", 2)
    counts = [0, 1, 1, 0, 3, 1]
    requests = [Request(id=str(n), question="?", images=(pictures[0],) * count) for n, count in enumerate(counts)]
    assert not any(reply.error for reply in ask(engine, requests).values())
    assert [one["limit_mm_per_prompt"]["image"] for one in vllm.started] == [1, 3]


def test_a_seed_gives_its_numbers_however_many_are_drawn_together():
    sampling, steps = Sampling(temperature=1.0), 150
    logits = torch.linspace(0, 3, 50).expand(3, 50)
    draw, seeds = SeededDraw([4, 5, 6], sampling), (4, 6)
    rows = [draw.next_tokens(logits[:2], [0, 2]).tolist() for _ in range(steps)]
    at_once = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    assert rows == [draw_tokens(logits[:2], sampling, at_once[:, step]).tolist() for step in range(steps)]


def test_a_reply_takes_memory_as_it_grows_not_as_it_might(engine):
    class Reader(Draft):
        def add(self, piece):
            super().add(piece)
            if self.num_pieces == 5:
                self.stop()

    wanted = Sampling(temperature=1.0, max_new_tokens=10**12)
    reply = ask(engine, [Request(id="x", question="?", seed=1, sampling=wanted, draft=Reader(threading.Event()))])["x"]
    assert (reply.finish_reason, reply.num_tokens) == ("stopped", 5)
