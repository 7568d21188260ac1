"""A full-size model on a CPU, from a folder to a chat: what breaks here would break for the first user.

    python bench/full_size_rehearsal.py --tokenizer FOLDER                  a random InternVL2-1B, minutes to an hour
    python bench/full_size_rehearsal.py --tokenizer FOLDER --ways lora      only adapters
    python bench/full_size_rehearsal.py --tokenizer FOLDER --size tiny      the same path in a minute, to test the path

FOLDER holds the tokenizer of Qwen2 (vocab.json, merges.txt, tokenizer_config.json), as in Qwen/Qwen2-0.5B-Instruct. The
model has InternVL2-1B's real shape and random weights. Its folder is published; then, with adapters and with all
weights, two steps of two pairs are trained, a picture of 12 tiles and its thumbnail in each, killed with SIGKILL when
the first checkpoint stands, and started again; the result is published, loaded by the Auto classes in a process of its
own, and asked. Every stage is one command; a stage that is finished is not run again. The highest resident memory of
each is taken from the kernel, and that of training compared with `python -m internvl_mpo.memory_estimate`. Of training
it is also told apart what the process itself holds (anonymous) and what it sees of files (weights as they were loaded),
which the system takes back when it is short of memory.
"""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.files import atomic_writer, replaced_folder  # noqa: E402
from internvl_mpo.programs import program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402
from internvl_mpo.stages import Lane, Stage, Stages  # noqa: E402

GIB = 2**30
IMAGE_WORDS = ("img", "/img", "IMG_CONTEXT", "quad", "/quad", "ref", "/ref", "box", "/box")
QUESTION = "Which colour fills most of the picture?"
# way -> what it adds to the training command
WAYS = {"lora": ["--lora_rank", "16"], "full": []}


@dataclass
class Settings:
    """Settings of the rehearsal."""

    tokenizer: str = setting(help="folder of Qwen2's tokenizer files")
    output: str = setting("outputs/rehearsal", help="folder of everything, about 20 GB for 1b")
    size: Literal["1b", "tiny"] = setting("1b", help="shape of the model: 1b, or tiny to test the path")
    ways: list[str] = setting(list(WAYS), help=f"how to train: {' '.join(WAYS)}")
    max_tokens_per_pack: int = setting(8192, help="tokens of one forward pass; two pairs of 13 tiles take 7,100")
    step: Literal["", "make", "train", "chat"] = setting("", help="used by the program itself")
    way: str = setting("", help="used by the program itself")

    def __post_init__(self) -> None:
        unknown = set(self.ways) - set(WAYS)
        if unknown:
            raise BadInputError(f"ways names '{min(unknown)}', expected some of {', '.join(WAYS)}")
        if not Path(self.tokenizer, "tokenizer_config.json").is_file():
            raise BadInputError(
                f"tokenizer {self.tokenizer} has no tokenizer_config.json; give a folder of Qwen2's files"
            )


def main(argv: list[str]) -> int:
    """Run the stages and print the table."""
    settings = parse_settings(Settings, argv, program="bench/full_size_rehearsal.py", about=__doc__, config=False)
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))  # the stages would run with one thread
    out = Path(settings.output)
    if settings.step == "make":
        make_official(settings, out)
    elif settings.step == "train":
        train_killed_once(settings, out)
    elif settings.step == "chat":
        chat(out / settings.way / "published")
    else:
        done = Stages(out / "stages")
        done.run_all([Lane(stages(settings, out))])
        report(settings, out, done)
    return 0


def stages(settings: Settings, out: Path) -> list[Stage]:
    """Return what is run, in order; the ways share the model they start from."""
    asked = {name: getattr(settings, name) for name in ("tokenizer", "size", "max_tokens_per_pack")}
    own = [sys.executable, str(Path(__file__).resolve()), "--output", str(out)]
    own += [*(word for name, value in asked.items() for word in (f"--{name}", str(value))), "--step"]
    publish = [*program("-m internvl_mpo.publish"), "model"]
    start = out / "start"
    found = [
        Stage("make", f"a random model of size {settings.size} in the official layout, two pairs", [*own, "make"],
              out / "pairs.jsonl"),
        Stage("publish", "its folder with our code", [*publish, str(out / "official"), "--output", str(start)],
              start / "config.json"),
    ]  # fmt: skip
    for way in settings.ways:
        folder = out / way
        found += [
            Stage(f"train_{way}", "two steps, killed after the first", [*own, "train", "--way", way],
                  folder / "model/config.json"),
            Stage(f"publish_{way}", "the trained model",
                  [*publish, str(folder / "model"), "--output", str(folder / "published")],
                  folder / "published/config.json"),
            Stage(f"chat_{way}", "loaded by the Auto classes, and asked", [*own, "chat", "--way", way],
                  folder / "published.json"),
        ]  # fmt: skip
    return found


def make_official(settings: Settings, out: Path) -> None:
    """Write a folder as an official checkpoint is laid out, and two pairs with a picture of 12 tiles each."""
    import torch
    from transformers import AutoTokenizer

    from internvl_mpo.families.shapes import read_shape
    from modeling_internvl_mpo import InternVLChatModel

    tokenizer = AutoTokenizer.from_pretrained(settings.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{word}>" for word in IMAGE_WORDS]})
    config = read_shape("1b")
    config.template, config.dynamic_image_size, config.use_thumbnail = "Hermes-2", True, True
    config.max_dynamic_patch = 12
    if settings.size == "tiny":
        small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        for part in (config.vision_config, config.llm_config):
            for name, value in small.items():
                setattr(part, name, value)
        config.llm_config.num_key_value_heads, config.llm_config.layer_types = 2, ["full_attention"] * 2
    if len(tokenizer) != config.llm_config.vocab_size:
        raise BadInputError(
            f"{settings.tokenizer} has {len(tokenizer):,} tokens with InternVL's nine, but InternVL2-1B has "
            f"{config.llm_config.vocab_size:,}; give the tokenizer of Qwen2"
        )
    torch.manual_seed(0)
    with replaced_folder(out / "official") as folder:
        InternVLChatModel(config).to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    make_pairs(out, side=448)


def make_pairs(out: Path, side: int) -> None:
    """Write two pairs about two pictures that are cut into 4 x 3 tiles."""
    import numpy as np
    from PIL import Image

    rows = []
    for number, colour in enumerate(("red", "blue")):
        generator = np.random.default_rng(number)
        pixels = generator.integers(0, 90, (3 * side, 4 * side, 3), dtype=np.uint8)
        pixels[..., 2 * number] += 160
        Image.fromarray(pixels).save(out / f"{colour}.png")
        rows.append(
            {
                "id": colour, "image": f"{colour}.png", "question": QUESTION,
                "chosen": f"The picture is noise on a {colour} ground.\n\nFinal answer: {colour}",
                "rejected": "The picture is noise on a green ground.\n\nFinal answer: green",
            }
        )  # fmt: skip
    with atomic_writer(out / "pairs.jsonl") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def train_killed_once(settings: Settings, out: Path) -> None:
    """Train two steps; kill the run when its first checkpoint is whole, and let it go on."""
    from internvl_mpo.training.checkpoint import whole_checkpoints

    folder = out / settings.way
    command = [
        *program("train_mpo.py"), "--model", str(out / "start"), "--data", str(out / "pairs.jsonl"),
        "--output_dir", str(folder / "run"), "--model_dir", str(folder / "model"), *training(settings),
    ]  # fmt: skip
    peaks = Peaks(folder)
    if not whole_checkpoints(folder / "run"):
        process = subprocess.Popen(command, start_new_session=True)
        while process.poll() is None and not whole_checkpoints(folder / "run"):
            peaks.look(process.pid)
        if process.poll() is not None:
            raise BadInputError(f"training ended with exit code {process.returncode} before its first checkpoint")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed after {[path.name for path in whole_checkpoints(folder / 'run')]}", flush=True)
    process = subprocess.Popen(command)
    while process.poll() is None:
        peaks.look(process.pid)
    if process.returncode:
        raise BadInputError(f"the second start of training ended with exit code {process.returncode}")


class Peaks:
    """The most that a training process held in each part of its run, in GiB; kept in memory.json of its folder."""

    def __init__(self, folder: Path):
        """Go on with what is in the folder."""
        self.file, self.log = folder / "memory.json", folder / "run/log.jsonl"
        self.found: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def look(self, pid: int) -> None:
        """Look five times a second, where the system tells."""
        time.sleep(0.2)
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        except OSError:
            return
        held = {key: int(size) / 2**20 for key, size in re.findall(r"^Rss(Anon|File):\s+(\d+) kB", text, re.MULTILINE)}
        if not held:  # it is ending
            return
        losses = self.log.read_text(encoding="utf-8").count('"loss"') if self.log.exists() else 0
        part = ("first step", "checkpoint, second step", "checkpoint, result")[losses]
        peak = self.found.setdefault(part, {"anonymous": 0.0, "resident": 0.0})
        before = dict(peak)
        peak["anonymous"] = max(peak["anonymous"], held["Anon"])
        peak["resident"] = max(peak["resident"], sum(held.values()))
        if peak != before:
            with atomic_writer(self.file) as file:
                json.dump(self.found, file, indent=2)


def training(settings: Settings) -> list[str]:
    """Return the settings of a training run: those of configs/internvl2_1b.yaml without DeepSpeed, for a CPU."""
    values: dict[str, Any] = {
        "dtype": "bfloat16", "bf16": "true", "use_cpu": "true", "gradient_checkpointing": "true", "pairs_per_step": 2,
        "max_tokens_per_pack": settings.max_tokens_per_pack, "max_length": 6144, "max_tiles": 12, "max_steps": 2,
        "save_steps": 1, "learning_rate": 5e-6,
    }  # fmt: skip
    return [*(word for key, value in values.items() for word in (f"--{key}", str(value))), *WAYS[settings.way]]


def chat(folder: Path) -> None:
    """Load a folder as a stranger does and ask it about the first picture."""
    from PIL import Image
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    picture = Image.open(folder.parents[1] / "red.png")
    tiles = processor.image_processor(picture)["pixel_values"].to(model.dtype)
    answer = model.chat(processor.tokenizer, tiles, QUESTION, {"max_new_tokens": 8, "do_sample": False})
    found = {"tiles": len(tiles), "dtype": str(model.dtype), "answer": answer}
    with atomic_writer(folder.with_suffix(".json")) as file:
        json.dump(found, file)
    print(found)


def report(settings: Settings, out: Path, done: Stages) -> None:
    """Print and write what every stage took, and how far the calculated memory is from the measured one."""
    import torch
    import transformers

    result: dict[str, Any] = {
        "stages": done.finished, "memory": {way: memory(settings, out, way, done) for way in settings.ways},
        "machine": {"system": platform.platform(), "cores": os.cpu_count()}, "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": vars(settings),
    }  # fmt: skip
    with atomic_writer(out / "rehearsal.json") as file:
        json.dump(result, file, indent=2)
    print(f"\n{'stage':<16} {'seconds':>8} {'CPU s':>8} {'peak GiB':>9}")
    for name, stage in done.finished.items():
        peak, cpu = (stage["peak_mib"] or 0) / 1024, stage["cpu_seconds"] or 0
        print(f"{name:<16} {stage['seconds']:>8.0f} {cpu:>8.0f} {peak:>9.1f}")
    for way, found in result["memory"].items():
        print(
            f"memory of training, {way}: {found['calculated_gib']:.1f} GiB calculated, {found['measured_gib']:.1f} GiB "
            f"measured, {found['measured_gib'] / found['calculated_gib'] - 1:+.0%}"
        )
        for part, peak in found["parts"].items():
            print(f"  {part:<24} {peak['anonymous']:>5.1f} GiB anonymous, {peak['resident']:>5.1f} GiB resident")


def memory(settings: Settings, out: Path, way: str, done: Stages) -> dict[str, Any]:
    """Return what memory a training run should take, and the most that its process held."""
    from internvl_mpo.families.shapes import read_shape
    from internvl_mpo.memory_estimate import estimate_memory, setup_of_run
    from internvl_mpo.training.fake_pass import Setup

    words = training(replace(settings, way=way))
    run = {key.removeprefix("--"): json.loads(value) if value[0].isdigit() or value in ("true", "false") else value
           for key, value in zip(words[::2], words[1::2], strict=True)}  # fmt: skip
    num_tiles = 2 * 13 if settings.max_tokens_per_pack >= 2 * 3500 else 13
    tokens = min(settings.max_tokens_per_pack, 3540 * num_tiles // 13)
    given = {"attention": "segments", "num_tiles": num_tiles, "max_tokens_per_pack": tokens, "response_tokens": 24}
    setup = Setup(**{**setup_of_run(run), **given})
    calculated = estimate_memory(read_shape(str(out / "start" / "config.json")), setup).total
    measured = done.finished[f"train_{way}"]["peak_mib"] / 1024
    return {"calculated_gib": calculated / GIB, "measured_gib": measured, "parts": Peaks(out / way).found}


if __name__ == "__main__":
    sys.exit(run_program(main))
