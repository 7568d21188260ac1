"""The engine in this process for every other family: any `AutoModelForImageTextToText` model, batched.

LLaVA, Qwen2-VL, SmolVLM, native InternVL and the rest are asked through their own processor, chat template and
`generate`. The InternVL family has an engine of its own (`internvl_engine`), which runs a prompt once for all its
samples; this one runs it once per sample. Replies are drawn the same way, one uniform number per token from each
reply's own seed.
"""

import copy
import functools
import itertools
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    BatchFeature,
    LogitsProcessorList,
    ProcessorMixin,
    StoppingCriteria,
    StoppingCriteriaList,
)

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
from internvl_mpo.engines.revision import model_revision
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.native import NativeFamily, content_parts, load_native_processor
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.records import IMAGE_PLACEHOLDER


class ImageTextEngine:
    """Answers requests with any image-text model of transformers.

    Args:
        model_path: model folder or Hub id.
        device: "auto" (CUDA where there is one), or a torch device.
        dtype: "auto" (as the config says on CUDA, float32 elsewhere), or a torch dtype name.
        batch_size: replies generated at the same time.
        max_tiles: most crops of all pictures of a request together; docs/families.md says what that is to each family.
        trust_remote_code: run code inside the folder.
        four_bit: quantise the language model's weights while loading (bitsandbytes).

    Attributes:
        family: that of the model; None for models that are asked but not trained here.

    Raises:
        BadInputError: no such model or device, or the model has no chat template.
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
        self.max_tiles = max_tiles
        self.device = torch_device(device)
        wanted = torch_dtype(dtype, self.device)
        try:
            self.processor = load_native_processor(self.model_id, trust_remote_code)
            self.family = _family(self.processor)
            keep_wide = self.family.keep_wide if self.family else ("lm_head",)
            extra = four_bit_options(wanted, self.device, keep_wide) if four_bit else {}
            model = AutoModelForImageTextToText.from_pretrained(
                self.model_id, dtype=wanted, trust_remote_code=trust_remote_code, **extra
            )
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInputError(f"cannot load an image-text model from {self.model_id}: {reason}") from error
        if not getattr(self.processor, "chat_template", None):
            raise BadInputError(f"{self.model_id} has no chat template; give the folder of a chat model")
        self.model = (model if four_bit else model.to(self.device)).eval()
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._counting = threading.Lock()
        self.revision = model_revision(self.model_id)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.stop_ids = sorted({end for end in (*ends, self.tokenizer.eos_token_id) if end is not None})

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies batch by batch; see `Engine.generate`."""
        stream = iter(requests)
        while window := list(itertools.islice(stream, WINDOW)):
            for batch in self._batches(window):
                if all(request.id in done for request in batch):
                    continue
                yield from (reply for reply in self._answer(batch) if reply.id not in done)

    def render(
        self,
        question: str,
        num_images: int,
        prefix: str = "",
        history: Sequence[tuple[str, str]] = (),
        system: str | None = None,
    ) -> str:
        """Return the prompt as text; `<image>` marks where a picture goes, without marks they come first.

        Raises:
            ValueError: another number of marks than of pictures.
        """
        messages = chat_messages(question, num_images, history, system)
        marks = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
        if marks != num_images:
            raise ValueError(f"{marks} <image> placeholders for {num_images} pictures")
        messages = [{**message, "content": content_parts(message["content"])} for message in messages]
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + prefix
        except TemplateError as error:  # some families know no system message
            raise ValueError(f"the chat template of {self.model_id} refuses the conversation: {error}") from error

    def num_prompt_tokens(self, request: Request) -> int:
        """Return how many tokens a prompt has; see `InternVLEngine.num_prompt_tokens`."""
        text = self._text(request)
        with self._counting:
            num_tokens = count_tokens(self._counting_processor.tokenizer, text, self.context)
            if self.context is not None and num_tokens > self.context:
                return num_tokens
            pictures = [load_picture(image) for image in request.images]
            return self.inputs(self._counting_processor, [text], [pictures])["input_ids"].shape[1]

    @functools.cached_property
    def _counting_processor(self) -> ProcessorMixin:
        """A processor of its own, since one that pads a batch cannot be used by another thread meanwhile."""
        return copy.deepcopy(self.processor)

    def _text(self, request: Request) -> str:
        return self.render(request.question, len(request.images), request.prefix, request.history, request.system)

    def _batches(self, window: list[Request]) -> list[list[Request]]:
        """Requests of one sampler and number of pictures, long questions first."""
        kinds: dict[tuple[Sampling, int], list[Request]] = {}
        for request in window:
            kinds.setdefault((request.sampling, len(request.images)), []).append(request)
        batches: list[list[Request]] = []
        for rows in kinds.values():
            rows.sort(key=lambda request: -len(request.question) - len(request.prefix))
            batches += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        return batches

    def _answer(self, batch: list[Request]) -> list[Reply]:
        """Replies to one batch; a broken picture costs only its own request, lack of memory halves the batch."""
        replies: list[Reply] = []
        usable: list[tuple[Request, str, list[Image.Image]]] = []
        for request in batch:
            try:
                refuse_control_tokens(self.tokenizer, request)
                usable.append((request, self._text(request), [load_picture(image) for image in request.images]))
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                replies.append(Reply(id=request.id, error=str(error)))
        if not usable:
            return replies
        try:
            return replies + self._run(usable)
        except torch.OutOfMemoryError:
            if len(usable) == 1:
                return [*replies, Reply(id=usable[0][0].id, error="out of memory with a single request")]
        torch.cuda.empty_cache()
        requests = [request for request, _, _ in usable]
        half = len(requests) // 2
        return replies + self._answer(requests[:half]) + self._answer(requests[half:])

    @torch.inference_mode()
    def _run(self, rows: list[tuple[Request, str, list[Image.Image]]]) -> list[Reply]:
        requests, texts, pictures = zip(*rows, strict=True)
        sampling = requests[0].sampling
        inputs = self.inputs(self.processor, texts, pictures).to(self.device, self.model.dtype)
        prompt_ids = inputs["input_ids"]
        for request, ids in zip(requests, prompt_ids, strict=True):
            if request.draft:
                request.draft.begin(functools.partial(self._decode, ids.tolist(), prefix=request.prefix))
        output = self.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_k=None,
            top_p=None,
            logits_processor=LogitsProcessorList([SeededDraw([request.seed for request in requests], sampling)]),
            stopping_criteria=StoppingCriteriaList([_Drafts(requests, self.stop_ids)]),
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        output = output[:, prompt_ids.shape[1] :]
        return [self._reply(request, prompt_ids[row], output[row].tolist()) for row, request in enumerate(requests)]

    def inputs(
        self,
        processor: ProcessorMixin,
        texts: Sequence[str],
        pictures: Sequence[list[Image.Image]],
        max_tiles: int | None = None,
    ) -> BatchFeature:
        """Return prompts, padded on the left, and their pictures as the model takes them.

        Args:
            processor: of the model.
            texts: rendered prompts.
            pictures: those of each prompt, the same number for all.
            max_tiles: most crops of all pictures of a prompt together; None takes the engine's.
        """
        settings: dict[str, Any] = {}
        max_tiles = max_tiles or self.max_tiles
        if max_tiles and pictures[0]:
            share = max(1, max_tiles // len(pictures[0]))
            if self.family:
                settings = self.family.limits(processor, share)
            elif hasattr(processor.image_processor, "max_patches"):
                settings = {"max_patches": share}
        begins = self.tokenizer.bos_token is not None and texts[0].startswith(self.tokenizer.bos_token)
        return processor(
            text=list(texts),
            images=list(pictures) if pictures[0] else None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not begins,  # a template that writes the first token must not get another
            **settings,
        )

    def _decode(self, prompt_ids: list[int], words: list[int], prefix: str) -> str:
        return decode_reply(self.tokenizer, prompt_ids, words, prefix, skip_special_tokens=True)

    def _reply(self, request: Request, prompt_ids: torch.Tensor, output: list[int]) -> Reply:
        end = next((index for index, token in enumerate(output) if token in self.stop_ids), None)
        words = output if end is None else output[:end]
        text = self._decode(prompt_ids.tolist(), words, request.prefix)
        num_tokens = len(output) if end is None else end + 1
        reason = end_reason(request, end is not None)
        return Reply(id=request.id, text=text, finish_reason=reason, num_tokens=num_tokens)


def _family(processor: ProcessorMixin) -> NativeFamily | None:
    try:
        family = family_of_processor(processor)
    except BadInputError:
        return None
    return family if isinstance(family, NativeFamily) else None


class _Drafts(StoppingCriteria):
    """Adds each row's token to its draft, and ends rows that nobody waits for any more."""

    def __init__(self, requests: Sequence[Request], stop_ids: Sequence[int]):
        self.requests, self.stop_ids = requests, stop_ids
        self.ended = [False] * len(requests)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        for row, request in enumerate(self.requests):
            if request.draft and not self.ended[row]:
                token = int(input_ids[row, -1])
                self.ended[row] = token in self.stop_ids
                if not self.ended[row]:
                    request.draft.add(token)
                    self.ended[row] = request.draft.stopped.is_set()
        return torch.tensor(self.ended, device=input_ids.device)
