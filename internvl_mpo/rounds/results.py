"""What was measured of every arm and round, read from the files that the stages left."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import read_json
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.rounds.lanes import RoundLanes

NUM_BINS = 10  # of the histogram of pass rates: [0, 0.1), .. [0.9, 1]


def held_out(lanes: RoundLanes, arm: str, number: int) -> dict[str, Any]:
    """Return the score of a policy on the held-out questions, in per cent; round 0 is the first policy.

    The keys are `accuracy`, `interval` (95 % over questions), `unparsable` and `num_questions`.

    Raises:
        BadInputError: no held-out answer has a score.
    """
    settings = lanes.settings
    scores = read_json(lanes.evaluation(arm, number) / "scores.json")[settings.benchmark][settings.mode]
    if scores[scores["headline"]] is None:
        raise BadInputError(f"{lanes.evaluation(arm, number)} holds no answer with a score; look at its report.html")
    return {
        "accuracy": scores[scores["headline"]],
        "interval": scores["interval"],
        "unparsable": scores.get("unanswered"),
        "num_questions": scores["num_examples"],
    }


def sampled(folder: Path) -> dict[str, Any]:
    """Return what a round's data folder holds: counts, shares of responses in per cent, the histogram of pass rates."""
    rows = [row for _, row in iter_jsonl(folder / "pass_rates.jsonl")]
    outcomes = Counter({key: sum(row[key] for row in rows) for key in ("right", "wrong", "unparsable", "undecided")})
    count = sum(outcomes.values())
    bins = Counter(min(int(NUM_BINS * row["pass_rate"]), NUM_BINS - 1) for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    names = ("open_responses", "pairs_dropout_ntp", "judged_responses")
    others = [count for name in names for count in _tokens(folder / f"{name}.jsonl")]
    files = sorted({*folder.glob("pairs_*.jsonl"), *folder.glob("fixed/*.jsonl")} - {*folder.glob("*.all_wrong.jsonl")})
    return {
        "num_questions": len(rows),
        "num_samples": count + len(others),
        "num_tokens": tokens + sum(others),
        "tokens_per_response": tokens / (count or 1),
        "right": 100 * outcomes["right"] / (count or 1),
        "unparsable": 100 * outcomes["unparsable"] / (count or 1),
        "pass_rates": [bins[number] for number in range(NUM_BINS)],
        "num_pairs": {str(path.relative_to(folder)): sum(1 for _ in iter_jsonl(path)) for path in files},
    }


def _tokens(path: Path) -> list[int]:
    """Tokens of each row of sampled text; empty where there is no such file."""
    return [row["provenance"].get("num_tokens", 0) for _, row in iter_jsonl(path)] if path.exists() else []


def best_round(accuracies: list[float]) -> int:
    """Return the place of the largest accuracy, the first of equal ones."""
    return accuracies.index(max(accuracies))


def results(lanes: RoundLanes, finished: Mapping[str, Mapping[str, Any]], rounds: Mapping[str, int]) -> dict[str, Any]:
    """Collect everything that report and docs show.

    Args:
        lanes: knows where files lie.
        finished: what the stages took, by name.
        rounds: how many rounds every arm has finished.
    """
    arms = {}
    for arm, count in rounds.items():
        rows = [held_out(lanes, arm, number) for number in range(count + 1)]
        for number, row in enumerate(rows):
            row["policy"] = str(lanes.policy(arm, number))
            row["is_removed"] = number > 0 and not lanes.weights(arm, number)
            if number:
                row["data"] = sampled(lanes.data(arm, number))
        arms[arm] = {"rounds": rows, "best": best_round([row["accuracy"] for row in rows])}
    seconds = {name: {key: stage[key] for key in ("seconds", "cpu_seconds")} for name, stage in finished.items()}
    return {"arms": arms, "stages": seconds, "benchmark": lanes.settings.benchmark, "mode": lanes.settings.mode,
            "seed": lanes.settings.seed, "steps_per_round": lanes.settings.max_steps}  # fmt: skip
