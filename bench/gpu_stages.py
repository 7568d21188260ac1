"""The stages of bench/gpu_proof.py: each function yields the rows of its table, one when it has been measured."""

import contextlib
import copy
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton_interpreter
from gpu_model import ANSWER, Machine, Trainer, checkpointing, save_folder
from instruments import PEAK_TFLOPS, count_flop
from torch import Tensor, nn

from internvl_mpo.kernels.packed_attention import has_flash_attention, use_packed_attention
from internvl_mpo.logps import attach_scoring, response_logps, twin_logps
from internvl_mpo.packing import Pack, pack_groups
from internvl_mpo.training.speed import use_liger_kernels

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT / "../shared/oracle/model"
BACKENDS = ("segments", "flex", "varlen")
Row = dict[str, Any]


def environment(machine: Machine) -> Iterator[Row]:
    """Name the machine, and the packages that matter."""
    yield {"what": "system", "value": f"{platform.platform()}, Python {platform.python_version()}"}
    yield {"what": "cores", "value": os.cpu_count()}
    if machine.device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        yield {"what": "GPU", "value": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"}
    from importlib.metadata import PackageNotFoundError, version

    for name in ("torch", "transformers", "flash-attn", "liger-kernel", "triton", "bitsandbytes", "peft", "trl"):
        try:
            yield {"what": name, "value": version(name)}
        except PackageNotFoundError:
            yield {"what": name, "value": "not installed"}


# --- the same numbers -------------------------------------------------------------------------------------------------


def parity(machine: Machine) -> Iterator[Row]:
    """Compare log-probs and gradients on the device with the plain twin in float64 on the CPU, for every backbone."""
    yield from goldens(machine)
    sys.path.insert(0, str(ROOT / "tests"))
    from test_logps import BACKBONES, mixed_groups
    from tiny import tiny_model

    for backbone in BACKBONES:
        model = tiny_model(backbone)
        groups = mixed_groups(model)
        exact = twin_logps(copy.deepcopy(model).double(), groups).detach()
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
            for name in ("segments", *(usable_backends(machine) if backbone == "qwen2" else ())):
                if name == "varlen" and dtype == torch.float32:
                    continue  # flash-attn knows half precision only
                moved = attach_scoring(copy.deepcopy(model).to(machine.device, dtype), attention=name)
                with torch.no_grad():
                    found = response_logps(moved, pack_groups(groups).to(machine.device))
                yield compared(f"{backbone}, {name}, {str(dtype).removeprefix('torch.')}", found, exact, bound)
    yield from head_parity(machine)
    yield from liger_parity(machine)


def goldens(machine: Machine) -> Iterator[Row]:
    """Compare with what the original code computed, where its outputs are at hand."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    import modeling_internvl_mpo  # noqa: F401 - registers the classes

    names = ("input_ids", "attention_mask", "image_flags", "pixel_values")
    for name in ("internlm2", "qwen2") if ORACLE.is_dir() else ():
        io = load_file(ORACLE / name / "io.safetensors")
        real = io["batch.attention_mask"].bool()
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.08)):
            model = AutoModel.from_pretrained(ORACLE / name, dtype=dtype).eval().to(machine.device)
            model.img_context_token_id = 393
            inputs = {key: io[f"batch.{key}"].to(machine.device) for key in names}
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
            with torch.no_grad():
                found = model(**inputs).logits
            title = f"logits of the original code, {name}, {str(dtype).removeprefix('torch.')}"
            yield compared(title, found.cpu()[real], io["batch.logits"][real], bound)


def compared(check: str, found: Tensor, exact: Tensor, bound: float) -> Row:
    """Return a row: the largest difference over the largest value, and whether it keeps the bound."""
    difference = (found.double().cpu() - exact.double().cpu()).abs().max() / exact.abs().max()
    return {"check": check, "difference": difference.item(), "at most": bound, "holds": difference.item() <= bound}


def usable_backends(machine: Machine) -> list[str]:
    """Return the back ends besides segments that can run here."""
    flash = machine.device == "cuda" and has_flash_attention()
    return ["flex", *(["varlen"] if flash else [])]


def head_parity(machine: Machine) -> Iterator[Row]:
    """Compare the scoring head, log-probs and gradients, with full logits."""
    from internvl_mpo.kernels.scoring_head import ScoringHead

    words, width, count = 5000, 64, 300
    torch.manual_seed(0)
    hidden = torch.randn(count, width, device=machine.device)
    targets = torch.randint(words, (count,), device=machine.device)
    head = ScoringHead(nn.Linear(width, words, bias=False).to(machine.device))
    grads = []
    for logps in (
        lambda states: head(states, targets, chunk_size=700),
        lambda states: torch.log_softmax(nn.functional.linear(states, head.weight).float(), -1)[
            torch.arange(count, device=machine.device), targets
        ],
    ):
        states = hidden.clone().requires_grad_()
        found = logps(states)
        found.sum().backward()
        grads.append((found.detach(), states.grad))
    yield compared("scoring head, log-probs", grads[0][0], grads[1][0], 1e-5)
    yield compared("scoring head, gradients", grads[0][1], grads[1][1], 1e-5)


def liger_parity(machine: Machine) -> Iterator[Row]:
    """Compare a step with Liger's kernels with one without; on a CPU they run in Triton's interpreter, if at all."""
    missing = [name for name in ("liger_kernel", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        yield {"check": f"Liger's kernels: {' and '.join(missing)} not installed"}
        return
    if machine.device == "cpu":
        triton_interpreter.prepare()
    from test_logps import BACKBONES, mixed_groups
    from tiny import tiny_model

    for backbone in BACKBONES:
        model = attach_scoring(tiny_model(backbone).to(machine.device))
        pack = pack_groups(mixed_groups(model)).to(machine.device)
        with torch.no_grad():
            exact = response_logps(model, pack)
            use_liger_kernels(model.language_model.model)
            yield compared(f"Liger's kernels, {backbone}, float32", response_logps(model, pack), exact, 1e-5)


# --- a step -----------------------------------------------------------------------------------------------------------


def step_large(machine: Machine) -> Iterator[Row]:
    """Time a step of 8B."""
    return steps(machine, "8b")


def step_small(machine: Machine) -> Iterator[Row]:
    """Time a step of 1B."""
    return steps(machine, "1b")


def steps(machine: Machine, size: str) -> Iterator[Row]:
    """Time a step at 5 and 13 tiles with every back end, with and without recomputation, Liger and a live reference."""
    trainer = Trainer(machine, machine.model(size))
    packs = {tiles: machine.pack(trainer.policy, tiles) for tiles in (5, 13)}
    # Counted without recomputation and with an attention that can be counted: the arithmetic a step cannot do without.
    use_packed_attention(trainer.policy, "segments")
    gflop = {tiles: needed_gflop(trainer, pack) for tiles, pack in packs.items()}
    for tiles, pack in packs.items():
        for backend in ("segments", *usable_backends(machine)) if machine.device == "cuda" else ("segments",):
            use_packed_attention(trainer.policy, backend)
            yield timed(trainer, pack, tiles, gflop[tiles], attention=backend)
    best = "varlen" if "varlen" in usable_backends(machine) else "flex"
    use_packed_attention(trainer.policy, best if machine.device == "cuda" else "segments")
    for vision, language in ((True, False), (True, True)):
        with checkpointing(trainer.policy, vision=vision, language=language):
            recomputed = "vision and language" if language else "vision"
            yield timed(trainer, packs[13], 13, gflop[13], attention="auto", recomputed=recomputed)
    live = Trainer(machine, trainer.policy, cached=trainer.cached)
    live.optimizer = trainer.optimizer
    try:
        live.live()
        yield timed(live, packs[5], 5, needed_gflop(live, packs[5]), attention="auto", reference="live")
    except torch.OutOfMemoryError:
        yield {"tiles": 5, "reference": "live", "note": "does not fit"}
    live.reference = None
    if importlib.util.find_spec("liger_kernel") and machine.device == "cuda":
        use_liger_kernels(trainer.policy.language_model.model)
        for tiles, pack in packs.items():
            yield timed(trainer, pack, tiles, gflop[tiles], attention="auto", liger=True)
    else:
        yield {"tiles": 5, "liger": True, "note": "not here: liger-kernel on CUDA is needed"}


def needed_gflop(trainer: Trainer, pack: Pack) -> float:
    """Return what a step computes in GFLOP."""
    trainer.step(pack)  # so that a cached reference is there
    return count_flop(lambda: trainer.step(pack)) / 1e9


def timed(trainer: Trainer, pack: Pack, tiles: int, gflop: float, **how: Any) -> Row:
    """Return a row with the speed and memory of a step."""
    row: Row = {"tiles": tiles, "attention": how.get("attention"), "reference": how.get("reference", "cached")}
    row |= {"recomputed": how.get("recomputed", "nothing"), "liger": how.get("liger", False)}
    try:
        peak = trainer.machine.peak(lambda: trainer.step(pack))
        seconds = trainer.seconds(pack)
    except torch.OutOfMemoryError:
        trainer.optimizer.zero_grad()
        return {**row, "note": "does not fit"}
    num_pairs = len(pack.chosen_index_P)
    row |= {"ms a pair": 1000 * seconds / num_pairs, "tokens/s": pack.num_tokens / seconds}
    row |= {"TFLOP a pair": gflop / 1000 / num_pairs, "TFLOP/s": gflop / 1000 / seconds}
    most = peak_tflops(trainer.machine)
    if most:
        row |= {"MFU": gflop / 1000 / seconds / most, "times the floor": seconds * most * 1000 / gflop}
    return {**row, "peak GiB": peak}


def peak_tflops(machine: Machine) -> float | None:
    """Return the GPU's bf16 rate by its data sheet, None where it is not known."""
    if machine.device != "cuda":
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)


def profile(machine: Machine) -> Iterator[Row]:
    """Return the operations that take most of a step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    trainer = Trainer(machine, machine.model("8b"))
    pack = machine.pack(trainer.policy, 5)
    seconds = trainer.seconds(pack, warmup=2, steps=3)
    on_gpu = machine.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profiler(activities=activities) as found:
        for _ in range(3):
            trainer.step(pack)
        machine.wait()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    for event in events[:5]:
        spent = getattr(event, key)
        yield {
            "operation": event.key[:80],
            "ms a step": spent / 3000,
            "share": spent / total,
            "calls": event.count // 3,
        }
    yield {"operation": "all", "ms a step": total / 3000, "share": 1.0}
    use_packed_attention(trainer.policy, "segments")
    gflop = needed_gflop(trainer, pack)
    yield {"operation": "whole step by the clock", "ms a step": 1000 * seconds}
    if most := peak_tflops(machine):
        yield {"operation": "floor: its arithmetic at the data sheet's rate", "ms a step": gflop / most}


def peers(machine: Machine) -> Iterator[Row]:
    """Time ours, the original's form and TRL in turns in one process; see step_speed.py."""
    preset = "real1b" if machine.size == "full" else "tiny"
    sides = ["ours_live", "ours_cached", "twin", *(["trl"] if importlib.util.find_spec("trl") else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.json"
        words = [sys.executable, str(ROOT / "bench/step_speed.py"), "--preset", preset, "--sides", ",".join(sides)]
        words += [
            "--device",
            machine.device,
            "--json",
            str(path),
            "--rounds",
            "5" if machine.size == "full" else "1",
            "--memory_runs",
            "0",
        ]
        words += ["--dtype", "bfloat16" if machine.device == "cuda" else "float32"]
        subprocess.run(words, check=True)
        result = json.loads(path.read_text(encoding="utf-8"))
    clock = "wall_s" if machine.device == "cuda" else "cpu_s"
    for side, found in {**{f"ours, {name}": one for name, one in result["ours"].items()}, **result}.items():
        if side.startswith("ours, ") or side in ("twin", "trl"):
            yield {"side": side, "ms a pair": 1000 * found[clock], "GFLOP": found["gflop"],
                   "peak MiB over weights": found["peak_mib"]}  # fmt: skip
    for name, ratio in result["ratio_details"].items():
        yield {"side": name.replace("_", " "), "times": ratio["median"], "from": ratio["min"], "to": ratio["max"]}
    if "trl" not in sides:
        yield {"side": "TRL is not installed"}


# --- memory, adapters, sampling, resuming -----------------------------------------------------------------------------

# size, tiles, recomputed towers, rank of adapters
MEMORY_CASES = (
    ("1b", 5, "", 0),
    ("1b", 13, "", 0),
    ("1b", 13, "vision", 0),
    ("1b", 13, "vision language", 0),
    ("8b", 5, "", 16),
    ("8b", 13, "vision language", 16),
)


def memory(machine: Machine) -> Iterator[Row]:
    """Compare the memory of a step with what memory_estimate calculates, its allowance left out."""
    from internvl_mpo.memory_estimate import estimate_memory
    from internvl_mpo.training.fake_pass import Setup
    from internvl_mpo.training.policy import add_adapters

    for size, tiles, recomputed, rank in MEMORY_CASES:
        model = machine.model(size)
        policy = add_adapters(model, rank=rank, base="none") if rank else model
        trainer, pack = Trainer(machine, policy), machine.pack(model, tiles)
        towers = {"vision": "vision" in recomputed, "language": "language" in recomputed}
        with checkpointing(policy, **towers):
            trainer.step(pack)
            peak = machine.peak(lambda trainer=trainer, pack=pack: trainer.step(pack))
        setup = Setup(
            lora_rank=rank, gradient_checkpointing=False, checkpoint_vision=towers["vision"],
            checkpoint_language=towers["language"], max_tokens_per_pack=pack.num_tokens, num_tiles=tiles,
            response_tokens=ANSWER if machine.size == "full" else ANSWER // 10,
            attention="fused" if machine.device == "cuda" else "segments",
        )  # fmt: skip
        found = estimate_memory(model.config, setup)
        calculated = (found.total - found.reserve) / 2**30
        row = {"model": size, "tiles": tiles, "recomputed": recomputed or "nothing", "LoRA rank": rank}
        off = None if peak is None else peak / calculated - 1
        yield {**row, "calculated GiB": calculated, "measured GiB": peak, "off by": off}
        del model, policy, trainer, pack
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def adapters(machine: Machine) -> Iterator[Row]:
    """Time a step of LoRA and of QLoRA."""
    from internvl_mpo.training.policy import add_adapters

    for four_bit in (False, True):
        name = "QLoRA" if four_bit else "LoRA"
        if four_bit and importlib.util.find_spec("bitsandbytes") is None:
            yield {"adapters": name, "note": "bitsandbytes is not installed"}
            continue
        model = machine.model("8b")
        if four_bit:
            quantise(model.language_model, machine)
        trainer = Trainer(machine, add_adapters(model, rank=16, base="none"))
        for tiles in (5, 13):
            pack = machine.pack(model, tiles)
            with contextlib.nullcontext() if tiles == 5 else checkpointing(model, vision=True, language=True):
                peak = machine.peak(lambda trainer=trainer, pack=pack: trainer.step(pack))
                seconds = trainer.seconds(pack, warmup=1, steps=3)
            yield {"adapters": name, "tiles": tiles, "recomputed": "nothing" if tiles == 5 else "both towers",
                   "ms a pair": 1000 * seconds, "peak GiB": peak}  # fmt: skip
        del model, trainer
        if machine.device == "cuda":
            torch.cuda.empty_cache()


def quantise(language_model: nn.Module, machine: Machine) -> None:
    """Put NF4 layers in the place of linear ones, as loading in 4 bits does; the head stays."""
    import bitsandbytes as bnb

    head = language_model.get_output_embeddings()
    for parent in list(language_model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                narrow = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=layer.bias is not None,
                    compute_dtype=layer.weight.dtype, quant_type="nf4",
                )  # fmt: skip
                weight = layer.weight.data.to("cpu")
                narrow.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=narrow)
                if layer.bias is not None:
                    narrow.bias = layer.bias
                setattr(parent, name, narrow.to(machine.device))


def sampling(machine: Machine) -> Iterator[Row]:
    """Draw answers in batches and count tokens a second."""
    from PIL import Image

    from internvl_mpo.engines import Request, Sampling
    from internvl_mpo.engines.internvl_engine import InternVLEngine

    length, batches = (128, (8, 64)) if machine.size == "full" else (8, (2, 4))
    with tempfile.TemporaryDirectory() as folder:
        save_folder(machine, "1b", Path(folder) / "model")
        picture = Image.effect_noise((896, 896), 80).convert("RGB")
        for batch in batches:
            engine = InternVLEngine(Path(folder) / "model", device=machine.device, batch_size=batch)
            drawn = Sampling(temperature=1.0, max_new_tokens=length)
            requests = [
                Request(id=str(number), question="w20 w21 w22", images=(picture,), seed=number, sampling=drawn)
                for number in range(batch)
            ]
            list(engine.generate(requests[:1]))  # warm
            machine.wait()
            begin = time.perf_counter()
            replies = list(engine.generate(requests))
            seconds = time.perf_counter() - begin
            tokens = sum(reply.num_tokens for reply in replies)
            yield {"batch": batch, "replies": len(replies), "tokens": tokens, "seconds": seconds,
                   "tokens/s": tokens / seconds}  # fmt: skip


def resume(machine: Machine) -> Iterator[Row]:
    """Kill a run of a tiny model with bfloat16 weights and compare its losses with those of an unbroken one."""
    import kill_train

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = [*kill_train.tiny_world(folder), "--use_cpu", str(machine.device == "cpu").lower()]
        arguments += ["--dtype", "bfloat16", "--bf16", "true"]
        kills, length = (2, 12) if machine.size == "full" else (1, 6)
        for row in kill_train.torture("one", kills, length, random.Random(0), arguments, folder / "one"):
            yield {"killed": row["victim"], "after step": row["at_step"], "went on from": row["went_on_from"],
                   "losses bit-identical": row["same"]}  # fmt: skip
