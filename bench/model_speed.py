"""Speed of our InternLM2 beside transformers' own Llama of the same shape and weights, interleaved in one run.

    python bench/model_speed.py --preset cpu --json outputs/model_speed.json
    python bench/model_speed.py --preset 2b --device cuda --dtype bfloat16

Both run the same prefill and the same decoding steps with a dynamic cache and sdpa; medians over alternating rounds
are compared. A ratio above 1 means that ours is faster.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.errors import run_program
from internvl_mpo.settings import parse_settings, setting, show_settings

# hidden, layers, heads, key-value heads, intermediate, vocabulary; 2b and 8b are the published shapes.
SHAPES = {
    "tiny": (128, 4, 4, 2, 344, 512),
    "cpu": (512, 6, 8, 4, 1376, 8000),
    "2b": (2048, 24, 16, 8, 8192, 92553),
    "8b": (4096, 32, 32, 8, 14336, 92553),
}


@dataclass
class Settings:
    """Settings of `model_speed.py`."""

    preset: Literal["tiny", "cpu", "2b", "8b"] = setting("cpu", help="shape of the language model")
    batch: int = setting(1, help="rows")
    prompt: int = setting(512, help="tokens of the prefill")
    steps: int = setting(32, help="decoding steps of a round")
    rounds: int = setting(9, help="rounds; the median counts")
    device: str = setting("cpu", help="torch device")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", help="of the weights")
    threads: int = setting(1, help="CPU threads")
    dynamic_rope: bool = setting(True, help="dynamic NTK rope, as in the published files")
    json: str | None = setting(None, help="file to write the figures to")


def build(settings: Settings) -> dict[str, Any]:
    """Return both models with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from internvl_mpo.convert import Shapes, to_native
    from modeling_internvl_mpo import InternLM2Config, InternLM2ForCausalLM

    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "vocab_size"),
    )
    shape = dict(zip(names, SHAPES[settings.preset], strict=True)) | {"max_position_embeddings": 32768}
    scaling = {"type": "dynamic", "factor": 2.0} if settings.dynamic_rope else None
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if settings.dynamic_rope:
        rope |= {"rope_type": "dynamic", "factor": 2.0}
    dtype = getattr(torch, settings.dtype)
    ours_config = InternLM2Config(**shape, bias=False, rope_theta=1e6, rope_scaling=scaling)
    torch.manual_seed(0)
    with torch.device(settings.device):
        ours = InternLM2ForCausalLM(ours_config).to(dtype).eval()
        llama = (
            LlamaForCausalLM(LlamaConfig(**shape, rope_parameters={"rope_type": "default", **rope})).to(dtype).eval()
        )
    shapes = Shapes(True, shape["num_attention_heads"], shape["num_key_value_heads"])
    native = to_native({f"language_model.{name}": value for name, value in ours.state_dict().items()}, shapes)
    llama.load_state_dict({name.removeprefix("language_model."): value for name, value in native.items()})
    return {"internlm2": ours, "llama": llama}


def measure(settings: Settings) -> dict[str, Any]:
    """Return median seconds of prefill and of one decoding step for both models, and their ratios."""
    import torch

    torch.set_num_threads(settings.threads)
    models = build(settings)
    ids = torch.randint(0, 500, (settings.batch, settings.prompt), device=settings.device)

    on_cuda = settings.device.startswith("cuda")
    # Seconds of our own process do not count the time other processes take from the CPU.
    clock = time.process_time if settings.device == "cpu" and settings.threads == 1 else time.perf_counter

    def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
        if on_cuda:
            torch.cuda.synchronize()
        start = clock()
        result = work()
        if on_cuda:
            torch.cuda.synchronize()
        return clock() - start, result

    def decode(model: Any, cache: Any) -> None:
        token = ids[:, :1]
        for _ in range(settings.steps):
            logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)

    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    with torch.inference_mode():
        logits = [model(ids[:, :64]).logits.float() for model in models.values()]
        difference = (logits[0] - logits[1]).abs().max().item()
        for round_number in range(settings.rounds + 1):
            order = list(models) if round_number % 2 else list(models)[::-1]
            for name in order:
                model = models[name]
                prefill, outputs = seconds(lambda model=model: model(ids, use_cache=True, logits_to_keep=1))
                step, _ = seconds(lambda model=model, outputs=outputs: decode(model, outputs.past_key_values))
                if round_number:  # the first round warms up
                    times[name]["prefill"].append(prefill)
                    times[name]["decode"].append(step / settings.steps)
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in times.items()
    }
    ratio = {part: medians["llama"][part] / medians["internlm2"][part] for part in ("prefill", "decode")}
    return {"preset": settings.preset, "seconds": medians, "ratio": ratio, "largest_logit_difference": difference}


def main(argv: list[str]) -> int:
    """Measure, print, save."""
    settings = parse_settings(Settings, argv, program="bench/model_speed.py", about=__doc__, config=False)
    print(show_settings(settings, "model_speed"))
    figures = measure(settings)
    for part, ratio in figures["ratio"].items():
        ours, llama = (1000 * figures["seconds"][name][part] for name in ("internlm2", "llama"))
        print(f"{part:8} ours {ours:9.3f} ms   llama {llama:9.3f} ms   ratio {ratio:.3f}")
    if settings.json:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
