"""Uploads in, checked pictures out; and how a picture is cut into tiles, drawn and counted."""

import base64
import binascii
import contextlib
import ctypes
import io
import math
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from internvl_mpo.engines.pictures import FORMATS, upright_size
from internvl_mpo.errors import BadInputError
from modeling_internvl_mpo.image_processing_internvl_mpo import best_grid, to_rgb

THUMBNAIL_PIXELS = 480
EDGE = "#8a94a3"  # of a drawn tile: to be seen on white and on black
# How many times `max_pixels` a picture may have, to be made smaller: a photo of 48 megapixels is common, and tiles are
# smaller. Only JPEG is decoded small; other formats are whole in memory, WebP four times.
SHRUNK = {"JPEG": 2.0, "WEBP": 0.5}
SHRUNK_OTHERS = 1.5
LARGE = 4_000_000  # pixels; of pictures above it one is decoded at a time, since each takes up to 200 MB meanwhile
STRIP = 128  # rows
FELT = 1_000_000  # pixels; above it the memory they took is handed back
MOST_FOR_A_MODEL = 25_000_000  # pixels of one conversation; 100 MB of memory
_OPENING, _DECODING = threading.Lock(), threading.Lock()
# Two visitors who upload the same file share its place on the disk, which the first question empties.
_TAKEN: weakref.WeakValueDictionary[str, "Picture"] = weakref.WeakValueDictionary()
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


@dataclass(frozen=True)
class Limits:
    """What a visitor may send: bytes and pixels of one picture, pictures of one conversation.

    A picture of more pixels is made smaller, one of more than `SHRUNK` times as many is refused before it is decoded.
    """

    max_bytes: int = 10 << 20
    max_pixels: int = 25_000_000
    max_images: int = 8


@dataclass(frozen=True)
class Picture:
    """A picture held in memory: PNG without any metadata, upright, 8-bit RGB.

    Attributes:
        png: the file.
        width, height: in pixels.
        sent: width and height it came with, if it was made smaller.
    """

    png: bytes
    width: int
    height: int
    sent: tuple[int, int] | None = None

    def open(self) -> Image.Image:
        """Return the pixels."""
        return Image.open(io.BytesIO(self.png))

    def smaller(self, width: int, height: int) -> Image.Image:
        """Return the pixels, shrunk to fit into so many where they are more."""
        with decoding(self.width * self.height):
            image = self.open()
            image.thumbnail((width, height))
            return image

    def thumbnail(self, pixels: int = THUMBNAIL_PIXELS) -> str:
        """Return a small copy as a data URI; small pictures are enlarged in whole steps, so that they can be seen."""
        image = self.smaller(pixels, pixels)
        if max(image.size) < 160:
            times = 160 // max(image.size) + 1
            image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        return data_uri(image)


def open_pictures(pictures: Sequence[Picture]) -> list[Image.Image]:
    """Return the pixels of a conversation's pictures, in order.

    Those of more than `MOST_FOR_A_MODEL` pixels together are made smaller first, one after the other: several pictures
    share the model's tiles, so each has room for far fewer.
    """
    if sum(picture.width * picture.height for picture in pictures) <= MOST_FOR_A_MODEL:
        return [picture.open() for picture in pictures]
    share = MOST_FOR_A_MODEL / len(pictures)
    scales = [min(1.0, (share / (picture.width * picture.height)) ** 0.5) for picture in pictures]
    return [
        picture.smaller(max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        for picture, scale in zip(pictures, scales, strict=True)
    ]


def read_picture(content: bytes, name: str, limits: Limits) -> Picture:
    """Check a picture and return it upright, in RGB, without metadata (a photo's place and time stay with its owner).

    Size and format are read from the header before any pixel is decoded.

    Raises:
        BadInputError: it is too large, damaged, or no picture at all.
    """
    if len(content) > limits.max_bytes:
        raise BadInputError(f"{name} has {len(content) / 2**20:.1f} MB; at most {limits.max_bytes / 2**20:g} MB please")
    try:
        with _unlimited_header(content) as opened:
            width, height = opened.size
            most = limits.max_pixels * SHRUNK.get(opened.format, SHRUNK_OTHERS)
        if width * height > most:
            raise BadInputError(
                f"{name} is too large: {width:,} x {height:,} pixels; at most {most / 1e6:g} megapixels please"
            )
        with decoding(width * height):
            return _decoded(content, limits.max_pixels)
    except BadInputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{name} is no picture that can be read; PNG, JPEG, WebP, GIF and BMP are") from error


def _decoded(content: bytes, max_pixels: int) -> Picture:
    """A file as a picture of at most so many pixels."""
    with _unlimited_header(content) as opened:
        sent = upright_size(opened) if opened.width * opened.height > max_pixels else None
        image = _shrunk(opened, max_pixels) if sent else to_rgb(opened)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return Picture(buffer.getvalue(), *image.size, sent)


def _shrunk(opened: Image.Image, max_pixels: int) -> Image.Image:
    """An opened file upright, in RGB, at a half (a third..) of its size, the first that has at most so many pixels.

    Made from strips: as RGB the whole would be in memory a second time.
    """
    factor = math.ceil((opened.width * opened.height / max_pixels) ** 0.5)
    opened.draft("RGB", (opened.width // factor, opened.height // factor))  # JPEG is decoded at half or a quarter
    factor = math.ceil((opened.width * opened.height / max_pixels) ** 0.5)
    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    small = Image.new("RGB", (-(-opened.width // factor), -(-opened.height // factor)))
    for top in range(0, small.height, STRIP):
        strip = opened.crop((0, top * factor, opened.width, min((top + STRIP) * factor, opened.height)))
        strip.info.clear()  # else each strip would be turned
        small.paste(to_rgb(strip).reduce(factor), (0, top))
    small.getexif()[ExifTags.Base.Orientation] = orientation
    return to_rgb(small)


@contextlib.contextmanager
def decoding(num_pixels: int) -> Iterator[None]:
    """A block in which a picture is in memory as pixels: large ones wait for each other.

    The memory goes back to the system at the end of the block, so nothing may hold the pixels any more.
    """
    with _DECODING if num_pixels > LARGE else contextlib.nullcontext():
        try:
            yield
        finally:
            if num_pixels > FELT:
                hand_back_memory()


def hand_back_memory() -> None:
    """Give freed memory back to the system; does nothing where the C library is not glibc.

    glibc keeps freed blocks of up to 32 MB for the thread that had them, and Pillow's have 16 MB: a picture of 25
    megapixels would cost 100 MB in every thread that once decoded one, of which the page and the models have dozens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _unlimited_header(content: bytes) -> Image.Image:
    """Open a picture whose size is then looked at here: Pillow's own limit would not say how large it is."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def take_uploads(paths: list[str], limits: Limits) -> tuple[Picture, ...]:
    """Read uploaded files into memory; once all are good, delete them from the disk.

    Raises:
        BadInputError: one of them is not acceptable; then all stay, since the visitor's box still shows them.
    """
    pictures = tuple(read_upload(path, limits) for path in paths)
    _TAKEN.update(zip(paths, pictures, strict=True))
    for path in map(Path, paths):
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # an upload of the same content shares the folder
            path.parent.rmdir()
    return pictures


def read_upload(path: str, limits: Limits) -> Picture:
    """Read an uploaded file, or find it in the conversation of a visitor who sent the same one.

    Raises:
        BadInputError: it is gone, too large, or no picture.
    """
    taken, path = _TAKEN.get(path), Path(path)
    try:
        if path.stat().st_size > limits.max_bytes:
            raise BadInputError(f"{path.name} is larger than {limits.max_bytes / 2**20:g} MB")
        return read_picture(path.read_bytes(), path.name, limits)
    except OSError as error:
        if taken is not None:
            return taken
        raise BadInputError(f"{path.name} is no longer here; please add it again") from error


def read_data_uri(text: str, limits: Limits) -> Picture:
    """Return the picture in `data:image/...;base64,...` or in bare base64.

    Raises:
        BadInputError: it is not one, or too large.
    """
    head, comma, body = text.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise BadInputError(f"'{text[:40]}' is no picture; give data:image/...;base64,... or an uploaded file")
    if len(text) > limits.max_bytes * 4 // 3 + 100:
        raise BadInputError(f"a picture is larger than {limits.max_bytes / 2**20:g} MB")
    try:
        content = base64.b64decode(body if comma else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInputError(
            f"'{text[:40]}' is no picture; give data:image/...;base64,... or an uploaded file"
        ) from error
    return read_picture(content, "the picture", limits)


def fetch_data_uri(address: str, limits: Limits) -> str:
    """Fetch a picture from a public http(s) address and return it as a data URI; see `fetch`.

    Raises:
        BadInputError: nothing acceptable came.
    """
    from internvl_mpo.demo.fetch import fetch

    picture = read_picture(fetch(address, limits.max_bytes), address, limits)
    return f"data:image/png;base64,{base64.b64encode(picture.png).decode()}"


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI: PNG where few colours make it small, else JPEG."""
    buffer = io.BytesIO()
    if image.getcolors(256) is not None:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Cutter:
    """How a model cuts pictures.

    Attributes:
        side: of a tile in pixels.
        num_image_token: tokens a tile costs.
        min_tiles, max_tiles: per picture, thumbnail not counted.
        thumbnail: whether the whole picture is added as a last tile if there is more than one.
    """

    side: int = 448
    num_image_token: int = 256
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True

    @classmethod
    def of(cls, processor) -> "Cutter":
        """Return the cutter of an `InternVLChatProcessor`."""
        images = processor.image_processor
        return cls(
            side=images.size["height"],
            num_image_token=processor.num_image_token,
            min_tiles=images.min_dynamic_patch,
            max_tiles=images.max_dynamic_patch if images.dynamic_image_size else 1,
            thumbnail=images.use_thumbnail,
        )

    def share(self, max_tiles: int | None, num_images: int) -> int:
        """Return the tiles each of several pictures may have, of a limit that they share."""
        return max(self.min_tiles, (max_tiles or self.max_tiles) // max(1, num_images))

    def grid(self, picture: Picture, limit: int) -> tuple[int, int]:
        """Return (columns, rows)."""
        return best_grid(picture.width, picture.height, self.min_tiles, limit, self.side)

    def num_tiles(self, picture: Picture, limit: int) -> int:
        """Return the tiles of a picture, the thumbnail included."""
        columns, rows = self.grid(picture, limit)
        return columns * rows + (self.thumbnail and columns * rows > 1)

    def describe(self, picture: Picture, limit: int) -> str:
        """Return in words how a picture is cut."""
        columns, rows = self.grid(picture, limit)
        copy = " and a small copy of the whole" if self.num_tiles(picture, limit) > columns * rows else ""
        return f"{columns} × {rows} tile{'s' if columns * rows > 1 else ''} of {self.side} × {self.side}{copy}"

    def num_tokens(self, picture: Picture, limit: int, num_images: int) -> int:
        """Return what a picture costs, of `num_images` in one conversation."""
        return self.num_tiles(picture, limit) * self.num_image_token

    def draw(self, picture: Picture, limit: int, tile_pixels: int = 96, gap: int = 4) -> Image.Image:
        """Return the tiles as the model gets them, apart from each other, the thumbnail at the right."""
        columns, rows = self.grid(picture, limit)
        tile_pixels = max(28, min(tile_pixels, 720 // (columns + 1)))
        inside = tile_pixels - 2  # without the line around it
        with decoding(picture.width * picture.height):
            pixels = picture.open().resize((columns * inside, rows * inside))
        has_thumbnail = self.thumbnail and columns * rows > 1
        width = columns * (tile_pixels + gap) - gap + (tile_pixels + 4 * gap if has_thumbnail else 0)
        sheet = Image.new("RGBA", (width, rows * (tile_pixels + gap) - gap))

        def put(tile: Image.Image, left: int, top: int) -> None:
            sheet.paste(ImageOps.expand(tile, 1, EDGE), (left, top))

        for row in range(rows):
            for column in range(columns):
                left, top = column * inside, row * inside
                tile = pixels.crop((left, top, left + inside, top + inside))
                put(tile, column * (tile_pixels + gap), row * (tile_pixels + gap))
        if has_thumbnail:
            put(pixels.resize((inside, inside)), width - tile_pixels, 0)
        return sheet
