"""Log-probs of the responses in a pack, without logits for the whole pack.

    attach_scoring(model)                       # once, before DDP or DeepSpeed wrap the model
    logps_E = token_logps(wrapped, pack)        # goes through wrapped(pack=pack), so gradient hooks work
    logps_R = pack.response_sums(logps_E)       # or pack.pair_sums, which knows weights of tokens

`attach_scoring` makes the model's own `forward` answer `model(pack=pack)` with the log-probs of the responses' tokens;
all other calls stay as they are, and so do parameter names, `save_pretrained` and `generate`. Because scoring is a call
of the outermost module, backward runs through the wrapper's hooks. Because the head is a module that owns its weight
and computes log-probs in its own `forward`, ZeRO-3 gathers the weight for it.

The head runs on the positions that predict a scored token only, a part of the vocabulary at a time, and again in the
backward pass: logits exist for one part and are never kept. The last layer leaves out what is not read. Letters as in
`packing.py`, and V for the vocabulary, D for the width.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from internvl_mpo.families.registry import family_of_model
from internvl_mpo.kernels.last_layer import trim_last_layer
from internvl_mpo.kernels.packed_attention import use_packed_attention
from internvl_mpo.kernels.scoring_head import ScoringHead
from internvl_mpo.packing import Group, Pack, unpack_groups


def attach_scoring(
    model: nn.Module, *, attention: str = "auto", trim: bool = True, plain_twin: bool = False
) -> nn.Module:
    """Teach a model to answer `model(pack=pack)` with log-probs; see the top of this file.

    Args:
        model: of any family of `families/`, or one with a LoRA adapter of peft.
        attention: back end for packs, see `use_packed_attention`.
        trim: leave out of the last layer what no scored token needs, see `last_layer.py`; the result is the same.
        plain_twin: score packs in the form of `twin_logps` instead, slow and with all logits, to compare with.

    Returns:
        The same model.

    Raises:
        ValueError: the output head is not a plain linear layer (leave it out of LoRA's targets), or the back end is
            unknown.
    """
    # LoRA lives inside the layers of the base model, and peft passes unknown arguments of forward on to it.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = family_of_model(base).decoder(base)
    use_packed_attention(decoder, attention)
    head = base.get_output_embeddings()
    if isinstance(head, ScoringHead):
        return model
    if type(head) is not nn.Linear:
        raise ValueError(f"the output head is a {type(head).__name__}; scoring needs a plain nn.Linear")
    base.set_output_embeddings(ScoringHead(head))
    if trim:
        trim_last_layer(decoder)
    plain_forward = base.forward

    @functools.wraps(plain_forward)
    def forward(
        *args: Any,
        pack: Pack | None = None,
        chunk_size: int | None = None,
        squares: bool = False,
        **kwargs: Any,
    ) -> Any:
        if pack is None:
            return plain_forward(*args, **kwargs)
        if plain_twin:
            return _twin_scores(base, pack, squares)
        return _score(base, pack, chunk_size, squares)  # kwargs: peft adds arguments of its own, all None

    base.forward = forward
    return model


def token_logps(model: nn.Module, pack: Pack, *, chunk_size: int | None = None) -> Tensor:
    """Return the log-prob of each token of each response of a pack, differentiable. Shape: (E,)

    Args:
        model: a model that went through `attach_scoring`, wrapped or not.
        pack: on the model's device.
        chunk_size: words of the vocabulary for which logits exist at a time; None chooses.

    Returns:
        float32, or float64 for a float64 model.
    """
    return model(pack=pack, chunk_size=chunk_size)


class PairScores(NamedTuple):
    """What the objective needs of the policy, for each pair of a pack.

    Attributes:
        chosen: log-probs of the chosen response, summed with the token weights of the pack. Shape: (P,)
        rejected: the same of the rejected one. Shape: (P,)
        whole_chosen: the same of the chosen one with all weights 1, for the generation term. Shape: (P,)
        whole_rejected: the same of the rejected one. Shape: (P,)
        chosen_likeness: how much the chosen response is one that the model would write, without gradient: the mean over
            its tokens of log p(token) - log sum over words v of p(v)^2; None if it was not asked for. Shape: (P,)
        rejected_likeness: the same of the rejected one. Shape: (P,)
    """

    chosen: Tensor
    rejected: Tensor
    whole_chosen: Tensor
    whole_rejected: Tensor
    chosen_likeness: Tensor | None = None
    rejected_likeness: Tensor | None = None


def score_pairs(model: nn.Module, pack: Pack, *, likeness: bool = False) -> PairScores:
    """Return all that a training step needs of one forward pass.

    Args:
        model: as in `token_logps`.
        pack: as in `token_logps`.
        likeness: also how much the responses are the model's own, for the weights of WPO.
    """
    logps_E, log_squares_E = model(pack=pack, squares=True) if likeness else (token_logps(model, pack), None)
    logps_R = pack.response_sums(logps_E)
    whole = logps_R[pack.chosen_index_P], logps_R[pack.rejected_index_P]
    # without weights the very same tensors: gradients add up in one order, whichever terms use them
    sums = [*(whole if pack.pair_tokens is None else pack.pair_sums(logps_E)), *whole]
    if likeness:
        likeness_R = pack.response_sums(logps_E.detach() - log_squares_E) / pack.lengths_R
        sums += [likeness_R[pack.chosen_index_P], likeness_R[pack.rejected_index_P]]
    return PairScores(*sums)


def response_logps(model: nn.Module, pack: Pack, *, chunk_size: int | None = None) -> Tensor:
    """Return the summed log-prob of each response of a pack. Shape: (R,)

    Args:
        model: as in `token_logps`.
        pack: as in `token_logps`.
        chunk_size: as in `token_logps`.
    """
    return pack.response_sums(token_logps(model, pack, chunk_size=chunk_size))


def pair_logps(model: nn.Module, pack: Pack, *, chunk_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the log-probs of chosen and rejected of each pair, summed with the token weights of the pack.

    Args:
        model: as in `token_logps`.
        pack: as in `token_logps`.
        chunk_size: as in `token_logps`.

    Returns:
        Shape: 2 x (P,)
    """
    return pack.pair_sums(token_logps(model, pack, chunk_size=chunk_size))


def _score(model: nn.Module, pack: Pack, chunk_size: int | None, squares: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of the tokens of all responses, with `squares` also log sum p^2 there. Shape: (E,) or 2 x (E,)"""
    hidden_TD = _trunk(model, pack)
    head = model.get_output_embeddings()
    options = {"chunk_size": chunk_size, "squares": squares}
    scores = head(hidden_TD[pack.predict_index_S], pack.target_ids_S, **options)
    # a plain tuple: ZeRO-3 takes outputs apart and could not put a named one together again
    return tuple(values_S[pack.entry_scored_E] for values_S in scores) if squares else scores[pack.entry_scored_E]


def _trunk(model: nn.Module, pack: Pack) -> Tensor:
    """Return the last hidden states of a pack, after the final norm. Shape: (T, D)"""
    family = family_of_model(model)
    embeds_1TD, further = family.embed(model, pack)
    # A ready 4-D mask is handed on as it is; with none, transformers would build a dense one from the positions.
    no_mask = torch.empty(1, 1, 1, 0, dtype=torch.bool, device=pack.input_ids.device)
    output = family.decoder(model)(
        inputs_embeds=embeds_1TD,
        position_ids=pack.position_ids,
        attention_mask=no_mask,
        pack_layout=pack.layout,
        use_cache=False,
        **further,
    )
    return output.last_hidden_state[0]


def twin_logps(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Return what `response_logps` returns for the pack of `groups`, the plain way. Shape: (R,)

    Every response is a padded sequence of its own that starts with the prompt and brings its own copy of the tiles, and
    all logits exist at once: the form of the original program with two responses, and the measure of the packed form.

    Args:
        model: of any family of `families/`; `attach_scoring` is not needed.
        groups: the groups of the pack, in order.
    """
    rows = [row for group in groups for row in _twin_group(model, group, squares=False)]
    return torch.stack([logps.sum() for (logps,) in rows])


def _twin_scores(model: nn.Module, pack: Pack, squares: bool) -> Tensor | tuple[Tensor, Tensor]:
    """What `_score` returns, the plain way."""
    rows = [row for group in unpack_groups(pack) for row in _twin_group(model, group, squares)]
    scores = tuple(torch.cat(values) for values in zip(*rows, strict=True))
    return scores if squares else scores[0]


def _twin_group(model: nn.Module, group: Group, squares: bool) -> list[tuple[Tensor, ...]]:
    """Log-probs of the tokens of every response, with `squares` also log sum p^2 there. Each has shape (tokens,)."""
    device = next(model.parameters()).device
    rows = [torch.tensor(group.prompt_ids + response) for response in group.responses]
    lengths_R = torch.tensor([len(row) for row in rows], device=device)
    input_ids_RL = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    place_L = torch.arange(input_ids_RL.shape[1], device=device)
    real_RL = place_L < lengths_R[:, None]
    family = family_of_model(model)
    inputs = family.forward_inputs(group, len(rows), device) | family.token_inputs(model, input_ids_RL)
    logits_RLV = model(input_ids=input_ids_RL, attention_mask=real_RL.long(), use_cache=False, **inputs).logits[:, :-1]
    if logits_RLV.dtype in (torch.float16, torch.bfloat16):
        logits_RLV = logits_RLV.float()
    logps_RLV = logits_RLV.log_softmax(-1)
    scores = [logps_RLV.gather(2, input_ids_RL[:, 1:, None])[..., 0]]
    if squares:
        scores.append((2 * logps_RLV.detach()).logsumexp(-1))
    before = len(group.prompt_ids) - 1
    places = [slice(before, before + len(response)) for response in group.responses]
    return [tuple(values_RL[row, place] for values_RL in scores) for row, place in enumerate(places)]
