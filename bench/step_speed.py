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

import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from instruments import count_flop, cpu_peak_mib, cuda_peak_mib, own_process, peak_tflops, synchronize
from step_sides import build_side
from step_world import Settings, World

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import parse_settings, show_settings


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


if __name__ == "__main__":
    sys.exit(run_program(main))
