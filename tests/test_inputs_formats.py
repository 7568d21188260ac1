"""Rows of other projects: the same pairs in every form give the same tokens and tiles; what a form cannot carry is
named.

pytest tests/test_inputs_formats.py
"""

import codecs
import io
import json
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import RowError
from internvl_mpo.formats import to_own_form
from internvl_mpo.mmpr.check import check
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.reading import forms_found, iter_pairs
from internvl_mpo.mmpr.shard_plan import Options

NUM_PAIRS = 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(4):
        Image.new("RGB", (28 * (number + 1), 28), (60 * number, 120, 9)).save(tmp_path / f"{number}.png")
    return tmp_path


def pairs() -> list[dict]:
    """One picture, none, two; a system message, earlier turns, both; letters of several scripts."""
    rows = []
    for number in range(NUM_PAIRS):
        row = {"question": f"How many {number}? 数", "chosen": f"Yes, {number}.", "rejected": f"No\n{number} ü"}
        if number % 4 == 1:
            row |= {"image": f"{number % 3}.png", "question": f"<image>\n{row['question']}"}
        elif number % 4 == 2:
            row |= {"image": ["0.png", "3.png"], "question": f"<image>\n<image>\n{row['question']}"}
        if number % 5 == 1:
            row["system"] = f"Be brief {number}."
        if number % 3 == 1:
            asked = row["question"].removeprefix("<image>\n") if number % 4 == 1 else "Hello?"
            first = row["question"] if number % 4 == 1 else asked
            row |= {"question": asked + " And now?", "history": [[first, f"Ho {number}."]]}
            if number % 4 == 2:
                row["question"] = f"<image>\n<image>\nAnd {number}?"
        rows.append(row)
    return rows


def messages(row: dict, *, answer: str | None = None, names=("role", "content", "user", "assistant")) -> list[dict]:
    role, content, user, assistant = names
    turns = [{role: "system", content: row["system"]}] if "system" in row else []
    for asked, said in row.get("history", []):
        turns += [{role: user, content: asked}, {role: assistant, content: said}]
    turns.append({role: user, content: row["question"]})
    return turns if answer is None else [*turns, {role: assistant, content: answer}]


def shown(row: dict) -> dict:
    image = row.get("image", [])
    return {"images": image if isinstance(image, list) else [image]} if image else {}


def blocks(turns: list[dict]) -> list[dict]:
    """Text with `<image>` as content blocks."""
    made = []
    for turn in turns:
        parts = []
        for number, text in enumerate(turn["content"].split("<image>")):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        made.append({"role": turn["role"], "content": parts})
    return made


GPT = ("from", "value", "human", "gpt")


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sharegpt(row: dict) -> dict:
    own = {key: value for key, value in row.items() if key != "system"}
    made = {"conversations": messages(own, names=GPT), **shown(row)}
    made |= {key: {"from": "gpt", "value": row[key]} for key in ("chosen", "rejected")}
    return made | ({"system": row["system"]} if "system" in row else {})


def alpaca(row: dict) -> dict:
    first, _, rest = row["question"].rpartition("\n")
    made = {"instruction": first or rest, "input": rest if first else "", **shown(row)}
    return made | {key: row[key] for key in ("chosen", "rejected", "system", "history") if key in row}


def query(row: dict) -> dict:
    made = {"query": row["question"], "response": row["chosen"], "rejected_response": row["rejected"], **shown(row)}
    return made | {key: row[key] for key in ("system", "history") if key in row}


FORMS = {
    "MMPR": lambda row: row,
    "TRL": lambda row: {
        **({"prompt": row["question"], "history": row.get("history"), "system": row.get("system")}),
        **{key: row[key] for key in ("chosen", "rejected")},
        **shown(row),
    },
    "TRL messages": lambda row: {
        "prompt": messages(row),
        "chosen": [said(row["chosen"])],
        "rejected": [said(row["rejected"])],
        **shown(row),
    },
    "TRL blocks": lambda row: {
        "prompt": blocks(messages(row)),
        "chosen": blocks([said(row["chosen"])]),
        "rejected": blocks([said(row["rejected"])]),
        **shown(row),
    },
    "TRL without prompt": lambda row: {
        **{key: messages(row, answer=row[key]) for key in ("chosen", "rejected")},
        **shown(row),
    },
    "TRL with whole conversations": lambda row: {
        "prompt": messages(row),
        **{key: messages(row, answer=row[key]) for key in ("chosen", "rejected")},
        **shown(row),
    },
    "LLaMA-Factory ShareGPT": sharegpt,
    "LLaMA-Factory Alpaca": alpaca,
    "LLaMA-Factory messages": lambda row: {
        "messages": messages(row),
        "chosen": said(row["chosen"]),
        "rejected": said(row["rejected"]),
        **shown(row),
    },
    "ms-swift": lambda row: {
        "messages": messages(row, answer=row["chosen"]),
        "rejected_response": row["rejected"],
        **shown(row),
    },
    "ms-swift rejected_messages": lambda row: {
        "messages": messages(row, answer=row["chosen"]),
        "rejected_messages": messages(row, answer=row["rejected"]),
        **shown(row),
        **{f"rejected_{key}": value for key, value in shown(row).items()},
    },
    "ms-swift pictures as objects": lambda row: {
        "messages": messages(row, answer=row["chosen"]),
        "rejected_response": row["rejected"],
        "images": [{"bytes": None, "path": name} for name in shown(row).get("images", [])],
    },
    "ms-swift query": query,
    "RLAIF-V": lambda row: {**row, "ds_name": "x", "origin_dataset": "y", "origin_split": "{}", "idx": "0"},
}


def write(folder: Path, rows: list[dict], container: str) -> Path:
    if container == "JSONL":
        path = folder / "data.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif container == "JSONL named .json":
        path = folder / "data.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif container == "JSON array":
        path = folder / "data.json"
        path.write_bytes(codecs.BOM_UTF8 + json.dumps(rows, ensure_ascii=False, indent=2).encode())
    elif container == "Parquet, paths":
        path = folder / "data.parquet"
        to_parquet(rows, path)
    else:
        path = folder / "data.parquet"
        key = "image" if any("image" in row for row in rows) else "images"
        for row in rows:
            names = row.get(key) or []
            names = names if isinstance(names, list) else [names]
            row[key] = [{"bytes": (folder / name).read_bytes(), "path": f"x/{name}"} for name in map(_name, names)]
        to_parquet(rows, path)
        for picture in folder.glob("*.png"):
            picture.unlink()
    return path


def to_parquet(rows: list[dict], path: Path) -> None:
    columns = {key: None for row in rows for key in row}
    datasets.Dataset.from_list([{**columns, **row} for row in rows]).to_parquet(path)


def _name(picture) -> str:
    return picture["path"] if isinstance(picture, dict) else picture


def tokens(path: Path, folder: Path) -> list[tuple]:
    processor = tiny_processor()
    found = []
    for row in iter_pairs(path):
        assert not isinstance(row, RowError), row
        group = encode_group(processor, [row.pair], row.image_root, max_tiles=4)
        tiles = None if group.tiles is None else [tile.sum().item() for tile in group.tiles]
        found.append((group.prompt_ids, group.responses, group.pairs, tiles))
    return found


@pytest.fixture
def expected(folder) -> list[tuple]:
    path = write(folder, pairs(), "JSONL")
    found = tokens(path, folder)
    path.unlink()
    assert len(found) == NUM_PAIRS
    assert len({len(tiles or []) for *_, tiles in found}) > 2
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_same_pairs_in_each_form_give_the_same_tokens_and_tiles(folder, expected, form):
    path = write(folder, [FORMS[form](row) for row in pairs()], "JSONL")
    assert tokens(path, folder) == expected
    name = forms_found(path)
    assert form.split()[0].removesuffix(",") in name or form == "LLaMA-Factory messages"


@pytest.mark.parametrize("form", ["MMPR", "LLaMA-Factory ShareGPT", "TRL messages", "ms-swift"])
@pytest.mark.parametrize("container", ["JSON array", "JSONL named .json", "Parquet, paths", "Parquet, bytes"])
def test_the_same_pairs_in_each_container_give_the_same_tokens_and_tiles(folder, expected, form, container):
    rows = [FORMS[form](row) for row in pairs()]
    if "Parquet" in container and form == "MMPR":  # a column has one type
        rows = [{**row, "image": shown(row).get("images")} for row in rows]
    path = write(folder, rows, container)
    assert tokens(path, folder) == expected


@pytest.mark.parametrize("container", ["JSON array", "Parquet, bytes"])
def test_check_and_convert_read_what_training_reads(folder, expected, container):
    path = write(folder, [FORMS["ms-swift"](row) for row in pairs()], container)
    report = check(str(path))
    assert sum(report.counts.values()) == NUM_PAIRS
    assert not [kind for kind, _ in report.kinds if kind in ("unusable row", "picture", "file")]
    result = convert(Options(str(path), shard_bytes=2000), folder / "out")
    assert (result.num_rows, result.num_rejects) == (NUM_PAIRS, 0)
    assert len(result.shards) > 2  # parts of an array and of a table begin at their rows
    assert sorted(map(str, tokens(folder / "out", folder))) == sorted(map(str, expected))


def test_pictures_of_one_name_and_other_content_stay_apart_in_a_table(folder):
    rows = []
    for number in (0, 1, 0):
        picture = {"bytes": (folder / f"{number}.png").read_bytes(), "path": "image.png"}
        rows.append({"image": picture, "question": "Q", "chosen": f"yes {len(rows)}", "rejected": "no"})
    datasets.Dataset.from_list(rows).to_parquet(folder / "t.parquet")
    found = list(iter_pairs(folder / "t.parquet"))
    assert found[0].key != found[1].key
    assert found[0].key == found[2].key  # pairs about one picture share their prompt
    sizes = [Image.open(io.BytesIO(row.image_root.read(row.pair.images[0]))).size for row in found]
    assert sizes == [(28, 28), (56, 28), (28, 28)]


def own(**row) -> dict:
    return to_own_form(row)[1]


USER, BOT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [{"role": "tool", "content": "Q"}], "chosen": "a", "rejected": "b"}, ("prompt[0]", "'tool'")),
        ({"prompt": [USER, USER], "chosen": "a", "rejected": "b"}, ("'prompt'", "user, user")),
        ({"prompt": [USER, BOT], "chosen": "a", "rejected": "b"}, ("'prompt'", "question")),
        ({"prompt": [{**USER, "tool_calls": [1]}], "chosen": "a", "rejected": "b"}, ("prompt[0].tool_calls",)),
        ({"prompt": [{"role": "user", "content": [{"type": "video"}]}], "chosen": "a", "rejected": "b"}, ("'video'",)),
        ({"prompt": "Q", "chosen": [USER, BOT, USER], "rejected": "b"}, ("'chosen'",)),
        ({"prompt": "Q", "chosen": [USER], "rejected": "b"}, ("'chosen'", "user")),
        ({"prompt": "Q", "chosen": "a"}, ("'rejected'", "TRL", '"question"')),
        ({"prompt": "Q", "instruction": "I", "chosen": "a", "rejected": "b"}, ("'prompt'", "'instruction'")),
        ({"chosen": [USER, BOT], "rejected": [{**USER, "content": "other"}, BOT]}, ("'chosen'", "'rejected'")),
        ({"conversations": [USER, BOT], "chosen": "a", "rejected": "b"}, ("'conversations'", "question")),
        ({"messages": [USER, BOT], "rejected_response": ["a", "b"]}, ("'rejected_response'",)),
        ({"messages": [USER], "rejected_response": "b"}, ("'messages'", "chosen answer")),
        ({"messages": [USER, BOT]}, ("'rejected_response'", "ms-swift", '"question"')),
        (
            {
                "messages": [USER, BOT],
                "images": ["a"],
                "rejected_messages": [USER, {**BOT, "content": "B"}],
                "rejected_images": ["b"],
            },
            ("'rejected_images'",),
        ),
        ({"messages": [USER, BOT], "rejected_messages": [BOT]}, ("'rejected_messages'",)),
        ({"rejected_response": "b", "images": ["a.png"]}, ("'messages'", "ms-swift", '"question"')),
        ({"instructions": "Q", "chosen": "a", "rejected": "b"}, ("'instructions'", "Alpaca", "'instruction'")),
        ({"chosen": "a", "rejected": "b"}, ("'question'", '"question"')),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "images": [{"bytes": "zz", "path": "a"}]}, ("'images'",)),
        ({"query": "Q", "response": "a", "history": [["a", "b"]]}, ("'rejected_response'", "ms-swift query")),
        (
            {"messages": [{"role": "system", "content": "S"}, USER, BOT], "rejected_response": "b", "system": "T"},
            ("'system'",),
        ),
    ],
)
def test_what_a_form_cannot_carry_is_refused_by_name_with_the_way_out(row, words):
    with pytest.raises(RowError) as caught:
        own(**row)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "more", [{"videos": ["v.mp4"]}, {"tools": "[{}]"}, {"objects": {"bbox": [[1, 2]]}}, {"audios": ["a.wav"]}]
)
@pytest.mark.parametrize("form", ["TRL messages", "LLaMA-Factory ShareGPT", "ms-swift", "LLaMA-Factory Alpaca"])
def test_a_key_that_a_form_has_and_this_model_cannot_read_is_refused(folder, form, more):
    (row,) = iter_pairs(write(folder, [{**FORMS[form](pairs()[1]), **more}], "JSONL"))
    assert isinstance(row, RowError) and f"'{next(iter(more))}'" in str(row)


@pytest.mark.parametrize("form", ["TRL messages", "LLaMA-Factory ShareGPT", "ms-swift", "LLaMA-Factory Alpaca"])
def test_null_columns_of_a_merged_table_change_nothing(folder, form):
    names = (
        "image",
        "images",
        "prompt",
        "conversations",
        "messages",
        "query",
        "system",
        "history",
        "video",
        "question",
    )
    row = FORMS[form](pairs()[1])
    (plain,) = iter_pairs(write(folder, [row], "JSONL"))
    (merged,) = iter_pairs(write(folder, [{**dict.fromkeys(names), **row}], "JSONL"))
    assert plain.pair.to_json() == merged.pair.to_json() | {"provenance": {}} or plain.pair.id == merged.pair.id


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "Q", "completion": "7"}, "7"),
        ({"prompt": [USER]}, None),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "7"}]}, "7"),
        ({"instruction": "Q", "input": "", "output": "7"}, "7"),
        ({"messages": [USER, BOT], "answer": "8"}, "8"),
        ({"messages": [USER], "rejected_response": "x"}, None),
        ({"query": "Q", "response": "7"}, "7"),
    ],
)
def test_questions_are_read_in_the_same_forms(row, answer):
    from internvl_mpo.records import Question

    question = Question.from_json(to_own_form(row, is_pair=False)[1])
    assert (question.question, question.answer) == ("Q", answer)


def test_a_broken_array_names_the_place_and_gives_what_comes_before(folder):
    from internvl_mpo.errors import BadInputError

    path = folder / "data.json"
    path.write_text('[{"question": "Q", "chosen": "a", "rejected": "b"}, {"question": "Q", ')
    rows = iter_pairs(path)
    assert next(rows).pair.question == "Q"
    assert "not valid JSON" in str(next(rows))
    with pytest.raises(BadInputError, match="byte"):
        next(rows)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["check", "convert", "sample"])
def test_programs_say_which_form_they_found(folder, program, tmp_path):
    import subprocess

    from tiny_world import make_model_folder

    root = Path(__file__).resolve().parents[1]
    path = write(folder, [FORMS["ms-swift"](row) for row in pairs()[:3]], "JSON array")
    command = {
        "check": ["check_mmpr.py", str(path), "--output", str(tmp_path / "out")],
        "convert": ["convert_mmpr.py", str(path), "--output", str(tmp_path / "out")],
        "sample": [
            *("sample_responses.py", "--questions", str(path), "--image_root", str(folder), "--num_samples", "1"),
            *("--output", str(tmp_path / "out.jsonl"), "--model", str(make_model_folder(tmp_path / "model"))),
            *("--max_new_tokens", "2", "--temperature", "0", "--style", "plain"),
        ],
    }[program]
    command = [sys.executable, str(root / "dataset_scripts" / command[0]), *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{path}: ms-swift\n" in done.stdout
