"""How fast an MMPR release becomes Parquet, and in how much memory: synthetic rows over small pictures.

    python bench/convert_speed.py --num_rows 1000000 --num_pictures 100000 --workers 2 --json convert_speed.json

Reports rows per second of wall time and of CPU time for the whole conversion (both passes, every picture decoded once,
card and statistics) and the peak of the memory of all its processes together. With `--kill_after SECONDS` the program
is killed once and started again; the hashes of the shards are compared with those of an unbroken run.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from PIL import Image
from tqdm import tqdm

from internvl_mpo.errors import run_program
from internvl_mpo.settings import parse_settings, setting, show_settings

PROGRAM = Path(__file__).resolve().parents[1] / "dataset_scripts" / "convert_mmpr.py"
WORDS = ("the", "picture", "shows", "a", "chart", "with", "three", "bars", "of", "which", "two", "are", "red", "so")


@dataclass
class Settings:
    """Settings of the benchmark."""

    num_rows: int = setting(1_000_000, help="synthetic pairs")
    num_pictures: int = setting(100_000, help="pictures of 64 x 48 pixels; neighbouring rows share one")
    num_subsets: int = setting(10, help="entries of meta.json")
    words: int = setting(80, help="mean words of a response")
    workers: int = setting(2, help="as in convert_mmpr.py")
    shard_mb: int = setting(100, help="as in convert_mmpr.py")
    kill_after: float = setting(0.0, help="seconds after which the program is killed once; 0 is never")
    folder: str | None = setting(None, help="where the files go meanwhile; empty is the system's")
    json: str | None = setting(None, help="file for the figures")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, program="bench/convert_speed.py", about=__doc__, config=False)
    print(show_settings(settings, "Speed of convert_mmpr.py"))
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        raw, output = Path(folder) / "raw", Path(folder) / "parquet"
        num_bytes = write_release(raw, settings)
        command = [sys.executable, str(PROGRAM), str(raw), "--output", str(output)]
        command += ["--workers", str(settings.workers), "--shard_mb", str(settings.shard_mb)]
        wall, cpu, peak = measured(command)
        figures = {
            "num_rows": settings.num_rows,
            "num_pictures": settings.num_pictures,
            "input_mb": round(num_bytes / 1e6),
            "output_mb": round(sum(path.stat().st_size for path in output.rglob("*.parquet")) / 1e6),
            "num_shards": len(list(output.glob("data/*/*.parquet"))),
            "workers": settings.workers,
            "wall_s": round(wall, 1),
            "cpu_s": round(cpu, 1),
            "rows_per_s": round(settings.num_rows / wall),
            "rows_per_cpu_s": round(settings.num_rows / cpu),
            "peak_mb": round(peak / 2**20),
        }
        if settings.kill_after:
            whole = shard_hashes(output)
            shutil.rmtree(output)
            process = subprocess.Popen(command, start_new_session=True)
            time.sleep(settings.kill_after)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            figures["shards_before_kill"] = len(list(output.glob("data/*/*.parquet")))
            subprocess.run(command, check=True)
            figures["same_bytes_after_kill"] = shard_hashes(output) == whole
    print(json.dumps(figures))
    if settings.json:
        Path(settings.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def write_release(raw: Path, settings: Settings) -> int:
    """Write meta.json, annotations and image folders; return the bytes of the annotations and pictures."""
    rng = random.Random(0)
    meta, num_bytes = {}, 0
    (raw / "annotations").mkdir(parents=True)
    rows, pictures = settings.num_rows // settings.num_subsets, settings.num_pictures // settings.num_subsets
    for subset in tqdm(range(settings.num_subsets), desc="writing the release", unit="subset"):
        folder = raw / "images" / f"set{subset}"
        folder.mkdir(parents=True)
        for number in range(pictures):
            picture = Image.new("RGB", (64, 48), (number % 251, number // 251 % 241, subset * 20))
            picture.putpixel((number % 64, number // 64 % 48), (255, 255, 255))
            picture.save(folder / f"{number}.jpg", quality=85)
            num_bytes += (folder / f"{number}.jpg").stat().st_size
        name = f"set{subset}_pairs_vqa_correctness_rules"
        with open(raw / "annotations" / f"{name}.jsonl", "w", encoding="utf-8") as out:
            for number in range(rows):
                a, b = number % 97, number // 97
                chosen, rejected = (
                    " ".join(rng.choices(WORDS, k=max(4, int(rng.gauss(settings.words, settings.words / 4)))))
                    for _ in range(2)
                )
                row = {
                    "image": f"{number * pictures // rows}.jpg",
                    "question": f"<image>\nWhat is the sum of {a} and {b}? Think step by step, then answer.",
                    "chosen": f"{chosen}\n\nFinal answer: {a + b}",
                    "rejected": f"{rejected}\n\nFinal answer: {a + b + 1}",
                    "answer_gt": str(a + b),
                }
                out.write(json.dumps(row) + "\n")
            num_bytes += out.tell()
        meta[name] = {
            "root": f"MMPR/images/set{subset}",
            "annotation": f"/mnt/cluster/MMPR/annotations/{name}.jsonl",
            "repeat_time": 1,
            "length": rows,
            "data_augment": False,
        }
    (raw / "meta.json").write_text(json.dumps(meta, indent=2))
    return num_bytes


def measured(command: list[str]) -> tuple[float, float, int]:
    """Run a program; return wall seconds, CPU seconds and peak bytes, its child processes included."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    process = subprocess.Popen(command)
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            peak = max(peak, tree_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    if code:
        raise SystemExit(code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - start, cpu, peak


def tree_bytes(pid: int) -> int:
    """Return the private and shared memory of a process and its children, shared pages divided among them (Linux)."""
    total = 0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += 1024 * int(line.split()[1])
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(map(tree_bytes, map(int, (task / "children").read_text().split())))
    except OSError:  # it has just ended
        pass
    return total


def shard_hashes(folder: Path) -> dict[str, str]:
    """Return path -> SHA-256 of every Parquet file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.parquet"))
    }


if __name__ == "__main__":
    sys.exit(run_program(main))
