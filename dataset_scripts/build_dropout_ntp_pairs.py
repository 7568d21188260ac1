r"""Build preference pairs by Dropout Next-Token Prediction: half of a response, continued without the picture.

Reads Response rows whose text is taken as chosen (sample_responses.py with --num_samples 1), keeps the first part of
each response, lets the model continue it without seeing the image, and writes PreferencePair rows with the result as
rejected.
A killed run goes on where it stopped and ends in the same file.

    python dataset_scripts/build_dropout_ntp_pairs.py --model outputs/mini/start --responses open_responses.jsonl \
        --output pairs_dropout_ntp.jsonl --ratio 0.5 --seed 0

`--with_image true --image_root images` gives MMPR's `prefix_pair_sr.._with_image` variant.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.engines import Engine, Reply, Request, Sampling
from internvl_mpo.engines.journal import Journal, collect_replies, report_missing, sample_seed
from internvl_mpo.engines.loading import load_engine
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.records import Response, content_id, read_rows
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings
from internvl_mpo.text_checks import cut_prefix, without_images


@dataclass(kw_only=True)
class Settings(EngineSettings):
    """Settings of the program; `--help` prints them."""

    responses: list[str] = setting(help="JSONL files of Response rows, separated by commas")
    output: str = setting(help="JSONL file of PreferencePair rows to write")
    ratio: float = setting(0.5, help="share of the chosen response kept as prefix, in words, in Chinese in characters")
    with_image: bool = setting(False, help="show the image to the continuation too")
    image_root: str = setting("", help="folder the image paths are relative to; needed only with the image")
    num_continuations: int = setting(1, help="rejected responses per chosen one")
    max_new_tokens: int = setting(2048, help="longest continuation in tokens")
    keep_truncated: bool = setting(False, help="use responses and continuations that were cut at the token limit")
    seed: int = setting(0, help="with the response's id and the continuation's number it fixes every draw")
    limit: int | None = setting(None, help="take only the first responses")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio < 1:
            raise BadInputError(f"ratio is {self.ratio}; give 0 (nothing kept) up to but not including 1")
        if self.num_continuations < 1:
            raise BadInputError(f"num_continuations is {self.num_continuations}; give at least 1")
        if self.temperature == 0 and self.num_continuations > 1:
            raise BadInputError("temperature 0 gives equal continuations; set --num_continuations 1 or a temperature")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    settings = parse_settings(Settings, argv, program="dataset_scripts/build_dropout_ntp_pairs.py", about=__doc__)
    sampling = settings.sampling(settings.max_new_tokens)
    print(show_settings(settings, "Building Dropout-NTP pairs"))
    left_out: Counter[str] = Counter()
    responses = load_responses(settings, left_out)
    engine = load_engine(settings)
    plan = Plan(settings, sampling, responses, engine)
    with Journal(settings.output, reply_of=reply_of) as journal:
        journal.check(id for *_, id in plan.samples())
        write_settings(settings, f"{settings.output}.settings.yaml")  # those of a refused run would belie the output
        missing = collect_replies(engine, plan.requests(), plan.total, journal)
        count = journal.finish(plan.rows(journal, left_out))
    print(f"{count} pairs from {len(responses)} responses -> {settings.output}")
    if count:
        print(f"{plan.num_tokens / count:.1f} generated tokens per pair, the chosen response included")
    if left_out:
        print("left out: " + ", ".join(f"{amount} {reason}" for reason, amount in sorted(left_out.items())))
    return report_missing(missing, settings.output)


def load_responses(settings: Settings, left_out: Counter[str]) -> list[Response]:
    """Read the responses that can be cut; the others are counted by reason."""
    rows: dict[str, Response] = {}
    for path in settings.responses:
        for row in read_rows(path, Response):
            if row.provenance.get("finish_reason") == "length" and not settings.keep_truncated:
                left_out["chosen responses cut at the token limit"] += 1
            elif not row.response.strip():
                left_out["empty responses"] += 1
            elif settings.ratio and not cut_prefix(row.response, settings.ratio):
                left_out["responses too short to cut"] += 1
            elif settings.with_image and not row.images:
                left_out["responses without an image"] += 1
            else:
                rows.setdefault(row.id, row)
    if not rows:
        reasons = ", ".join(f"{amount} {reason}" for reason, amount in left_out.items())
        raise BadInputError(f"no usable response in {', '.join(settings.responses)}: {reasons or 'no rows'}")
    return list(rows.values())[: settings.limit]


class Plan:
    """Every continuation of the run, in the order of the output."""

    def __init__(self, settings: Settings, sampling: Sampling, responses: list[Response], engine: Engine):
        self.settings, self.sampling, self.responses, self.engine = settings, sampling, responses, engine
        self.total = len(responses) * settings.num_continuations
        self.num_tokens = 0

    def samples(self) -> Iterator[tuple[Response, str, int, dict[str, Any], str]]:
        """Yield (chosen response, prefix, seed, provenance, id of the continuation)."""
        settings = self.settings
        for response in self.responses:
            prefix = cut_prefix(response.response, settings.ratio)
            for number in range(settings.num_continuations):
                provenance = {
                    "engine": self.engine.name,
                    "model": self.engine.model_id,
                    "revision": self.engine.revision,
                    "ratio": settings.ratio,
                    "with_image": settings.with_image,
                    "temperature": self.sampling.temperature,
                    "top_k": self.sampling.top_k,
                    "top_p": self.sampling.top_p,
                    "max_new_tokens": self.sampling.max_new_tokens,
                    "seed": sample_seed(settings.seed, response.id, number),
                    "chosen_response": response.id,
                }
                yield response, prefix, provenance["seed"], provenance, content_id(response.id, prefix, provenance)

    def requests(self) -> Iterator[Request]:
        """Yield what the engine is asked."""
        root = Path(self.settings.image_root)
        for response, prefix, seed, _, id in self.samples():
            shown = response.images if self.settings.with_image else ()
            worded = str if shown else without_images
            yield Request(
                id=id,
                question=worded(response.question),
                images=tuple(str(root / image) for image in shown),
                history=tuple((worded(asked), answer) for asked, answer in response.history),
                system=response.system,
                prefix=prefix,
                seed=seed,
                sampling=self.sampling,
            )

    def rows(self, journal: Journal, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        """Yield the pairs of all continuations that came and are worth preferring the chosen response to."""
        seen: set[tuple[str, str]] = set()
        for response, prefix, _, provenance, id in self.samples():
            if id not in journal:
                continue
            reply = journal[id]
            rejected = prefix + reply.text
            self.num_tokens += reply.num_tokens + response.provenance.get("num_tokens", 0)
            if reply.finish_reason == "length" and not self.settings.keep_truncated:
                left_out["continuations cut at the token limit"] += 1
            elif not reply.text.strip():
                left_out["empty continuations"] += 1
            elif rejected.split() == response.response.split():
                left_out["continuations equal to the chosen response"] += 1
            elif (response.id, rejected) in seen:
                left_out["equal continuations"] += 1
            else:
                seen.add((response.id, rejected))
                yield response.chosen_over(
                    rejected,
                    "prefix_with_image" if self.settings.with_image else "dropout_ntp",
                    {
                        **provenance,
                        "request": id,
                        "prefix_chars": len(prefix),
                        "finish_reason": reply.finish_reason,
                        "num_tokens": reply.num_tokens,
                    },
                ).to_json()


def reply_of(row: dict[str, Any]) -> Reply:
    """Return the continuation inside a pair of an earlier run."""
    made = row["provenance"]
    return Reply(
        id=made["request"],
        text=row["rejected"][made["prefix_chars"] :],
        finish_reason=made["finish_reason"],
        num_tokens=made["num_tokens"],
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
