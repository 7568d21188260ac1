"""One loaded model that continues conversations token by token, all rows of a batch at the same time.

    rows      R conversations, left-padded; row r may use the LoRA adapter or the bare base
    put       called by transformers once per step with the R new tokens

Every row draws from its own seed, as in every engine, so an answer does not depend on its neighbour.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from internvl_mpo.demo.conversation import Message
from internvl_mpo.demo.pictures import Cutter, hand_back_memory, open_pictures
from internvl_mpo.engines import Sampling
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.local import SeededDraw
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_model

BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


class ChatModel:
    """A model in the official InternVL layout, with or without a LoRA adapter; `FamilyChatModel` is one of any other.

    Args:
        path: model folder or Hub id.
        adapter: LoRA folder or Hub id; its weights are used for rows that ask for it.
        device: "auto" (CUDA where there is one, else the CPU), or a torch device.
        dtype: "auto" (as the config says on CUDA, float32 elsewhere), or a torch dtype name.
        four_bit: quantise the weights while loading (bitsandbytes).

    Raises:
        BadInputError: there is no model or adapter, or the device does not exist.
    """

    def __init__(
        self,
        path: str,
        *,
        adapter: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        four_bit: bool = False,
    ):
        _check_device(device)
        self.engine = self.load_engine(path, device=device, dtype=dtype, four_bit=four_bit)
        self.model, self.processor, self.tokenizer = self.engine.model, self.engine.processor, self.engine.tokenizer
        self.device, self.revision, self.stop_ids = self.engine.device, self.engine.revision, self.engine.stop_ids
        self.suppressed = getattr(self.engine, "suppressed", None)
        self.cutter = self.make_cutter(self.processor)
        self.peft = _attach(self.model, adapter) if adapter else None

    @staticmethod
    def load_engine(path: str, **options: Any) -> Any:
        """Return the engine whose model and processor are used here."""
        return InternVLEngine(path, **options)

    @staticmethod
    def make_cutter(processor: Any) -> Cutter:
        """Return how the processor cuts pictures."""
        return Cutter.of(processor)

    def generate(
        self,
        chats: Sequence[Sequence[Message]],
        *,
        sampling: Sampling,
        seed: int,
        max_tiles: int | None,
        adapters: Sequence[str] | None = None,
        put: Callable[[list[int]], None],
        stop: threading.Event,
    ) -> None:
        """Continue every conversation; return when all have ended, are long enough, or `stop` is set.

        Args:
            chats: R conversations, each ending with the user.
            sampling: how tokens are drawn.
            seed: the same for every row.
            max_tiles: most tiles of all pictures of a conversation together; None keeps the model's limit.
            adapters: per row "__base__" or "default"; None without an adapter.
            put: takes the R new tokens of a step; after a row has ended they mean nothing.
            stop: ends the generation after the step that is running.
        """
        inputs = self.inputs(chats, max_tiles, adapters)
        if any(message.images for chat in chats for message in chat):
            hand_back_memory()  # what the pictures took as pixels
        mixed = {"adapter_names": list(adapters)} if adapters else {}
        (self.peft or self.model).generate(
            **inputs,
            **mixed,
            do_sample=False,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.stop_ids[0],
            logits_processor=[SeededDraw([seed] * len(chats), sampling, self.suppressed)],
            streamer=_Steps(put),
            stopping_criteria=[_Stopped(stop)],
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, without the end of the turn."""
        return self.tokenizer.decode([token for token in tokens if not self.has_ended(token)]).strip()

    def has_ended(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        return token in self.stop_ids

    def inputs(
        self, chats: Sequence[Sequence[Message]], max_tiles: int | None, adapters: Sequence[str] | None
    ) -> dict[str, Any]:
        """Tokens of all rows; pictures are encoded once where all rows show the same."""
        texts, images = [], []
        for chat in chats:
            messages = [{"role": message.role, "content": message.text} for message in chat]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            images.append([picture for message in chat for picture in message.images])
        most = max(len(row) for row in images)
        settings = {"max_dynamic_patch": self.cutter.share(max_tiles, most)} if most else {}
        distinct = {id(picture): picture for row in images for picture in row}
        opened = dict(zip(distinct, open_pictures([*distinct.values()]), strict=True))
        inputs = self.processor(
            text=texts,
            images=[[opened[id(picture)] for picture in row] for row in images] if most else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **settings,
        ).to(self.device)
        pixels = inputs.pop("pixel_values", None)
        if pixels is not None:
            pixels = pixels.to(self.model.dtype)
            same = len(chats) > 1 and all([*map(id, row)] == [*map(id, images[0])] for row in images)
            inputs["visual_features"] = self._features(pixels, len(chats) if same else 1, adapters)
        return dict(inputs)

    @torch.no_grad()
    def _features(self, pixels: torch.Tensor, copies: int, adapters: Sequence[str] | None) -> torch.Tensor:
        """Tiles as the language model gets them, (I, N, C); `copies` rows show the same pictures.

        The adapters this package trains leave the vision tower alone, so both rows may share its work; one that does
        not would make them see differently, and is refused when it is loaded.
        """
        distinct = pixels[: len(pixels) // copies]
        if adapters:
            with self.peft.disable_adapter():
                features = self.model.extract_feature(distinct)
        else:
            features = self.model.extract_feature(distinct)
        return features.repeat(copies, 1, 1)


def _check_device(device: str) -> None:
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise BadInputError(f"device '{device}' is not there ({str(error).splitlines()[0]}); try auto") from error


def _attach(model: Any, adapter: str) -> Any:
    """Put a LoRA adapter beside the weights; the model itself answers as before wherever it is not asked for."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise BadInputError("an adapter needs peft; pip install 'internvl-mpo[demo]'") from error
    try:
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInputError(f"cannot load the adapter {adapter}: {str(error).splitlines()[0]}") from error
    family = family_of_model(model)
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_" in name]
    touched = [name for name in adapted if family.part_of(name) != "language model"]
    if touched:
        raise BadInputError(
            f"the adapter {adapter} changes {touched[0].split('.lora_')[0]}; only adapters on the language model can "
            "share one batch with the base, so merge it and give it as --mpo"
        )
    return wrapped


class _Steps(BaseStreamer):
    """Hands the tokens of each step on; the first call of transformers carries the prompt."""

    def __init__(self, put: Callable[[list[int]], None]):
        self._put, self._is_prompt = put, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            self._put(value.reshape(-1).tolist())

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """True for every row once the event is set."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._stop.is_set(), dtype=torch.bool, device=input_ids.device)
