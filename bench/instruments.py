"""What bench/step_speed.py measures with: peak memory, the FLOP of a step, a process of its own."""

import concurrent.futures
import ctypes
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from step_sides import build_side
from step_world import Settings, World


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}  # bf16, dense


def peak_tflops(settings: Settings) -> float | None:
    """Return what the GPU can do at most by its data sheet, None if it is not known."""
    import torch

    if settings.peak_tflops or settings.dtype != "bfloat16":
        return settings.peak_tflops
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in torch.cuda.get_device_name()), None)


def cuda_peak_mib(step: Callable[[], float]) -> float:
    """Return what one step allocates beyond what is there before it, in MiB."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_peak_mib(side: str, settings: Settings) -> float:
    """Return by how much the resident memory of this process rises above its start in five steps, in MiB.

    Start is after a first step, when weights, reference and optimizer state are there and freed memory was handed back;
    the kernel's high-water mark is restarted then. `nan` where there is none. Allocator as it comes, as in a real run.
    """
    import torch

    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        step = build_side(side, World(settings.shape, settings, Path(folder)), settings)
        step()
        gc.collect()
        if not sys.platform.startswith("linux"):
            return float("nan")
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return float("nan")
        before = status_mib("VmRSS")
        for _ in range(5):
            step()
        return status_mib("VmHWM") - before


def own_process(function: Callable[..., float], *arguments: Any) -> float:
    """Return the result of a function that ran in a new process, where no other side has left anything behind."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def status_mib(key: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def count_flop(step: Callable[[], float]) -> float:
    """Return the FLOP of matrix products, convolutions and attention in one step; causal attention counts half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten

    def addmm_(self_shape: Any, a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    def attention(q: Any, k: Any, v: Any, causal: bool, products: int) -> int:
        batch, heads, queries, width = q
        return products * 2 * batch * heads * queries * k[2] * width // (2 if causal else 1)

    def forward(q: Any, k: Any, v: Any, p: float = 0.0, causal: bool = False, *args: Any, **kwargs: Any) -> int:
        return attention(q, k, v, causal, 2)

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, p: float, causal: bool, *args: Any, **kw: Any
    ) -> int:
        return attention(q, k, v, causal, 5)

    formulas = {
        aten.addmm_: addmm_,
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        step()
    return counter.get_total_flops()
