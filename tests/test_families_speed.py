"""Kernels for other families: each attention back end scores alike, and Liger is given what it has kernels for.

pytest tests/test_families_speed.py
"""

import sys
import types

import pytest
import torch
from test_families import BUILDERS, gradient, load, questions, root  # noqa: F401 - root is a fixture
from test_logps import flash_attn_varlen_func
from test_speed import speed_settings

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.kernels.packed_attention import use_packed_attention
from internvl_mpo.logps import attach_scoring, response_logps
from internvl_mpo.packing import Pack, pack_groups
from internvl_mpo.training.speed import apply_speed_settings

# three position axes; features in several layers; tiles with their own marks
PACKED = ("qwen2_5_vl", "qwen3_vl", "idefics3")


def model_and_pack(name: str, folder, root, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Pack]:
    BUILDERS[name](folder)
    processor = family_of_source(str(folder)).load_processor(str(folder))
    return load(folder, dtype), pack_groups([encode_group(processor, pairs, root) for pairs in questions()])


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_flex_attention_scores_alike(name, tmp_path, root):
    model, pack = model_and_pack(name, tmp_path / "model", root)
    attach_scoring(model).requires_grad_(False)  # FlexAttention has no backward pass on the CPU
    segments = response_logps(model, pack)
    use_packed_attention(family_of_source(str(tmp_path / "model")).decoder(model), "flex")
    assert torch.allclose(response_logps(model, pack), segments, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_varlen_attention_scores_alike_as_far_as_half_precision_goes(name, tmp_path, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    model, pack = model_and_pack(name, tmp_path / "model", root, torch.bfloat16)
    attach_scoring(model, attention="varlen").requires_grad_(False)
    varlen = response_logps(model, pack)
    exact = response_logps(attach_scoring(load(tmp_path / "model")).requires_grad_(False), pack)
    assert ((varlen - exact).abs() / exact.abs()).max() < 0.02


@pytest.mark.parametrize("name", BUILDERS)
def test_liger_is_given_the_language_model_or_its_kind_is_refused(name, tmp_path, monkeypatch):
    asked: list[dict] = []
    known = {}
    ops = types.SimpleNamespace(LigerRMSNormFunction=None, LigerSiLUMulFunction=None)
    top = types.SimpleNamespace(_apply_liger_kernel_to_instance=lambda **options: asked.append(options))
    patch = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN=known)
    modules = {"": types.ModuleType("liger"), ".ops": ops, ".transformers": top, ".transformers.monkey_patch": patch}
    for part, module in modules.items():
        monkeypatch.setitem(sys.modules, "liger_kernel" + part, module)
    BUILDERS[name](tmp_path / "model")
    model = load(tmp_path / "model", torch.float32)
    decoder = family_of_source(str(tmp_path / "model")).decoder(model)
    kind = decoder.config.model_type
    with pytest.raises(BadInputError, match=f"no kernels for a language model of type '{kind}'"):
        apply_speed_settings(model, speed_settings(use_liger_kernel=True))
    known[kind] = None
    apply_speed_settings(model, speed_settings(use_liger_kernel=True))
    (options,) = asked
    assert options["model"] is decoder
    assert not options["fused_linear_cross_entropy"] and not options["cross_entropy"]  # the head has its own way


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a CUDA GPU")
@pytest.mark.parametrize("name", BUILDERS)
def test_liger_kernels_compute_the_same(name, tmp_path, root):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model, pack = model_and_pack(name, tmp_path / "model", root)
    pack, expected = pack.to("cuda"), []
    for liger in (False, True):
        model = load(tmp_path / "model", torch.float32).train().cuda()
        apply_speed_settings(model, speed_settings(use_liger_kernel=liger))
        logps_R = response_logps(model, pack)
        expected += [logps_R, gradient(model, logps_R)]
    plain, plain_grad, found, found_grad = expected
    assert torch.allclose(found, plain, rtol=1e-5, atol=1e-4)
    assert (found_grad - plain_grad).norm() / plain_grad.norm() < 5e-5
