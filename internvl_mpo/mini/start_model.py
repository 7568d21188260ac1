"""The start model of the mini world: official architecture, about 1 M parameters, trained from scratch."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from internvl_mpo.files import check_replaceable, replaced_folder
from internvl_mpo.mini.digits import DIGIT_PIXELS
from internvl_mpo.records import Response, read_rows
from internvl_mpo.settings import setting

INITIALIZER_RANGE = 0.06  # 0.02 suits a width of thousands; at 128 it costs hundreds of steps


SYSTEM_MESSAGE = "You are a helpful assistant."


@dataclass
class StartSettings:
    """Settings of `python -m internvl_mpo.mini start`."""

    world: str = setting(help="folder made by `world`")
    output: str = setting(help="model folder to make")
    steps: int = setting(600, help="optimizer steps")
    vision_steps: int = setting(300, help="steps of 128 tiles that teach the vision tower before")
    batch_size: int = setting(32, help="annotations per step")
    learning_rate: float = setting(3e-3, help="peak of the cosine schedule")
    seed: int = setting(0, help="weights and data order")


# --- the start model --------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int = 480):
    """Return a byte-level BPE tokenizer with the special tokens of InternVL2; numbers are cut into digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    image = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.add_special_tokens({"additional_special_tokens": special[3:] + image})
    return wrapped


def make_config(tokenizer):
    """Return the configuration of the start model: InternVL2 with InternLM2, only small."""
    from modeling_internvl_mpo import InternVLChatConfig

    return InternVLChatConfig(
        vision_config={
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "image_size": DIGIT_PIXELS,
            "patch_size": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "initializer_range": INITIALIZER_RANGE,
        },
        llm_config={
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "bias": False,
            "initializer_range": INITIALIZER_RANGE,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        template="internlm2-chat",
        system_message=SYSTEM_MESSAGE,
        force_image_size=DIGIT_PIXELS,
        downsample_ratio=0.5,
        ps_version="v2",
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=3,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )


def train_start_model(settings: StartSettings) -> None:
    """Train tokenizer and model on the annotations and write the model folder."""
    import torch
    from tqdm import tqdm

    from internvl_mpo.logps import attach_scoring, response_logps
    from internvl_mpo.packing import pack_groups
    from internvl_mpo.publish import write_model_folder
    from modeling_internvl_mpo import InternVLChatModel, InternVLChatProcessor, get_conversation

    check_replaceable(settings.output, sources=[settings.world])
    world = Path(settings.world)
    rows = read_rows(world / "annotations.jsonl", Response)
    conversation = get_conversation("internlm2-chat")
    texts = [conversation.render([("user", row.question), ("assistant", row.response)], SYSTEM_MESSAGE) for row in rows]
    tokenizer = train_tokenizer(texts)
    config = make_config(tokenizer)
    processor = InternVLChatProcessor.from_config(config, tokenizer)
    torch.manual_seed(settings.seed)
    model = InternVLChatModel(config)
    groups = _encode(rows, processor, world)
    _pretrain_vision(model, rows, groups, settings)
    attach_scoring(model)

    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    warmup = max(1, settings.steps // 20)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    batches = _batches(len(groups), settings)
    model.train()
    bar = tqdm(range(settings.steps), desc="training the start model", unit="step")
    for _ in bar:
        pack = pack_groups([groups[index] for index in next(batches)])
        loss = -response_logps(model, pack).sum() / pack.lengths_R.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    with replaced_folder(settings.output, sources=[settings.world]) as folder:
        write_model_folder(model, processor, folder)


def _batches(num_rows: int, settings: StartSettings) -> Iterator[list[int]]:
    rng = random.Random(f"batches {settings.seed}")
    while True:
        order = rng.sample(range(num_rows), num_rows)
        for start in range(0, num_rows - settings.batch_size + 1, settings.batch_size):
            yield order[start : start + settings.batch_size]


def _pretrain_vision(model, rows: Sequence[Response], groups: Sequence, settings: StartSettings) -> None:
    """Teach the vision tower and the projector to tell digits apart, as InternViT was trained before InternVL."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

    tiles, digits = [], []
    for row, group in zip(rows, groups, strict=True):
        if row.provenance["style"] == "direct":
            labels = row.provenance["digits"]
            tiles.append(group.tiles[: len(labels)])  # the thumbnail comes last
            digits += labels
    tiles, digits = torch.cat(tiles), torch.tensor(digits)
    head = torch.nn.Linear(model.config.llm_config.hidden_size, 10)
    trained = [*model.vision_model.parameters(), *model.mlp1.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=settings.vision_steps)
    generator = torch.Generator().manual_seed(settings.seed)
    bar = tqdm(range(settings.vision_steps), desc="training the vision tower", unit="step")
    for _ in bar:
        batch = torch.randint(len(tiles), (128,), generator=generator)
        logits = head(model.extract_feature(tiles[batch]).mean(dim=1))
        loss = F.cross_entropy(logits, digits[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def _encode(rows: Sequence[Response], processor, world: Path) -> list:
    """One group of one response per annotation; pictures and prompts are encoded once."""
    from PIL import Image

    from internvl_mpo.packing import Group

    tiles, prompts, groups = {}, {}, []
    for row in rows:
        image = row.images[0] if row.images else None
        if image is not None and image not in tiles:
            tiles[image] = processor.image_processor(Image.open(world / image))["pixel_values"]
        num_tiles = len(tiles[image]) if image else 0
        key = (row.question, num_tiles)
        if key not in prompts:
            content = [{"type": "image"}] * bool(image) + [{"type": "text", "text": row.question}]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            prompts[key] = processor.tokenizer(processor.expand_images([text], [num_tiles]))["input_ids"][0]
        answer = processor.tokenizer(row.response + "<|im_end|>", add_special_tokens=False)["input_ids"]
        groups.append(Group(prompts[key], [answer], pairs=[], pair_ids=[], tiles=tiles.get(image)))
    return groups
