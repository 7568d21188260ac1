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
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from internvl_mpo.kernels.last_layer import TOKENWISE
from internvl_mpo.packing import Layout, Pack

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
            model: `InternVLChatModel`, or a PEFT model around it.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        vision, language = base.config.vision_config, base.config.llm_config
        head_width = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        self.vision = _part(base.vision_model, vision.hidden_size * vision.num_hidden_layers)
        self.projector = _part(base.mlp1, 0)
        # Of the last layer, most runs for tokens that predict a scored one only, see `last_layer`.
        decoder, width = base.language_model.model, language.num_attention_heads * head_width
        self.scored = _part(decoder.layers[-1], width, only=TOKENWISE)
        everywhere = _part(decoder, width * (language.num_hidden_layers - 1))
        self.language = _Part(
            everywhere.num_weights - self.scored.num_weights,
            everywhere.num_trained - self.scored.num_trained,
            everywhere.attention_width,
        )
        head = base.get_output_embeddings()
        self.head = _part(head, 0)
        patch = base.vision_model.embeddings.patch_embedding  # patches do not overlap: a linear layer on pixels
        size = patch.in_channels * patch.out_channels * patch.kernel_size[0] * patch.kernel_size[1]
        self.pixels = _Part(size, size * _weight_is_trained(patch), 0)
        self.patches = (base.config.force_image_size // vision.patch_size) ** 2
        self.image_tokens = base.config.num_image_token
        trained = lambda module: any(p.requires_grad for p in module.parameters())  # noqa: E731 - used twice below
        self.vision_trained = trained(base.vision_model)
        self.before_head_trained = any(map(trained, (base.vision_model, base.mlp1, base.language_model.model)))

    def of(self, pack: Pack) -> float:
        """Return FLOP of training on a pack."""
        num_tiles = 0 if pack.pixel_values is None else len(pack.pixel_values)
        tower_tokens = num_tiles * (self.patches + 1)
        return (
            self.pixels.flop(num_tiles * self.patches, 0, input_gradient=False)
            + self.vision.flop(tower_tokens, tower_tokens * (self.patches + 1), input_gradient=self.vision_trained)
            + self.projector.flop(num_tiles * self.image_tokens, 0, input_gradient=self.vision_trained)
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


def _part(module: nn.Module, attention_width: int, *, only: Sequence[str] = ()) -> _Part:
    """Count the linear layers in a module, or in its parts of the names in `only`."""
    roots = [part for name, part in module.named_modules() if not only or name.rpartition(".")[2] in only]
    count = trained = 0
    for layer in {layer: None for root in roots for layer in root.modules()}:
        if isinstance(layer, nn.Linear):  # sizes by name: ZeRO-3 and 4 bits change the shape of the weight
            count += layer.in_features * layer.out_features
            trained += layer.in_features * layer.out_features * _weight_is_trained(layer)
    return _Part(count, trained, attention_width)


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
