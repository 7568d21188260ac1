"""The start model of the mini world: official architecture, about 1 M parameters, trained from scratch."""

import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_mpo.errors import BadInputError
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
    steps: int = setting(500, help="optimizer steps")
    optimizer: Literal["muon", "adamw"] = setting(
        "muon", help="of the language model's layers: muon learns the tables in half the steps; the rest has adamw"
    )
    vision_steps: int = setting(300, help="steps of 128 tiles that teach the vision tower before")
    batch_size: int = setting(32, help="annotations per step")
    learning_rate: float = setting(3e-3, help="of adamw, peak of the cosine schedule")
    muon_learning_rate: float = setting(0.02, help="of muon, likewise")
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

    from internvl_mpo.logps import attach_scoring, token_logps
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
    weights = [token_weights(row, group.responses[0], tokenizer) for row, group in zip(rows, groups, strict=True)]
    _pretrain_vision(model, rows, groups, settings)
    attach_scoring(model)
    optimizers = _optimizers(model, settings)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _scale(step, settings.steps))
        for optimizer in optimizers
    ]
    batches = _batches(len(groups), settings)
    model.train()
    bar = tqdm(range(settings.steps), desc="training the start model", unit="step")
    for _ in bar:
        batch = next(batches)
        weight_E = torch.tensor([weight for index in batch for weight in weights[index]])
        logps_E = token_logps(model, pack_groups([groups[index] for index in batch]))
        loss = -(weight_E * logps_E).sum() / weight_E.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    with replaced_folder(settings.output, sources=[settings.world]) as folder:
        write_model_folder(model, processor, folder)


def _scale(step: int, steps: int) -> float:
    """The learning rate's share of its peak: a linear rise, then a cosine down to a fiftieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimizers(model, settings: StartSettings) -> list:
    """AdamW, and where it is asked for Muon on the matrices of the language model's layers."""
    import torch

    matrices = []
    if settings.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise BadInputError(f"torch {torch.__version__} has no Muon; take torch 2.9 or newer, or --optimizer adamw")
        matrices = [p for n, p in model.named_parameters() if "language_model.model.layers" in n and p.ndim == 2]
    others = {id(p) for p in model.parameters()} - {id(p) for p in matrices}
    decayed, plain = [], []
    for parameter in model.parameters():
        if id(parameter) in others:
            (decayed if parameter.ndim > 1 else plain).append(parameter)
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
    )
    if not matrices:
        return [adamw]
    return [adamw, torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=0.05)]


def token_weights(row: Response, answer: Sequence[int], tokenizer) -> list[float]:
    """Return how much each token of an annotation counts: 1, but of drills only the results.

    The other numbers are drawn at random. Predicting them teaches nothing, and their gradients, all noise, drown those
    of the results.

    Args:
        row: the annotation.
        answer: its token ids, the end of the turn included.
        tokenizer: made them.
    """
    if row.provenance["style"] != "drill":
        return [1.0] * len(answer)
    results = [found.span() for found in re.finditer(r"(?<= is) \d+\.", row.response)]
    text = row.response + "<|im_end|>"
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [float(any(first <= start and stop <= last for first, last in results)) for start, stop in places]


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
    """One group of one response per annotation; every picture and every prompt is encoded once, texts all together."""
    from PIL import Image

    from internvl_mpo.packing import Group

    tokenizer = processor.tokenizer
    names = dict.fromkeys(image for row in rows for image in row.images)
    tiles = {name: processor.image_processor(Image.open(world / name))["pixel_values"] for name in names}
    keys = [(row.question, sum(len(tiles[name]) for name in row.images)) for row in rows]
    texts = {}
    for question, num_tiles in dict.fromkeys(keys):
        content = [{"type": "image"}] * bool(num_tiles) + [{"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        texts[question, num_tiles] = processor.expand_images([text], [num_tiles])[0]
    prompts = dict(zip(texts, tokenizer(list(texts.values()))["input_ids"], strict=True))
    answers = tokenizer([row.response + "<|im_end|>" for row in rows], add_special_tokens=False)["input_ids"]
    return [
        Group(prompts[key], [answer], pairs=[], pair_ids=[], tiles=tiles[row.images[0]] if row.images else None)
        for row, key, answer in zip(rows, keys, answers, strict=True)
    ]
