"""How much memory does the server take under a thousand requests of every kind, well meant and not?

    python bench/server_load.py --model outputs/mini/model

The server runs in a process of its own. Memory is what Linux counts for it: at rest after the first reply, at its
highest while requests came, and after the last one.
"""

import base64
import contextlib
import http.client
import io
import json
import random
import re
import socket
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

from internvl_mpo.errors import run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

Address = tuple[str, int]


@dataclass
class Settings:
    """Settings of this measurement."""

    model: str = setting(help="model folder")
    requests: int = setting(1000, help="how many")
    clients: int = setting(16, help="at the same time")
    seed: int = setting(0, help="of the mixture")


def picture(kind: str, size: tuple[int, int], draw: random.Random) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    Image.new("RGB", size, draw.choice(("red", "green", "blue"))).save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def body(text: str = "What is shown?", pictures: tuple[str, ...] = (), **fields: object) -> bytes:
    """A chat completion."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [*parts, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 16, **fields}).encode()


def make_bodies(draw: random.Random) -> list[tuple[str, bytes]]:
    """One of every kind; what they are answered with stands in front."""
    eps = base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
    small, large = picture("PNG", (300, 200), draw), picture("JPEG", (1600, 1200), draw)
    return [
        ("200", body()),
        ("200", body(pictures=(small,))),
        ("200", body(pictures=(small, large), seed=3)),
        ("200", body(pictures=(large,), n=8, temperature=0.7)),
        ("200", body(pictures=(picture("PNG", (5000, 5000), draw),))),  # 75 MB of pixels in 70 KB
        ("200", body(stream=True, pictures=(small,))),
        ("400", body(max_tokens=1_000_000_000)),
        ("400", body("word " * 1_000_000)),
        ("400", body(pictures=(picture("PNG", (9400, 9400), draw),))),
        ("400", body(pictures=(f"data:image/eps;base64,{eps}",))),
        ("400", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("400", b'{"messages": [' + b"{}," * 2_000_000 + b"{}]}"),
        ("400", body(n=10**9)),
        ("400", body(stream_options="x")),
        ("400", body("\ud800")),
    ]


def post(address: Address, content: bytes) -> str:
    """Send a body and return the status; a server without a place is asked again."""
    for _ in range(50):
        connection = http.client.HTTPConnection(*address, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", content)
            response = connection.getresponse()
            response.read()
        if response.status != 503:
            return str(response.status)
        time.sleep(0.5)
    return "503"


def hang_up(address: Address, content: bytes) -> str:
    """Ask, and go before the answer."""
    with socket.create_connection(address) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(content))
        sock.sendall(content)
        time.sleep(0.05)
    return "gone"


def say_nothing(address: Address, content: bytes) -> str:
    """Hold a connection for a while."""
    with socket.create_connection(address):
        time.sleep(1.0)
    return "gone"


def memory_mb(pid: int, name: str) -> float:
    """A line of /proc/PID/status in MB: VmRSS is now, VmHWM the highest."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def main(argv: list[str]) -> int:
    """Measure and print."""
    settings = parse_settings(Settings, argv, program="bench/server_load.py", about=__doc__)
    command = [sys.executable, "-m", "internvl_mpo.engines.serve", "--model", settings.model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        line = next(line for line in server.stdout if line.startswith("listening on"))
        host, port = re.search(r"http://(.+):(\d+)/v1", line).groups()
        address, draw = (host, int(port)), random.Random(settings.seed)
        bodies = make_bodies(draw)
        post(address, bodies[1][1])
        Path(f"/proc/{server.pid}/clear_refs").write_text("5", encoding="utf-8")  # the high-water mark begins now
        start = memory_mb(server.pid, "VmRSS")

        def one(_: int) -> tuple[str, str]:
            expected, content = draw.choice(bodies)
            act: Callable[[Address, bytes], str] = draw.choices((post, hang_up, say_nothing), (90, 7, 3))[0]
            return ("gone" if act is not post else expected), act(address, content)

        began = time.monotonic()
        with ThreadPoolExecutor(settings.clients) as pool:
            answers = Counter(pool.map(one, range(settings.requests)))
        seconds = time.monotonic() - began
        highest, end = memory_mb(server.pid, "VmHWM"), memory_mb(server.pid, "VmRSS")
        for (expected, got), count in sorted(answers.items()):
            print(f"{count:5} expected {expected}, got {got}")
        print(
            f"{settings.requests} requests in {seconds:.0f} s; MB at the start {start:.0f}, at most {highest:.0f} ",
            end="",
        )
        print(f"(+{highest - start:.0f}), at the end {end:.0f} (+{end - start:.0f})")
    finally:
        server.terminate()
        server.wait()
    return 0 if all(expected == got for expected, got in answers) else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
