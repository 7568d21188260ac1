"""From responses to preference pairs: by correctness of the final answer, and by Dropout-NTP.

Nothing here depends on the order in which responses arrive: groups are keyed by content, everything inside a group is
sorted, and every choice is drawn from a hash of the seed and the content. So the same responses and the same seed give
the same bytes on any number of workers.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, TypeVar

from internvl_mpo.answers.comparing import Outcome, Verdict, compare_answers
from internvl_mpo.answers.finding import parse_answer
from internvl_mpo.prompts import STYLES, language_of
from internvl_mpo.records import PairLines, PreferencePair, Question, Response, json_quoted, to_json_text
from internvl_mpo.text_checks import LONG_WORDS, LOOP_SHARE, entails, has_similar, is_repetitive, word_shingles

# How far ahead in the diverse order a pair may be preferred because its lengths balance the pairs taken before.
BALANCE_WINDOW = 8


@dataclass(frozen=True, kw_only=True)
class PairRules:
    """What makes a pair.

    Attributes:
        pairs_per_question: most right-wrong pairs of one question; the original's 15.
        format_pairs_per_question: most right-unparsable pairs of one question.
        seed: of every draw.
        min_pass_rate, max_pass_rate: share of right answers a question must have; outside it is too hard or too easy.
        max_length_ratio: most a pair's longer text may exceed the shorter one; 0 is off.
        max_similarity: two chosen of one question that share this much of their word triples count as one, and so do
            two rejected with the same answer; 1 removes exact copies only.
        answer_format: where the final answer stands; empty takes it from the response's prompt style.
        keep_truncated: whether a response cut at the token limit may be chosen.
    """

    pairs_per_question: int = 15
    format_pairs_per_question: int = 15
    seed: int = 0
    min_pass_rate: float = 0.0
    max_pass_rate: float = 1.0
    max_length_ratio: float = 0.0
    max_similarity: float = 0.9
    answer_format: str = ""
    keep_truncated: bool = False


@dataclass
class PairingStatistics:
    """Counts by source, mergeable; `table` prints them."""

    counts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, source: str, key: str, amount: float = 1) -> None:
        """Add to one count."""
        self.counts[source][key] += amount

    def merge(self, other: "PairingStatistics") -> None:
        """Add all counts of another."""
        for source, counts in other.counts.items():
            self.counts[source].update(counts)

    def table(self) -> str:
        """Return one line per source, and below it why candidates were left out."""
        columns = ("questions", "responses", "right", "wrong", "unparsable", "all wrong", "correctness", "format")
        total = Counter()
        for counts in self.counts.values():
            total.update(counts)
        width = max([len("source"), *(len(source) for source in self.counts)])
        lines = ["  ".join([f"{'source':<{width}}", *(f"{c:>11}" for c in columns), "length c/r", "pass rate"])]
        for source, counts in [*sorted(self.counts.items()), ("total", total)]:
            cells = [f"{counts[column]:>11}" for column in columns]
            pairs = counts["correctness"] + counts["format"]
            ratio = math.exp(counts["log length ratio"] / pairs) if pairs else float("nan")
            rate = counts["right"] / counts["responses"] if counts["responses"] else float("nan")
            lines.append("  ".join([f"{source:<{width}}", *cells, f"{ratio:>10.2f}", f"{rate:>9.2f}"]))
        dropped = {key[5:]: total[key] for key in sorted(total) if key.startswith("drop ")}
        if dropped:
            lines.append("left out: " + ", ".join(f"{amount} {reason}" for reason, amount in dropped.items()))
        return "\n".join(lines)


class HasLength(Protocol):
    """Something written; `log_length` is the logarithm of its characters."""

    log_length: float


L = TypeVar("L", bound=HasLength)


class Judged:
    """A response and what its answer is worth."""

    __slots__ = ("answer", "log_length", "outcome", "response", "text", "verdict")

    def __init__(self, response: Response, verdict: Verdict):
        self.response = response
        self.text = response.response
        self.verdict = verdict
        self.outcome = verdict.outcome
        self.answer = verdict.answer
        self.log_length = math.log(len(self.text) or 1)


class Match(NamedTuple):
    """Two responses to one question that make a pair, the first preferred."""

    right: Judged
    other: Judged
    rule: str
    pass_rate: float


# --------------------------------------------------------------------------------------------------- correctness


def correctness_pairs(
    responses: Iterable[Response], rules: PairRules, stats: PairingStatistics
) -> tuple[list[PreferencePair], Question | None]:
    """Return the pairs of one question as rows, and the question where no response was right; see `match_responses`."""
    matches, question = match_responses(responses, rules, stats)
    return [_pair(*match) for match in matches], question


def match_responses(
    responses: Iterable[Response], rules: PairRules, stats: PairingStatistics
) -> tuple[list[Match], Question | None]:
    """Choose the pairs of one question: right over wrong, and right over unparsable.

    Args:
        responses: all responses to one prompt with one ground truth, in any order.
        rules: caps and filters.
        stats: counted into.

    Returns:
        The pairs, and the question where no response was right, to be asked of a stronger model.
    """
    unique = {response.id: response for response in responses}
    judged = judge_responses(unique.values(), rules)
    first = judged[0].response
    source = first.source
    by_outcome = {outcome: [item for item in judged if item.outcome is outcome] for outcome in Outcome}
    for outcome, items in by_outcome.items():
        stats.add(source, outcome.value, len(items))
    stats.add(source, "questions")
    stats.add(source, "responses", len(judged))
    rights = by_outcome[Outcome.RIGHT]
    if not rights:
        stats.add(source, "all wrong")
        return [], _question(judged)
    rate = len(rights) / len(judged)
    if not rules.min_pass_rate <= rate <= rules.max_pass_rate:
        stats.add(source, "drop questions outside the pass-rate band")
        return [], None
    chosen = _diverse(rights, rules, stats, as_chosen=True)
    matches = []
    for rule, outcome, cap in (
        ("correctness", Outcome.WRONG, rules.pairs_per_question),
        ("format", Outcome.UNPARSABLE, rules.format_pairs_per_question),
    ):
        rejected = _diverse(by_outcome[outcome], rules, stats)
        taken, log_ratio = _choose(chosen, rejected, cap, rules, stats)
        matches += [Match(right, other, rule, rate) for right, other in taken]
        stats.add(source, rule, len(taken))
        stats.add(source, "log length ratio", log_ratio)
    return matches, None


def _question(judged: list[Judged]) -> Question:
    """The question as it was before a prompt style was put around it."""
    asked = min((item.response for item in judged), key=lambda response: response.id)
    return Question(
        id=asked.question_id,
        images=asked.images,
        question=asked.provenance.get("original_question", asked.question),
        answer=asked.answer,
        system=asked.system,
        history=asked.history,
        source=asked.source,
        provenance={"responses": len(judged)},
    )


def judge_responses(responses: Iterable[Response], rules: PairRules) -> list[Judged]:
    """Judge the responses to one prompt with one ground truth; equal answers are compared with it once.

    Args:
        responses: all of them have a ground truth.
        rules: its `answer_format` says where final answers stand.

    Raises:
        BadInputError: a ground truth is a list of another form than texts.
    """
    of_texts: dict[tuple[str, str, str], Verdict] = {}
    of_answers: dict[tuple[str, str], Verdict] = {}
    judged = []
    for response in responses:
        text, source, style = response.response, response.source, str(response.provenance.get("style", ""))
        key = text, source, style
        verdict = of_texts.get(key)
        if verdict is None:
            answer_format = STYLES[style].answer_format if style in STYLES else "marker"
            answer, reason = parse_answer(text, rules.answer_format or answer_format)
            if answer is None:
                verdict = Verdict(Outcome.UNPARSABLE, None, "parse", reason)
            else:
                verdict = of_answers.get((answer, source))
            if verdict is None:
                verdict = of_answers[answer, source] = compare_answers(
                    answer, response.answer or "", source=source, question=response.question
                )
            of_texts[key] = verdict
        judged.append(Judged(response, verdict))
    return judged


def _unfit(response: Response, rules: PairRules, is_varied: bool) -> str | None:
    """Why a response may not be chosen, or None."""
    if response.provenance.get("finish_reason") == "length" and not rules.keep_truncated:
        return "chosen cut at the token limit"
    if not is_varied and is_repetitive(response.response):
        return "chosen that repeat themselves"
    if language_of(response.response) != language_of(response.question):
        return "chosen in another language than the question"
    return None


def _diverse(items: list[Judged], rules: PairRules, stats: PairingStatistics, as_chosen: bool = False) -> list[Judged]:
    """Usable responses without near copies, in a seeded order in which different answers come first."""
    draws = _draws(items, rules.seed)
    ordered = [items[index] for index in sorted(range(len(items)), key=draws.__getitem__)]
    # rights come to the same answer however they write it; two wrongs with different answers are no copies
    compared = ["" if as_chosen else item.answer for item in ordered]
    like = Counter(compared)
    kept: list[Judged] = []
    texts: set[str] = set()
    shingles: defaultdict[str | None, list[frozenset]] = defaultdict(list)
    for item, answer in zip(ordered, compared, strict=True):
        response, text = item.response, item.text
        if not text or text.isspace():
            continue
        if text in texts:
            stats.add(response.source, "drop copies")
            continue
        compares = like[answer] > 1 and rules.max_similarity < 1
        words = text.lower().split() if compares else []
        mine = word_shingles(words)
        if as_chosen:
            # every triple but the last begins another run of four words: most texts are seen not to loop from here
            is_varied = len(words) >= LONG_WORDS and len(mine) - 1 >= LOOP_SHARE * len(words)
            reason = _unfit(response, rules, is_varied)
            if reason is not None:
                stats.add(response.source, f"drop {reason}")
                continue
        if compares:
            if has_similar(mine, shingles[answer], rules.max_similarity):
                stats.add(response.source, "drop near copies")
                continue
            shingles[answer].append(mine)
        texts.add(text)
        kept.append(item)
    seen: dict[str | None, int] = {}
    turns = []
    for item in kept:
        turn = seen[item.answer] = seen.get(item.answer, -1) + 1
        turns.append(turn)
    return [kept[index] for index in sorted(range(len(kept)), key=turns.__getitem__)]


def _choose(
    chosen: list[Judged], rejected: list[Judged], cap: int, rules: PairRules, stats: PairingStatistics
) -> tuple[list[tuple[Judged, Judged]], float]:
    """Take up to `cap` pairs: every response is used once before one is used twice; see `choose_balanced`."""

    def is_fit(right: Judged, other: Judged) -> bool:
        reason = _unfit_pair(right, other, rules)
        if reason is not None:
            stats.add(right.response.source, f"drop {reason}")
        return reason is None

    return choose_balanced(_diagonal(chosen, rejected), cap, is_fit)


def choose_balanced(
    candidates: Iterator[tuple[L, L]], cap: int, is_fit: Callable[[L, L], bool]
) -> tuple[list[tuple[L, L]], float]:
    """Take up to `cap` fit pairs: of the next few always the one that best balances the lengths of both sides.

    Args:
        candidates: (chosen, rejected), best first.
        cap: most pairs.
        is_fit: whether a pair may be taken; asked once for every pair that is looked at.

    Returns:
        The pairs, and the sum of the logarithms of chosen over rejected length.
    """
    waiting: list[tuple[L, L]] = []
    ratios: list[float] = []  # of those waiting
    taken: list[tuple[L, L]] = []
    balance = 0.0
    while len(taken) < cap:
        while len(waiting) < BALANCE_WINDOW:
            pair = next(candidates, None)
            if pair is None:
                break
            if is_fit(*pair):
                waiting.append(pair)
                ratios.append(pair[0].log_length - pair[1].log_length)
        if not waiting:
            break
        distances = [abs(balance + ratio) for ratio in ratios]
        best = distances.index(min(distances))
        balance += ratios.pop(best)
        taken.append(waiting.pop(best))
    return taken, balance


def _diagonal(rows: list[Judged], columns: list[Judged]) -> Iterator[tuple[Judged, Judged]]:
    """Every pair once, running through both lists side by side before any combination repeats a member."""
    common = math.lcm(len(rows), len(columns))
    for k in range(len(rows) * len(columns)):
        yield rows[k % len(rows)], columns[(k + k // common) % len(columns)]


def _unfit_pair(right: Judged, other: Judged, rules: PairRules) -> str | None:
    if right.text == other.text:
        return "pairs of equal texts"
    if other.outcome is Outcome.WRONG and entails(other.answer or "", right.answer or ""):
        return "pairs whose wrong answer contains the right one"
    if rules.max_length_ratio and math.exp(abs(right.log_length - other.log_length)) > rules.max_length_ratio:
        return "pairs of too different lengths"
    return None


# Of a response's provenance, what a pair keeps.
_KEPT = ("engine", "model", "revision", "style", "language", "temperature", "top_k", "top_p", "max_tiles")


def _pair(right: Judged, other: Judged, rule: str, pass_rate: float) -> PreferencePair:
    response, made = right.response, right.response.provenance
    return response.chosen_over(
        other.response.response,
        rule,
        {
            **{key: made[key] for key in _KEPT if key in made},
            "pass_rate": round(pass_rate, 4),
            "chosen_response": _origin(right),
            "rejected_response": _origin(other),
        },
    )


def pair_lines(matches: Sequence[Match]) -> Iterator[tuple[str, str, str]]:
    """Yield (source, rule, lines of JSON) of the pairs of one question, those in a row with the same two together.

    The lines are `PreferencePair.to_line()` of the pairs `correctness_pairs` returns, made several times faster: the
    question, and what a response adds to the pairs it stands in, are encoded once.
    """
    if not matches:
        return
    first = matches[0].right.response
    lines = PairLines(first)
    pass_rate = f'"pass_rate": {to_json_text(round(matches[0].pass_rate, 4))}'
    chosen_parts: dict[str, tuple[str, str]] = {}
    rejected_parts: dict[str, tuple[str, str]] = {}
    together: list[str] = []
    before = (first.source, matches[0].rule)
    for right, other, rule, _ in matches:
        response, made = right.response, right.response.provenance
        chosen = chosen_parts.get(response.id)
        if chosen is None:
            kept = "".join([f'"{key}": {to_json_text(made[key])}, ' for key in _KEPT if key in made])
            text, origin = _encode(right)
            chosen = chosen_parts[response.id] = text, f'{{{kept}{pass_rate}, "chosen_response": {origin}'
        rejected = rejected_parts.get(other.response.id)
        if rejected is None:
            text, origin = _encode(other)
            rejected = rejected_parts[other.response.id] = text, f', "rejected_response": {origin}}}'
        if (response.source, rule) != before:
            yield *before, "".join(together)
            together = []
            before = (response.source, rule)
        together.append(lines.line(chosen[0], rejected[0], response.source, rule, chosen[1] + rejected[1]))
    yield *before, "".join(together)


def _encode(item: Judged) -> tuple[str, str]:
    """The text of a response, and where it comes from, as JSON."""
    response, verdict = item.response, item.verdict
    origin = f'"id": {json_quoted(response.id)}, "answer": {to_json_text(verdict.answer)}, "rule": "{verdict.rule}"'
    if "seed" in response.provenance:
        origin += f', "seed": {to_json_text(response.provenance["seed"])}'
    return json_quoted(item.text), f"{{{origin}}}"


def _origin(item: Judged) -> dict[str, Any]:
    origin = {"id": item.response.id, "answer": item.answer, "rule": item.verdict.rule}
    if "seed" in item.response.provenance:
        origin["seed"] = item.response.provenance["seed"]
    return origin


def _draws(items: Sequence[Judged], seed: int) -> list[bytes]:
    """A number drawn for every response from the seed and its content, which orders them."""
    texts = [f"{seed}\x1f{item.text}\x1f{item.response.id}" for item in items]
    return [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]


def group_key(response: Response) -> str:
    """Return what responses to the same prompt with the same ground truth share, hashed to 16 digits."""
    names = "\x1f".join(response.images)
    text = "\x1f".join((names, "", response.question, str(response.answer), *map(str, response.context)))
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
