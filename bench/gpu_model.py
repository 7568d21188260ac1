"""Random models, packs and steps for bench/gpu_proof.py, all of them made where they are used."""

import contextlib
import copy
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvl_mpo.families.shapes import read_shape
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.objective import mpo_loss
from internvl_mpo.packing import Group, Pack, pack_groups
from internvl_mpo.training.speed import checkpoint_parts
from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel

QUESTION, ANSWER = 50, 250  # tokens, as in the presets of step_speed.py
IMAGE_TOKEN = 7  # of a random model every word may mean a picture


@dataclass(frozen=True)
class Machine:
    """Where and how large.

    Attributes:
        device: cuda or cpu.
        size: full or tiny.
    """

    device: str
    size: str

    def config(self, size: str) -> InternVLChatConfig:
        """Return an official shape ("8b"), or one of the same kind with two narrow layers and small tiles."""
        config = read_shape(size)
        config.image_token_id = IMAGE_TOKEN
        if self.size == "tiny":
            small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
            for part in (config.vision_config, config.llm_config):
                for name, value in small.items():
                    setattr(part, name, value)
            config.llm_config.num_key_value_heads, config.llm_config.vocab_size = 2, 1000
            if getattr(config.llm_config, "layer_types", None):
                config.llm_config.layer_types = ["full_attention"] * 2
            config.force_image_size = config.vision_config.image_size = 112
        return config

    def model(
        self, size: str, dtype: torch.dtype = torch.bfloat16, layers: tuple[int, int] | None = None
    ) -> InternVLChatModel:
        """Return a random model on the device, in training mode; `layers` of vision tower and language model."""
        config = self.config(size)
        if layers is not None:
            config.vision_config.num_hidden_layers, config.llm_config.num_hidden_layers = layers
            if getattr(config.llm_config, "layer_types", None):
                config.llm_config.layer_types = ["full_attention"] * layers[1]
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with torch.device(self.device):
                return InternVLChatModel(config).train()
        finally:
            torch.set_default_dtype(before)

    def pack(self, model: nn.Module, tiles: int, pairs: int = 1) -> Pack:
        """Return pairs about a picture of `tiles` tiles each, on the device."""
        config = model.config
        side, words = config.force_image_size, config.llm_config.vocab_size
        tokens = tiles * int((side // config.vision_config.patch_size) ** 2 * config.downsample_ratio**2)
        rng = random.Random(tiles)

        def draw(count: int) -> list[int]:
            return [rng.randrange(IMAGE_TOKEN + 1, words) for _ in range(count)]

        answer = ANSWER if self.size == "full" else ANSWER // 10
        groups = []
        for number in range(pairs):
            pixels = torch.randn(tiles, 3, side, side, generator=torch.Generator().manual_seed(number))
            prompt = [IMAGE_TOKEN] * tokens + draw(QUESTION)
            groups.append(Group(prompt, [draw(answer), draw(answer)], [(0, 1)], [str(number)], pixels))
        return pack_groups(groups).to(self.device)

    def wait(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self, work: Callable[[], Any]) -> float | None:
        """Return the most memory the device's tensors held during `work`, in GiB; None on a CPU."""
        if self.device != "cuda":
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30


@dataclass
class Trainer:
    """A model, its optimizer, and one step after the other on the same pack.

    Attributes:
        machine: where it is.
        policy: trained.
        reference: scores each step anew; None where its log-probs are cached.
        cached: those log-probs by pack.
    """

    machine: Machine
    policy: nn.Module
    reference: nn.Module | None = None
    cached: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attach_scoring(self.policy)
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=self.machine.device == "cuda")

    def live(self) -> None:
        """Score the reference in every step from now on."""
        base = copy.deepcopy(self.policy)
        self.reference = attach_scoring(base).eval().requires_grad_(False)

    def step(self, pack: Pack) -> float:
        """Take one training step and return its loss."""
        with torch.no_grad():
            if self.reference is not None:
                reference = pair_logps(self.reference, pack)
            elif id(pack) not in self.cached:
                reference = self.cached[id(pack)] = pair_logps(self.policy, pack)
            else:
                reference = self.cached[id(pack)]
        chosen, rejected = pair_logps(self.policy, pack)
        loss = mpo_loss(chosen, rejected, *reference, pack.chosen_lengths_P, beta=0.1, weights=(0.8, 0.2, 1.0)).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self, pack: Pack, warmup: int = 2, steps: int = 5) -> float:
        """Return the median seconds of a step."""
        times = []
        for number in range(warmup + steps):
            self.machine.wait()
            begin = time.perf_counter()
            self.step(pack)
            self.machine.wait()
            if number >= warmup:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


@contextlib.contextmanager
def checkpointing(model: nn.Module, *, vision: bool, language: bool) -> Iterator[None]:
    """Recompute the activations of towers inside the block."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    checkpoint_parts(base, vision=vision, language=language)
    try:
        yield
    finally:
        for module in base.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False


def save_folder(machine: Machine, size: str, folder: Path) -> Path:
    """Write a random model with a tokenizer of whole words, so that engines and programs can load it."""
    from step_world import build_tokenizer

    from internvl_mpo.publish import write_model_folder
    from modeling_internvl_mpo import InternVLChatProcessor

    model = machine.model(size)
    tokenizer = build_tokenizer(model.config.llm_config.vocab_size)
    model.config.template = "Hermes-2"
    processor = InternVLChatProcessor.from_config(model.config, tokenizer)
    return write_model_folder(model, processor, folder)
