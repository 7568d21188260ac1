"""How fast correctness pairs are built, and in how much memory: synthetic responses with plain numeric answers.

    python bench/pair_speed.py --num_responses 1000000 --json pair_speed.json

Reports responses per second of CPU time of the whole program (reading, sorting into parts, judging, pairing, writing)
and its peak memory. The interpreter matters: one built without profile-guided optimization, pyenv's default, is slower.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from tqdm import tqdm

from internvl_mpo.errors import run_program
from internvl_mpo.prompts import ask
from internvl_mpo.records import Question, Response
from internvl_mpo.settings import parse_settings, setting, show_settings

PROGRAM = Path(__file__).resolve().parents[1] / "dataset_scripts" / "build_correctness_pairs.py"
RESPONSES_PER_QUESTION = 32
REASONS = (
    "Let me look at the picture step by step. I can see the two numbers that are asked for.",
    "First I find what the question needs, then I calculate with it.",
    "The picture shows several things. Only the two numbers matter here.",
    "To answer this, the values have to be read off and then added to each other.",
)


@dataclass
class Settings:
    """Settings of the benchmark."""

    num_responses: int = setting(1_000_000, help="synthetic responses")
    pairs_per_question: int = setting(15, help="as in build_correctness_pairs.py")
    workers: int = setting(1, help="as in build_correctness_pairs.py")
    folder: str | None = setting(None, help="where the files go meanwhile; empty is the system's")
    json: str | None = setting(None, help="file for the figures")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, program="bench/pair_speed.py", about=__doc__, config=False)
    print(show_settings(settings, "Speed of pair building"))
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        responses, pairs = Path(folder) / "responses.jsonl", Path(folder) / "pairs.jsonl"
        num_bytes = write_responses(responses, settings.num_responses)
        command = [sys.executable, str(PROGRAM), "--responses", str(responses), "--output", str(pairs)]
        command += ["--pairs_per_question", str(settings.pairs_per_question), "--workers", str(settings.workers)]
        start = time.monotonic()
        subprocess.run(command, check=True)
        wall = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(pairs, "rb") as lines:
            num_pairs = sum(1 for _ in lines)
    cpu = used.ru_utime + used.ru_stime
    figures = {
        "python": sys.version,
        "num_responses": settings.num_responses,
        "input_mb": round(num_bytes / 1e6, 1),
        "num_pairs": num_pairs,
        "workers": settings.workers,
        "cpu_s": round(cpu, 2),
        "wall_s": round(wall, 2),
        "responses_per_cpu_s": round(settings.num_responses / cpu),
        "peak_mb": round(used.ru_maxrss / 1024),
    }
    print(json.dumps(figures))
    if settings.json:
        Path(settings.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def write_responses(path: Path, count: int) -> int:
    """Write responses whose question lies anywhere in the file, and return the bytes."""
    rng = random.Random(0)
    num_questions = max(1, count // RESPONSES_PER_QUESTION)
    with open(path, "w", encoding="utf-8") as out:
        for number in tqdm(range(count), desc="writing responses", unit="row"):
            index = number % num_questions
            a, b = index % 97, index % 89
            text = f"What is the sum of {a} and {b} in picture {index}?"
            question = Question(images=(f"{index}.png",), question=text, answer=str(a + b), source=f"set{index % 5}")
            value = a + b if rng.random() < 0.5 else a + b + rng.randint(1, 9)
            last = f"Final answer: {value}" if rng.random() < 0.9 else "That is all I can say."
            row = Response(
                question_id=question.id,
                images=question.images,
                question=ask(text, "cot", "en"),
                answer=question.answer,
                source=question.source,
                response=f"{rng.choice(REASONS)} I see {a} and {b}. {rng.choice(REASONS)} {a} + {b} = {value}.\n{last}",
                provenance={"model": "synthetic", "style": "cot", "seed": number, "finish_reason": "stop"},
            )
            out.write(json.dumps(row.to_json()) + "\n")
        return out.tell()


if __name__ == "__main__":
    sys.exit(run_program(main))
