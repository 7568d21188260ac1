"""Pictures of several visitors at the same time: the same file twice, and many large ones."""

import io
import platform
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl_mpo.demo import pictures as demo_pictures
from internvl_mpo.demo.pictures import Limits, open_pictures, read_picture, take_uploads
from internvl_mpo.errors import BadInputError
from modeling_internvl_mpo.image_processing_internvl_mpo import to_rgb


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", size).save(buffer, "PNG")
    return buffer.getvalue()


def test_two_visitors_who_upload_the_same_file_both_get_their_question(tmp_path):
    """Gradio names the folder of an upload by its content, so both have one file, and the first question deletes it."""
    path = tmp_path / "same.png"
    path.write_bytes(png((30, 20)))
    first = take_uploads([str(path)], Limits())
    assert not path.exists()
    second = take_uploads([str(path)], Limits())
    assert second[0].png == first[0].png
    del first, second
    with pytest.raises(BadInputError, match=r"same.png is no longer here"):
        take_uploads([str(path)], Limits())


def test_large_pictures_are_decoded_one_after_the_other(monkeypatch):
    """A picture of 25 megapixels takes 75 MB and more as pixels, and the page has forty threads."""
    at_once, most, counting = 0, 0, threading.Lock()
    decode = demo_pictures.to_rgb

    def counted(image):
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.05)
        result = decode(image)
        with counting:
            at_once -= 1
        return result

    monkeypatch.setattr(demo_pictures, "to_rgb", counted)

    content = png((2100, 2100))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_picture(content, "a.png", Limits()), range(4)))
    assert most == 1


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="memory of glibc is measured")
def test_the_pixels_of_a_picture_do_not_stay_in_the_thread_that_decoded_it():
    """Freed blocks of 16 MB stayed in malloc's arena of each thread: 100 MB for every thread of the page."""
    buffer, decoded, wait = io.BytesIO(), threading.Semaphore(0), threading.Event()
    Image.new("RGB", (2600, 2000), "red").save(buffer, "PNG")

    def decode_and_stay() -> None:  # a thread that ends would leave its arena to the next one
        read_picture(buffer.getvalue(), "a.png", Limits())
        decoded.release()
        wait.wait()

    def resident_mb() -> float:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

    demo_pictures.hand_back_memory()
    before = resident_mb()
    threads = [threading.Thread(target=decode_and_stay, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
        assert decoded.acquire(timeout=60)
    wait.set()
    for thread in threads:
        thread.join()
    assert resident_mb() - before < 70  # six threads that keep their pixels have 126; others of the process have some


def test_a_picture_that_is_ready_is_not_copied():
    image = Image.new("RGB", (8, 4), "red")
    assert to_rgb(image) is image


def test_many_large_pictures_share_the_pixels_of_one(monkeypatch):
    monkeypatch.setattr(demo_pictures, "MOST_FOR_A_MODEL", 9000)
    large, small = (read_picture(png(size), "a.png", Limits()) for size in ((100, 60), (30, 20)))
    assert [image.size for image in open_pictures([large, small])] == [(100, 60), (30, 20)]
    opened = open_pictures([large, small, large])
    assert [image.size for image in opened] == [(70, 42), (30, 20), (70, 42)]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_made_smaller_in_strips_is_the_whole_made_smaller(monkeypatch, mode, orientation):
    monkeypatch.setattr(demo_pictures, "STRIP", 3)
    pixels = np.random.default_rng(0).integers(0, 255, (23, 41), dtype=np.uint8)
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(buffer, "PNG", exif=exif)
    picture = read_picture(buffer.getvalue(), "a.png", Limits(max_pixels=700))
    expected = to_rgb(image).reduce(2)
    if orientation == 6:
        expected = expected.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(picture.open()), np.asarray(expected))
    assert picture.sent == ((41, 23) if orientation == 1 else (23, 41))


def test_a_webp_picture_may_be_half_as_large():
    """Its decoder keeps several copies of all pixels: 48 megapixels took 780 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30)).save(buffer, "WEBP")
    with pytest.raises(BadInputError, match=r"too large: 40 x 30 pixels"):
        read_picture(buffer.getvalue(), "a.webp", Limits(max_pixels=2000))
    assert read_picture(buffer.getvalue(), "a.webp", Limits(max_pixels=2400)).sent is None
