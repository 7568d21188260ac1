"""Pairs from a judge's ratings: what it is shown, how its reply is read, which responses make a pair.

The judge sees the pictures, the question and a few responses at once, and rates each. It is asked twice, the second
time with the responses in reverse order, since judges favour places; the two ratings of a response are averaged, and
two responses that it ranks one way in one order and the other way in the other make no pair.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from internvl_mpo.pairing import choose_balanced
from internvl_mpo.records import IMAGE_PLACEHOLDER, PreferencePair, Response
from internvl_mpo.text_checks import is_repetitive, without_images

MAX_RATING = 10
RUBRIC = (
    "You see a question about the pictures and several responses to it. Rate each response from 1 (bad) to 10 "
    "(excellent). First look at what the pictures show. A response that states anything they do not show is bad, "
    "however well it is written; of those that state nothing wrong, the one that answers the question more fully is "
    "better. Length alone is no merit."
)
_RATING = re.compile(r"^\W*response\s*(\d+)\W*?[:=-]\W*(\d+(?:\.\d+)?)(?:\s*/\s*10)?\b", re.IGNORECASE | re.MULTILINE)


def judge_request(responses: Sequence[Response], rubric: str) -> str:
    """Return what the judge is asked: rubric, conversation, numbered responses, the form of its reply.

    `<image>` stays where the question has it, so that an engine puts the pictures there.

    Args:
        responses: to one prompt, in the order in which they are shown.
        rubric: what is good and what is bad.
    """
    first = responses[0]
    asked = first.provenance.get("original_question", first.question)
    if first.images and IMAGE_PLACEHOLDER not in "".join((asked, *(turn[0] for turn in first.history))):
        asked = f"{IMAGE_PLACEHOLDER}\n" * len(first.images) + asked
    turns = "".join(f"Earlier question:\n{question}\n\nEarlier answer:\n{without_images(answer)}\n\n"
                    for question, answer in first.history)  # fmt: skip
    shown = "\n\n".join(f"Response {number}:\n{without_images(response.response)}"
                        for number, response in enumerate(responses, start=1))  # fmt: skip
    form = "\n".join(f"Response {number}: <rating>" for number in range(1, len(responses) + 1))
    return f"{rubric}\n\n{turns}Question:\n{asked}\n\n{shown}\n\nReply with these lines only:\n{form}"


def read_ratings(text: str, count: int) -> list[float] | None:
    """Return the ratings in a judge's reply, in the order in which responses were shown.

    None where one is missing, given twice with different numbers, or outside 0 to `MAX_RATING`.
    """
    found: dict[int, float] = {}
    for number, rating in _RATING.findall(text):
        if found.setdefault(int(number), float(rating)) != float(rating):
            return None
    ratings = [found.get(number) for number in range(1, count + 1)]
    if len(found) != count or any(rating is None or rating > MAX_RATING for rating in ratings):
        return None
    return [rating for rating in ratings if rating is not None]


@dataclass(frozen=True)
class Rated:
    """A response with its ratings, in the order as shown first and in reverse."""

    response: Response
    ratings: tuple[float, float]

    @property
    def mean(self) -> float:
        """The rating that counts."""
        return sum(self.ratings) / 2

    @property
    def log_length(self) -> float:
        """Logarithm of the characters."""
        return math.log(len(self.response.response))


def shown_responses(responses: Iterable[Response], count: int, seed: int) -> list[Response]:
    """Return up to `count` different responses of one question, in an order drawn from the seed and their content."""

    def place(response: Response) -> bytes:
        return blake2b(f"{seed}\x1f{response.response}\x1f{response.id}".encode("utf-8", "surrogatepass")).digest()

    texts: dict[str, Response] = {}
    for response in sorted(responses, key=place):
        if response.response.strip():
            texts.setdefault(response.response.strip(), response)
    return list(texts.values())[:count]


def judged_pairs(
    rated: Sequence[Rated], *, min_gap: float, cap: int, counts: Counter[str]
) -> Iterator[tuple[Rated, Rated]]:
    """Yield up to `cap` pairs of one question, (better, worse), lengths in balance.

    Args:
        rated: in any order.
        min_gap: smallest difference of their mean ratings.
        cap: most pairs.
        counts: of pairs that are left out, by reason.
    """

    def is_fit(better: Rated, worse: Rated) -> bool:
        made = better.response.provenance
        reasons = {
            "ties": better.mean == worse.mean,
            "pairs with too small a gap": better.mean - worse.mean < min_gap,
            "pairs the judge ranks the other way when they change places": any(
                one < other for one, other in zip(better.ratings, worse.ratings, strict=True)
            ),
            "chosen cut at the token limit": made.get("finish_reason") == "length",
            "chosen that repeat themselves": is_repetitive(better.response.response),
        }
        reason = next((name for name, holds in reasons.items() if holds), None)
        if reason is not None:
            counts[reason] += 1
        return reason is None

    order = sorted(rated, key=lambda one: (-one.mean, one.response.id))
    # of each distance between places, largest first: the best with the worst, then those next to them
    places = [(low, low + step) for step in range(len(order) - 1, 0, -1) for low in range(len(order) - step)]
    yield from choose_balanced(((order[low], order[high]) for low, high in places), cap, is_fit)[0]


def as_pair(better: Rated, worse: Rated, judge: str) -> PreferencePair:
    """Return the row of a pair, with both ratings and who gave them."""
    first = better.response
    return first.chosen_over(
        worse.response.response,
        "judged",
        {
            "model": first.provenance.get("model"),
            "judge": judge,
            "chosen_response": {"id": first.id, "ratings": list(better.ratings)},
            "rejected_response": {"id": worse.response.id, "ratings": list(worse.ratings)},
        },
    )
