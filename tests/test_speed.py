"""Settings that make a step fast or small must not change what it computes. Run: pytest tests/test_speed.py"""

import ctypes
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_logps import BACKBONES, gradient, mixed_groups
from tiny import tiny_model

from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import response_logps
from internvl_mpo.packing import pack_groups
from internvl_mpo.training.speed import apply_speed_settings, check_speed_settings, use_liger_kernels

ROOT = Path(__file__).resolve().parents[1]


def speed_settings(**changes) -> types.SimpleNamespace:
    plain = {"packed_attention": "auto", "use_liger_kernel": False, "checkpoint_vision": False}
    return types.SimpleNamespace(**{**plain, "checkpoint_language": False, "plain_twin": False, **changes})


def step(backbone="qwen2", **changes) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Log-probs, gradient, and how often a layer of each tower ran."""
    model = apply_speed_settings(tiny_model(backbone).double().train(), speed_settings(**changes))
    runs = [0, 0]

    def count(tower: int):
        def hook(*_):
            runs[tower] += 1

        return hook

    layers = model.vision_model.encoder.layers[0].attn, next(iter(model.language_model.model.layers[0].children()))
    for tower, layer in enumerate(layers):
        layer.register_forward_hook(count(tower))
    logps_R = response_logps(model, pack_groups(mixed_groups(model)))
    return logps_R.detach(), gradient(model, logps_R), runs


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_tower_is_recomputed_by_its_own_switch_and_gradients_stay(backbone):
    plain_logps, plain, runs = step(backbone)
    assert runs == [1, 1]
    for changes, expected in (
        ({"checkpoint_vision": True}, [2, 1]),
        ({"checkpoint_language": True}, [1, 2]),
        ({"checkpoint_vision": True, "checkpoint_language": True}, [2, 2]),
    ):
        logps_R, grad, runs = step(backbone, **changes)
        assert runs == expected, changes
        assert torch.equal(logps_R, plain_logps)
        assert torch.equal(grad, plain)


def test_the_plain_twin_switch_runs_every_response_by_itself_and_agrees():
    packed_logps, packed, runs = step()
    twin_logps_R, twin, twin_runs = step(plain_twin=True)
    assert (runs[1], twin_runs[1]) == (1, 4)  # one pass for the pack; one for each of its four groups
    assert (packed_logps - twin_logps_R).abs().max() < 1e-12
    assert (packed - twin).norm() / twin.norm() < 1e-6  # transformers' RMSNorm computes in float32


def test_settings_may_be_applied_again():
    settings = speed_settings(checkpoint_language=True)
    model = apply_speed_settings(tiny_model().train(), settings)
    hooks = len(model.language_model.model.layers[-1].mlp._forward_hooks)
    assert len(apply_speed_settings(model, settings).language_model.model.layers[-1].mlp._forward_hooks) == hooks == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packed_attention": "flex"}, "packed_attention flex needs a CUDA GPU"),
        ({"packed_attention": "varlen"}, "packed_attention varlen needs"),
        ({"use_liger_kernel": True}, "use_liger_kernel needs"),
    ],
)
def test_kernels_that_cannot_run_here_are_refused_in_a_sentence(changes, words):
    with pytest.raises(BadInputError, match=words):
        check_speed_settings(speed_settings(**changes))


class FakeRMSNorm:
    @staticmethod
    def apply(x, weight, eps, offset=0.0, casting_mode="llama"):
        assert (offset, casting_mode) == (0.0, "llama")
        return weight * torch.nn.functional.rms_norm(x, x.shape[-1:], eps=eps)


class FakeSiLUMul:
    @staticmethod
    def apply(gate, up):
        return torch.nn.functional.silu(gate) * up


def test_liger_patches_internlm2_and_leaves_the_rest_to_its_own_table(monkeypatch):
    asked = []
    ops = types.SimpleNamespace(LigerRMSNormFunction=FakeRMSNorm, LigerSiLUMulFunction=FakeSiLUMul)
    top = types.SimpleNamespace(_apply_liger_kernel_to_instance=lambda **options: asked.append(options))
    patch = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen2": None})
    for name, module in {"": None, ".ops": ops, ".transformers": top, ".transformers.monkey_patch": patch}.items():
        monkeypatch.setitem(sys.modules, "liger_kernel" + name, module or types.ModuleType("liger_kernel"))

    model = apply_speed_settings(tiny_model("internlm2").train(), speed_settings())
    pack = pack_groups(mixed_groups(model))
    expected = gradient(model, response_logps(model, pack))
    use_liger_kernels(model.language_model.model)
    for norm in (part for part in model.language_model.modules() if type(part).__name__ == "InternLM2RMSNorm"):
        assert "forward" in vars(norm)
    assert (gradient(model, response_logps(model, pack)) - expected).norm() / expected.norm() < 5e-5
    assert not asked

    qwen = tiny_model("qwen2").language_model.model
    use_liger_kernels(qwen)
    (options,) = asked
    assert options.pop("model") is qwen
    assert options == {
        **{"rope": True, "rms_norm": True, "swiglu": True},
        **{"cross_entropy": False, "fused_linear_cross_entropy": False},
    }
    with pytest.raises(BadInputError, match="no kernels for a language model of type 'llama'"):
        use_liger_kernels(tiny_model("llama").language_model.model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a CUDA GPU")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_liger_kernels_compute_the_same(backbone):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    plain, model = (apply_speed_settings(tiny_model(backbone).train().cuda(), speed_settings()) for _ in range(2))
    pack = pack_groups(mixed_groups(plain)).to("cuda")
    expected = response_logps(plain, pack)
    expected_grad = gradient(plain, expected)
    use_liger_kernels(model.language_model.model)
    logps_R = response_logps(model, pack)
    assert torch.allclose(logps_R, expected, rtol=1e-5, atol=1e-4)
    grad = gradient(model, logps_R)
    assert (grad - expected_grad).norm() / expected_grad.norm() < 5e-5


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
@pytest.mark.slow
def test_a_large_tensor_that_is_freed_below_a_small_one_is_given_back():
    code = """
import torch
from internvl_mpo.training.speed import return_freed_memory
from internvl_mpo.training.throughput import resident_bytes

def given_back(mebibytes):
    large, small = torch.ones(mebibytes * 2**18), torch.ones(2**10)
    before = resident_bytes()
    del large
    return before - resident_bytes()

torch.ones(30 * 2**18)  # is freed at once, and from now on glibc takes blocks of this size from its heap
plain = given_back(16)
return_freed_memory()
print(plain, given_back(24))  # more than the hole that is left
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, fixed = map(int, done.stdout.split())
    assert plain < 8 * 2**20, "glibc does so by itself now"
    assert fixed > 23 * 2**20
