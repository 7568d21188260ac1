"""The engine in this process: a model of the InternVL family on one device, batched.

A prompt is run once, pictures included, however many replies it gets: its keys and values are copied to as many rows
as there are samples. Rows that end leave the batch. Each reply is drawn from its own seed, one uniform number per
token, so neither its neighbours nor the batch size choose its words.

    prompts   P rows, left-padded        one forward with pictures
    rows      R >= P, row r continues prompt `parent[r]`
"""

import copy
import functools
import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from internvl_mpo.engines import Reply, Request, Sampling, chat_messages
from internvl_mpo.engines.local import (
    WINDOW,
    SeededDraw,
    count_tokens,
    decode_reply,
    end_reason,
    four_bit_options,
    load_picture,
    refuse_control_tokens,
    torch_device,
    torch_dtype,
)
from internvl_mpo.engines.pictures import picture_size
from internvl_mpo.engines.revision import model_revision
from internvl_mpo.errors import BadInputError
from internvl_mpo.records import IMAGE_PLACEHOLDER
from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel, InternVLChatProcessor
from modeling_internvl_mpo.tokenization_internvl_mpo import SPOKEN_TOKENS

_TURN_ENDS = ("<|im_end|>", "<|end|>", "<|endoftext|>", "</s>")
KEEP_WIDE = ("vision_model", "mlp1", "output", "lm_head")  # 4-bit loading leaves these alone
_IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")

Prompt = tuple[Any, ...]  # what two requests must share to be one prompt


class InternVLEngine:
    """Answers requests with a model loaded here.

    Args:
        model_path: model folder or Hub id.
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto" (as the config says on CUDA, float32 elsewhere), or a torch dtype name.
        batch_size: replies generated at the same time.
        max_tiles: most crops of all pictures of a request together; None keeps the model's own limit.
        trust_remote_code: run the model code inside the folder instead of ours, which serves every InternVL 2 and 2.5.
        four_bit: quantise the language model's weights while loading (bitsandbytes).

    Raises:
        BadInputError: the folder holds no model, or the device does not exist.
    """

    name = "transformers"

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 32,
        max_tiles: int | None = None,
        trust_remote_code: bool = False,
        four_bit: bool = False,
    ):
        self.model_id = str(model_path)
        self.batch_size = batch_size
        self.device = torch_device(device)
        wanted = torch_dtype(dtype, self.device)
        try:
            if trust_remote_code:
                self.processor = AutoProcessor.from_pretrained(self.model_id, trust_remote_code=True)
                model = AutoModel.from_pretrained(self.model_id, dtype=wanted, trust_remote_code=True)
            else:
                self.processor = load_internvl_processor(self.model_id)
                extra = four_bit_options(wanted, self.device, KEEP_WIDE) if four_bit else {}
                model = InternVLChatModel.from_pretrained(self.model_id, dtype=wanted, **extra)
        except (OSError, ValueError, ImportError) as error:
            raise BadInputError(f"cannot load a model from {self.model_id}: {str(error).splitlines()[0]}") from error
        self.model = (model if four_bit else model.to(self.device)).eval()
        self.revision = model_revision(self.model_id)
        self.max_tiles = max_tiles or self.processor.image_processor.max_dynamic_patch
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        vocab = self.tokenizer.get_vocab()
        self.context: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._counting = threading.Lock()
        self.stop_ids = self._stop_ids(vocab)
        self.suppressed = self._suppressed(vocab)

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies batch by batch; see `Engine.generate`."""
        stream = iter(requests)
        while window := list(itertools.islice(stream, WINDOW)):
            for batch in self._batches(window):
                if all(request.id in done for request in batch):
                    continue
                for reply in self._answer(batch):
                    if reply.id not in done:
                        yield reply

    def render(
        self,
        question: str,
        num_images: int,
        prefix: str = "",
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ) -> str:
        """Return the prompt as text, `<image>` placeholders unexpanded; `prefix` opens the assistant's turn."""
        messages = chat_messages(question, num_images, history, system)
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + prefix

    def _batches(self, window: list[Request]) -> list[list[Request]]:
        """Requests of like length side by side, longest first, all samples of a prompt together.

        A batch has one `Sampling` and one number of pictures per request, which decides how many tiles each may have.
        """
        kinds: dict[tuple[Sampling, int], dict[Prompt, list[Request]]] = {}
        for request in window:
            kind = kinds.setdefault((request.sampling, len(request.images)), {})
            kind.setdefault(_prompt(request), []).append(request)
        batches: list[list[Request]] = []
        for prompts in kinds.values():
            ordered = sorted(prompts.values(), key=lambda group: -self._length(group[0]))
            rows = [request for group in ordered for request in group]
            batches += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return batches

    def num_prompt_tokens(self, request: Request) -> int:
        """Return how many tokens a prompt has, its pictures included; exact as long as it fits into the context.

        May be called while `generate` runs in another thread.

        Raises:
            OSError, ValueError: a picture cannot be read, or the text does not have one `<image>` for each.
        """
        text = self._checked_text(request).replace(IMAGE_PLACEHOLDER, "<img></img>")
        with self._counting:
            return count_tokens(self._counting_tokenizer, text, self.context) + sum(self._picture_tokens(request))

    @functools.cached_property
    def _counting_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer of its own, since one that pads a batch cannot be used by another thread meanwhile."""
        return copy.deepcopy(self.tokenizer)

    def _length(self, request: Request) -> int:
        """About how many tokens the prompt has."""
        try:
            return len(self._text(request)) // 3 + sum(self._picture_tokens(request))
        except (OSError, Image.DecompressionBombError):
            return 0  # the request will fail by itself, with a reason

    def _picture_tokens(self, request: Request) -> list[int]:
        """Tokens of every picture of a request."""
        cutter, settings = self.processor.image_processor, self._tile_limit(len(request.images))
        sizes = [picture_size(image) for image in request.images]
        tiles = [cutter.get_number_of_image_patches(height, width, settings) for width, height in sizes]
        return [count * self.processor.num_image_token for count in tiles]

    def _tile_limit(self, num_images: int) -> dict[str, int]:
        """The setting of the processor by which all pictures of a request share `max_tiles`."""
        least = self.processor.image_processor.min_dynamic_patch
        return {"max_dynamic_patch": max(least, self.max_tiles // num_images)} if num_images else {}

    def _answer(self, batch: list[Request]) -> list[Reply]:
        """Replies to one batch; a broken picture costs only its own requests, lack of memory halves the batch."""
        replies: list[Reply] = []
        usable: list[Request] = []
        pictures: dict[Prompt, list[Image.Image]] = {}
        refused: dict[Prompt, str] = {}
        for request in batch:
            prompt = _prompt(request)
            if prompt not in pictures and prompt not in refused:
                try:
                    pictures[prompt] = self._pictures(request)
                except (OSError, ValueError, Image.DecompressionBombError) as error:
                    refused[prompt] = str(error)
            if prompt in refused:
                replies.append(Reply(id=request.id, error=refused[prompt]))
            else:
                usable.append(request)
        if usable:
            try:
                replies += self._run(usable, pictures)
            except torch.OutOfMemoryError:
                if len(usable) == 1:
                    replies.append(Reply(id=usable[0].id, error="out of memory with a single request"))
                else:
                    torch.cuda.empty_cache()
                    half = len(usable) // 2
                    replies += self._answer(usable[:half]) + self._answer(usable[half:])
        return replies

    def _pictures(self, request: Request) -> list[Image.Image]:
        """Load the pictures of a request.

        Raises:
            OSError, ValueError: a picture cannot be read, the text does not have one `<image>` for each, or it spells
                out a control token.
        """
        self._checked_text(request)
        return [load_picture(image) for image in request.images]

    def _checked_text(self, request: Request) -> str:
        refuse_control_tokens(self.tokenizer, request)
        text = self._text(request)
        if text.count(IMAGE_PLACEHOLDER) != len(request.images):
            raise ValueError(f"{text.count('<image>')} <image> placeholders for {len(request.images)} pictures")
        return text

    def _text(self, request: Request) -> str:
        return self.render(request.question, len(request.images), request.prefix, request.history, request.system)

    @torch.inference_mode()
    def _run(self, rows: list[Request], pictures: dict[Prompt, list[Image.Image]]) -> list[Reply]:
        firsts: dict[Prompt, Request] = {}
        for request in rows:
            firsts.setdefault(_prompt(request), request)
        prompts = list(firsts)
        inputs = self._inputs(list(firsts.values()), [pictures[prompt] for prompt in prompts])
        parent = torch.tensor([prompts.index(_prompt(request)) for request in rows], device=self.device)
        prompt_ids = inputs["input_ids"].tolist()
        prompt_ids = [prompt_ids[prompt] for prompt in parent.tolist()]
        for request, ids in zip(rows, prompt_ids, strict=True):
            if request.draft:
                request.draft.begin(functools.partial(decode_reply, self.tokenizer, ids, prefix=request.prefix))
        written = self._write(rows, inputs, parent)
        return [self._reply(*one) for one in zip(rows, prompt_ids, written, strict=True)]

    def _write(self, rows: list[Request], inputs: dict[str, torch.Tensor], parent: torch.Tensor) -> list[list[int]]:
        """Return the tokens of every row.

        Args:
            rows: R requests of one sampler.
            inputs: of P prompts, as the processor gives them.
            parent: (R,) the prompt each row continues.
        """
        cache = DynamicCache()
        mask = inputs.pop("attention_mask")
        position = mask.long().cumsum(-1).sub(1).clamp(min=0)
        logits = self._step(cache, mask, position, **inputs)
        cache.batch_select_indices(parent)
        logits, mask, position = logits[parent], mask[parent], position[parent, -1:]

        draw = SeededDraw([request.seed for request in rows], rows[0].sampling, self.suppressed)
        written: list[list[int]] = [[] for _ in rows]
        live = list(range(len(rows)))
        while True:
            tokens = draw.next_tokens(logits, live)
            for row, token in zip(live, tokens.tolist(), strict=True):
                written[row].append(token)
            keep = [index for index, row in enumerate(live) if self._goes_on(rows[row], written[row])]
            if not keep:
                return written
            if len(keep) < len(live):
                kept = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(kept)
                tokens, mask, position = tokens[kept], mask[kept], position[kept]
                live = [live[index] for index in keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            position = position + 1
            logits = self._step(cache, mask, position, input_ids=tokens[:, None])

    def _step(
        self, cache: DynamicCache, mask: torch.Tensor, position: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Run the model over what is new and return the logits of the next token, (rows, vocabulary)."""
        return self.model(
            **inputs,
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _goes_on(self, request: Request, written: list[int]) -> bool:
        """Show the last token to whoever reads along; return whether another one is wanted."""
        if written[-1] in self.stop_ids:
            return False
        if request.draft:
            request.draft.add(written[-1])
            if request.draft.stopped.is_set():
                return False
        return len(written) < request.sampling.max_new_tokens

    def _inputs(self, requests: list[Request], images: list[list[Image.Image]]) -> dict[str, torch.Tensor]:
        texts = [self._text(request) for request in requests]
        inputs = self.processor(
            text=texts,
            images=images if images[0] else None,
            padding=True,
            return_tensors="pt",
            **self._tile_limit(len(images[0])),
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return dict(inputs)

    def _reply(self, request: Request, prompt_ids: list[int], tokens: list[int]) -> Reply:
        has_ended = tokens[-1] in self.stop_ids
        text = decode_reply(self.tokenizer, prompt_ids, tokens[:-1] if has_ended else tokens, request.prefix)
        return Reply(id=request.id, text=text, finish_reason=end_reason(request, has_ended), num_tokens=len(tokens))

    def _stop_ids(self, vocab: dict[str, int]) -> list[int]:
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {vocab[token] for token in _TURN_ENDS if token in vocab}
        ids |= {self.tokenizer.eos_token_id} if self.tokenizer.eos_token_id is not None else set()
        ids |= set(configured) if isinstance(configured, list) else ({configured} if configured is not None else set())
        return sorted(ids)

    def _suppressed(self, vocab: dict[str, int]) -> torch.Tensor:
        """True for ids no reply may hold: control tokens, image tokens, and rows of the head beyond the vocabulary."""
        size = self.model.get_output_embeddings().weight.shape[0]
        suppressed = torch.zeros(size, dtype=torch.bool)
        suppressed[max(vocab.values()) + 1 :] = True
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens) | set(_IMAGE_TOKENS)
        for token in special - SPOKEN_TOKENS:
            if token in vocab:
                suppressed[vocab[token]] = True
        suppressed = suppressed.to(self.device)
        suppressed[self.stop_ids] = False
        return suppressed


def load_internvl_processor(model_path: str) -> InternVLChatProcessor:
    """Return the processor of a model; official folders have none, theirs is made from config.json."""
    try:
        return InternVLChatProcessor.from_pretrained(model_path)
    except OSError:
        config = InternVLChatConfig.from_pretrained(model_path)
        return InternVLChatProcessor.from_config(config, AutoTokenizer.from_pretrained(model_path))


def _prompt(request: Request) -> Prompt:
    # PIL images have no value to compare by; the same object is the same picture
    images = tuple(id(image) if isinstance(image, Image.Image) else image for image in request.images)
    return request.system, request.history, request.question, images, request.prefix
