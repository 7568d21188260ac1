r"""Sample responses of a model to questions: the first stage of both halves of MMPR.

Reads Question rows (JSONL with image, question, answer: MMPR's prompt files are read as they are) and writes Response
rows in the order of the questions. A killed run goes on where it stopped and ends in the same file.

    # candidates for correctness pairs: 8 chain-of-thought answers to each question
    python dataset_scripts/sample_responses.py --model outputs/mini/start --questions questions.jsonl \
        --image_root images --output responses.jsonl --style cot --num_samples 8 --temperature 1.0 --top_k 50

    # chosen responses for Dropout-NTP: one greedy answer to each open question
    python dataset_scripts/sample_responses.py --model outputs/mini/start --questions open_questions.jsonl \
        --image_root images --output open_responses.jsonl --style plain --num_samples 1 --temperature 0
"""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.engines import Engine, Reply, Request, Sampling
from internvl_mpo.engines.journal import Journal, collect_replies, report_missing, sample_seed
from internvl_mpo.engines.loading import load_engine
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError, RowError, run_program
from internvl_mpo.files import atomic_path
from internvl_mpo.formats import to_own_form
from internvl_mpo.mmpr.reading import forms_found, iter_questions
from internvl_mpo.mmpr.tables import TablePictures
from internvl_mpo.prompts import STYLES, ask, language_of, style_for
from internvl_mpo.records import Question, Response, content_id
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings


@dataclass(kw_only=True)
class Settings(EngineSettings):
    """Settings of the program; `--help` prints them."""

    questions: list[str] = setting(
        help="files of questions (JSONL, JSON, Parquet; forms in docs/data.md) with commas, or hub:OWNER/NAME[:SPLIT]"
    )
    output: str = setting(help="JSONL file of Response rows to write")
    image_root: str = setting("", help="folder the image paths of the questions are relative to")
    style: list[str] = setting(["cot"], help=f"how to ask: {', '.join(STYLES)}, by_source, or several with commas")
    language: Literal["auto", "en", "zh"] = setting("auto", help="language of the prompt; auto is the question's own")
    num_samples: int = setting(8, help="responses per question")
    max_new_tokens: int = setting(4096, help="longest response in tokens")
    seed: int = setting(0, help="with the question's id and the sample's number it fixes every draw")
    limit: int | None = setting(None, help="take only the first questions")

    def __post_init__(self) -> None:
        super().__post_init__()
        for style in self.style:
            if style not in STYLES and style != "by_source":
                raise BadInputError(f"unknown style '{style}'; expected by_source, {', '.join(STYLES)}")
        if self.num_samples < 1:
            raise BadInputError(f"num_samples is {self.num_samples}; give at least 1")
        if self.temperature == 0 and self.num_samples > 1:
            raise BadInputError("temperature 0 gives equal samples; set --num_samples 1 or a temperature above 0")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    settings = parse_settings(Settings, argv, program="dataset_scripts/sample_responses.py", about=__doc__)
    sampling = settings.sampling(settings.max_new_tokens)
    print(show_settings(settings, "Sampling responses"))
    questions = load_questions(settings)
    engine = load_engine(settings)
    plan = Plan(settings, sampling, questions, engine)
    with Journal(settings.output, reply_of=reply_of) as journal:
        journal.check(id for *_, id in plan.samples())
        write_settings(settings, f"{settings.output}.settings.yaml")  # those of a refused run would belie the output
        missing = collect_replies(engine, plan.requests(), plan.total, journal)
        count = journal.finish(plan.rows(journal))
    print(f"{count} responses to {len(questions)} questions -> {settings.output}")
    return report_missing(missing, settings.output)


def load_questions(settings: Settings) -> list[Question]:
    """Read the questions; equal ones count once, rows without a source get the name of their file."""
    rows: dict[str, Question] = {}
    num_read = 0
    for path in settings.questions:
        is_local = not path.startswith("hub:")
        if is_local:
            print(forms_found(path, settings.image_root or None, is_pair=False))
        for row in file_questions(path, settings) if is_local else hub_questions(path, settings):
            num_read += 1
            rows.setdefault(row.id, row)
    if not rows:
        raise BadInputError(f"no questions in {', '.join(settings.questions)}")
    if len(rows) < num_read:
        print(f"{num_read - len(rows)} repeated questions are asked once")
    return list(rows.values())[: settings.limit]


def file_questions(path: str, settings: Settings) -> Iterator[Question]:
    """Read the questions of a file; pictures inside a table are saved under `image_root` by their content."""
    for question, pictures in iter_questions(path, settings.image_root or None):
        if not isinstance(pictures, TablePictures):
            yield question
            continue
        for name in question.images:
            target = Path(settings.image_root, "hub", name)
            if not target.exists():
                with atomic_path(target) as partial:
                    partial.write_bytes(pictures.read(name))
        yield replace(question, images=tuple(f"hub/{name}" for name in question.images))


def hub_questions(name: str, settings: Settings) -> Iterator[Question]:
    """Stream questions from a Hub dataset: columns of any form in `formats`, image or images for the pictures.

    Pictures are saved under `image_root` by the hash of their content, where all later stages find them.

    Raises:
        BadInputError: the dataset cannot be loaded, or a row is in no form that is read.
    """
    import datasets

    repository, _, split = name.removeprefix("hub:").partition(":")
    try:
        table = datasets.load_dataset(repository, split=split or "train", streaming=True)
    except Exception as error:  # the Hub client raises dozens of types
        raise BadInputError(
            f"cannot load {name}: {str(error).splitlines()[0]}; expected hub:OWNER/NAME:SPLIT"
        ) from error
    root = Path(settings.image_root)
    for number, row in enumerate(table):
        if number == settings.limit:
            break
        where = f"{name}, row {number}"
        pictures = {key: _saved(row[key], root) for key in ("image", "images") if row.get(key) is not None}
        try:
            own = to_own_form({**row, **pictures}, is_pair=False)[1]
        except RowError as error:
            raise RowError(error.reason, where) from error
        yield Question.from_json(own, source=repository.rpartition("/")[2], where=where)


def _saved(value: Any, root: Path) -> list[str]:
    images = value if isinstance(value, list) else [value]
    return [image if isinstance(image, str) else save_picture(image, root) for image in images]


def save_picture(image: Any, root: Path) -> str:
    """Save a PIL image as PNG under a name made of its pixels, and return the path relative to the root."""
    name = f"hub/{hashlib.sha256(f'{image.mode}{image.size}'.encode() + image.tobytes()).hexdigest()[:24]}.png"
    path = root / name
    if not path.exists():
        with atomic_path(path) as partial:
            image.save(partial, "PNG")
    return name


class Plan:
    """Every sample of the run, in the order of the output: question after question, sample after sample."""

    def __init__(self, settings: Settings, sampling: Sampling, questions: list[Question], engine: Engine):
        self.settings, self.sampling, self.questions, self.engine = settings, sampling, questions, engine
        self.total = len(questions) * settings.num_samples

    def samples(self) -> Iterator[tuple[Question, str, int, dict[str, Any], str]]:
        """Yield (question, text as asked, seed, provenance, id of the sample)."""
        settings = self.settings
        made_by = {"engine": self.engine.name, "model": self.engine.model_id, "revision": self.engine.revision}
        sampler = {
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "max_new_tokens": self.sampling.max_new_tokens,
            "max_tiles": settings.max_tiles,
        }
        for question in self.questions:
            style = style_for(question.id, question.source, settings.style, settings.seed)
            language = language_of(question.question) if settings.language == "auto" else settings.language
            asked = ask(question.question, style, language)
            for number in range(settings.num_samples):
                seed = sample_seed(settings.seed, question.id, number)
                provenance = {**made_by, "style": style, "language": language, **sampler, "seed": seed}
                provenance["sample"] = number
                yield question, asked, seed, provenance, content_id(question.id, asked, provenance)

    def requests(self) -> Iterator[Request]:
        """Yield what the engine is asked."""
        root = Path(self.settings.image_root)
        for question, asked, seed, _, id in self.samples():
            images = tuple(str(root / image) for image in question.images)
            yield Request(
                id=id,
                question=asked,
                images=images,
                history=question.history,
                system=question.system,
                seed=seed,
                sampling=self.sampling,
            )

    def rows(self, journal: Journal) -> Iterator[dict[str, Any]]:
        """Yield the output rows of all replies that came."""
        for question, asked, _, provenance, id in self.samples():
            if id not in journal:
                continue
            reply = journal[id]
            yield Response(
                id=id,
                question_id=question.id,
                images=question.images,
                question=asked,
                answer=question.answer,
                system=question.system,
                history=question.history,
                source=question.source,
                response=reply.text,
                provenance={
                    **provenance,
                    "original_question": question.question,
                    "finish_reason": reply.finish_reason,
                    "num_tokens": reply.num_tokens,
                },
            ).to_json()


def reply_of(row: dict[str, Any]) -> Reply:
    """Return the reply inside a Response row of an earlier run."""
    made = row["provenance"]
    return Reply(id=row["id"], text=row["response"], finish_reason=made["finish_reason"], num_tokens=made["num_tokens"])


if __name__ == "__main__":
    sys.exit(run_program(main))
