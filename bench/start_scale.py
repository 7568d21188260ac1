"""How long does a run take until its first step, in how much memory, with 100 thousand, 1 and 3 million pairs?

    python bench/start_scale.py --pairs 100000 --folder /tmp/scale --json scale.json

Makes data like MMPR's (subsets with their own `repeat_time`, four pairs a question; 256 pictures shared by all, so that
the disk stays small) and a tiny model's processor, and starts twice on it: cold, with nothing known of the pairs, then
warm. On one rank and on two, each a process of its own under torchrun. For each stage and rank: processor time of the
process and the workers it started, and memory of its own (anonymous pages; what is mapped from a file is shared by all
ranks) above what it had after its imports. The most memory of a stage is looked up a hundred times a second.
"""

import json
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # runs from a checkout without installation; tests/ has the tiny model

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

NUM_SUBSETS, NUM_PICTURES, PAIRS_OF_A_QUESTION = 16, 256, 4
STAGES = ("cold: read and check", "warm: read and check", "plan", "first packs")


@dataclass
class Settings:
    """Settings of the benchmark."""

    folder: str = setting(help="folder for data, model and caches; what is there is used again")
    pairs: int = setting(100_000, help="pairs of the data")
    ranks: list[int] = setting([1, 2], help="how many ranks to start")
    workers: int | None = setting(None, help="processes that read and check; none = one per core")
    json: str | None = setting(None, help="file for the figures")
    stages_of: str | None = setting(None, help="set by the program itself: folder of one start")

    def __post_init__(self) -> None:
        if self.pairs < 10_000:
            raise BadInputError(f"pairs is {self.pairs}, expected 10000 or more")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, program="bench/start_scale.py", about=__doc__, config=False)
    if settings.stages_of:
        run_stages(settings)
        return 0
    data = make_data(Path(settings.folder) / f"data-{settings.pairs}", settings.pairs)
    make_model(Path(settings.folder) / "model")
    rows = []
    for ranks in settings.ranks:
        output = Path(settings.folder) / f"run-{settings.pairs}-{ranks}-{time.time_ns()}"
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), __file__, *argv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", *command, "--stages_of", str(output)], check=True, env=environment)
        for rank in range(ranks):
            rows.append(json.loads((output / f"rank{rank}.json").read_text(encoding="utf-8")))
    print(f"\n{settings.pairs:,} pairs, {sum(path.stat().st_size for path in data.rglob('*.jsonl')) / 1e6:,.0f} MB")
    print("| ranks | rank | " + " | ".join(f"{stage}: CPU s | MB" for stage in STAGES) + " |")
    for row in rows:
        cells = (f"{row[stage]['cpu_seconds']:.1f} | {row[stage]['megabytes']:.0f}" for stage in STAGES)
        print(f"| {row['ranks']} | {row['rank']} | " + " | ".join(cells) + " |")
    if settings.json:
        Path(settings.json).write_text(json.dumps({"pairs": settings.pairs, "rows": rows}, indent=1), encoding="utf-8")
    return 0


# --- the world --------------------------------------------------------------------------------------------------------


def make_data(folder: Path, num_pairs: int) -> Path:
    """Write a release with `num_pairs` pairs and return its folder."""
    from PIL import Image

    if (folder / "meta.json").is_file():
        return folder
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(4000)]
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        shape = (28 * (1 + number % 3), 28 * (1 + number % 2))
        Image.new("RGB", shape, (number, 0, 0)).save(folder / "images" / f"{number}.png")
    meta = {}
    for number in range(NUM_SUBSETS):
        name = f"set{number}_pairs_vqa_correctness_rules"
        num_questions = num_pairs // NUM_SUBSETS // PAIRS_OF_A_QUESTION
        with open(folder / "annotations" / f"{name}.jsonl", "w", encoding="utf-8") as out:
            for question in range(num_questions):
                out.writelines(json.dumps(row) + "\n" for row in pairs_of_question(question, words, rng))
        meta[name] = {
            "root": "images",
            "annotation": f"annotations/{name}.jsonl",
            "repeat_time": (1, 0.5, 1, 2)[number % 4],
            "length": num_questions * PAIRS_OF_A_QUESTION,
        }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def pairs_of_question(number: int, words: list[str], rng: random.Random) -> Iterator[dict[str, str]]:
    """Yield the pairs of one question: two right and two wrong answers, each with each."""
    question = "<image>\n" + " ".join(rng.choices(words, k=rng.randint(10, 40)))
    answers = [" ".join(rng.choices(words, k=rng.randint(15, 60))) for _ in range(4)]
    for chosen in (0, 1):
        for rejected in (2, 3):
            row = {"image": f"{number % NUM_PICTURES}.png", "question": question, "chosen": answers[chosen]}
            yield {**row, "rejected": answers[rejected], "answer_gt": "12"}


def make_model(folder: Path) -> None:
    """Save a tiny model with a tokenizer of one token a byte."""
    from tiny_world import make_model_folder

    if not folder.is_dir():
        make_model_folder(folder)


# --- a rank -----------------------------------------------------------------------------------------------------------


def run_stages(settings: Settings) -> None:
    """Go through the stages of a start on this rank, and write down what each took."""
    import torch.distributed

    from internvl_mpo.training.data import GroupDataset
    from internvl_mpo.training.pairs import hold_out, plan, read_pairs
    from internvl_mpo.training.settings import parse_train_settings
    from modeling_internvl_mpo import InternVLChatProcessor

    model = str(Path(settings.folder) / "model")
    values = {
        "model": model,
        "data": f"{settings.folder}/data-{settings.pairs}/meta.json",
        "output_dir": settings.stages_of,
    }
    values |= {"held_out_share": "0.001", "use_cpu": "true", "report_to": "none", "max_tokens_per_pack": "6144"}
    values |= {"preflight_workers": str(settings.workers)} if settings.workers is not None else {}
    train = parse_train_settings(
        [word for name, value in values.items() for word in (f"--{name}", value)], program="train_mpo.py", about=""
    )
    processor = InternVLChatProcessor.from_pretrained(model, trust_remote_code=False)
    meter = Meter()
    with meter.stage(STAGES[0]):
        pairs = read_pairs(train, processor)
    del pairs
    with meter.stage(STAGES[1]):
        pairs = read_pairs(train, processor)
    with meter.stage(STAGES[2]):
        pairs, _ = hold_out(train.held_out_share, pairs)
        train, pairs = plan(train, pairs)
    with meter.stage(STAGES[3]):
        data = GroupDataset(
            pairs.rows,
            processor,
            max_tiles=train.max_tiles,
            max_length=train.max_length,
            token_weights=train.token_weights,
        )
        packs = iter(pairs.sampler(train))
        for _ in range(train.gradient_accumulation_steps):
            for group in next(packs):
                data[group]
    rank = train.process_index
    path = Path(settings.stages_of) / f"rank{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"ranks": train.world_size, "rank": rank, **meter.found}), encoding="utf-8")
    if train.world_size > 1:
        torch.distributed.barrier()


class Meter:
    """Takes processor time and memory of stages."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._start = own_megabytes()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what runs in the block."""
        begin, most, is_over = cpu_seconds(), [0.0], threading.Event()

        def watch() -> None:
            while not is_over.wait(0.01):
                most[0] = max(most[0], own_megabytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:  # a stage that fails ends the program
            is_over.set()
            watcher.join()
        most = max(most[0], own_megabytes()) - self._start
        self.found[name] = {"cpu_seconds": cpu_seconds() - begin, "megabytes": most}


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def own_megabytes() -> float:
    """Anonymous memory of this process, which it shares with nobody."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(run_program(main))
