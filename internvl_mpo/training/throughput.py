"""How much arithmetic a pack is, and what share of the device's peak that makes (MFU).

Counted is what the method needs, in floating-point operations (a multiply-add is two), as in the PaLM paper's MFU:

- a linear layer: 2 per weight and token forward, 2 for the gradient of its input, 2 for that of its weight if trained
- attention: 4 per head dimension and visible (query, key) pair forward, twice that backward; a prompt that several
  responses share is seen by all of them and run once
- the last layer at tokens that predict a scored one, keys and values apart
- the head at scored tokens only; the vision tower per tile, backward only if something in it is trained

Not counted: activations computed again by checkpointing or by the chunked head, norms, softmax, the optimizer. So MFU
says how well the device is used for the task, and recomputation lowers it.
"""

import bisect
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from internvl_mpo.families.registry import family_of_model
from internvl_mpo.kernels.last_layer import TOKENWISE
from internvl_mpo.packing import Layout, Pack
from internvl_mpo.training.policy import num_elements

# Dense bfloat16 peak of one device in TFLOP/s, from the vendors' data sheets; the first that a device's name holds.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "GH200": 989,
    "H800": 989,
    "H20": 148,
    "B200": 2250,
    "B100": 1800,
    "GB200": 2500,
    "A100": 312,
    "A800": 312,
    "A10G": 70,
    "A10": 125,
    "A30": 165,
    "A40": 150,
    "A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "RTX 5090": 210,
    "MI300X": 1307,
    "MI250X": 383,
}


def peak_tflops(device_name: str) -> float | None:
    """Return the dense bfloat16 peak of a device in TFLOP/s, or None where it is not known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def device_peak(device: torch.device, setting: float | None = None) -> float | None:
    """Return FLOP/s of this process's device: as set, or from the table; None on a CPU and for unknown devices.

    Args:
        device: of this process.
        setting: TFLOP/s given by the user; wins over the table.
    """
    if setting is None and device.type == "cuda":
        setting = peak_tflops(torch.cuda.get_device_name(device))
    return None if setting is None else setting * 1e12


@dataclass(frozen=True)
class _Part:
    """Linear layers and attention of one tower."""

    num_weights: int  # of its linear layers
    num_trained: int  # those among them whose weights are trained
    attention_width: int  # heads * head dimension * layers

    def flop(self, tokens: int, visible: int, *, input_gradient: bool) -> float:
        """Forward and backward over some tokens of which `visible` (query, key) pairs meet in attention."""
        attention = 4.0 * self.attention_width * visible
        weights = 2.0 * tokens * (self.num_weights * (1 + input_gradient) + self.num_trained)
        return weights + attention * (3 if input_gradient else 1)


class FlopModel:
    """Arithmetic of a forward and backward pass of one model; see the top of this file."""

    def __init__(self, model: nn.Module):
        """Count layers; freezing and adapters must be done by then.

        Args:
            model: of any family, or a PEFT model around it.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.family, self.base = family_of_model(base), base
        decoder, tower = self.family.decoder(base), self.family.vision_tower(base)
        language = decoder.config
        head_width = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        width = language.num_attention_heads * head_width
        layers = {part: self._layers(part) for part in self.family.parts}
        visited = getattr(language, "num_experts_per_tok", 0)  # experts that a token runs through
        self.vision = _part(layers["vision tower"], self.family.tower_width(base))
        self.projector = _part(layers["projector"], 0)
        # Of the last layer, most runs for tokens that predict a scored one only, see `last_layer`.
        last = [part for name, part in decoder.layers[-1].named_modules() if name.rpartition(".")[2] in TOKENWISE]
        self.scored = _part([layer for part in last for layer in part.modules()], width, visited)
        everywhere = _part(decoder.modules(), width * (language.num_hidden_layers - 1), visited)
        self.language = _Part(
            everywhere.num_weights - self.scored.num_weights,
            everywhere.num_trained - self.scored.num_trained,
            everywhere.attention_width,
        )
        self.head = _part([base.get_output_embeddings()], 0)
        # patches do not overlap: a linear layer on pixels
        self.patch = next(layer for layer in tower.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d)))
        self.patch_pixels = self.patch.in_channels * math.prod(self.patch.kernel_size)
        size = self.patch_pixels * self.patch.out_channels
        self.pixels = _Part(size, size * _weight_is_trained(self.patch), 0)
        self.vision_trained = _any_trained(layers["vision tower"])
        self.before_head_trained = self.vision_trained or _any_trained([*layers["projector"], *decoder.modules()])

    def _layers(self, part: str) -> list[nn.Module]:
        """Modules with weights of their own in a part of the model."""
        parameters = (name for name, _ in self.base.named_parameters() if self.family.part_of(name) == part)
        return [self.base.get_submodule(name) for name in sorted({name.rpartition(".")[0] for name in parameters})]

    def of(self, pack: Pack) -> float:
        """Return FLOP of training on a pack."""
        runs = [] if pack.pixel_values is None else self.family.tower_runs(self.base, pack)
        patches = 0 if pack.pixel_values is None else pack.pixel_values.numel() // self.patch_pixels
        seen = sum(tokens * visible for tokens, visible in runs)
        image_tokens = int((pack.input_ids == self.base.config.image_token_id).sum()) if runs else 0
        return (
            self.pixels.flop(patches, 0, input_gradient=False)
            + self.vision.flop(sum(tokens for tokens, _ in runs), round(seen), input_gradient=self.vision_trained)
            + self.projector.flop(image_tokens, 0, input_gradient=self.vision_trained)
            + self.language.flop(pack.num_tokens, num_visible(pack.layout), input_gradient=self.before_head_trained)
            + self.scored.flop(
                len(pack.layout.scored_index_U),
                num_visible(pack.layout, scored_only=True),
                input_gradient=self.before_head_trained,
            )
            + self.head.flop(len(pack.target_ids_S), 0, input_gradient=self.before_head_trained)
        )


def num_visible(layout: Layout, *, scored_only: bool = False) -> int:
    """Return how many (query, key) pairs of a pack attend to each other; `scored_only` is for the last layer."""
    scored = layout.scored_index_U.tolist()
    total, path = 0, []  # tokens on the path to the end of each segment
    for segment in layout.segments:
        before = path[segment.parent] if segment.parent >= 0 else 0
        path.append(before + segment.stop - segment.start)
        asking = segment.stop - segment.start  # the last tokens of a segment predict
        if scored_only:
            asking = bisect.bisect_left(scored, segment.stop) - bisect.bisect_left(scored, segment.start)
        total += asking * path[-1] - asking * (asking - 1) // 2
    return total


def _part(modules: Iterable[nn.Module], attention_width: int, visited: int = 0) -> _Part:
    """Count the linear layers among modules; of experts the number that a token visits."""
    count = trained = 0
    for layer in dict.fromkeys(modules):
        if isinstance(layer, nn.Linear):  # sizes by name: ZeRO-3 and 4 bits change the shape of the weight
            size = layer.in_features * layer.out_features
        elif type(layer).__name__.endswith("Experts"):
            weights = sum(num_elements(parameter) for parameter in layer.parameters(recurse=False))
            size = weights * visited // layer.num_experts
        else:
            continue
        count += size
        trained += size * _weight_is_trained(layer)
    return _Part(count, trained, attention_width)


def _any_trained(modules: Iterable[nn.Module]) -> bool:
    return any(parameter.requires_grad for module in modules for parameter in module.parameters(recurse=False))


def _weight_is_trained(layer: nn.Module) -> bool:
    return next(layer.parameters(recurse=False)).requires_grad  # naming layer.weight would make ZeRO-3 gather it


def memory_in_use(device: torch.device) -> dict[str, float]:
    """Return GiB: the most this process had on its device so far (0 on a CPU), and what it holds of the host now."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"memory/device_peak_gib": peak / 2**30, "memory/process_gib": resident_bytes() / 2**30}


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        import psutil

        return psutil.Process().memory_info().rss


def speed(num_pairs: float, num_tokens: float, flop: float, seconds: float, peak: float | None) -> dict[str, Any]:
    """Return pairs, tokens and model TFLOP a second of all ranks, and MFU where the peak of all devices is known."""
    numbers = {
        "pairs_per_second": num_pairs / seconds,
        "tokens_per_second": num_tokens / seconds,
        "model_tflops": flop / seconds / 1e12,
    }
    return numbers | ({} if peak is None else {"mfu": flop / seconds / peak})
