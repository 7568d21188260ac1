"""How much memory does the demo's page take under a thousand requests of every kind, well meant and not?

    python bench/page_load.py --base outputs/mini/start --mpo outputs/mini/model

`app.py` runs in a process of its own and is asked through its API, as the page does it: pages, uploads, questions with
pictures of every size, calls that cannot be meant, visitors who go before the answer. Memory is what Linux counts for
the process: at rest after the first answer, at its highest while requests came, and after the last one.
"""

import base64
import http.client
import io
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402


@dataclass
class Settings:
    """Settings of this measurement."""

    base: str = setting(help="model folder")
    mpo: str = setting(help="model folder")
    requests: int = setting(1000, help="how many")
    clients: int = setting(16, help="at the same time")
    tokens: int = setting(4, help="longest answer")
    seed: int = setting(0, help="of the mixture")


class Page:
    """A running page.

    Args:
        port: of the page, on this machine.
        tokens: longest answer.
    """

    def __init__(self, port: int, tokens: int):
        self.port, self.tokens = port, tokens

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        """One request on a connection of its own; return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def compare(self, *data: object, wait: bool = True) -> str:
        """Call `/compare` and read what it streams: "answered", "refused", or "gone" without waiting."""
        status, said = self.send("POST", "/gradio_api/call/compare", json.dumps({"data": data}).encode())
        if status != 200:
            return "refused"
        path = f"/gradio_api/call/compare/{json.loads(said)['event_id']}"
        if not wait:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)
            connection.request("GET", path)
            time.sleep(0.05)
            connection.close()
            return "gone"
        _, streamed = self.send("GET", path)
        return "answered" if b"event: complete" in streamed else "refused"

    def ask(self, *images: str, question: str = "What is shown?", wait: bool = True) -> str:
        """Ask in the way that is meant."""
        return self.compare(question, list(images), "plain", 0, self.tokens, None, 0, wait=wait)

    def upload(self, content: bytes) -> tuple[int, bytes]:
        """Send a file as the page does."""
        start = b'--line\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
        body = start + b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--line--\r\n"
        return self.send("POST", "/gradio_api/upload", body, "multipart/form-data; boundary=line")


def encoded(kind: str, size: tuple[int, int], colour: str = "red", mode: str = "RGB") -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, kind)
    return buffer.getvalue()


def uri(content: bytes, kind: str = "png") -> str:
    """A data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def make_acts(page: Page) -> list[tuple[str, Callable[[], str]]]:
    """One of every kind; what it ends with stands in front."""
    small, photo = uri(encoded("PNG", (300, 200))), uri(encoded("JPEG", (1600, 1200)), "jpeg")
    large, larger = uri(encoded("PNG", (5000, 5000))), uri(encoded("PNG", (6000, 6000)))
    huge = uri(encoded("JPEG", (8000, 6000)), "jpeg")
    bomb = uri(encoded("PNG", (20_000, 20_000), "white", "1"))

    numbers = itertools.count()

    def upload_and_ask() -> str:
        # no two alike: Gradio gives equal files one place, and the first question about it takes the file away
        _, said = page.upload(encoded("PNG", (320 + next(numbers), 240), "green"))
        named = {"path": json.loads(said)[0], "meta": {"_type": "gradio.FileData"}}
        return page.compare("What is shown?", [named], "plain", 0, page.tokens, None, 0)

    def nested() -> str:
        body = b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        status, _ = page.send("POST", "/gradio_api/call/compare", body)
        return "refused" if status >= 400 else "answered"

    return [
        *[("answered", lambda: page.ask()), ("answered", lambda: page.ask(small)), ("answered", upload_and_ask)],
        ("answered", lambda: page.ask(small, photo)),
        ("answered", lambda: page.ask(large)),  # 100 MB of pixels in 70 KB
        ("answered", lambda: page.ask(larger)),  # made smaller, as the next
        ("answered", lambda: page.ask(huge)),
        ("refused", lambda: page.ask(bomb)),
        ("refused", lambda: page.ask(uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "eps"))),
        ("refused", lambda: page.ask(question="word " * 100_000)),
        ("refused", lambda: page.ask("http://127.0.0.1:1/a.png")),
        ("refused", lambda: page.compare("q", [], "plain", 0, 10**9, None, 0)),
        ("refused", lambda: page.compare({"q": 1}, "x", "none", "hot", [], {}, "seed")),
        ("refused", nested),
        ("gone", lambda: page.ask(small, wait=False)),
        ("200", lambda: str(page.send("GET", "/")[0])),
        ("200", lambda: str(page.send("GET", "/config")[0])),
        ("200", lambda: str(page.upload(encoded("PNG", (800, 600), "blue"))[0])),  # never asked about
    ]


def memory_mb(pid: int, name: str) -> float:
    """A line of /proc/PID/status in MB: VmRSS is now, VmHWM the highest."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def measure(page: Page, pid: int, settings: Settings) -> bool:
    """Send everything and print what came and what it cost; return whether all ended as it should."""
    draw, acts = random.Random(settings.seed), make_acts(page)
    for expected, act in acts[:5]:
        if act() != expected:
            raise BadInputError("the page does not answer; start app.py with these models and look at what it says")
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark begins now
    start, began = memory_mb(pid, "VmRSS"), time.monotonic()

    def one(_: int) -> tuple[str, str]:
        expected, act = draw.choice(acts)
        return expected, act()

    with ThreadPoolExecutor(settings.clients) as pool:
        ends = Counter(pool.map(one, range(settings.requests)))
    seconds, highest, end = time.monotonic() - began, memory_mb(pid, "VmHWM"), memory_mb(pid, "VmRSS")
    for (expected, got), count in sorted(ends.items()):
        print(f"{count:5} expected {expected}, got {got}")
    print(
        f"{settings.requests} requests in {seconds:.0f} s; MB at the start {start:.0f}, at most {highest:.0f} "
        f"(+{highest - start:.0f}), at the end {end:.0f} (+{end - start:.0f})"
    )
    return all(expected == got for expected, got in ends)


def main(argv: list[str]) -> int:
    """Start the page, measure, end it."""
    settings = parse_settings(Settings, argv, program="bench/page_load.py", about=__doc__, config=False)
    command = [sys.executable, str(ROOT / "app.py"), "--base", settings.base, "--mpo", settings.mpo, "--port", "0"]
    server = subprocess.Popen([*command, "--preload", "true"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        found = (re.search(r"http://[\w.]+:(\d+)", line) for line in server.stdout)
        port = int(next(match[1] for match in found if match))
        return 0 if measure(Page(port, settings.tokens), server.pid, settings) else 1
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(run_program(main))
