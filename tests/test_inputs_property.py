"""Ten thousand random rows: each is used with all it says, or refused by the name of a key. Nothing is silent.

pytest tests/test_inputs_property.py
"""

import json
import random
import re

from PIL import Image
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import RowError
from internvl_mpo.mmpr.release import read_subsets
from internvl_mpo.row_keys import READ

NUM_ROWS, NUM_ENCODED = 10_000, 150
NOTHING = (None, "", "  ", [], {}, [None], [""], {"path": None})
# Keys that some project gives a meaning for the model; a row of ours with one of them must not pass over it.
INPUTS = (
    *(
        "video",
        "videos",
        "audio",
        "audios",
        "clip",
        "tools",
        "objects",
        "bbox",
        "options",
        "choices",
        "hint",
        "context",
    ),
    *("system_prompt", "instruction", "input", "prompt", "messages", "conversations", "query", "text", "image_url"),
    *("rejected_response", "rejected_images", "chosen_text", "passage", "image2", "Question", "userPrompt", "label"),
)
NOTES = (
    "idx",
    "origin_split",
    "chosen_meta",
    "rejected_score",
    "num_images",
    "source_url",
    "difficulty",
    "split",
    "ts",
)
OWN = ("question", "chosen", "rejected", "image", "images", "answer", "answer_gt", "system", "history")


class Words:
    """Words that occur once, so that what became of each can be told."""

    def __init__(self, rng: random.Random):
        self.rng, self.number = rng, 0

    def __call__(self) -> str:
        self.number += 1
        return f"word{self.number}x"

    def nested(self) -> object:
        kinds = (lambda: self(), lambda: [self(), self()], lambda: {"a": self(), "b": [self()]}, lambda: [[self()]])
        return self.rng.choice(kinds)()


def misspelt(rng: random.Random, key: str) -> str:
    """One slip of the keyboard: a letter lost, doubled, swapped with its neighbour, or in the other case."""
    place = rng.randrange(len(key) - 1)
    return rng.choice(
        (
            key[:place] + key[place + 1 :],
            key[:place] + key[place] + key[place:],
            key[:place] + key[place + 1] + key[place] + key[place + 2 :],
            key.upper(),
        )
    )


def random_row(rng: random.Random, words: Words) -> dict:
    row: dict = {"question": words(), "chosen": words(), "rejected": words()}
    if rng.random() < 0.5:
        row[rng.choice(("image", "images"))] = rng.choice(("a.png", ["a.png"]))
    if rng.random() < 0.4:
        row[rng.choice(("answer", "answer_gt"))] = rng.choice((words(), [words(), words()]))
    if rng.random() < 0.2:
        row["system"] = words()
    if rng.random() < 0.2:
        row["history"] = [[words(), words()]]
    for _ in range(rng.randrange(4)):
        kind = rng.randrange(6)
        if kind == 0:
            row[rng.choice(NOTES)] = words.nested()
        elif kind == 1:
            row[rng.choice(INPUTS)] = words.nested()
        elif kind == 2:
            row.setdefault(rng.choice((*INPUTS, *OWN, *NOTES)), rng.choice(NOTHING))
        elif kind == 3:
            row[rng.choice(OWN)] = words.nested()
        elif kind == 4:
            key = rng.choice(OWN)
            row[misspelt(rng, key)] = row.pop(key) if key in row and rng.random() < 0.5 else words.nested()
        else:
            row[rng.choice(OWN)] = rng.choice(NOTHING)
    items = list(row.items())
    rng.shuffle(items)
    return dict(items)


def words_of(value: object) -> set[str]:
    return set(re.findall(r"word\d+x", json.dumps(value)))


def used(pair, root) -> tuple[set[str], set[str]]:
    """Words that the model reads or that count as right, and words kept as notes."""
    texts = (pair.question, pair.chosen, pair.rejected, pair.answer, pair.system, pair.history, pair.images)
    return words_of(texts), words_of(pair.provenance)


def test_a_random_row_is_used_with_all_it_says_or_refused_by_name(tmp_path):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    (tmp_path / "x.jsonl").touch()
    (subset,) = read_subsets(tmp_path / "x.jsonl")
    rng = random.Random(18)
    words, processor = Words(rng), tiny_processor()
    outcomes = {"used": 0, "refused": 0}
    for _ in range(NUM_ROWS):
        row = random_row(rng, words)
        try:
            pair = subset.pair(row, "x.jsonl:1")
        except RowError as error:
            outcomes["refused"] += 1
            named = [key for key in (*row, *OWN, *READ) if f"'{key}'" in error.reason or f"'{key}[" in error.reason]
            assert named or "question is empty" in error.reason or "place for" in error.reason, (row, error.reason)
            continue
        outcomes["used"] += 1
        read, noted = used(pair, tmp_path)
        said = {key: words_of(value) for key, value in row.items()}
        assert set().union(*said.values()) == read | noted, row
        for key in row:
            assert key in NOTES or not said[key] & noted, (key, row)  # an input is never a mere note
        shown = json.dumps([row.get("image"), row.get("images")])
        assert bool(pair.images) == bool(words_of(shown) or "a.png" in shown), row
        if outcomes["used"] <= NUM_ENCODED and set(pair.images) <= {"a.png"}:
            group = encode_group(processor, [pair], tmp_path)
            prompt = processor.tokenizer.decode(group.prompt_ids)
            chosen, rejected = (processor.tokenizer.decode(group.responses[side]) for side in group.pairs[0])
            assert words_of((pair.question, pair.system, pair.history)) == words_of(prompt)
            assert (words_of(chosen), words_of(rejected)) == (words_of(pair.chosen), words_of(pair.rejected))
            assert prompt.count("<img>") == len(pair.images)
    assert min(outcomes.values()) > NUM_ROWS / 5
