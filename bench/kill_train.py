"""Kill the training program again and again; the losses must be those of a run that nobody touched.

    python bench/kill_train.py --kills 20 --json kill_train.json
    python bench/kill_train.py --kills 20 --signal SIGTERM --ways one,two
    python bench/kill_train.py --kills 10 --ways two,two_before,two_parquet

For each way to train (one process, two ranks, two ranks with DeepSpeed; the reference ahead of the steps or before
all of them; pairs from JSONL or from the row groups of Parquet shards) an unbroken run of a tiny model comes first.
Then the same command is started, killed at a random moment, and started again, until all kills are spent; then it
runs to its end. A moment is a step of the run plus a random delay, so that kills fall into training, into saving and,
the first one, into the time before step one. On two ranks the victim is one rank or all processes. After every start
the losses logged so far are compared with the unbroken run, bit for bit. Every step writes a checkpoint.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout without installation

from internvl_mpo.errors import EXIT_STOPPED, BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting, show_settings  # noqa: E402

# name -> (ranks, DeepSpeed file or None, other arguments)
BEFORE, PARQUET = ("--reference_pass", "before"), ("--data", "parquet")
WAYS: dict[str, tuple[int, Path | None, tuple[str, ...]]] = {
    "one": (1, None, ()),
    "one_before": (1, None, BEFORE),
    "one_parquet": (1, None, PARQUET),
    "two": (2, None, ()),
    "two_before": (2, None, BEFORE),
    "two_parquet": (2, None, PARQUET),
    "two_zero2": (2, ROOT / "configs/deepspeed/zero2.json", ()),
    "two_zero3": (2, ROOT / "configs/deepspeed/zero3.json", ()),
    "two_fsdp": (2, None, ("--fsdp", "true")),
}


@dataclass
class Settings:
    """Settings of the benchmark."""

    kills: int = setting(20, help="kills over all ways together")
    ways: list[str] = setting(["one", "two", "two_zero2"], help=f"how to train: {', '.join(WAYS)}")
    steps: int = setting(40, help="steps of a run")
    seed: int = setting(0, help="decides moments and victims")
    signal: Literal["SIGKILL", "SIGTERM"] = setting("SIGKILL", help="SIGKILL, or SIGTERM, after which no step is lost")
    json: str | None = setting(None, help="file for the figures")

    def __post_init__(self) -> None:
        for way in self.ways:
            if way not in WAYS:
                raise BadInputError(f"ways has '{way}', expected some of {', '.join(WAYS)}")
        if self.kills < len(self.ways):
            raise BadInputError(f"kills is {self.kills}, expected at least one for each of {len(self.ways)} ways")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, program="bench/kill_train.py", about=__doc__, config=False)
    print(show_settings(settings, "kill_train: settings"), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = tiny_world(Path(folder))
        for number, way in enumerate(settings.ways):
            kills = settings.kills // len(settings.ways) + (number < settings.kills % len(settings.ways))
            rng = random.Random(f"{settings.seed} {way}")
            rows += torture(way, kills, settings.steps, rng, arguments, Path(folder) / way, settings.signal)
    print(table(rows))
    same = sum(row["same"] for row in rows)
    print(f"{same} of {len(rows)} times the losses were bit-identical to the unbroken run")
    lost = sum(row.get("lost", 0) for row in rows)
    if settings.signal == "SIGTERM":
        print(f"{lost} steps were lost")
    if settings.json:
        Path(settings.json).write_text(json.dumps({"kills": rows, "same": same}, indent=2) + "\n", encoding="utf-8")
    return 0 if same == len(rows) and not lost else 1


def tiny_world(folder: Path) -> list[str]:
    """Write a random model and pairs, text-only ones among them; return arguments of `train_mpo.py`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_world import make_model_folder, make_pictures, make_training_pairs

    make_model_folder(folder / "start")
    pairs = make_training_pairs(folder, 120)
    make_pictures(folder, 40)
    settings = {
        "model": folder / "start",
        "data": pairs,
        "pairs_per_step": 4,
        "pairs_per_group": 2,
        "max_length": 900,
        "max_tokens_per_pack": 1500,
        "learning_rate": 1e-3,
        "num_train_epochs": 1000,
        "reference_ahead_steps": 2,
        "use_cpu": "true",
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def write_shards(pairs: Path, folder: Path) -> Path:
    """Write the pairs of a JSONL file as Parquet shards of several row groups, pictures inside; return their folder."""
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    table = [
        {
            "images": [{"bytes": (pairs.parent / row["image"]).read_bytes(), "path": row["image"]}]
            if row.get("image")
            else [],
            "prompt": row["question"],
            "chosen": row["chosen"],
            "rejected": row["rejected"],
        }
        for row in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for number, half in enumerate((table[::2], table[1::2])):
        write_table(pyarrow.Table.from_pylist(half), folder / f"{number}.parquet", row_group_size=20)
    return folder


def torture(
    way: str, kills: int, steps: int, rng: random.Random, arguments: list[str], folder: Path, name: str = "SIGKILL"
) -> list[dict[str, Any]]:
    """Kill one run several times and return a row for each kill.

    Args:
        way: a key of `WAYS`.
        kills: how often.
        steps: length of the run.
        rng: decides moments and victims.
        arguments: of the training program.
        folder: where the runs go.
        name: of the signal.
    """
    num_ranks, deepspeed, more = WAYS[way]
    if more == PARQUET:
        more = ("--data", str(write_shards(Path(arguments[arguments.index("--data") + 1]), folder / "parquet")))
    arguments = [*arguments, *more, "--max_steps", str(steps), "--save_steps", "1" if name == "SIGKILL" else "100000"]
    if deepspeed:
        arguments += ["--deepspeed", str(small_buckets(deepspeed, folder))]
    whole = folder / "unbroken"
    if start(num_ranks, [*arguments, "--output_dir", str(whole)], folder / "unbroken.log").wait():
        raise BadInputError(f"the unbroken run failed:\n{tail(folder / 'unbroken.log')}")
    expected = losses(whole)
    output, log = folder / "killed", folder / "killed.log"
    rows: list[dict[str, Any]] = []
    for turn in range(kills + 1):
        process = start(num_ranks, [*arguments, "--output_dir", str(output)], log)
        if turn < kills:
            done = max(losses(output), default=0)
            gap = 2 * (steps - done) // (kills - turn + 1)
            # the first kill comes before the first step: reading, reference log-probs, start of the ranks
            moment = min(done + rng.randint(1, max(gap, 1)), steps - 2) if turn else 0
            victim, step = kill(process, output, moment, num_ranks, rng, name)
        elif process.wait():
            raise BadInputError(f"the run did not go on after a kill:\n{tail(log)}")
        if rows:  # what this start did tells whether the kill before it did harm
            found = losses(output)
            rows[-1]["went_on_from"] = went_on_from(log)
            rows[-1]["same"] = bool(found) and all(expected[s] == loss for s, loss in found.items())
            if turn == kills:
                rows[-1]["same"] &= found == expected
            if name == "SIGTERM" and rows[-1]["went_on_from"] != "killed sooner":
                went_on = rows[-1]["went_on_from"].removeprefix("checkpoint-")
                rows[-1]["lost"] = rows[-1]["at_step"] - (int(went_on) if went_on.isdigit() else 0)
            verdict = "identical" if rows[-1]["same"] else "DIFFER"
            print(f"{way}: went on from {rows[-1]['went_on_from']}, losses {verdict}", flush=True)
        if turn < kills:
            rows.append({"way": way, "ranks": num_ranks, "victim": victim, "at_step": step})
            print(f"{way}: kill {turn + 1} of {kills}, {victim} after step {step}", flush=True)
    return rows


def small_buckets(path: Path, folder: Path) -> Path:
    """Copy a DeepSpeed file with small buckets: those for real models are gigabytes, allocated at every start."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        if isinstance(config["zero_optimization"].get(name), (int, float)):
            config["zero_optimization"][name] = 1_000_000
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / path.name
    copy.write_text(json.dumps(config), encoding="utf-8")
    return copy


def start(num_ranks: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """Start the training program in a session of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "internvl_mpo.launch", "--standalone", "--nproc_per_node", str(num_ranks)]
    command = [sys.executable, *(launcher if num_ranks > 1 else []), str(ROOT / "train_mpo.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with open(log, "w", encoding="utf-8") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)


def kill(
    process: subprocess.Popen, output: Path, moment: int, num_ranks: int, rng: random.Random, name: str
) -> tuple[str, int]:
    """Wait for a step, then a little longer, and kill; return who was killed and the last step that was logged."""
    import psutil

    launched = time.monotonic()
    pause = rng.uniform(0, 0.3) if moment else rng.uniform(0, 8)
    while process.poll() is None and max(losses(output), default=0) < moment:
        if time.monotonic() - launched > 600:
            raise BadInputError(f"no step {moment} after ten minutes")
        time.sleep(0.01)
    time.sleep(pause)
    if process.poll() is not None:
        raise BadInputError(f"the run ended before it could be killed after step {moment}; raise steps")
    tree = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in tree if "train_mpo.py" in " ".join(child.cmdline())]
    if name == "SIGTERM":
        victim = "all" if len(ranks) < 2 or rng.random() < 0.5 else "a rank"
        os.kill(process.pid if victim == "all" else max(rank.pid for rank in ranks), signal.SIGTERM)
        # before the program listens the signal ends it as any other; there is nothing to lose yet
        if process.wait() != EXIT_STOPPED and losses(output):
            raise BadInputError(f"exit code {process.returncode} after SIGTERM, expected {EXIT_STOPPED}")
    elif num_ranks > 1 and len(ranks) == num_ranks and rng.random() < 0.5:
        number = rng.randrange(num_ranks)
        victim = f"rank {number}"
        sorted(ranks, key=lambda rank: rank.pid)[number].kill()
        process.wait()  # the launcher takes the other ranks down
    else:
        victim = "all"
        for pid in (process.pid, *(child.pid for child in tree)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    psutil.wait_procs(tree, timeout=60)
    return victim, max(losses(output), default=0)


def losses(output: Path) -> dict[int, float]:
    """Loss of every step that was logged; the last line may be half-written."""
    path = output / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def went_on_from(log: Path) -> str:
    """What the program said it went on from, if it lived long enough to say it."""
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("going on from "):
            return line.rsplit("/", 1)[-1]
        if line == "starting at step 0":
            return "the start"
    return "killed sooner"


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])


def table(rows: list[dict[str, Any]]) -> str:
    """A printable table of the kills."""
    lines = [f"{'way':<10} {'victim':<7} {'after step':>10}  {'went on from':<14} losses"]
    for row in rows:
        verdict = "identical" if row["same"] else "DIFFER"
        lines.append(f"{row['way']:<10} {row['victim']:<7} {row['at_step']:>10}  {row['went_on_from']:<14} {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_program(main))
