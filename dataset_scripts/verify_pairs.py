r"""Ask a judge whether the chosen answer of each pair is right and the rejected one is not; keep what it agrees with.

Reads PreferencePair rows with a ground truth (build_correctness_pairs.py) and writes those the judge agrees with; the
others go to a second file with its replies. The judge sees question, ground truth and one response at a time, and with
`--with_image true --image_root images` the pictures.
Every reply is kept in OUTPUT.part: a killed run goes on where it stopped, and the same command asks nothing again.

    python dataset_scripts/verify_pairs.py --pairs pairs_correctness.jsonl --output pairs_verified.jsonl \
        --engine http --base_url http://localhost:8000/v1 --temperature 0
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.answers.comparing import accepted_answers
from internvl_mpo.engines import Reply, Request, Sampling
from internvl_mpo.engines.journal import Journal, collect_replies, report_missing, sample_seed
from internvl_mpo.engines.loading import load_engine
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.prompts import judge_prompt
from internvl_mpo.records import IMAGE_PLACEHOLDER, PreferencePair, content_id, read_rows, write_rows
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings
from internvl_mpo.text_checks import without_images


@dataclass(kw_only=True)
class Settings(EngineSettings):
    """Settings of the program; `--help` prints them."""

    pairs: list[str] = setting(help="JSONL files of PreferencePair rows, separated by commas")
    output: str = setting(help="JSONL file of the pairs the judge agrees with")
    with_image: bool = setting(False, help="show the pictures to the judge")
    image_root: str = setting("", help="folder the image paths are relative to; needed only with the image")
    refused: str | None = setting(None, help="JSONL file of the other pairs; empty is beside the output")
    temperature: float = setting(0.0, help="0 is greedy")
    max_new_tokens: int = setting(16, help="longest reply of the judge in tokens")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    settings = parse_settings(Settings, argv, program="dataset_scripts/verify_pairs.py", about=__doc__)
    sampling = settings.sampling(settings.max_new_tokens)
    print(show_settings(settings, "Verifying pairs"))
    pairs = [pair for path in settings.pairs for pair in read_rows(path, PreferencePair)]
    if not pairs:
        raise BadInputError(f"no pairs in {', '.join(settings.pairs)}")
    output = Path(settings.output)
    refused_path = Path(settings.refused or output.with_suffix(".refused.jsonl"))
    engine = load_engine(settings)
    asked = partial(judge_requests, sampling=sampling, judge=engine.model_id, image_root=image_root_of(settings))
    requests = {request.id: request for pair in pairs for request in asked(pair)}
    refused: list[PreferencePair] = []
    kept: list[PreferencePair] = []
    reasons: Counter[str] = Counter()
    with Journal(output) as journal:
        journal.check(requests)
        write_settings(settings, f"{settings.output}.settings.yaml")  # those of a refused run would belie the output
        missing = collect_replies(engine, requests.values(), len(requests), journal)
        for pair in pairs:
            reason, replies = judge_pair([request.id for request in asked(pair)], journal)
            judged = replace(pair, provenance={**pair.provenance, "judge": engine.model_id, "judge_replies": replies})
            if reason is None:
                kept.append(judged)
            elif reason != "no reply":
                refused.append(judged)
                reasons[reason] += 1
        write_rows(refused, refused_path)
        journal.finish(pair.to_json() for pair in kept)
    print(f"{len(kept)} of {len(pairs)} pairs -> {output}\n{len(refused)} -> {refused_path}")
    if reasons:
        print("refused: " + ", ".join(f"{amount} {reason}" for reason, amount in sorted(reasons.items())))
    return report_missing(missing, settings.output)


def image_root_of(settings: Settings) -> Path | None:
    """Return where the pictures are that the judge is shown; None shows none."""
    return Path(settings.image_root) if settings.with_image else None


def judge_requests(pair: PreferencePair, sampling: Sampling, judge: str, image_root: Path | None) -> Iterator[Request]:
    """Yield the two questions about a pair, chosen first."""
    if pair.answer is None:
        raise BadInputError(f"pair {pair.id} has no ground truth; verify pairs of build_correctness_pairs.py only")
    truth = " or ".join(accepted_answers(pair.answer))
    worded = without_images if image_root is None else with_images(pair)
    question = worded("\n\n".join((*(text for turn in pair.history for text in turn), pair.question)))
    images = () if image_root is None else tuple(str(image_root / name) for name in pair.images)
    for response in (pair.chosen, pair.rejected):
        asked = judge_prompt(question, truth, response if image_root is None else without_images(response))
        shown = (pair.images,) if images else ()
        id = content_id(asked, judge, asdict(sampling), *shown)  # verdicts under other settings are other verdicts
        yield Request(id=id, question=asked, images=images, seed=sample_seed(0, id, 0), sampling=sampling)


def with_images(pair: PreferencePair) -> Callable[[str], str]:
    """Return what gives a question places for the pictures of a pair where it has none."""
    marks = f"{IMAGE_PLACEHOLDER}\n" * len(pair.images)
    return lambda text: text if IMAGE_PLACEHOLDER in text else marks + text


def judge_pair(ids: list[str], journal: Journal) -> tuple[str | None, list[str]]:
    """Return why a pair is refused (None: it is kept) and the judge's replies to its two requests."""
    found = [journal[id] for id in ids if id in journal]
    replies = [reply.text for reply in found]
    if len(found) < 2:
        return "no reply", replies
    chosen, rejected = (read_verdict(reply) for reply in found)
    if chosen is None or rejected is None:
        return "unclear verdict", replies
    if not chosen:
        return "chosen judged wrong", replies
    return ("rejected judged right" if rejected else None), replies


def read_verdict(reply: Reply) -> bool | None:
    """Return True for a reply that begins with "yes", False for "no", else None."""
    words = reply.text.lower().replace(",", " ").replace(".", " ").split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


if __name__ == "__main__":
    sys.exit(run_program(main))
