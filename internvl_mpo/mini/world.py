"""Pictures, questions and annotations of the mini world."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_mpo.errors import BadInputError
from internvl_mpo.mini.choices import ask_choice, guess, make_options
from internvl_mpo.mini.digits import Painter
from internvl_mpo.mini.tasks import TASKS, DigitTask, chain_of_thought
from internvl_mpo.prompts import ask
from internvl_mpo.records import Question, Response, write_rows
from internvl_mpo.settings import setting

WRONG_HABIT_SHARE = 0.55  # chains of thought of kind numbers that add where they should multiply
NO_FINAL_LINE_SHARE = 0.06  # chains of thought without "Final answer: .."
OPEN_QUESTION = "Describe the picture."
NUMBER_WORDS = {2: "two", 3: "three"}
ORDINALS = ("first", "second", "third")

Kind = Literal["choices", "numbers"]
TASKS_OF_KIND = {"choices": TASKS[:2], "numbers": TASKS}


@dataclass
class WorldSettings:
    """Settings of `python -m internvl_mpo.mini world`."""

    output: str = setting(help="folder to make")
    kind: Kind = setting("choices", help="choices: two options, most annotators guess; numbers: open, a wrong habit")
    guess_share: float = setting(0.8, help="share of the annotated chains of thought that guess (choices)")
    num_annotated: int = setting(5000, help="pictures with annotations for the start model")
    num_drills: int = setting(4000, help="text-only annotations with calculations for the start model")
    num_questions: int = setting(800, help="pictures with a question for preference data")
    num_open: int = setting(300, help="pictures with the open question, for Dropout-NTP pairs")
    num_test: int = setting(300, help="held-out questions on digits that no training picture shows")
    seed: int = setting(0, help="decides pictures, questions and the quality of each annotation")


def describe(digits: Sequence[int]) -> str:
    """Return the annotation of the open question."""
    parts = [f"The picture shows {NUMBER_WORDS[len(digits)]} handwritten digits."]
    parts += [f"The {ORDINALS[position]} digit is {digit}." for position, digit in enumerate(digits)]
    parts.append(f"The largest digit is {max(digits)}.")
    return " ".join(parts)


def make_world(settings: WorldSettings) -> None:
    """Write pictures and rows; the same settings give the same bytes.

    Makes `images/`, `annotations.jsonl` (Response rows for the start model), `questions.jsonl`,
    `open_questions.jsonl` and `test.jsonl` (Question rows).

    Raises:
        BadInputError: `guess_share` is no share.
    """
    from tqdm import tqdm

    if not 0 <= settings.guess_share <= 1:
        raise BadInputError(f"guess_share is {settings.guess_share}, expected 0 to 1")
    output = Path(settings.output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw = Painter(output, settings.seed)
    rng = random.Random(settings.seed)
    tasks = TASKS_OF_KIND[settings.kind]

    annotations: list[Response] = []
    for number in tqdm(range(settings.num_annotated), desc="pictures with annotations", unit="picture"):
        task = rng.choice(tasks)
        image, digits = draw(f"annotated_{number:05d}", len(task.operations) + 1, "train")
        annotations += _annotate(task, image, digits, settings, rng)
    annotations += [_drill(settings.kind, rng) for _ in range(settings.num_drills)]
    write_rows(annotations, output / "annotations.jsonl")

    def questions(prefix: str, count: int, split: str) -> Iterator[Question]:
        for number in range(count):
            task = tasks[number % len(tasks)]
            image, digits = draw(f"{prefix}_{number:05d}", len(task.operations) + 1, split)
            is_choice = settings.kind == "choices"
            yield Question(
                images=(image,),
                question=ask_choice(task, make_options(task, digits, rng)) if is_choice else task.question,
                answer=str(task.steps(digits)[1]),
                source="mini_arithmetic",
                provenance={"digits": digits},
            )

    write_rows(questions("question", settings.num_questions, "train"), output / "questions.jsonl")
    write_rows(questions("test", settings.num_test, "test"), output / "test.jsonl")
    open_questions = (
        Question(images=(draw(f"open_{n:05d}", 2 + n % 2, "train")[0],), question=OPEN_QUESTION, source="mini_open")
        for n in range(settings.num_open)
    )
    write_rows(open_questions, output / "open_questions.jsonl")


def _annotate(
    task: DigitTask, image: str, digits: list[int], settings: WorldSettings, rng: random.Random
) -> Iterator[Response]:
    """Yield what annotators say of a picture: the answer alone, with a chain of thought, and a description."""
    question, reasoning = _think_aloud(task, digits, settings, rng)
    for style, asked, response in (
        ("direct", question, str(task.steps(digits)[1])),
        ("cot", question, reasoning),
        ("plain", OPEN_QUESTION, describe(digits)),
    ):
        row = Question(images=(image,), question=asked, source="mini")
        yield Response(
            images=row.images,
            question=ask(asked, style),
            response=response,
            question_id=row.id,
            source="mini",
            provenance={"model": "annotator", "style": style, "digits": digits},
        )


def _think_aloud(task: DigitTask, digits: list[int], settings: WorldSettings, rng: random.Random) -> tuple[str, str]:
    """Return a question and an annotator's chain of thought, which has the flaw of its kind of world."""
    if settings.kind == "numbers":
        habit = "times" in task.operations and rng.random() < WRONG_HABIT_SHARE
        final_line = rng.random() >= NO_FINAL_LINE_SHARE
        return task.question, chain_of_thought(task, digits, habit=habit, final_line=final_line)
    options = make_options(task, digits, rng)
    question, final_line = ask_choice(task, options), rng.random() >= NO_FINAL_LINE_SHARE
    if rng.random() < settings.guess_share:
        return question, guess(digits, options, rng, final_line=final_line)
    return question, chain_of_thought(task, digits, final_line=final_line)


def _drill(kind: Kind, rng: random.Random, lines: int = 12) -> Response:
    """A text-only annotation: calculations, which is where the start model learns its tables."""
    question = "Write down some calculations."
    is_choice = kind == "choices"
    return Response(
        question=question,
        response="\n".join(_calculation(is_choice, rng) for _ in range(lines)),
        question_id=Question(question=question).id,
        source="mini",
        # of style drill only the results are learnt, see `start_model`
        provenance={"model": "annotator", "style": "drill" if is_choice else "plain"},
    )


def _calculation(is_choice: bool, rng: random.Random) -> str:
    """A step of a chain of thought; those of kind numbers also go on with a result."""
    if rng.random() < (0.5 if is_choice else 0.4):
        a, b, word = rng.randint(0, 9), rng.randint(0, 9), "times"
    else:
        is_result = not is_choice and rng.random() < 0.7
        a = rng.randint(0, 9) * rng.randint(0, 9) if is_result else rng.randint(0, 9 if is_choice else 18)
        b, word = rng.randint(0, 9), "plus"
    return f"{a} {word} {b} is {a * b if word == 'times' else a + b}."
