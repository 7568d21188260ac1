"""Whether the model's encoder takes a picture, and why a picture cannot be opened."""

import re

from PIL import Image

# What every encoder converts to RGB; a picture of another mode may be refused for its pixels.
_PLAIN_MODES = frozenset(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "La", "RGBX", "CMYK", "YCbCr"))


def check_encodable(image: Image.Image, *, decode: bool) -> None:
    """Refuse a picture that the encoder would refuse.

    Args:
        image: opened; nothing needs to be decoded yet.
        decode: also decode plain pictures, which finds files that were cut off. Others are decoded in any case.

    Raises:
        ValueError: the file is damaged, or has no or floating-point pixels.
    """
    if image.mode in _PLAIN_MODES and 0 not in image.size:
        if decode:
            try:
                image.load()
            except Exception as error:  # decoders of broken files raise nearly anything
                raise ValueError(str(error) or type(error).__name__) from error
        return
    from modeling_internvl_mpo.image_processing_internvl_mpo import to_rgb  # torch, for the odd picture only

    to_rgb(image)


def damage(error: BaseException) -> str:
    """Return what is wrong with a picture, without the place in memory of the bytes that Pillow was given.

    Args:
        error: raised while a picture was opened or decoded.
    """
    return re.sub(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>", "", str(error)) or type(error).__name__
