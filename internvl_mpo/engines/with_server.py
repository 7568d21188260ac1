r"""Run a program beside servers of a model: start them, wait until they answer, run, stop them.

    python -m internvl_mpo.engines.with_server --model outputs/mini/model --replicas 2 --log outputs/server \
        --serve "python -m internvl_mpo.engines.serve --model {model} --port {port}" -- \
        python dataset_scripts/sample_responses.py --engine http --base_url {base_url} --model outputs/mini/model \
        --served_from outputs/mini/model --questions questions.jsonl --output responses.jsonl

Any OpenAI-compatible server will do. In its command {model}, {port} and {replica} (counted from 0) are filled in, and
NAME=VALUE in front sets its environment: "CUDA_VISIBLE_DEVICES={replica} vllm serve {model} --port {port}". In the
program's command {base_url} becomes the addresses. The exit code is the program's.
"""

import contextlib
import http.client
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import parse_settings, setting

HOST = "127.0.0.1"
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_TO_END = 30.0  # between asking a server to end and ending it
NUM_LAST_LINES = 15  # of a server that failed
_ENVIRONMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(kw_only=True)
class Settings:
    """Settings of the program; `--help` prints them."""

    serve: str = setting(help="command of a server, with {model} and {port}")
    model: str = setting(help="folder or Hub id for {model}")
    replicas: int = setting(1, help="servers at the same time")
    seconds: float = setting(1800.0, help="longest time until all of them answer")
    log: str = setting(help="their output goes to LOG.0.log, LOG.1.log, ..")

    def __post_init__(self) -> None:
        if "{model}" not in self.serve or "{port}" not in self.serve:
            raise BadInputError(f"serve is '{self.serve}', expected a command with {{model}} and {{port}} in it")
        if self.replicas < 1:
            raise BadInputError(f"replicas is {self.replicas}, expected 1 or more")


def main(argv: list[str]) -> int:
    """Run the program between start and stop of the servers."""
    place = argv.index("--") if "--" in argv else len(argv)
    settings = parse_settings(Settings, argv[:place], program="-m internvl_mpo.engines.with_server", about=__doc__,
                              config=False)  # fmt: skip
    command = argv[place + 1 :]
    if not command:
        raise BadInputError("there is no program to run; give its command after --")
    signal.signal(signal.SIGTERM, _leave)  # a scheduler ends jobs with it; servers must not stay
    with running_servers(settings) as urls:
        return subprocess.run([word.replace("{base_url}", ",".join(urls)) for word in command], check=False).returncode


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def running_servers(settings: Settings) -> Iterator[list[str]]:
    """Give the URLs of servers that answer, and stop them afterwards.

    They stay in the process group of the caller, so that what kills the whole group leaves none behind.

    Raises:
        BadInputError: a command cannot be started, ended, or did not answer in time.
    """
    servers: list[tuple[subprocess.Popen, int, Path]] = []
    try:
        for replica, port in enumerate(free_ports(settings.replicas)):
            log = Path(f"{settings.log}.{replica}.log")
            servers.append((_start(settings, replica, port, log), port, log))
        deadline = time.monotonic() + settings.seconds
        for server in servers:
            _wait_for(*server, deadline)
        yield [f"http://{HOST}:{port}/v1" for _, port, _ in servers]
    finally:
        for process, _, _ in servers:
            process.terminate()
        for process, _, _ in servers:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


def server_command(template: str, *, model: str, port: int, replica: int) -> tuple[list[str], dict[str, str]]:
    """Return the words of a server's command, and what it sets in its environment.

    Raises:
        BadInputError: the template is no command.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise BadInputError(f"serve is '{template}', which is no command: {error}") from error
    values = {"{model}": model, "{port}": str(port), "{replica}": str(replica)}
    words = [re.sub(r"\{(?:model|port|replica)\}", lambda place: values[place.group()], word) for word in words]
    count = next((place for place, word in enumerate(words) if not _ENVIRONMENT.match(word)), len(words))
    if count == len(words):
        raise BadInputError(f"serve is '{template}', which starts nothing; give the command of a server")
    return words[count:], dict(word.split("=", 1) for word in words[:count])


def _start(settings: Settings, replica: int, port: int, log: Path) -> subprocess.Popen:
    words, environment = server_command(settings.serve, model=settings.model, port=port, replica=replica)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        try:
            return subprocess.Popen(words, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT)
        except OSError as error:
            raise BadInputError(
                f"cannot start '{words[0]}' ({error.strerror}); put another command in serve"
            ) from error


def _wait_for(process: subprocess.Popen, port: int, log: Path, deadline: float) -> None:
    """Wait until a server lists its models."""
    while not _answers(port):
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-NUM_LAST_LINES:]), file=sys.stderr)
            raise BadInputError(f"the server ended with exit code {process.returncode} before it answered; see {log}")
        if time.monotonic() > deadline:
            raise BadInputError(f"the server did not answer in time; see {log}, or give it more seconds")
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(run_program(main))
