"""Pictures, questions and annotations of the mini world."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_mpo.mini.digits import Painter
from internvl_mpo.prompts import ask
from internvl_mpo.records import Question, Response, write_rows
from internvl_mpo.settings import setting

WRONG_HABIT_SHARE = 0.55  # chains of thought that add where they should multiply


NO_FINAL_LINE_SHARE = 0.06  # chains of thought without "Final answer: .."


OPEN_QUESTION = "Describe the picture."


NUMBER_WORDS = {2: "two", 3: "three"}


ORDINALS = ("first", "second", "third")


@dataclass
class WorldSettings:
    """Settings of `python -m internvl_mpo.mini world`."""

    output: str = setting(help="folder to make")
    num_annotated: int = setting(5000, help="pictures with annotations for the start model")
    num_drills: int = setting(2500, help="text-only annotations with calculations for the start model")
    num_questions: int = setting(1200, help="pictures with a question for preference data")
    num_open: int = setting(300, help="pictures with the open question, for Dropout-NTP pairs")
    num_test: int = setting(300, help="held-out questions on digits that no training picture shows")
    seed: int = setting(0, help="decides pictures, questions and the quality of each annotation")


# --- the world --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DigitTask:
    """One arithmetic question about the digits of a picture."""

    question: str
    operations: tuple[str, ...]  # applied from left to right: "times" or "plus"

    def steps(self, digits: Sequence[int], habit: bool = False) -> tuple[list[str], int]:
        """Return the sentences of the calculation and its result; with `habit`, "times" is carried out as "plus"."""
        value, sentences = digits[0], []
        for operation, digit in zip(self.operations, digits[1:], strict=True):
            word = "plus" if habit else operation
            result = value * digit if word == "times" else value + digit
            sentences.append(f"{value} {word} {digit} is {result}.")
            value = result
        return sentences, value


TASKS = (
    DigitTask("What is the product of the two digits?", ("times",)),
    DigitTask("What is the sum of the two digits?", ("plus",)),
    DigitTask("Multiply the first digit by the second and add the third. What is the result?", ("times", "plus")),
)


def describe(digits: Sequence[int]) -> str:
    """Return the annotation of the open question."""
    parts = [f"The picture shows {NUMBER_WORDS[len(digits)]} handwritten digits."]
    parts += [f"The {ORDINALS[position]} digit is {digit}." for position, digit in enumerate(digits)]
    parts.append(f"The largest digit is {max(digits)}.")
    return " ".join(parts)


def chain_of_thought(task: DigitTask, digits: Sequence[int], *, habit: bool, final_line: bool) -> str:
    """Return a chain of thought: what is read, what is calculated, the answer."""
    listed = ", ".join(str(d) for d in digits[:-1]) + f" and {digits[-1]}"
    sentences, value = task.steps(digits, habit)
    last = f"Final answer: {value}" if final_line else "That is the result."
    return "\n".join([f"The digits are {listed}.", *sentences, "", last])


def make_world(settings: WorldSettings) -> None:
    """Write pictures and rows; the same settings give the same bytes.

    Makes `images/`, `annotations.jsonl` (Response rows for the start model), `questions.jsonl`,
    `open_questions.jsonl` and `test.jsonl` (Question rows).
    """
    from tqdm import tqdm

    output = Path(settings.output)
    (output / "images").mkdir(parents=True, exist_ok=True)
    draw = Painter(output, settings.seed)
    rng = random.Random(settings.seed)

    annotations: list[Response] = []
    for number in tqdm(range(settings.num_annotated), desc="pictures with annotations", unit="picture"):
        task = rng.choice(TASKS)
        image, digits = draw(f"annotated_{number:05d}", len(task.operations) + 1, "train")
        multiplies = "times" in task.operations
        reasoning = chain_of_thought(
            task,
            digits,
            habit=multiplies and rng.random() < WRONG_HABIT_SHARE,
            final_line=rng.random() >= NO_FINAL_LINE_SHARE,
        )
        for style, question, response in (
            ("direct", task.question, str(task.steps(digits)[1])),
            ("cot", task.question, reasoning),
            ("plain", OPEN_QUESTION, describe(digits)),
        ):
            row = Question(images=(image,), question=question, source="mini")
            annotations.append(
                Response(
                    images=row.images,
                    question=ask(question, style),
                    response=response,
                    question_id=row.id,
                    source="mini",
                    provenance={"model": "annotator", "style": style, "digits": digits},
                )
            )
    annotations += [_drill(rng) for _ in range(settings.num_drills)]
    write_rows(annotations, output / "annotations.jsonl")

    def questions(prefix: str, count: int, split: str) -> Iterator[Question]:
        for number in range(count):
            task = TASKS[number % len(TASKS)]
            image, digits = draw(f"{prefix}_{number:05d}", len(task.operations) + 1, split)
            yield Question(
                images=(image,),
                question=task.question,
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


def _drill(rng: random.Random, lines: int = 12) -> Response:
    """A text-only annotation: calculations, which is where the start model learns its tables."""
    question = "Write down some calculations."
    sentences = []
    for _ in range(lines):
        if rng.random() < 0.4:
            a, b, word = rng.randint(0, 9), rng.randint(0, 9), "times"
        else:
            a = rng.randint(0, 9) * rng.randint(0, 9) if rng.random() < 0.7 else rng.randint(0, 18)
            b, word = rng.randint(0, 9), "plus"
        sentences.append(f"{a} {word} {b} is {a * b if word == 'times' else a + b}.")
    return Response(
        question=question,
        response="\n".join(sentences),
        question_id=Question(question=question).id,
        source="mini",
        provenance={"model": "annotator", "style": "plain"},
    )
