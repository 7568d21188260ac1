"""Benchmarks from the Hub's layout (Parquet with pictures inside) and from VLMEvalKit's tables, without a network."""

import base64
import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.benchmarks.sources import read_json_file

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")

# benchmark -> split on the Hub, picture column, a row as the Hub has it
HUB = {
    "pope": (
        "test",
        "image",
        {"question_id": "1", "question": "Is there a cat?", "answer": "yes", "category": "random"},
    ),
    "m3cot": (
        "test",
        "image",
        {
            "id": "p-1",
            "question": "Which?",
            "choices": ["cat", "dog"],
            "context": "",
            "answer": "B",
            "domain": "science",
        },
    ),
    "mathvista": (
        "testmini",
        "decoded_image",
        {
            **{"pid": "1", "question": "How long?", "image": "images/1.jpg", "choices": None, "unit": "cm"},
            **{"precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float"},
            **{"metadata": {"language": "english", "skills": ["geometry", "arithmetic"]}, "query": "How long?"},
        },
    ),
    "mathvision": (
        "testmini",
        "decoded_image",
        {
            "id": "4",
            "question": "How many? <image1>",
            "options": ["1", "2"],
            "image": "4.jpg",
            "answer": "B",
            "level": 2,
        },
    ),
    "mmvet": (
        "test",
        "image",
        {"question_id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
    ),
    "mmhal_bench": (
        "test",
        "image",
        {"question_type": "attribute", "question": "What color?", "gt_answer": "Red.", "image_content": ["Hat"]},
    ),
}
# benchmark -> a row of VLMEvalKit's table, which holds pictures as base64 text and lists as Python writes them
TABLES = {
    "pope": {"index": "0", "question": "Is there a cat?", "answer": "Yes", "category": "random"},
    "mathvista": {
        **{"index": "1", "question": "Which?", "choices": "['cat', 'dog']", "answer": "dog", "answer_option": "B"},
        **{"question_type": "multi_choice", "answer_type": "text", "skills": "['geometry']", "task": "VQA"},
    },
    "mathvision": {"index": "4", "question": "How many?", "choices": "[]", "answer": "6", "category": "arithmetic"},
    "mmvet": {"index": "v1_0", "question": "What is x?", "answer": "3", "category": "ocr,math"},
    "llava_bench": {
        **{"index": "0", "question": "What is it?", "category": "conv", "caption": "A hat."},
        **{"gpt4_ans": "A hat."},
    },
    "crpe": {
        **{"index": "0", "question": "Which?\nA. on\nB. under\nC. in\nD. by", "answer": "B", "category": "subject"},
    },
}


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", HUB)
def test_hub_layout(name, tmp_path):
    split, column, row = HUB[name]
    rows = [{**row, column: Image.new("RGB", (6, 4), color)} for color in ("red", "blue")]
    for key in ("question_id", "id", "pid"):
        if key in row:
            rows[1][key] = row[key] + "0"
    table = datasets.Dataset.from_list(rows).cast_column(column, datasets.Image())
    (tmp_path / "data").mkdir()
    table.to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    benchmark = load_benchmark(name)
    examples = benchmark.examples(f"hub:{tmp_path}:{split}")
    assert len({example.id for example in examples}) == 2
    assert [open_image(example.images[0]).getpixel((0, 0)) for example in examples] == [(255, 0, 0), (0, 0, 255)]
    gold = examples[0].answer
    assert benchmark.HUB_ID.endswith(f":{split}")
    if not hasattr(benchmark, "JUDGE_PROMPT") or name == "mathvista":
        assert benchmark.score(examples[0], gold).value == 1.0


@pytest.mark.parametrize("name", TABLES)
def test_vlmevalkit_table(name, tmp_path):
    rows = [
        {**TABLES[name], "image": base64.b64encode(png("green") * 40).decode()},
        {**TABLES[name], "index": TABLES[name]["index"] + "9", "image": TABLES[name]["index"]},
    ]
    path: Path = tmp_path / f"{name}.tsv"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    benchmark = load_benchmark(name)
    examples = benchmark.examples(path)
    assert len(examples) == 2
    for example in examples:  # the second names the row that holds its picture
        assert open_image(example.images[0]).getpixel((0, 0)) == (0, 128, 0)
    if name in ("pope", "mathvista", "mathvision", "crpe"):
        assert benchmark.score(examples[0], examples[0].answer).value == 1.0
        assert benchmark.score(examples[0], "something else").value == 0.0


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    rows = [{"question": "one\u2028two\u0085three"}, {"question": "four"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    assert read_json_file(tmp_path / "rows.json") == rows
