"""A small server with OpenAI's chat completions over the transformers engine, for one machine.

    python -m internvl_mpo.engines.serve --model outputs/mini/model --port 8000

Requests that arrive together are answered in one batch, and streamed to those who ask for it (`stream: true`). A client
that hangs up ends its own replies. Conversations may have any number of turns, and an assistant turn to be continued.
It exists so that the HTTP path can be used and tested without a serving engine; for real loads put vLLM, SGLang or
LMDeploy behind the same URL. Listens on this machine only unless told otherwise, reads pictures from data URIs only.

No field of OpenAI's chat completions is ignored: it is honoured, or answered with 400 and its name (another `model`
with 404, as elsewhere). A prompt that with `max_tokens` goes beyond the context is a 400; without `max_tokens` a reply
has 1,024 tokens or what is left. Pictures are PNG, JPEG, WebP, GIF or BMP of at most 25 megapixels, bodies have at most
64 MB; the files beside this one say how many connections, how much memory and how much time a client has.
"""

import socket
import sys
import threading
from dataclasses import dataclass

from internvl_mpo.engines import Engine
from internvl_mpo.engines.batching import Batcher
from internvl_mpo.engines.chat_app import ChatApp
from internvl_mpo.errors import BadInputError, need_package, run_program
from internvl_mpo.settings import parse_settings, setting, show_settings


@dataclass
class Settings:
    """Settings of the server; `--help` prints them."""

    model: str = setting(help="folder or Hub id of the model")
    name: str | None = setting(None, help="name clients call the model by; empty is the value of model")
    host: str = setting("127.0.0.1", help="address to listen on; 0.0.0.0 is every network of the machine")
    port: int = setting(8000, help="port; 0 takes a free one")
    batch_size: int = setting(32, help="replies generated at the same time")
    max_tiles: int | None = setting(None, help="most crops per request; empty keeps the model's limit")
    device: str = setting("auto", help="torch device")
    dtype: str = setting("auto", help="auto, float32, bfloat16 or float16")


class BatchServer:
    """Serves an engine over HTTP.

    Args:
        engine: who answers.
        name: of the model, as `/v1/models` lists it.
        host: where to listen.
        port: 0 takes a free one, `server_address` tells which.
        batch_size: requests handed to the engine together, at most.

    Raises:
        BadInputError: the address is taken, or not of this machine; uvicorn is not installed (extra `serve`).
    """

    def __init__(self, engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 0, batch_size: int = 32):
        need_package("uvicorn", "the server")
        import uvicorn

        from internvl_mpo.engines.http_limits import LimitedProtocol

        try:
            self._socket = socket.create_server((host, port), backlog=1024)
        except (OSError, OverflowError) as error:
            raise BadInputError(f"cannot listen on {host}:{port} ({error}); give another --host or --port") from error
        self.server_address: tuple[str, int] = self._socket.getsockname()[:2]
        self.engine = engine
        self._batcher = Batcher(engine, batch_size)
        config = uvicorn.Config(
            ChatApp(engine, name, self._batcher),
            http=LimitedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # clients that break off are no news
            access_log=False,
            server_header=False,
            timeout_keep_alive=60,
            timeout_graceful_shutdown=5,
        )
        self._uvicorn = uvicorn.Server(config)
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}/v1"

    def serve_forever(self) -> None:
        """Serve until `shutdown` or an interrupt."""
        try:
            self._uvicorn.run(sockets=[self._socket])
        finally:
            self._ended.set()

    def shutdown(self) -> None:
        """End `serve_forever`, from another thread; replies under way get five seconds."""
        self._uvicorn.should_exit = True
        self._ended.wait()

    def server_close(self) -> None:
        """Stop listening and batching."""
        self._socket.close()
        self._batcher.close()


def main(argv: list[str]) -> int:
    """Serve until interrupted."""
    settings = parse_settings(Settings, argv, program="-m internvl_mpo.engines.serve", about=__doc__)
    print(show_settings(settings, "Serving"))
    from internvl_mpo.engines.loading import load_model_engine

    engine = load_model_engine(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_tiles=settings.max_tiles,
    )
    server = BatchServer(
        engine,
        settings.name or settings.model,
        host=settings.host,
        port=settings.port,
        batch_size=settings.batch_size,
    )
    print(f"listening on {server.url}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
