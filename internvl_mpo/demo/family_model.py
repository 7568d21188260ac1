"""Models of transformers' own families in the demo, and which of the two kinds a folder or Hub id holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from internvl_mpo.demo.conversation import Message
from internvl_mpo.demo.generation import ChatModel
from internvl_mpo.demo.pictures import Cutter, Picture, open_pictures
from internvl_mpo.engines.image_text_engine import ImageTextEngine
from internvl_mpo.engines.internvl_engine import load_internvl_processor
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.contract import Family
from internvl_mpo.families.native import content_parts
from internvl_mpo.families.registry import family_of_processor, family_of_source
from internvl_mpo.records import IMAGE_PLACEHOLDER
from modeling_internvl_mpo.tokenization_internvl_mpo import find_control_token

MOST_TILES = 40  # what a visitor may ask for


class FamilyChatModel(ChatModel):
    """A model of any other family, asked through its own processor and chat template; see `ChatModel`."""

    @staticmethod
    def load_engine(path: str, **options: Any) -> ImageTextEngine:
        return ImageTextEngine(path, **options)

    @staticmethod
    def make_cutter(processor: Any) -> Cutter:
        return FamilyCutter.of(processor)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def inputs(
        self, chats: Sequence[Sequence[Message]], max_tiles: int | None, adapters: Sequence[str] | None
    ) -> dict[str, Any]:
        texts, pictures = [], []
        for chat in chats:
            messages = [{"role": message.role, "content": self._content(message)} for message in chat]
            texts.append(self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
            pictures.append(open_pictures([picture for message in chat for picture in message.images]))
        inputs = self.engine.inputs(self.processor, texts, pictures, max_tiles)
        return dict(inputs.to(self.device, self.model.dtype))

    def _content(self, message: Message) -> list[dict[str, str]]:
        """A message as the template takes it; only a visitor's marks are pictures.

        Raises:
            BadInputError: a text spells out a control token of this family.
        """
        is_visitor = message.role == "user"
        words = message.text.replace(IMAGE_PLACEHOLDER, "") if is_visitor else message.text
        reserved = family_of_processor(self.processor).reserved(self.processor)
        token = find_control_token(self.tokenizer, words) or next((one for one in reserved if one in words), None)
        if token is not None:
            raise BadInputError(
                f"the text spells out the control token {token}; take it out, or clear the conversation"
            )
        return content_parts(message.text) if is_visitor else [{"type": "text", "text": message.text}]


@dataclass(frozen=True)
class FamilyCutter(Cutter):
    """What pictures cost a family that is asked through its own processor; they are drawn whole.

    Attributes:
        processor: of the model.
        family: of the processor.
    """

    processor: Any = None
    family: Family | None = None

    @classmethod
    def of(cls, processor: Any) -> "FamilyCutter":
        """Return the cutter of a processor of transformers."""
        images = processor.image_processor
        most = getattr(images, "max_patches", None) or cls.max_tiles
        return cls(max_tiles=min(most, MOST_TILES), processor=processor, family=family_of_processor(processor))

    def describe(self, picture: Picture, limit: int) -> str:
        return "cut by the model's own processor"

    def num_tokens(self, picture: Picture, limit: int, num_images: int) -> int:
        cost = self.family.picture_cost(self.processor, picture.height, picture.width, num_images, limit)
        return cost.left_out + cost.text.count(self.processor.image_token)

    def draw(self, picture: Picture, limit: int, tile_pixels: int = 96, gap: int = 4) -> Image.Image:
        return picture.smaller(3 * tile_pixels, 3 * tile_pixels)


def load_chat_model(source: str, **options: Any) -> ChatModel:
    """Return the model of a folder or Hub id; options are those of `ChatModel`.

    Raises:
        BadInputError: there is none, or no family takes it.
    """
    kind = ChatModel if family_of_source(source).name == "internvl_chat" else FamilyChatModel
    return kind(source, **options)


def load_cutter(source: str) -> Cutter:
    """Return how a model cuts pictures, without loading its weights; InternVL2's way where there is no such model."""
    try:
        family = family_of_source(source)
        if family.name == "internvl_chat":
            return Cutter.of(load_internvl_processor(source))
        return FamilyCutter.of(family.load_processor(source))
    except (BadInputError, OSError, ValueError):
        return Cutter()
