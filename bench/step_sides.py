"""The sides of bench/step_speed.py: one training step of ours, of the original's form, and of TRL's DPOTrainer."""

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

from step_world import BETA, WEIGHTS, Settings, World


def build_side(side: str, world: World, settings: Settings) -> Callable[[], float]:
    """Return a function that takes one whole training step and returns its loss."""
    return trl_step(world, settings) if side == "trl" else our_step(side, world, settings)


def our_step(side: str, world: World, settings: Settings) -> Callable[[], float]:
    """Return our step; `twin` is the original's form: two padded sequences, all logits, live reference."""
    import torch

    from internvl_mpo.encoding import encode_group
    from internvl_mpo.logps import attach_scoring, response_logps, twin_logps
    from internvl_mpo.objective import mpo_loss
    from internvl_mpo.packing import Group, Pack, pack_groups
    from internvl_mpo.records import PreferencePair

    processor = our_processor(world)
    pairs = [
        PreferencePair(images=(row["image"],), question=row["question"], chosen=row["chosen"], rejected=row["rejected"])
        for row in world.rows
    ]
    together = world.shape.same_question and side != "twin"
    policy = with_lora(copy.deepcopy(world.model).train(), settings)
    if settings.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    reference = None
    if side != "ours_cached" and not settings.lora_rank:  # with adapters the policy without them is the reference
        reference = copy.deepcopy(world.model).eval().requires_grad_(False)
    for model in (policy, reference):
        if model is not None and side != "twin":
            attach_scoring(model, attention=settings.attention, trim=settings.trim)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def logps(model: Any, groups: Sequence[Group], pack: Pack) -> tuple[Any, Any]:
        logps_R = twin_logps(model, groups) if side == "twin" else response_logps(model, pack)
        return logps_R[pack.chosen_index_P], logps_R[pack.rejected_index_P]

    def encode() -> tuple[list[Group], Pack]:
        members = [pairs] if together else [[pair] for pair in pairs]
        groups = [encode_group(processor, group, world.folder, max_length=32768) for group in members]
        return groups, pack_groups(groups).to(settings.device)

    cached = None
    if side == "ours_cached":
        with torch.no_grad():  # once, as the reference cache does it
            cached = logps(policy, *encode())

    def live_reference(groups: Sequence[Group], pack: Pack) -> tuple[Any, Any]:
        with torch.no_grad(), policy.disable_adapter() if reference is None else contextlib.nullcontext():
            return logps(policy if reference is None else reference, groups, pack)

    def step() -> float:
        groups, pack = encode()
        chosen, rejected = logps(policy, groups, pack)
        reference_logps = cached or live_reference(groups, pack)
        loss = mpo_loss(chosen, rejected, *reference_logps, pack.chosen_lengths_P, beta=BETA, weights=WEIGHTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def with_lora(model: Any, settings: Settings) -> Any:
    """Return the model, with adapters on all linear layers of the language model if a rank is given."""
    if not settings.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return get_peft_model(model, LoraConfig(r=settings.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))


def our_processor(world: World) -> Any:
    """Return our processor with a template that renders the prompts TRL gets; Qwen's is the same on both sides."""
    if world.family == "qwen2_5_vl":
        return qwen_processor(world)
    from modeling_internvl_mpo import InternVLChatProcessor, InternVLImageProcessor

    side = world.shape.tile_side
    template = (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}<|im_start|> {{ message.content }} <|im_end|> <|im_start|>"
        "{% else %}{{ message.content }} <|im_end|>{% endif %}"
        "{% endfor %}"
    )
    images = InternVLImageProcessor(size={"height": side, "width": side})
    return InternVLChatProcessor(images, world.tokenizer, world.image_tokens, chat_template=template)


def trl_step(world: World, settings: Settings) -> Callable[[], float]:
    """Return a step of TRL's DPOTrainer with the MPO losses, live reference and its head at answer positions only."""
    import datasets
    import torch
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    # On CUDA TRL scores answer positions only, on a CPU all of them. Ratios against the latter would flatter us.
    trl.trainer.utils._use_triton = lambda device: True
    rows = [
        {
            "images": [{"bytes": (world.folder / row["image"]).read_bytes(), "path": None}],
            "prompt": f"<|im_start|> <IMG_CONTEXT>\n{row['question']} <|im_end|> <|im_start|>",
            "chosen": f"{row['chosen']} <|im_end|>",
            "rejected": f"{row['rejected']} <|im_end|>",
        }
        for row in world.rows
    ]
    text = datasets.Value("string")
    features = datasets.Features({"images": [datasets.Image()], "prompt": text, "chosen": text, "rejected": text})
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows, features=features)
    policy = with_lora(copy.deepcopy(world.model), settings)
    config = DPOConfig(
        output_dir=str(world.folder / "trl"),
        use_cpu=settings.device == "cpu",
        bf16=False,
        max_length=None,
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=list(WEIGHTS),
        beta=BETA,
        gradient_checkpointing=False,
        per_device_train_batch_size=len(rows),
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = DPOTrainer(
            model=policy,
            ref_model=None if settings.lora_rank else copy.deepcopy(world.model).eval(),
            args=config,
            train_dataset=data,
            processing_class=trl_processor(world),
        )
    trainer.current_gradient_accumulation_steps = 1
    if settings.trl_checkpointing:  # the Trainer does this in train(), which takes its steps without our clock
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step() -> float:
        batch = trainer.data_collator([dict(data[index]) for index in range(len(data))])
        loss = trainer.training_step(policy, batch)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def trl_processor(world: World) -> Any:
    """Return transformers' own processor; its video part is left out, as it alone needs torchvision."""
    if world.family == "qwen2_5_vl":
        return qwen_processor(world)
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    class ImagesOnly(InternVLProcessor):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    side = world.shape.tile_side
    images = GotOcr2ImageProcessorPil(
        crop_to_patches=True, min_patches=1, max_patches=12, size={"height": side, "width": side}
    )
    return ImagesOnly(image_processor=images, tokenizer=world.tokenizer, image_seq_length=world.image_tokens)


def qwen_processor(world: World) -> Any:
    """Return transformers' Qwen2.5-VL processor with a template that renders the prompts TRL gets."""
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class ImagesOnly(Qwen2_5_VLProcessor):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    template = (
        "{% for message in messages %}{% if message.role == 'user' %}<|im_start|> {% endif %}"
        "{% for part in message.content %}"
        "{{ '<IMG_CONTEXT>\n' if part.type == 'image' else part.text }}{% endfor %}"
        "{{ ' <|im_end|> <|im_start|>' if message.role == 'user' else ' <|im_end|>' }}{% endfor %}"
    )
    most = {"shortest_edge": 28 * 28, "longest_edge": 12 * 448 * 448}
    return ImagesOnly(
        image_processor=Qwen2VLImageProcessorPil(size=most), tokenizer=world.tokenizer, chat_template=template
    )
