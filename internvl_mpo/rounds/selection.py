r"""Which questions a round asks: new ones first, then those that the policy was sometimes right on.

    python -m internvl_mpo.rounds select --questions questions.jsonl --image_root images --count 400 \
        --asked round_1/pass_rates.jsonl,round_2/pass_rates.jsonl --output round_3/questions.jsonl

A question that was always right or always wrong makes no pair, so it is not asked again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import NamedTuple

from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.mmpr.reading import iter_questions
from internvl_mpo.records import Question, write_rows
from internvl_mpo.settings import setting


@dataclass(kw_only=True)
class SelectSettings:
    """Settings of `python -m internvl_mpo.rounds select`."""

    questions: list[str] = setting(help="files of questions, in any form of docs/data.md")
    image_root: str = setting("", help="folder the image paths are relative to")
    output: str = setting(help="JSONL file of Question rows to write, in the order of the files")
    count: int | None = setting(None, help="most questions; empty takes all worth asking")
    asked: list[str] = setting([], help="files of earlier rounds with id and pass_rate, the first round first")
    min_pass_rate: float = setting(0.1, help="questions right less often come after the others")
    max_pass_rate: float = setting(0.7, help="questions right more often come after the others")
    seed: int = setting(0, help="of the draw among questions of one kind")


class Asked(NamedTuple):
    """When a question was asked last, the first round being 1, and the share of right answers; None is not known."""

    number: int
    pass_rate: float | None


def select(settings: SelectSettings) -> None:
    """Write the questions of a round.

    Raises:
        BadInputError: none is left that is worth asking.
    """
    rows: dict[str, Question] = {}
    for path in settings.questions:
        for question, _ in iter_questions(path, settings.image_root or None):
            rows.setdefault(question.id, question)
    asked: dict[str, Asked] = {}
    for number, path in enumerate(settings.asked, start=1):
        asked |= {row["id"]: Asked(number, row.get("pass_rate")) for _, row in iter_jsonl(path)}
    band = settings.min_pass_rate, settings.max_pass_rate
    chosen = choose(list(rows), asked, settings.count, band=band, seed=settings.seed)
    if not chosen:
        raise BadInputError(
            f"of {len(rows)} questions in {', '.join(settings.questions)} none is left that was neither always right "
            "nor always wrong; give more questions, or fewer rounds"
        )
    count = write_rows((row for id, row in rows.items() if id in chosen), settings.output)
    num_new = sum(id not in asked for id in chosen)
    print(f"{count} of {len(rows)} questions -> {settings.output} ({num_new} for the first time)")


def choose(
    ids: Sequence[str], asked: Mapping[str, Asked], count: int | None, *, band: tuple[float, float], seed: int
) -> set[str]:
    """Return the ids to ask: never asked ones, then those with a pass rate in the band, then other mixed ones.

    Of one kind those asked longest ago come first, and equal ones in an order drawn from the seed.

    Args:
        ids: of all questions.
        asked: what is known of those asked before, by id.
        count: most of them; None takes all worth asking.
        band: smallest and largest pass rate that is preferred.
        seed: of the draw.
    """

    def rank(id: str) -> tuple[int, int, bytes]:
        number, rate = asked.get(id, (0, None))
        preferred = rate is None or band[0] <= rate <= band[1]
        return 0 if id not in asked else 2 - preferred, number, sha256(f"{seed}/{id}".encode()).digest()

    worth = [id for id in ids if id not in asked or asked[id].pass_rate not in (0, 1)]
    return set(sorted(worth, key=rank)[:count])
