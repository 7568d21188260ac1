"""The tile cutter: bit-exact with the original, and every odd image is an error or a documented result."""

import base64
import functools
import hashlib
import io
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from modeling_internvl_mpo import InternVLImageProcessor, dynamic_preprocess, load_image, video_frame_indices
from modeling_internvl_mpo.image_processing_internvl_mpo import best_grid, open_image, target_grids, to_rgb

ORACLE = Path(__file__).parent.parent / "../shared/oracle/model"
needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="outputs of the original code are not here")


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@needs_oracle
def test_grids_equal_the_original() -> None:
    for case in json.loads((ORACLE / "dynamic_preprocess.json").read_text()):
        limits = case["min_num"], case["max_num"], case["image_size"]
        assert best_grid(case["width"], case["height"], *limits) == (case["cols"], case["rows"]), case
    for limits, order in json.loads((ORACLE / "target_ratio_order.json").read_text()).items():
        assert [list(grid) for grid in target_grids(*map(int, limits.split("-")))] == order


@needs_oracle
def test_tiles_equal_the_original_bit_for_bit() -> None:
    tensors = load_file(ORACLE / "preprocess/tensors.safetensors")
    for case in json.loads((ORACLE / "preprocess/cases.json").read_text()):
        if "normalize_type" in case:
            continue  # the constants of other models
        image = to_rgb(Image.open(ORACLE / f"preprocess/{case['image']}.png"))
        side = case["image_size"]
        processor = InternVLImageProcessor(
            size={"height": side, "width": side},
            max_dynamic_patch=case.get("max_num", 1),
            dynamic_image_size="max_num" in case,
            pad2square=case.get("pad2square", False),
        )
        pixels = processor(image)["pixel_values"]
        if "sha256_uint8" in case:
            tiles = dynamic_preprocess(image, max_num=case["max_num"], image_size=side, use_thumbnail=True)
            assert len(tiles) == case["num_tiles"] == len(pixels)
            digest = hashlib.sha256(b"".join(tile.tobytes() for tile in tiles)).hexdigest()
            assert digest == case["sha256_uint8"]
        if "tensor" in case:
            found = pixels[:, :, ::37, ::41] if "sample" in case else pixels
            torch.testing.assert_close(found, tensors[case["tensor"]], atol=1e-6, rtol=0)


@needs_oracle
def test_video_frames_equal_the_quick_start() -> None:
    cases = json.loads((ORACLE / "video_frame_indices.json").read_text())
    cases = [case for case in cases if case["kind"] == "quick_start_get_index" and case["first_idx"] == 0]
    assert len(cases) >= 6
    for case in cases:
        found = video_frame_indices(case["max_frame"], case["fps"], case["num_segments"], case["bound"])
        assert found == case["indices"], case


def test_square_images_get_more_tiles_from_634_pixels_on() -> None:
    assert best_grid(633, 633, 1, 12, 448) == (1, 1)
    assert best_grid(634, 634, 1, 12, 448) == (2, 2)
    assert best_grid(951, 951, 1, 12, 448) == (3, 3)


def test_tiles_are_cut_row_by_row_and_the_thumbnail_comes_last() -> None:
    image = Image.new("RGB", (200, 100))
    image.paste((255, 0, 0), (0, 0, 100, 100))
    left, right, thumbnail = dynamic_preprocess(image, image_size=50, max_num=2, use_thumbnail=True)
    assert left.getpixel((25, 25)) == (255, 0, 0)
    assert right.getpixel((25, 25)) == (0, 0, 0)
    assert thumbnail.getpixel((10, 25)) == (255, 0, 0)
    assert thumbnail.getpixel((40, 25)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["CMYK", "P", "1", "L", "LA", "RGBA", "YCbCr", "HSV"])
def test_modes_become_rgb_before_resizing(mode: str) -> None:
    image = noise(90, 30, mode)
    expected = InternVLImageProcessor()(image.convert("RGB"))["pixel_values"]
    assert torch.equal(InternVLImageProcessor()(image)["pixel_values"], expected)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    for image in (Image.open(tmp_path / "deep.png"), Image.fromarray(values.astype(np.int32))):
        rgb = np.asarray(to_rgb(image))
        assert (rgb[..., 0] == values >> 8).all()
    with pytest.raises(ValueError, match="32-bit"):
        to_rgb(Image.fromarray(np.full((4, 4), 1 << 20, dtype=np.int32)))
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.fromarray(np.ones((4, 4), dtype=np.float32)))


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = noise(60, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "rotated.png", exif=exif)
    upright = to_rgb(Image.open(tmp_path / "rotated.png"))
    assert upright.size == (20, 60)
    assert np.array_equal(np.asarray(upright), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert to_rgb(Image.open(tmp_path / "two.gif")).getpixel((5, 5)) == (255, 0, 0)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(200, 200).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(ValueError, match=r"cannot be decoded.*damaged"):
        InternVLImageProcessor()(str(tmp_path / "cut.jpg"))


def test_empty_images_and_strange_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="0x5"):
        InternVLImageProcessor()(Image.new("RGB", (0, 5)))
    with pytest.raises(ValueError, match="max_tiles"):
        InternVLImageProcessor()(noise(5, 5), max_tiles=3)
    with pytest.raises(ValueError, match="1 <= min_num <= max_num"):
        InternVLImageProcessor()(noise(5, 5), min_dynamic_patch=5, max_dynamic_patch=3)
    with pytest.raises(ValueError, match="no image can be read from nothing"):
        InternVLImageProcessor()("nothing.png")
    with pytest.raises(ValueError, match="no images"):
        InternVLImageProcessor()([])


def test_one_pixel_wide_images_get_the_longest_strip() -> None:
    processor = InternVLImageProcessor(size={"height": 28, "width": 28})
    for size, grid in (((1, 10000), (1, 12)), ((10000, 1), (12, 1)), ((1, 1), (1, 1))):
        assert best_grid(*size, 1, 12, 28) == grid
        tiles = grid[0] * grid[1]
        assert len(processor(Image.new("RGB", size))["pixel_values"]) == tiles + (tiles > 1)


def test_images_come_from_paths_and_base64_too(tmp_path: Path) -> None:
    image = noise(40, 30)
    image.save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", encoded, f"data:image/png;base64,{encoded}"):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    for array in (np.asarray(image), torch.from_numpy(np.array(image)).permute(2, 0, 1)):
        found = InternVLImageProcessor()(array)["pixel_values"]
        assert torch.equal(found, InternVLImageProcessor()(image)["pixel_values"])
    assert torch.equal(load_image(tmp_path / "a.png"), InternVLImageProcessor()(image)["pixel_values"])


def test_images_come_from_addresses(tmp_path: Path) -> None:
    noise(40, 30).save(tmp_path / "a.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(np.asarray(open_image(f"{address}/a.png")), np.asarray(noise(40, 30)))
        with pytest.raises(ValueError, match="404"):
            open_image(f"{address}/b.png")
        server.shutdown()


def test_settings_survive_saving_and_return_types(tmp_path: Path) -> None:
    processor = InternVLImageProcessor(size={"height": 28, "width": 28}, max_dynamic_patch=3, use_thumbnail=False)
    processor.save_pretrained(tmp_path)
    loaded = InternVLImageProcessor.from_pretrained(tmp_path)
    image = noise(90, 30)
    outputs = loaded([image, image], return_tensors="np")
    assert isinstance(outputs["pixel_values"], np.ndarray)
    assert outputs["num_tiles"].tolist() == [3, 3]
    assert len(loaded(image, max_dynamic_patch=1)["pixel_values"]) == 1


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    max_num=st.integers(1, 12),
    mode=st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK"]),
)
def test_number_of_tiles_is_known_from_the_size(width: int, height: int, max_num: int, mode: str) -> None:
    processor = InternVLImageProcessor(size={"height": 8, "width": 8}, max_dynamic_patch=max_num)
    outputs = processor(Image.new(mode, (width, height)))
    num_tiles = processor.get_number_of_image_patches(height, width)
    assert outputs["pixel_values"].shape == (num_tiles, 3, 8, 8)
    assert 1 <= num_tiles <= max_num + 1
    assert outputs["pixel_values"].isfinite().all()
