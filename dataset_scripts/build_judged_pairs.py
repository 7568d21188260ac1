r"""Build preference pairs from a judge that sees the pictures: for questions without a ground truth.

Reads Response rows (sample_responses.py with --num_samples 4 or more), lets a judge rate the responses of each question
twice, the second time in reverse order, and writes PreferencePair rows, rule "judged", where the mean ratings differ.
Every reply is kept in OUTPUT.part: a killed run goes on where it stopped, and the same command asks nothing again.
A reply without ratings is asked for again, up to --max_replies times.

    python dataset_scripts/build_judged_pairs.py --responses open_responses.jsonl --image_root images \
        --output pairs_judged.jsonl --engine http --base_url http://localhost:8000/v1 --temperature 0
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.engines import Engine, Request
from internvl_mpo.engines.journal import Journal, collect_replies, report_missing, sample_seed
from internvl_mpo.engines.loading import load_engine
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.judged_pairs import RUBRIC, Rated, as_pair, judge_request, judged_pairs, read_ratings, shown_responses
from internvl_mpo.pairing import group_key
from internvl_mpo.records import Response, content_id, read_rows
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings

RETRY_TEMPERATURE = 0.7  # at least; a greedy judge would say the same again


@dataclass(kw_only=True)
class Settings(EngineSettings):
    """Settings of the program; `--help` prints them."""

    responses: list[str] = setting(help="JSONL files of Response rows, several to each question")
    output: str = setting(help="JSONL file of PreferencePair rows to write")
    image_root: str = setting("", help="folder the image paths are relative to")
    rubric: str | None = setting(None, help="text file that says what is good and what is bad; empty is ours")
    num_rated: int = setting(4, help="most responses of a question that are shown to the judge")
    pairs_per_question: int = setting(2, help="most pairs of a question")
    min_gap: float = setting(1.0, help="smallest difference of the mean ratings of a pair, on a scale of 10")
    max_replies: int = setting(3, help="how often a judge is asked until its reply can be read")
    temperature: float = setting(0.0, help="of the judge; 0 is greedy")
    max_new_tokens: int = setting(512, help="longest reply of the judge in tokens")
    seed: int = setting(0, help="of the order in which responses are shown")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rated < 2 or self.pairs_per_question < 1 or self.max_replies < 1:
            raise BadInputError("num_rated must be at least 2, pairs_per_question and max_replies at least 1")
        if not 0 < self.min_gap <= 10:
            raise BadInputError(f"min_gap is {self.min_gap}; give a number above 0 and up to 10")


class Asked(NamedTuple):
    """One thing the judge is asked, and the requests for it: a second one only after a reply that cannot be read."""

    shown: list[Response]
    tries: list[Request]


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    settings = parse_settings(Settings, argv, program="dataset_scripts/build_judged_pairs.py", about=__doc__)
    print(show_settings(settings, "Building judged pairs"))
    counts: Counter[str] = Counter()
    questions = load_responses(settings, counts)
    rubric = Path(settings.rubric).read_text(encoding="utf-8").strip() if settings.rubric else RUBRIC
    engine = load_engine(settings)
    plan = [(ask(shown, settings, rubric, engine), ask(shown[::-1], settings, rubric, engine)) for shown in questions]
    missing: dict[str, str] = {}
    with Journal(settings.output) as journal:
        journal.check(request.id for both in plan for asked in both for request in asked.tries)
        write_settings(settings, f"{settings.output}.settings.yaml")  # those of a refused run would belie the output
        for number in range(settings.max_replies):
            wanted = [asked.tries[number] for both in plan for asked in both if is_open(asked, number, journal)]
            missing |= collect_replies(engine, wanted, len(wanted), journal) if wanted else {}
        rows = [pair.to_json() for both in plan for pair in pairs_of(both, settings, engine, journal, counts)]
        count = journal.finish(rows)
    print(f"{count} pairs from {len(questions)} questions -> {settings.output}")
    if counts:
        print("left out: " + ", ".join(f"{amount} {reason}" for reason, amount in sorted(counts.items())))
    return report_missing(missing, settings.output)


def load_responses(settings: Settings, counts: Counter[str]) -> list[list[Response]]:
    """Read the responses; return those of each question with at least two different ones, in the order as shown.

    Others are counted by reason: a policy that has become sure of itself makes no pairs, which is no mistake.

    Raises:
        BadInputError: the rubric is not there, or no question was answered twice.
    """
    if settings.rubric and not Path(settings.rubric).is_file():
        raise BadInputError(f"rubric '{settings.rubric}' does not exist; give a text file")
    groups: dict[str, list[Response]] = {}
    for path in settings.responses:
        for row in read_rows(path, Response):
            groups.setdefault(group_key(row), []).append(row)
    if all(len(group) < 2 for group in groups.values()):
        raise BadInputError(
            f"no question in {', '.join(settings.responses)} has two responses; sample with --num_samples 4"
        )
    shown = [shown_responses(group, settings.num_rated, settings.seed) for group in groups.values()]
    several = [one for one in shown if len(one) > 1]
    if len(several) < len(shown):
        counts["questions without two different responses"] = len(shown) - len(several)
    return several


def ask(shown: list[Response], settings: Settings, rubric: str, engine: Engine) -> Asked:
    """Return what the judge is asked about responses in this order."""
    first, text = shown[0], judge_request(shown, rubric)
    images = tuple(str(Path(settings.image_root, image)) for image in first.images)
    tries = []
    for number in range(settings.max_replies):
        sampling = settings.sampling(settings.max_new_tokens)
        if number:
            sampling = replace(sampling, temperature=max(RETRY_TEMPERATURE, sampling.temperature))
        id = content_id(text, first.images, engine.model_id, engine.revision, asdict(sampling), number)
        tries.append(Request(id=id, question=text, images=images, seed=sample_seed(0, id, 0), sampling=sampling))
    return Asked(shown, tries)


def is_open(asked: Asked, number: int, journal: Journal) -> bool:
    """Whether the reply with this number is wanted: it is the first, or none before could be read."""
    before = [journal[request.id].text for request in asked.tries[:number] if request.id in journal]
    unread = len(before) == number and all(read_ratings(text, len(asked.shown)) is None for text in before)
    return unread and asked.tries[number].id not in journal


def ratings_of(asked: Asked, journal: Journal) -> list[float] | None:
    """Return the ratings of the first reply that can be read."""
    texts = (journal[request.id].text for request in asked.tries if request.id in journal)
    return next((ratings for text in texts if (ratings := read_ratings(text, len(asked.shown)))), None)


def pairs_of(
    both: tuple[Asked, Asked], settings: Settings, engine: Engine, journal: Journal, counts: Counter[str]
) -> Iterator:
    """Yield the pairs of a question whose ratings came in both orders."""
    ratings = [ratings_of(asked, journal) for asked in both]
    if ratings[0] is None or ratings[1] is None:
        counts["questions without ratings that can be read"] += 1
        return
    rated = [
        Rated(response, scores)
        for response, scores in zip(both[0].shown, zip(ratings[0], ratings[1][::-1], strict=True), strict=True)
    ]
    for better, worse in judged_pairs(rated, min_gap=settings.min_gap, cap=settings.pairs_per_question, counts=counts):
        yield as_pair(better, worse, engine.model_id)


if __name__ == "__main__":
    sys.exit(run_program(main))
