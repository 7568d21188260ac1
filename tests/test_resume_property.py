"""What is kept between runs, against doing it all again: any prefix of a journal, any edit of files, any setting.

pytest tests/test_resume_property.py
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_processor

from dataset_scripts import sample_responses
from internvl_mpo.encoding import measure_group, pair_size
from internvl_mpo.engines import Reply
from internvl_mpo.errors import run_program
from internvl_mpo.records import PreferencePair, RowError
from internvl_mpo.token_weights import TokenWeights
from internvl_mpo.training.identity import reference_identity
from internvl_mpo.training.preflight import Preflight
from internvl_mpo.training.reference_cache import ReferenceCache, model_digest

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


# --- sample_responses.py from any prefix of its journal ---------------------------------------------------------------


class Scribe:
    """An engine without a model, which counts what it is asked."""

    name, model_id, revision = "scribe", "none", "1"

    def __init__(self, dies: bool = False):
        self.asked: list[str] = []
        self.dies = dies

    def generate(self, requests, done=()):
        for request in requests:
            if request.id not in done:
                self.asked.append(request.id)
                text = f"{request.seed} 好 \u2028 {request.question[:5]}"
                yield Reply(id=request.id, text=text, finish_reason="stop", num_tokens=3)
        if self.dies:
            raise KeyboardInterrupt


def sampled(folder: Path, monkeypatch: pytest.MonkeyPatch, engine: Scribe) -> int:
    monkeypatch.setattr(sample_responses, "load_engine", lambda settings: engine)
    values = {"model": "any", "questions": folder / "q.jsonl", "output": folder / "out.jsonl", "num_samples": 3}
    return run_program(sample_responses.main, [part for key, v in values.items() for part in (f"--{key}", str(v))])


@SHARED_FOLDER
@given(data=st.data())
def test_from_any_prefix_of_its_journal_the_output_is_that_of_an_unbroken_run(tmp_path, monkeypatch, data):
    output, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    rows = [{"question": f"What is {number}?", "answer": str(number)} for number in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in (output, part):
        path.unlink(missing_ok=True)
    assert sampled(tmp_path, monkeypatch, Scribe(dies=True)) == 130
    journal = part.read_bytes()
    assert sampled(tmp_path, monkeypatch, unbroken := Scribe()) == 0
    assert unbroken.asked == [] and not part.exists()
    expected = output.read_bytes()
    assert len(expected.splitlines()) == 12

    cut = data.draw(st.integers(0, len(journal)))
    output.unlink()
    part.write_bytes(journal[:cut])
    resumed = Scribe()
    assert sampled(tmp_path, monkeypatch, resumed) == 0
    assert output.read_bytes() == expected
    assert len(resumed.asked) == 12 - journal[:cut].count(b"\n")  # a torn line is asked for once more, no other
    assert not part.exists()


# --- the pre-flight cache against a fresh look ------------------------------------------------------------------------

NUM_BYTES = 2000  # of every picture: a rewritten one has the size of the old one


def draw_picture(path: Path, width: int, height: int, tick: int) -> None:
    Image.new("RGB", (width, height)).save(path, "PNG")
    path.write_bytes(path.read_bytes().ljust(NUM_BYTES, b"\0"))
    os.utime(path, ns=(tick, tick))


def processors() -> list:
    """The usual one, then each with one other setting."""
    made = [tiny_processor() for _ in range(4)]
    made[1].image_processor.use_thumbnail = not made[1].image_processor.use_thumbnail
    made[2].num_image_token += 1
    made[3].chat_template = "{{ 'Hello. ' }}" + made[3].chat_template
    return made


PICTURES = [("0.png",), ("1.png",), ("0.png", "1.png"), ()]  # of four rows, two in each subset
EDITS = st.one_of(
    st.tuples(st.just("picture"), st.sampled_from("01"), st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.just("remove"), st.sampled_from("01")),
    st.tuples(st.just("text"), st.integers(0, 3), st.text("ab ", min_size=1, max_size=9)),
    st.tuples(st.just("cap"), st.integers(0, 1), st.sampled_from([None, 1, 3])),
    st.tuples(st.just("processor"), st.integers(0, 3)),
)


def write_data(folder: Path, texts: list[str], caps: list[int | None]) -> list[tuple[PreferencePair, int | None]]:
    """Write two subsets of two rows, each subset with its cap on tiles; return the pairs with theirs."""
    meta, pairs = {}, []
    for subset, cap in enumerate(caps):
        lines = []
        for number in (2 * subset, 2 * subset + 1):
            names = PICTURES[number]
            row = {"image": list(names), "question": "<image>" * len(names) + "Which?", "rejected": "no"}
            lines.append(json.dumps({**row, "chosen": texts[number]}) + "\n")
            pairs.append((PreferencePair.from_json(json.loads(lines[-1])), cap))
        (folder / f"{subset}.jsonl").write_text("".join(lines))
        meta[f"s{subset}"] = {"root": ".", "annotation": f"{subset}.jsonl", "repeat_time": 1}
        if cap:
            meta[f"s{subset}"]["max_dynamic_patch"] = cap
    (folder / "meta.json").write_text(json.dumps(meta))
    return pairs


@SHARED_FOLDER
@given(edits=st.lists(EDITS, min_size=1, max_size=4))
def test_the_pre_flight_cache_says_what_a_fresh_look_says_after_any_edits(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("edits")
    for number in "01":
        draw_picture(folder / f"{number}.png", 84, 28, tick=1)
    texts, caps, processor = ["yes"] * 4, [None, None], 0
    made = processors()
    for tick, edit in enumerate([("nothing",), *edits], start=2):
        kind, *what = edit
        if kind == "picture":
            draw_picture(folder / f"{what[0]}.png", 28 * what[1], 28 * what[2], tick)
        elif kind == "remove":
            (folder / f"{what[0]}.png").unlink(missing_ok=True)
        elif kind == "text":
            texts[what[0]] = f"x{what[1]}"
        elif kind == "cap":
            caps[what[0]] = what[1]
        elif kind == "processor":
            processor = what[0]
        pairs = write_data(folder, texts, caps)
        limits = {"max_tiles": 4, "max_length": 700}
        table = Preflight(made[processor], folder / "cache", [folder / "meta.json"], num_workers=0, **limits).run()
        sizes, reasons = [], []
        for pair, cap in pairs:
            try:
                own = {**limits, "max_tiles": cap or 4}
                sizes.append(pair_size(measure_group(made[processor], [pair], folder, **own)))
            except RowError as error:
                reasons.append(error.reason)
        assert [table.size(index) for index in range(len(table))] == sizes
        assert [reason for _, _, reason in table.unusable] == reasons


# --- the reference cache against every setting that can change a log-prob ---------------------------------------------

USUAL = {
    **{"model": "start", "max_tiles": 12, "max_length": 6144, "bf16": False, "fp16": False, "load_in_4bit": False},
    **{"process_index": 0, "world_size": 1, "dtype": "float32", "deepspeed": None, "hf_deepspeed_config": None},
    **{"token_weights": TokenWeights(), "fsdp": False},
}
MATTERS = {  # alone it gives other log-probs of some pair
    "model": "other",
    "max_tiles": 6,
    "max_length": 900,
    "bf16": True,
    "fp16": True,
    "load_in_4bit": True,
    "fsdp": True,
    "dtype": "bfloat16",
    "chat_template": "{{ messages }}",
    "token_weights": TokenWeights(ld_alpha=0.5),
}


def identity(folder: Path, **changes) -> dict:
    given = {**USUAL, "chat_template": "usual", **changes}
    processor = SimpleNamespace(chat_template=given.pop("chat_template"))
    return reference_identity(SimpleNamespace(**given), processor, model_digest(folder / given["model"]))


def effective(changed: set[str]) -> set[str]:
    """What of it counts: no run has both 16-bit types, and FSDP casts weights only where there is one of them."""
    without = {"fp16"} if "bf16" in changed else set()
    return changed - without - (set() if changed & {"bf16", "fp16"} else {"fsdp"})


@settings(SHARED_FOLDER, max_examples=40)
@given(changed=st.sets(st.sampled_from(sorted(MATTERS))), again=st.sets(st.sampled_from(sorted(MATTERS))))
def test_the_reference_cache_has_a_key_of_its_own_for_all_that_changes_a_log_prob(tmp_path, changed, again):
    for name in ("start", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    names = [
        ReferenceCache(tmp_path, identity(tmp_path, **{key: MATTERS[key] for key in keys}), {}).name
        for keys in (changed, again)
    ]
    assert (names[0] == names[1]) == (effective(changed) == effective(again))


@pytest.mark.parametrize("name", ["ld_alpha", "after_difference", "difference_tokens"])
def test_each_weight_of_tokens_changes_the_key(tmp_path, name):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "model.safetensors").write_bytes(b"weights")
    weights = [{"ld_alpha": 0.5, "after_difference": 0.5, "difference_tokens": 3} for _ in range(2)]
    weights[1][name] = 0.25 if name != "difference_tokens" else 4
    found = [identity(tmp_path, token_weights=TokenWeights(**values)) for values in weights]
    assert found[0] != found[1]
