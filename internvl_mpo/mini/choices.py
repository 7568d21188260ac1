"""Multiple-choice questions about digits, and annotators who, asked to think, mostly guess: a small M3CoT.

    What is the product of the two digits, 18 or 12?

Where a question has few options, a guess is right by luck, so guesses stand among the chosen answers of a preference
data set. To imitate these answers is to imitate the guess; a loss that compares finds it among the rejected ones too.
"""

import random
from collections.abc import Sequence

from internvl_mpo.mini.tasks import DigitTask, conclude, read_out

GUESSES = ("It looks like", "By the look of it, it is", "At a glance, it is")
NEAR_SHARE = 0.7  # wrong options that come of digits misread by at most MISREAD; the others of any digits
MISREAD = 2


def make_options(task: DigitTask, digits: Sequence[int], rng: random.Random) -> tuple[int, int]:
    """Return the right result and a wrong one, which is the result for other digits, in random order."""
    right = wrong = task.steps(digits)[1]
    while wrong == right:
        if rng.random() < NEAR_SHARE:
            others = [min(9, max(0, digit + rng.randint(-MISREAD, MISREAD))) for digit in digits]
        else:
            others = [rng.randint(0, 9) for _ in digits]
        wrong = task.steps(others)[1]
    return (right, wrong) if rng.random() < 0.5 else (wrong, right)


def ask_choice(task: DigitTask, options: tuple[int, int]) -> str:
    """Return the question with its two options."""
    return f"{task.question.removesuffix('?')}, {options[0]} or {options[1]}?"


def guess(digits: Sequence[int], options: tuple[int, int], rng: random.Random, *, final_line: bool) -> str:
    """Return a chain of thought that reads the digits and takes one of the options by its look."""
    option = rng.choice(options)
    return conclude([read_out(digits), f"{rng.choice(GUESSES)} {option}."], option, final_line)


def is_guess(text: str) -> bool:
    """Return whether a chain of thought guesses."""
    return any(words in text for words in GUESSES)
