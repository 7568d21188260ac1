"""Settings of `evaluate_mpo.py`, and the key under which an answer is stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Benchmark, Example, Mode, Rule
from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import setting


@dataclass
class EvaluateSettings:
    """Settings of `evaluate_mpo.py`."""

    benchmarks: list[str] = setting(
        help="names, separated by commas: mini, m3cot, mathvista, ...; own: your questions in --data"
    )
    output: str = setting(help="folder of the run: answers, verdicts, scores, report")
    model: str | None = setting(
        None, help="folder or Hub id of any image-text model; name of the served model with --engine http"
    )
    data: str | None = setting(
        None, help="local copy: a file or folder, or a folder with one entry per benchmark; without it, the Hub"
    )
    image_root: str | None = setting(None, help="folder of the pictures where they do not lie beside the rows")
    mode: list[Mode] = setting(["direct"], help="direct, cot, or both")
    rule: Rule = setting("ours", help="ours, official, vlmevalkit or internvl")
    limit: int | None = setting(None, help="first questions of each benchmark only")
    engine: Literal["transformers", "http"] = setting(
        "transformers", help="transformers (in this process) or http (an OpenAI-compatible server)"
    )
    base_url: str = setting("http://127.0.0.1:8000/v1", help="address of the server with --engine http")
    num_samples: int = setting(1, help="answers to every question; above 1: mean accuracy, pass@k, majority vote")
    temperature: float = setting(0.0, help="of the answers; 0 is greedy")
    batch_size: int = setting(32, help="answers generated at the same time")
    max_new_tokens: int | None = setting(None, help="longest answer; without it, the benchmark's own limit")
    max_tiles: int | None = setting(6, help="most 448x448 crops per picture, thumbnail not counted")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", help="auto, float32, bfloat16, float16")
    trust_remote_code: bool = setting(False, help="run code inside the model folder (not needed for InternVL)")
    judge: str | None = setting(None, help="model that judges; its kept replies are used again")
    judge_url: str = setting("https://api.openai.com/v1", help="address of the judge's server")
    judge_runs: int = setting(1, help="replies per answer; scores are means over runs with their deviation")
    judge_temperature: float = setting(0.0, help="of the judge's replies")
    judge_concurrency: int = setting(8, help="judge requests at the same time")
    judge_prompts: str | None = setting(None, help="folder with NAME.txt files that replace our judge prompts")
    max_unscored: float = setting(0.05, help="largest share of unscored questions a headline number is shown with")
    score_only: bool = setting(False, help="score the answers that are there; load no model")

    def __post_init__(self) -> None:
        for name in self.benchmarks:
            load_benchmark(name)
        if not self.score_only and not self.model:
            raise BadInputError("missing setting 'model'; give --model VALUE, or --score_only to score stored answers")
        for key in ("limit", "max_new_tokens", "num_samples", "batch_size", "judge_runs", "judge_concurrency"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise BadInputError(f"setting '{key}' is {value}; give at least 1")
        if self.temperature < 0:
            raise BadInputError(f"setting 'temperature' is {self.temperature}; give 0 (greedy) or a positive number")
        if self.num_samples > 1 and self.temperature == 0 and not self.score_only:
            raise BadInputError(
                f"setting 'num_samples' is {self.num_samples} at temperature 0, where all answers are the same; "
                "give --temperature above 0"
            )


class EvalTask(NamedTuple):
    """One benchmark in one mode, with its questions."""

    name: str
    mode: Mode
    benchmark: Benchmark
    examples: list[Example]

    @property
    def label(self) -> str:
        """The task's name in messages and files: "pope/cot"."""
        return f"{self.name}/{self.mode}"

    def keys(self, num_samples: int = 1) -> Iterator[tuple[str, Example]]:
        """Yield the name of every answer in the run's files, and its question; the answers to a question in a row."""
        for example in self.examples:
            for sample in range(num_samples):
                yield f"{self.label}/{example.id}" + (f"#{sample}" if num_samples > 1 else ""), example
