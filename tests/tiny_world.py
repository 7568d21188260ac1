"""A tiny model folder, pictures and questions on disk, for tests that run programs."""

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny import tiny_model, tiny_processor

# bitsandbytes quantises blocks of 64 weights of a row; on a CPU with bfloat16 instructions it takes no smaller rows.
WIDE_ENOUGH_FOR_4_BITS = {
    "llm_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
}


def make_model_folder(folder: Path, **overrides: Any) -> Path:
    """Save the tiny random model with its processor; `overrides` are fields of its config."""
    model = tiny_model(**overrides)
    model.save_pretrained(folder)
    tiny_processor(model.config).save_pretrained(folder)
    return folder


def make_pictures(folder: Path, count: int = 3) -> list[str]:
    """Save pictures of one, two, three tiles and different colours; return their paths."""
    paths = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (28 * (1 + number % 3), 28), (80 * number % 256, 120, 255 - 80 * number % 256)).save(path)
        paths.append(str(path))
    return paths


def make_questions(folder: Path, count: int = 6) -> Path:
    """Write questions about pictures `0.png`, ... (text only: every third) and return the file."""
    path = folder / "questions.jsonl"
    with open(path, "w", encoding="utf-8") as out:
        for number in range(count):
            row = {"question": f"What is {number} and one?", "answer": str(number + 1)}
            if number % 3:
                row["image"] = f"{number}.png"
            out.write(json.dumps(row) + "\n")
    make_pictures(folder, count)
    return path


def make_training_pairs(folder: Path, count: int = 12) -> Path:
    """Write preference pairs, three of each question, the first question without a picture; return the file."""
    make_pictures(folder, 4)
    rows = []
    for number in range(count):
        question = number // 3
        row = {
            "question": f"What is shown in {question}?",
            "chosen": f"A colour, {number}." * (1 + number % 3),
            "rejected": f"Nothing {number}" + " at all" * (number % 4),
        }
        if question:
            row["image"] = f"{question}.png"
        rows.append(row)
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
