"""The packed form against its plain twin. Run: pytest tests/test_logps.py"""

import copy
import random
import socket
import sys
import types
import unittest.mock

import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense_mask, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl_mpo.kernels.packed_attention import (
    flex_block_mask,
    segment_attention,
    use_packed_attention,
    varlen_attention,
)
from internvl_mpo.kernels.scoring_head import ScoringHead
from internvl_mpo.logps import attach_scoring, pair_logps, response_logps, score_pairs, twin_logps
from internvl_mpo.packing import Group, pack_groups

BACKBONES = ["internlm2", "llama", "phi3", "qwen2", "qwen3"]
NUM_WORDS = 250  # ids below the special tokens of the tiny tokenizer


def scoring_model(backbone: str = "qwen2", **overrides):
    return attach_scoring(tiny_model(backbone, **overrides))


@pytest.fixture(scope="module")
def model():
    """One float64 model for tests that leave it as it is."""
    return scoring_model().double()


def random_group(
    rng: random.Random, num_tiles: int, image_token: int, name: str = "g", num_responses: int = 4
) -> Group:
    """A prompt with one image token per tile; responses share stems of any length, the shortest has one token."""
    prompt = [rng.randrange(NUM_WORDS) for _ in range(rng.randint(1, 12))] + [image_token] * num_tiles
    prompt += [rng.randrange(NUM_WORDS) for _ in range(rng.randint(1, 5))]
    responses: list[list[int]] = []
    while len(responses) < num_responses:
        stem = rng.choice(responses)[: rng.randint(0, 9)] if responses and rng.random() < 0.7 else []
        response = stem + [rng.randrange(NUM_WORDS) for _ in range(rng.choice([1, 1, 2, 5, 9]))]
        if response not in responses:
            responses.append(response)
    pairs = [(0, index) for index in range(1, num_responses)]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    tiles = torch.randn(num_tiles, 3, 28, 28, generator=generator) if num_tiles else None
    return Group(prompt, responses, pairs, [f"{name}{index}" for index in range(len(pairs))], tiles)


def mixed_groups(model, seed: int = 0) -> list[Group]:
    """Text only, one tile, several tiles, one group with a single pair."""
    rng, image = random.Random(seed), model.config.image_token_id
    shapes = [(0, 4), (1, 2), (5, 6), (3, 3)]
    return [random_group(rng, tiles, image, f"g{i}-", responses) for i, (tiles, responses) in enumerate(shapes)]


def gradient(model, logps_R: torch.Tensor) -> torch.Tensor:
    """Gradient of a sum with uneven weights, so that errors of different responses do not cancel."""
    model.zero_grad()
    weights_R = torch.linspace(-1, 1.5, len(logps_R), dtype=logps_R.dtype)
    (logps_R * weights_R).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


@given(st.integers(0, 10**6), st.lists(st.tuples(st.integers(0, 3), st.integers(2, 6)), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_packed_logps_equal_the_twin_to_1e_12(model, seed, shapes):
    rng, image = random.Random(seed), model.config.image_token_id
    groups = [random_group(rng, tiles, image, str(i), count) for i, (tiles, count) in enumerate(shapes)]
    with torch.no_grad():
        packed = response_logps(model, pack_groups(groups), chunk_size=rng.choice([1, 7, 512]))
        plain = twin_logps(model, groups)
    assert packed.dtype == torch.float64
    assert (packed - plain).abs().max() < 1e-12


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_equal_the_twin_for_every_language_model(backbone):
    model = scoring_model(backbone).train()
    groups = mixed_groups(model)
    packed = gradient(model, response_logps(model, pack_groups(groups), chunk_size=16))
    plain = gradient(model, twin_logps(model, groups))
    assert (packed - plain).norm() / plain.norm() < 5e-5


def test_gradients_equal_the_twin_in_float64_with_tied_weights():
    model = scoring_model(llm_config={"tie_word_embeddings": True}).double()
    groups = mixed_groups(model)
    packed = gradient(model, response_logps(model, pack_groups(groups), chunk_size=5))
    plain = gradient(model, twin_logps(model, groups))
    assert (packed - plain).norm() / plain.norm() < 1e-6  # RMSNorm computes in float32


@pytest.mark.parametrize("backbone", BACKBONES)
def test_trimming_the_last_layer_changes_nothing_but_the_work(backbone):
    from torch.utils.flop_counter import FlopCounterMode

    results, flop = [], []
    for trim in (True, False):
        model = attach_scoring(tiny_model(backbone), trim=trim).double().train()
        pack = pack_groups([*mixed_groups(model), Group([5] * 60, [[2], [3, 4]], [(0, 1)], ["long"])])
        with FlopCounterMode(display=False) as counter:
            logps_R = response_logps(model, pack)
        results.append((logps_R, gradient(model, logps_R)))
        flop.append(counter.get_total_flops())
        prompt = torch.tensor([[1, 2, 3, 4]])  # a pass without a pack after one with a pack sees all tokens
        assert torch.equal(model(input_ids=prompt).logits, tiny_model(backbone).double()(input_ids=prompt).logits)
    (trimmed, trimmed_grad), (whole, whole_grad) = results
    assert (trimmed - whole).abs().max() < 1e-12
    assert (trimmed_grad - whole_grad).norm() / whole_grad.norm() < 1e-6  # transformers' RMSNorm computes in float32
    assert flop[0] < 0.9 * flop[1]


def test_gradient_checkpointing_changes_nothing(model):
    groups = mixed_groups(model)
    pack = pack_groups(groups)
    plain = gradient(model, response_logps(model, pack))
    saving = copy.deepcopy(tiny_model()).double().train()
    saving.gradient_checkpointing_enable()
    attach_scoring(saving)
    assert torch.equal(gradient(saving, response_logps(saving, pack)), plain)


def test_rejected_cannot_see_chosen(model):
    prompt, rejected = [1, 2, 3], [7, 8, 9]
    with torch.no_grad():
        seen = [
            response_logps(model, pack_groups([Group(prompt, [chosen, rejected], [(0, 1)], ["a"])]))[1]
            for chosen in ([4, 5, 6], [6, 5, 4, 4, 4])
        ]
    assert abs(seen[0] - seen[1]) < 1e-12


@pytest.mark.parametrize("chunk_size", [1, 7, None])
def test_squared_probabilities_of_a_pack_equal_the_twin(model, chunk_size):
    pack = pack_groups(mixed_groups(model))
    twin = attach_scoring(copy.deepcopy(tiny_model()).double(), plain_twin=True)
    packed = model(pack=pack, squares=True, chunk_size=chunk_size)
    plain = twin(pack=pack, squares=True)
    for mine, other in zip(packed, plain, strict=True):
        assert (mine - other).abs().max() < 1e-12
    assert torch.equal(packed[0], model(pack=pack, chunk_size=chunk_size))
    assert not packed[1].requires_grad
    assert (packed[1] <= 0).all()
    expected = gradient(model, model(pack=pack))
    assert (gradient(model, packed[0]) - expected).abs().max() < 1e-12


def test_likeness_is_a_mean_over_the_tokens_of_a_response(model):
    pack = pack_groups(mixed_groups(model))
    with torch.no_grad():
        scores = score_pairs(model, pack, likeness=True)
        logps_E, squares_E = model(pack=pack, squares=True)
        plain = score_pairs(model, pack)
    for pair in range(pack.num_pairs):
        for index_P, likeness in ((pack.chosen_index_P, scores.chosen_likeness),
                                  (pack.rejected_index_P, scores.rejected_likeness)):  # fmt: skip
            own = pack.entry_response_E == index_P[pair]
            assert likeness[pair] == pytest.approx((logps_E - squares_E)[own].mean().item(), rel=1e-12)
    assert torch.equal(scores.chosen, plain.chosen)
    assert plain.chosen_likeness is None
    assert not score_pairs(model, pack, likeness=True).chosen_likeness.requires_grad
    assert torch.equal(plain.whole_chosen, response_logps(model, pack)[pack.chosen_index_P].detach())


def test_pairs_may_share_a_response(model):
    pack = pack_groups([Group([1, 2], [[3], [4, 5], [6]], [(0, 1), (0, 2), (2, 1)], ["a", "b", "c"])])
    with torch.no_grad():
        logps_R = response_logps(model, pack)
        chosen, rejected = pair_logps(model, pack)
    assert torch.equal(chosen, logps_R[[0, 0, 2]])
    assert torch.equal(rejected, logps_R[[1, 2, 1]])


def test_order_of_groups_does_not_matter(model):
    groups = mixed_groups(model)
    with torch.no_grad():
        forward = response_logps(model, pack_groups(groups))
        backward = response_logps(model, pack_groups(groups[::-1]))
    sizes = [len(group.responses) for group in groups[::-1]]
    assert torch.allclose(torch.cat(backward.split(sizes)[::-1]), forward, rtol=0, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned, forward or backward."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return out


def test_no_tensor_of_tokens_times_vocabulary_is_ever_alive():
    model = scoring_model().train()
    groups = [Group([1] * 40, [[2] * 100, [3] * 90], [(0, 1)], ["a"])]
    num_words, num_scored = model.config.llm_config.vocab_size, 190
    with LargestTensor() as seen:
        gradient(model, response_logps(model, pack_groups(groups), chunk_size=64))
    largest_other = sum(p.numel() for p in model.parameters() if p.grad is not None)  # the test's own flat gradient
    assert seen.num_elements == largest_other < num_scored * num_words
    with LargestTensor() as seen:
        twin_logps(model, groups)
    assert seen.num_elements >= num_scored * num_words  # the watcher does see logits where there are some


@pytest.mark.parametrize(("num_rows", "rows_times_words"), [(120, 2**20 // 4), (8000, 8000 * 1024)])
def test_the_head_chooses_how_many_words_fit(num_rows, rows_times_words):
    head = ScoringHead(torch.nn.Linear(2, 10_000, bias=False))
    hidden = torch.zeros(num_rows, 2, requires_grad=True)
    with LargestTensor() as seen:
        head(hidden, torch.zeros(num_rows, dtype=torch.long)).sum().backward()
    assert 0.8 * rows_times_words < seen.num_elements <= rows_times_words


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_chunked_head_equals_log_softmax(bias, trained):
    torch.manual_seed(0)
    plain = torch.nn.Linear(6, 11, bias=bias, dtype=torch.float64).requires_grad_(trained)
    head = ScoringHead(plain)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (10,))
    assert torch.equal(head(hidden), plain(hidden))
    assert torch.autograd.gradcheck(lambda h: head(h, targets, chunk_size=3), hidden)
    expected = plain(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    got = head(hidden, targets, chunk_size=3)
    assert torch.allclose(got, expected, rtol=0, atol=1e-13)
    inputs = [hidden, *[p for p in plain.parameters() if p.requires_grad]]
    weights = torch.arange(10.0, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_half_precision_sums_in_float32():
    model = scoring_model().bfloat16()
    pack = pack_groups([Group([1, 2], [[3] * 20, [4]], [(0, 1)], ["a"])])
    logps_R = response_logps(model, pack)
    assert logps_R.dtype == torch.float32
    logps_R.sum().backward()
    assert model.get_output_embeddings().weight.grad.dtype == torch.bfloat16


def test_autocast_trains_and_stays_near_float32():
    model = scoring_model().train()
    pack = pack_groups(mixed_groups(model))
    exact = gradient(model, response_logps(model, pack))
    with torch.autocast("cpu", torch.bfloat16):
        logps_R = response_logps(model, pack)
    assert logps_R.dtype == torch.float32
    rough = gradient(model, logps_R)
    assert torch.nn.functional.cosine_similarity(rough, exact, dim=0) > 0.98


def test_attach_scoring_leaves_names_generation_and_logits_alone(tmp_path):
    plain, scored = tiny_model(), scoring_model()
    assert list(plain.state_dict()) == list(scored.state_dict())
    prompt = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(plain(input_ids=prompt).logits, scored(input_ids=prompt).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain.generate(input_ids=prompt, **options), scored.generate(input_ids=prompt, **options))
    assert attach_scoring(scored) is scored  # twice does no harm
    scored.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert torch.equal(plain(input_ids=prompt).logits, loaded(input_ids=prompt).logits)


def test_a_padded_batch_after_attaching_is_masked_as_before():
    plain, scored = tiny_model(), scoring_model()
    batch = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    assert torch.allclose(plain(**batch).logits[1], scored(**batch).logits[1])
    assert torch.allclose(plain(**batch).logits[0, 2:], scored(**batch).logits[0, 2:])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("attach_first", [True, False])
def test_lora_trains_its_matrices_and_disabling_it_gives_the_start_model(attach_first, task_type):
    from peft import LoraConfig, get_peft_model

    pack = pack_groups(mixed_groups(tiny_model()))
    with torch.no_grad():
        start = response_logps(scoring_model(), pack)
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type=task_type)
    wrapped = get_peft_model(scoring_model() if attach_first else tiny_model(), config)
    attach_scoring(wrapped)
    logps_R = response_logps(wrapped, pack)
    logps_R.sum().backward()
    grads = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert grads and all("lora_" in name for name in grads)
    assert not torch.allclose(logps_R, start)
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(response_logps(wrapped, pack), start)


def test_a_head_that_is_no_plain_linear_layer_is_refused():
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match="output head is a Sequential"):
        attach_scoring(model)


def test_unknown_back_end_is_refused():
    with pytest.raises(
        ValueError, match="unknown packed attention 'dense', expected one of auto, segments, flex, varlen"
    ):
        use_packed_attention(tiny_model(), "dense")


def test_image_tokens_without_tiles_stop_the_run(model):
    group = random_group(random.Random(0), 2, model.config.image_token_id)
    with pytest.raises(ValueError, match="2 <IMG_CONTEXT> tokens, the tiles give 0"):
        response_logps(model, pack_groups([Group(group.prompt_ids, group.responses, group.pairs, group.pair_ids)]))


def test_flex_block_mask_equals_the_dense_mask(model):
    from torch.nn.attention.flex_attention import create_mask

    layout = pack_groups(mixed_groups(model)).layout
    size, num_tokens = 1024, len(layout.visible_until_T)  # padded to a size that many packs share
    block_mask = flex_block_mask(layout)
    assert block_mask.shape == (1, 1, size, size)
    mask = create_mask(block_mask.mask_mod, None, None, size, size, device="cpu")[0, 0]
    assert torch.equal(mask[:num_tokens, :num_tokens], dense_mask(layout))
    assert not mask[num_tokens:].any() and not mask[:, num_tokens:].any()


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    """What flash-attn 2.1 and later documents: sequence by sequence, a causal mask aligned to the lower right."""
    assert q.ndim == k.ndim == v.ndim == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    outputs = []
    for i in range(len(cu_seqlens_q) - 1):
        queries = q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]].transpose(0, 1)
        keys, values = (
            x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]].transpose(0, 1).repeat_interleave(q.shape[1] // x.shape[1], 0)
            for x in (k, v)
        )
        num_queries, num_keys = queries.shape[1], keys.shape[1]
        assert num_queries <= max_seqlen_q and num_keys <= max_seqlen_k
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries if causal else num_keys)
        scores = (queries @ keys.transpose(1, 2)) * (softmax_scale or q.shape[-1] ** -0.5)
        outputs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@given(st.integers(0, 10**6), st.lists(st.tuples(st.just(0), st.integers(2, 6)), min_size=1, max_size=3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_varlen_attention_equals_segments(seed, shapes, scored_only):
    rng = random.Random(seed)
    layout = pack_groups([random_group(rng, tiles, 0, str(i), count) for i, (tiles, count) in enumerate(shapes)]).layout
    generator = torch.Generator().manual_seed(seed)
    num_tokens = len(layout.visible_until_T)
    query, key, value = (torch.randn(1, heads, num_tokens, 8, generator=generator).bfloat16() for heads in (4, 2, 2))
    stand_in = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    with unittest.mock.patch.dict(sys.modules, flash_attn=stand_in):
        varlen = varlen_attention(layout, query, key, value, 0.3, scored_only=scored_only)
    exact = segment_attention(layout, query.double(), key.double(), value.double(), 0.3, scored_only=scored_only)
    assert varlen.shape == exact.shape
    assert (varlen - exact).abs().max() < 0.06  # bfloat16 has 8 bits
    unread = torch.ones(num_tokens, dtype=torch.bool)
    unread[layout.scored_index_U] = False
    assert not scored_only or varlen[0, unread].abs().sum() == 0


def test_varlen_attention_carries_gradients_and_wants_half_precision(model):
    layout = pack_groups(mixed_groups(model)).layout
    heads = [torch.randn(1, 2, len(layout.visible_until_T), 4, requires_grad=True) for _ in range(3)]
    with unittest.mock.patch.dict(
        sys.modules, flash_attn=types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    ):
        with pytest.raises(ValueError, match=r"bfloat16 or float16, not torch\.float32"):
            varlen_attention(layout, *heads, None)
        varlen_attention(layout, *(head.bfloat16() for head in heads), None).float().square().sum().backward()
    varlen = [head.grad.clone() for head in heads]
    for head in heads:
        head.grad = None
    segment_attention(layout, *heads, None).square().sum().backward()
    for ours, exact in zip(varlen, [head.grad for head in heads], strict=True):
        assert (ours - exact).norm() / exact.norm() < 0.02


@pytest.mark.slow
def test_flex_attention_equals_segments():
    model = scoring_model().requires_grad_(False)  # FlexAttention has no backward pass on the CPU
    pack = pack_groups([*mixed_groups(model), Group([1] * 300, [[2] * 20, [3] * 30], [(0, 1)], ["long"])])
    segments = response_logps(model, pack)
    use_packed_attention(model, "flex")
    assert torch.allclose(response_logps(model, pack), segments, rtol=1e-5, atol=1e-4)


def _ddp_rank(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = scoring_model().train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    group = mixed_groups(model)[rank * 2]  # rank 0 has text only
    response_logps(wrapped, pack_groups([group])).sum().backward()
    results[rank] = torch.cat([p.grad.flatten() for p in model.parameters()]).tolist()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_averages_gradients_over_ranks_even_where_one_has_no_image():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_ddp_rank, (port, results), nprocs=2)
    model = scoring_model().train()
    groups = mixed_groups(model)
    (response_logps(model, pack_groups([groups[0], groups[2]])).sum() / 2).backward()
    alone = torch.cat([p.grad.flatten() for p in model.parameters()])
    for rank in range(2):
        assert (torch.tensor(results[rank]) - alone).norm() / alone.norm() < 1e-5


def test_without_token_weights_all_terms_share_one_sum(model):
    """Two equal sums would give equal losses and gradients that add up in another order, so other weights after it."""
    scores = score_pairs(model, pack_groups(mixed_groups(model)))
    assert scores.chosen is scores.whole_chosen
    assert scores.rejected is scores.whole_rejected
