"""`publish model`: full, adapter-only and merged variants, with card, curves and scores, proved before they go out."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import link, read_json, replaced_folder
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.publish.adapter import build_adapter_folder, find_base, is_adapter, merge_adapter
from internvl_mpo.publish.card import CardFacts, write_card
from internvl_mpo.publish.hygiene import check_nothing_private
from internvl_mpo.publish.model_folder import build_model_folder
from internvl_mpo.publish.proof import prove_model
from internvl_mpo.publish.settings import Built, HubSettings
from internvl_mpo.publish.weights import parse_size
from internvl_mpo.settings import setting

# Header keys of an upstream card that stay true of the weights, whoever publishes them.
_INHERITED = ("license_name", "license_link", "language")


@dataclass(kw_only=True)
class ModelSettings(HubSettings):
    """Settings of `publish model`."""

    source: str = setting(help="model or adapter folder; may be given without --source")
    output: str = setting(help="folder to build")
    run: str | None = setting(None, help="run folder of train_mpo.py: training settings and curves for the card")
    evaluation: list[str] = setting([], help="run folders of evaluate_mpo.py: scores for the card")
    base_model: str | None = setting(None, help="Hub id of the model it was trained from, as owner/name")
    datasets: list[str] = setting([], help="Hub ids of the training data")
    license: str | None = setting(None, help="licence identifier, such as mit; none = that of the source's card")
    variant: Literal["full", "adapter", "merged"] | None = setting(
        None, help="of an adapter folder: adapter (default) or merged; of a model folder always full"
    )
    base: str | None = setting(None, help="folder of an adapter's base model; none = the one the adapter names")
    max_shard_size: str = setting("5GB", help="largest file of weights")
    dtype: Literal["bfloat16", "float16", "float32"] | None = setting(None, help="cast the weights; none = as they are")
    skip_proof: bool = setting(False, help="do not load the result in a clean process; refused together with --push")
    device: str = setting("cpu", help="device of the proof")

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.max_shard_size)
        if self.skip_proof and self.push and not self.dry_run:
            raise BadInputError("a model that was not proved is not pushed; leave --skip_proof or --push out")
        for name in filter(None, (self.base_model, *self.datasets)):
            if name.count("/") != 1 or name.startswith((".", "/")):
                raise BadInputError(f"'{name}' is no Hub id; expected OWNER/NAME")


def publish_model(settings: ModelSettings) -> Built:
    """Build, check and prove the folder.

    Raises:
        BadInputError: the source is unusable, or the folder fails its own check.
    """
    source = Path(settings.source)
    if not source.is_dir():
        raise BadInputError(f"model folder '{source}' does not exist; `hf download OWNER/NAME` fetches one of the Hub")
    variant = _variant(settings, source)
    base = find_base(source, settings.base) if is_adapter(source) else None
    if variant == "adapter" and not settings.base_model:
        raise BadInputError("an adapter has to say which model it belongs to; give --base_model OWNER/NAME")
    sources = [source, *([base] if base else []), *([settings.run] if settings.run else []), *settings.evaluation]
    if variant == "full":
        for evaluation in settings.evaluation:
            _check_scores(Path(evaluation), source)
    with replaced_folder(settings.output, sources=sources) as folder:
        shard = parse_size(settings.max_shard_size)
        if variant == "adapter":
            build_adapter_folder(source, folder, base=base, base_model=settings.base_model)
        elif variant == "merged":
            merge_adapter(base, source, folder, max_shard_size=shard, dtype=settings.dtype)
        else:
            build_model_folder(source, folder, max_shard_size=shard, dtype=settings.dtype)
        for name in ("LICENSE", "NOTICE"):
            if (source / name).exists():
                link(source / name, folder)
        model_type = read_json((base or source) / "config.json").get("model_type")
        kind = "adapter" if variant == "adapter" else "full"
        write_card(folder, _facts(settings, source, folder, kind, model_type))
        check_nothing_private(folder, owner=settings.owner)
        if not settings.skip_proof:
            is_alone = variant == "adapter"
            print(prove_model(folder, source, base=base, is_adapter=is_alone, device=settings.device), flush=True)
    return Built(Path(settings.output))


def _variant(settings: ModelSettings, source: Path) -> str:
    if is_adapter(source):
        if settings.variant == "full":
            raise BadInputError(f"{source} holds an adapter; its variants are 'adapter' and 'merged'")
        return settings.variant or "adapter"
    if settings.variant in ("adapter", "merged"):
        raise BadInputError(f"{source} holds a whole model, not an adapter; leave --variant out")
    return "full"


def _check_scores(evaluation: Path, source: Path) -> None:
    """Refuse scores of other weights; those of a served or a Hub model cannot be compared and are taken."""
    from internvl_mpo.engines.revision import model_revision

    answers = evaluation / "answers.jsonl"
    _, first = next(iter_jsonl(answers), (None, {})) if answers.exists() else (None, {})
    revision = first.get("revision") or ""
    if len(revision) == 16 and revision != model_revision(str(source)):  # 16 digits: a folder was evaluated
        raise BadInputError(
            f"{evaluation} holds scores of '{first['model']}' (revision {revision}), not of {source} as it is now; "
            "evaluate this model, or leave --evaluation out"
        )


def _facts(settings: ModelSettings, source: Path, folder: Path, kind: str, model_type: str) -> CardFacts:
    """Settings win over what the source's own card says; a card of somebody else is kept beside ours."""
    from huggingface_hub import ModelCard

    header: dict[str, Any] = {}
    card = source / "README.md"
    if card.exists() and not is_adapter(source):  # peft's own card says nothing but the base model's local path
        header = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        if "mpo" not in (header.get("tags") or []):
            shutil.copyfile(card, folder / "ORIGINAL_README.md")
    relation = "adapter" if kind == "adapter" else "finetune" if settings.run or settings.variant == "merged" else None
    return CardFacts(
        name=settings.push or Path(settings.output).name,
        kind=kind,
        model_type=model_type,
        base_model=settings.base_model,
        relation=relation,
        datasets=settings.datasets,
        license=settings.license or header.get("license"),
        run=Path(settings.run) if settings.run else None,
        evaluations=[Path(path) for path in settings.evaluation],
        inherited={key: header[key] for key in _INHERITED if key in header},
    )
