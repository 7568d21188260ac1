"""What bench/step_speed.py runs on: settings, shapes, and a random model, tokenizer, pictures and pairs of a shape."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.errors import BadInputError
from internvl_mpo.kernels.packed_attention import PackedAttention
from internvl_mpo.settings import setting

WEIGHTS = (0.8, 0.2, 1.0)
BETA = 0.1
GRIDS = {1: (1, 1), 3: (2, 1), 5: (2, 2), 7: (3, 2), 9: (4, 2), 13: (4, 3)}  # tiles with thumbnail: columns, rows
SIDES = ("ours_live", "ours_cached", "twin", "trl")


@dataclass(frozen=True)
class Shape:
    """Model and data of a preset; `tiles` has one entry for each pair of a step."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    vit_hidden: int
    vit_layers: int
    vit_heads: int
    vit_ffn: int
    tiles: tuple[int, ...]
    answer: int
    tile_side: int = 448
    question: int = 50
    jitter: float = 0.0
    same_question: bool = False
    shared_half: bool = False


PROPORTIONAL = Shape(512, 3, 8, 2, 1792, 1280, 64, 3, 2, 256, tiles=(5,), answer=200)
PRESETS = {
    "tiny": Shape(64, 2, 4, 2, 224, 1024, 32, 2, 2, 128, tiles=(3,), answer=40, tile_side=112, question=24),
    # Real token counts, and FLOP shares of LLM, ViT and head near those of InternVL2-8B (82, 13 and 4 %).
    "proportional": PROPORTIONAL,
    # The real vocabulary on a small trunk: for memory, not for time.
    "bigvocab": Shape(128, 2, 4, 2, 448, 92553, 64, 2, 2, 256, tiles=(1,), answer=60),
    # Four pairs of different lengths: what padding costs.
    "packed": replace(PROPORTIONAL, hidden=256, layers=2, ffn=896, tiles=(1, 3, 5, 7), jitter=0.6),
    # Four pairs of one question: eight responses on one prompt.
    "grouped": replace(PROPORTIONAL, tiles=(5, 5, 5, 5), same_question=True),
    # The rejected response repeats the first half of the chosen one.
    "dropout_ntp": replace(PROPORTIONAL, answer=250, shared_half=True),
    "real1b": Shape(896, 24, 14, 2, 4864, 151655, 1024, 24, 16, 4096, tiles=(5,), answer=250),
    "real8b": Shape(4096, 32, 32, 8, 14336, 92553, 1024, 24, 16, 4096, tiles=(5,), answer=250),
}


@dataclass(kw_only=True)
class Settings:
    """Options of the benchmark."""

    family: Literal["internvl", "qwen2_5_vl"] = setting("internvl", help="whose model and processor are trained")
    preset: str = setting("proportional", help=f"shapes: {' '.join(PRESETS)}")
    json: str | None = setting(None, help="also write the result to this file")
    rounds: int = setting(5, help="timed steps of each side")
    sides: list[str] = setting(list(SIDES), help=f"what to run: {' '.join(SIDES)}")
    device: Literal["cpu", "cuda"] = setting("cpu", help="cpu or cuda")
    dtype: Literal["float32", "bfloat16"] = setting("float32", help="of weights and activations")
    threads: int = setting(1, help="CPU threads; 1 makes CPU seconds comparable on a shared machine")
    layers: int | None = setting(None, help="layers of the language model instead of the preset's")
    tiles: list[int] = setting([], help="tiles of each pair instead of the preset's, such as 1,13")
    lora_rank: int = setting(0, help="train LoRA adapters on the language model, on every side; 0 trains all weights")
    attention: PackedAttention = setting("auto", help="attention over packs: auto segments flex varlen")
    trim: bool = setting(True, help="ours: run the last layer for scored tokens only")
    checkpointing: bool = setting(False, help="recompute activations, ours and twin")
    trl_checkpointing: bool = setting(False, help="recompute activations, TRL (its own default is true)")
    memory_runs: int = setting(3, help="processes of each side that measure memory on a CPU; 0 leaves it out")
    peak_tflops: float | None = setting(None, help="of the GPU in this dtype, for its utilisation; none = by its name")
    seed: int = setting(0, help="weights and pairs")

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        if self.preset not in PRESETS:
            raise BadInputError(f"preset is '{self.preset}', expected one of {', '.join(PRESETS)}")
        unknown = [side for side in self.sides if side not in SIDES]
        if unknown or not self.sides:
            raise BadInputError(f"sides has {unknown or 'nothing'}, expected some of {', '.join(SIDES)}")
        if self.rounds < 1 or self.threads < 1 or self.memory_runs < 0:
            raise BadInputError("rounds and threads must be 1 or more, memory_runs 0 or more")
        if any(count not in GRIDS for count in self.tiles):
            raise BadInputError(f"tiles is {self.tiles}, expected numbers out of {', '.join(map(str, GRIDS))}")

    @property
    def shape(self) -> Shape:
        """The preset with what the settings change of it."""
        changes = {"layers": self.layers, "tiles": tuple(self.tiles)}
        return replace(PRESETS[self.preset], **{name: value for name, value in changes.items() if value})


class World:
    """One random model and the pairs of one step, in the forms that the sides read."""

    def __init__(self, shape: Shape, settings: Settings, folder: Path):
        """Make everything from `settings.seed`; images are JPEG files in `folder`."""
        self.shape, self.folder = shape, folder
        self.image_tokens = (shape.tile_side // 28) ** 2
        self.tokenizer = build_tokenizer(shape.vocab)
        self.family = settings.family
        build = build_model if settings.family == "internvl" else build_qwen
        self.model = build(shape, settings, self.tokenizer, self.image_tokens)
        rng = random.Random(settings.seed)

        def words(count: float) -> list[str]:
            return [f"w{rng.randrange(8, shape.vocab)}" for _ in range(max(2, round(count)))]

        self.rows: list[dict[str, str]] = []
        for number, tiles in enumerate(shape.tiles):
            if number == 0 or not shape.same_question:
                image, question = f"{number}.jpg", " ".join(words(shape.question))
                save_image(folder / image, tiles, shape.tile_side, settings.seed + number)
            chosen, rejected = (words((shape.answer - 1) * (1 + shape.jitter * rng.uniform(-1, 1))) for _ in range(2))
            if shape.shared_half:
                rejected[: len(chosen) // 2] = chosen[: len(chosen) // 2]
            texts = {"chosen": " ".join(chosen), "rejected": " ".join(rejected)}
            self.rows.append({"image": image, "question": question} | texts)


def build_tokenizer(vocab: int) -> Any:
    """Return a tokenizer of whole words w8, w9, ... and the special tokens before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
    names = special + [f"w{index}" for index in range(len(special), vocab)]
    words = models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[4:],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )


def build_model(shape: Shape, settings: Settings, tokenizer: Any, image_tokens: int) -> Any:
    """Return transformers' InternVL with random weights."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig

    vision = InternVLVisionConfig(
        hidden_size=shape.vit_hidden,
        num_hidden_layers=shape.vit_layers,
        num_attention_heads=shape.vit_heads,
        intermediate_size=shape.vit_ffn,
        attention_bias=True,
        image_size=[shape.tile_side, shape.tile_side],
        patch_size=[14, 14],
        use_mean_pooling=True,
    )
    text = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    image_token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        tie_word_embeddings=False,
        image_token_id=image_token,
        image_seq_length=image_tokens,
    )
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return InternVLForConditionalGeneration._from_config(config, dtype=getattr(torch, settings.dtype))


def build_qwen(shape: Shape, settings: Settings, tokenizer: Any, image_tokens: int) -> Any:
    """Return Qwen2.5-VL with random weights and the preset's widths; a picture has no thumbnail's tokens here."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = shape.hidden // shape.heads // 2
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]}
    vision = {
        **{"depth": shape.vit_layers, "hidden_size": shape.vit_hidden, "out_hidden_size": shape.hidden},
        **{"intermediate_size": shape.vit_ffn, "num_heads": shape.vit_heads},
        "fullatt_block_indexes": [shape.vit_layers - 1],
    }
    text = {
        **{"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads},
        **{"num_key_value_heads": shape.kv_heads, "intermediate_size": shape.ffn, "vocab_size": shape.vocab},
        **{"rope_parameters": rope, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id},
        "pad_token_id": tokenizer.pad_token_id,
    }
    image, video = tokenizer.convert_tokens_to_ids(["<IMG_CONTEXT>", "<video>"])
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=image, video_token_id=video, tie_word_embeddings=False
    )
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=getattr(torch, settings.dtype))


def save_image(path: Path, tiles: int, side: int, seed: int) -> None:
    """Write a smooth random JPEG whose aspect ratio gives the wanted number of tiles."""
    from PIL import Image

    columns, rows = GRIDS[tiles]
    noise = random.Random(seed).randbytes(8 * columns * 8 * rows * 3)
    small = Image.frombytes("RGB", (8 * columns, 8 * rows), noise)
    small.resize((columns * side, rows * side), Image.Resampling.BICUBIC).save(path, quality=90)
