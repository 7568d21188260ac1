"""Where the processor time of a full-size step on a CPU goes: vision tower, language model, the rest.

    python bench/step_profile.py                    adapters on the language model
    python bench/step_profile.py --way full         all weights are trained

Random weights of InternVL2-1B's real shape, bfloat16, activations recomputed, one pack of two pairs with 13 tiles each.
The step is run with one layer in each tower, then with a second one in either; what that adds, times the 24 layers of
each tower, is the table. So it takes two minutes instead of ten. One thread, processor seconds; arithmetic is counted
while it happens, so it includes what is recomputed.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout without installation
os.environ.setdefault("OMP_NUM_THREADS", "1")

from internvl_mpo.errors import run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402


@dataclass
class Settings:
    """Settings of the profile."""

    way: Literal["lora", "full"] = setting("lora", help="what is trained: adapters of rank 16, or all weights")
    tiles: int = setting(13, help="tiles of each of the two pictures")
    size: Literal["full", "tiny"] = setting("full", help="shapes: full, or tiny to test the program")


class Cost(NamedTuple):
    """CPU seconds and TFLOP."""

    seconds: float
    tflop: float

    def minus(self, other: "Cost") -> "Cost":
        """What the other does not cost."""
        return Cost(self.seconds - other.seconds, self.tflop - other.tflop)

    def times(self, count: int) -> "Cost":
        """As often."""
        return Cost(self.seconds * count, self.tflop * count)


def main(argv: list[str]) -> int:
    """Measure and print the table."""
    settings = parse_settings(Settings, argv, program="bench/step_profile.py", about=__doc__, config=False)
    import torch
    from gpu_model import Machine

    torch.set_num_threads(1)
    machine = Machine("cpu", settings.size)
    config = machine.config("1b")
    step_costs(Machine("cpu", "tiny"), settings, 1, 1)  # what is done once in a process is not of interest
    layers = config.vision_config.num_hidden_layers, config.llm_config.num_hidden_layers
    one, vision, language = (step_costs(machine, settings, *counts) for counts in ((1, 1), (2, 1), (1, 2)))
    print(f"{'':<34} {'CPU s':>8} {'TFLOP':>8} {'GFLOP/s':>8}")
    for phase in one:
        a_vision, a_language = vision[phase].minus(one[phase]), language[phase].minus(one[phase])
        show(f"{phase}: vision tower, {layers[0]} layers", a_vision.times(layers[0]))
        show(f"{phase}: language model, {layers[1]} layers", a_language.times(layers[1]))
        show(f"{phase}: patches, projector, head", one[phase].minus(a_vision).minus(a_language))
    return 0


def show(name: str, cost: Cost) -> None:
    """Print a line of the table."""
    print(f"{name:<34} {cost.seconds:>8.1f} {cost.tflop:>8.2f} {1000 * cost.tflop / max(cost.seconds, 1e-9):>8.0f}")


def step_costs(machine: "Machine", settings: Settings, vision: int, language: int) -> dict[str, Cost]:  # noqa: F821
    """Return what the reference pass, the forward and the backward pass cost with so many layers in each tower."""
    import torch

    from internvl_mpo.logps import attach_scoring, response_logps
    from internvl_mpo.training.policy import add_adapters
    from internvl_mpo.training.speed import checkpoint_parts, no_input_gradients

    model = machine.model("1b", layers=(vision, language))
    attach_scoring(model)
    checkpoint_parts(model, vision=True, language=True)
    policy = add_adapters(model, rank=16, base="none") if settings.way == "lora" else model
    no_input_gradients(policy)
    pack = machine.pack(model, settings.tiles, pairs=2)
    found: list[torch.Tensor] = []

    @torch.no_grad()
    def reference() -> None:
        response_logps(policy.eval(), pack)

    def forward() -> None:
        found.append(response_logps(policy.train(), pack))

    phases = {"reference": reference, "forward": forward, "backward": lambda: found.pop().sum().backward()}
    return {name: cost_of(work) for name, work in phases.items()}


def cost_of(work: Callable[[], None]) -> Cost:
    """Return what some work costs."""
    from instruments import count_flop

    seconds: list[float] = []

    def timed() -> float:
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
        return 0.0

    flop = count_flop(timed)
    return Cost(seconds[0], flop / 1e12)


if __name__ == "__main__":
    sys.exit(run_program(main))
