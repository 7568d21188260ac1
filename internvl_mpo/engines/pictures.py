"""Pictures from outside: which are opened, how large they may be, and how a picture travels in a request."""

import base64
import io
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_mpo.errors import BadInputError

# What browsers show. Every decoder more is a risk more: PIL starts Ghostscript for an EPS file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 25_000_000
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # EXIF: the camera was held on its side
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}


@dataclass(frozen=True)
class EncodedPicture:
    """A picture from outside as it came; equal bytes are the same picture.

    Attributes:
        content: the file.
        size: (width, height) once it stands upright.
        mime: such as "image/png".
    """

    content: bytes = field(repr=False)
    size: tuple[int, int]
    mime: str

    def open(self) -> Image.Image:
        """Return the picture, decoded.

        Raises:
            OSError: the file is damaged.
        """
        try:
            image = Image.open(io.BytesIO(self.content), formats=FORMATS)
            image.load()
        except Exception as error:  # decoders meet hostile bytes with errors of any kind
            raise OSError(f"a picture is damaged ({type(error).__name__})") from error
        return image


def read_picture(content: bytes, name: str, max_pixels: int = MAX_PIXELS) -> EncodedPicture:
    """Check a picture from outside by its header; no pixel is decoded.

    Raises:
        BadInputError: it is of another format, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            (width, height), mime = upright_size(opened), Image.MIME[opened.format]
    except Exception as error:
        if isinstance(error, Image.DecompressionBombError):
            raise BadInputError(f"{name} is too large; at most {max_pixels / 1e6:g} megapixels") from error
        raise BadInputError(f"{name} is no picture that can be read; {', '.join(FORMATS)} are") from error
    if width * height > max_pixels:
        raise BadInputError(f"{name} has {width} x {height} pixels; at most {max_pixels / 1e6:g} megapixels")
    return EncodedPicture(content, (width, height), mime)


def picture_size(image: Any) -> tuple[int, int]:
    """Return (width, height) of a path, a PIL image or an `EncodedPicture`; of files by their header."""
    if isinstance(image, (Image.Image, EncodedPicture)):
        return image.size
    with Image.open(image) as opened:
        return upright_size(opened)


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Return (width, height) of an opened file once it stands upright; by its header."""
    width, height = opened.size
    tagged = any(name in opened.info for name in ("exif", "xmp", "XML:com.adobe.xmp"))  # else a PNG would be decoded
    return (height, width) if tagged and opened.getexif().get(_ORIENTATION) in _LYING else (width, height)


def data_uri(image: Any) -> str:
    """Return a picture (path, PIL image or `EncodedPicture`) as a data URI; files of a common type keep their bytes."""
    if isinstance(image, Image.Image):
        return _encode(image)
    if isinstance(image, EncodedPicture):
        return f"data:{image.mime};base64,{base64.b64encode(image.content).decode()}"
    return _file_data_uri(str(image))


@lru_cache(maxsize=128)  # the samples of one question follow each other
def _file_data_uri(path: str) -> str:
    mime = _MIME.get(Path(path).suffix.lower())
    with Image.open(path) as opened:  # also finds files that are no pictures before they travel
        if mime is None or Image.MIME.get(opened.format) != mime:
            return _encode(opened)
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
