"""Starts a Space's folder as the Hub would, and asks it a question."""

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.proof import clean_environment, last_words

_TOO_BUSY = "localhost is not accessible"  # Gradio gives its own page three seconds; a busy computer needs more


def try_out(folder: Path, *, clean: bool, ask: bool, timeout: float) -> str:
    """Start the app as a Space does: from a copy, in an environment of its own.

    Args:
        folder: what goes to the Hub.
        clean: install requirements.txt; otherwise the packages of this environment are borrowed.
        ask: also put a question, which loads both models.
        timeout: seconds until the page, and the answer, have to be there.

    Returns:
        A sentence with the figures.

    Raises:
        BadInputError: a package cannot be installed, the page does not come, or a question is not answered.
    """
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        copy = home / "space"
        shutil.copytree(folder, copy)
        python = _make_environment(home / "venv", copy / "requirements.txt", clean)
        begin = time.monotonic()
        with contextlib.ExitStack() as stack:
            try:
                url = stack.enter_context(_started(python, copy, home, timeout))
            except BadInputError as error:
                if _TOO_BUSY not in str(error):
                    raise
                url = stack.enter_context(_started(python, copy, home, timeout))
            seconds = time.monotonic() - begin
            endpoints = json.loads(_get(f"{url}/gradio_api/info"))["named_endpoints"]
            if "/compare" not in endpoints:
                raise BadInputError(f"the started app has no endpoint /compare, only {', '.join(endpoints)}")
            sentence = f"started in {'a clean' if clean else 'a borrowed'} environment, page after {seconds:.0f} s"
            if ask:
                base, mpo = _ask(url, timeout)
                sentence += f"; both models answered ({len(base)} and {len(mpo)} characters)"
    return sentence


def _make_environment(folder: Path, requirements: Path, clean: bool) -> Path:
    """Return the interpreter of a new virtual environment."""
    venv.create(folder, with_pip=clean, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if clean:
        words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(requirements)]
        ran = subprocess.run(words, capture_output=True, text=True)
        if ran.returncode != 0:
            raise BadInputError(f"{requirements.name} cannot be installed in a clean environment: {last_words(ran)}")
        return python
    # A folder named in a .pth file is searched for packages, but the .pth files in it are not read: an editable
    # installation of this project does not come along.
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    inside = folder / ("Lib/site-packages" if os.name == "nt" else f"lib/{version}/site-packages")
    (inside / "borrowed.pth").write_text("".join(f"{path}\n" for path in packages), encoding="utf-8")
    return python


@contextlib.contextmanager
def _started(python: Path, folder: Path, home: Path, timeout: float) -> Iterator[str]:
    """Run the app and give its address."""
    environment = clean_environment(home, online=True) | {"PYTHONUNBUFFERED": "1"}
    output = home / "output.txt"
    with open(output, "w", encoding="utf-8") as file:
        words = [str(python), "app.py", "--host", "127.0.0.1", "--port", "0"]
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + timeout
        while not (match := re.search(r"https?://127\.0\.0\.1:\d+", _text(output))):
            if process.poll() is not None or time.monotonic() > end:
                last = (_text(output).strip().splitlines() or ["no output"])[-1]
                ended = process.returncode is not None
                how = f"ended with code {process.returncode}" if ended else f"shows no page within {timeout:.0f} s"
                raise BadInputError(f"the app {how} in an environment of its own: {last[:300]}")
            time.sleep(0.2)
        _get(match[0])
        yield match[0]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _get(url: str, timeout: float = 30) -> str:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read().decode("utf-8")


def _ask(url: str, timeout: float) -> tuple[str, str]:
    """Put a question about a picture through the API; return both answers."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((64, 32)).save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    # question, images, style, temperature, max_new_tokens, max_tiles, seed
    body = json.dumps({"data": ["Describe the picture.", [picture], "plain", 0.0, 16, None, 0]}).encode()
    request = urllib.request.Request(f"{url}/gradio_api/call/compare", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        event = json.load(answer)["event_id"]
    lines = _get(f"{url}/gradio_api/call/compare/{event}", timeout).splitlines()
    name, data = lines[-3:-1] if not lines[-1] else lines[-2:]
    if name != "event: complete":
        raise BadInputError(f"the started app did not answer a question: {data[:300]}")
    (result,) = json.loads(data.removeprefix("data: "))
    return result["base"]["text"], result["mpo"]["text"]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
