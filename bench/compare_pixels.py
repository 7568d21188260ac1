"""How far are the pixels made without torchvision from those of each family's own fast image processor?

    pip install torchvision==0.28.0                       # in an environment of its own; nothing else here needs it
    python bench/compare_pixels.py

Every family has two image processors in transformers, one on PIL, which is used here, and a fast one on torchvision.
Both get the settings of a published checkpoint and the same pictures. Differences are given in steps of 1/255 before
the normalisation, so that families compare; 0 means equal to the bit.
"""

import sys
from importlib import import_module
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

SIZES = ((640, 480), (333, 517), (1024, 300), (61, 97), (448, 448))  # width, height
_CLIP = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
_NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_QWEN3 = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_INTERNVL = {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1, "max_patches": 12}
# family -> (module, class, settings of a published checkpoint)
PROCESSORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "internvl": ("got_ocr2", "GotOcr2ImageProcessor", _INTERNVL),
    "qwen2_vl, qwen2_5_vl": ("qwen2_vl", "Qwen2VLImageProcessor", {"min_pixels": 3136, "max_pixels": 12845056}),
    "qwen3_vl": ("qwen2_vl", "Qwen2VLImageProcessor", {"min_pixels": 65536, "max_pixels": 16777216, **_QWEN3}),
    "llava": ("clip", "CLIPImageProcessor", _CLIP),
    "llava_next": ("llava_next", "LlavaNextImageProcessor", {**_CLIP, "image_grid_pinpoints": _NEXT}),
    "llava_onevision": (
        *("llava_onevision", "LlavaOnevisionImageProcessor"),
        {"size": {"height": 384, "width": 384}, "image_grid_pinpoints": _ONEVISION},
    ),
    "idefics3": (
        *("idefics3", "Idefics3ImageProcessor"),
        {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}},
    ),
    "smolvlm": (
        *("smolvlm", "SmolVLMImageProcessor"),
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
    ),
}


def picture(width: int, height: int) -> Image.Image:
    """Return waves of every length, edges and a little noise, which resampling filters treat differently."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x * y / (900.0 * k)) * 90 + 128 for k in (1, 2, 5)], axis=-1)
    waves[height // 3 : height // 2, width // 4 : width // 2] = (250, 5, 120)
    return Image.fromarray((waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))


def pixels(processor: Any, image: Image.Image) -> torch.Tensor:
    """Return pixel values, not normalised, in steps of 1/255."""
    values = processor(images=[[image]], return_tensors="pt")["pixel_values"].double()
    if values.ndim == 2:  # Qwen: flat patches, whose channels come first
        values = values.view(len(values), 3, -1).transpose(0, 1)
    else:
        values = values.flatten(0, -4).transpose(0, 1)
    scales = (processor.image_mean, processor.image_std)
    mean, std = (torch.tensor(numbers).view(3, *[1] * (values.ndim - 1)) for numbers in scales)
    return (values * std + mean) * 255


def main() -> int:
    """Print a table, one row a family."""
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print("| family | pictures | same shape | mean difference | largest | beyond 2 steps |\n|---|---|---|---|---|---|")
    for family, (module, name, settings) in PROCESSORS.items():
        package = f"transformers.models.{module}.image_processing"
        fast = getattr(import_module(f"{package}_{module}"), name)(**settings)
        slow = getattr(import_module(f"{package}_pil_{module}"), f"{name}Pil")(**settings)
        same_shape, differences = 0, []
        for size in SIZES:
            ours, theirs = (pixels(processor, picture(*size)) for processor in (slow, fast))
            same_shape += ours.shape == theirs.shape
            if ours.shape == theirs.shape:
                differences.append((ours - theirs).abs().flatten())
        steps = torch.cat(differences)
        far = 100 * (steps > 2).double().mean()
        print(
            f"| {family} | {len(SIZES)} | {same_shape} | {steps.mean():.4f} | {steps.max():.2f} | {far:.3f} % |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
