"""Time, memory and FLOP of one training step: ours, the original's form, and TRL's DPOTrainer in MPO mode.

    python bench/step_speed.py --preset proportional --json step.json
    python bench/step_speed.py --preset packed --rounds 3
    python bench/step_speed.py --preset bigvocab --sides ours_cached,trl
    python bench/step_speed.py --preset real8b --device cuda --dtype bfloat16 --lora_rank 16
    python bench/step_speed.py --preset real8b --device cuda --dtype bfloat16 --layers 12

All sides train copies of the same random InternVL model (transformers' own class, so that TRL can) on the same pairs,
taking turns in one process in shuffled order. A step is everything from JPEG and text to updated weights. delta is none
on all sides, since TRL has none. bench/README.md says how each number is made and what it does not say.
"""

import concurrent.futures
import contextlib
import copy
import ctypes
import gc
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.kernels.packed_attention import PackedAttention
from internvl_mpo.settings import parse_settings, setting, show_settings

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
    "real8b": Shape(4096, 32, 32, 8, 14336, 92553, 1024, 24, 16, 4096, tiles=(5,), answer=250),
}


@dataclass(kw_only=True)
class Settings:
    """Options of the benchmark."""

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


@dataclass
class Record:
    """What was measured of one side."""

    cpu_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    loss: float = 0.0
    gflop: float = 0.0
    peak_mib: float = 0.0
    peaks: list[float] = field(default_factory=list)

    def summary(self, num_pairs: int, device: str, peak_tflops: float | None) -> dict[str, float]:
        """Medians; rates by CPU time on a CPU, by wall time on a GPU; `mfu` where the GPU's peak is known."""
        cpu, wall = statistics.median(self.cpu_s), statistics.median(self.wall_s)
        seconds = cpu if device == "cpu" else wall
        values = {"cpu_s": cpu, "wall_s": wall, "gflop": self.gflop, "peak_mib": self.peak_mib}
        rates = {
            "pairs_per_s": num_pairs / seconds,
            "gflop_per_s": self.gflop / seconds,
            "loss_of_first_step": self.loss,
        }
        if peak_tflops:
            rates["mfu"] = self.gflop / seconds / 1000 / peak_tflops
        return {name: round(value, 5) for name, value in (values | rates).items()}


def main(argv: list[str]) -> int:
    """Build the sides, time them in turns, then take memory and FLOP, and print the result."""
    settings = parse_settings(
        Settings, argv or ["--preset", "proportional"], program="bench/step_speed.py", about=__doc__
    )
    print(show_settings(settings, "bench/step_speed.py: settings"), flush=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from tqdm import tqdm

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BadInputError("device is cuda, but torch finds no CUDA GPU; take --device cpu or a CUDA build of torch")
    torch.set_num_threads(settings.threads)
    shape = settings.shape
    with tempfile.TemporaryDirectory() as folder:
        world = World(shape, settings, Path(folder))
        steps = {side: build_side(side, world, settings) for side in settings.sides}
        records = {side: Record() for side in steps}
        rng = random.Random(settings.seed)
        for side, step in steps.items():  # warm-up, and the loss before any update
            records[side].loss = step()
        rounds = [rng.sample(list(steps), len(steps)) for _ in range(settings.rounds)]
        for side in tqdm([side for turn in rounds for side in turn], desc="timing", unit="step"):
            gc.collect()
            synchronize(settings.device)
            cpu, wall = time.process_time(), time.perf_counter()
            steps[side]()
            synchronize(settings.device)
            records[side].cpu_s.append(time.process_time() - cpu)
            records[side].wall_s.append(time.perf_counter() - wall)
        for side, step in steps.items():
            records[side].gflop = count_flop(step) / 1e9
            if settings.device == "cuda":
                records[side].peak_mib = cuda_peak_mib(step)
    if settings.device == "cpu" and settings.memory_runs:
        for side in tqdm(settings.sides * settings.memory_runs, desc="memory", unit="process"):
            records[side].peaks.append(own_process(cpu_peak_mib, side, settings))
        for record in records.values():
            record.peak_mib = statistics.median(record.peaks)
    result = report(settings, records, len(shape.tiles))
    print(json.dumps(result, indent=2))
    if settings.json:
        Path(settings.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def report(settings: Settings, records: dict[str, Record], num_pairs: int) -> dict[str, Any]:
    """Return the medians of every side, and how many times longer than ours TRL and the twin take, round by round."""
    import platform

    import torch
    import transformers

    def ratios(slow: str, fast: str) -> dict[str, float]:
        key = "cpu_s" if settings.device == "cpu" else "wall_s"
        pairs = zip(getattr(records[slow], key), getattr(records[fast], key), strict=True)
        values = sorted(a / b for a, b in pairs)
        return {
            "median": round(statistics.median(values), 3),
            "min": round(values[0], 3),
            "max": round(values[-1], 3),
            "peak_memory": round(records[fast].peak_mib / records[slow].peak_mib, 3)
            if records[slow].peak_mib
            else None,
        }

    peak = peak_tflops(settings) if settings.device == "cuda" else None
    summaries = {side: record.summary(num_pairs, settings.device, peak) for side, record in records.items()}
    ours = {side.removeprefix("ours_"): summaries.pop(side) for side in list(summaries) if side.startswith("ours_")}
    details = {
        f"{side}_over_{fast}": ratios(side, f"ours_{fast}")
        for side in ("trl", "twin")
        for fast in ours
        if side in records
    }
    gpu = {"gpu": torch.cuda.get_device_name()} if settings.device == "cuda" else {}
    return {
        "preset": settings.preset,
        "pairs_per_step": num_pairs,
        "ours": ours,
        **summaries,
        "ratio": {fast: details[f"trl_over_{fast}"]["median"] for fast in ours if "trl" in records},
        "ratio_details": details,
        "settings": vars(settings),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **gpu},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


# --- the world: model, tokenizer, images, pairs -----------------------------------------------------------------------


class World:
    """One random model and the pairs of one step, in the forms that the sides read."""

    def __init__(self, shape: Shape, settings: Settings, folder: Path):
        """Make everything from `settings.seed`; images are JPEG files in `folder`."""
        self.shape, self.folder = shape, folder
        self.image_tokens = (shape.tile_side // 28) ** 2
        self.tokenizer = build_tokenizer(shape.vocab)
        self.model = build_model(shape, settings, self.tokenizer, self.image_tokens)
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


def save_image(path: Path, tiles: int, side: int, seed: int) -> None:
    """Write a smooth random JPEG whose aspect ratio gives the wanted number of tiles."""
    from PIL import Image

    columns, rows = GRIDS[tiles]
    noise = random.Random(seed).randbytes(8 * columns * 8 * rows * 3)
    small = Image.frombytes("RGB", (8 * columns, 8 * rows), noise)
    small.resize((columns * side, rows * side), Image.Resampling.BICUBIC).save(path, quality=90)


# --- the sides --------------------------------------------------------------------------------------------------------


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
    """Return our processor with a template that renders the prompts TRL gets."""
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
    """Return transformers' InternVL processor; its video part is left out, as it alone needs torchvision."""
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


# --- instruments ------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # bf16, dense


def peak_tflops(settings: Settings) -> float | None:
    """Return what the GPU can do at most by its data sheet, None if it is not known."""
    import torch

    if settings.peak_tflops or settings.dtype != "bfloat16":
        return settings.peak_tflops
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)


def cuda_peak_mib(step: Callable[[], float]) -> float:
    """Return what one step allocates beyond what is there before it, in MiB."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_peak_mib(side: str, settings: Settings) -> float:
    """Return by how much the resident memory of this process rises above its start in five steps, in MiB.

    Start is after a first step, when weights, reference and optimizer state are there and freed memory was handed back;
    the kernel's high-water mark is restarted then. `nan` where there is none. Allocator as it comes, as in a real run.
    """
    import torch

    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        step = build_side(side, World(settings.shape, settings, Path(folder)), settings)
        step()
        gc.collect()
        if not sys.platform.startswith("linux"):
            return float("nan")
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return float("nan")
        before = status_mib("VmRSS")
        for _ in range(5):
            step()
        return status_mib("VmHWM") - before


def own_process(function: Callable[..., float], *arguments: Any) -> float:
    """Return the result of a function that ran in a new process, where no other side has left anything behind."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def status_mib(key: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def count_flop(step: Callable[[], float]) -> float:
    """Return the FLOP of matrix products, convolutions and attention in one step; causal attention counts half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten

    def addmm_(self_shape: Any, a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    def attention(q: Any, k: Any, v: Any, causal: bool, products: int) -> int:
        batch, heads, queries, width = q
        return products * 2 * batch * heads * queries * k[2] * width // (2 if causal else 1)

    def forward(q: Any, k: Any, v: Any, p: float = 0.0, causal: bool = False, *args: Any, **kwargs: Any) -> int:
        return attention(q, k, v, causal, 2)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: float, causal: bool, *args: Any, **kw: Any
    ) -> int:
        return attention(q, k, v, causal, 5)

    formulas = {
        aten.addmm_: addmm_,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()


if __name__ == "__main__":
    sys.exit(run_program(main))
