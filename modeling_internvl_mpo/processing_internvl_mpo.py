"""Chat template, image placeholders, text and images -> model inputs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoConfig, AutoTokenizer, BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.utils import cached_file

from .conversation_internvl_mpo import IMAGE_PLACEHOLDER, IMG_CONTEXT, IMG_END, IMG_START, get_conversation
from .image_processing_internvl_mpo import InternVLImageProcessor
from .tokenization_internvl_mpo import hub_arguments


class InternVLChatProcessor(ProcessorMixin):
    """Text with `<image>` placeholders and images in, tensors out.

    The name must differ from transformers' own `InternVLProcessor`: a saved folder is opened by it.

    Args:
        image_processor: an `InternVLImageProcessor`.
        tokenizer: any fast tokenizer whose vocabulary has `<img>`, `</img>` and `<IMG_CONTEXT>`.
        num_image_token: image tokens per tile.
        template: name of the conversation template.
        system_message: replaces the template's system message; None keeps it.
        chat_template: jinja text; None makes it from `template` and `system_message`.

    Raises:
        ValueError: the tokenizer lacks the image tokens, or the template is unknown.
    """

    def __init__(
        self,
        image_processor: InternVLImageProcessor,
        tokenizer: Any,
        num_image_token: int = 256,
        template: str = "internlm2-chat",
        system_message: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        if chat_template is None:
            chat_template = get_conversation(template).chat_template(system_message)
            if _first_token(tokenizer):  # serving engines add no token of their own to what a template writes
                chat_template = "{{- bos_token -}}\n" + chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in (IMG_START, IMG_END, IMG_CONTEXT) if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token {missing[0]}; add {IMG_START}, {IMG_END} and {IMG_CONTEXT}")
        self.num_image_token = num_image_token
        self.template = template
        self.system_message = system_message
        self.image_token = IMAGE_PLACEHOLDER
        self.image_token_id = vocabulary[IMG_CONTEXT]

    @classmethod
    def from_config(cls, config: PreTrainedConfig, tokenizer: Any) -> Self:
        """Build the processor that a model's config.json describes."""
        side = config.force_image_size
        image_processor = InternVLImageProcessor(
            size={"height": side, "width": side},
            dynamic_image_size=config.dynamic_image_size,
            min_dynamic_patch=config.min_dynamic_patch,
            max_dynamic_patch=config.max_dynamic_patch,
            use_thumbnail=config.use_thumbnail,
            pad2square=config.pad2square,
        )
        return cls(image_processor, tokenizer, config.num_image_token, config.template, config.system_message)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "InternVLChatProcessor":
        """Load a folder or Hub repository; an official one, which has no processor file, is read from config.json.

        Settings of the image processor among the keywords replace the saved ones. The parts are loaded by their
        classes: where torchvision is absent, AutoImageProcessor is not there in every
        version of transformers.
        """
        hub = hub_arguments(kwargs)
        where = {**hub, "trust_remote_code": kwargs.get("trust_remote_code")}

        def text_of(name: str) -> str | None:
            path = cached_file(pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **hub)
            return None if path is None else Path(path).read_text(encoding="utf-8")

        saved = text_of("processor_config.json")
        if saved is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **where)
            return cls.from_config(
                config, AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=config, **where)
            )
        settings = json.loads(saved)
        return cls(
            InternVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **where),
            chat_template=text_of("chat_template.jinja"),
            **{name: settings[name] for name in ("num_image_token", "template", "system_message") if name in settings},
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_num_tiles: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Expand placeholders and tokenize.

        Args:
            images: images in reading order over all texts (one, a list, or one list per text); None for text only.
            text: one text or several, with one `<image>` per image.
            return_num_tiles: also return `num_tiles`, the tiles of every image.
            **kwargs: settings of the image processor (`max_dynamic_patch`, ...), the others go to the tokenizer.
                `padding_side` is left unless given.

        Returns:
            `input_ids` and `attention_mask` (B, L), and `pixel_values` (I, 3, S, S) if there are images.

        Raises:
            ValueError: placeholders and images differ in number, a text spells out an image token itself, or
                truncation would cut image tokens off.
        """
        for name in ("videos", "audio"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"{name} is not taken; a video goes in as its frames, one image each")
        if text is None:
            raise ValueError("give text; for images alone use processor.image_processor")
        texts = [text] if isinstance(text, str) else list(text)
        is_nested = isinstance(images, (list, tuple)) and len(images) > 0
        is_nested = is_nested and all(isinstance(group, (list, tuple)) for group in images)
        groups = images if is_nested else None
        images = [] if images is None else make_flat_list_of_images(self.image_processor.fetch_images(images))
        _check_placeholders(texts, groups, len(images))
        names = set(self.image_processor._valid_kwargs_names) - {"return_tensors"}
        image_kwargs = {name: kwargs.pop(name) for name in names & set(kwargs)} | kwargs.pop("images_kwargs", {})
        text_kwargs = {"padding_side": "left", "return_token_type_ids": False} | kwargs.pop("text_kwargs", {}) | kwargs
        features: dict[str, Any] = {}
        if images:
            tiles = self.image_processor(images, **image_kwargs)
            features["pixel_values"] = tiles["pixel_values"]
            if return_num_tiles:
                features["num_tiles"] = tiles["num_tiles"]
            texts = self.expand_images(texts, tiles["num_tiles"].tolist())
        encoded = self.tokenizer(texts, **text_kwargs)
        if images:
            wanted = sum(one.count(IMG_CONTEXT) for one in texts)
            rows = encoded["input_ids"]
            rows = rows.tolist() if hasattr(rows, "tolist") else rows
            found = sum(row.count(self.image_token_id) for row in rows)
            if found != wanted:
                raise ValueError(
                    f"truncation cut {wanted - found} of {wanted} image tokens off; raise max_length or lower "
                    "max_dynamic_patch"
                )
        return BatchFeature({**encoded, **features})

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Render a conversation, or several, as transformers does.

        As text it comes without the first token that the template writes for serving engines, where this processor adds
        that by itself.
        """
        rendered, first = super().apply_chat_template(*args, **kwargs), _first_token(self.tokenizer)
        if isinstance(rendered, str):
            return rendered.removeprefix(first)
        if isinstance(rendered, list) and all(isinstance(text, str) for text in rendered):
            return [text.removeprefix(first) for text in rendered]
        return rendered

    def expand_images(self, texts: list[str], num_tiles: list[int]) -> list[str]:
        """Replace every `<image>` by `<img>`, its image tokens and `</img>`.

        Args:
            texts: texts with placeholders.
            num_tiles: tiles of every image, in reading order over all texts.
        """
        counts = iter(num_tiles)
        expanded = []
        for one in texts:
            first, *rest = one.split(IMAGE_PLACEHOLDER)
            spans = [IMG_START + IMG_CONTEXT * (self.num_image_token * next(counts)) + IMG_END for _ in rest]
            expanded.append(first + "".join(span + part for span, part in zip(spans, rest, strict=True)))
        return expanded

    def encode_conversation(
        self, messages: Sequence[tuple[str, str]], images: Any = None, **image_settings: Any
    ) -> BatchFeature:
        """Encode one whole conversation for training, with labels.

        Scored are the answers and the token that ends each of them, nothing else: not the role headers, not the
        newline that internvl2_5 puts after the end-of-turn token. A token that joins a header and an answer (an answer
        that starts with a newline) is not scored.

        Args:
            messages: (role, text) pairs, role "user" or "assistant", with one `<image>` per image.
            images: in reading order, or None.
            **image_settings: settings of the image processor.

        Returns:
            `input_ids`, `attention_mask`, `labels` (1, L), -100 where not scored, and `pixel_values` (I, 3, S, S) if
            there are images.

        Raises:
            ValueError: placeholders and images differ in number, or an unknown role.
        """
        conversation = get_conversation(self.template)
        text = conversation.render([], self.system_message)
        spans = []
        for role, message in messages:
            header, turn = conversation.render_turn(role, ""), conversation.render_turn(role, message)
            if role == "assistant" and message:
                spans.append((len(text) + len(header), len(text) + len(turn.rstrip("\n"))))
            text += turn
        features = self(images, text, return_num_tiles=True, return_tensors="pt", **image_settings)
        num_tiles = features.pop("num_tiles", torch.empty(0)).tolist()
        (expanded,) = self.expand_images([text], num_tiles)
        offsets = self.tokenizer(expanded, return_offsets_mapping=True)["offset_mapping"]
        scored = torch.zeros(len(offsets), dtype=torch.bool)
        for start, end in spans:
            # Placeholders before the answer were expanded; their number tells by how much it moved.
            (before,) = self.expand_images([text[:start]], num_tiles)
            start, end = len(before), len(before) + end - start
            inside = [start <= left < right <= end for left, right in offsets]
            scored |= torch.tensor(inside)
        labels = features["input_ids"].masked_fill(~scored, -100)
        return BatchFeature({**features, "labels": labels})

    @property
    def end_of_turn_id(self) -> int:
        """Id of the token that ends an answer."""
        return self.tokenizer.convert_tokens_to_ids(get_conversation(self.template).sep.strip())

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]


def _first_token(tokenizer: Any) -> str:
    """The token that a tokenizer puts in front of every text; "" if none, though `bos_token` may name one."""
    adds_it = tokenizer.bos_token and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds_it else ""


def _check_placeholders(texts: list[str], groups: Sequence[Sequence[Any]] | None, num_images: int) -> None:
    """Refuse texts whose placeholders do not fit the images, in all or (with one list per text) one by one."""
    if groups is not None and len(groups) != len(texts):
        raise ValueError(f"images has {len(groups)} lists for {len(texts)} texts")
    for index, text in enumerate(texts):
        if IMG_CONTEXT in text:
            raise ValueError(f"text {index} spells out {IMG_CONTEXT}; write {IMAGE_PLACEHOLDER} where an image goes")
        if groups is not None and text.count(IMAGE_PLACEHOLDER) != len(groups[index]):
            raise ValueError(
                f"text {index} has {text.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} placeholders "
                f"and {len(groups[index])} images"
            )
    num_placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if num_placeholders != num_images:
        raise ValueError(
            f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders and there are {num_images} images; "
            f"write {IMAGE_PLACEHOLDER} where each image goes, or give chat messages with the images in them"
        )
