"""The page of a published model: what it is, how to load it, how it was trained, what it scores, what it cannot do."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.errors import BadInputError
from internvl_mpo.evaluation.model_card import add_to_card
from internvl_mpo.families.native import video_packages
from internvl_mpo.families.registry import family_of_type
from internvl_mpo.files import read_json
from internvl_mpo.jsonl import read_whole_lines
from internvl_mpo.publish import card_texts
from internvl_mpo.publish.curves import CURVES, draw_curves
from internvl_mpo.settings import read_yaml

TRAINING_SETTINGS = "training_settings.yaml"
# What is said about a training run: nothing that names a machine, a folder or a person.
_TOLD = (
    *("preference", "preference_weight", "quality", "quality_weight", "generation", "generation_weight", "beta"),
    *("label_smoothing", "reward_shift", "reward_shift_momentum", "reference_sync_steps", "learning_rate"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "pairs_per_step", "pairs_per_group", "max_tokens_per_pack", "max_length"),
    *("max_tiles", "dtype", "bf16", "fp16", "lora_rank", "lora_alpha", "freeze_vision", "held_out_share", "seed"),
)


@dataclass
class CardFacts:
    """What the page is written from; every part may be missing.

    Attributes:
        name: title, and the repository that code examples load.
        kind: "full", or "adapter" for a folder with LoRA weights only.
        model_type: of the model, or of the one an adapter belongs to.
        base_model: Hub id of the model it was made from.
        base_folder: of the model an adapter was trained on, where that is not on the Hub.
        relation: how, in the Hub's words: finetune, adapter, quantized, merge.
        datasets: Hub ids of the training data.
        license: identifier such as mit.
        run: run folder of `train_mpo.py`.
        evaluations: run folders of `evaluate_mpo.py`.
        inherited: keys of an upstream card's header that stay true, such as language.
    """

    name: str
    kind: Literal["full", "adapter"] = "full"
    model_type: str = "internvl_chat"
    base_model: str | None = None
    base_folder: str | None = None
    relation: str | None = None
    datasets: Sequence[str] = ()
    license: str | None = None
    run: Path | None = None
    evaluations: Sequence[Path] = ()
    inherited: dict[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        """Whether it is in the official InternVL layout, whose folders bring code."""
        return self.model_type == "internvl_chat"


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md, the curves, the training settings and `.eval_results/` into a folder.

    Raises:
        BadInputError: a run or evaluation folder lacks its files.
    """
    from huggingface_hub import ModelCardData

    for evaluation in facts.evaluations:
        if not (evaluation / "scores.json").exists():
            raise BadInputError(f"{evaluation} holds no scores.json; evaluate into it first")
    is_adapter = facts.kind == "adapter"
    header = ModelCardData(
        pipeline_tag="image-text-to-text",
        library_name="peft" if is_adapter else "transformers",
        tags=_tags(facts),
        base_model=facts.base_model,
        base_model_relation=facts.relation if facts.base_model else None,
        datasets=list(facts.datasets) or None,
        license=facts.license,
        **{key: value for key, value in facts.inherited.items() if value is not None},
    )
    parts = [f"# {facts.name.split('/')[-1]}", _opening(facts), "## Use", *_usage(facts)]
    if facts.run is not None:
        parts += ["## Training", *_training(facts, folder)]
    if facts.evaluations:
        parts += ["## Evaluation", *_evaluation(facts.evaluations)]
    parts += ["## Limits", _limits(facts), "## Citation", card_texts.CITATION]
    text = f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    for evaluation in facts.evaluations:
        add_to_card(evaluation, folder, model_name=facts.name.split("/")[-1])


def _tags(facts: CardFacts) -> list[str]:
    code = ["custom_code"] if facts.is_chat else []
    return ["internvl" if facts.is_chat else facts.model_type, "mpo", *(["lora"] if facts.kind == "adapter" else code)]


def _opening(facts: CardFacts) -> str:
    origin = f"`{facts.base_folder}`" if facts.base_folder else None
    if facts.base_model:
        origin = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    what = "An InternVL chat model" if facts.is_chat else f"A model of transformers' family `{facts.model_type}`"
    code = "The code beside the weights runs on current transformers (5.17 and newer)."
    if not facts.is_chat:
        code = "Its classes are part of transformers, so the folder holds no code."
    if facts.kind == "adapter":
        return f"A LoRA adapter for {origin}, trained with Mixed Preference Optimization (MPO)."
    if facts.run is not None:
        start = f", starting from {origin}" if origin else ""
        return f"{what}, trained with Mixed Preference Optimization (MPO){start}. {code}"
    return f"{origin}, its weights unchanged. {code}" if origin else f"{what}. {code}"


def _usage(facts: CardFacts) -> list[str]:
    if not facts.is_chat:
        return _family_usage(facts)
    if facts.kind == "adapter":
        texts = (card_texts.ADAPTER, card_texts.VLLM_ADAPTER)
    else:
        texts = (card_texts.TRANSFORMERS, card_texts.VLLM, card_texts.SMALLER)
    return [text.format(name=facts.name, base=facts.base_model or facts.base_folder) for text in texts]


def _family_usage(facts: CardFacts) -> list[str]:
    """Code for a model whose classes are transformers' own, and what must be installed beside it."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    processor = PROCESSOR_MAPPING.get(CONFIG_MAPPING[facts.model_type], None)
    needed = video_packages(processor) if processor else ()
    is_adapter = facts.kind == "adapter"
    family = family_of_type(facts.model_type, facts.name)
    wide = ", ".join(f'"{name}"' for name in family.keep_wide)
    texts = [card_texts.FAMILY_ADAPTER if is_adapter else card_texts.FAMILY]
    texts += [card_texts.FAMILY_PACKAGES] * bool(needed) + [card_texts.FAMILY_SMALLER] * (not is_adapter)
    known = {
        "name": facts.name,
        "base": facts.base_model or facts.base_folder,
        "packages": " ".join(needed),
        "wide": wide,
        "ask": card_texts.FAMILY_ASK,
    }
    return [text.format(**known) for text in texts]


def _training(facts: CardFacts, folder: Path) -> list[str]:
    """Settings as a table and as a file, and the curves."""
    assert facts.run is not None
    import yaml

    settings = read_yaml(facts.run / "settings.yaml")
    absent = [f"{term}_weight" for term in ("preference", "quality", "generation") if settings.get(term) == "none"]
    told = {key: settings[key] for key in _TOLD if key not in absent and settings.get(key) is not None}
    (folder / TRAINING_SETTINGS).write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    rows = "\n".join(f"| {key} | {value} |" for key, value in told.items())
    log = read_log(facts.run)
    draw_curves(log, folder / CURVES)
    last = [row for row in log if "loss" in row][-1]
    held_out = [row["eval_rewards/accuracy"] for row in log if "eval_rewards/accuracy" in row]
    sentence = (
        f"{last['step']} steps; at the last one the loss was {last['loss']:.3f} and the chosen answer had the larger "
        f"reward in {100 * last['rewards/accuracy']:.0f} % of the pairs"
    )
    sentence += f" (in {100 * held_out[-1]:.1f} % of the held-out pairs)." if held_out else "."
    return [sentence, f"![Curves of the training run]({CURVES})", f"| setting | value |\n|---|---|\n{rows}"]


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log.jsonl.

    Raises:
        BadInputError: there is none, or no step in it.
    """
    path = run / "log.jsonl"
    if not path.exists():
        raise BadInputError(f"{run} holds no log.jsonl; give the run folder of train_mpo.py (its --output_dir)")
    rows = read_whole_lines(path)
    if not any("loss" in row for row in rows):
        raise BadInputError(f"{path} tells of no training step; give the folder of a finished run")
    return rows


def _evaluation(evaluations: Sequence[Path]) -> list[str]:
    rows = []
    for evaluation in evaluations:
        for name, modes in read_json(evaluation / "scores.json").items():
            for mode, summary in modes.items():
                value = summary[summary["headline"]]
                low_high = summary.get("interval")
                spread = f" ({low_high[0]:.1f} to {low_high[1]:.1f})" if low_high else ""
                judge = ", ".join(summary.get("judge", {}).get("served", [])) or "none"
                score = "-" if value is None else f"{value:.1f}{spread}"
                title = f"{load_benchmark(name).TITLE} | {mode} | {summary['headline']}"
                rows.append(f"| {title} | {score} | {summary['num_examples']} | {summary['rule']} | {judge} |")
    head = "| benchmark | answers | measure | score (95 % interval) | questions | rule | judge |\n" + "|---" * 7 + "|"
    return [
        "Generated and scored with `evaluate_mpo.py` of MPO for InternVL. `direct` answers are short, `cot` answers "
        "reason first; the two are not comparable with each other.",
        head + "\n" + "\n".join(rows),
    ]


def _limits(facts: CardFacts) -> str:
    lines = [
        "- Answers can be wrong with confidence, the more so on small print, counting and geometry. A chain of thought "
        "that reads well is no proof.",
        "- Pictures are cut into tiles of fixed size without keeping the aspect ratio; a video goes in as its frames."
        if facts.is_chat
        else "- It was loaded and asked here with text and pictures alone; what it makes of a video was not measured.",
        "- Safety, bias and languages other than English and Chinese were not measured for this checkpoint.",
    ]
    names = {name for path in facts.evaluations for name in read_json(path / "scores.json")}
    trained_on_mmpr = any("mmpr" in name.lower() and "mini" not in name.lower() for name in facts.datasets)
    if "m3cot" in names or trained_on_mmpr:
        lines.append(
            "- M3CoT's train split is part of MMPR, human rationales included: for a model trained on it, a gain on "
            "M3CoT is in-domain."
        )
    if "mini" in names:
        lines.append(
            "- The mini benchmark asks about handwritten digits. It shows that the programs work and says nothing "
            "about other pictures."
        )
    return "\n".join(lines)
