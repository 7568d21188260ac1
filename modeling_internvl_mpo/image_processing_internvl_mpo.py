"""PIL image -> tiles -> normalised tensor. The only tile cutter of the project; needs no torchvision.

Bit-exact with the original on RGB input. Letters: I tiles, S side of a tile.
"""

import base64
import binascii
import io
import os
import urllib.request
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_image(source: Any) -> Any:
    """Return the image behind a path, an http(s) URL or base64 text (with or without `data:` in front).

    Anything that is not text or a path is returned as it is. Pixels are not converted, so `to_rgb` sees the file's
    own mode.

    Raises:
        ValueError: nothing readable is there.
    """
    if not isinstance(source, (str, os.PathLike)):
        return source
    name = os.fspath(source)
    try:
        if name.startswith(("http://", "https://")):
            with urllib.request.urlopen(name, timeout=60) as reply:
                return Image.open(io.BytesIO(reply.read()))
        if name.startswith("data:"):
            return Image.open(io.BytesIO(base64.b64decode(name.partition(",")[2], validate=True)))
        if not os.path.exists(name) and len(name) > 64:  # no file has such a name, base64 of an image is longer
            return Image.open(io.BytesIO(base64.b64decode(name, validate=True)))
        return Image.open(name)
    except (OSError, ValueError, binascii.Error, Image.DecompressionBombError) as error:
        shown = name if len(name) <= 100 else name[:60] + "..."
        raise ValueError(f"no image can be read from {shown} ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an upright 8-bit RGB image; the image itself, loaded, where it is one already.

    EXIF rotation is applied, the first frame of an animation is taken, transparency is dropped as the original drops
    it, and 16-bit greyscale is scaled to 8 bits (PIL would clip it to white).

    Raises:
        ValueError: an empty, truncated or floating-point image.
    """
    if 0 in image.size:
        raise ValueError(f"the image has size {image.size[0]}x{image.size[1]}; both sides must be at least 1 pixel")
    try:
        image.load()
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"the image file cannot be decoded ({error}); it is damaged or incomplete") from error
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else Pillow would copy every pixel
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("the image has floating-point pixels of unknown range; convert it to 8 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("the image has 32-bit pixels of unknown range; convert it to 8 bits first")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def target_grids(min_num: int, max_num: int) -> tuple[tuple[int, int], ...]:
    """Return every (columns, rows) grid with min_num to max_num tiles, smallest first.

    Grids of equal area keep the iteration order of a Python set filled as the original fills it: for min_num above 3
    a tie between two of them is decided by that order.
    """
    grids = {
        (columns, rows)
        for n in range(min_num, max_num + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if min_num <= columns * rows <= max_num
    }
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def best_grid(width: int, height: int, min_num: int, max_num: int, image_size: int) -> tuple[int, int]:
    """Return the (columns, rows) grid whose aspect ratio is nearest to the image's.

    Among grids of exactly the same ratio difference a later, larger one wins only if the image has more than half its
    pixels.

    Raises:
        ValueError: the limits leave no grid.
    """
    if not 1 <= min_num <= max_num:
        raise ValueError(f"min_num {min_num} and max_num {max_num} must satisfy 1 <= min_num <= max_num")
    best, best_difference = (1, 1), float("inf")
    for columns, rows in target_grids(min_num, max_num):
        difference = abs(width / height - columns / rows)
        larger = difference == best_difference and width * height > 0.5 * image_size**2 * columns * rows
        if difference < best_difference or larger:
            best, best_difference = (columns, rows), difference
    return best


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize bicubically, with the same pixels under every version of Pillow.

    Each direction is a pass of its own, rounded to 8 bits. Since 13.0 Pillow shrinks the height first where that takes
    away more than twice as many rows as columns; earlier versions never do, which differs by up to 23 of 255 levels.
    """
    if image.height - height > max(0, 2 * (image.width - width)):
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def dynamic_preprocess(
    image: Image.Image, min_num: int = 1, max_num: int = 12, image_size: int = 448, use_thumbnail: bool = False
) -> list[Image.Image]:
    """Resize an image to the best grid and cut it into tiles, row by row.

    Args:
        image: RGB.
        min_num: fewest tiles.
        max_num: most tiles, thumbnail not counted.
        image_size: side of a tile in pixels.
        use_thumbnail: append the whole image as a last tile if there is more than one.

    Returns:
        Tiles of image_size x image_size pixels.
    """
    columns, rows = best_grid(*image.size, min_num, max_num, image_size)
    resized = resize(image, columns * image_size, rows * image_size)
    tiles = [
        resized.crop((left, top, left + image_size, top + image_size))
        for top in range(0, rows * image_size, image_size)
        for left in range(0, columns * image_size, image_size)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(resize(image, image_size, image_size))
    return tiles


def expand_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Pad the shorter side on both ends until the image is square."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


class InternVLImageProcessorKwargs(ImagesKwargs, total=False):
    """Settings of the tile cutter beside those every image processor has.

    Attributes:
        dynamic_image_size: cut into tiles; otherwise one tile per image.
        min_dynamic_patch: fewest tiles of an image.
        max_dynamic_patch: most tiles of an image, thumbnail not counted.
        use_thumbnail: append the whole image as a last tile if there is more than one.
        pad2square: pad with the mean colour to a square first.
    """

    dynamic_image_size: bool
    min_dynamic_patch: int
    max_dynamic_patch: int
    use_thumbnail: bool
    pad2square: bool


class InternVLImageProcessor(PilBackend):
    """Images of any size to tiles of one size.

    `size` is the tile's `{"height": S, "width": S}`; the other settings are `InternVLImageProcessorKwargs`, in the
    names of config.json. All of them can be overridden in a call.
    """

    valid_kwargs = InternVLImageProcessorKwargs
    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    resample = Image.Resampling.BICUBIC
    image_mean = IMAGENET_MEAN
    image_std = IMAGENET_STD
    size: ClassVar[dict[str, int]] = {"height": 448, "width": 448}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    dynamic_image_size = True
    min_dynamic_patch = 1
    max_dynamic_patch = 12
    use_thumbnail = True
    pad2square = False

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Cut and normalise images.

        Args:
            images: one image, a list, or a list of lists; PIL, numpy, torch, path, URL or base64 text.
            return_tensors: "pt" (also for None) or "np".
            **kwargs: settings that replace the processor's own for this call.

        Returns:
            `pixel_values` (I, 3, S, S) float32 over all images, `num_tiles` (number of images,).

        Raises:
            ValueError: an image that cannot be read, or an unknown setting.
        """
        unknown = [name for name in kwargs if name not in self._valid_kwargs_names]
        if unknown:
            raise ValueError(f"unknown image setting {unknown[0]!r}; known are {', '.join(self._valid_kwargs_names)}")
        given = {name: value for name, value in kwargs.items() if value is not None}
        settings = {**{name: getattr(self, name) for name in self._valid_kwargs_names}, **given}
        per_image = [self._tiles(image, settings) for image in make_flat_list_of_images(self.fetch_images(images))]
        if not per_image:
            raise ValueError("there are no images; leave out the argument for text alone")
        tiles = [tile for tiles in per_image for tile in tiles]
        pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(settings[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels.contiguous().float().div_(255).sub_(mean).div_(std)
        num_tiles = torch.tensor([len(tiles) for tiles in per_image])
        data = {"pixel_values": pixels, "num_tiles": num_tiles}
        if return_tensors == "np":
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data)

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """Return how many tiles an upright image of this size is cut into; transformers' name for it.

        Args:
            height: in pixels.
            width: in pixels.
            images_kwargs: settings that replace the processor's own.
        """
        settings = {name: getattr(self, name) for name in self._valid_kwargs_names} | (images_kwargs or {})
        if not settings["dynamic_image_size"]:
            return 1
        if settings["pad2square"]:
            height = width = max(height, width)
        side = dict(settings["size"])["height"]
        limits = settings["min_dynamic_patch"], settings["max_dynamic_patch"]
        columns, rows = best_grid(width, height, *limits, side)
        return columns * rows + (settings["use_thumbnail"] and columns * rows > 1)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, URLs and base64 text in a (nested) list of images; see `open_image`."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return open_image(image_url_or_urls)

    def _tiles(self, image: Any, settings: dict[str, Any]) -> list[Image.Image]:
        image = to_rgb(image if isinstance(image, Image.Image) else to_pil_image(image))
        side = dict(settings["size"])["height"]
        if settings["pad2square"]:
            image = expand_to_square(image, tuple(int(value * 255) for value in settings["image_mean"]))
        if not settings["dynamic_image_size"]:
            return [resize(image, side, side)]
        return dynamic_preprocess(
            image, settings["min_dynamic_patch"], settings["max_dynamic_patch"], side, settings["use_thumbnail"]
        )


def load_image(image_file: Any, input_size: int = 448, max_num: int = 12) -> torch.Tensor:
    """Return the tiles of one image file as in the vendor's quick start, (I, 3, input_size, input_size)."""
    processor = InternVLImageProcessor(size={"height": input_size, "width": input_size}, max_dynamic_patch=max_num)
    with Image.open(image_file) as image:
        return processor(image)["pixel_values"]


def video_frame_indices(
    last_frame: int, fps: float, num_segments: int = 32, bound: tuple[float, float] | None = None
) -> list[int]:
    """Return the frames of the vendor's quick start: the middle of each of `num_segments` equal parts of a clip.

    Write them into the question as `Frame1: <image>` lines, one tile per frame (`max_dynamic_patch=1`).

    Args:
        last_frame: index of the video's last frame.
        fps: frames per second.
        num_segments: how many frames.
        bound: start and end of the clip in seconds; None means the whole video.
    """
    start, end = (0, last_frame) if bound is None else (max(0, round(bound[0] * fps)), round(bound[1] * fps))
    size = (min(end, last_frame) - start) / num_segments
    return [int(start + size / 2 + float(np.round(size * index))) for index in range(num_segments)]
