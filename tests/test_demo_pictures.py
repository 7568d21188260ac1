"""Pictures of several visitors at the same time: the same file twice, and many large ones."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from internvl_mpo.demo import pictures as demo_pictures
from internvl_mpo.demo.pictures import Limits, read_picture, take_uploads
from internvl_mpo.errors import BadInputError


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
