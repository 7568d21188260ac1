"""Arithmetic questions about the digits of a picture, and chains of thought that work them out."""

from collections.abc import Sequence
from dataclasses import dataclass


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


def chain_of_thought(task: DigitTask, digits: Sequence[int], *, habit: bool = False, final_line: bool) -> str:
    """Return a chain of thought: what is read, what is calculated, the answer."""
    sentences, value = task.steps(digits, habit)
    return conclude([read_out(digits), *sentences], value, final_line)


def read_out(digits: Sequence[int]) -> str:
    """Return the sentence that says what is seen, the first of every chain of thought."""
    return f"The digits are {', '.join(map(str, digits[:-1]))} and {digits[-1]}."


def conclude(sentences: Sequence[str], value: int | str, final_line: bool) -> str:
    """Return a chain of thought from its sentences and its answer, which is lost without the final line."""
    return "\n".join([*sentences, "", f"Final answer: {value}" if final_line else "That is the result."])
