"""Preference pairs of one question -> token ids and tiles.

Prompt and answers are tokenized as the model meets them when it generates: the prompt is what the processor makes of
the question, the answer goes on from the assistant header, and the end-of-turn token that the template writes after an
answer is scored with it. What cannot be trained on is refused with a `RowError` that names the pair.
"""

import functools
import hashlib
import io
from array import array
from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import ExifTags, Image

from internvl_mpo.families.contract import Family, Message, PictureCost
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.packing import Group, tree_tokens
from internvl_mpo.pictures import check_encodable, damage
from internvl_mpo.records import IMAGE_PLACEHOLDER, PreferencePair, RowError
from modeling_internvl_mpo.tokenization_internvl_mpo import find_control_token

_TOGETHER = 32  # texts given to the tokenizer in one call
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class Pictures(Protocol):
    """Pictures that are no files of their own: inside Parquet rows, or inside a release's archives.

    Attributes:
        version: differs when the pictures may differ.
    """

    version: str

    def read(self, name: str) -> bytes:
        """Return the file of a picture; a `RowError` says why there is none."""


@dataclass(frozen=True)
class GroupSize:
    """What a group costs, found without decoding pixels.

    Attributes:
        prompt_tokens: tokens of the prompt, image tokens included.
        response_tokens: scored tokens of each distinct response.
        tiles: tiles of all images.
        cut_responses: responses that lose their end to the length limit.
        num_tokens: tokens the group adds to a pack, as `Group.num_tokens` of the encoded group.
        response_keys: a number below 2 ** 56 for each distinct response, which tells it from others of the prompt.
    """

    prompt_tokens: int
    response_tokens: tuple[int, ...]
    tiles: int
    cut_responses: int
    num_tokens: int
    response_keys: tuple[int, ...]


def encode_group(
    processor: Any,
    pairs: Sequence[PreferencePair],
    image_root: str | Path | Pictures,
    *,
    max_tiles: int = 12,
    max_length: int = 6144,
) -> Group:
    """Encode pairs that share images and question.

    Args:
        processor: of the model, of any family.
        pairs: at least one; all with the same `group_key`.
        image_root: folder that image paths are relative to, or what reads them by these paths.
        max_tiles: most tiles of a single image, thumbnail not counted; several images share it, `max_tiles // n` each
            and at least one, as in the original program.
        max_length: longest prompt plus response in tokens; longer responses are cut.

    Returns:
        The group; equal responses of different pairs are one response.

    Raises:
        RowError: an image cannot be read, images and placeholders differ in number, a text spells out a control token,
            the prompt leaves no room for a response, a response is empty, or chosen and rejected are equal.
        ValueError: the pairs do not share images and question.
    """
    family = family_of_processor(processor)
    prompt, where = _rendered_prompt(family, processor, pairs)
    images = [_open(image_root, name, where) for name in pairs[0].images]
    try:
        encoded = family.encode(processor, prompt, images, _tiles_per_image(max_tiles, len(images)))
    except (ValueError, OSError) as error:
        raise RowError(f"the prompt cannot be encoded: {error}", where) from error
    finally:
        for image in images:
            image.close()
    check_room(len(encoded.ids), max_length, where)
    responses, indices, _ = _responses(family, processor, pairs, prompt, max_length - len(encoded.ids))
    return Group(
        encoded.ids,
        responses,
        indices,
        [pair.id for pair in pairs],
        encoded.tiles,
        image_inputs=encoded.image_inputs,
        positions=encoded.positions,
    )


def measure_group(
    processor: Any,
    pairs: Sequence[PreferencePair],
    image_root: str | Path | Pictures,
    *,
    max_tiles: int = 12,
    max_length: int = 6144,
    decode: bool = False,
) -> GroupSize:
    """Return the size `encode_group` would give, from image headers and text alone.

    Args:
        processor: as in `encode_group`.
        pairs: as in `encode_group`.
        image_root: as in `encode_group`.
        max_tiles: as in `encode_group`.
        max_length: as in `encode_group`.
        decode: also decode every image, which finds files that were cut off after the header.

    Raises:
        RowError: whatever `encode_group` would refuse; damage behind an image's header only with `decode`.
        ValueError: as in `encode_group`.
    """
    family = family_of_processor(processor)
    prompt, where = _rendered_prompt(family, processor, pairs)
    names = pairs[0].images
    options = {"num_images": len(names), "max_tiles": max_tiles, "decode": decode, "where": where}
    costs = [picture_cost(family, processor, name, image_root, **options) for name in names]
    prompt_tokens = len(family.tokenize(processor, short_prompt(family, processor, prompt, costs)))
    prompt_tokens += sum(cost.left_out for cost in costs)
    check_room(prompt_tokens, max_length, where)
    responses, _, num_cut = _responses(family, processor, pairs, prompt, max_length - prompt_tokens)
    num_tokens = prompt_tokens + tree_tokens(responses)
    keys = tuple(map(response_key, responses))
    num_tiles = sum(cost.num_tiles for cost in costs)
    return GroupSize(prompt_tokens, tuple(map(len, responses)), num_tiles, num_cut, num_tokens, keys)


def picture_cost(
    family: Family,
    processor: Any,
    name: str,
    image_root: str | Path | Pictures,
    *,
    num_images: int,
    max_tiles: int,
    decode: bool,
    where: str,
) -> PictureCost:
    """Return what a picture adds to its prompt, from its header.

    Args:
        family: of the processor.
        processor: as in `encode_group`.
        name: path of the picture.
        image_root: as in `encode_group`.
        num_images: pictures of the prompt.
        max_tiles: as in `encode_group`.
        decode: as in `measure_group`.
        where: names the pair in messages.

    Raises:
        RowError: the picture is missing or damaged, or refused by the processor.
    """
    with _open(image_root, name, where) as image:
        width, height = _upright_size(image)
        try:
            cost = family.picture_cost(processor, height, width, num_images, _tiles_per_image(max_tiles, num_images))
        except ValueError as error:
            raise RowError(f"the prompt cannot be encoded: {error}", where) from error
        try:
            check_encodable(image, decode=decode)
        except ValueError as error:
            raise RowError(f"image '{name}' cannot be decoded ({error})", where) from error
    return cost


def short_prompt(family: Family, processor: Any, prompt: str, costs: Sequence[PictureCost]) -> str:
    """Return a rendered prompt with its pictures in place, each run of picture tokens written as one token."""
    before, *after = prompt.split(family.placeholder(processor))
    return before + "".join(cost.text + text for cost, text in zip(costs, after, strict=True))


def pair_size(size: GroupSize) -> PairSize:
    """Return what step planning keeps of a pair.

    Args:
        size: of the pair alone, from `measure_group`.
    """
    chosen, rejected = size.response_tokens
    stem = size.prompt_tokens + chosen - 1 + rejected - 1 - size.num_tokens
    return PairSize(size.prompt_tokens, chosen, rejected, size.tiles, size.cut_responses, stem, *size.response_keys)


def response_key(response: Sequence[int]) -> int:
    """Return a number below 2 ** 56 that tells a response, as token ids, from others."""
    return int.from_bytes(hashlib.blake2b(array("q", response).tobytes(), digest_size=7).digest(), "big")


def _rendered_prompt(family: Family, processor: Any, pairs: Sequence[PreferencePair]) -> tuple[str, str]:
    """Return the rendered prompt, images not expanded, and the words that name the first pair in messages.

    Raises:
        RowError: a text spells out a control token, or pictures and their places differ in number.
        ValueError: as in `encode_group`.
    """
    if len(pairs) > 1 and len({pair.group_key for pair in pairs}) != 1:
        raise ValueError("a group needs pairs with the same images and question")
    first, where = pairs[0], f"pair {pairs[0].id}"
    messages = prompt_messages(processor.tokenizer, family.reserved(processor), first, where)
    prompt = family.render(processor, messages, add_generation_prompt=True)
    check_places(prompt, family.placeholder(processor), first, where)
    return prompt, where


def prompt_messages(tokenizer: Any, reserved: Iterable[str], pair: PreferencePair, where: str) -> list[Message]:
    """Return what stands before the answers of a pair as messages, `<image>` in the places of its pictures.

    Args:
        tokenizer: as in `check_text`.
        reserved: as in `check_text`.
        pair: the pair.
        where: names the pair in messages.

    Raises:
        RowError: a text spells out a control token, or pictures and their places differ in number.
    """
    turns = [*pair.history, (pair.question, "")]
    check_text(tokenizer, reserved, "system", pair.system or "", where)
    for asked, answer in turns:
        check_text(tokenizer, reserved, "question", asked, where)
        check_text(tokenizer, reserved, "history", answer, where)
    num_images, marks = len(pair.images), sum(asked.count(IMAGE_PLACEHOLDER) for asked, _ in turns)
    if num_images == 1 and not marks:
        turns[0] = f"{IMAGE_PLACEHOLDER}\n{turns[0][0]}", turns[0][1]
    elif marks != num_images:
        raise RowError(f"the question has {marks} {IMAGE_PLACEHOLDER} placeholders for {num_images} images", where)
    messages: list[Message] = [] if pair.system is None else [{"role": "system", "content": pair.system}]
    for asked, answer in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages[:-1]


def check_places(prompt: str, placeholder: str, pair: PreferencePair, where: str) -> None:
    """Refuse a rendered prompt in which a picture of its pair has no place."""
    if prompt.count(placeholder) != len(pair.images):
        raise RowError("the chat template does not keep every picture of the conversation", where)


def check_text(tokenizer: Any, reserved: Iterable[str], key: str, text: str, where: str) -> None:
    """Refuse a text that would be read as more than its words, or that is none.

    Args:
        tokenizer: its control tokens are refused.
        reserved: what stands for pictures, see `Family.reserved`; a question may hold `<image>`, other texts only where
            the family knows it for a word.
        key: of the text in its row.
        text: the text.
        where: names the pair in messages.

    Raises:
        RowError: naming the token.
    """
    if not text:
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half a surrogate pair (U+{ord(text[error.start]):04X})"
        raise RowError(f"'{key}' holds {half}, which is no text; leave it out", where) from error
    if key == "question":
        reserved = [mark for mark in reserved if mark != IMAGE_PLACEHOLDER]
    elif key in ("system", "history"):
        reserved = [*reserved, IMAGE_PLACEHOLDER]
    token = find_control_token(tokenizer, text) or next((mark for mark in reserved if mark in text), None)
    if token is not None:
        raise RowError(f"'{key}' spells out the control token {token}; take it out or spell it otherwise", where)


def _tiles_per_image(max_tiles: int, num_images: int) -> int:
    return max(1, max_tiles // max(1, num_images))


def _open(image_root: str | Path | Pictures, name: str, where: str) -> Image.Image:
    path = Path(image_root) / name if isinstance(image_root, (str, Path)) else name
    try:
        return Image.open(path if isinstance(path, Path) else io.BytesIO(image_root.read(name)))
    except RowError as error:
        raise RowError(error.reason, where) from error
    except FileNotFoundError as error:
        raise RowError(f"image '{path}' does not exist", where) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RowError(f"image '{path}' cannot be read ({damage(error)})", where) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation. A PNG keeps EXIF behind its pixels, so only a header entry counts there."""
    width, height = image.size
    if image.format == "PNG" and "exif" not in image.info:
        return width, height
    turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return (height, width) if turned else (width, height)


def check_room(num_tokens: int, max_length: int, where: str) -> None:
    """Refuse a prompt that leaves no room for a response."""
    if num_tokens >= max_length:
        raise RowError(f"the prompt has {num_tokens} tokens, no response fits below the limit of {max_length}", where)


def _responses(
    family: Family, processor: Any, pairs: Sequence[PreferencePair], prompt: str, room: int
) -> tuple[list[list[int]], list[tuple[int, int]], int]:
    """Tokenize the responses of all pairs.

    Args:
        family: of the processor.
        processor: as in `encode_group`.
        pairs: as in `encode_group`.
        prompt: the rendered prompt, images not expanded.
        room: tokens a response may have.

    Returns:
        Distinct responses, (chosen, rejected) indices of each pair, number of distinct responses that were cut.
    """
    answers = Answers(family, processor)
    header = answers.header(prompt)
    numbers: dict[tuple[int, ...], int] = {}
    num_cut = 0

    def number(text: str, side: str, where: str) -> int:
        nonlocal num_cut
        text = answers.plain(text, side, where)
        ids = answers.tokenize(header, [text])[0]
        kept = tuple(ids[:room])
        if kept not in numbers:
            numbers[kept] = len(numbers)
            num_cut += len(kept) < len(ids)
        return numbers[kept]

    indices = []
    for pair in pairs:
        where = f"pair {pair.id}"
        chosen = number(pair.chosen, "chosen", where)
        rejected = number(pair.rejected, "rejected", where)
        if chosen == rejected:
            raise RowError(f"chosen and rejected are equal in the {room} tokens that the length limit leaves", where)
        indices.append((chosen, rejected))
    return [list(ids) for ids in numbers], indices, num_cut


Tokenize = Callable[[Sequence[str]], list[MutableSequence[int]]]


class Answers:
    """Turns responses into the token ids that are scored, the end-of-turn token included."""

    def __init__(self, family: Family, processor: Any, ids: Tokenize | None = None):
        """Ask the chat template how it joins and ends an answer.

        Args:
            family: of the processor.
            processor: as in `encode_group`.
            ids: gives the ids of texts, no special tokens added; None for `token_ids`.
        """
        self.tokenizer, self.reserved = processor.tokenizer, family.reserved(processor)
        self.ids = ids or functools.partial(token_ids, self.tokenizer, add_special_tokens=False)
        self.turn = family.turn(processor)
        self.specials = list(self.tokenizer.all_special_tokens)
        self.endings = {self.tokenizer.convert_ids_to_tokens(self.turn.end_id), self.tokenizer.eos_token} - {None}

    def header(self, prompt: str) -> str:
        """Return the end of a rendered prompt that a response may merge with.

        A special token is a border that no merge crosses: what comes after the last one is all the context there is.
        """
        return prompt[max(prompt.rfind(token) for token in [*self.specials, prompt]) :]

    def plain(self, text: str, side: str, where: str) -> str:
        """Return a response as it is tokenized.

        Args:
            text: as in the pair.
            side: "chosen" or "rejected".
            where: names the pair in messages.

        Raises:
            RowError: it is empty, or spells out a control token.
        """
        text = _without_end(text.strip(), self.endings)
        if not text:
            raise RowError(f"'{side}' is empty", where)
        check_text(self.tokenizer, self.reserved, side, text, where)
        return self.turn.lead + text

    def tokenize(self, header: str, texts: Sequence[str]) -> list[MutableSequence[int]]:
        """Return the ids of each text after a header, uncut, with the end-of-turn token.

        Args:
            header: of their prompt.
            texts: from `plain`.
        """
        first = len(header_ids := self.ids([header])[0])
        found = self.ids([header + text for text in texts])
        for index, ids in enumerate(found):
            if ids[:first] == header_ids:
                del ids[:first]
            else:  # the text merges with the header, as a leading newline can; the model starts after the header
                (found[index],) = self.ids([texts[index]])
            found[index].append(self.turn.end_id)
        return found


def token_ids(tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return the ids of some texts, as `tokenizer(texts)` gives them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.padding is None and backend.truncation is None:
        # without offsets, which take as long again; few at once, so that encodings stay in the processor's cache
        batches = (texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER))
        encoded = (backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens) for batch in batches)
        return [encoding.ids for batch in encoded for encoding in batch]
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, return_attention_mask=False)["input_ids"]


def _without_end(text: str, endings: Iterable[str]) -> str:
    """Return a response without the one token that some data sets write after it; the encoder adds its own."""
    for ending in endings:
        if text.endswith(ending):
            return text.removesuffix(ending).rstrip()
    return text
