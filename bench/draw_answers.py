"""Draw published model answers to be labelled by hand, without looking at what any matcher says of them.

    python bench/draw_answers.py ../shared/data --output drawn.json

The drawing is seeded, so the same data give the same answers. Each is cut to the short text a matcher is asked about:
the last box, else what follows the last "answer is", else the last line. `tests/cases/answers_drawn.json` holds the
500 of 2026-11-28 with their labels; the cut is deliberately not the package's own.
"""

import argparse
import json
import random
import re
from pathlib import Path

SEED = 20261128
MAX_CHARS = 160
MATHVISTA_RUNS = ("extractions_bard", "extractions_gpt4", "extractions_gpt4_2shot_solution_ocr")
M3COT_RUNS = ("gemini-cot", "gpt4v-direct", "llava-13b-cot")
MATHVISION_RUNS = ("gemini-pro-cot", "gpt4-cot-text-only", "internlm-xc2-vl-cot", "qwen-vl-max-cot")
Case = dict[str, object]


def main() -> None:
    """Write the drawn answers, each with an empty label."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw = random.Random(SEED)
    drawn: list[Case] = []
    for read, name, share in ((_mathvista, "mathvista", 210), (_m3cot, "m3cot", 230), (_mathvision, "mathvision", 60)):
        drawn += draw.sample(_short(read(arguments.data / name)), share)
    arguments.output.write_text("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in drawn) + "\n]\n")


def _short(cases: list[Case]) -> list[Case]:
    """Cases with a short answer, each (answer, truth, options) once."""
    found = {}
    for case in cases:
        case["prediction"] = cut(str(case["prediction"]))
        key = json.dumps([case[name] for name in ("prediction", "gold", "options")])
        if case["prediction"] and len(str(case["prediction"])) <= MAX_CHARS:
            found.setdefault(key, case)
    return list(found.values())


def cut(reply: str) -> str:
    """The short answer in a reply: the last box, else what follows the last "answer is", else the last line."""
    reply = reply.replace("</s>", "").strip()
    boxes = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", reply)
    if boxes:
        return boxes[-1].strip()
    said = re.split(r"answer (?:is|should be|would be|must be)\b:?", reply, flags=re.IGNORECASE)
    if len(said) > 1:
        return said[-1].strip().split("\n")[0]
    return reply.split("\n")[-1].strip()


def _mathvista(folder: Path) -> list[Case]:
    questions = json.loads((folder / "testmini.json").read_text())
    runs = {name: json.loads((folder / f"{name}.json").read_text()) for name in MATHVISTA_RUNS}
    for name in ("bard", "llava_llama2_13b"):
        rows = _lines(folder / f"responses_{name}.jsonl")
        runs[f"responses_{name}"] = {row["pid"]: row["response"] for row in rows}
    return [
        _case(text, questions[pid]["answer"], questions[pid]["choices"] or [], f"mathvista/{name}/{pid}")
        for name, run in runs.items()
        for pid, text in run.items()
        if pid in questions
    ]


def _m3cot(folder: Path) -> list[Case]:
    questions = {row["id"]: row for row in _lines(folder / "test_annotations.jsonl")}
    return [
        _case(row["text"], questions[row["id"]]["answer"], questions[row["id"]]["choices"], f"m3cot/{run}/{row['id']}")
        for run in M3COT_RUNS
        for row in _lines(folder / f"predictions_{run}.jsonl")
    ]


def _mathvision(folder: Path) -> list[Case]:
    questions = {row["id"]: row for row in _lines(folder / "testmini.jsonl")}
    return [
        _case(
            row["response"],
            questions[row["id"]]["answer"],
            questions[row["id"]]["options"],
            f"mathvision/{run}/{row['id']}",
        )
        for run in MATHVISION_RUNS
        for row in _lines(folder / f"responses_{run}.jsonl")
    ]


def _case(prediction: str, gold: str, options: list[str], source: str) -> Case:
    return {"prediction": prediction, "gold": gold, "options": options, "right": None, "from": source}


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
