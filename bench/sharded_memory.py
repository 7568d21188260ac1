"""Compare what two ranks hold when they train with what `memory_estimate` calculates, for every way to share out.

    python bench/sharded_memory.py --ways ddp,fsdp,fsdp_bf16

A random model of some 80 M weights is trained on the CPU, two steps of two packs a rank with a checkpoint after the
first. Measured is the most that a rank holds beyond what it held just before it read the model, from the first step to
the last; the estimate is taken without its reserve, which stands for that beginning. glibc is told to give back freed
blocks of 1 MB (in training: 8 MiB), so that what is counted is what is held.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # runs from a checkout without installation

from kill_train import small_buckets  # noqa: E402

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

NUM_RANKS = 2
LETTERS = 120  # of a response; the tokenizer has one token for each
OFFLOAD, LORA = ("--fsdp_config", '{"cpu_offload": true}'), ("--lora_rank", "8")
WAYS: dict[str, tuple[str, ...]] = {
    "ddp": (),
    "zero2": ("--deepspeed", "zero2"),
    "zero3": ("--deepspeed", "zero3"),
    "fsdp": ("--fsdp", "true"),
    "fsdp_bf16": ("--fsdp", "true", "--bf16", "true"),
    "fsdp_offload": ("--fsdp", "true", *OFFLOAD),
    "fsdp_lora": ("--fsdp", "true", *LORA),
}


@dataclass
class Settings:
    """Settings of the comparison."""

    ways: list[str] = setting(["ddp", "zero2", "zero3", "fsdp"], help=f"how to train: {', '.join(WAYS)}")
    layers: int = setting(10, help="layers of the language model, 7 M weights each")
    words: int = setting(8000, help="words of its vocabulary, 1,536 weights each")

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise BadInputError(f"ways has '{way}', expected some of {', '.join(WAYS)}")


def main(argv: list[str]) -> int:
    """Run the comparison, or be one of its ranks."""
    if "RANK" in os.environ:
        return measure(argv)
    settings = parse_settings(Settings, argv, program="bench/sharded_memory.py", about=__doc__, config=False)
    with tempfile.TemporaryDirectory() as folder:
        make_world(Path(folder), settings)
        print(
            "| way | weights | calculated MiB | measured MiB, each rank | measured / calculated | reading the model |"
        )
        print("|---|---|---|---|---|---|")
        for way in settings.ways:
            print(line(way, Path(folder)), flush=True)
    return 0


def make_world(folder: Path, settings: Settings) -> None:
    """Write the model and eight text-only pairs that differ in nothing that memory depends on."""
    from tiny_world import make_model_folder

    shape = {
        **{"hidden_size": 768, "num_hidden_layers": settings.layers, "intermediate_size": 2048},
        **{"num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": settings.words},
    }
    make_model_folder(folder / "start", llm_config=shape)
    rows = [{"question": f"{n}?", "chosen": "a" * LETTERS, "rejected": "b" * LETTERS} for n in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def line(way: str, folder: Path) -> str:
    """Train in one way and return a line of the table."""
    from internvl_mpo.memory_estimate import RESERVE, estimate_memory, read_shape, setup_of_run
    from internvl_mpo.training.fake_pass import Setup

    words = list(WAYS[way])
    if "--deepspeed" in words:
        at = words.index("--deepspeed") + 1
        words[at] = str(small_buckets(ROOT / f"configs/deepspeed/{words[at]}.json", folder))
    values = {
        **{"model": folder / "start", "data": folder / "pairs.jsonl", "output_dir": folder / way, "use_cpu": "true"},
        **{"pairs_per_step": 4, "pairs_per_group": 1, "max_tokens_per_pack": 430, "max_length": 430, "max_steps": 2},
        **{"save_steps": 1, "reference_ahead_steps": 1, "preflight_workers": 0},
    }
    arguments = [*(word for key, value in values.items() for word in (f"--{key}", str(value))), *words]
    command = [sys.executable, "-m", "internvl_mpo.launch", "--standalone", "--nproc_per_node", str(NUM_RANKS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    with open(folder / f"{way}.log", "w", encoding="utf-8") as log:
        code = subprocess.call([*command, __file__, *arguments], env=environment, stdout=log, stderr=log)
    if code:
        raise BadInputError(f"{way} failed:\n{(folder / f'{way}.log').read_text()[-3000:]}")
    given = zip((word[2:] for word in words[::2]), map(parsed, words[1::2]), strict=True)
    run = {"model": way, **dict(given)}
    shape = {"num_gpus": NUM_RANKS, "attention": "segments", "num_tiles": 0, "max_tokens_per_pack": 426}
    setup = Setup(**{**setup_of_run(run), **shape, "response_tokens": LETTERS})
    found = estimate_memory(read_shape(str(folder / "start")), setup)
    # the model is read whole by each rank before FSDP2 cuts it, on a CPU into the same memory
    calculated = max(found.total - RESERVE["segments"], found.host * setup.fsdp) / 2**20
    ranks = [json.loads((folder / way / f"memory_{rank}.json").read_text()) for rank in range(NUM_RANKS)]
    steps, reading = ([rank[name] for rank in ranks] for name in ("steps", "reading"))
    return (
        f"| {way} | {found.num_weights / 1e6:.0f} M | {calculated:,.0f} | {' '.join(f'{mib:,.0f}' for mib in steps)} | "
        f"{max(steps) / calculated:.2f} | {max(reading):,.0f} |"
    )


def parsed(word: str) -> Any:
    """Return a setting as a run file holds it."""
    return json.loads(word) if word[0] in "{0123456789" or word in ("true", "false") else word


def measure(argv: list[str]) -> int:
    """Train as one of the ranks, and write what it held."""
    from instruments import status_mib

    import train_mpo

    found: dict[str, float] = {}
    plain = {name: getattr(train_mpo, name) for name in ("load_model", "train", "save")}

    def load_model(*args: Any) -> Any:
        found["idle"] = status_mib("VmRSS")
        forget_peak()
        return plain["load_model"](*args)

    def train(*args: Any) -> None:
        found["reading"] = status_mib("VmHWM") - found["idle"]
        forget_peak()
        plain["train"](*args)
        found["steps"] = status_mib("VmHWM") - found["idle"]

    def save(settings: Any, *args: Any) -> None:
        path = Path(settings.output_dir) / f"memory_{settings.process_index}.json"
        path.write_text(json.dumps(found), encoding="utf-8")

    train_mpo.load_model, train_mpo.train, train_mpo.save = load_model, train, save
    return run_program(train_mpo.main, argv)


def forget_peak() -> None:
    """Let the kernel count the most that this process held from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    sys.exit(run_program(main))
