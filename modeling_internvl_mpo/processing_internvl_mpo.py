"""Chat template, image placeholders, text and images -> model inputs."""

from typing import Any

from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images

from .conversation_internvl_mpo import IMAGE_PLACEHOLDER, IMG_CONTEXT, IMG_END, IMG_START, get_conversation
from .image_processing_internvl_mpo import InternVLImageProcessor


class InternVLProcessor(ProcessorMixin):
    """Text with `<image>` placeholders and images in, tensors out.

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
    def from_config(cls, config: PreTrainedConfig, tokenizer: Any) -> "InternVLProcessor":
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
            ValueError: placeholders and images differ in number, or a text spells out an image token itself.
        """
        if text is None:
            raise ValueError("give text; for images alone use processor.image_processor")
        texts = [text] if isinstance(text, str) else list(text)
        nested = isinstance(images, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in images)
        if nested and len(images) != len(texts):
            raise ValueError(f"images has {len(images)} lists for {len(texts)} texts")
        groups = images if nested else None
        images = [] if images is None else make_flat_list_of_images(self.image_processor.fetch_images(images))
        for index, one in enumerate(texts):
            if IMG_CONTEXT in one:
                raise ValueError(
                    f"text {index} spells out {IMG_CONTEXT}; write {IMAGE_PLACEHOLDER} where an image goes"
                )
            if groups is not None and one.count(IMAGE_PLACEHOLDER) != len(groups[index]):
                raise ValueError(
                    f"text {index} has {one.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} placeholders "
                    f"and {len(groups[index])} images"
                )
        num_placeholders = sum(one.count(IMAGE_PLACEHOLDER) for one in texts)
        if num_placeholders != len(images):
            raise ValueError(
                f"the text has {num_placeholders} {IMAGE_PLACEHOLDER} placeholders and there are {len(images)} images"
            )
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
        return BatchFeature({**self.tokenizer(texts, **text_kwargs), **features})

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

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]
