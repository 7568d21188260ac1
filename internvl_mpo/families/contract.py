"""What a model family tells the trainer: one class a family, asked with a processor before training and a model in it.

    question, pictures   render -> prompt text, encode -> Prompt       picture_cost: the same sizes from headers alone
    pack                 embed -> embeddings with pictures in place    decoder: the layers a pack runs through
    parts of the model   parts, lora_targets                           what is frozen, adapted, shown in the table

A family knows nothing of pairs, packs' trees or losses. Letters: T tokens, I rows of pixels, A position axes, C width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from internvl_mpo.packing import Group, Pack

Message = Mapping[str, str]  # role and content; `<image>` in the content marks where a picture goes
Part = Literal["vision tower", "projector", "language model"]


@dataclass(frozen=True)
class Prompt:
    """A question as the model meets it.

    Attributes:
        ids: token ids, picture tokens included.
        tiles: pixels of all pictures in reading order, None without pictures. Shape: (I, ...)
        image_inputs: what the vision tower needs beside pixels, by the name of its argument; rows in reading order.
        positions: rotary positions of the prompt where they have several axes; None counts the tokens. Shape: (A, T)
    """

    ids: list[int]
    tiles: Tensor | None = None
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None


class PictureCost(NamedTuple):
    """What one picture puts into a prompt, found from its header.

    Attributes:
        text: what replaces its placeholder, each run of picture tokens written as one token.
        left_out: picture tokens that `text` lacks for it.
        num_tiles: rows of pixels (tiles, or patches where a family cuts no tiles).
    """

    text: str
    left_out: int
    num_tiles: int


class Turn(NamedTuple):
    """How an answer stands in the conversation.

    Attributes:
        lead: text between the prompt and the answer, mostly none.
        end_id: id of the token that closes the answer.
    """

    lead: str
    end_id: int


class Family(ABC):
    """One family of image-text models; see the top of this file.

    Attributes:
        name: as messages and docs/families.md write it.
        model_types: values of `model_type` in config.json.
        processors: names of processor classes.
        parts: module paths of each part; of two that fit a parameter the longer one counts.
        keep_wide: modules that 4-bit loading leaves alone, by their path in the model.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    processors: ClassVar[tuple[str, ...]]
    parts: ClassVar[Mapping[Part, tuple[str, ...]]]
    keep_wide: tuple[str, ...]

    # --- before anything heavy ----------------------------------------------------------------------------------------

    def check_config(self, config: Mapping[str, Any]) -> None:  # noqa: B027 - most families take every checkpoint
        """Refuse what a pack cannot serve, from config.json alone.

        Raises:
            BadInputError: naming it and the reason.
        """

    @abstractmethod
    def load_processor(self, source: str) -> Any:
        """Return the processor of a folder or Hub id; torchvision is not needed."""

    # --- a question becomes a prompt ----------------------------------------------------------------------------------

    @abstractmethod
    def placeholder(self, processor: Any) -> str:
        """Return what `render` writes where a picture goes."""

    @abstractmethod
    def reserved(self, processor: Any) -> tuple[str, ...]:
        """Return the tokens that stand for pictures, which no question and no answer may spell out."""

    def render(self, processor: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return a conversation as text, one `placeholder` for each picture."""
        return self.render_all(processor, [messages], add_generation_prompt=add_generation_prompt)[0]

    @abstractmethod
    def render_all(
        self, processor: Any, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool
    ) -> list[str]:
        """Return what `render` gives for each conversation, with one call of the processor."""

    def tokenize(self, processor: Any, text: str) -> list[int]:
        """Return the token ids of a prompt, with whatever the tokenizer puts before it."""
        return list(processor.tokenizer(text, add_special_tokens=self.adds_specials(processor, text))["input_ids"])

    def adds_specials(self, processor: Any, text: str) -> bool:
        """Return whether the tokenizer puts its own tokens before a prompt."""
        return True

    @abstractmethod
    def encode(self, processor: Any, prompt: str, images: Sequence[Image.Image], max_tiles: int) -> Prompt:
        """Tokenize a rendered prompt and cut its pictures.

        Args:
            processor: of the family.
            prompt: what `render` gives.
            images: one for each placeholder, opened from their files.
            max_tiles: tiles that one picture may have.

        Raises:
            ValueError: from the processor, which refuses text or pictures.
            OSError: from PIL, for pixels that cannot be decoded.
        """

    @abstractmethod
    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        """Return what a picture of an upright size adds to a prompt with `num_images` pictures; no pixels are read.

        Raises:
            ValueError: from the processor, for shapes that it refuses.
        """

    @abstractmethod
    def cost_settings(self, processor: Any) -> tuple[Any, ...]:
        """Return the settings, beside tokenizer and chat template, that the length of a prompt depends on."""

    def turn(self, processor: Any) -> Turn:
        """Return how the chat template joins an answer to its prompt, and ends it.

        Raises:
            ValueError: the template writes nothing after an answer.
        """
        asked = [{"role": "user", "content": "a question"}]
        answered = [*asked, {"role": "assistant", "content": "the answer"}]
        prompt = self.render(processor, asked, add_generation_prompt=True)
        whole = self.render(processor, answered, add_generation_prompt=False)
        before, _, closing = whole.rpartition("the answer")
        if not closing:
            raise ValueError("the chat template writes nothing after an answer, so its end cannot be learned")
        end_id = processor.tokenizer(closing, add_special_tokens=False)["input_ids"][0]
        return Turn(before[len(prompt) :] if before.startswith(prompt) else "", end_id)

    # --- the model ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def load_config(self, source: str) -> Any:
        """Return the configuration of a folder or Hub id."""

    @abstractmethod
    def load_model(self, source: str, **options: Any) -> nn.Module:
        """Return the model of a folder or Hub id; options are those of `from_pretrained`."""

    @abstractmethod
    def build(self, config: Any) -> nn.Module:
        """Return a model of a configuration, with weights as torch makes them."""

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        """Return blank pictures for a memory estimate, and how many picture tokens they make.

        Args:
            config: of the model.
            num_rows: rows of pixels wanted; None fills the tokens.
            num_tokens: picture tokens there may be.

        Returns:
            A prompt without ids, and its picture tokens.

        Raises:
            ValueError: the family has no estimate.
        """
        raise ValueError(f"memory is not calculated for {self.name} models yet")

    @abstractmethod
    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the decoder layers with their final norm: `layers`, called with `inputs_embeds`."""

    @abstractmethod
    def vision_tower(self, model: nn.Module) -> nn.Module:
        """Return the vision tower."""

    def unread(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """Return modules that no log-prob depends on; they are not trained and get no adapters."""
        return ()

    @abstractmethod
    def embed(self, model: nn.Module, pack: Pack) -> tuple[Tensor, dict[str, Any]]:
        """Return the embeddings of a pack, pictures in place, and further arguments of the decoder. Shape: (1, T, C)

        Where ranks share the work, the vision tower runs for a pack without pictures as well: ZeRO-2 and ZeRO-3 pair
        up collectives by their order.
        """

    @abstractmethod
    def forward_inputs(self, group: Group, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """Return the picture arguments of the model's own forward for the prompt of a group, repeated `num_rows` times.

        Arguments that follow the tokens (Qwen's `mm_token_type_ids`) come from `token_inputs`.
        """

    def token_inputs(self, model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model's own forward that follow the tokens. Shape of each: that of `input_ids`"""
        return {}

    @abstractmethod
    def tower_width(self, model: nn.Module) -> int:
        """Return the width of the vision tower's attention, summed over its layers; for counting arithmetic."""

    @abstractmethod
    def tower_runs(self, model: nn.Module, pack: Pack) -> list[tuple[int, float]]:
        """Return, for each sequence the vision tower attends over, its tokens and how many each of them sees."""

    def saved_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return weights of a model under the names and in the shapes that `save_pretrained` writes."""
        return weights

    @abstractmethod
    def lora_targets(self, model: nn.Module, part: Part) -> str:
        """Return a regular expression for the names of the linear layers of a part that adapters go to."""

    def part_of(self, name: str) -> Part | None:
        """Return the part that a parameter of the model belongs to."""
        fits = [(len(path), part) for part, paths in self.parts.items() for path in paths if path in f".{name}"]
        return max(fits)[1] if fits else None
