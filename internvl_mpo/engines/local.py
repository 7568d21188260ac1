"""What engines in this process share: device, dtype, pictures, seeded draws, streaming."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BitsAndBytesConfig, LogitsProcessor, PreTrainedTokenizerBase

from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.pictures import EncodedPicture
from internvl_mpo.errors import BadInputError
from modeling_internvl_mpo.image_processing_internvl_mpo import to_rgb
from modeling_internvl_mpo.tokenization_internvl_mpo import find_control_token

# Requests looked at together when batches are formed: enough to sort by length, few enough to keep in memory.
WINDOW = 4096
_COUNTED_AT_ONCE = 1 << 16  # characters
_DRAWN_AHEAD = 64  # uniform numbers of a row that are drawn together


def draw_tokens(logits_RV: torch.Tensor, sampling: Sampling, uniform_R: torch.Tensor | None) -> torch.Tensor:
    """Return one token per row by inverting the cumulative distribution at a given uniform number.

    Args:
        logits_RV: (rows, vocabulary).
        sampling: temperature 0 takes the likeliest token.
        uniform_R: (rows,) numbers in [0, 1); unused for greedy.

    Returns:
        Token ids, (rows,).
    """
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
    k = min(sampling.top_k or logits_RV.shape[-1], logits_RV.shape[-1])
    values, ids = (logits_RV / sampling.temperature).topk(k, dim=-1)
    probs = values.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probs.cumsum(-1)
    target = uniform_R[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=k - 1)
    return ids.gather(-1, index).squeeze(-1)


class SeededDraw(LogitsProcessor):
    """Chooses the next token of every row: the likeliest, or one drawn from the row's own seed.

    A row uses one uniform number per token, so neither its neighbours nor the batch size choose its words. For a loop
    of one's own it is called by `next_tokens`; as a `LogitsProcessor` it leaves `generate` nothing else to choose.

    Args:
        seeds: R of them.
        sampling: how tokens are drawn.
        suppressed_V: True for ids that no reply may hold; None suppresses nothing.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling, suppressed_V: torch.Tensor | None = None):
        self._sampling, self._suppressed_V = sampling, suppressed_V
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds] if sampling.temperature else []
        self._uniform_RB = torch.empty(0)
        self._step = 0

    def next_tokens(self, logits_LV: torch.Tensor, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return the next token of L rows, (L,); `rows` are those that still live, None is all R.

        Every row has taken as many steps as the others, so this is called once per step.
        """
        logits_LV = logits_LV.float()
        if self._suppressed_V is not None:
            logits_LV = logits_LV.masked_fill(self._suppressed_V[: logits_LV.shape[-1]], float("-inf"))
        uniform_L = None
        if self._generators:
            column = self._step % _DRAWN_AHEAD
            if column == 0:  # a reply may have any length, so numbers are drawn as it grows
                drawn = [torch.rand(_DRAWN_AHEAD, generator=generator) for generator in self._generators]
                self._uniform_RB = torch.stack(drawn).to(logits_LV.device)
            uniform_R = self._uniform_RB[:, column]
            uniform_L = uniform_R if rows is None else uniform_R[list(rows)]
        self._step += 1
        return draw_tokens(logits_LV, self._sampling, uniform_L)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tokens_R = self.next_tokens(scores)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens_R[:, None], 0.0)


def torch_device(name: str) -> torch.device:
    """Return a device; "auto" is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def torch_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return a dtype; "auto" is what the config says on CUDA and float32 elsewhere.

    Raises:
        BadInputError: torch has no dtype of that name.
    """
    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadInputError(f"dtype is '{name}'; give auto, float32, bfloat16 or float16")
    return dtype


def four_bit_options(dtype: torch.dtype | str, device: torch.device, keep_wide: Sequence[str]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` for 4-bit weights.

    Args:
        dtype: of the arithmetic; "auto" is bfloat16.
        device: where the weights go.
        keep_wide: modules that stay as they are: tower, projector and head are small beside the language model and feel
            rounding most.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
        llm_int8_skip_modules=list(keep_wide),
    )
    return {"quantization_config": config, "device_map": {"": str(device)}}


def decode_reply(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], words: list[int], prefix: str, **settings: Any
) -> str:
    """Return a reply's text: stripped, or after a prefix with the space at the join as the model wrote it."""
    if not prefix:
        return tokenizer.decode(words, **settings).strip()
    # Tokenizers of the SentencePiece family drop the space before the first decoded word; decoding the last tokens of
    # the prefix with it keeps the join.
    tail = prompt_ids[-8:]
    before, both = tokenizer.decode(tail, **settings), tokenizer.decode(tail + words, **settings)
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(words, **settings)


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None) -> int:
    """Return the tokens of a text, exactly up to `most` (None is no limit); beyond it only that there are more.

    A text of a hundred megabytes costs no more than one that fits.
    """
    counted = 0
    for start in range(0, 0 if most is None else len(text), _COUNTED_AT_ONCE):
        counted += len(tokenizer(text[start : start + _COUNTED_AT_ONCE], add_special_tokens=False)["input_ids"])
        if counted > 2 * most:  # cutting the text moves the count by a token or two per piece, not by half
            return counted
    return len(tokenizer(text)["input_ids"])


def end_reason(request: Request, has_ended: bool) -> str:
    """Return why a reply ends: the model ended it, its reader stopped it, or it was cut."""
    if has_ended:
        return "stop"
    return "stopped" if request.draft and request.draft.stopped.is_set() else "length"


def refuse_control_tokens(tokenizer: PreTrainedTokenizerBase, request: Request) -> None:
    """Refuse a request that would be read as more than its words.

    Raises:
        ValueError: a text of it spells out a control token.
    """
    turns = [text for turn in request.history for text in turn]
    for text in (request.system or "", *turns, request.question, request.prefix):
        token = find_control_token(tokenizer, text)
        if token is not None:
            raise ValueError(f"the text spells out the control token {token}; take it out or spell it otherwise")


def load_picture(image: Any) -> Image.Image:
    """Return an RGB picture from a path, a file object, a PIL image or an `EncodedPicture`."""
    if isinstance(image, EncodedPicture):
        with image.open() as opened:
            return to_rgb(opened)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    with Image.open(image) as opened:
        return to_rgb(opened)
