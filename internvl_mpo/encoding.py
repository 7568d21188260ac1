"""Preference pairs of one question -> token ids and tiles.

Prompt and answers are tokenized as the model meets them when it generates: the prompt is what the processor makes of
the question, the answer goes on from the assistant header, and the end-of-turn token that the template writes after an
answer is scored with it. What cannot be trained on is refused with a `RowError` that names the pair.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import ExifTags, Image

from internvl_mpo.families.contract import Family
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.packing import Group, tree_tokens
from internvl_mpo.records import IMAGE_PLACEHOLDER, PreferencePair, RowError

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
    """

    prompt_tokens: int
    response_tokens: tuple[int, ...]
    tiles: int
    cut_responses: int
    num_tokens: int


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
        RowError: an image cannot be read, images and placeholders differ in number, the prompt leaves no room for a
            response, a response is empty, or chosen and rejected are equal.
        ValueError: the pairs do not share images and question.
    """
    family = family_of_processor(processor)
    question, where = _question(pairs)
    prompt = _render(family, processor, question, len(pairs[0].images), where)
    images = [_open(image_root, name, where) for name in pairs[0].images]
    try:
        encoded = family.encode(processor, prompt, images, _tiles_per_image(max_tiles, len(images)))
    except (ValueError, OSError) as error:
        raise RowError(f"the prompt cannot be encoded: {error}", where) from error
    finally:
        for image in images:
            image.close()
    _check_room(len(encoded.ids), max_length, where)
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
    question, where = _question(pairs)
    prompt = _render(family, processor, question, len(pairs[0].images), where)
    limit = _tiles_per_image(max_tiles, len(pairs[0].images))
    costs = []
    for name in pairs[0].images:
        with _open(image_root, name, where) as image:
            width, height = _upright_size(image)
            try:
                costs.append(family.picture_cost(processor, height, width, len(pairs[0].images), limit))
            except ValueError as error:
                raise RowError(f"the prompt cannot be encoded: {error}", where) from error
            if decode:
                try:
                    image.load()
                except (OSError, SyntaxError, ValueError) as error:
                    raise RowError(f"image '{name}' cannot be decoded ({error})", where) from error
    before, *after = prompt.split(family.placeholder(processor))
    bare = before + "".join(cost.text + text for cost, text in zip(costs, after, strict=True))
    prompt_tokens = len(family.tokenize(processor, bare)) + sum(cost.left_out for cost in costs)
    _check_room(prompt_tokens, max_length, where)
    responses, _, num_cut = _responses(family, processor, pairs, prompt, max_length - prompt_tokens)
    num_tokens = prompt_tokens + tree_tokens(responses)
    num_tiles = sum(cost.num_tiles for cost in costs)
    return GroupSize(prompt_tokens, tuple(map(len, responses)), num_tiles, num_cut, num_tokens)


def pair_size(pair: PreferencePair, size: GroupSize) -> PairSize:
    """Return what step planning keeps of a pair.

    Args:
        pair: the pair.
        size: of the pair alone, from `measure_group`.
    """
    chosen, rejected = size.response_tokens
    stem = size.prompt_tokens + chosen - 1 + rejected - 1 - size.num_tokens
    keys = _key(pair.chosen), _key(pair.rejected)
    return PairSize(size.prompt_tokens, chosen, rejected, size.tiles, size.cut_responses, stem, *keys)


def _key(response: str) -> int:
    """A number below 2 ** 56 that tells responses apart."""
    return int.from_bytes(hashlib.blake2b(response.strip().encode(), digest_size=7).digest(), "big")


def _question(pairs: Sequence[PreferencePair]) -> tuple[str, str]:
    """Return the question with one placeholder per image, and the words that name the first pair in messages."""
    if len({pair.group_key for pair in pairs}) != 1:
        raise ValueError("a group needs pairs with the same images and question")
    first, where = pairs[0], f"pair {pairs[0].id}"
    question, num_images = first.question, len(first.images)
    if num_images == 1 and IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n{question}"
    marks = question.count(IMAGE_PLACEHOLDER)
    if marks != num_images:
        raise RowError(f"the question has {marks} {IMAGE_PLACEHOLDER} placeholders for {num_images} images", where)
    return question, where


def _render(family: Family, processor: Any, question: str, num_images: int, where: str) -> str:
    """Return the prompt as text, with one placeholder of the family for each picture."""
    prompt = family.render(processor, [{"role": "user", "content": question}], add_generation_prompt=True)
    for token in family.reserved(processor):
        if prompt.count(token) != (num_images if token == family.placeholder(processor) else 0):
            raise RowError(f"the question spells out {token}, which stands for pictures", where)
    return prompt


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
        raise RowError(f"image '{path}' cannot be read ({error})", where) from error


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation. A PNG keeps EXIF behind its pixels, so only a header entry counts there."""
    width, height = image.size
    if image.format == "PNG" and "exif" not in image.info:
        return width, height
    turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
    return (height, width) if turned else (width, height)


def _check_room(num_tokens: int, max_length: int, where: str) -> None:
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
    tokenizer = processor.tokenizer
    turn = family.turn(processor)
    # A special token is a border that no merge crosses: what comes after the last one is all the context there is.
    header = prompt[max(prompt.rfind(token) for token in [*tokenizer.all_special_tokens, prompt]) :]
    header_ids = tokenizer(header, add_special_tokens=False)["input_ids"]
    reserved = set(tokenizer.convert_tokens_to_ids(list(family.reserved(processor))))
    numbers: dict[tuple[int, ...], int] = {}
    num_cut = 0

    def number(text: str, side: str, where: str) -> int:
        nonlocal num_cut
        if not text:
            raise RowError(f"'{side}' is empty", where)
        text = turn.lead + text
        ids = tokenizer(header + text, add_special_tokens=False)["input_ids"]
        if ids[: len(header_ids)] == header_ids:
            ids = ids[len(header_ids) :]
        else:  # the text merges with the header, as a leading newline can; the model starts after the header
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not reserved.isdisjoint(ids):
            raise RowError(f"'{side}' spells out the image token", where)
        kept = (*ids, turn.end_id)[:room]
        if kept not in numbers:
            numbers[kept] = len(numbers)
            num_cut += len(kept) < len(ids) + 1
        return numbers[kept]

    indices = []
    for pair in pairs:
        where = f"pair {pair.id}"
        chosen = number(pair.chosen.strip(), "chosen", where)
        rejected = number(pair.rejected.strip(), "rejected", where)
        if chosen == rejected:
            raise RowError(f"chosen and rejected are equal in the {room} tokens that the length limit leaves", where)
        indices.append((chosen, rejected))
    return [list(ids) for ids in numbers], indices, num_cut
