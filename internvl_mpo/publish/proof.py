"""Proof that a model folder works for a stranger: a clean process loads it, and says what the source says."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = "Describe the picture."
# Largest difference of two logits over the largest logit, by the type of the weights.
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}
_LOADER = Path(__file__).with_name("clean_load.py")


def prove_model(
    folder: Path, source: Path, *, base: Path | None = None, is_adapter: bool = False, device: str = "cpu"
) -> str:
    """Load `folder` in a clean process, ask it about a picture, and compare with `source` loaded here.

    The process has an empty module cache, no network, no PYTHONPATH, and cannot import this project.

    Args:
        folder: what is to be published.
        source: what it was made of: a model folder, or an adapter if `base` is given.
        base: model folder that an adapter belongs to.
        is_adapter: whether `folder` itself holds an adapter.
        device: of the comparison.

    Returns:
        A sentence with the figures.

    Raises:
        BadInputError: it does not load, reads the prompt differently, computes something else, or generates nothing.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as temporary:
        picture, result = Path(temporary) / "picture.png", Path(temporary) / "answer.safetensors"
        _draw(picture)
        words = [str(folder.resolve()), str(base.resolve()) if is_adapter else "-", str(picture), QUESTION, device]
        ran = subprocess.run(
            [sys.executable, "-I", str(_LOADER), *words, str(result)],
            cwd=temporary,
            env=clean_environment(Path(temporary)),
            capture_output=True,
            text=True,
        )
        if ran.returncode != 0:
            raise BadInputError(f"{folder} does not load in a clean process ({last_words(ran)}); it is not published")
        found = load_file(result)
        expected = _ask_here(source, base, picture, device)
    return compare(found, expected, folder, source)


def compare(found: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"], folder: Path, source: Path) -> str:
    """Say how far two answers to the same question are apart.

    Args:
        found: `input_ids` (1, L), `logits` (1, L, V) and `generated` (N,) of the clean process.
        expected: `input_ids` and `logits` of the source.
        folder: what is to be published, for messages.
        source: what it was made of, for messages.

    Raises:
        BadInputError: too far.
    """
    if found["input_ids"].tolist() != expected["input_ids"].tolist():
        raise BadInputError(f"{folder} reads a prompt differently from {source}: other token ids; it is not published")
    worst = (found["logits"].float() - expected["logits"].float()).abs().max().item()
    largest = expected["logits"].float().abs().max().item()
    kind = str(found["logits"].dtype).removeprefix("torch.")
    if not worst <= TOLERANCE[kind] * largest:  # NaN must not pass
        raise BadInputError(
            f"{folder} computes logits that differ from those of {source} by {worst:.2g} (largest logit {largest:.2g}, "
            f"{kind}); it is not published"
        )
    if not len(found["generated"]):
        raise BadInputError(f"{folder} generates nothing in a clean process; it is not published")
    return (
        f"loaded in a clean process: {found['input_ids'].shape[1]} prompt tokens, logits within {worst:.1e} of the "
        f"source's ({kind}), {len(found['generated'])} tokens generated"
    )


def last_words(ran: "subprocess.CompletedProcess[str]") -> str:
    """Return why a process failed: the last line it wrote, or its exit code."""
    return (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1][:300]


def clean_environment(home: Path, *, online: bool = False) -> dict[str, str]:
    """Variables of a process that has nothing of this project: own cache, no extra import paths.

    Args:
        home: folder for its caches.
        online: let it use the Hub, the one this process uses and with the same token.
    """
    from huggingface_hub import constants, get_token

    ours = ("PYTHON", "HF_", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    kept |= {"HF_HOME": str(home / "hf_home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not online:
        return {**kept, "HF_HUB_OFFLINE": "1"}
    kept |= {"HF_ENDPOINT": constants.ENDPOINT, "HF_HUB_DISABLE_XET": str(int(constants.HF_HUB_DISABLE_XET))}
    return {**kept, **({"HF_TOKEN": token} if (token := get_token()) else {})}


def _draw(path: Path) -> None:
    """A colour gradient twice as wide as high, so that it is cut into tiles."""
    from PIL import Image

    picture = Image.linear_gradient("L").resize((512, 256))
    Image.merge("RGB", (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), picture)).save(path)


def _ask_here(source: Path, base: Path | None, picture: Path, device: str) -> dict[str, Any]:
    """Prompt ids and logits of the source, loaded as this project loads it."""
    import torch

    model_folder = str(base or source)
    family = family_of_source(model_folder)
    model = family.load_model(model_folder, dtype="auto").to(device).eval()
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, source).eval()
    processor = family.load_processor(model_folder)
    content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device, model.dtype)
    with torch.inference_mode():
        return {"input_ids": inputs["input_ids"], "logits": model(**inputs).logits.cpu()}
