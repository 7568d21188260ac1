"""Train a vision-language model with Mixed Preference Optimization.

    one CPU, a tiny real task     python train_mpo.py --config configs/mini.yaml
    one GPU, LoRA                 python train_mpo.py --config configs/internvl2_8b_lora.yaml --data MMPR/meta.json
    eight GPUs                    torchrun --nproc_per_node 8 train_mpo.py --config configs/internvl2_8b.yaml

Reads pairs (a meta.json in MMPR's layout, JSONL, or MMPR as Parquet, here or on the Hub), checks every row, computes
the reference log-probs once with the start model, trains, and writes a model folder that the Auto classes load. A run
that was killed goes on with the same command. Every field of transformers' TrainingArguments is accepted beside the
options below.
"""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError, StoppedError, run_program
from internvl_mpo.files import replaced_folder
from internvl_mpo.mmpr.reading import forms_found
from internvl_mpo.settings import show_settings, write_settings
from internvl_mpo.training.checkpoint import SETTINGS_FILE, check_run_folder, read_state, run_folder
from internvl_mpo.training.finished import (
    RESULT_FILES,
    RESULT_SETTINGS,
    check_result_folders,
    finished_step,
    is_same_run,
    result_folders,
    write_finished,
)
from internvl_mpo.training.first_look import look_at_arguments
from internvl_mpo.training.loading import check_reference_model, load_model, load_processor
from internvl_mpo.training.pairs import TrainingPairs, hold_out, plan, read_pairs
from internvl_mpo.training.signals import StopSignals

if TYPE_CHECKING:  # what imports transformers is imported where it is used, after the cheap refusals
    from internvl_mpo.training.reference_pass import ReferencePass
    from internvl_mpo.training.settings import TrainSettings
    from internvl_mpo.training.trainer import MPOTrainer

PROGRAM = "train_mpo.py"
# Found by `plan`, so that a saved run does not give it back.
FOUND = ("gradient_accumulation_steps",)


def main(argv: list[str]) -> int:
    """Read the settings, keep others away from the run folder, and run."""
    with StopSignals() as signals, contextlib.ExitStack() as stack:
        settings = read_settings(argv)
        if settings.process_index == 0 and settings.reference_pass != "only":  # shares may run at the same time
            stack.enter_context(run_folder(settings.output_dir, result_folders(settings).values()))
        return run(settings, signals)


def run(settings: "TrainSettings", signals: StopSignals) -> int:
    """Run the chapters below in order."""
    from internvl_mpo.training.identity import reference_identity

    is_training = settings.reference_pass != "only"
    checkpoint = choose_checkpoint(settings) if is_training else None
    processor = load_processor(settings.model)
    check_reference_model(settings, processor)
    show_forms(settings)
    pairs, held_out = hold_out(settings.held_out_share, read_pairs(settings, processor))
    settings, pairs = plan(settings, pairs)
    digests = [weights_digest(settings, source) for source in (settings.model, settings.reference_model) if source]
    identity = reference_identity(settings, processor, digests[-1])
    policy = {"policy": digests[0]} if settings.reference_model else {}
    fingerprint = {**pairs.versions(), "data": pairs.digest(), **identity, **policy, **settings.exact()}
    if is_training and is_over(settings, pairs, fingerprint):
        return 0
    if settings.process_index == 0:
        show_run(settings, pairs)

    model = None if settings.reference_model else load_model(settings, settings.model)
    reference = reference_logps(settings, identity, model, processor, pairs, held_out)
    if not is_training:
        return 0
    model = choose_weights(settings, model or load_model(settings, settings.model))
    if reference is not None:
        reference.follow(model)
    trainer = build_trainer(settings, fingerprint, model, processor, pairs, held_out, reference, signals)
    train(settings, trainer, checkpoint)
    save(settings, trainer, processor)
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str]) -> "TrainSettings":
    """Return the checked settings; without arguments, or with --help, only the usage is printed."""
    if argv and not {"-h", "--help"} & set(argv):
        look_at_arguments(argv)
    from internvl_mpo.training.settings import parse_train_settings  # imports transformers, some seconds

    settings = parse_train_settings(argv, program=PROGRAM, about=__doc__)
    if settings.process_index == 0:
        check_run_folder(settings.output_dir)
        if not finished_step(settings.output_dir, result_folders(settings)):  # else `is_over` looks again
            check_result_folders(settings)
    return settings


def choose_checkpoint(settings: "TrainSettings") -> str | None:
    """Return the checkpoint to go on from, the same on all ranks; None starts at step 0.

    Raises:
        BadInputError: there is none where one was named, or it was made with other settings.
    """
    from internvl_mpo.training.checkpoint import check_fingerprint, find_checkpoint
    from internvl_mpo.training.distributed import agree

    found = find_checkpoint(settings.resume, settings.output_dir)
    checkpoint = agree(None if found is None else str(found), settings)
    if checkpoint is None:
        return None
    unknown = check_fingerprint(checkpoint, settings.exact(), settings.before_added())
    if unknown and settings.process_index == 0:
        print(
            f"note: {checkpoint} was written by an earlier version and does not say its {', '.join(unknown)}; the "
            "optimizer and the schedule go on as they were saved, whatever is given now"
        )
    return checkpoint


# --- pairs ------------------------------------------------------------------------------------------------------------


def show_forms(settings: "TrainSettings") -> None:
    """Print in which forms the rows of each file of the data are written."""
    for path in settings.data if settings.process_index == 0 else ():
        print(forms_found(path, settings.image_root), flush=True)


def is_over(settings: "TrainSettings", pairs: TrainingPairs, fingerprint: dict[str, Any]) -> bool:
    """Say whether this very run has done all its steps and written its results: then there is nothing left to do.

    Raises:
        BadInputError: there are steps left, and somebody has put other files into the result folders since.
    """
    from internvl_mpo.training.distributed import agree

    folders = result_folders(settings)
    over = False
    if settings.process_index == 0 and settings.resume == "auto":
        done = finished_step(settings.output_dir, folders)
        over = done >= pairs.total_steps(settings) and is_same_run(settings.output_dir, fingerprint)
        if over:
            places = ", ".join(f"the trained {kind} is in {folder}" for kind, folder in folders.items())
            print(f"all {done} steps were done before, {places}; nothing was changed")
        elif done:
            check_result_folders(settings)
    return agree(over, settings)


def show_run(settings: "TrainSettings", pairs: TrainingPairs) -> None:
    """Print the settings that were chosen, and the memory that is needed."""
    title = f"settings that differ from their defaults (all of them: {Path(settings.output_dir) / SETTINGS_FILE})"
    print(show_settings(settings, title, only_changed=True), flush=True)
    show_memory(settings, pairs)


def show_memory(settings: "TrainSettings", pairs: TrainingPairs) -> None:
    """Print what a device is expected to need, and what to change where that is more than it has."""
    from internvl_mpo.families.registry import family_of_source
    from internvl_mpo.memory_estimate import advise, device_bytes, estimate_memory, setup_of_run, show_estimate
    from internvl_mpo.training.fake_pass import Setup

    run = {**vars(settings), "optim": str(getattr(settings.optim, "value", settings.optim))}
    plugin = settings.deepspeed_plugin
    run["deepspeed"] = plugin and plugin.hf_ds_config.config
    longest = int(pairs.column("num_tokens").max())
    tokens = min(settings.max_tokens_per_pack, settings.pairs_per_step * longest)
    densest = float((pairs.column("num_tiles") / pairs.column("num_tokens")).max())  # a pack with most pictures
    setup = Setup(
        **{
            **setup_of_run(run),
            "num_gpus": settings.world_size,
            "max_tokens_per_pack": tokens,
            "num_tiles": int(densest * tokens),
            "attention": "fused" if settings.device.type == "cuda" else "segments",
        }
    )
    try:
        config = family_of_source(settings.model).load_config(settings.model)
        print(show_estimate(estimate_memory(config, setup), setup, device_bytes()), flush=True)
        advice = device_bytes() and advise(config, setup, device_bytes(), longest_pair=longest)
    except BadInputError:
        raise
    except Exception as error:  # torch's fake tensors are young: a run must not depend on them
        print(f"no memory estimate: {' '.join(str(error).split())}")
        return
    if advice:
        print(f"warning, {advice}", flush=True)


# --- policy -----------------------------------------------------------------------------------------------------------


def choose_weights(settings: "TrainSettings", model: Any) -> Any:
    """Freeze parts or add adapters, and print what is trained."""
    from transformers import set_seed

    from internvl_mpo.training.distributed import zero_stage
    from internvl_mpo.training.policy import add_adapters, freeze, trainable_table

    freeze(
        model,
        vision=settings.freeze_vision,
        projector=settings.freeze_projector,
        language=settings.freeze_language,
        num_language_layers=settings.freeze_language_layers,
    )
    if settings.lora_rank:
        set_seed(settings.seed)  # adapters start from random numbers
        model = add_adapters(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            on=settings.lora_on,
            base=settings.model,
        )
    table = trainable_table(model)
    if settings.process_index == 0:
        print(table)
        has_copy = zero_stage(settings) is not None or (settings.fsdp and settings.bf16)
        if settings.dtype != "float32" and not settings.lora_rank and not has_copy:
            print(
                f"note: {settings.dtype} weights are trained without a float32 copy, so small updates are rounded "
                "away; use DeepSpeed or FSDP2 with bf16, or dtype float32 with bf16"
            )
    return model


def weights_digest(settings: "TrainSettings", source: str) -> str:
    """Return what tells a model from others, the same on all ranks; every byte of its weights is read, once."""
    from internvl_mpo.engines.revision import model_revision
    from internvl_mpo.training.distributed import agree
    from internvl_mpo.training.reference_cache import model_digest

    digest = None
    if settings.process_index == 0:
        digest = model_digest(source) if Path(source).is_dir() else f"{source}@{model_revision(source)}"
    return agree(digest, settings)


# --- reference log-probs ----------------------------------------------------------------------------------------------


def reference_logps(
    settings: "TrainSettings",
    identity: dict[str, Any],
    model: Any,
    processor: Any,
    pairs: TrainingPairs,
    held_out: TrainingPairs,
) -> "ReferencePass | None":
    """Return what computes the log-probs of the reference, or has done so already; None for adapter_off.

    Every rank computes a share and writes its own shards; a killed run goes on where it stopped. `model` is the start
    model, or None where another one is the reference: that is loaded if log-probs are missing, and let go again.
    """
    if settings.reference == "adapter_off":
        return None
    from internvl_mpo.objective import needs_reference
    from internvl_mpo.training.distributed import zero_stage
    from internvl_mpo.training.reference_cache import ReferenceCache
    from internvl_mpo.training.reference_pass import ReferencePass

    cache = ReferenceCache(
        settings.reference_cache or Path(settings.output_dir) / "reference",
        identity,
        (pairs + held_out).digests,
    )
    reference = ReferencePass(cache, processor, pairs, held_out, settings)
    compares = needs_reference(settings.preference, settings.quality)  # else held-out pairs alone are looked at
    if settings.reference_model:
        if not reference.is_complete():
            reference.before(load_model(settings, settings.reference_model), share=settings.reference_share)
    elif settings.reference_pass != "ahead" or zero_stage(settings) == 3 or not (compares or settings.fsdp):
        reference.before(model, share=settings.reference_share)
    if settings.reference_pass == "only" and settings.process_index == 0:
        print(f"reference log-probs of share {settings.reference_shard or '0/1'} are in {cache.folder}")
    return reference


# --- train ------------------------------------------------------------------------------------------------------------


def build_trainer(
    settings: "TrainSettings",
    fingerprint: dict[str, Any],
    model: Any,
    processor: Any,
    pairs: TrainingPairs,
    held_out: TrainingPairs,
    reference: "ReferencePass | None",
    signals: StopSignals,
) -> "MPOTrainer":
    """Return the trainer; this is the first thing that touches the run folder."""
    from internvl_mpo.training.callbacks import ConsoleCallback
    from internvl_mpo.training.stopping import StopOrSave
    from internvl_mpo.training.trainer import MPOTrainer

    return MPOTrainer(
        model,
        settings,
        processor=processor,
        pairs=pairs,
        held_out=held_out,
        reference=reference,
        stopping=StopOrSave(signals),
        fingerprint=fingerprint,
        callbacks=[ConsoleCallback(settings.output_dir)],
    )


def train(settings: "TrainSettings", trainer: "MPOTrainer", checkpoint: str | None) -> None:
    """Train to the end, from a checkpoint if there is one.

    Raises:
        StoppedError: a signal came; a checkpoint is written.
    """
    import torch

    from internvl_mpo.training.callbacks import ConsoleCallback
    from internvl_mpo.training.held_out import closing_line

    if checkpoint is not None:
        trainer.check_resumable(checkpoint)
    if settings.process_index == 0:
        write_settings(settings, Path(settings.output_dir) / SETTINGS_FILE, leave_out=FOUND)
        print(f"going on from {checkpoint}" if checkpoint else "starting at step 0")
        if checkpoint and read_state(checkpoint)["global_step"] >= trainer.pairs.total_steps(settings):
            print("all steps were done there; only the results are still to be written")
    if settings.device.type == "cpu":
        # several threads add gradients of one token in any order otherwise, and no two runs are equal to the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        trainer.pop_callback(ConsoleCallback).close()
    if trainer.stopping.stopped_at is not None:
        raise StoppedError(trainer.stopping.message(settings.output_dir) if settings.process_index == 0 else "")
    evaluations = [row for row in trainer.state.log_history if "eval_rewards/accuracy" in row]
    if evaluations and settings.process_index == 0:
        print(closing_line(evaluations[-1], settings.preference != "none" or settings.quality != "none"))


def save(settings: "TrainSettings", trainer: "MPOTrainer", processor: Any) -> None:
    """Write the folders of the trained model, so that each is there whole or not at all."""
    from internvl_mpo.families.registry import family_of_model
    from internvl_mpo.publish import write_adapter_card, write_adapter_companions, write_model_folder
    from internvl_mpo.training.policy import check_saved_weights, plain_base, whole_weights, write_adapter

    model = trainer.accelerator.unwrap_model(trainer.model)
    is_main = settings.process_index == 0
    for kind, target in result_folders(settings).items():
        weights = whole_weights(model, keep=is_main) if kind == "model" else {}
        with replaced_folder(target, name=f"{kind} folder", unmarked=RESULT_FILES, is_main=is_main) as folder:
            if kind == "adapter":
                write_adapter(model, folder, keep=is_main)
                if is_main:
                    write_adapter_companions(folder, processor)
                    write_adapter_card(
                        folder,
                        name=target.name,
                        model_type=model.config.model_type,
                        base=settings.model,
                    )
            elif is_main:
                write_model_folder(plain_base(model), processor, folder, weights=weights)
                weights = family_of_model(plain_base(model)).saved_weights(plain_base(model), weights)
            if is_main:
                check_saved_weights(folder, weights)
                write_settings(settings, folder / RESULT_SETTINGS, leave_out=FOUND)
        if is_main:
            print(f"the trained {kind} is in {target}")
    if is_main:
        write_finished(
            settings.output_dir,
            step=trainer.state.global_step,
            fingerprint=trainer.fingerprint,
            folders=result_folders(settings),
        )


if __name__ == "__main__":
    sys.exit(run_program(main))
