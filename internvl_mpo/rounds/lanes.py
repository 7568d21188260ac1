"""The commands of a round, each of which a user can type: choose questions, sample, judge, pair, train, evaluate.

OUT/start/eval/             the first policy on the held-out questions
OUT/round_1/                data of the first round, the same for every arm
OUT/ARM/round_2/            data of the second round
OUT/ARM/round_2/model/      its policy; train/ and eval/ beside it
OUT/reference/              reference log-probs of all rounds
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_mpo.programs import program, run_file
from internvl_mpo.rounds.settings import ARMS, ONE_ROUND, RoundsSettings
from internvl_mpo.stages import Stage

NUM_RATED = 4  # default of build_judged_pairs.py
ROUND_SEED = 1000  # seeds of two rounds are so far apart, and those of two runs lie in between


def words(options: Mapping[str, Any]) -> list[str]:
    """Return settings as they are typed."""
    found = []
    for key, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        found += [f"--{key}", text.lower() if isinstance(value, bool) else text]
    return found


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a policy is asked for responses.

    Attributes:
        model: folder or Hub id.
        image_root: folder of the pictures.
        options: further settings of the sampling programs.
        seed: of every draw.
        server: words of `engines.with_server` that start servers of the model around a program; empty asks the model
            in the process of the program.
    """

    model: Path | str
    image_root: Path | str
    options: Mapping[str, Any]
    seed: int
    server: tuple[str, ...] = ()

    def correctness_stages(
        self,
        questions: Path,
        data: Path,
        *,
        style: str = "cot",
        num_samples: int = 8,
        temperature: float = 1.0,
        pairs_per_question: int = 4,
    ) -> list[Stage]:
        """Return the stages that sample chains of thought and pair right with wrong ones.

        Args:
            questions: with a ground truth.
            data: gets `responses.jsonl` and `pairs_correctness.jsonl`.
            style: how they are asked.
            num_samples: of each question.
            temperature: of the samples.
            pairs_per_question: most of them.
        """
        responses, pairs = data / "responses.jsonl", data / "pairs_correctness.jsonl"
        return [
            Stage("responses", f"{num_samples} chains of thought for each question",
                  self._sample(questions, responses, style, num_samples, temperature), responses),
            Stage("pairs_correctness", "right against wrong answers",
                  [*program("dataset_scripts/build_correctness_pairs.py"), "--responses", str(responses), "--output",
                   str(pairs), "--pairs_per_question", str(pairs_per_question), "--seed", str(self.seed)], pairs),
        ]  # fmt: skip

    def dropout_ntp_stages(self, questions: Path, data: Path, *, ratio: float = 0.5) -> list[Stage]:
        """Return the stages that sample descriptions and pair them by Dropout-NTP.

        Args:
            questions: open ones.
            data: gets `open_responses.jsonl` and `pairs_dropout_ntp.jsonl`.
            ratio: share of a description that is kept.
        """
        responses, pairs = data / "open_responses.jsonl", data / "pairs_dropout_ntp.jsonl"
        command = [
            *program("dataset_scripts/build_dropout_ntp_pairs.py"), "--model", str(self.model),
            "--responses", str(responses), "--output", str(pairs), "--ratio", str(ratio),
            *words(self.options), "--seed", str(self.seed),
        ]  # fmt: skip
        return [
            Stage("open_responses", "one description of each picture",
                  self._sample(questions, responses, "plain", 1, 0), responses),
            Stage("pairs_dropout_ntp", "descriptions against their second half written without the picture",
                  self._through_server(command), pairs),
        ]  # fmt: skip

    def judged_stages(
        self, questions: Path, data: Path, *, judge: Mapping[str, Any], temperature: float = 1.0
    ) -> list[Stage]:
        """Return the stages that sample descriptions and pair them by a judge's ratings.

        Args:
            questions: open ones.
            data: gets `judged_responses.jsonl` and `pairs_judged.jsonl`.
            judge: settings of `build_judged_pairs.py`.
            temperature: of the samples.
        """
        responses, pairs = data / "judged_responses.jsonl", data / "pairs_judged.jsonl"
        command = [
            *program("dataset_scripts/build_judged_pairs.py"), "--responses", str(responses), "--output", str(pairs),
            "--image_root", str(self.image_root), "--seed", str(self.seed), *words(judge),
        ]  # fmt: skip
        num_samples = judge.get("num_rated", NUM_RATED)
        return [
            Stage("judged_responses", f"{num_samples} descriptions of each picture for the judge",
                  self._sample(questions, responses, "plain", num_samples, temperature), responses),
            Stage("pairs_judged", "descriptions that the judge rates higher against lower ones", command, pairs),
        ]  # fmt: skip

    def _sample(self, questions: Path, output: Path, style: str, num_samples: int, temperature: float) -> list[str]:
        command = [
            *program("dataset_scripts/sample_responses.py"), "--model", str(self.model),
            "--image_root", str(self.image_root), *words(self.options), "--seed", str(self.seed),
            "--questions", str(questions), "--output", str(output),
            "--style", style, "--num_samples", str(num_samples), "--temperature", str(temperature),
        ]  # fmt: skip
        return self._through_server(command)

    def _through_server(self, command: list[str]) -> list[str]:
        if not self.server:
            return command
        asks = ["--engine", "http", "--base_url", "{base_url}", "--served_from", str(self.model)]
        return [*program("-m internvl_mpo.engines.with_server"), *self.server, "--", *command, *asks]


class RoundLanes:
    """Knows the stages of every round of every arm."""

    def __init__(self, settings: RoundsSettings):
        self.settings, self.out = settings, Path(settings.output)

    def data(self, arm: str, number: int) -> Path:
        """Return the folder of a round's questions, responses and pairs."""
        return self.out / "round_1" if number == 1 else self.folder(arm, number)

    def folder(self, arm: str, number: int) -> Path:
        """Return the folder of a round's policy."""
        return self.out / arm / f"round_{number}"

    def policy(self, arm: str, number: int) -> Path | str:
        """Return the policy after a round; after round 0 the first one."""
        return self.folder(arm, number) / "model" if number else self.settings.model

    def weights(self, arm: str, number: int) -> list[Path]:
        """Return the files that hold the weights of the policy after a round; none once they were removed."""
        folder = self.folder(arm, number) / "model"
        return [*folder.glob("*.safetensors"), *folder.glob("*.bin")]

    def evaluation(self, arm: str, number: int) -> Path:
        """Return the folder of a policy's held-out answers."""
        return self.folder(arm, number) / "eval" if number else self.out / "start" / "eval"

    def start(self) -> list[Stage]:
        """Return the stage that evaluates the first policy."""
        return [self._evaluate("start", "", 0)]

    def first_data(self) -> list[Stage]:
        """Return the stages that make the data of the first round."""
        return self._data_stages("", 1)

    def all_of(self, arm: str, number: int) -> list[Stage]:
        """Return the stages of a round of an arm; the data of the first round is shared and not among them."""
        made = self._data_stages(arm, number) if number > 1 else []
        return [*made, self._train(arm, number), self._evaluate(f"{arm}.round_{number}", arm, number)]

    def before(self, arm: str, number: int) -> list[Stage]:
        """Return all stages that come before a round of an arm."""
        rounds = [stage for earlier in range(1, number) for stage in self.all_of(arm, earlier)]
        return [*self.first_data(), *rounds]

    def _data_stages(self, arm: str, number: int) -> list[Stage]:
        settings, data = self.settings, self.data(arm, number)
        sampler = Sampler(
            model=self.policy(arm, number - 1),
            image_root=settings.image_root,
            options=settings.sampling,
            seed=settings.seed + ROUND_SEED * (number - 1),
            server=self._server(arm, number),
        )
        questions, open_questions = data / "questions.jsonl", data / "open_questions.jsonl"
        responses, pairs = sampler.correctness_stages(
            questions,
            data,
            style=settings.style,
            num_samples=settings.num_samples,
            temperature=settings.temperature(number),
            pairs_per_question=settings.pairs_per_question,
        )
        stages = [self._select(arm, number), responses, self._judge(responses.makes), pairs]
        if settings.open_questions:
            stages += [self._select_open(arm, number)]
            stages += sampler.dropout_ntp_stages(open_questions, data, ratio=settings.ratio)
        if settings.judge:
            temperature = settings.temperature(number)
            stages += sampler.judged_stages(open_questions, data, judge=settings.judge, temperature=temperature)
        if settings.fixed_pairs:
            stages.append(self._draw_fixed(arm, number))
        name = f"{arm}.round_{number}" if number > 1 else "round_1"
        return [replace(stage, name=f"{name}.{stage.name}") for stage in stages]

    def _server(self, arm: str, number: int) -> tuple[str, ...]:
        settings = self.settings
        if not settings.serve:
            return ()
        model, log = str(self.policy(arm, number - 1)), str(self.data(arm, number) / "server")
        return tuple(words({"serve": settings.serve, "model": model, "replicas": settings.replicas,
                            "seconds": settings.serve_seconds, "log": log}))  # fmt: skip

    def _select(self, arm: str, number: int) -> Stage:
        settings, output = self.settings, self.data(arm, number) / "questions.jsonl"
        command = [
            *program("-m internvl_mpo.rounds"), "select", "--questions", ",".join(settings.questions),
            "--image_root", settings.image_root, "--output", str(output),
            "--min_pass_rate", str(settings.min_pass_rate), "--max_pass_rate", str(settings.max_pass_rate),
            "--seed", str(settings.seed + ROUND_SEED * (number - 1)),
            *self._count(settings.questions_per_round),
        ]  # fmt: skip
        asked = [str(self.data(arm, earlier) / "pass_rates.jsonl") for earlier in range(1, number)]
        command += ["--asked", ",".join(asked)] if asked else []
        return Stage("questions", "questions of the round", command, output, tuple(map(Path, settings.questions)))

    def _select_open(self, arm: str, number: int) -> Stage:
        settings, output = self.settings, self.data(arm, number) / "open_questions.jsonl"
        command = [
            *program("-m internvl_mpo.rounds"), "select", "--questions", ",".join(settings.open_questions),
            "--image_root", settings.image_root, "--output", str(output),
            "--seed", str(settings.seed + ROUND_SEED * (number - 1)), *self._count(settings.open_per_round),
        ]  # fmt: skip
        asked = [str(self.data(arm, earlier) / "open_questions.jsonl") for earlier in range(1, number)]
        command += ["--asked", ",".join(asked)] if asked else []
        reads = tuple(map(Path, settings.open_questions))
        return Stage("open_questions", "open questions of the round", command, output, reads)

    def _count(self, count: int | None) -> list[str]:
        return ["--count", str(count)] if count else []

    def _judge(self, responses: Path) -> Stage:
        output = responses.with_name("pass_rates.jsonl")
        command = [*program("-m internvl_mpo.rounds"), "judge", "--responses", str(responses), "--output", str(output)]
        return Stage("pass_rates", "how often the policy is right on each question", command, output)

    def _draw_fixed(self, arm: str, number: int) -> Stage:
        settings, data = self.settings, self.data(arm, number)
        command = [
            *program("-m internvl_mpo.rounds"), "mix", "--pairs", ",".join(map(str, self._own_pairs(data))),
            "--fixed", ",".join(settings.fixed_pairs), "--share", str(settings.fixed_share),
            "--image_root", settings.image_root,
            "--output", str(data / "fixed"), "--seed", str(settings.seed + ROUND_SEED * (number - 1)),
        ]  # fmt: skip
        drawn = [str(self.data(arm, earlier) / "fixed") for earlier in range(1, number)]
        command += ["--drawn", ",".join(drawn)] if drawn else []
        reads = tuple(file for path in map(Path, settings.fixed_pairs) for file in (path, path / "meta.json"))
        return Stage("fixed", "pairs that were there before", command, data / "fixed" / "meta.json",
                     tuple(file for file in reads if file.is_file()))  # fmt: skip

    def _own_pairs(self, data: Path) -> list[Path]:
        names = ["pairs_correctness.jsonl"] + ["pairs_dropout_ntp.jsonl"] * bool(self.settings.open_questions)
        names += ["pairs_judged.jsonl"] * bool(self.settings.judge)
        return [data / name for name in names]

    def _train(self, arm: str, number: int) -> Stage:
        settings, folder, data = self.settings, self.folder(arm, number), self.data(arm, number)
        sources = [*self._own_pairs(data), *([data / "fixed"] if settings.fixed_pairs else [])]
        options = {**ARMS[arm.removesuffix(ONE_ROUND)], **settings.training}
        if arm.endswith(ONE_ROUND):
            options["max_steps"] = settings.max_steps * settings.num_rounds
        if settings.reference == "first" and number > 1:
            options["reference_model"] = settings.model
        python, script = program("train_mpo.py")
        command = [
            *(shlex.split(settings.launcher) or [python]), script, "--config", settings.train,
            "--model", str(self.policy(arm, number - 1)),
            "--data", ",".join(map(str, sources)), "--image_root", settings.image_root,
            "--seed", str(42 + settings.seed + ROUND_SEED * (number - 1)),
            "--output_dir", str(folder / "train"), "--model_dir", str(folder / "model"),
            "--reference_cache", str(self.out / "reference"), *words(options),
        ]  # fmt: skip
        name = f"{arm}.round_{number}.train"
        return Stage(name, f"{arm}, round {number}", command, folder / "model" / "config.json",
                     (run_file(settings.train),))  # fmt: skip

    def _evaluate(self, name: str, arm: str, number: int) -> Stage:
        settings, target = self.settings, self.evaluation(arm, number)
        data = {"data": settings.held_out} if settings.held_out else {}
        command = [
            *program("evaluate_mpo.py"), "--model", str(self.policy(arm, number)), "--benchmarks", settings.benchmark,
            *words(data), "--mode", settings.mode, "--output", str(target), *words(settings.evaluation),
        ]  # fmt: skip
        return Stage(f"{name}.evaluate", "held-out questions", command, target / "scores.json")
