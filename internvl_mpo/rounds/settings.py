"""Settings of a run in rounds, checked before anything is sampled."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.engines.settings import EngineSettings
from internvl_mpo.errors import BadInputError
from internvl_mpo.evaluation.settings import EvaluateSettings
from internvl_mpo.programs import run_file, way_to
from internvl_mpo.settings import build_settings, check_keys, read_yaml, setting
from internvl_mpo.training.first_look import setting_keys

# arm -> what it changes in the training runs
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"preference": "none", "quality": "none"},
    "dpo": {"quality": "none", "generation": "none", "preference_weight": 1},
    "bco": {"preference": "none", "generation": "none", "quality_weight": 1},
    "mpo": {},
}
ONE_ROUND = "_one_round"  # an arm with this ending does all its steps in one round
OWN = ("model", "reference_model", "data", "image_root", "output_dir", "model_dir", "reference_cache", "seed")
OWN_OF_SAMPLING = ("model", "temperature", "served_from")
OWN_OF_JUDGE = ("responses", "output", "image_root", "seed")
KEYS_OF_JUDGE = ("rubric", "num_rated", "pairs_per_question", "min_gap", "max_replies", "max_new_tokens")
OWN_OF_EVALUATION = ("model", "benchmarks", "data", "mode", "output", "score_only")


@dataclass(kw_only=True)
class RoundsSettings:
    """Settings of `python -m internvl_mpo.rounds`."""

    output: str = setting(help="folder for everything the run makes")
    model: str = setting(help="first policy: folder or Hub id")
    questions: list[str] = setting(help="files of questions with a ground truth, in any form of docs/data.md")
    open_questions: list[str] = setting([], help="files of questions without one, for Dropout-NTP; empty leaves it out")
    image_root: str = setting(help="folder the image paths of all questions are relative to")
    held_out: str | None = setting(None, help="data of the benchmark, on which no round trains; empty is the Hub's")
    benchmark: str = setting("mini", help="how held-out answers are scored; mini takes any file of questions")
    mode: Literal["direct", "cot"] = setting("cot", help="how held-out questions are asked")
    num_rounds: int = setting(3, help="most rounds")
    arms: list[str] = setting(
        ["mpo"], help=f"{', '.join(ARMS)}; each also with {ONE_ROUND}: the steps of all rounds in a single one"
    )
    seed: int = setting(0, help="of the choice of questions, the samples, the pairs and the data order")
    patience: int = setting(1, help="rounds without a better held-out accuracy before an arm stops; 0 never stops")
    questions_per_round: int | None = setting(None, help="most questions of a round; empty asks all worth asking")
    open_per_round: int | None = setting(None, help="most open questions of a round; empty asks all")
    min_pass_rate: float = setting(0.1, help="questions right less often are asked again after the others")
    max_pass_rate: float = setting(0.7, help="questions right more often are asked again after the others")
    num_samples: int = setting(8, help="responses to a question")
    style: str = setting("cot", help="how questions are asked, see sample_responses.py")
    temperatures: list[float] = setting([1.0], help="of the samples of round 1, 2, ..; the last one goes on")
    pairs_per_question: int = setting(4, help="most right-wrong pairs of a question, and most right-unparsable ones")
    ratio: float = setting(0.5, help="share of a description that Dropout-NTP keeps")
    judge: dict = setting(
        {}, help="settings of build_judged_pairs.py, for pairs of responses to open questions; empty leaves them out"
    )
    fixed_pairs: list[str] = setting([], help="pairs made elsewhere (MMPR, votes.jsonl), a share of every round")
    fixed_share: float = setting(0.2, help="share of fixed pairs among the pairs of a round")
    reference: Literal["round", "first"] = setting(
        "round", help="of a round's training: the policy it starts from, or the first model in all rounds"
    )
    train: str = setting("configs/mini.yaml", help="run file of the training runs of a round")
    training: dict = setting({}, help="settings that differ from it, {key: value}")
    launcher: str = setting("", help="words in front of train_mpo.py, as torchrun --nproc_per_node 8; empty is python")
    sampling: dict = setting({}, help="further settings of the sampling programs, {key: value}")
    evaluation: dict = setting({}, help="further settings of evaluate_mpo.py, {key: value}")
    serve: str = setting("", help="command of an OpenAI-compatible server with {model}, {port}, started to sample from")
    replicas: int = setting(1, help="such servers at the same time; {replica} in the command counts them from 0")
    serve_seconds: float = setting(1800.0, help="longest time until a server answers")
    remove_policies: bool = setting(False, help="remove weights and checkpoints that no round needs any more")
    jobs: int = setting(1, help="arms that run at the same time")

    def __post_init__(self) -> None:
        for key in ("num_rounds", "num_samples", "pairs_per_question", "replicas", "jobs"):
            if getattr(self, key) < 1:
                raise BadInputError(f"{key} is {getattr(self, key)}, expected 1 or more")
        unknown = [arm for arm in self.arms if arm.removesuffix(ONE_ROUND) not in ARMS]
        if unknown or not self.arms:
            raise BadInputError(f"unknown arm '{''.join(unknown[:1])}', expected some of {', '.join(ARMS)}, or one of "
                                f"them with {ONE_ROUND}")  # fmt: skip
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise BadInputError(f"pass rates {self.min_pass_rate} to {self.max_pass_rate} are no band within 0 to 1")
        if not 0 <= self.fixed_share < 1:
            raise BadInputError(f"fixed_share is {self.fixed_share}, expected 0 up to but not including 1")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise BadInputError(f"temperatures are {self.temperatures}, expected one or more above 0")
        if self.serve and not all(place in self.serve for place in ("{model}", "{port}")):
            raise BadInputError(f"serve is '{self.serve}', expected a command with {{model}} and {{port}} in it")
        if self.serve and {"engine", "base_url", "runner"} & set(self.sampling):
            raise BadInputError("serve starts the servers itself; take engine, base_url and runner out of sampling")
        self._check_programs()
        self._check_training()

    def _check_programs(self) -> None:
        """Refuse settings of the other programs, likewise."""
        sampler = [field.name for field in fields(EngineSettings)] + ["max_new_tokens"]
        judge = [*(field.name for field in fields(EngineSettings)), *KEYS_OF_JUDGE]
        evaluation = [field.name for field in fields(EvaluateSettings)]
        for name, keys, own in (
            ("sampling", sampler, OWN_OF_SAMPLING),
            ("judge", judge, OWN_OF_JUDGE),
            ("evaluation", evaluation, OWN_OF_EVALUATION),
        ):
            given = getattr(self, name)
            taken = [key for key in own if key in given]
            if taken:
                raise BadInputError(f"{name} holds '{taken[0]}', which the rounds set themselves; take it out")
            check_keys(given, dict.fromkeys(keys, False), name)
        if self.judge:
            if not self.open_questions:
                raise BadInputError("judge rates responses to open questions; give open_questions")
            build_settings(EngineSettings, {key: self.judge[key] for key in self.judge if key not in KEYS_OF_JUDGE})
        if self.mode not in load_benchmark(self.benchmark).MAX_NEW_TOKENS:
            raise BadInputError(f"{self.benchmark} is never asked in mode {self.mode}; give the other --mode")

    def _check_training(self) -> None:
        """Refuse settings of the training runs hours before they would be read."""
        taken = [key for key in OWN if key in self.training]
        if taken:
            raise BadInputError(f"training holds '{taken[0]}', which every round sets itself; take it out")
        run = {**read_yaml(self.train), **self.training}
        keys = setting_keys()
        if keys:
            check_keys(run, {**keys, **dict.fromkeys(OWN, False)}, f"{self.train} and training")
        if any(arm.endswith(ONE_ROUND) for arm in self.arms) and not run.get("max_steps", 0) > 0:
            raise BadInputError(f"an arm that ends in {ONE_ROUND} needs max_steps in {self.train} or in training")
        second = [key for key in ("reference", "reference_sync_steps") if run.get(key, "cache") not in ("cache", 0)]
        if self.reference == "first" and second:
            raise BadInputError(
                f"reference is first, and {second[0]} {run[second[0]]} (in {self.train} or training) is another one; "
                "leave one of them out"
            )

    def check_files(self) -> None:
        """Refuse files that are not there.

        Raises:
            BadInputError: naming the file and the setting.
        """
        named = {key: getattr(self, key) for key in ("questions", "open_questions", "fixed_pairs")}
        named |= {"image_root": [self.image_root], "train": [str(run_file(self.train))]}
        named["held_out"] = [self.held_out] if self.held_out else []
        for key, paths in named.items():
            for path in paths:
                if not path.startswith("hub:") and not Path(path).exists():
                    raise BadInputError(f"{key} '{path}' does not exist; {way_to(path)}")
        is_hub_id = self.model.count("/") == 1 and not Path(self.model.partition("/")[0] or "/").exists()
        if not is_hub_id and not Path(self.model, "config.json").is_file():
            raise BadInputError(f"model '{self.model}' is no model folder; {way_to(self.model)}")

    @property
    def max_steps(self) -> int:
        """Steps of the training run of a round."""
        return self.training.get("max_steps", read_yaml(self.train).get("max_steps", -1))

    def rounds_of(self, arm: str) -> int:
        """Return how many rounds an arm has at most."""
        return 1 if arm.endswith(ONE_ROUND) else self.num_rounds

    def temperature(self, number: int) -> float:
        """Return the temperature of a round, counted from 1."""
        return self.temperatures[min(number, len(self.temperatures)) - 1]
